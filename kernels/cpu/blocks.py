"""Calls of compiled functions that take the address of a block of int64."""

import ctypes
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from numba import types

from . import DTYPES, rows, waiting

POINTERS = {torch.float32: waiting.floats, torch.float64: waiting.doubles}
compiling = threading.Lock()  # otherwise several threads would compile the same code
_CALL: Any = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # a call holds no lock of Python


class Code:
    """A function of a block, compiled for a dtype or read from disk. known: see `rows.named`."""

    def __init__(self, function: Callable, dtype: torch.dtype, **known: Any):
        signature, known = types.void(types.int64), {"FLOATS": POINTERS[dtype], **known}
        with compiling:
            self._kept = rows.address(function, signature, DTYPES[dtype], **known)
        self.call = _CALL(self._kept.address)


@functools.cache
def _team() -> Any:
    """`GOMP_parallel` of the OpenMP library whose threads torch uses, or None without one.

    These threads are awake after a product of torch's, and do not compete with it for the cores.
    """
    for path in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        found = getattr(ctypes.CDLL(str(path)), "GOMP_parallel", None)
        if found is not None:
            found.argtypes = [_CALL, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
            found.restype = None
            return found
    return None


def run(code: Code, address: int, is_shared: bool = False) -> None:
    """Call the function with a block's address. is_shared: on as many threads as torch uses."""
    threads = torch.get_num_threads() if is_shared else 1
    together = _team() if threads > 1 else None
    if together is None:
        code.call(address)
    else:
        together(code.call, address, threads, 0)
