"""When waiting requests become a batch, and how large the batch may grow: T_max, B_min, B_max."""

from __future__ import annotations

from collections import deque


class ArrivalRate:
    """Requests a second over the last few arrivals.

    The window ends now and not at the last arrival, so that the rate falls while nobody comes.
    """

    def __init__(self, window: int = 32) -> None:
        self._arrivals: deque[float] = deque(maxlen=window)

    def record(self, now: float) -> None:
        """Note an arrival at `now` (seconds, monotonic)."""
        self._arrivals.append(now)

    def per_second(self, now: float) -> float:
        """The rate at `now`; 0 before a second arrival."""
        if len(self._arrivals) < 2:
            return 0.0
        return (len(self._arrivals) - 1) / max(now - self._arrivals[0], 1e-6)


class BatchFormation:
    """Whether an idle engine should wait for a fuller batch.

    Waiting pays only if the batch is expected to reach `batch_min` before its oldest request has
    waited `max_wait_s` (T_max); a request alone on a quiet server never waits.
    """

    def __init__(self, batch_min: int, max_wait_s: float) -> None:
        self._batch_min = batch_min
        self._max_wait_s = max_wait_s

    def wait_s(self, now: float, oldest: float, waiting: int, rate: float) -> float:
        """Seconds to wait for more arrivals before the first step; 0 starts it now."""
        missing = self._batch_min - waiting
        left = self._max_wait_s - (now - oldest)
        if missing <= 0 or left <= 0 or rate * left < missing:
            return 0.0
        return min(left, missing / rate)


class BatchLimit:
    """How many sequences may run at once, following the load between B_min and B_max.

    The limit doubles while more sequences want to run than may, and halves when for `hold_s`
    seconds fewer than half of it did. Rising costs a few steps, so that a burst's first answers
    stream before its last are begun; falling is slow, so that the limit outlives a short lull.
    """

    def __init__(self, batch_min: int, batch_max: int, hold_s: float = 2.0) -> None:
        self._batch_min = batch_min
        self._batch_max = batch_max
        self._hold_s = hold_s
        self._busy_at = 0.0  # when at least half of the limit was last wanted
        self.value = batch_min

    def update(self, demand: int, now: float) -> int:
        """Follow `demand` (sequences running and waiting); returns the limit from now on."""
        if demand > self.value:
            self.value = min(self.value * 2, self._batch_max)
        if 2 * demand >= self.value:
            self._busy_at = now
        elif now - self._busy_at >= self._hold_s:
            self.value = max(self.value // 2, self._batch_min)
            self._busy_at = now
        return self.value
