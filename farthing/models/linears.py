"""A linear layer as its weights are held."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn.functional import linear

from farthing.quant.kernels.nf4 import NF4Weight, nf4_linear


class Linear(Protocol):
    """inputs [..., K] → [..., N] in their dtype."""

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor: ...

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class DenseLinear:
    """Weight [N, K] and bias [N] in a floating-point dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return linear(inputs, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)


@dataclass(frozen=True, slots=True)
class NF4Linear:
    """A 4-bit weight [N, K], NF4 or FP4, and a bias [N]; on a GPU it takes bfloat16 alone."""

    weight: NF4Weight
    bias: torch.Tensor | None

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return nf4_linear(inputs, self.weight, self.bias)

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)
