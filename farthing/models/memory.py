"""How much memory can still be taken."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device, cgroup: Path = _CGROUP) -> int:
    """Bytes that can still be taken on the device; on a CPU, within the container's limit too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    free = int(psutil.virtual_memory().available)
    return min(free, _room_in_container(cgroup, free))


def _room_in_container(cgroup: Path, default: int) -> int:
    """The limit of control group v2 less what cannot be reclaimed (page cache can)."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        stat = (cgroup / "memory.stat").read_text()
    except OSError:
        return default
    if limit == "max":
        return default
    anonymous = next(int(line.split()[1]) for line in stat.splitlines() if line.startswith("anon "))
    return max(0, int(limit) - anonymous)
