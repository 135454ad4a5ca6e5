"""Simulated rounding, which says how far a result may be off (kernels/rounding.py)."""

import pytest
import torch

from kernels.operations import Make
from kernels.rounding import Rounding, worst_errors
from tests.checks import DTYPES

PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def rounded(compute, dtype, seed=0):
    """The result of `compute()` under the simulation. It must not compare or search numbers."""
    with Rounding(dtype, [], seed):
        return compute()


def layer(x, w, dy):
    """(a layer's output, the gradient of its weights)."""
    y = torch.sigmoid(x @ w.t())
    return y, (dy * y * (1 - y)).t() @ x


@PRECISIONS
def test_equal_rows_have_equal_errors_and_opposite_rows_opposite_ones(dtype):
    make = Make("cpu", torch.float64)
    x, w = (make.real(n, 36).to(dtype).double() for n in (1, 64))
    x = x.expand(36, 36)
    for seed in range(4):
        y = rounded(lambda: torch.tanh(x @ w.t()), dtype, seed)
        assert (y == y[0]).all() and (y[0] != torch.tanh(x @ w.t())[0]).any()
        assert torch.equal(rounded(lambda: torch.tanh(-x @ w.t()), dtype, seed), -y)
    assert not torch.equal(*(rounded(lambda: x @ w.t(), dtype, seed) for seed in (0, 1)))


@PRECISIONS
def test_equal_errors_add_up(dtype):
    """Equal rows err equally, so the gradient of 64 equal rows errs far more than 32 times as much
    as that of one row.
    """
    make = Make("cpu", torch.float64)
    x, w = make.real(1, 36), make.real(8, 36)
    one, many = (
        worst_errors(lambda n=n: layer(x.expand(n, 36), w, torch.ones(n, 8).double())[1], dtype)[0]
        for n in (1, 64)
    )
    assert many > 32 * one


@PRECISIONS
def test_errors_are_those_of_the_precision(dtype):
    """The simulated error is at least half of torch's error in that precision, and at most eight
    times as large.
    """
    make = Make("cpu", torch.float64)
    exact = [make.real(64, 300).to(dtype).double(), make.real(50, 300).to(dtype).double()]
    x, w = (t.to(dtype) for t in exact)
    off = (x @ w.t() - exact[0] @ exact[1].t()).abs().max().item()
    (simulated,) = worst_errors(lambda: exact[0] @ exact[1].t(), dtype)
    assert off / 2 <= simulated <= 8 * off
