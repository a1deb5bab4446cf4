"""One streamed request to an OpenAI-compatible server, and what was seen of it.

BenchError is raised for what makes any measurement pointless (no server, no such model); what
goes wrong with one request among many is in that request's `Record`.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import httpx
import msgspec

from farthing.bench.prompts import Job

Endpoint = Literal["chat", "completions"]


class BenchError(Exception):
    """The server cannot be measured; the message is one line that says why and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """The server to measure and how to ask it."""

    url: str  # without /v1
    model: str | None = None  # None: the first that the server lists
    api_key: str | None = None
    endpoint: Endpoint = "chat"
    temperature: float = 0.0
    timeout_s: float = 600.0  # without a byte


# Body fields beyond the common core, which some servers refuse.
_EXTRAS: dict[str, Any] = {"stream_options": {"include_usage": True}, "ignore_eos": True}


@dataclass(frozen=True, slots=True)
class Dialect:
    """What a server turned out to be, by asking it."""

    model: str
    extras: tuple[str, ...]  # which of stream_options and ignore_eos it takes
    template_tokens: int = 0  # what it adds to a prompt of ours


@dataclass(frozen=True, slots=True)
class Record:
    """What one request did. Times are seconds on the clock of `time.perf_counter`."""

    due: float  # when it should have been sent; latencies count from here
    sent: float
    chunk_times: tuple[float, ...]  # arrival of each chunk that brought output
    ended: float
    prompt_tokens: int | None  # None where the server does not say
    output_tokens: int
    counted_by: Literal["usage", "chunks"]
    cost: float | None = None  # of the whole request, in `currency`
    currency: str | None = None
    failure: str | None = None  # its kind; None: the stream came to its proper end
    detail: str = ""  # the failure in the server's words

    @property
    def ttft_s(self) -> float:
        """Time to the first token, from when the request was due. Only where there is one."""
        return self.chunk_times[0] - self.due

    @property
    def gaps_s(self) -> list[float]:
        """Times between one chunk and the next."""
        return [after - before for before, after in itertools.pairwise(self.chunk_times)]

    @property
    def e2e_s(self) -> float:
        return self.ended - self.due


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: Any = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None  # chat
    text: str | None = None  # completions
    finish_reason: str | None = None

    @property
    def has_output(self) -> bool:
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.tool_calls)


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: float | None = None
    cost_details: dict[str, Any] | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class _Failure(Exception):
    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(detail)
        self.kind = kind


class _Stream:
    """A stream as far as it has come."""

    def __init__(self) -> None:
        self.chunk_times: list[float] = []
        self.usage: _Usage | None = None
        self.finish_reason: str | None = None

    def take(self, data: bytes, now: float) -> None:
        """One event. Raises _Failure where it is not a chunk of an answer."""
        try:
            chunk = _decode_chunk(data)
        except msgspec.DecodeError as error:
            raise _Failure("bad chunk", str(error)) from None
        if chunk.error is not None:
            raise _Failure("error in stream", str(chunk.error))
        if chunk.usage is not None:
            self.usage = chunk.usage
        for choice in chunk.choices:
            if choice.has_output:
                self.chunk_times.append(now)
            self.finish_reason = choice.finish_reason or self.finish_reason

    def check_end(self) -> None:
        """Raises _Failure unless the answer is whole."""
        if self.finish_reason is None:
            raise _Failure("broken stream", "the stream ended without a finish_reason")
        if self.finish_reason in ("error", "abort"):
            raise _Failure("ended by server", f"finish_reason {self.finish_reason}")
        if not self.chunk_times:
            raise _Failure("no output")


async def sse_data(body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The `data` of each server-sent event, up to `[DONE]` or the end of the body.

    Lines are split at line feeds only: text splitters also break at U+2028 and its like, which
    JSON may hold as they are.
    """
    rest = b""
    data: list[bytes] = []
    async for block in body:
        *lines, rest = (rest + block).split(b"\n")
        for raw in lines:
            line = raw.removesuffix(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                event = b"\n".join(data)
                if event == b"[DONE]":
                    return
                yield event
                data.clear()


class Client:
    """Sends requests to one server over one pool of connections; made by `open_client`."""

    def __init__(self, target: Target, dialect: Dialect, http: httpx.AsyncClient) -> None:
        self.dialect = dialect
        self._target = target
        self._http = http

    async def stream(self, job: Job, due: float) -> Record:
        """Send one request and read its answer to the end. Raises nothing of its own."""
        stream = _Stream()
        failure: _Failure | None = None
        sent = time.perf_counter()
        try:
            await self._read(job, stream)
        except _Failure as error:
            failure = error
        except httpx.TimeoutException:
            failure = _Failure("timeout", f"no data for {self._target.timeout_s:g} s")
        except httpx.ConnectError as error:
            failure = _Failure("cannot connect", str(error))
        except httpx.HTTPError as error:
            failure = _Failure("broken stream", str(error) or type(error).__name__)
        ended = time.perf_counter()
        usage = stream.usage or _Usage()
        counted = usage.completion_tokens
        return Record(
            due=due,
            sent=sent,
            chunk_times=tuple(stream.chunk_times),
            ended=ended,
            prompt_tokens=usage.prompt_tokens,
            output_tokens=len(stream.chunk_times) if counted is None else counted,
            counted_by="chunks" if counted is None else "usage",
            cost=usage.cost,
            currency=(usage.cost_details or {}).get("currency"),
            failure=failure.kind if failure else None,
            detail=str(failure) if failure else "",
        )

    async def _read(self, job: Job, stream: _Stream) -> None:
        path = "/v1/chat/completions" if self._target.endpoint == "chat" else "/v1/completions"
        async with self._http.stream("POST", path, json=self._body(job)) as response:
            if response.status_code != 200:
                message = _error_message(await response.aread())
                raise _Failure(f"HTTP {response.status_code}", message)
            async for data in sse_data(response.aiter_bytes()):
                stream.take(data, time.perf_counter())
        stream.check_end()

    def _body(self, job: Job) -> dict[str, Any]:
        if self._target.endpoint == "chat":
            prompt: dict[str, Any] = {"messages": [{"role": "user", "content": job.prompt}]}
        else:
            prompt = {"prompt": job.prompt}
        return {
            "model": self.dialect.model,
            **prompt,
            "max_tokens": job.max_tokens,
            "temperature": self._target.temperature,
            "stream": True,
            **{name: _EXTRAS[name] for name in self.dialect.extras},
        }


async def open_client(target: Target, http: httpx.AsyncClient, probe: Job) -> Client:
    """A client that speaks the server's dialect, learnt by sending `probe`.

    Raises BenchError where the server cannot be reached or does not answer for the model.
    """
    model = target.model or (await _list_models(target, http))[0]
    client = Client(target, Dialect(model, tuple(_EXTRAS)), http)
    record = await client.stream(probe, time.perf_counter())
    while (refused := _refused_extra(record, client.dialect)) is not None:
        extras = tuple(name for name in client.dialect.extras if name != refused)
        client = Client(target, replace(client.dialect, extras=extras), http)
        record = await client.stream(probe, time.perf_counter())
    if record.failure is not None:
        raise BenchError(await _explain(record, model, target, http))
    if record.prompt_tokens is None:
        return client
    added = record.prompt_tokens - len(probe.prompt.split())
    return Client(target, replace(client.dialect, template_tokens=max(0, added)), http)


def _refused_extra(record: Record, dialect: Dialect) -> str | None:
    if record.failure not in ("HTTP 400", "HTTP 422"):
        return None
    return next((name for name in dialect.extras if name in record.detail), None)


async def _list_models(target: Target, http: httpx.AsyncClient) -> list[str]:
    try:
        response = await http.get("/v1/models")
    except httpx.HTTPError as error:
        reason = str(error) or type(error).__name__
        raise BenchError(_UNREACHABLE.format(url=target.url, reason=reason)) from None
    if response.status_code == 401:
        raise BenchError(_WANTS_KEY.format(url=target.url))
    try:
        names = [str(entry["id"]) for entry in response.raise_for_status().json()["data"]]
    except (httpx.HTTPStatusError, ValueError, TypeError, KeyError):
        raise BenchError(
            f"{target.url} is no OpenAI-compatible server: GET /v1/models answered "
            f"{response.status_code} {response.text[:80]!r}"
        ) from None
    if not names:
        raise BenchError(f"{target.url} lists no model: name one with --model")
    return names


_UNREACHABLE = "cannot reach {url} ({reason}): start the server or mend --url"
_WANTS_KEY = "{url} refuses the API key (401): give one with --api-key or OPENAI_API_KEY"


async def _explain(record: Record, model: str, target: Target, http: httpx.AsyncClient) -> str:
    """Why the probe failed, for a person."""
    if record.failure == "cannot connect":
        return _UNREACHABLE.format(url=target.url, reason=record.detail)
    if record.failure == "HTTP 401":
        return _WANTS_KEY.format(url=target.url)
    names = await _list_models(target, http)
    told = model in names or any(name in record.detail for name in names)
    hint = "" if told else f"; it serves {', '.join(names)}"
    return (
        f"{target.url} does not answer for model {model!r}: {record.failure}: {record.detail}{hint}"
    )


def _error_message(body: bytes) -> str:
    """The message of an error in OpenAI's shape, or the start of whatever came."""
    try:
        return str(msgspec.json.decode(body)["error"]["message"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return body.decode(errors="replace")[:300]
