"""4-bit weights as bitsandbytes stores them in safetensors.

A weight is its codes and, by names that begin with its own, what undoes them: absmax, quant_map,
the same again of absmax where these are quantised too, and a JSON text in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from farthing.quant.errors import ModelError
from farthing.quant.kernels.nf4 import NF4Weight


def is_four_bit(state: Mapping[str, torch.Tensor], name: str) -> bool:
    """Whether the checkpoint holds the weight of this name in 4 bits."""
    return absmax_name(name) in state


def absmax_name(name: str) -> str:
    """The tensor that every 4-bit weight has beside it."""
    return f"{name}.absmax"


def read_weight(state: Mapping[str, torch.Tensor], name: str, device: torch.device) -> NF4Weight:
    """A stored 4-bit weight in the kernels' layout, repacked on the device.

    Raises ModelError where its parts are not what bitsandbytes writes, or the layout cannot hold
    it.
    """
    from bitsandbytes.functional import QuantState  # a second to import

    prefix = f"{name}."
    parts = {key.removeprefix(prefix): state[key] for key in state if key.startswith(prefix)}
    try:
        quant_state = QuantState.from_dict(parts, device)
    except (AssertionError, KeyError, ValueError) as error:
        raise ModelError(
            f"the 4-bit weight {name} is not as bitsandbytes stores it ({error!r}). "
            "Download the model again"
        ) from None
    return NF4Weight.from_bitsandbytes(state[name].to(device), quant_state)
