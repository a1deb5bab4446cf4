"""A model folder becomes a model on a device, or a ModelError that says what to do."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PretrainedConfig
from transformers.modeling_utils import PreTrainedModel

from farthing.models.hf import ATTENTION, HFModel, check_architecture
from farthing.models.interface import Model
from farthing.models.memory import free_memory
from farthing.quant.errors import ModelError
from farthing.quant.headers import StoredTensor, read_headers
from farthing.quant.linear import (
    Precision,
    bitsandbytes_config,
    check_quantisable,
    keep_cpu_layout,
    stored_precision,
    weight_bytes,
)

_DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def load_model(
    folder: Path, precision: Precision, device: torch.device, dtype: torch.dtype | None = None
) -> Model:
    """Load a model folder's weights onto the device.

    "auto" keeps what a prequantised checkpoint holds; of a plain one it takes 16 bits where they
    fit the device, then int8, then nf4. dtype is what is not quantised is held and computed in:
    by default the checkpoint's on an accelerator and bfloat16 on a CPU or where it is float32.

    Raises ModelError where the architecture, the weights' format or the memory does not allow it.
    """
    config = _read_config(folder)
    check_architecture(config)
    tensors = read_headers(folder)
    dtype = dtype or _default_dtype(config, device)
    stored = stored_precision(getattr(config, "quantization_config", None))
    if stored is not None and precision not in ("auto", stored):
        raise ModelError(
            f"{folder} holds {stored} weights, which cannot become {precision!r}. "
            "Use --quantization auto, or the model's 16-bit weights"
        )
    free = free_memory(device)
    if stored is None:
        asked = _fitting(precision, tensors, dtype, free)
        quantisation = bitsandbytes_config(asked, dtype)
    else:
        asked, quantisation = "none", None
    held = stored or asked
    if held != "none":
        check_quantisable(tensors, held)
    _check_memory(weight_bytes(tensors, asked, dtype), free, held, device)
    module = _load_module(folder, config, device, dtype, quantisation)
    if device.type == "cpu":
        keep_cpu_layout(module)
    return HFModel(module, _DTYPE_NAMES[dtype] if held == "none" else held)


def _read_config(folder: Path) -> PretrainedConfig:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json. Name a folder with a model's files")
    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"{folder / 'config.json'} cannot be read: {reason}") from None


def _default_dtype(config: PretrainedConfig, device: torch.device) -> torch.dtype:
    if device.type == "cpu" or config.dtype != torch.float16:
        return torch.bfloat16
    return torch.float16


def _fitting(
    precision: Precision, tensors: list[StoredTensor], dtype: torch.dtype, free: int
) -> Precision:
    """What "auto" stands for; other precisions as they are."""
    if precision != "auto":
        return precision
    choices: tuple[Precision, ...] = ("none", "int8", "nf4")
    fitting = (choice for choice in choices if weight_bytes(tensors, choice, dtype) < 0.9 * free)
    return next(fitting, "nf4")


def _check_memory(needed: int, free: int, precision: str, device: torch.device) -> None:
    if needed <= free:
        return
    mend = "a smaller model" if precision in ("nf4", "fp4") else "--quantization nf4"
    raise ModelError(
        f"the weights need {needed / 2**30:.2f} GiB in precision {precision!r}, and {device} has "
        f"{free / 2**30:.2f} GiB free. Free memory there, or use {mend}"
    )


def _load_module(
    folder: Path,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    quantisation: BitsAndBytesConfig | None,
) -> PreTrainedModel:
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=ATTENTION,
            quantization_config=quantisation,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"{device} ran out of memory while the weights were loaded: {error}. "
            "Free memory there, or use a smaller precision or model"
        ) from None
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise ModelError(f"{folder} cannot be loaded: {error}") from None
    wrong = sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"]))
    if wrong:
        raise ModelError(
            f"{folder} lacks {len(wrong)} of the model's weights or has them in another shape "
            f"({wrong[0]}…). Download the model again"
        )
    return module
