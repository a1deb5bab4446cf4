"""POST /v1/completions"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from farthing.server.answer import Piece, ShownToken
from farthing.server.logprobs import completion_logprobs
from farthing.server.plan import plan
from farthing.server.protocol import (
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    Usage,
)
from farthing.server.respond import check_model, head, read_body, respond
from farthing.server.services import Services, services_of


async def completions(request: Request) -> Response:
    """Continue each prompt as it stands, without a chat template."""
    services = services_of(request)
    body = CompletionRequest.model_validate_json(await read_body(request, services.body_limit))
    check_model(body.model, services)
    prompts = [await _ids(prompt, services) for prompt in body.prompts]
    sequences = plan(body, prompts, "prompt", services)
    dialect = CompletionDialect(body, _echoes(body, services), services)
    return await respond(request, body, sequences, dialect, services)


async def _ids(prompt: str | list[int], services: Services) -> list[int]:
    """An empty prompt is one that has only begun."""
    if not isinstance(prompt, str):
        return prompt
    ids = await services.text.tokenise(prompt, add_special_tokens=True)
    return ids or services.text.beginning


def _echoes(body: CompletionRequest, services: Services) -> list[str]:
    """What each choice's text begins with."""
    if not body.echo:
        return []
    texts = [
        prompt if isinstance(prompt, str) else services.text.decode(prompt)
        for prompt in body.prompts
    ]
    return [text for text in texts for _ in range(body.n or 1)]


class CompletionDialect:
    """Writes plain completions. `echoes` are the prompts by choice, or none."""

    def __init__(self, body: CompletionRequest, echoes: Sequence[str], services: Services) -> None:
        self._head = head("cmpl", body, services)
        self._vocabulary = services.text.vocabulary
        self._echoes = echoes
        self._with_logprobs = body.logprob_count is not None
        self._with_usage = body.include_usage

    def opening(self) -> Sequence[Completion]:
        """The prompts, where they are to be echoed."""
        return [
            self._completion([CompletionChoice(index=index, text=echo)])
            for index, echo in enumerate(self._echoes)
        ]

    def chunk(self, piece: Piece) -> Completion:
        """A piece's text, or its end, or both."""
        return self._completion(
            [
                CompletionChoice(
                    index=piece.index,
                    text=piece.text,
                    logprobs=self._logprobs(piece.tokens) if piece.tokens else None,
                    finish_reason=piece.finish_reason,
                )
            ]
        )

    def usage_chunk(self, usage: Usage) -> Completion:
        """No choice, only the usage."""
        return self._completion([], usage)

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> Completion:
        """All continuations."""
        return Completion(
            **self._head,
            choices=[self._choice(index, pieces) for index, pieces in enumerate(answers)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: Sequence[Piece]) -> CompletionChoice:
        echo = self._echoes[index] if self._echoes else ""
        return CompletionChoice(
            index=index,
            text=echo + "".join(piece.text for piece in pieces),
            logprobs=self._logprobs([token for piece in pieces for token in piece.tokens]),
            finish_reason=pieces[-1].finish_reason,
        )

    def _logprobs(self, tokens: Sequence[ShownToken]) -> CompletionLogprobs | None:
        return completion_logprobs(tokens, self._vocabulary) if self._with_logprobs else None

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | None = None
    ) -> Completion:
        return Completion(
            **self._head,
            choices=choices,
            usage=usage if self._with_usage else UNSET,
        )
