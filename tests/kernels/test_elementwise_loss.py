"""Losses over elements against torch's functions, with first and second derivatives in input and
target. Every row of the loss table with a scalar is tested.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import elementwise_loss, elementwise_loss_bwd, elementwise_loss_fwd
from kernels.losses import LOSSES
from tests.checks import DTYPES, LAYOUTS, assert_as_accurate, compare, gradient_penalty
from tests.pairs import PAIRS

ROWS = [name for name, row in LOSSES.items() if row.scalar is not None]
EACH_LOSS = pytest.mark.parametrize("loss", ROWS)
EACH_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
PARAMETERS = dict.fromkeys(ROWS) | {"huber": 0.75, "pinball": 0.2}


def pair(loss, reduction, parameter=None, weight=None):
    """(our loss, torch's loss) of input and target."""
    parameter = PARAMETERS[loss] if parameter is None else parameter
    return tuple(
        lambda x, t, f=f: f(x, t, loss, in_dtype(parameter, x), in_dtype(weight, x), reduction)
        for f in PAIRS["elementwise_loss"][:2]
    )


def in_dtype(value, x):
    return value.to(x) if isinstance(value, torch.Tensor) else value


def draws(shape, device, dtype, count=4):
    """`count` pairs of input and target. Targets lie between 0 and 1 for binary cross-entropy."""
    torch.manual_seed(0)
    return [[f(shape).to(device, dtype) for f in (torch.randn, torch.rand)] for _ in range(count)]


def test_every_row_has_a_public_function():
    assert all(hasattr(kernels, row.function) for row in LOSSES.values())


@EACH_LOSS
@EACH_REDUCTION
def test_gradcheck(loss, reduction):
    x, t = (v.requires_grad_() for v in draws((3, 4), "cpu", torch.float64, 1)[0])
    weight = torch.rand(3, 1, dtype=torch.float64)
    for function in (pair(loss, reduction)[0], pair(loss, reduction, weight=weight)[0]):
        assert gradcheck(function, (x, t))
        assert gradgradcheck(function, (x, t))


@EACH_LOSS
@EACH_REDUCTION
@PRECISIONS
@pytest.mark.parametrize("shape", [(), (7, 33), (2, 3, 4, 5), (3, 0), (1100,)], ids=str)
def test_against_torch(loss, shape, dtype, reduction, device):
    """Shapes from a single number to more elements than one block holds."""
    compare(*pair(loss, reduction), *draws(shape, device, dtype), what=f"{shape}")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("shape", [(4,), (3, 1), (3, 4), (1,), ()], ids=str)
@pytest.mark.parametrize("loss", [name for name in ROWS if LOSSES[name].vector])
def test_tensors_that_broadcast(loss, shape, backend, device):
    """Weights and parameters may be given for each column, row or element, or once for all."""
    parameter, weight = torch.rand(shape) * 0.8 + 0.1, torch.rand(shape) + 0.5
    with kernels.use(backend):
        for reduction in ("mean", "none"):
            functions = pair(loss, reduction, parameter, weight)
            compare(*functions, *draws((3, 4), device, torch.float32))


def test_as_called_like_torchs(device):
    """Arguments have the names and places of torch.nn.functional."""
    (x, t) = draws((5, 3), device, torch.float64, 1)[0]
    w, p = torch.rand(5, 3).to(x), torch.rand(3).to(x)
    for ours, theirs in (
        (kernels.mse_loss(x, t, "sum"), F.mse_loss(x, t, reduction="sum")),
        (
            kernels.binary_cross_entropy_with_logits(x, t, w, "sum", p),
            F.binary_cross_entropy_with_logits(x, t, w, reduction="sum", pos_weight=p),
        ),
        (kernels.huber_loss(x, t, "sum", 0.3), F.huber_loss(x, t, "sum", 0.3)),
        (
            kernels.huber_loss(x, t, "mean", 0.3, w),
            F.huber_loss(x, t, "mean", 0.3, w),
        ),
        (
            kernels.pinball_loss(x, t, p, "sum"),
            (torch.maximum(p * (t - x), (p - 1) * (t - x))).sum(),
        ),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)


def test_where_the_slope_jumps(device):
    """Pinball's slope at t = y is the mean of both sides, as torch.maximum gives it. Huber's sides
    agree at |d| = delta.
    """
    x = torch.zeros(3, device=device)
    compare(*pair("pinball", "none"), [x, x])
    compare(*pair("huber", "none"), [x, torch.tensor([0.75, -0.75, 0.0], device=device)])


@EACH_LOSS
def test_many_parts(loss, device, monkeypatch):
    """The program that adds partial sums gets more than it adds at a time. Its last lanes are
    empty.
    """
    monkeypatch.setattr(kernels.ops.elementwise_loss, "_BLOCK", 16)
    compare(*pair(loss, "mean"), *draws((300,), device, torch.float32))


@EACH_LOSS
@EACH_REDUCTION
def test_reference_against_torch(loss, reduction):
    with kernels.use("torch"):
        compare(*pair(loss, reduction), *draws((7, 33), "cpu", torch.float32))


@EACH_LOSS
@PRECISIONS
@EACH_REDUCTION
@pytest.mark.parametrize(
    "layouts", [("transposed", "sliced"), ("expanded", "transposed")], ids="-".join
)
def test_layouts(loss, layouts, reduction, dtype, device):
    """Input, target and incoming gradient may have any strides."""
    (x, t), (dy, _) = draws((7, 33), device, dtype, 2)
    x, t = LAYOUTS[layouts[0]](x), LAYOUTS[layouts[1]](t)
    dy = LAYOUTS[layouts[0]](dy.abs()) if reduction == "none" else dy[0, 0].abs()
    ours, theirs = pair(loss, reduction)
    results = []
    for cast, function in (
        (torch.Tensor.detach, ours),
        (torch.Tensor.detach, theirs),
        (torch.Tensor.double, theirs),
    ):
        tensors = [cast(v).requires_grad_() for v in (x, t)]
        value = function(*tensors)
        results.append([value, *torch.autograd.grad(value, tensors, cast(dy))])
    assert_as_accurate(*results, reduction)


@pytest.mark.parametrize("loss", ["mse", "bce", "huber"])  # pinball has no second derivative
@EACH_REDUCTION
def test_second_derivative_through_kernels(loss, reduction, device):
    compare(*map(gradient_penalty, pair(loss, reduction)), *draws((7, 16), device, torch.float32))


@EACH_LOSS
@pytest.mark.parametrize("value", [1e4, -1e4, math.inf, -math.inf], ids=str)
@PRECISIONS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_extremes(loss, value, dtype, backend, device):
    """Very large and infinite outputs give torch's loss, for targets of 0 and 1."""
    x = torch.tensor([value, value, 1.0], dtype=dtype, device=device)
    with kernels.use(backend):
        compare(*pair(loss, "none"), [x, torch.tensor([0, 1, 0]).to(x)], what=str(value))


@EACH_LOSS
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_nan_shows(loss, backend, device):
    """NaN appears in its element's loss and input gradient, and in no other element."""
    odd = torch.tensor([math.nan, 1.0], device=device)
    for x, t in ((odd, torch.zeros_like(odd)), (torch.zeros_like(odd), odd)):
        x, t = x.clone().requires_grad_(), t.clone().requires_grad_()
        with kernels.use(backend):
            y = elementwise_loss(x, t, loss, reduction="none")
            dx, dt = torch.autograd.grad(y.sum(), (x, t))
        for result in (y, dx):
            assert result.isnan().tolist() == [True, False]
        assert dt.isfinite()[1]


@EACH_LOSS
@pytest.mark.parametrize(
    "needs", [(True, True), (True, False), (False, True), (False, False)], ids=str
)
def test_needs(loss, needs, device):
    value, saved = elementwise_loss_fwd(*draws((7, 5), device, torch.float32)[0], loss)
    whole, parts = (
        elementwise_loss_bwd(torch.ones_like(value), *saved, needs=n) for n in ((True, True), needs)
    )
    for gradient, part, needed in zip(whole, parts, needs):
        assert torch.equal(part, gradient) if needed else part is None


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: elementwise_loss(x, x, "mae"), ValueError, "unknown loss 'mae'; known: cross_"),
        (
            lambda x: elementwise_loss(x, x, "cross_entropy"),
            ValueError,
            "no sum over elements; call kernels.cross_entropy",
        ),
        (lambda x: kernels.huber_loss(x, x, delta=0.0), RuntimeError, "delta must be positive"),
        (lambda x: kernels.pinball_loss(x, x, 1.0), ValueError, "between 0 and 1, both excluded"),
        (lambda x: elementwise_loss(x, x, "mse", 2.0), ValueError, "has no parameter, got 2.0"),
        (
            lambda x: kernels.binary_cross_entropy_with_logits(x, x[:, 0]),
            ValueError,
            r"target must be \(3, 4\) as input is, got \(3,\)",
        ),
        (
            lambda x: kernels.binary_cross_entropy_with_logits(x, x, pos_weight=x[0, :3]),
            ValueError,
            r"pos_weight must broadcast to input \(3, 4\), got \(3,\)",
        ),
        (
            lambda x: kernels.huber_loss(x, x, weight=x.clone().requires_grad_()),
            ValueError,
            r"weight gets no gradient, .*; pass weight\.detach\(\)",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.randn(3, 4))
