"""A request while it lives in the engine, and the part of it that one step computes."""

from __future__ import annotations

from dataclasses import dataclass

from farthing.batching.blocks import PageHash, page_hash
from farthing.batching.types import FinishReason, Request, SamplingParams


class Sequence:
    """One request's tokens, and how far their keys and values are in the cache.

    `tokens` is prompt and output together. `computed` counts those whose K and V are in `pages`;
    the rest is what the next steps have to compute. A preempted sequence goes back to computed = 0
    and loses nothing: its output is then part of what it computes again.
    """

    def __init__(self, request: Request, number: int) -> None:
        self.request = request
        self.number = number  # order of arrival
        self.tokens = [*request.prompt, *request.generated]
        self.pages: list[int] = []
        self.computed = 0
        self.cached = 0  # prompt tokens found in the prefix cache when first admitted
        self.admitted = False  # has been part of a step before
        self._hashes: list[PageHash] = []

    @property
    def request_id(self) -> str:
        return self.request.request_id

    @property
    def params(self) -> SamplingParams:
        return self.request.params

    @property
    def prompt_length(self) -> int:
        return len(self.request.prompt)

    @property
    def output_length(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def output(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be drawn; 1 while decoding."""
        return len(self.tokens) - self.computed

    def hashes(self, page_size: int, tokens: int) -> list[PageHash]:
        """Names of the full pages among the first `tokens` tokens; computed once each."""
        for page in range(len(self._hashes), tokens // page_size):
            parent = self._hashes[-1] if self._hashes else b""
            chunk = self.tokens[page * page_size : (page + 1) * page_size]
            self._hashes.append(page_hash(parent, chunk))
        return self._hashes[: tokens // page_size]

    def finish_reason(self, max_model_len: int) -> FinishReason | None:
        """Why the token drawn last ends this sequence, or None."""
        if (
            self.tokens[-1] in self.params.stop_token_ids
            and self.output_length >= self.params.min_tokens
        ):
            return "stop"
        if self.output_length >= self.params.max_tokens or len(self.tokens) >= max_model_len:
            return "length"
        return None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens start to start + length of a sequence, computed in one step."""

    sequence: Sequence
    start: int
    length: int
    draws: bool  # ends at the sequence's last token, so that its logits give the next

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def prefill(self) -> int:
        """How many of the chunk's tokens belong to the prompt."""
        return max(0, min(self.end, self.sequence.prompt_length) - self.start)


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step computes."""

    chunks: tuple[Chunk, ...]
    preemptions: int = 0
    prefix_queries: int = 0  # tokens looked up in the prefix cache
    prefix_hits: int = 0  # tokens found there

    @property
    def tokens(self) -> int:
        return sum(chunk.length for chunk in self.chunks)

    @property
    def drawing(self) -> list[Chunk]:
        """The chunks that draw a token, in the order of their logits."""
        return [chunk for chunk in self.chunks if chunk.draws]
