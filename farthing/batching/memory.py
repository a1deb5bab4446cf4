"""How many pages the KV cache gets: from what is free, not from the model's longest context."""

from __future__ import annotations

from farthing.models.interface import ModelSpec

GIB = 1024**3
HOST_SHARE = 0.4  # of the free host memory: it also holds the front end and the page cache
DEVICE_SHARE = 0.9  # of the free device memory, measured after a step of the largest shape


class CacheTooSmall(Exception):
    """The memory there is cannot hold the context asked for."""


def plan_pages(
    spec: ModelSpec,
    page_size: int,
    budget: int,
    batch_max: int,
    max_model_len: int | None,
) -> tuple[int, int]:
    """(pages, longest sequence in tokens) within `budget` bytes.

    No more pages than `batch_max` sequences of the longest length can fill. Raises CacheTooSmall
    where `max_model_len` is asked for and does not fit, or where nothing useful fits at all.
    """
    page_bytes = spec.kv_bytes_per_token * page_size
    longest = max_model_len or spec.max_position
    if longest > spec.max_position:
        raise CacheTooSmall(
            f"--max-model-len {longest} is more than the {spec.max_position} tokens "
            f"that {spec.model_type} was made for; lower it"
        )
    wanted = batch_max * -(-longest // page_size)
    pages = min(budget // page_bytes, wanted)
    if pages * page_size < min(longest, 256):
        raise CacheTooSmall(
            f"{budget / GIB:.2f} GiB for the KV cache hold {pages * page_size} tokens at "
            f"{spec.kv_bytes_per_token} bytes each; free memory or raise --kv-memory"
        )
    if max_model_len is not None and pages * page_size < max_model_len:
        needed = max_model_len * spec.kv_bytes_per_token
        raise CacheTooSmall(
            f"--max-model-len {max_model_len} needs {needed / GIB:.2f} GiB"
            f" of KV cache and {budget / GIB:.2f} GiB are there; "
            f"lower it to {pages * page_size} or raise --kv-memory"
        )
    return pages, min(longest, pages * page_size)
