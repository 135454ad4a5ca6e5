"""linear: against torch, in every precision, for every shape of batch, differentiated twice."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import configs, launch, linear_bwd_dw
from kernels.activations import ACTIVATIONS
from kernels.ops.linear import linear_bwd_dw_ref
from tests.checks import DTYPES, assert_as_accurate, assert_equal, compare, double

EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(activation, m, k, n, device="cpu", dtype=torch.float64, seed=0):
    """x, w, b with no pre-activation so near a kink that rounding could carry it across."""
    while True:
        torch.manual_seed(seed)
        x, w, b = (torch.randn(*shape).to(device, dtype) for shape in ((m, k), (n, k), (n,)))
        w = w * k**-0.5
        z = F.linear(*double((x, w, b)))
        if all(((z - kink).abs() > 1e-5).all() for kink in ACTIVATIONS[activation].kinks):
            return x, w, b
        seed += 1000


def by_torch(x, w, b, activation):
    return ACTIVATIONS[activation].torch(F.linear(x, w, b))


def pair(activation):
    """The same function by us and by torch."""
    return lambda *args: kernels.linear(*args, activation), lambda *args: by_torch(
        *args, activation
    )


@EACH_ACTIVATION
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_gradcheck(activation, bias):
    x, w, b = (t.requires_grad_() for t in draw(activation, 4, 3, 5))
    args = (x, w, b if bias else None, activation)
    assert gradcheck(kernels.linear, args)
    assert gradgradcheck(kernels.linear, args)


@EACH_ACTIVATION
@PRECISIONS
def test_against_torch(activation, dtype, device):
    """The whole function, through autograd, against torch.nn.functional's through autograd."""
    compare(*pair(activation), draw(activation, 17, 33, 7, device, dtype))


@EACH_ACTIVATION
def test_second_derivative_through_kernels(activation, device):
    """create_graph=True on the kernels' path, then the gradient of a gradient penalty, as
    torch's.
    """

    def penalty(function):
        def of(*tensors):
            y = function(*tensors)
            return sum(
                g.square().sum()
                for g in torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
            )

        return of

    compare(*map(penalty, pair(activation)), draw(activation, 17, 16, 17, device, torch.float32))


@pytest.mark.parametrize("shape", [(33,), (2, 5, 33), (2, 1, 4, 33), (2, 0, 33)], ids=str)
def test_leading_dimensions(shape, device):
    x, (_, w, b) = torch.randn(shape, device=device), draw("tanh", 1, 33, 16, device, torch.float32)
    compare(*pair("tanh"), (x, w, b))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)], ids=str)
def test_empty(sizes, device):
    """No rows, no features or no outputs: sums of nothing are 0, and nothing is left unwritten."""
    m, k, n = sizes
    compare(
        *pair("sigmoid"), [torch.randn(shape, device=device) for shape in ((m, k), (n, k), (n,))]
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@PRECISIONS
def test_split_batch(bias, dtype, device, monkeypatch):
    """A batch that is split over processors gives the sum, in a fixed order, also where the last
    split is short.
    """
    monkeypatch.setattr(launch, "sm_count", lambda device: 8)
    dz, x, launched = (
        torch.randn(1030, 7, device=device).to(dtype),
        torch.randn(1030, 33, device=device).to(dtype),
        [],
    )
    with launch.observe(lambda kernel, grid, args, options: launched.append(grid)):
        ours = linear_bwd_dw(dz, x, bias)
    assert launched[0][2] == 4, "the batch was not split"
    assert_as_accurate(
        ours, linear_bwd_dw_ref(dz, x, bias), lambda: linear_bwd_dw_ref(*double((dz, x)), bias)
    )
    assert_equal(linear_bwd_dw(dz, x, bias), ours, "second run")


@pytest.mark.parametrize("size", configs.BUCKETS)
def test_every_bucket(size, device, monkeypatch):
    """The tiles of every bucket give the same numbers; small tests would only ever see one of
    them.
    """
    monkeypatch.setattr(configs, "bucket", lambda m, n, sms: size)
    compare(*pair("tanh"), draw("tanh", 150, 17, 140, device, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding(dtype, device):
    """Of an exact float32 sum to the nearest, halfway to even; the interpreter's own conversion to
    bfloat16 truncates.
    """
    ulp = torch.finfo(dtype).eps
    sums = [
        (one, part * ulp)
        for one in (1, 1 + ulp, -1, -1 - ulp)
        for part in (0, 0.25, 0.5, 0.75, -0.125, -0.375)
    ]
    x = torch.tensor(sums, device=device).to(dtype)
    assert_equal(kernels.linear(x, x.new_ones(1, 2)), x.float().sum(1, keepdim=True).to(dtype))
