"""What surrounds every request: its id, and an answer even where the code failed."""

from __future__ import annotations

import logging
import re
import time
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from farthing.server.errors import to_api_error

log = logging.getLogger(__name__)

LOGGED = "/v1/"  # probes and scrapes come every few seconds and say nothing
REQUEST_ID = "x-request-id"
_ACCEPTED_ID = re.compile(r"[\x21-\x7e]{1,128}")


class RequestIds:
    """Gives every answer the id its request came with, or a new one, and logs it at its end.

    It is also the last to see an exception, so that failures are answered with an id as well.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = Headers(scope=scope).get(REQUEST_ID, "")
        request_id = sent if _ACCEPTED_ID.fullmatch(sent) else uuid4().hex
        status = 0
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:
            response = to_api_error(error).response()
            if not status:
                await response(scope, receive, send_with_id)
        finally:
            if scope["path"].startswith(LOGGED):
                seconds = time.monotonic() - began
                line = "%s %s %d in %.3f s, request %s"
                log.info(line, scope["method"], scope["path"], status, seconds, request_id)
