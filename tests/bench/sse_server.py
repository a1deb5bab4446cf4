"""A tiny OpenAI-compatible server whose every delay is known."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """A streamed answer: `tokens` chunks, the first after `first_s`, the others `gap_s` apart."""

    tokens: int = 3
    first_s: float = 0.0
    gap_s: float = 0.0
    usage: dict[str, Any] | None = None
    finish_reason: str | None = "stop"
    cut_after: int | None = None  # the connection breaks after this many chunks
    error: tuple[int, str] | None = None  # a status and a message in place of a stream
    raw_event: str | None = None  # sent before the end


Handler = Callable[[str, dict[str, Any]], Answer]  # path, body


@dataclass
class Server:
    handler: Handler
    url: str = ""
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.headers.append(head)
            method, path, _ = head.split("\r\n")[0].split()
            if method == "GET":
                await self._send_json(writer, 200, {"data": [{"id": "tiny"}]})
                return
            length = int(head.lower().split("content-length:")[1].split("\r\n")[0])
            body = json.loads(await reader.readexactly(length))
            self.requests.append(body)
            answer = self.handler(path, body)
            if answer.error is not None:
                status, message = answer.error
                await self._send_json(writer, status, {"error": {"message": message}})
            else:
                await self._stream(writer, "chat" in path, answer)
        except ConnectionError:
            pass  # the client went away
        finally:
            writer.close()

    async def _send_json(self, writer: asyncio.StreamWriter, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        head = f"HTTP/1.1 {status} X\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    async def _stream(self, writer: asyncio.StreamWriter, chat: bool, answer: Answer) -> None:
        writer.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
            b"transfer-encoding: chunked\r\nconnection: close\r\n\r\n"
        )

        async def send(data: str) -> None:
            event = f"data: {data}\n\n".encode()
            writer.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            await writer.drain()

        if chat:  # brings no token, so it must not count as the first
            await send('{"choices": [{"delta": {"role": "assistant", "content": ""}}]}')
        for index in range(answer.tokens):
            if index == answer.cut_after:
                return
            await asyncio.sleep(answer.gap_s if index else answer.first_s)
            part = {"delta": {"content": "\u2028x"}} if chat else {"text": "\u2028x"}
            await send(json.dumps({"choices": [part]}, ensure_ascii=False))
        if answer.raw_event is not None:
            await send(answer.raw_event)
        if answer.finish_reason is not None:
            await send(json.dumps({"choices": [{"finish_reason": answer.finish_reason}]}))
        if answer.usage is not None:
            await send(json.dumps({"choices": [], "usage": answer.usage}))
        await send("[DONE]")
        writer.write(b"0\r\n\r\n")
        await writer.drain()


Serve = Callable[[Handler], Server]


@contextmanager
def running(handler: Handler) -> Iterator[Server]:
    server = Server(handler)
    started = threading.Event()
    stopped = asyncio.Event()
    loop = asyncio.new_event_loop()

    async def main() -> None:
        listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        started.set()
        await stopped.wait()
        listener.close()
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}))

    thread = threading.Thread(target=loop.run_until_complete, args=(main(),))
    thread.start()
    assert started.wait(5)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join(5)
        loop.close()
