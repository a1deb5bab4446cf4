"""The engine as the handlers see it.

`engine_client.EngineClient` is the real one; tests use a fake on the same protocol.
"""

from __future__ import annotations

from typing import Protocol

from farthing.batching.types import EngineReady, Request, TokenEvent


class EngineError(Exception):
    """Base of what `submit` raises.

    EngineError
      QueueFull           too many requests wait already  -> 429
      EngineUnavailable   starting, restarting, draining   -> 503
    """

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(EngineError):
    """The waiting queue holds as many requests as it may."""


class EngineUnavailable(EngineError):
    """No engine can take a request now."""


class EventStream(Protocol):
    """The events of one request, in order; the last one carries a `finish_reason`.

    An engine's death in between is not visible here except as a pause.
    """

    def __aiter__(self) -> EventStream: ...

    async def __anext__(self) -> TokenEvent:
        """Wait for the next event. Raises StopAsyncIteration after the terminal one."""
        ...

    def cancel(self) -> None:
        """Abort the request if it still runs. Idempotent; iteration then ends."""
        ...


class Engine(Protocol):
    """What takes requests and gives events."""

    @property
    def info(self) -> EngineReady | None:
        """What the engine said of itself when it was last ready; None before the first time."""
        ...

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would be worked on at once."""
        ...

    @property
    def healthy(self) -> bool:
        """False when work waits and no step was made within the deadline, or restarts gave out."""
        ...

    def submit(self, request: Request) -> EventStream:
        """Hand over a request with a new id. Raises QueueFull or EngineUnavailable at once."""
        ...
