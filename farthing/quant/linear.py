"""Linear layers in bitsandbytes' formats, through transformers' integration of it."""

from __future__ import annotations

import bitsandbytes
import torch
from transformers import BitsAndBytesConfig


def bitsandbytes_config(precision: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """How to quantise 16-bit weights to "int8" or "nf4" while they are loaded."""
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=precision,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_cpu_layout(module: torch.nn.Module) -> None:
    """Let 4-bit layers on a CPU compute where bitsandbytes' packed layout does not fit them.

    On CPUs with AVX512-BF16 it repacks each weight on first use, and fails on those whose rows
    are not whole blocks or not a multiple of 32; these then take its general path.
    """
    for layer in module.modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            block = layer.weight.quant_state.blocksize
            if layer.in_features % block or layer.out_features % 32:
                layer.support_avx512bf16_for_cpu = False
