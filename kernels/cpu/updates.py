"""An optimizer's step in compiled loops, with the results of `kernels.ops.optim.apply_rule`."""

import ctypes
import functools
import itertools
from typing import Any

import numpy as np
import torch

from .. import launch
from ..rules import Rule
from . import DTYPES, blocks, rows

_MOST = 1 << 18  # elements from which several threads of torch are faster
_KINDS = [*[ctypes.c_void_p] * 3, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64]


@functools.cache
def _compiled(rule: Rule, dtype: torch.dtype) -> tuple[Any, Any]:
    """(the loop of `rows.rule`, the code behind it, which must live as long)."""
    with blocks.compiling:
        code = rows.rule(rule, DTYPES[dtype])
    return ctypes.CFUNCTYPE(None, *_KINDS)(code.address), code


def update(rule: Rule, lists: list[list[torch.Tensor]], row: tuple, step: Any) -> bool:
    """Take one step of a rule in place, if the loops serve it. False if they do not.

    lists: parameters, gradients, and a list for each of the rule's states. row, step: Python's
    numbers, as in `apply_rule`.
    """
    dtype = lists[0][0].dtype
    every = [t for tensors in lists for t in tensors]
    if not launch.takes_loops(*every) or any([isinstance(n, torch.Tensor) for n in (*row, step)]):
        return False
    if not all([t.dtype is dtype and t.is_contiguous() and not t.is_neg() for t in every]):
        return False
    calls, size = [], every[0].element_size()
    for p, g, *states in zip(*lists):
        at = [t.data_ptr() for t in (p, g, *states)]
        apart = {b - a for a, b in itertools.pairwise(at[2:])} or {0}
        if len(apart) > 1 or p.numel() > _MOST or any([address % size for address in at]):
            return False
        calls.append((at[0], at[1], at[2] if states else 0, apart.pop() // size, p.numel()))
    numbers = np.array(rule.at_ref(row, step), DTYPES[dtype])
    loop, _ = _compiled(rule, dtype)
    for *addresses, count in calls:
        loop(*addresses, numbers.ctypes.data, count)
    return True
