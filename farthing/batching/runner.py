"""Batch → tensors → model → logits → tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Rows

import numpy as np
import torch

from farthing.batching.sampler import Draw, Sample, Sampler, SamplingError
from farthing.batching.sequence import Batch, Chunk, Sequence
from farthing.batching.types import Request, SamplingParams
from farthing.models.interface import KVCache, Model, StepInput


def step_input(chunks: Rows[Chunk], page_size: int, device: torch.device) -> StepInput:
    """Pack chunks into one step; their sequences' pages cover every token computed."""
    lengths = [chunk.length for chunk in chunks]
    query_starts = list(itertools.accumulate(lengths, initial=0))
    tokens: list[int] = []
    for chunk in chunks:
        tokens += chunk.sequence.tokens[chunk.start : chunk.end]
    positions = np.concatenate([np.arange(chunk.start, chunk.end) for chunk in chunks])

    width = max(len(chunk.sequence.pages) for chunk in chunks)
    block_tables = np.zeros((len(chunks), width), dtype=np.int32)
    for row, chunk in enumerate(chunks):
        pages = chunk.sequence.pages
        block_tables[row, : len(pages)] = pages
        block_tables[row, len(pages) :] = pages[0]  # never a stranger's page
    owner = np.repeat(np.arange(len(chunks)), lengths)
    slots = block_tables[owner, positions // page_size].astype(np.int64) * page_size
    slots += positions % page_size

    contexts = [chunk.end for chunk in chunks]
    last_rows = [
        end - 1 for chunk, end in zip(chunks, query_starts[1:], strict=True) if chunk.draws
    ]

    def on_device(values: object, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)

    return StepInput(
        tokens=on_device(tokens, torch.int64),
        positions=on_device(positions, torch.int64),
        slots=on_device(slots, torch.int64),
        block_tables=on_device(block_tables, torch.int32),
        query_starts=on_device(query_starts, torch.int32),
        context_lens=on_device(contexts, torch.int32),
        logits_rows=on_device(last_rows, torch.int64),
        max_query=max(lengths),
        max_context=max(contexts),
    )


class Runner:
    """Runs batches on one model and its cache."""

    def __init__(self, model: Model, kv: KVCache) -> None:
        self.model = model
        self._kv = kv
        self._sampler = Sampler(model.spec.vocab_size, model.device)

    @torch.inference_mode()
    def run(self, batch: Batch) -> list[Sample | SamplingError]:
        """Compute a batch; returns one draw for each of `batch.drawing`, in order."""
        step = step_input(batch.chunks, self._kv.page_size, self.model.device)
        logits = self.model.forward(step, self._kv)
        draws = [
            Draw(chunk.sequence.params, chunk.sequence.request.prompt, chunk.sequence.output)
            for chunk in batch.drawing
        ]
        return self._sampler.sample(logits, draws) if draws else []

    def warm_up(self, rows: int, tokens: int) -> None:
        """Run made-up steps of the shapes to come: kernels are compiled, memory is touched.

        One prompt of `tokens` tokens, then `rows` sequences that decode, then one. The cache must
        not be in use: page 0 is written.
        """
        self.run(Batch((self._made_up(tokens, decodes=False),)))
        for count in {rows, 1}:
            self.run(Batch(tuple(self._made_up(2, decodes=True) for _ in range(count))))

    def _made_up(self, tokens: int, decodes: bool) -> Chunk:
        params = SamplingParams(max_tokens=1, seed=0, temperature=0.0)
        sequence = Sequence(Request(request_id="", prompt=[0] * tokens, params=params), 0)
        sequence.pages = [0] * -(-tokens // self._kv.page_size)
        start = tokens - 1 if decodes else 0
        return Chunk(sequence, start, tokens - start, draws=True)
