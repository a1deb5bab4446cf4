"""`farthing bench`: the load client as a command."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from farthing.bench.client import BenchError, Dialect, Record, Target
from farthing.bench.load import Bounds, Closed, Open, Plan, measure
from farthing.bench.prompts import Span, Workload
from farthing.bench.report import Summary, render, summarise, write_json, write_plot

_INTERRUPTED = 130  # what a shell gives a command that Ctrl-C ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's options."""
    parser.description = (
        "Load an OpenAI-compatible server with streamed requests and report latency, throughput, "
        "failures and, where the server tells it, cost."
    )
    server = parser.add_argument_group("server")
    server.add_argument("--url", type=_url, default="http://127.0.0.1:8000", metavar="URL")
    server.add_argument("--model", help="default: the first that the server lists")
    server.add_argument("--api-key", help="default: OPENAI_API_KEY")
    server.add_argument("--endpoint", choices=("chat", "completions"), default="chat")

    load = parser.add_argument_group("load")
    kind = load.add_mutually_exclusive_group()
    kind.add_argument(
        "--concurrency",
        type=_count,
        default=1,
        metavar="N",
        help="closed loop: N clients, each sends its next request when its last one has ended (1)",
    )
    kind.add_argument(
        "--rate",
        type=_positive,
        metavar="R",
        help="open loop: Poisson arrivals, R a second, latency counted from when each is due",
    )
    load.add_argument("--requests", type=_count, default=100, metavar="N", help="at most (100)")
    load.add_argument(
        "--duration", type=_positive, default=300.0, metavar="S", help="send for at most (300 s)"
    )
    load.add_argument(
        "--warmup",
        type=_count_or_none,
        default=2,
        metavar="N",
        help="requests before, not counted (2)",
    )
    load.add_argument(
        "--timeout", type=_positive, default=600.0, metavar="S", help="seconds without data (600)"
    )

    requests = parser.add_argument_group("requests")
    requests.add_argument(
        "--prompt-tokens", type=_span, default=Span(128, 128), metavar="N|LOW:HIGH", help="(128)"
    )
    requests.add_argument(
        "--output-tokens", type=_span, default=Span(128, 128), metavar="N|LOW:HIGH", help="(128)"
    )
    requests.add_argument(
        "--shared-prefix",
        type=_count_or_none,
        default=0,
        metavar="N",
        help="first N prompt tokens are the same in all requests, to test a prefix cache (0)",
    )
    requests.add_argument("--temperature", type=float, default=0.0, metavar="T", help="(0)")
    requests.add_argument(
        "--seed", type=int, help="same seed, same requests; default: new ones, unknown to any cache"
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", type=Path, metavar="FILE", help="figures of each request too")
    output.add_argument("--plot", type=Path, metavar="FILE", help="a PNG picture")


def run(args: argparse.Namespace) -> int:
    """Measure, report, and say how it went.

    0: all requests succeeded; 1: some failed; 2: nothing could be measured; 130: ended by Ctrl-C
    (what was measured by then is reported).
    """
    plan = _plan(args)
    measured = _Measured()
    interrupted = False
    try:
        _measure(plan, measured)
    except BenchError as error:
        print(f"farthing bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("farthing bench: interrupted; requests under way are dropped", file=sys.stderr)
        interrupted = True
    if measured.dialect is None or not measured.records:
        print(
            "farthing bench: no request has ended, so there is nothing to report", file=sys.stderr
        )
        return _INTERRUPTED if interrupted else 2
    summary = summarise(measured.records)
    _report(plan, measured.dialect, measured.records, summary, args)
    if interrupted:
        return _INTERRUPTED
    return 1 if summary.failures else 0


@dataclass(slots=True)
class _Measured:
    """What there is so far; outlives an interrupted run."""

    dialect: Dialect | None = None
    records: list[Record] = field(default_factory=list)


def _plan(args: argparse.Namespace) -> Plan:
    seed = secrets.randbits(32) if args.seed is None else args.seed
    return Plan(
        target=Target(
            url=args.url,
            model=args.model,
            api_key=args.api_key or os.environ.get("OPENAI_API_KEY"),
            endpoint=args.endpoint,
            temperature=args.temperature,
            timeout_s=args.timeout,
        ),
        workload=Workload(args.prompt_tokens, args.output_tokens, args.shared_prefix, seed),
        load=Open(args.rate, seed) if args.rate else Closed(args.concurrency),
        bounds=Bounds(args.requests, args.duration),
        warmup=args.warmup,
    )


def _measure(plan: Plan, measured: _Measured) -> None:
    """Run the plan under a progress bar."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[figures]}"),
        console=Console(stderr=True),
    ) as progress:
        bar = progress.add_task("warming up", total=None, figures="")
        tokens = failures = 0
        began = 0.0

        def on_start(dialect: Dialect) -> None:
            nonlocal began
            measured.dialect = dialect
            began = time.perf_counter()
            progress.reset(bar, total=plan.bounds.requests, description="measuring")

        def on_record(record: Record) -> None:
            nonlocal tokens, failures
            measured.records.append(record)
            tokens += record.output_tokens
            failures += record.failure is not None
            rate = tokens / (record.ended - began)
            figures = f"{rate:,.0f} tokens/s" + (f", {failures} failed" if failures else "")
            progress.update(bar, advance=1, figures=figures)

        asyncio.run(measure(plan, on_start=on_start, on_record=on_record))


def _report(
    plan: Plan,
    dialect: Dialect,
    records: Sequence[Record],
    summary: Summary,
    args: argparse.Namespace,
) -> None:
    console = Console()
    console.print(render(summary))
    if "ignore_eos" not in dialect.extras:
        console.print("the server refuses ignore_eos: answers may end before --output-tokens")
    for kind in summary.failures:
        detail = next(record.detail for record in records if record.failure == kind)
        console.print(f"{kind}: {detail}", markup=False)
    if args.json:
        write_json(args.json, plan, dialect, summary, records)
        console.print(f"figures: {args.json}", markup=False)
    if args.plot:
        load = plan.load
        offered = (
            f"{load.rate:g} requests/s offered"
            if isinstance(load, Open)
            else f"{load.concurrency} at a time"
        )
        title = f"{dialect.model} at {plan.target.url}, {offered}"
        write_plot(args.plot, title, summary, records)
        console.print(f"picture: {args.plot}", markup=False)


def _url(text: str) -> str:
    """The server's root; a trailing /v1, as other clients want it, is taken off."""
    url = text.rstrip("/").removesuffix("/v1")
    if not url.startswith(("http://", "https://")):
        raise argparse.ArgumentTypeError(f"{text!r} is no URL: it starts with http:// or https://")
    return url


def _count(text: str) -> int:
    return _at_least(int(text), 1)


def _count_or_none(text: str) -> int:
    return _at_least(int(text), 0)


def _at_least(value: int, least: int) -> int:
    if value < least:
        raise argparse.ArgumentTypeError(f"{value} is less than {least}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return value


def _span(text: str) -> Span:
    try:
        return Span.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
