"""linear against torch, in every precision, for every shape of batch, differentiated twice."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import configs, launch, linear_bwd_dw
from kernels.activations import ACTIVATIONS
from kernels.language import tl, triton
from kernels.operations import Make
from kernels.ops import linear as linear_ops
from kernels.ops.linear import linear_bwd_dw_ref
from kernels.tiles import tile_of_program
from tests.checks import DTYPES, assert_as_accurate, assert_equal, compare, double, gradient_penalty

EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def draw(activation, m, k, n, device="cpu", dtype=torch.float64, seed=0):
    """x, w, b such that rounding cannot move a pre-activation across a kink."""
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
    """(our function, torch's function) of x, w, b."""
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
    """Values and gradients by autograd agree with those of torch.nn.functional."""
    compare(*pair(activation), draw(activation, 17, 33, 7, device, dtype))


@EACH_ACTIVATION
def test_second_derivative_through_kernels(activation, device):
    """With create_graph=True the kernels give torch's gradient of a gradient penalty."""
    compare(
        *map(gradient_penalty, pair(activation)),
        draw(activation, 17, 16, 17, device, torch.float32),
    )


@pytest.mark.parametrize("shape", [(33,), (2, 5, 33), (2, 1, 4, 33), (2, 0, 33)], ids=str)
def test_leading_dimensions(shape, device):
    x, (_, w, b) = torch.randn(shape, device=device), draw("tanh", 1, 33, 16, device, torch.float32)
    compare(*pair("tanh"), (x, w, b))


@pytest.mark.parametrize("sizes", [(0, 3, 4), (5, 0, 4), (5, 3, 0), (0, 0, 0)], ids=str)
def test_empty(sizes, device):
    """Without rows, features or outputs, empty sums are 0 and every element is written."""
    m, k, n = sizes
    compare(
        *pair("sigmoid"), [torch.randn(shape, device=device) for shape in ((m, k), (n, k), (n,))]
    )


@pytest.mark.interpreter
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@PRECISIONS
def test_split_batch(bias, dtype, device, monkeypatch):
    """The batch is split over processors, and the last split is short. The parts are added in a
    fixed order, so a second run gives the same bits.
    """
    monkeypatch.setattr(launch, "sm_count", lambda device: 8)
    dz, x, launched = (
        torch.randn(1030, 7, device=device).to(dtype),
        torch.randn(1030, 33, device=device).to(dtype),
        [],
    )
    with launch.observe(lambda kernel, grid, args, options: launched.append(grid)):
        ours = linear_bwd_dw(dz, x, bias)
    assert launched[0][1] == 4, "the batch was not split"
    assert_as_accurate(
        ours, linear_bwd_dw_ref(dz, x, bias), lambda: linear_bwd_dw_ref(*double((dz, x)), bias)
    )
    assert_equal(linear_bwd_dw(dz, x, bias), ours, "second run")


@pytest.mark.parametrize("size", configs.BUCKETS)
def test_every_bucket(size, device, monkeypatch):
    """The tiles of every bucket give the same numbers. Without this, small tests would use one
    bucket only.
    """
    monkeypatch.setattr(configs, "bucket", lambda m, n, sms: size)
    compare(*pair("tanh"), draw("tanh", 150, 17, 140, device, torch.float16))


@triton.jit
def place_kernel(places_ptr, rows):
    """Each program writes the place of its tile, in the order in which a device starts programs."""
    row, column = tile_of_program(rows)
    number = tl.program_id(0)
    tl.store(places_ptr + 2 * number, row)
    tl.store(places_ptr + 2 * number + 1, column)


@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (8, 5), (9, 1), (19, 5), (16, 2)], ids=str)
def test_programs_walk_bands_of_tiles(grid, device):
    """Every tile is taken once. Bands of eight rows come one after the other, and within a band the
    columns.
    """
    rows, columns = grid
    places = torch.empty(rows * columns, 2, dtype=torch.int32, device=device)
    launch.run(place_kernel, (rows * columns,), places, rows)
    bands = [range(first, min(first + 8, rows)) for first in range(0, rows, 8)]
    expected = [[r, c] for band in bands for c in range(columns) for r in band]
    assert places.tolist() == expected


def test_masks_are_left_out_only_for_whole_tiles():
    """A kernel leaves out masks only where its sum fills whole tiles. In a split batch every split
    must be whole, the last one too.
    """
    make = Make("meta", torch.float32)
    seen = {}

    def note(kernel, grid, args, options):
        seen.setdefault(kernel.fn.__name__, []).append(options["WHOLE"])

    with launch.dry_run("sm_90", 132), launch.observe(note), kernels.use(products="fused"):
        for m, k, n in ((512, 784, 64), (7, 33, 15), (520, 16, 100)):
            x, w, dz = make.real(m, k), make.real(n, k), make.real(m, n)
            kernels.linear_fwd(x, w)
            kernels.linear_bwd_dx(dz, w)
            plan = linear_ops.dw_plan("linear_bwd_dw", dz, x)
            seen.setdefault("splits", []).append((plan.splits, plan.options["WHOLE"]))
    assert seen == {
        "linear_fwd_kernel": [True, False, True],
        "linear_bwd_dx_kernel": [True, False, False],
        "splits": [(2, True), (1, False), (2, False)],
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding(dtype, device):
    """An exact float32 sum is rounded to the nearest, and halfway to even. The interpreter's own
    conversion to bfloat16 truncates, so we replace it.
    """
    ulp = torch.finfo(dtype).eps
    sums = [
        (one, part * ulp)
        for one in (1, 1 + ulp, -1, -1 - ulp)
        for part in (0, 0.25, 0.5, 0.75, -0.125, -0.375)
    ]
    x = torch.tensor(sums, device=device).to(dtype)
    assert_equal(kernels.linear(x, x.new_ones(1, 2)), x.float().sum(1, keepdim=True).to(dtype))
