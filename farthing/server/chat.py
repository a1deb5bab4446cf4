"""POST /v1/chat/completions"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import Response

from farthing.server.answer import Piece, ShownToken
from farthing.server.errors import InvalidRequest
from farthing.server.logprobs import chat_logprobs
from farthing.server.plan import plan
from farthing.server.protocol import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionRequest,
    ChatDelta,
    ChatLogprobs,
    Usage,
)
from farthing.server.respond import check_model, head, read_body, respond
from farthing.server.services import Services, services_of


async def chat_completions(request: Request) -> Response:
    """Continue a conversation by the assistant's next message."""
    services = services_of(request)
    body = ChatCompletionRequest.model_validate_json(await read_body(request, services.body_limit))
    check_model(body.model, services)
    prompt = await _prompt(body, services)
    sequences = plan(body, [prompt], "messages", services)
    return await respond(request, body, sequences, ChatDialect(body, services), services)


async def _prompt(body: ChatCompletionRequest, services: Services) -> list[int]:
    template = services.text.template
    if template is None:
        raise InvalidRequest(
            f"The model `{services.model}` has no chat template; use /v1/completions.",
            param="messages",
        )
    text = template.render([message.for_template() for message in body.messages])
    return await services.text.tokenise(text, add_special_tokens=False)


class ChatDialect:
    """Writes chat completions."""

    def __init__(self, body: ChatCompletionRequest, services: Services) -> None:
        self._head = head("chatcmpl", body, services)
        self._vocabulary = services.text.vocabulary
        self._choices = body.n or 1
        self._with_logprobs = body.logprob_count is not None
        self._with_usage = body.include_usage

    def opening(self) -> Sequence[ChatCompletionChunk]:
        """Each message's role."""
        delta = ChatDelta(role="assistant", content="")
        return [
            self._chunk([ChatChunkChoice(index=index, delta=delta)])
            for index in range(self._choices)
        ]

    def chunk(self, piece: Piece) -> ChatCompletionChunk:
        """A piece's text, or its end, or both."""
        return self._chunk(
            [
                ChatChunkChoice(
                    index=piece.index,
                    delta=ChatDelta(content=piece.text) if piece.text else ChatDelta(),
                    logprobs=self._logprobs(piece.tokens) if piece.tokens else None,
                    finish_reason=piece.finish_reason,
                )
            ]
        )

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        """No choice, only the usage."""
        return self._chunk([], usage)

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> ChatCompletion:
        """All messages."""
        return ChatCompletion(
            **self._head,
            choices=[self._choice(index, pieces) for index, pieces in enumerate(answers)],
            usage=usage,
        )

    def _choice(self, index: int, pieces: Sequence[Piece]) -> ChatChoice:
        return ChatChoice(
            index=index,
            message=AssistantMessage(content="".join(piece.text for piece in pieces)),
            logprobs=self._logprobs([token for piece in pieces for token in piece.tokens]),
            finish_reason=pieces[-1].finish_reason,
        )

    def _logprobs(self, tokens: Sequence[ShownToken]) -> ChatLogprobs | None:
        return chat_logprobs(tokens, self._vocabulary) if self._with_logprobs else None

    def _chunk(
        self, choices: list[ChatChunkChoice], usage: Usage | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            **self._head,
            choices=choices,
            usage=usage if self._with_usage else UNSET,
        )
