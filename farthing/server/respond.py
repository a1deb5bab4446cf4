"""A generation as the answer to an HTTP request: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, TypedDict
from urllib.parse import quote
from uuid import uuid4

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from farthing.batching import types as batching
from farthing.server.answer import Piece
from farthing.server.errors import BodyTooLarge, InvalidRequest, ModelNotFound, to_api_error
from farthing.server.generate import Generation
from farthing.server.protocol import GenerationRequest, Usage
from farthing.server.services import Services

_DONE = b"data: [DONE]\n\n"
_CLIENT_GONE = 499  # nobody reads it; the access log shows it
_NAMED_UNKNOWNS = 32

_encode = msgspec.json.Encoder().encode


class Head(TypedDict):
    """What every answer and every chunk of it begins with."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def head(kind: str, body: GenerationRequest, services: Services) -> Head:
    """A new answer's head; `kind` begins its id."""
    return Head(
        id=f"{kind}-{uuid4().hex}",
        created=int(time.time()),
        model=body.model or services.model,
        system_fingerprint=services.fingerprint,
    )


class Dialect(Protocol):
    """How one endpoint writes what was generated."""

    def opening(self) -> Sequence[msgspec.Struct]:
        """The chunks a stream begins with."""
        ...

    def chunk(self, piece: Piece) -> msgspec.Struct:
        """A piece of one answer as a chunk of a stream."""
        ...

    def usage_chunk(self, usage: Usage) -> msgspec.Struct:
        """The chunk that ends a stream whose client asked for the usage."""
        ...

    def whole(self, answers: Sequence[Sequence[Piece]], usage: Usage) -> msgspec.Struct:
        """The answer to a request that does not stream, from all pieces of each choice."""
        ...


async def read_body(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes. Raises BodyTooLarge; InvalidRequest if it breaks off."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise BodyTooLarge(
                    f"The body is longer than {limit} bytes.", headers={"Connection": "close"}
                )
    except ClientDisconnect:
        raise InvalidRequest("The client left before its request was whole.") from None
    return bytes(body)


def check_model(name: str | None, services: Services) -> None:
    """Raises ModelNotFound unless this server answers to the name; none means the one served."""
    if name is not None and name not in services.model_names:
        raise ModelNotFound(
            f"The model `{name}` is not served here; there is {', '.join(services.model_names)}.",
            param="model",
        )


async def respond(
    request: Request,
    body: GenerationRequest,
    sequences: Sequence[batching.Request],
    dialect: Dialect,
    services: Services,
) -> Response:
    """Generate and answer as the body asks. Raises an ApiError or an EngineError before that."""
    generation = Generation(body, sequences, services)
    headers = _ignored(body)
    if body.stream:
        return EventStreamResponse(generation, dialect, body.include_usage, headers)
    watch = asyncio.create_task(_cancel_on_disconnect(request.receive, generation))
    try:
        return await _whole(generation, dialect, headers)
    finally:
        watch.cancel()
        generation.cancel()


async def _whole(generation: Generation, dialect: Dialect, headers: Mapping[str, str]) -> Response:
    answers: list[list[Piece]] = [[] for _ in range(generation.size)]
    for piece in await generation.all_pieces():
        answers[piece.index].append(piece)
    if generation.cancelled:
        return Response(status_code=_CLIENT_GONE)
    usage = generation.usage()
    return Response(
        _encode(dialect.whole(answers, usage)),
        headers={**headers, "x-request-cost": f"{usage.cost:.9f} {usage.cost_details.currency}"},
        media_type="application/json",
    )


class EventStreamResponse(Response):
    """Server-sent events: everything that is there goes out in one write.

    A client that reads slowly delays only its own writes; one that leaves ends the generation.
    """

    def __init__(
        self,
        generation: Generation,
        dialect: Dialect,
        include_usage: bool,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(
            headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
            media_type="text/event-stream",
        )
        del self.headers["content-length"]  # of the empty body that Response assumes
        self._generation = generation
        self._dialect = dialect
        self._include_usage = include_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 (ASGI's three)
        watch = asyncio.create_task(_cancel_on_disconnect(receive, self._generation))
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await self._send_events(send)
        finally:
            watch.cancel()
            self._generation.cancel()

    async def _send_events(self, send: Send) -> None:
        events = b"".join(map(_event, self._dialect.opening()))
        try:
            while not self._generation.ended:
                await send({"type": "http.response.body", "body": events, "more_body": True})
                pieces = await self._generation.next_pieces()
                events = b"".join(_event(self._dialect.chunk(piece)) for piece in pieces)
            events += self._ending()
        except Exception as error:  # the status has been sent: say it in the stream
            events = b"data: " + to_api_error(error).body() + b"\n\n"
        await send({"type": "http.response.body", "body": events})

    def _ending(self) -> bytes:
        if not self._include_usage:
            return _DONE
        return _event(self._dialect.usage_chunk(self._generation.usage())) + _DONE


def _event(chunk: msgspec.Struct) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"


async def _cancel_on_disconnect(receive: Receive, generation: Generation) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    generation.cancel()


def _ignored(body: GenerationRequest) -> dict[str, str]:
    """Names the parameters that mean nothing here; they come from the client, so are escaped."""
    names = [quote(name, safe=".[]")[:64] for name in body.unknown()][:_NAMED_UNKNOWNS]
    return {"x-farthing-ignored": ", ".join(names)} if names else {}
