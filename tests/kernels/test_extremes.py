"""Numbers at the ends of their range, and sizes of 0 and 1, wherever no other test has them."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from triton.runtime.interpreter import InterpreterBuilder

import kernels
from kernels import launch, rounding
from kernels.activations import ACTIVATIONS
from tests import checks
from tests.checks import DTYPES, assert_as_accurate, assert_equal, compare, double

PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF = math.inf


def subnormals(dtype, device, product=True):
    """A few subnormal numbers, or none for some uses of bfloat16.

    The interpreter converts subnormal bfloat16 wrongly. In a product on a GPU, tensor cores may
    take it for 0, and only some vendors rule that out.
    """
    smallest = torch.finfo(dtype).smallest_normal
    left_out = dtype == torch.bfloat16 and (product or device == "cpu")
    return [] if left_out else [smallest / 4, -smallest / 8]


@PRECISIONS
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_near_zero(name, dtype, device):
    """Small results are accurate relative to themselves, down to subnormals. So each number is
    compared by itself.
    """
    row = ACTIVATIONS[name]
    smallest = torch.finfo(dtype).smallest_normal
    for z in (0.2, 0.03, 1e-3, -1e-3, 1e-4, 64 * smallest, *subnormals(dtype, device)):
        z = torch.tensor([[z]], dtype=dtype, device=device)
        y = kernels.linear(z, torch.ones_like(z), None, name)
        exact = functools.partial(row.torch, z.double())
        assert_as_accurate(y, row.torch(z), exact, f"{name}({z.item()})")


@pytest.mark.skipif(not launch.INTERPRETED, reason="simulates a GPU's division in the interpreter")
def test_a_gpus_division_is_within_the_rule(monkeypatch):
    """A GPU's div.full.f32 may be two ulps off, always to the same side, and still pass. With a
    CPU's tolerance such a division fails.
    """
    divide = InterpreterBuilder.create_fdiv

    def off(self, a, b):
        result = divide(self, a, b)
        result.data = np.nextafter(np.nextafter(result.data, np.float32(2)), np.float32(2))
        return result

    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", off)
    with pytest.raises(AssertionError):
        test_activations_near_zero("sigmoid", torch.float32, "cpu")
    cpus = rounding.floor
    monkeypatch.setattr(checks, "floor", lambda dtype, _: cpus(dtype, torch.device("cuda")))
    for name in ACTIVATIONS:
        test_activations_near_zero(name, torch.float32, "cpu")


@PRECISIONS
@pytest.mark.parametrize("value", [math.nan, INF, -INF, "largest", "subnormal"], ids=str)
def test_one_odd_row_of_linear(value, dtype, device):
    """An odd row gives torch's result and leaves the other rows unchanged."""
    value = (
        torch.finfo(dtype).max
        if value == "largest"
        else (subnormals(dtype, device) or [0])[0]
        if value == "subnormal"
        else value
    )
    torch.manual_seed(0)
    x, w = torch.rand(5, 17) + 0.5, torch.rand(3, 17) + 0.5
    x, w = x.to(device, dtype), w.to(device, dtype)
    usual = kernels.linear(x, w)
    x[2] = value
    y = kernels.linear(x, w)
    assert_equal(y[[0, 1, 3, 4]], usual[[0, 1, 3, 4]])
    exact = lambda: F.linear(*double((x, w)))[2]  # noqa: E731
    assert_as_accurate(y[2], F.linear(x, w)[2], exact, str(value))


@PRECISIONS
def test_subnormal_losses(dtype, device):
    small = torch.finfo(dtype).smallest_normal
    first, second = subnormals(dtype, device, product=False) or (small, -small)
    logits = torch.tensor([[small, first, 0.0], [second, 0.0, small]], dtype=dtype, device=device)
    target = torch.tensor([0, 2], device=device)
    compare(
        *(
            lambda z, f=f: f(z, target, reduction="none")
            for f in (kernels.cross_entropy, F.cross_entropy)
        ),
        [logits],
    )
    compare(
        *(lambda x, t, f=f: f(x, t, reduction="none") for f in (kernels.mse_loss, F.mse_loss)),
        [logits, logits.flip(1)],
    )


def like(target, z):
    """The target in z's dtype if it is numbers, because torch 2.11 takes no others."""
    return target.to(z.dtype) if target.is_floating_point() else target


def test_half_precision_sums_beyond_its_range(device):
    """Sums are float32 inside, so a mean is finite even where the sum overflows half precision. The
    sum itself overflows as torch's does.
    """
    x, target = (
        torch.full((300, 10), 30.0, dtype=torch.float16, device=device),
        torch.zeros(300, dtype=torch.int64, device=device),
    )
    x[:, 0] = -300
    for reduction in ("mean", "sum"):
        for ours, theirs, t in (
            (kernels.cross_entropy, F.cross_entropy, target),
            (kernels.mse_loss, F.mse_loss, -x),
        ):
            compare(
                *(
                    lambda z, f=f, t=t, r=reduction: f(z, like(t, z), reduction=r)
                    for f in (ours, theirs)
                ),
                [x],
                what=reduction,
            )


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(
    ("rows", "classes", "ignored"),
    [(2, 1, ()), (3, 4, (0, 1, 2)), (3, 4, (1,)), (1, 300, ())],
    ids=str,
)
def test_linear_cross_entropy_of_odd_sizes(rows, classes, ignored, backend, device):
    """One class has no loss and no gradient. With all rows ignored, the loss is NaN and there is no
    gradient. 300 classes take two operations.
    """
    torch.manual_seed(0)
    target = torch.arange(rows, device=device) % classes
    target[list(ignored)] = -100

    def theirs(x, w, b):
        return F.cross_entropy(F.linear(x, w, b), target)

    draws = [
        [torch.randn(shape, device=device) for shape in ((rows, 3), (classes, 3), (classes,))]
        for _ in range(2)
    ]
    with kernels.use(backend):
        compare(lambda x, w, b: kernels.linear_cross_entropy(x, w, b, target), theirs, *draws)


def test_no_images(device):
    tensors = [torch.randn(shape, device=device) for shape in ((0, 2, 4, 4), (3, 2, 3, 3), (3,))]
    ours = functools.partial(kernels.conv2d, activation="tanh", max_pool=2)
    compare(ours, lambda x, w, b: F.max_pool2d(F.conv2d(x, w, b).tanh(), 2), tensors)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("gradient", [0.0, 1e-30, 1e-42, 1e30, INF, -INF, math.nan], ids=str)
def test_updates_by_odd_gradients(gradient, backend, device):
    """Weights become what torch's optimizers give: unmoved, moved by lr, infinite or NaN."""
    for name, ours, theirs in (
        ("SGD", kernels.sgd, torch.optim.SGD),
        ("Adam", kernels.adam, torch.optim.Adam),
    ):
        p, g = (
            torch.linspace(-1, 1, 5, device=device),
            torch.tensor([gradient, 1.0, -1.0, gradient, 0.5], device=device),
        )
        parameter = torch.nn.Parameter(p.clone())
        parameter.grad = g.clone()
        theirs([parameter], lr=0.1).step()
        states = (
            ([p], [g], [p])
            if name == "SGD"
            else ([p], [g], [torch.zeros_like(p)], [torch.zeros_like(p)], 1)
        )
        with kernels.use(backend):
            ours(*states, 0.1)
        torch.testing.assert_close(
            p, parameter.detach(), equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )
