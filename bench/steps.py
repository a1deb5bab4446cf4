"""Steps as the engine's runner would pack them, for timing a model without a server."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from farthing.models.interface import KVCache, Model, StepInput
from farthing.quant import fetch
from farthing.server.config import Settings

PAGE_SIZE = 16


def model_folder(name: str | None) -> Path:
    """A model's folder by any name that `farthing serve` takes."""
    return fetch.resolve(name, "huggingface", Settings().cache_dir)


def pack(sequences: int, context: int, chunk: int) -> StepInput:
    """The last `chunk` tokens of each sequence of `context` tokens; logits for each one's last."""
    pages = -(-context // PAGE_SIZE)
    tables = torch.arange(sequences * pages, dtype=torch.int32).view(sequences, pages)
    positions = torch.arange(context - chunk, context).repeat(sequences)
    owners = torch.arange(sequences).repeat_interleave(chunk)
    starts = torch.arange(sequences + 1, dtype=torch.int32) * chunk
    return StepInput(
        tokens=torch.randint(100, 200, (sequences * chunk,)),
        positions=positions,
        slots=tables[owners, positions // PAGE_SIZE].long() * PAGE_SIZE + positions % PAGE_SIZE,
        block_tables=tables,
        query_starts=starts,
        context_lens=torch.full((sequences,), context, dtype=torch.int32),
        logits_rows=starts[1:].long() - 1,
        max_query=chunk,
        max_context=context,
    )


def cache_for(model: Model, step: StepInput) -> KVCache:
    pages = int(step.block_tables.max()) + 1
    kv = KVCache.allocate(model.spec, pages, PAGE_SIZE, model.device)
    for tensor in (*kv.keys, *kv.values):
        tensor.normal_()
    return kv


def best_seconds(run: Callable[[], object], budget: float = 1.5) -> float:
    """The fastest of at least three runs within about `budget` seconds, after one to warm up."""
    run()
    taken: list[float] = []
    while len(taken) < 3 or sum(taken) < budget:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)
