"""Any causal language model of transformers over a paged cache, through its attention registry."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from farthing.models.attention import StepAttention
from farthing.models.interface import KVCache, ModelSpec, StepInput
from farthing.quant.errors import ModelError

ATTENTION = "farthing_paged"


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    step_attention: StepAttention,
    scaling: float,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The registry's function: [1, H, T, D] in, [1, T, H, Dv] out."""
    assert attention_mask is None
    assert isinstance(module.layer_idx, int)
    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))
    output = step_attention.attend(module.layer_idx, query, key, value, scaling, sliding_window)
    return output.unsqueeze(0), None


AttentionInterface.register(ATTENTION, _attend)


class HFModel:
    """`Model` over a transformers model built with `attn_implementation=ATTENTION`.

    Multi-head latent attention is stored in its expanded form: every head's key and value.
    """

    def __init__(self, module: PreTrainedModel, precision: str) -> None:
        self._module = module.eval()
        self._spec = _spec(module, precision)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def device(self) -> torch.device:
        device: torch.device = self._module.device
        return device

    @torch.inference_mode()
    def forward(self, step: StepInput, kv: KVCache) -> torch.Tensor:
        """Write the step's K and V into their slots; return float32 logits [R, vocab_size]."""
        output = self._module(
            input_ids=step.tokens.unsqueeze(0),
            position_ids=step.positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=step.logits_rows,
            step_attention=StepAttention(step, kv),
        )
        logits: torch.Tensor = output.logits[0].float()
        return logits


def load_hf_model(
    folder: Path, precision: str, in_flight: bool, device: torch.device, dtype: torch.dtype
) -> HFModel:
    """Load a folder's weights, quantising them `in_flight` or as the checkpoint holds them.

    precision is "int8", "nf4", "fp4" or the dtype's name. Raises ModelError for weights that are
    not the model's, or do not fit.
    """
    options: dict[str, Any] = {}
    if in_flight:
        from farthing.quant.linear import bitsandbytes_config  # a second to import

        options["quantization_config"] = bitsandbytes_config(precision, dtype)
    try:
        module, report = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map={"": device},
            attn_implementation=ATTENTION,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # reported below
            output_loading_info=True,
            **options,
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
    if device.type == "cpu" and precision in ("nf4", "fp4"):
        from farthing.quant.linear import keep_cpu_layout

        keep_cpu_layout(module)
    return HFModel(module, precision)


def _spec(module: PreTrainedModel, precision: str) -> ModelSpec:
    config = module.config
    if getattr(config, "kv_lora_rank", None):
        kv_heads = config.num_attention_heads
        key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim
        value_dim = config.v_head_dim
    else:
        kv_heads = config.num_key_value_heads
        head_dim = getattr(config, "head_dim", None)
        key_dim = value_dim = head_dim or config.hidden_size // config.num_attention_heads
    return ModelSpec(
        model_type=config.model_type,
        precision=precision,
        num_layers=config.num_hidden_layers,
        num_kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        vocab_size=config.vocab_size,
        max_position=config.max_position_embeddings,
        kv_dtype=module.dtype,
        weight_bytes=weight_bytes(module),
    )


def weight_bytes(module: torch.nn.Module) -> int:
    """Bytes that the weights take in memory, shared ones once, quantisation's scales included."""
    weights = {weight.data_ptr(): weight for weight in module.parameters()}
    scales = 0
    for weight in weights.values():
        state = getattr(weight, "quant_state", None)
        row_scales = getattr(weight, "SCB", None)
        if state is not None:
            nested = state.state2.absmax.nbytes if state.nested else 0
            scales += state.absmax.nbytes + nested
        elif row_scales is not None:
            scales += row_scales.nbytes
    return scales + sum(weight.nbytes for weight in weights.values())
