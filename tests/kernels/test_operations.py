"""Every operation of the table, in every precision, on ragged shapes: accurate, repeatable, and
inputs left alone.
"""

import functools

import pytest
import torch

from kernels.operations import OPERATIONS, flatten
from tests.checks import DTYPES, Draw, assert_as_accurate, assert_equal, double, snapshot, stacked

# (batch, in, out): one of everything; tiles left partly empty on each side; exact tiles; one
# output; nothing at all.
SHAPES = [
    (1, 1, 1),
    (7, 33, 16),
    (33, 17, 100),
    (16, 16, 16),
    (100, 16, 7),
    (17, 100, 1),
    (0, 7, 17),
]
# The error of torch in one number is a matter of luck: such results are drawn several times and
# judged together.
DRAWS = {(1, 1, 1): 4, (17, 100, 1): 6}


def random_like(y, seed):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_accuracy(name, shape, dtype, device):
    op = OPERATIONS[name]
    draws = [op.cases(Draw(device, dtype, seed), *shape) for seed in range(DRAWS.get(shape, 1))]
    for cases in zip(*draws):
        label = f"{name}, {cases[0][0]}"
        ours, torchs, exact = [], [], []
        for seed, (_, args) in enumerate(cases):
            before = snapshot(args)
            dy = None if op.bwd is None else random_like(op.fwd_ref(*args)[0], seed)
            ours.append(op.results(args, dy))
            torchs.append(op.results(args, dy, reference=True))
            exact.append(functools.partial(op.results, *double((args, dy)), reference=True))
            assert_equal(args, before, f"{label}: inputs changed")
        assert_as_accurate(
            stacked(ours), stacked(torchs), lambda exact=exact: stacked(e() for e in exact), label
        )


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
