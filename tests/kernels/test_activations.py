"""Every row of the activation table gives torch's values and derivatives, also at kinks, infinities
and NaN.
"""

import functools
import math

import pytest
import torch

import kernels
from kernels import activations
from kernels.activations import ACTIVATIONS
from kernels.ops.linear import linear_bwd_dx, linear_bwd_dz, linear_fwd
from tests.checks import DTYPES, assert_as_accurate, assert_equal

CASES = pytest.mark.parametrize("name", ACTIVATIONS)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INFINITY = float("inf")


def apply(name, z):
    """(act(z), what its backward needs), by the forward kernel. z is a matrix."""
    y, (_, _, s, _, _) = linear_fwd(z, identity(z), None, name)
    return y, s


def identity(z):
    """The weight that keeps a matrix z exact in a product."""
    return torch.eye(z.shape[1]).to(z)


def derivative(name, z):
    """act'(z) by torch's autograd."""
    z = z.clone().requires_grad_()
    with torch.enable_grad():
        return torch.autograd.grad(ACTIVATIONS[name].torch(z).sum(), z)[0]


def grid(device, dtype):
    """Points from -12 to 12, as many near zero, and ±1e4. test_kink tests zero itself.

    In 43 rows of 12, they are three tiles. In one column they would be 33.
    """
    z = torch.cat(
        [
            torch.linspace(-12, 12, 257),
            torch.linspace(-0.3, 0.3, 257),
            torch.tensor([1e-4, -1e-4, 1e4, -1e4]),
        ]
    )
    return z[z != 0].view(43, 12).to(device, dtype)


@CASES
@PRECISIONS
def test_forward(name, dtype, device):
    z = grid(device, dtype)
    act = ACTIVATIONS[name].torch
    assert_as_accurate(apply(name, z)[0], act(z), lambda: act(z.double()), name)


@CASES
@PRECISIONS
def test_backward(name, dtype, device):
    """dz = dy · act' comes from a kernel of its own, and from the epilogue of the next layer's dx.
    Both start from the s that forward keeps.
    """
    z = grid(device, dtype)
    _, s = apply(name, z)
    dy = torch.linspace(0.5, 2, z.numel()).view_as(z).to(z)
    exact = lambda: dy.double() * derivative(name, z.double())  # noqa: E731
    # Where s is the output, torch's backward also starts from the rounded output.
    torchs = dy * derivative(name, z)
    s = torch.zeros_like(z) if s is None else s
    assert_as_accurate(linear_bwd_dz(dy, s, name), torchs, exact, f"{name}, dz")
    assert_as_accurate(linear_bwd_dx(dy, identity(z), s, name), torchs, exact, f"{name}, dx")


@CASES
@PRECISIONS
def test_reference(name, dtype):
    """The row's torch functions, with and without `out`, compute torch's own activation."""
    row, z = ACTIVATIONS[name], grid("cpu", dtype)
    y = row.forward_ref(z)
    s = {"nothing": z, "y": y, "z": z}[row.needs]
    dy = torch.linspace(0.5, 2, z.numel()).view_as(z).to(z)
    assert_as_accurate(y, row.torch(z), lambda: row.torch(z.double()), name)
    dz = row.backward_ref(dy, s)
    assert_as_accurate(
        dz,
        dy * derivative(name, z),
        lambda: dy.double() * derivative(name, z.double()),
        f"{name}'",
    )
    for result, call in (
        (y, lambda out: row.forward_ref(z, out=out)),
        (dz, lambda out: row.backward_ref(dy, s, out=out)),
    ):
        out = torch.empty_like(z)
        assert call(out) is out
        assert_equal(out, result, f"{name}: out=")


@CASES
def test_kinks_are_listed(name):
    """The table lists every point where the first or second derivative jumps. Other tests avoid
    these points.
    """
    z = torch.linspace(-4, 4, 801, dtype=torch.float64)  # every hundredth
    curvature = derivative(name, z).diff() / 0.01
    jumps = (curvature.diff().abs() > 0.1).nonzero()[:, 0]
    assert {round(float(z[i]), 1) + 0.0 for i in jumps} == set(ACTIVATIONS[name].kinks)


@pytest.mark.parametrize(
    ("name", "kink"), [(name, kink) for name, row in ACTIVATIONS.items() for kink in row.kinks]
)
@PRECISIONS
def test_kink(name, kink, dtype, device):
    """Exactly at a kink, for both signs of zero, the derivative is torch's. So relu'(0) = 0."""
    z = torch.tensor([[kink], [-kink]], dtype=dtype, device=device)
    y, s = apply(name, z)
    assert_equal(y, ACTIVATIONS[name].torch(z), name)
    expected = derivative(name, z)
    one = torch.ones_like(z)
    assert_equal(linear_bwd_dz(one, s, name), expected, name)
    assert_equal(linear_bwd_dx(one, identity(z), s, name), expected, name)
    row = ACTIVATIONS[name]
    assert_equal(
        row.backward_ref(one, row.forward_ref(z) if row.needs == "y" else z),
        expected,
        f"{name}, reference",
    )


@PRECISIONS
def test_small_derivatives_of_elu(dtype, device):
    """elu' = eᶻ keeps its digits far below 0, as torch's. 1 + elu has none there in half
    precision.
    """
    z = torch.linspace(-9, -1, 65).to(device, dtype)[:, None]
    _, s = apply("elu", z)
    dz = linear_bwd_dz(torch.ones_like(z), s, "elu")
    reference = ACTIVATIONS["elu"].backward_ref(torch.ones_like(z), z)
    for found in (dz, reference):
        error = found.double() / z.double().exp() - 1
        assert error.abs().max() < 4 * torch.finfo(dtype).eps


@CASES
@PRECISIONS
@pytest.mark.parametrize("value", [math.nan, INFINITY, -INFINITY, 1e4, -1e4], ids=str)
def test_extremes(name, value, dtype, device):
    """At the ends of the range we give what torch gives. Where torch computes 0 · inf although the
    limit exists, the limit also passes.
    """
    z = torch.tensor([[value]], dtype=dtype, device=device)
    row = ACTIVATIONS[name]
    y, s = apply(name, z)
    assert_as_accurate(y, row.torch(z), lambda: row.torch(z.double()), f"{name}({value})")
    dz = linear_bwd_dz(torch.ones_like(z), z if s is None else s, name)
    exact = functools.partial(derivative, name, z.double())
    assert_as_accurate(dz, derivative(name, z), exact, f"{name}'({value})")


def curvature_of(function, z):
    """The second derivative of a function, point by point, by autograd."""
    z = z.clone().requires_grad_()
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(function(z).sum(), z, create_graph=True)
        # relu's slope does not depend on z, so there is nothing to differentiate
        if not slope.requires_grad:
            return torch.zeros_like(z)
        (found,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
    return torch.zeros_like(z) if found is None else found


@CASES
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("value", [0.0, 12.0, -12.0, 90.0, -90.0, 800.0, -800.0, 1e4, -1e4])
def test_second_derivative_at_extremes(name, value, dtype, device):
    """Far from zero, and at zero, the second derivative is torch's. No overflow of a branch that is
    not taken makes it NaN. Far from zero most of them vanish, so they are compared beside 1.
    """
    row = ACTIVATIONS[name]
    z = torch.tensor([value], dtype=dtype, device=device)

    def ours(z):
        return kernels.linear(z[:, None], torch.ones_like(z)[:, None], None, name)[:, 0]

    expected = 1 + curvature_of(row.torch, z)
    found = 1 + curvature_of(ours, z)
    exact = 1 + curvature_of(row.torch, z.double())
    assert_as_accurate(found, expected, lambda: exact, f"{name}''({value})")


def test_unknown_name_lists_the_table(device):
    x = torch.ones(2, 2, device=device)
    for call in (lambda: activations.get("swish"), lambda: linear_fwd(x, x, None, "swish")):
        with pytest.raises(
            ValueError, match=f"unknown activation 'swish'; known: {', '.join(ACTIVATIONS)}"
        ):
            call()
