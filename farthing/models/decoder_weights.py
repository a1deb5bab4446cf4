"""What a dense decoder's checkpoint holds: its shape from config.json, and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from farthing.models.rope import rope_parameters
from farthing.quant.errors import ModelError
from farthing.quant.kernels.int8 import quantise_rows
from farthing.quant.kernels.simd import GROUP

FAMILIES = ("llama", "qwen2", "qwen3")

QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """The shape of a decoder and its constants."""

    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_position: int
    epsilon: float
    tied: bool
    rope: Mapping[str, Any]

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Read a config.json. Raises ModelError for what the decoder does not compute."""
        model_type = config.get("model_type")
        if model_type not in FAMILIES:
            raise ModelError(f"{model_type!r} is not one of {', '.join(FAMILIES)}")
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"the activation {config['hidden_act']!r} is not supported; silu is")
        if config.get("use_sliding_window"):
            raise ModelError("sliding-window attention is not supported by this decoder")
        heads = config["num_attention_heads"]
        default_head_dim = 128 if model_type == "qwen3" else config["hidden_size"] // heads
        return cls(
            model_type=model_type,
            num_layers=config["num_hidden_layers"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or default_head_dim,
            vocab_size=config["vocab_size"],
            max_position=config["max_position_embeddings"],
            epsilon=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", False),
            rope=rope_parameters(config),
        )

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """The tensors that a checkpoint must have, by transformers' names, biases aside."""
        hidden, gated = self.hidden_size, self.intermediate_size
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        yield "model.embed_tokens.weight", (self.vocab_size, hidden)
        yield "model.norm.weight", (hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocab_size, hidden)
        for layer in (f"model.layers.{index}" for index in range(self.num_layers)):
            yield f"{layer}.input_layernorm.weight", (hidden,)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            for name, outputs in zip(QKV, (queries, keys, keys), strict=True):
                yield f"{layer}.self_attn.{name}.weight", (outputs, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, queries)
            for name in GATE_UP:
                yield f"{layer}.mlp.{name}.weight", (gated, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, gated)

    def check_int8(self) -> None:
        """Raise ModelError where a size is not a multiple of what shares an activation's scale."""
        for name in ("hidden_size", "intermediate_size", "head_dim"):
            if (size := getattr(self, name)) % GROUP:
                raise ModelError(
                    f"int8 on a CPU needs a {name} that {GROUP} divides, and it is {size}. "
                    "Use --quantization none"
                )


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear's weight [outputs, inputs] and bias [outputs]."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Block:
    """One layer, its projections fused: q, k and v in one linear, gate and up in another."""

    attention_norm: torch.Tensor
    query_norm: torch.Tensor | None
    key_norm: torch.Tensor | None
    qkv: Linear
    out: Linear
    mlp_norm: torch.Tensor
    gate_up: Linear
    down: Linear

    def tensors(self) -> Iterator[torch.Tensor]:
        linears = (self.qkv, self.out, self.gate_up, self.down)
        parts = [self.attention_norm, self.query_norm, self.key_norm, self.mlp_norm]
        for linear in linears:
            parts += [linear.weight, linear.bias]
        return (part for part in parts if part is not None)


class Checkpoint:
    """A checkpoint's tensors by transformers' names."""

    def __init__(
        self,
        config: DecoderConfig,
        state: Mapping[str, torch.Tensor],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        """Raises ModelError where a tensor is missing or has another shape."""
        wrong = [
            name
            for name, shape in config.shapes()
            if name not in state or tuple(state[name].shape) != shape
        ]
        if wrong:
            raise ModelError(
                f"the checkpoint lacks {len(wrong)} of the model's weights or has them in another "
                f"shape ({wrong[0]}…). Download the model again"
            )
        self._config = config
        self._state = state
        self._device = device
        self._dtype = dtype

    def tensor(self, name: str) -> torch.Tensor:
        """On the device, in the dtype."""
        return self._state[name].to(self._device, self._dtype)

    def optional(self, name: str) -> torch.Tensor | None:
        return self.tensor(name) if name in self._state else None

    def head(self) -> torch.Tensor:
        """The language-model head [vocab_size, hidden_size]: the embedding where they are tied."""
        return self.tensor(self.head_name + ".weight")

    @property
    def head_name(self) -> str:
        return "model.embed_tokens" if self._config.tied else "lm_head"

    def block(self, index: int) -> Block:
        layer = f"model.layers.{index}"
        attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        return Block(
            attention_norm=self.tensor(f"{layer}.input_layernorm.weight"),
            query_norm=self.optional(f"{attention}.q_norm.weight"),
            key_norm=self.optional(f"{attention}.k_norm.weight"),
            qkv=self._fused([f"{attention}.{name}" for name in QKV]),
            out=self._fused([f"{attention}.o_proj"]),
            mlp_norm=self.tensor(f"{layer}.post_attention_layernorm.weight"),
            gate_up=self._fused([f"{mlp}.{name}" for name in GATE_UP]),
            down=self._fused([f"{mlp}.down_proj"]),
        )

    def bias(self, names: list[str]) -> torch.Tensor | None:
        """The biases of linears that share their inputs, as one."""
        if f"{names[0]}.bias" not in self._state:
            return None
        return torch.cat([self.tensor(f"{name}.bias") for name in names])

    def rows(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A linear as int8 codes [N, K] and float32 scales [N]: bitsandbytes' own, or made here."""
        weight = self._state[f"{name}.weight"]
        if weight.dtype == torch.int8:
            return weight, self._state[f"{name}.SCB"].float() / 127
        return quantise_rows(weight)

    def _fused(self, names: list[str]) -> Linear:
        weights = [self.tensor(f"{name}.weight") for name in names]
        return Linear(torch.cat(weights), self.bias(names))
