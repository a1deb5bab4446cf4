"""What a checkpoint holds, read from its headers alone."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from farthing.quant.errors import ModelError

_BYTES = {"F64": 8, "F32": 4, "I64": 8, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}  # others: 1


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a safetensors file."""

    name: str
    dtype: str  # as safetensors spells it: "BF16", "U8"
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * _BYTES.get(self.dtype, 1)


def read_headers(folder: Path) -> list[StoredTensor]:
    """Every tensor of the folder's safetensors files.

    Raises ModelError where one is missing, cut short or not in the format.
    """
    return [tensor for file in _weight_files(folder) for tensor in _read_header(file)]


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    else:
        names = {"model.safetensors"}
    missing = sorted(name for name in names if not (folder / name).is_file())
    if missing:
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}. Download the model again; weights in another "
            "format (such as pytorch_model.bin) must be converted to safetensors first"
        )
    return [folder / name for name in sorted(names)]


def _read_header(file: Path) -> list[StoredTensor]:
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > file.stat().st_size:
                raise ValueError("header longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if 8 + length + end != file.stat().st_size:
            raise ValueError("size differs from what the header says")
    except (ValueError, KeyError, struct.error) as error:
        raise ModelError(f"{file} is damaged ({error}). Delete it and download it again") from None
    return [
        StoredTensor(name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()
    ]
