"""Every operation of the table is accurate, repeats to the bit and leaves its inputs alone, on
ragged shapes in every precision.
"""

import functools
import itertools

import pytest
import torch

from kernels.operations import OPERATIONS, flatten
from tests.checks import DTYPES, Draw, assert_as_accurate, assert_equal, double, snapshot

# (batch, in, out), in every precision: two shapes that leave tiles partly empty on each side, and
# one without rows.
EVERY = [(7, 33, 16), (33, 17, 100), (0, 7, 17)]
# In float32 only: one of everything, whole tiles, several tiles, one output.
FLOAT32 = [(1, 1, 1), (16, 16, 16), (100, 16, 7), (17, 100, 1)]
CASES = [
    *itertools.product(EVERY, DTYPES),
    *itertools.product(FLOAT32, DTYPES[:1]),
]


def random_like(y, seed):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)


@pytest.mark.parametrize(("shape", "dtype"), CASES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_accuracy(name, shape, dtype, device):
    op = OPERATIONS[name]
    for label, args in op.cases(Draw(device, dtype), *shape):
        before = snapshot(args)
        dy = None if op.bwd is None else random_like(op.fwd_ref(*args)[0], 0)
        ours, torchs = op.results(args, dy), op.results(args, dy, reference=True)
        exact = functools.partial(op.results, *double((args, dy)), reference=True)
        assert_as_accurate(ours, torchs, exact, f"{name}, {label}")
        assert_equal(args, before, f"{name}, {label}: inputs changed")


@pytest.mark.parametrize("name", OPERATIONS)
def test_repeats_bitwise(name, device):
    op = OPERATIONS[name]
    for label, args in op.cases(Draw(device), 33, 17, 16):
        assert_equal(op.results(args), op.results(args), f"{name}, {label}")


@pytest.mark.parametrize("name", [name for name, op in OPERATIONS.items() if op.bwd])
def test_backward_leaves_what_forward_saved(name, device):
    """A second backward through the same graph gives the same gradients."""
    op = OPERATIONS[name]
    for label, args in op.cases(Draw(device), 7, 17, 16):
        y, saved = op.fwd(*args)
        dy = random_like(y, 1)
        before = snapshot((saved, dy))
        first = snapshot(op.bwd(dy, *saved))
        assert_equal(op.bwd(dy, *saved), first, f"{name}, {label}: second backward")
        assert_equal(flatten((saved, dy)), before, f"{name}, {label}: saved tensors changed")
