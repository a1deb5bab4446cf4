"""One answer while it is generated: ids become text, and the text ends before a stop string."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from farthing.batching.types import FinishReason, TokenEvent
from farthing.server.detokenise import Detokeniser
from farthing.server.stop import StopMatcher


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token whose text has been shown, and the characters of the answer before it."""

    event: TokenEvent
    text_offset: int


@dataclass(frozen=True, slots=True)
class Piece:
    """What one event added to the answer with this index."""

    index: int
    text: str = ""
    tokens: Sequence[ShownToken] = ()  # filled only where log probabilities were asked for
    finish_reason: FinishReason | None = None


class Answer:
    """The text of one sequence.

    `min_tokens` is how many tokens pass before stop strings are looked for.
    """

    def __init__(
        self,
        index: int,
        detokeniser: Detokeniser,
        stops: Sequence[str],
        *,
        min_tokens: int = 0,
        keep_tokens: bool = False,
    ) -> None:
        self.index = index
        self.token_count = 0
        self.finish_reason: FinishReason | None = None
        self._detokeniser = detokeniser
        self._matcher = StopMatcher(stops)
        self._min_tokens = min_tokens
        self._keep_tokens = keep_tokens
        self._unshown: deque[ShownToken] = deque()
        self._decoded = 0  # characters
        self._shown = 0  # characters

    def push(self, event: TokenEvent) -> Piece | None:
        """Take the sequence's next event; None while there is nothing to show for it."""
        text, stopped = self._text_of(event)
        if event.finish_reason and not stopped:
            rest, stopped = self._match(self._detokeniser.finish())
            text += rest if stopped else rest + self._matcher.finish()
        self._shown += len(text)
        self.finish_reason = "stop" if stopped else event.finish_reason
        tokens = self._newly_shown(all_of_them=bool(event.finish_reason and not stopped))
        if not (text or tokens or self.finish_reason):
            return None
        return Piece(self.index, text, tokens, self.finish_reason)

    def _text_of(self, event: TokenEvent) -> tuple[str, bool]:
        """The text an event's token made whole, and whether a stop string ended it."""
        if event.token is None:
            return "", False
        self.token_count += 1
        if event.finish_reason == "stop":  # the token that ends a sequence is not part of it
            return "", False
        if self._keep_tokens:
            self._unshown.append(ShownToken(event, self._decoded))
        return self._match(self._detokeniser.push(event.token))

    def _match(self, text: str) -> tuple[str, bool]:
        self._decoded += len(text)
        if self.token_count <= self._min_tokens:
            return text, False
        return self._matcher.push(text)

    def _newly_shown(self, *, all_of_them: bool) -> Sequence[ShownToken]:
        shown = []
        while self._unshown and (all_of_them or self._unshown[0].text_offset < self._shown):
            shown.append(self._unshown.popleft())
        return shown
