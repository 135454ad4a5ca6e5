"""linear's launchers take any strides, fill given buffers, and compute only the gradients asked
for.
"""

import itertools
import mmap

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
    tiles,
)
from kernels.activations import ACTIVATIONS
from kernels.language import tl
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


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("shape", "strides", "wide"),
    [
        ((2**16, 2**15), (2**15, 1), False),  # the last offset is 2³¹ - 1
        ((2**16 + 1, 2**15), (2**15, 1), True),
        ((2, 1), (2**31 - 1, 1), False),
        ((2, 1), (2**31, 1), True),  # two elements, far apart
        ((1, 2), (1, 2**31), True),
        ((2, 2), (2**30, 2**30), True),
        ((2**20, 2**20), (0, 1), False),  # 2⁴⁰ elements in the memory of one row
        ((1, 1), (2**40, 2**40), False),
        ((0, 2**40), (2**40, 1), False),
    ],
)
def test_offsets_have_64_bits_where_the_memory_needs_them(shape, strides, wide):
    """What counts is how far apart elements lie, not how many there are."""
    t = torch.empty(0, device="meta").as_strided(shape, strides)
    assert tiles.matrix(t) == (t, shape[0], *strides, wide)
    assert tiles.matrix(t.t()).wide.value is wide


def far_apart(rows, columns, device):
    """Half-precision numbers, (rows, columns), with 2³¹ elements from one row to the next.

    On a CPU, memory that nobody touches is only reserved.
    """
    size = (rows - 1) * 2**31 + columns
    if device == "cpu":
        buffer = torch.frombuffer(mmap.mmap(-1, 2 * size), dtype=torch.float16)
    else:
        buffer = torch.zeros(size, dtype=torch.float16, device=device)
    numbers = buffer.as_strided((rows, columns), (2**31, 1))
    return numbers.copy_(torch.randn(rows, columns))


def results(x, w, dz):
    """y, dx, dw and db by the fused kernels."""
    with launch.use(products="fused"):
        return [linear_fwd(x, w)[0], linear_bwd_dx(dz, w), *linear_bwd_dw(dz, x)]


def test_elements_2_31_apart(device):
    """Offsets past 2³¹ elements are right, in rows and in columns of each factor."""
    x, w, dz = far_apart(2, 12, device).split((5, 5, 2), 1)
    near = x.contiguous(), w.contiguous(), dz.contiguous()
    expected = results(*near)
    assert_equal(results(x, near[1], near[2]), expected, "x")
    assert_equal(results(near[0], w, near[2]), expected, "w")
    assert_equal(results(near[0], near[1], dz), expected, "dz")
    b = far_apart(2, 1, device).as_strided((3,), (2**30,))  # the last one is 2³¹ after the first
    w = torch.ones(3, 5, dtype=b.dtype, device=device)
    assert_equal(linear_fwd(near[0], w, b)[0], linear_fwd(near[0], w, b.contiguous())[0], "b")


@pytest.mark.parametrize("sizes", [(65, 48, 33), (7, 33, 1)], ids=str)
def test_offsets_of_both_widths_give_the_same_bits(sizes, device, monkeypatch):
    M, K, N = sizes
    x, w, b = draw(M, K, N, device)
    dz, below = torch.randn(M, N, device=device), torch.rand(M, K, device=device)

    def everything(x, w, dz):
        return [linear_fwd(x, w, b, "gelu"), linear_bwd_dx(dz, w, below, "tanh"), results(x, w, dz)]

    expected = flatten(everything(x, w, dz))
    monkeypatch.setattr(tiles, "_NARROW", tl.constexpr(True))
    launch.forget()
    wide = flatten(everything(x, w, dz))
    launch.forget()
    assert tiles.matrix(x).wide.value is True
    assert_equal(wide, expected, sizes)


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_buffers_that_share_memory_with_an_input_are_refused(backend):
    """torch's products into such a buffer return wrong numbers."""
    if backend == "numba":
        pytest.importorskip("numba", reason="needs numba: pip install 'handgrad[cpu]'")
    x, w, b, s = torch.randn(6, 6), torch.randn(6, 6), torch.randn(6), torch.rand(6, 6)
    table, y = torch.randn(6, 12), torch.empty(6, 6)
    wrong = [
        lambda: kernels.linear_fwd(x, w, b, "tanh", out=(x, None)),
        lambda: kernels.linear_fwd(x, w, b, "tanh", out=(w[:], None)),
        lambda: kernels.linear_fwd(x, w, y[2], "tanh", out=(y, None)),
        lambda: kernels.linear_fwd(x, w, b, "gelu", out=(y, y)),
        lambda: kernels.linear_fwd(table[:, 3:9], w, b, out=(table.view(-1)[30:66].view(6, 6), y)),
        lambda: kernels.linear_bwd_dx(x, w, out=x),
        lambda: kernels.linear_bwd_dx(x, w, s, "sigmoid", out=s),
        lambda: kernels.linear_bwd_dw(x, w, out=(x, b)),
        lambda: kernels.linear_bwd_dw(x, w, out=(y, w[0])),
        lambda: kernels.linear_bwd_dw(x, w, out=(y, y[0])),
    ]
    with kernels.use(backend):
        for call in wrong:
            with pytest.raises(ValueError, match="each buffer of out needs memory of its own"):
                call()
        row = table[:1, :6]  # between the rows of x, but no part of them
        found, _ = kernels.linear_fwd(table[::2, 6:], w[:2], b[:2], out=(row.view(3, 2), None))
        torch.testing.assert_close(found, torch.nn.functional.linear(table[::2, 6:], w[:2], b[:2]))
        assert kernels.linear_fwd(x, w, b, "tanh", out=(y, y))[0] is y  # tanh keeps no z
