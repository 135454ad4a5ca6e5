"""mse_loss against torch.nn.functional, gradients of input and target, twice."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import mse, mse_bwd, mse_fwd
from tests.checks import DTYPES, LAYOUTS, assert_as_accurate, compare

EACH_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pair(reduction):
    """The same loss of (input, target) by us and by torch."""
    return tuple(
        lambda x, t, f=f: f(x, t, reduction=reduction) for f in (kernels.mse_loss, F.mse_loss)
    )


def draws(shape, device, dtype, count=4):
    torch.manual_seed(0)
    return [[torch.randn(shape).to(device, dtype) for _ in range(2)] for _ in range(count)]


@EACH_REDUCTION
def test_gradcheck(reduction):
    tensors = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(pair(reduction)[0], tensors)
    assert gradgradcheck(pair(reduction)[0], tensors)


@EACH_REDUCTION
@PRECISIONS
@pytest.mark.parametrize("shape", [(), (1,), (7, 33), (2, 3, 4, 5), (0,), (3, 0), (2500,)], ids=str)
def test_against_torch(shape, dtype, reduction, device):
    """From a single number to three blocks."""
    compare(*pair(reduction), *draws(shape, device, dtype), what=f"{shape}")


def test_many_parts(device, monkeypatch):
    """More partial sums than the program that adds them takes at a time, and with its last lanes
    empty.
    """
    monkeypatch.setattr(mse, "_BLOCK", 16)
    compare(*pair("mean"), *draws((1000,), device, torch.float32))


@EACH_REDUCTION
def test_reference_against_torch(reduction):
    with kernels.use("torch"):
        compare(*pair(reduction), *draws((7, 33), "cpu", torch.float32))


@PRECISIONS
@EACH_REDUCTION
@pytest.mark.parametrize(
    "layouts",
    [("transposed", "sliced"), ("sliced", "expanded"), ("expanded", "transposed")],
    ids="-".join,
)
def test_layouts(layouts, reduction, dtype, device):
    """Input, target and incoming gradient of any strides."""
    (x, t), (dy, _) = draws((7, 33), device, dtype, 2)
    x, t = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](t)
    dy = LAYOUTS[layouts[0]](dy.abs()) if reduction == "none" else dy[0, 0].abs()

    def results(function, cast=torch.Tensor.detach):
        tensors = [cast(v).requires_grad_() for v in (x, t)]
        loss = function(*tensors, reduction=reduction)
        return [loss, *torch.autograd.grad(loss, tensors, cast(dy))]

    assert_as_accurate(
        results(kernels.mse_loss),
        results(F.mse_loss),
        lambda: results(F.mse_loss, torch.Tensor.double),
        reduction,
    )


@EACH_REDUCTION
def test_second_derivative_through_kernels(reduction, device):
    def penalty(function):
        def of(*tensors):
            y = function(*tensors)
            return sum(
                g.square().sum()
                for g in torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
            )

        return of

    compare(*map(penalty, pair(reduction)), *draws((7, 16), device, torch.float32))


@pytest.mark.parametrize("value", [1e4, -1e4, float("inf"), float("nan")], ids=str)
@PRECISIONS
def test_extremes(value, dtype, device):
    x = torch.tensor([value, 1.0], dtype=dtype, device=device)
    compare(*pair("none"), [x, torch.zeros_like(x)], [x, x], what=str(value))


@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True), (False, False)], ids=str
)
def test_needs(needs, device):
    loss, saved = mse_fwd(*draws((7, 5), device, torch.float32)[0])
    whole, parts = (mse_bwd(torch.ones_like(loss), *saved, needs=n) for n in ((True, True), needs))
    for gradient, part, needed in zip(whole, parts, needs):
        assert torch.equal(part, gradient) if needed else part is None
