"""A whole step of a model on a CPU, by part, beside the time to read its memory once.

    python bench/cpu_step.py [--model NAME] [--threads N] [--precisions int8 bf16 fp32]

Decode steps of 1, 8 and 32 sequences with 200 tokens of context each, and a prompt step of 128,
256 and 512 tokens, in prompts of 128. Times are the best of several, in milliseconds. The floor
is the weights and the pages that a step reads at the bandwidth that adding up a large tensor
reaches. int8's parts are as its own step took them, waits for the other threads among them.
"""

from __future__ import annotations

import argparse
import time

import numba
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from steps import best_seconds, cache_for, model_folder, pack

from farthing.models.decoder import Decoder
from farthing.models.decoder_int8 import Int8Layers
from farthing.models.interface import KVCache, StepInput
from farthing.quant.kernels.cpu import PHASES
from farthing.quant.kernels.simd import cycles
from farthing.quant.precision import Held

# sequences, context, tokens of each in the step
STEPS = [(1, 200, 1), (8, 200, 1), (32, 200, 1), (1, 128, 128), (2, 128, 128), (4, 128, 128)]
LOAD: dict[str, tuple[Held, torch.dtype]] = {
    "fp32": ("none", torch.float32),
    "bf16": ("none", torch.bfloat16),
    "int8": ("int8", torch.float32),
}


@numba.njit  # type: ignore[untyped-decorator]  # numba has no types
def now() -> int:
    return cycles()  # type: ignore[no-any-return]  # as above


def bandwidth() -> float:
    """Bytes a second of reading memory, on torch's threads."""
    large = torch.ones(256 * 2**20 // 4)
    return large.nbytes / best_seconds(lambda: large.sum())


def parts_ms(model: Decoder, step: StepInput, kv: KVCache) -> dict[str, float]:
    """The layers' phases, and the rest: embedding, head and call; of the fastest of ten."""
    layers = model.layers
    if not isinstance(layers, Int8Layers):
        return {}
    fastest: dict[str, float] = {}
    for _ in range(10):
        layers.ticks = np.zeros(len(PHASES) + 1, np.int64)
        first, start = now(), time.perf_counter()
        model.forward(step, kv)
        total = 1e3 * (time.perf_counter() - start)
        ms_per_tick = total / (now() - first)
        parts = dict(zip(PHASES, (layers.ticks[:-1] * ms_per_tick).tolist(), strict=True))
        parts["rest"] = total - sum(parts.values())
        if not fastest or total < sum(fastest.values()):
            fastest = parts
    layers.ticks = None
    return fastest


def floor_ms(model: Decoder, step: StepInput, bytes_per_second: float) -> float:
    """What each sequence has in the cache is read once, and every weight once."""
    spec = model.spec
    cached = int(step.context_lens.sum()) * spec.kv_bytes_per_token
    return 1e3 * (spec.weight_bytes + cached) / bytes_per_second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="as for farthing serve; the default model without it")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precisions", nargs="+", choices=LOAD, default=list(LOAD))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder = model_folder(arguments.model)
    speed = bandwidth()

    console = Console()
    console.print(f"{folder.name}, {arguments.threads} threads, memory {speed / 1e9:.1f} GB/s")
    for name in arguments.precisions:
        precision, dtype = LOAD[name]
        start = time.perf_counter()
        model = Decoder.from_folder(folder, precision, dtype=dtype)
        table = Table(title=f"{name}, loaded in {time.perf_counter() - start:.1f} s; ms a step")
        table.add_column("sequences × tokens")
        parts_shown = (*PHASES, "rest") if name == "int8" else ()
        for column in ("step", "floor", *parts_shown):
            table.add_column(column, justify="right")
        for sequences, context, chunk in STEPS:
            step = pack(sequences, context, chunk)
            kv = cache_for(model, step)
            total = 1e3 * best_seconds(lambda: model.forward(step, kv))  # noqa: B023 (called at once)
            times = [total, floor_ms(model, step, speed), *parts_ms(model, step, kv).values()]
            table.add_row(f"{sequences} × {chunk}", *(f"{value:.2f}" for value in times))
        console.print(table)


if __name__ == "__main__":
    main()
