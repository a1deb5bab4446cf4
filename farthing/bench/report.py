"""What the records of a run say: statistics, a table, a JSON file and a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from farthing.bench.client import Dialect, Record
from farthing.bench.load import Plan


@dataclass(frozen=True, slots=True)
class Percentiles:
    """Seconds; linear interpolation between the closest ranks."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles | None:
        """None where there is nothing to take them of."""
        if not values:
            return None
        p50, p90, p99 = np.percentile(values, (50, 90, 99))
        return cls(float(np.mean(values)), float(p50), float(p90), float(p99))


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in figures. Latencies and tokens are those of requests that succeeded.

    Rates are over `seconds`, from when the first request was due to the last end, so they hold
    the ramp at both ends.
    """

    requests: int
    failures: dict[str, int]  # by kind
    seconds: float
    ttft: Percentiles | None
    inter_token: Percentiles | None  # gaps between chunks, all requests pooled
    per_output_token: Percentiles | None  # each request's mean time a token after the first
    e2e: Percentiles | None
    send_delay: Percentiles | None  # how late the client itself sent
    requests_per_s: float
    output_tokens_per_s: float
    prompt_tokens: int | None  # None where the server does not say
    output_tokens: int
    counted_by: str  # how output tokens were counted: usage, chunks, or both
    cost: float | None  # of all requests, in `currency`; None where the server does not say
    cost_per_million_tokens: float | None  # prompt and output
    cost_per_million_output_tokens: float | None
    currency: str | None


def summarise(records: Sequence[Record]) -> Summary:
    """The statistics of a run of at least one request."""
    good = [record for record in records if record.failure is None]
    seconds = max(record.ended for record in records) - min(record.due for record in records)
    output_tokens = sum(record.output_tokens for record in good)
    prompts = [record.prompt_tokens for record in good if record.prompt_tokens is not None]
    prompt_tokens = sum(prompts) if len(prompts) == len(good) else None
    costs = [record.cost for record in good if record.cost is not None]
    cost = sum(costs) if costs and len(costs) == len(good) else None
    return Summary(
        requests=len(records),
        failures=dict(Counter(record.failure for record in records if record.failure)),
        seconds=seconds,
        ttft=Percentiles.of([record.ttft_s for record in good]),
        inter_token=Percentiles.of([gap for record in good for gap in record.gaps_s]),
        per_output_token=Percentiles.of(
            [
                (record.chunk_times[-1] - record.chunk_times[0]) / (record.output_tokens - 1)
                for record in good
                if record.output_tokens > 1
            ]
        ),
        e2e=Percentiles.of([record.e2e_s for record in good]),
        send_delay=Percentiles.of([record.sent - record.due for record in records]),
        requests_per_s=len(good) / seconds,
        output_tokens_per_s=output_tokens / seconds,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        counted_by=" and ".join(sorted({record.counted_by for record in good or records})),
        cost=cost,
        cost_per_million_tokens=_per_million(cost, output_tokens + (prompt_tokens or 0)),
        cost_per_million_output_tokens=_per_million(cost, output_tokens),
        currency=next((record.currency for record in good if record.currency), None),
    )


def _per_million(cost: float | None, tokens: int) -> float | None:
    return None if cost is None or not tokens else cost / tokens * 1e6


def render(summary: Summary) -> RenderableType:
    """The summary as tables for a terminal."""
    latency = Table(title="Latency, ms")
    for name in ("", "mean", "p50", "p90", "p99"):
        latency.add_column(name, justify="right" if name else "left")
    for name, values in (
        ("time to first token", summary.ttft),
        ("between chunks", summary.inter_token),
        ("per output token", summary.per_output_token),
        ("end to end", summary.e2e),
    ):
        cells = (
            ["–"] * 4 if values is None else [f"{v * 1e3:,.1f}" for v in asdict(values).values()]
        )
        latency.add_row(name, *cells)

    totals = Table.grid(padding=(0, 2))
    for name, value in _totals(summary):
        totals.add_row(Text(name, style="bold"), value)
    return Group(latency, totals)


def _totals(summary: Summary) -> list[tuple[str, str]]:
    prompt = "?" if summary.prompt_tokens is None else f"{summary.prompt_tokens:,}"
    good = summary.requests - sum(summary.failures.values())
    mean_output = summary.output_tokens / max(1, good)
    failures = ", ".join(f"{count} × {kind}" for kind, count in summary.failures.items())
    rows = [
        ("requests", f"{summary.requests:,} in {summary.seconds:.1f} s"),
        ("failures", failures or "none"),
        ("tokens in / out", f"{prompt} / {summary.output_tokens:,}"),
        ("output a request", f"{mean_output:,.1f} tokens, counted by {summary.counted_by}"),
        ("output tokens/s", f"{summary.output_tokens_per_s:,.1f}"),
        ("requests/s", f"{summary.requests_per_s:,.2f}"),
    ]
    if summary.cost_per_million_tokens is not None:
        currency = summary.currency or ""
        rows += [
            ("cost", f"{summary.cost:.6g} {currency}"),
            ("cost per 1M tokens", f"{summary.cost_per_million_tokens:,.4g} {currency}"),
            (
                "cost per 1M output tokens",
                f"{summary.cost_per_million_output_tokens:,.4g} {currency}",
            ),
        ]
    if summary.send_delay is not None and summary.send_delay.p99 > 0.05:
        delay = f"p99 {summary.send_delay.p99 * 1e3:,.0f} ms after they were due"
        rows.append(("requests sent late", f"{delay}: this client is short of CPU"))
    return rows


def write_json(
    path: Path, plan: Plan, dialect: Dialect, summary: Summary, records: Sequence[Record]
) -> None:
    """The plan, the summary and the figures of each request (times from the run's start)."""
    start = min(record.due for record in records)
    requests = [
        {
            "due_s": record.due - start,
            "sent_s": record.sent - start,
            "ttft_s": record.ttft_s if record.chunk_times else None,
            "e2e_s": record.e2e_s,
            "prompt_tokens": record.prompt_tokens,
            "output_tokens": record.output_tokens,
            "chunks": len(record.chunk_times),
            "cost": record.cost,
            "failure": record.failure,
            "detail": record.detail,
        }
        for record in records
    ]
    settings = asdict(plan)
    del settings["target"]["api_key"]
    settings["load"]["kind"] = type(plan.load).__name__.lower()
    content = {
        "plan": settings,
        "dialect": asdict(dialect),
        "summary": asdict(summary),
        "requests": requests,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n")


_BLUE, _ORANGE, _RED, _GREY = "#2563a8", "#d9822b", "#c0392b", "#8a8f98"


def write_plot(path: Path, title: str, summary: Summary, records: Sequence[Record]) -> None:
    """Three latency distributions above throughput and concurrency over time, as a PNG."""
    good = [record for record in records if record.failure is None]
    figure = Figure(figsize=(12, 7.2), dpi=110, layout="constrained")
    grid = figure.add_gridspec(2, 3, height_ratios=(1, 1.05))
    panels: list[tuple[str, list[float], Percentiles | None]] = [
        ("Time to first token", [record.ttft_s for record in good], summary.ttft),
        (
            "Between chunks",
            [gap for record in good for gap in record.gaps_s],
            summary.inter_token,
        ),
        ("End to end", [record.e2e_s for record in good], summary.e2e),
    ]
    for column, (name, values, percentiles) in enumerate(panels):
        _draw_distribution(figure.add_subplot(grid[0, column]), name, values, percentiles)
    _draw_timeline(figure.add_subplot(grid[1, :]), records)
    failed = sum(summary.failures.values())
    figure.suptitle(
        f"{title}\n{summary.output_tokens_per_s:,.1f} output tokens/s · "
        f"{summary.requests_per_s:,.2f} requests/s · {summary.requests:,} requests, "
        f"{failed or 'none'} failed",
        fontsize=13,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_distribution(
    axes: Axes, name: str, values: Sequence[float], percentiles: Percentiles | None
) -> None:
    axes.set_title(name, fontsize=11)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if percentiles is None:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes, color=_GREY)
        return
    unit, scale = ("s", 1.0) if percentiles.p50 >= 1 else ("ms", 1e3)
    axes.ecdf(np.array(values) * scale, color=_BLUE, linewidth=2)
    for share, label in ((0.5, "p50"), (0.9, "p90"), (0.99, "p99")):
        value = getattr(percentiles, label) * scale
        axes.plot([value], [share], "o", color=_ORANGE, markersize=5)
        axes.annotate(
            f"{label} {value:,.3g} {unit}",
            (value, share),
            xytext=(6, -12),
            textcoords="offset points",
            fontsize=9,
        )
    if percentiles.p99 > 20 * max(percentiles.p50, 1e-6):
        axes.set_xscale("log")
    else:
        axes.set_xlim(0, max(values) * scale * 1.25)  # leaves room for the last label
    axes.set_xlabel(unit)
    axes.set_ylabel("share of requests" if "chunks" not in name else "share of gaps")


def _draw_timeline(axes: Axes, records: Sequence[Record]) -> None:
    start = min(record.due for record in records)
    seconds = max(record.ended for record in records) - start
    edges = np.linspace(0, seconds, int(np.clip(2 * seconds, 20, 120)) + 1)
    times = [time - start for record in records for time in record.chunk_times]
    weights = [
        record.output_tokens / len(record.chunk_times)
        for record in records
        for _ in record.chunk_times
    ]
    tokens, _ = np.histogram(times, edges, weights=weights)
    axes.stairs(tokens / np.diff(edges), edges, fill=True, color=_BLUE, alpha=0.35)
    axes.stairs(tokens / np.diff(edges), edges, color=_BLUE, linewidth=1.5)
    axes.set_xlabel("seconds since the first request was due")
    axes.set_ylabel("output tokens/s", color=_BLUE)
    axes.set_xlim(0, seconds)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

    changes = sorted(
        [(record.due - start, 1) for record in records]
        + [(record.ended - start, -1) for record in records]
    )
    under_way = axes.twinx()
    under_way.step(
        [time for time, _ in changes],
        np.cumsum([change for _, change in changes]),
        where="post",
        color=_ORANGE,
        linewidth=1.5,
    )
    under_way.set_ylabel("requests waiting or running", color=_ORANGE)
    under_way.set_ylim(bottom=0)
    under_way.yaxis.set_major_locator(MaxNLocator(integer=True))
    under_way.spines[["top"]].set_visible(False)
    failed = [record.ended - start for record in records if record.failure is not None]
    if failed:
        axes.vlines(
            failed,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            color=_RED,
            linewidth=1,
            label="a request failed",
        )
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False)
