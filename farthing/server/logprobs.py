"""Log probabilities as the two endpoints write them."""

from __future__ import annotations

from collections.abc import Sequence

from farthing.batching.types import TokenEvent
from farthing.server.answer import ShownToken
from farthing.server.detokenise import Vocabulary
from farthing.server.protocol import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob

_LOWEST = -9999.0  # what OpenAI writes for a probability of 0; JSON has no infinity


def chat_logprobs(tokens: Sequence[ShownToken], vocabulary: Vocabulary) -> ChatLogprobs:
    """Each token with its bytes and its likeliest alternatives."""
    return ChatLogprobs([_chat_token(shown.event, vocabulary) for shown in tokens])


def completion_logprobs(tokens: Sequence[ShownToken], vocabulary: Vocabulary) -> CompletionLogprobs:
    """The same as lists of equal length; the drawn token is always among the alternatives."""
    drawn = [_name(_token_of(shown.event), vocabulary) for shown in tokens]
    logprobs = [_finite(shown.event.logprob) for shown in tokens]
    return CompletionLogprobs(
        tokens=drawn,
        token_logprobs=logprobs,
        top_logprobs=[
            {name: logprob} | _alternatives(shown.event, vocabulary)
            for name, logprob, shown in zip(drawn, logprobs, tokens, strict=True)
        ],
        text_offset=[shown.text_offset for shown in tokens],
    )


def _chat_token(event: TokenEvent, vocabulary: Vocabulary) -> TokenLogprob:
    spelt = vocabulary.token_bytes(_token_of(event))
    return TokenLogprob(
        spelt.decode(errors="replace"),
        _finite(event.logprob),
        list(spelt),
        [_top(entry.token, entry.logprob, vocabulary) for entry in event.top_logprobs],
    )


def _top(token: int, logprob: float, vocabulary: Vocabulary) -> TopLogprob:
    spelt = vocabulary.token_bytes(token)
    return TopLogprob(spelt.decode(errors="replace"), _finite(logprob), list(spelt))


def _alternatives(event: TokenEvent, vocabulary: Vocabulary) -> dict[str, float]:
    return {_name(entry.token, vocabulary): _finite(entry.logprob) for entry in event.top_logprobs}


def _name(token: int, vocabulary: Vocabulary) -> str:
    """A token's text; its bytes where they are only part of a character."""
    spelt = vocabulary.token_bytes(token)
    try:
        return spelt.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelt)


def _token_of(event: TokenEvent) -> int:
    assert event.token is not None  # only tokens are kept to be shown
    return event.token


def _finite(logprob: float | None) -> float:
    return _LOWEST if logprob is None else max(logprob, _LOWEST)
