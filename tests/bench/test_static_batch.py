"""The gate of bench/static_vs_continuous.py."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from farthing.bench.prompts import Job

SCRIPTS = Path(__file__).parents[2] / "bench"


@pytest.fixture
def static_batch(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    from static_vs_continuous import StaticBatch

    return StaticBatch


def test_a_batch_is_let_in_together_and_the_next_when_all_have_ended(static_batch: Any) -> None:
    log: list[tuple[str, int]] = []

    async def send(job: Job, due: float) -> None:
        log.append(("start", job.max_tokens))
        await asyncio.sleep(0.02 * job.max_tokens)
        log.append(("end", job.max_tokens))

    async def main() -> None:
        gated = static_batch(size=2, wait_s=30.0)(send)
        await asyncio.gather(*(gated(Job("", n), 0.0) for n in (1, 4, 2, 3)))

    asyncio.run(main())
    starts = [("start", 1), ("start", 4)], [("start", 2), ("start", 3)]
    assert log[:2] == starts[0]
    assert sorted(log[2:4]) == [("end", 1), ("end", 4)]
    assert log[4:6] == starts[1]


def test_a_batch_that_does_not_fill_goes_after_its_wait(static_batch: Any) -> None:
    async def send(job: Job, due: float) -> None:
        await asyncio.sleep(0)

    async def main() -> float:
        began = asyncio.get_running_loop().time()
        await static_batch(size=8, wait_s=0.1)(send)(Job("", 1), 0.0)
        return asyncio.get_running_loop().time() - began

    assert 0.1 <= asyncio.run(main()) < 2


def test_requests_that_waited_for_the_last_batch_wait_no_longer(static_batch: Any) -> None:
    """They fill the next batch as far as they go, without a second wait."""
    starts: list[float] = []

    async def send(job: Job, due: float) -> None:
        starts.append(asyncio.get_running_loop().time())
        await asyncio.sleep(0.5)

    async def main() -> None:
        gated = static_batch(size=3, wait_s=0.4)(send)
        await asyncio.gather(*(gated(Job("", 1), 0.0) for _ in range(5)))

    asyncio.run(main())
    assert len(starts) == 5
    assert starts[4] - starts[3] < 0.3
    assert starts[3] - starts[0] < 0.8  # 0.5 s for the first batch, not 0.4 s more
