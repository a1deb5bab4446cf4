"""Rotary position embeddings: the inverse frequencies of each variant the families use.

Formulas: RoFormer (arXiv 2104.09864); linear interpolation (2306.15595); YaRN (2309.00071,
sections 3.2 and 3.4); Llama 3.1's scaling as published with its weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from farthing.quant.errors import ModelError


def rope_parameters(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json's rope settings in one form, from transformers 5's keys or the older ones."""
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    parameters.setdefault("max_position_embeddings", config["max_position_embeddings"])
    return parameters


def inverse_frequencies(parameters: Mapping[str, Any], head_dim: int) -> tuple[torch.Tensor, float]:
    """float32 [head_dim / 2], and what cosines and sines are multiplied by.

    Raises ModelError for a rope type that is not known.
    """
    kind = parameters["rope_type"]
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    plain: torch.Tensor = 1.0 / parameters["rope_theta"] ** exponents
    if kind == "default":
        return plain, 1.0
    if kind == "linear":
        return plain / parameters["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, parameters), 1.0
    if kind == "yarn":
        return _yarn(plain, parameters, head_dim), _yarn_attention(parameters)
    raise ModelError(
        f"the rope type {kind!r} is not supported; default, linear, llama3 and yarn are"
    )


def _llama3(plain: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Long waves slowed by the factor, short ones kept, a ramp between."""
    original = parameters["original_max_position_embeddings"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = original * plain / (2 * math.pi)
    kept: torch.Tensor = ((turns - low) / (high - low)).clamp(0, 1)
    return torch.lerp(plain / parameters["factor"], plain, kept)


def _yarn(plain: torch.Tensor, parameters: Mapping[str, Any], head_dim: int) -> torch.Tensor:
    """Dimensions that turn often within the original context kept, slow ones interpolated."""
    original = (
        parameters.get("original_max_position_embeddings") or parameters["max_position_embeddings"]
    )

    def dimension(turns: float) -> float:
        wave = math.log(original / (turns * 2 * math.pi))
        return head_dim * wave / (2 * math.log(parameters["rope_theta"]))

    low = dimension(parameters.get("beta_fast") or 32)
    high = dimension(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slowed = ramp.clamp(0, 1)
    return torch.lerp(plain, plain / parameters["factor"], slowed)


def _yarn_attention(parameters: Mapping[str, Any]) -> float:
    def magnitude(scale: float) -> float:
        factor = parameters["factor"]
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return magnitude(parameters["mscale"]) / magnitude(parameters["mscale_all_dim"])
    return magnitude(1.0)
