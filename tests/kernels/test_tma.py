"""Fused products of half-precision factors that the tensor memory accelerator (TMA) loads.

The interpreter reads descriptors too. It takes the tiles of an H100 here.
"""

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

import kernels
from kernels import configs, launch, linear_bwd_dw, linear_bwd_dx, linear_fwd
from tests.checks import LAYOUTS, assert_equal

HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def hopper(device, monkeypatch):
    """Plans as on an H100, so that the interpreter runs what it would run."""
    if not launch.INTERPRETED:
        if not configs.has_tma(launch.arch(torch.device(device))):
            pytest.skip("needs a GPU from Hopper on")
    else:
        monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
        monkeypatch.setattr(launch, "sm_count", lambda device: 132)
    launch.forget()
    yield
    launch.forget()


def draw(dtype, device, M, K, N):
    """x, w, b, dz and the output of the layer below, in whole numbers, whose sums are exact."""
    shapes = (M, K), (N, K), (N,), (M, N), (M, K)
    return [torch.randint(-3, 4, shape, device=device).to(dtype) for shape in shapes]


def products(x, w, b, dz, below, **choice):
    """(results of the three products, which of them read descriptors)."""
    seen = {}

    def note(kernel, grid, args, options):
        if "BLOCK_K" in options:
            described = [isinstance(a, TensorDescriptor) for a in args]
            assert sum(described) in (0, 2)
            name = kernel.fn.__name__.removeprefix("linear_").removesuffix("_kernel")
            seen[name] = any(described)

    with launch.observe(note), kernels.use(products="fused", **choice):
        y, saved = linear_fwd(x, w, b, "gelu")
        found = [y, saved.s, linear_bwd_dx(dz, w, below, "tanh"), *linear_bwd_dw(dz, x)]
    return found, seen


def both(*tensors):
    """Checks that TMA does not change a bit. Returns which products read descriptors."""
    expected, seen = products(*tensors, tma=False)
    assert seen == {"fwd": False, "bwd_dx": False, "bwd_dw": False}
    found, seen = products(*tensors, tma=True)
    assert_equal(found, expected)
    return {name for name, described in seen.items() if described}


@HALF
@pytest.mark.parametrize(
    ("sizes", "described"),
    [
        ((64, 64, 64), {"fwd", "bwd_dx", "bwd_dw"}),  # whole tiles
        ((40, 72, 88), {"fwd", "bwd_dx", "bwd_dw"}),  # the last tiles reach outside, every way
        ((1, 8, 8), {"fwd", "bwd_dx", "bwd_dw"}),
        ((40, 72, 33), {"fwd"}),  # rows of dz are no multiple of 16 bytes
        ((40, 33, 72), set()),  # nor are those of x and w
    ],
    # A set prints in another order in each process, and pytest's workers compare names.
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_the_same_bits(sizes, described, dtype, device, hopper):
    assert both(*draw(dtype, device, *sizes)) == described


@pytest.mark.parametrize(("M", "described"), [(640, True), (520, False)])
def test_a_split_batch(M, described, device, hopper):
    """A descriptor ends with the batch, so the first split must consist of whole tiles."""
    _, _, _, dz, x = draw(torch.float16, device, M, 16, 8)
    seen = []
    with launch.observe(lambda kernel, grid, args, options: seen.append((grid, args))):
        with kernels.use(products="fused", tma=False):
            expected = linear_bwd_dw(dz, x)
        with kernels.use(products="fused", tma=True):
            assert_equal(linear_bwd_dw(dz, x), expected)
    assert [grid[1:] for grid, _ in seen] == [(2,), (), (2,), ()]
    assert isinstance(seen[2][1][2], TensorDescriptor) is described


def test_rows_with_gaps(device, hopper):
    """Rows may lie apart. What lies between, here NaN, is not read."""
    x, w, b, dz, below = draw(torch.float16, device, 40, 72, 88)
    x, w, dz = (torch.cat((t, t.new_full((t.shape[0], 8), torch.nan)), 1) for t in (x, w, dz))
    tensors = x[:, :72], w[:, :72], b, dz[:, :88], below
    assert both(*tensors) == {"fwd", "bwd_dx", "bwd_dw"}
    assert not products(*tensors, tma=True)[0][0].isnan().any()


def shifted(t):
    """t at an address that 16 does not divide."""
    return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)


def negated(t):
    """t with a minus sign that torch has not applied."""
    return torch._neg_view(t)


def spread(t):
    """t with its columns two elements apart, in rows that begin at multiples of 16 bytes."""
    return torch.stack((t, t), 2).flatten(1)[:, ::2]


@pytest.mark.parametrize(
    "arrange",
    [*(LAYOUTS[name] for name in LAYOUTS if name != "contiguous"), shifted, negated, spread],
)
def test_other_memory_is_read_by_pointers(arrange, device, hopper):
    x, w, b, dz, below = draw(torch.float16, device, 40, 72, 88)
    for tensors, described in (
        ((arrange(x), w, b, dz, below), {"bwd_dx"}),
        ((x, arrange(w), b, dz, below), {"bwd_dw"}),
        ((x, w, b, arrange(dz), below), {"fwd"}),
    ):
        assert both(*tensors) == described


def test_float32_is_read_by_pointers(device, hopper):
    assert both(*draw(torch.float32, device, 40, 72, 88)) == set()


@pytest.mark.parametrize(
    ("arch", "sizes", "described"),
    [
        ("sm_90", (8192, 1024, 2048), True),
        ("sm_100", (8192, 1024, 2048), True),
        ("sm_120", (8192, 1024, 2048), True),
        ("sm_89", (8192, 1024, 2048), False),
        ("gfx942", (8192, 1024, 2048), False),
        ("sm_90", (256, 784, 128), False),  # a launch must be cheap
    ],
)
def test_where_it_is_chosen(arch, sizes, described):
    """Without `use`, only large products on GPUs that have the accelerator read descriptors."""
    with launch.dry_run(arch, 132):
        _, seen = products(*draw(torch.bfloat16, "meta", *sizes))
    assert seen == dict.fromkeys(("fwd", "bwd_dx", "bwd_dw"), described)


def test_use_is_undone_and_nests():
    with kernels.use(tma=True):
        with kernels.use("torch"):
            assert launch.tma() is True
        with kernels.use(tma=False):
            assert launch.tma() is False
        assert launch.tma() is True
    assert launch.tma() is None
    with pytest.raises(ValueError, match="tma must be True or False, got 'yes'"):
        kernels.use(tma="yes")
