"""Continuous against static batching, and one client against many, in utilisation and money.

Static batching is had at the door: a batch of requests is let in together, and the next one not
before all of them have ended. The server knows nothing of it. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from servers import NotStarted, free_port, running

from farthing.bench.client import BenchError, Record, Target
from farthing.bench.load import Bounds, Closed, Gate, Open, Plan, Send, measure, no_gate
from farthing.bench.prompts import Job, Span, Workload
from farthing.bench.report import Summary, summarise

console = Console()


@dataclass(frozen=True, slots=True)
class _Waiting:
    since: float
    may_go: asyncio.Event
    ended: asyncio.Event


class StaticBatch:
    """Lets requests through in batches of `size`, one batch at a time.

    A batch goes when it is full or when its oldest request has waited `wait_s`, but never before
    every member of the batch in front of it has ended.
    """

    def __init__(self, size: int, wait_s: float) -> None:
        self._size = size
        self._wait_s = wait_s
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()
        self._batcher: asyncio.Task[None] | None = None

    def __call__(self, send: Send) -> Send:
        async def gated(job: Job, due: float) -> None:
            self._batcher = self._batcher or asyncio.create_task(self._run())
            me = _Waiting(time.monotonic(), asyncio.Event(), asyncio.Event())
            self._queue.put_nowait(me)
            await me.may_go.wait()
            try:
                await send(job, due)
            finally:
                me.ended.set()

        return gated

    async def _run(self) -> None:
        while True:
            batch = await self._fill()
            for request in batch:
                request.may_go.set()
            for request in batch:
                await request.ended.wait()

    async def _fill(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        while len(batch) < self._size:
            if self._queue.empty():
                left = batch[0].since + self._wait_s - time.monotonic()
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), left))
                except TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        return batch


@dataclass(frozen=True, slots=True)
class Counters:
    """The server's own counters at one moment, or how far they went between two."""

    device_s: float
    overhead_s: float
    idle_s: float
    request_cost: float
    idle_cost: float
    overhead_cost: float
    steps: float
    step_tokens: float

    @classmethod
    def read(cls, url: str) -> Counters:
        samples: dict[tuple[str, str], float] = {}
        for family in text_string_to_metric_families(httpx.get(f"{url}/metrics").text):
            for sample in family.samples:
                samples[sample.name, sample.labels.get("kind", "")] = sample.value
        time_of = {
            kind: samples["farthing_engine_busy_seconds_total", kind]
            for kind in ("device", "overhead", "idle")
        }
        cost_of = {
            kind: samples["farthing_cost_total", kind]
            for kind in ("prompt", "completion", "cancelled", "overhead", "idle")
        }
        return cls(
            device_s=time_of["device"],
            overhead_s=time_of["overhead"],
            idle_s=time_of["idle"],
            request_cost=cost_of["prompt"] + cost_of["completion"] + cost_of["cancelled"],
            idle_cost=cost_of["idle"],
            overhead_cost=cost_of["overhead"],
            steps=samples["farthing_iteration_tokens_count", ""],
            step_tokens=samples["farthing_iteration_tokens_sum", ""],
        )

    def since(self, start: Counters) -> Counters:
        return Counters(*(b - a for a, b in zip(astuple(start), astuple(self), strict=True)))

    @property
    def wall_s(self) -> float:
        return self.device_s + self.overhead_s + self.idle_s

    @property
    def total_cost(self) -> float:
        return self.request_cost + self.idle_cost + self.overhead_cost


@dataclass(frozen=True, slots=True)
class Point:
    """One way to load the server, and what came of it."""

    name: str
    summary: Summary
    counters: Counters

    def per_million(self, cost: float) -> float:
        """Money for a million output tokens."""
        return cost / self.summary.output_tokens * 1e6


def measure_point(name: str, load: Closed | Open, gate: Gate, args: argparse.Namespace) -> Point:
    """Load a freshly started server, so that no point finds another's prefixes cached."""
    console.print(f"measuring {name}")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "farthing.server.cli", "serve", "--port", str(port)),
        *("--price-per-hour", str(args.price_per_hour), "--currency", args.currency),
        *args.farthing_args.split(),
    ]
    plan = Plan(
        Target(url),
        Workload(args.prompt_tokens, args.output_tokens, seed=args.seed),
        load,
        Bounds(args.requests, args.seconds),
        warmup=2,
    )
    records: list[Record] = []
    before: list[Counters] = []
    log = args.json.parent / f"{name.replace(' ', '-')}.log"
    with running(command, f"{url}/ready", log):
        asyncio.run(
            measure(
                plan,
                on_record=records.append,
                on_start=lambda _: before.append(Counters.read(url)),
                gate=gate,
            )
        )
        after = Counters.read(url)
    return Point(name, summarise(records), after.since(before[0]))


def table(points: Sequence[Point], currency: str) -> Table:
    result = Table(title=f"device busy and cost ({currency} per 1M output tokens)")
    result.add_column("load")
    for name in (
        *("tok/s", "first p50", "end p50", "end p99", "device", "overhead", "idle"),
        *("tok/step", "requests", "whole machine", "failed"),
    ):
        result.add_column(name, justify="right")
    for point in points:
        summary, counters = point.summary, point.counters
        if summary.ttft is None or summary.e2e is None:
            result.add_row(point.name, f"all failed: {summary.failures}")
            continue
        result.add_row(
            point.name,
            f"{summary.output_tokens_per_s:,.0f}",
            *(f"{s:,.2f} s" for s in (summary.ttft.p50, summary.e2e.p50, summary.e2e.p99)),
            *(
                f"{seconds / counters.wall_s:.0%}"
                for seconds in (counters.device_s, counters.overhead_s, counters.idle_s)
            ),
            f"{counters.step_tokens / counters.steps:.1f}",
            f"{point.per_million(counters.request_cost):,.4g}",
            f"{point.per_million(counters.total_cost):,.4g}",
            str(sum(summary.failures.values())),
        )
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=1.5, help="arrivals a second (1.5)")
    parser.add_argument("--batch", type=int, default=8, help="of static batching (8)")
    parser.add_argument("--wait-ms", type=float, default=200.0, help="to fill a batch (200)")
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 32], metavar="N")
    parser.add_argument("--requests", type=int, default=120, help="at most, a point (120)")
    parser.add_argument("--seconds", type=float, default=90.0, help="at most, a point (90)")
    parser.add_argument("--prompt-tokens", type=Span.parse, default=Span(32, 128))
    parser.add_argument("--output-tokens", type=Span.parse, default=Span(16, 192))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--price-per-hour", type=float, default=1.20)
    parser.add_argument("--currency", default="CNY")
    parser.add_argument("--farthing-args", default="", metavar="WORDS", help="for farthing serve")
    parser.add_argument(
        "--json", type=Path, default=Path("bench/results/static_vs_continuous.json")
    )
    args = parser.parse_args()

    arrivals = Open(args.rate, args.seed)
    cases: list[tuple[str, Closed | Open, Gate]] = [
        ("static", arrivals, StaticBatch(args.batch, args.wait_ms / 1e3)),
        ("continuous", arrivals, no_gate),
    ]
    cases += [(f"{clients} clients", Closed(clients), no_gate) for clients in args.clients]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    try:
        points = [measure_point(*case, args) for case in cases]
    except (NotStarted, BenchError) as error:
        print(f"static_vs_continuous: {error}", file=sys.stderr)
        return 2
    console.print(table(points, args.currency))
    settings = {name: str(value) for name, value in vars(args).items()}
    content = {"settings": settings, "points": [asdict(point) for point in points]}
    args.json.write_text(json.dumps(content, indent=2) + "\n")
    console.print(f"figures: {args.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
