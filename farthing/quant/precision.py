"""What precision is asked for, what a checkpoint has, and what memory it takes."""

from __future__ import annotations

from typing import Any, Literal

import torch

from farthing.quant.errors import ModelError
from farthing.quant.headers import StoredTensor

Precision = Literal["auto", "none", "int8", "nf4"]
Stored = Literal["int8", "nf4", "fp4"]
Held = Literal["none", "int8", "nf4", "fp4"]  # "none": in a floating-point dtype

# Our kernels hold an absmax, of a block of 64 4-bit weights, in 16 bits. bitsandbytes' double
# quantisation takes one byte, 3 % of the weight less. 8-bit weights have an absmax a row.
_ABSMAX_BYTES = 2
_BYTES_PER_WEIGHT = {"int8": 1.0, "nf4": 0.5 + _ABSMAX_BYTES / 64}
_KEPT_IN_16_BITS = ("embed_tokens.weight", "lm_head.weight")


def stored_precision(settings: dict[str, Any] | None) -> Stored | None:
    """The precision of a prequantised checkpoint's `quantization_config`; None for a plain one.

    Raises ModelError for formats other than bitsandbytes'.
    """
    if not settings:
        return None
    method = settings.get("quant_method")
    if settings.get("load_in_4bit"):
        return "nf4" if settings.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    if settings.get("load_in_8bit"):
        return "int8"
    raise ModelError(
        f"checkpoints quantised by {method!r} are not supported. Use the model's 16-bit weights "
        "(with --quantization nf4 or int8 if memory is short) or a bitsandbytes checkpoint"
    )


def check_quantisable(tensors: list[StoredTensor], precision: str) -> None:
    """Raise ModelError where bitsandbytes would leave weights in 16 bits without a word.

    transformers holds a layer's experts in one 3-D parameter, and bitsandbytes converts
    `nn.Linear` alone.
    """
    total = sum(tensor.numel for tensor in tensors)
    experts = sum(tensor.numel for tensor in tensors if ".experts." in tensor.name)
    if experts:
        raise ModelError(
            f"{precision} is not supported for mixtures of experts: bitsandbytes would leave the "
            f"experts, {experts / total:.0%} of this model's weights, in 16 bits. "
            "Use --quantization none with 16-bit weights, or a dense model"
        )


def weight_bytes(tensors: list[StoredTensor], precision: str, dtype: torch.dtype) -> int:
    """What the weights will take in memory: "none", "int8" or "nf4" of a plain checkpoint.

    Tensors of one byte an element are a prequantised checkpoint's and count as they are, but for
    the absmax of 4-bit weights.
    """
    total = 0.0
    for tensor in tensors:
        is_linear = len(tensor.shape) == 2 and not tensor.name.endswith(_KEPT_IN_16_BITS)
        if tensor.name.endswith(".weight.absmax"):
            total += tensor.numel * _ABSMAX_BYTES
        elif tensor.nbytes == tensor.numel:
            total += tensor.nbytes
        elif is_linear and precision != "none":
            total += tensor.numel * _BYTES_PER_WEIGHT[precision]
        else:
            total += tensor.numel * dtype.itemsize
    return int(total)
