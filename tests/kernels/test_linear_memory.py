"""linear's launchers take any strides, fill given buffers, and compute only the gradients asked
for.
"""

import itertools

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import (
    launch,
    linear_bwd,
    linear_bwd_dw,
    linear_bwd_dx,
    linear_bwd_dz,
    linear_fwd,
    linear_fwd_ref,
)
from kernels.activations import ACTIVATIONS
from kernels.operations import flatten
from kernels.ops.linear import linear_bwd_dw_ref, linear_bwd_dx_ref, linear_bwd_dz_ref
from tests.checks import LAYOUTS, assert_as_accurate, assert_equal, compare, double, stacked


def draw(m, k, n, device):
    return [torch.randn(*shape, device=device) for shape in ((m, k), (n, k), (n,))]


@pytest.mark.parametrize("layouts", list(itertools.product(LAYOUTS, repeat=2)), ids="-".join)
def test_layouts(layouts, device):
    """Input, weight, bias, incoming gradient and saved tensors may have any strides. The gaps hold
    NaN.
    """
    first, second = (LAYOUTS[name] for name in layouts)
    draws = []
    for _ in range(2):
        x, w, b = draw(17, 33, 7, device)
        x, w, b = first(x), second(w), second(b)
        s = second(linear_fwd(x, w, b, "gelu")[1][2])
        dz = second(torch.rand(17, 7, device=device) + 0.5)
        below = first(torch.rand(17, 33, device=device))
        draws.append(((x, w, b, "gelu"), (first(dz), s, "gelu"), (dz, w, below, "tanh"), (dz, x)))
    for each, kernel, reference in zip(
        zip(*draws),
        (linear_fwd, linear_bwd_dz, linear_bwd_dx, linear_bwd_dw),
        (linear_fwd_ref, linear_bwd_dz_ref, linear_bwd_dx_ref, linear_bwd_dw_ref),
    ):
        ours, torchs = (
            [flatten(function(*args)) for args in each] for function in (kernel, reference)
        )

        def exact(each=each, reference=reference):
            return stacked([flatten(reference(*double(args))) for args in each])

        assert_as_accurate(stacked(ours), stacked(torchs), exact, kernel.__name__)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_needs(needs, device):
    """An unwanted gradient is None. The others keep their bits."""
    y, saved = linear_fwd(*draw(7, 5, 3, device), "relu")
    whole = linear_bwd(torch.ones_like(y), *saved)
    parts = linear_bwd(torch.ones_like(y), *saved, needs=needs)
    for gradient, part, needed in zip(whole, parts, needs):
        assert part is None if not needed else torch.equal(part, gradient)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_out(activation, device):
    """Given buffers are filled and returned. They hold the same bits as fresh ones."""
    x, w, b = draw(17, 5, 7, device)
    fresh_y, (_, _, s, _, _) = linear_fwd(x, w, b, activation)
    y, z = torch.empty_like(fresh_y), torch.empty_like(fresh_y)
    result, (_, _, kept, _, _) = linear_fwd(x, w, b, activation, out=(y, z))
    assert result.data_ptr() == y.data_ptr()
    assert_equal((y, kept), (fresh_y, s), "forward")
    dw, db = torch.empty_like(w), torch.empty_like(b)
    assert linear_bwd_dw(y, x, out=(dw, db))[0] is dw
    assert_equal((dw, db), linear_bwd_dw(y, x), "dw")
    dx = torch.empty_like(x)
    assert linear_bwd_dx(y, w, x, activation, out=dx) is dx
    assert_equal(dx, linear_bwd_dx(y, w, x, activation), "dx")
    dz = torch.empty_like(y)
    result = linear_bwd_dz(y, s, activation, out=dz)
    # the identity writes nothing: its dz is dy
    assert result.data_ptr() == (y if s is None else dz).data_ptr()
    assert_equal(result, linear_bwd_dz(y, s, activation), "dz")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("lead", [(3,), (2, 3)], ids=str)
def test_output_may_be_overwritten(lead, backend, device):
    """The output is no view, so the next operation may overwrite it, as after torch's linear."""
    inputs = [torch.randn(*shape, device=device) for shape in ((*lead, 4), (5, 4), (5,))]
    with launch.use(backend):
        compare(lambda *i: F.relu_(kernels.linear(*i)), lambda *i: F.relu_(F.linear(*i)), inputs)
