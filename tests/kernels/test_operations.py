"""Every operation of the table is accurate, repeats to the bit and leaves its inputs alone, on
ragged shapes in every precision.
"""

import functools
import itertools

import pytest
import torch

import kernels
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


IN_PLACE = {
    "linear": lambda: kernels.linear(real(2, 3, 6), real(5, 6), real(5), "sigmoid"),
    "mlp": lambda: kernels.mlp(real(2, 3, 6), [real(5, 6), real(2, 5)], [real(5), real(2)], "relu"),
    "layer_norm": lambda: kernels.layer_norm(real(2, 3, 6), (3, 6), real(3, 6), real(3, 6)),
    "one image": lambda: kernels.conv2d(real(1, 8, 8), real(3, 1, 3, 3), real(3)),
    "smoothed": lambda: kernels.cross_entropy(
        real(4, 5), torch.arange(4), label_smoothing=0.1, reduction="none"
    ),
    "probabilities": lambda: kernels.cross_entropy(
        real(4, 5, 2), real(4, 5, 2).softmax(1).detach(), reduction="none"
    ),
    "weighted": lambda: kernels.cross_entropy(
        real(4, 5, 2), torch.arange(8).view(4, 2) % 5, torch.rand(5), reduction="none"
    ),
    "one row": lambda: kernels.cross_entropy(real(5), torch.tensor(2), reduction="none"),
    "mse": lambda: kernels.mse_loss(real(4, 5), torch.rand(4, 5), reduction="none"),
    "last layer": lambda: kernels.linear_cross_entropy(
        real(4, 6), real(5, 6), real(5), torch.arange(4), reduction="none"
    ),
}


def real(*shape):
    return torch.randn(shape, requires_grad=True)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", IN_PLACE)
def test_outputs_may_be_changed_in_place(name, backend, device):
    """torch forbids this for a view that a Function returns, and means a masked loss by it too."""
    with kernels.use(backend), torch.device(device):
        y = IN_PLACE[name]()
        y += 1  # does not touch what the backward needs, or is noticed
        if name == "linear":
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        else:
            y.sum().backward()
