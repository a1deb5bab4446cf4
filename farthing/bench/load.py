"""Load on a server: open loop (arrivals come as they come) and closed loop (N clients in turn).

Both send until `Bounds` are met and then wait for what is under way.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass

import httpx

from farthing.bench.client import Dialect, Record, Target, open_client
from farthing.bench.prompts import Job, Workload

Send = Callable[[Job, float], Coroutine[None, None, None]]  # a request, and when it was due


@dataclass(frozen=True, slots=True)
class Closed:
    """N clients, each of which sends its next request when its last one has ended."""

    concurrency: int


@dataclass(frozen=True, slots=True)
class Open:
    """Poisson arrivals that wait for nobody.

    Latencies count from when a request was due, so that a client which falls behind (or a
    server that makes it) cannot hide the delay: no coordinated omission.
    """

    rate: float  # requests a second
    seed: int = 0  # of the arrival times


@dataclass(frozen=True, slots=True)
class Bounds:
    """No request is sent beyond either."""

    requests: int
    seconds: float


async def run_load(send: Send, jobs: Iterator[Job], load: Closed | Open, bounds: Bounds) -> None:
    """Send `jobs` as `load` says, within `bounds`, and wait until each has ended."""
    if isinstance(load, Closed):
        await _closed_loop(send, jobs, load.concurrency, bounds)
    else:
        await _open_loop(send, jobs, load, bounds)


async def _closed_loop(send: Send, jobs: Iterator[Job], concurrency: int, bounds: Bounds) -> None:
    deadline = time.perf_counter() + bounds.seconds
    left = itertools.islice(jobs, bounds.requests)

    async def client() -> None:
        while (now := time.perf_counter()) < deadline and (job := next(left, None)):
            await send(job, now)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())


async def _open_loop(send: Send, jobs: Iterator[Job], load: Open, bounds: Bounds) -> None:
    rng = random.Random(load.seed)
    due = time.perf_counter()
    deadline = due + bounds.seconds
    async with asyncio.TaskGroup() as group:
        for job in itertools.islice(jobs, bounds.requests):
            due += rng.expovariate(load.rate)
            if due >= deadline:
                break
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(send(job, due))


Gate = Callable[[Send], Send]  # what stands between the arrivals and the server


def no_gate(send: Send) -> Send:
    """Every request goes to the server when it is due."""
    return send


@dataclass(frozen=True, slots=True)
class Plan:
    """One measurement, whole. `warmup` requests go first and are not recorded."""

    target: Target
    workload: Workload
    load: Closed | Open
    bounds: Bounds
    warmup: int = 0


async def measure(
    plan: Plan,
    *,
    on_record: Callable[[Record], None],
    on_start: Callable[[Dialect], None] = lambda _: None,
    gate: Gate = no_gate,
) -> None:
    """Probe the server, warm it up, then load it; each request that ends goes to `on_record`.

    `on_start` gets what the probe learnt when the measured part begins. Raises BenchError where
    the server cannot be measured. When cancelled, what is under way is dropped.
    """
    target, load = plan.target, plan.load
    async with httpx.AsyncClient(
        base_url=target.url,
        headers={"Authorization": f"Bearer {target.api_key}"} if target.api_key else {},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=httpx.Timeout(target.timeout_s, connect=10.0),
    ) as http:
        client = await open_client(target, http, plan.workload.probe())
        jobs = plan.workload.jobs(client.dialect.template_tokens)

        async def unrecorded(job: Job, due: float) -> None:
            await client.stream(job, due)

        async def recorded(job: Job, due: float) -> None:
            on_record(await client.stream(job, due))

        width = load.concurrency if isinstance(load, Closed) else plan.warmup
        warmup = Bounds(plan.warmup, plan.bounds.seconds)
        await run_load(unrecorded, jobs, Closed(width), warmup)
        on_start(client.dialect)
        await run_load(gate(recorded), jobs, load, plan.bounds)
