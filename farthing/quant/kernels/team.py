"""A team of threads that runs one compiled function together.

The team is OpenMP's, the one that torch computes with, so the two never hold a core against each
other; numba's own pools would. A function of a team calls `barrier()` between its phases.
"""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import torch  # brings the OpenMP runtime into the process
from numba import types

barrier = types.ExternalFunction("GOMP_barrier", types.void())
thread_number = types.ExternalFunction("omp_get_thread_num", types.int32())


class Team:
    """As many threads as torch uses, or one where the process has no GNU-compatible OpenMP."""

    def __init__(self) -> None:
        process = ctypes.CDLL(None)
        self._parallel = getattr(process, "GOMP_parallel", None)
        if self._parallel is None:
            self._alone = ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 0)
            address = ctypes.cast(self._alone, ctypes.c_void_p).value
            for name in ("GOMP_barrier", "omp_get_thread_num"):
                llvm.add_symbol(name, address)
        else:
            pointer = ctypes.c_void_p
            self._parallel.argtypes = (pointer, pointer, ctypes.c_uint, ctypes.c_uint)
            self._parallel.restype = None

    @property
    def threads(self) -> int:
        return torch.get_num_threads() if self._parallel is not None else 1

    def run(self, function: int, argument: int) -> None:
        """Call the C function at this address on every thread with the same pointer."""
        if self._parallel is None:
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(function)(argument)
        else:
            self._parallel(function, argument, self.threads, 0)


TEAM = Team()
