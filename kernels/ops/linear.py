"""Linear layer with its activation: y = act(z), z = x wᵀ + b.

    x (…, K)   w (N, K)   b (N,)   z, y (…, N)        the leading dimensions of x become one, M

Backward, from dy (…, N):
    dz = dy ⊙ act'(z)          (M, N)    element by element
    dx = dz w                  (M, K)    z = Σ_k x_k w_nk, so ∂z_n/∂x_k = w_nk
    dw = dzᵀ x                 (N, K)    ∂z_n/∂w_nk = x_k, summed over the batch
    db = Σ_m dz                (N,)      ∂z_n/∂b_n = 1, summed over the batch

In a stack, dx of this layer is dy of the layer below. `linear_bwd_dx` multiplies it by that layer's
act' before it stores it.

Each product is one fused kernel. Where `configs` expects that to be faster, it is torch's own
product followed by one kernel for act or act'. That does the same work as torch's eager mode: the
same product, and one kernel after it.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import activations, configs, launch, tape
from ..apart import check_apart
from ..language import tl, triton
from ..tiles import (
    Blocks,
    Matrix,
    cast,
    factors,
    layout,
    load_tile,
    matrix,
    offsets,
    product_tile,
    tile_of_program,
)

_torch_linear: Any = torch._C._nn.linear
# Sizes of dw for which MKL adds to zeros faster than it overwrites (two threads: 40 for 50 µs).
_ZEROED = range(1 << 15, 1 << 18)
MAX_SPLITS = 32  # of the batch in dw; the workspace is at most this many times as large as dw

Buffers = tuple[torch.Tensor, torch.Tensor | None]  # (y, z or None), or (dw, db or None)


class LinearSaved(NamedTuple):
    """What the forward keeps for the backward."""

    x: torch.Tensor  # (…, K)
    w: torch.Tensor  # (N, K)
    s: torch.Tensor | None  # y, z or None: what act' is computed from
    bias: bool
    activation: str


def kept(act: activations.Activation, y, z):
    """y, z or None: what the activation's derivative is computed from."""
    needs = act.needs
    return y if needs == "y" else z if needs == "z" else None


def as_matrix(t: torch.Tensor) -> torch.Tensor:
    """t (…, n) as (M, n). It also works for n = 0, where reshape(-1, n) fails."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


@functools.cache
def loops() -> Any:
    """The module of compiled loops. numba is slow to import, so it is imported where it is used."""
    from ..cpu import linear

    return linear


def linear_fwd_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    activation: str = "identity",
    *,
    out: Buffers | None = None,
) -> tuple[torch.Tensor, LinearSaved]:
    """The reference of `linear_fwd`: same arguments, same results, plain torch."""
    y, s = layer_ref(x, w, b, activation, out=out)
    return y, LinearSaved(x, w, s, b is not None, activation)


def layer_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    activation: str,
    *,
    out: Buffers | None = None,
) -> Buffers:
    """(y, s): y of `linear_fwd_ref`, and y, z or None, from which act' is computed."""
    act = activations.get(activation, "linear")
    needs, (y, z) = act.needs, out or (None, None)
    x2 = x if x.dim() == 2 else as_matrix(x)
    target = z if needs == "z" else y
    z = torch.mm(x2, w.t(), out=target) if b is None else torch.addmm(b, x2, w.t(), out=target)
    y = z if needs == "nothing" else act.forward_ref(z, out=y)
    if x2 is not x:
        y = tape.reshaped(y, (*x.shape[:-1], w.shape[0]))
    return y, y if needs == "y" else z if needs == "z" else None


def linear_bwd_dz_ref(
    dy: torch.Tensor, s: torch.Tensor | None, activation: str, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The reference of `linear_bwd_dz`: same arguments, same results, plain torch."""
    dy = dy if dy.dim() == 2 else as_matrix(dy)
    if s is None:
        return dy
    s = s if s.dim() == 2 else as_matrix(s)
    return activations.get(activation).backward_ref(dy, s, out=out)


def linear_bwd_dx_ref(
    dz: torch.Tensor,
    w: torch.Tensor,
    s_below: torch.Tensor | None = None,
    activation_below: str = "identity",
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The reference of `linear_bwd_dx`: same arguments, same results, plain torch."""
    dx = torch.mm(dz, w, out=out)
    if s_below is None:
        return dx
    s_below = s_below if s_below.dim() == 2 else as_matrix(s_below)
    return activations.get(activation_below).backward_ref(dx, s_below, out=out)


def linear_bwd_dw_ref(
    dz: torch.Tensor, x: torch.Tensor, bias: bool = True, *, out: Buffers | None = None
) -> Buffers:
    """The reference of `linear_bwd_dw`: same arguments, same results, plain torch."""
    dw, db = out or (None, None)
    x = x if x.dim() == 2 else as_matrix(x)
    if dw is not None and dw.numel() in _ZEROED and dw.dtype is torch.float32:
        dw.zero_().addmm_(dz.t(), x)
    else:
        dw = torch.mm(dz.t(), x, out=dw)
    return dw, torch.sum(dz, 0, out=db) if bias else None


def linear_bwd_ref(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor | None,
    bias: bool,
    activation: str,
    *,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The reference of `linear_bwd`: same arguments, same results, plain torch."""
    return _backward(
        dy,
        x,
        w,
        s,
        bias,
        activation,
        needs,
        linear_bwd_dz_ref,
        linear_bwd_dx_ref,
        linear_bwd_dw_ref,
    )


def _backward(dy, x, w, s, bias, activation, needs, bwd_dz, bwd_dx, bwd_dw):
    """(dx, dw, db) of one layer, by the given implementations of dz, dx and dw."""
    needs_dx, needs_dw, needs_db = needs
    dz = bwd_dz(dy, s, activation)
    dx = bwd_dx(dz, w) if needs_dx else None
    if dx is not None and dx.shape != x.shape:
        dx = dx.view(x.shape)
    dw, db = bwd_dw(dz, x, bias and needs_db) if needs_dw or needs_db else (None, None)
    return dx, dw if needs_dw else None, db


@triton.jit
def linear_fwd_kernel(
    y,  # Matrix [M, N], contiguous
    z_ptr,  # [M, N], or None
    x,  # [M, K]: a Matrix, or a descriptor
    w,  # [N, K]: a Matrix, or a descriptor
    b_ptr,
    stride_b,
    K,
    ACT: tl.constexpr,
    WHOLE: tl.constexpr,  # K is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y = act(x wᵀ + b).

    z is stored too if z_ptr is not None.
    """
    row, column = tile_of_program(tl.cdiv(y.rows, BLOCK_M))
    m = row * BLOCK_M
    n = column * BLOCK_N
    z, _ = product_tile(
        x, w, m, n, 0, K, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, WHOLE, (False, False)
    )
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    N = y.stride_row  # y is contiguous
    if b_ptr is not None:
        b_ptrs = b_ptr + offs_n.to(tl.int64) * stride_b
        z += tl.load(b_ptrs, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    offs = offsets(y, offs_m[:, None], offs_n[None, :])
    mask = (offs_m < y.rows)[:, None] & (offs_n < N)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offs, cast(z, z_ptr.dtype.element_ty), mask=mask)
    tl.store(y.ptr + offs, cast(ACT(z), y.ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_act_kernel(y_ptr, z_ptr, SIZE, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(z), element by element. y may be the same memory as z."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + offs, mask=offs < SIZE, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, cast(ACT(z), y_ptr.dtype.element_ty), mask=offs < SIZE)


@triton.jit
def linear_bwd_dz_kernel(
    dz_ptr,
    dy,  # Matrix [M, N]
    s,  # Matrix [M, N]
    N,
    ACT_BWD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Forward was y = act(z), so dz = dy ⊙ act'(z). act' is computed from s, which is y or z."""
    columns = tl.cdiv(N, BLOCK_N)  # of tiles
    tile = tl.program_id(0)
    offs_m = (tile // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = (tile % columns).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < dy.rows) & (offs_n < N)
    dz = ACT_BWD(load_tile(dy, offs_m, offs_n, mask), load_tile(s, offs_m, offs_n, mask))
    tl.store(dz_ptr + offs_m * N + offs_n, cast(dz, dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_bwd_dx_kernel(
    dx,  # Matrix [M, K], contiguous
    dz,  # [M, N]: a Matrix, or a descriptor
    w,  # [K, N]: a Matrix, transposed, or a descriptor of [N, K]
    s,  # Matrix [M, K], or None
    N,
    ACT_BWD: tl.constexpr,
    WHOLE: tl.constexpr,  # N is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of dx = dz w, times act' of the layer below, whose output is x.

    Forward was z_mn = Σ_k x_mk w_nk, so dx_mk = Σ_n dz_mn w_nk.

    A tile of the result (M, K) is BLOCK_M × BLOCK_N. Its sum runs over n, BLOCK_K terms at a time.
    """
    row, column = tile_of_program(tl.cdiv(dx.rows, BLOCK_M))
    m = row * BLOCK_M
    k = column * BLOCK_N
    tile, _ = product_tile(
        dz, w, m, k, 0, N, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, False, WHOLE, (False, True)
    )
    offs_m = m + tl.arange(0, BLOCK_M)[:, None]
    offs_k = k + tl.arange(0, BLOCK_N)[None, :]
    K = dx.stride_row  # dx is contiguous
    mask = (offs_m < dx.rows) & (offs_k < K)
    if s is not None:
        tile = ACT_BWD(tile, load_tile(s, offs_m, offs_k, mask))
    dx_ptrs = dx.ptr + offsets(dx, offs_m, offs_k)
    tl.store(dx_ptrs, cast(tile, dx.ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_bwd_dw_kernel(
    dw,  # Matrix [N, K], contiguous: the first split's
    db_ptr,  # [N], or None
    dz,  # [N, M]: a Matrix, transposed, or a descriptor of [M, N]
    x,  # [K, M]: a Matrix, transposed, or a descriptor of [M, K]
    M,
    rows,
    split_stride,
    WHOLE: tl.constexpr,  # the rows of every split are a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Forward was z_mn = Σ_k x_mk w_nk + b_n, so dw_nk = Σ_m dz_mn x_mk and db_n = Σ_m dz_mn.

    A tile's rows are n and its columns are k. Its sum runs over the batch rows [split·rows,
    split·rows + rows). The programs of the first column of tiles read all of dz, so they also sum
    db, without atomics. Each split writes its own part, split_stride elements after the last one's.
    """
    row, column = tile_of_program(tl.cdiv(dw.rows, BLOCK_M))
    n = row * BLOCK_M
    k = column * BLOCK_N
    split = tl.program_id(1)
    start = split * rows
    end = tl.minimum(start + rows, M)
    BIAS: tl.constexpr = db_ptr is not None
    tile, db = product_tile(
        dz, x, n, k, start, end, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION, BIAS, WHOLE, (True, True)
    )
    offs_n = n + tl.arange(0, BLOCK_M)
    offs_k = k + tl.arange(0, BLOCK_N)
    N = dw.rows
    K = dw.stride_row  # dw is contiguous
    if BIAS:  # noqa: SIM102  this is known at compile time, the next is not
        if column == 0:
            db_ptrs = db_ptr + split.to(tl.int64) * split_stride + offs_n
            tl.store(db_ptrs, cast(db, db_ptr.dtype.element_ty), mask=offs_n < N)
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    dw_ptrs = dw.ptr + split.to(tl.int64) * split_stride
    dw_ptrs += offsets(dw, offs_n[:, None], offs_k[None, :])
    tl.store(dw_ptrs, cast(tile, dw.ptr.dtype.element_ty), mask=mask)


@triton.jit
def sum_of_splits(parts_ptr, offs, size, splits, split_stride):
    """The splits' parts at offs, added in their order. It is 0 from `size` on."""
    total = tl.zeros(offs.shape, dtype=tl.float32)
    for split in range(splits):
        total += tl.load(
            parts_ptr + tl.cast(split, tl.int64) * split_stride + offs, mask=offs < size, other=0.0
        )
    return total


@triton.jit
def linear_bwd_reduce_kernel(
    dw_ptr, db_ptr, parts_ptr, SIZE, N, splits, split_stride, BLOCK: tl.constexpr
):
    """Sums the splits' parts, (splits, SIZE + N), in a fixed order.

    The first SIZE = N·K sums are dw. The others are db, stored if db_ptr is not None.
    """
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = sum_of_splits(parts_ptr, offs, SIZE + N, splits, split_stride)
    tl.store(dw_ptr + offs, cast(total, dw_ptr.dtype.element_ty), mask=offs < SIZE)
    if db_ptr is not None:
        tl.store(
            db_ptr + offs - SIZE,
            cast(total, db_ptr.dtype.element_ty),
            mask=(offs >= SIZE) & (offs < SIZE + N),
        )


def check_linear(x, w, b, op="linear") -> None:
    """Raises a ValueError, which names both values, unless shapes, dtypes and devices fit.

    x (…, K), w (N, K), b (N,) or None, of one floating-point dtype on one device.
    """
    if w.dim() != 2:
        raise ValueError(f"{op}: weight must be (out, in), got {tuple(w.shape)}")
    if x.dim() < 1:
        raise ValueError(f"{op}: input must be (…, {w.shape[1]}), got a tensor without dimensions")
    if x.shape[-1] != w.shape[1]:
        raise ValueError(
            f"{op}: input has {x.shape[-1]} features (its shape is {tuple(x.shape)}), but weight "
            f"{tuple(w.shape)} takes {w.shape[1]}"
        )
    if b is not None and b.shape != w.shape[:1]:
        raise ValueError(
            f"{op}: bias must be ({w.shape[0]},) as weight is {tuple(w.shape)}, got "
            f"{tuple(b.shape)}"
        )
    launch.check_same(op, input=x, weight=w, bias=b)
    if not x.is_floating_point():
        raise ValueError(
            f"{op}: input must be floating point, got {x.dtype}; convert it, for example with "
            ".float()"
        )


def fits(x: torch.Tensor, weights: Sequence, biases: Sequence) -> bool:
    """True only if the layers of a stack fit together, so that no check of them would raise.

    A fast test, because every call makes it.
    """
    dense = torch.strided
    if x.dim() == 0 or x.layout is not dense or not 0 < len(weights) == len(biases):
        return False
    width, dtype, device = x.shape[-1], x.dtype, x.device
    for w, b in zip(weights, biases):
        shape = w.shape
        if len(shape) != 2 or shape[1] != width:
            return False
        if w.dtype is not dtype or w.layout is not dense or w.device != device:
            return False
        width = shape[0]
        if b is None:
            continue
        if b.shape != (width,) or b.dtype is not dtype:
            return False
        if b.layout is not dense or b.device != device:
            return False
    return x.is_floating_point()


def linear_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    activation: str = "identity",
    *,
    out: Buffers | None = None,
) -> tuple[torch.Tensor, LinearSaved]:
    """y = act(x wᵀ + b), (…, N), and the LinearSaved that `linear_bwd` takes after dy.

    x (…, K), w (N, K), b (N,) or None, of one floating-point dtype and any strides. out: a pair
    (y, z) of contiguous (M, N) buffers to fill, in memory of their own. z may be None unless the
    activation needs z.

    The product's kernel adds the bias and applies act before it stores y. It accumulates in float32
    and is deterministic. It reads x once for each column of tiles, and w once for each row of
    tiles. Where `configs` takes torch's own product, torch decides these points, and one more
    kernel applies act. ValueError: shapes that do not fit, mixed dtypes or devices, an unknown
    activation.
    """
    if out is not None:
        keeps_z = activations.get(activation, "linear").needs == "z"
        check_apart("linear", out if keeps_z else out[:1], (x, w, b))
    if launch.takes_loops(x, w, b) and fits(x, (w,), (b,)):
        y, s = loops().forward(x, w, b, activation, out=out)
        return y, LinearSaved(x, w, s, b is not None, activation)
    is_planned = launch.may_take(x) or not fits(x, (w,), (b,))
    plan = launch.planned(_plan_fwd, (x, w, b), activation) if is_planned else None
    if plan is None:
        return linear_fwd_ref(x, w, b, activation, out=out)
    act, (M, N, K), x2 = plan.act, plan.sizes, as_matrix(x)
    y, z = out or (x.new_empty(M, N), x.new_empty(M, N) if act.needs == "z" else None)
    if plan.library:
        _library_fwd(x2, w, b, act, y, z)
    else:
        outputs, bias = (Matrix(y, *plan.result), z), (b, plan.stride_b)
        inputs = factors(Matrix(x2, *plan.left), Matrix(w, *plan.right), plan.blocks)
        launch.run(linear_fwd_kernel, plan.grid, *outputs, *inputs, *bias, K, **plan.options)
    y = y if x.dim() == 2 else tape.reshaped(y, (*x.shape[:-1], N))
    return y, LinearSaved(x, w, kept(act, y, z), b is not None, activation)


class Plan(NamedTuple):
    """How one product of a linear layer is computed, for one kind of arguments."""

    act: activations.Activation
    sizes: tuple[int, int, int]  # rows and columns of the result, terms of a sum
    library: bool  # True if it is torch's own product
    grid: tuple[int]
    options: dict  # of the fused kernel
    result: tuple  # layout of the result's Matrix
    left: tuple  # of the left factor's
    right: tuple  # of the right factor's
    blocks: Blocks | None  # of the factors' descriptors, see `tiles.factors`
    stride_b: int = 0


def _plan_fwd(x, w, b, activation) -> Plan | None:
    """Checks the arguments of `linear_fwd` and plans it. None means the reference."""
    check_linear(x, w, b)
    act = activations.get(activation, "linear")
    if launch.backend(x, w, b) != "triton":
        return None
    plan = _plan_product("linear_fwd", act, as_matrix(x), w, False, ACT=act.forward)
    return plan if b is None else plan._replace(stride_b=b.stride(0))


def _plan_product(kernel, act, left, w, transposed: bool, **options) -> Plan:
    """Plans act(left · wᵀ), or left · w if transposed.

    w is (out, in). A kernel takes its right factor as (columns of the result, terms of a sum).
    """
    right = w.t() if transposed else w
    (M, K), N = left.shape, right.shape[0]
    product = configs.product(kernel, left, M, N, heavy=act.needs == "z")
    options |= product.over(K)
    (rows, columns), library = product.grid(M, N), product.by_library(M, N, K)
    layouts = layout((M, N), (N, 1)), matrix(left)[1:], matrix(right)[1:]
    block_m, block_n, block_k = product.config[:3]
    blocks = [block_m, block_k], [block_k, block_n] if transposed else [block_n, block_k]
    by_tma = product.by_tma(left, w)
    sizes, grid = (M, N, K), (rows * columns,)
    return Plan(act, sizes, library, grid, options, *layouts, blocks if by_tma else None)


@torch.no_grad()
def _library_fwd(x, w, b, act, y, z) -> None:
    """`linear_fwd` by torch's own product, into z if that is kept, else into y itself."""
    product = z if act.needs == "z" else y
    if b is None:
        torch.mm(x, w.t(), out=product)
    else:
        torch.addmm(b, x, w.t(), out=product)
    if act.needs != "nothing":  # only the identity needs nothing
        size = product.numel()
        grid = (triton.cdiv(size, 1024),)
        launch.run(linear_act_kernel, grid, y, product, size, ACT=act.forward, BLOCK=1024)


def linear_bwd_dz(
    dy: torch.Tensor, s: torch.Tensor | None, activation: str, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """dz = dy ⊙ act', (M, N), from dy (…, N) of any strides, and s (…, N) as `linear_fwd` saved it.

    Where act is the identity, s is None and the result is dy itself. activation: its name. out: a
    contiguous (M, N) buffer to fill. Reads dy and s once and writes dz once. ValueError: an unknown
    activation.
    """
    if s is not None and launch.takes_loops(dy, s):
        return loops().dz(dy, s, activation, out=out)
    if launch.backend(dy, s) != "triton" or s is None:
        return linear_bwd_dz_ref(dy, s, activation, out=out)
    dy = as_matrix(dy)
    s = s.reshape(dy.shape)
    M, N = dy.shape
    dz = dy.new_empty(M, N) if out is None else out
    block_n = min(128, triton.next_power_of_2(max(N, 1)))
    block_m = 1024 // block_n
    launch.run(
        linear_bwd_dz_kernel,
        (triton.cdiv(M, block_m) * triton.cdiv(N, block_n),),
        dz,
        matrix(dy),
        matrix(s),
        N,
        ACT_BWD=activations.get(activation).backward,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return dz


def linear_bwd_dx(
    dz: torch.Tensor,
    w: torch.Tensor,
    s_below: torch.Tensor | None = None,
    activation_below: str = "identity",
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """dx = dz w, (M, K), from dz (M, N) and w (N, K) of one dtype and any strides.

    If s_below (M, K) is given, dx is multiplied by act' of the layer below. out: a contiguous
    (M, K) buffer to fill. The kernel accumulates in float32 and applies the derivative to the
    float32 sum. It is deterministic. After torch's own product, the derivative is applied to the
    stored sum. ValueError: an unknown activation.
    """
    if out is not None:
        check_apart("linear_bwd_dx", (out,), (dz, w, s_below))
    if launch.takes_loops(dz, w, s_below):
        return loops().dx(dz, w, s_below, activation_below, out=out)
    plan = launch.planned(_plan_dx, (dz, w), activation_below)
    if plan is None:
        return linear_bwd_dx_ref(dz, w, s_below, activation_below, out=out)
    M, K, N = plan.sizes
    dx = dz.new_empty(M, K) if out is None else out
    s = None if s_below is None else s_below.reshape(M, K)
    if plan.library:
        with torch.no_grad():
            torch.mm(dz, w, out=dx)
        return dx if s is None else linear_bwd_dz(dx, s, activation_below, out=dx)
    inputs = factors(Matrix(dz, *plan.left), Matrix(w, *plan.right), plan.blocks)
    result, below = Matrix(dx, *plan.result), None if s is None else matrix(s)
    launch.run(linear_bwd_dx_kernel, plan.grid, result, *inputs, below, N, **plan.options)
    return dx


def _plan_dx(dz, w, activation) -> Plan | None:
    """Plans `linear_bwd_dx`. None means the reference."""
    act = activations.get(activation)
    if launch.backend(dz, w) != "triton":
        return None
    return _plan_product("linear_bwd_dx", act, dz, w, True, ACT_BWD=act.backward)


def linear_bwd_dw(
    dz: torch.Tensor, x: torch.Tensor, bias: bool = True, *, out: Buffers | None = None
) -> Buffers:
    """dw = dzᵀ x, (N, K), and db = Σ_m dz, (N,) or None without bias, from dz (M, N) and x (…, K).

    dz and x have one dtype and any strides. out: a pair (dw, db) of contiguous buffers to fill.

    If dw has fewer tiles than the device has processors, the batch is split. Each split writes its
    own float32 part, and a second kernel adds the parts in a fixed order. So two runs are bitwise
    equal. Where `configs` takes torch's own product, torch also computes the sum.
    """
    if out is not None:
        check_apart("linear_bwd_dw", out, (dz, x))
    if launch.takes_loops(dz, x):
        return loops().dw(dz, x, bias, out=out)
    plan = launch.planned(_plan_dw, (dz, x))
    if plan is None:
        return linear_bwd_dw_ref(dz, x, bias, out=out)
    x = as_matrix(x)
    N, K = dz.shape[1], x.shape[1]
    dw, db = out or (dz.new_empty(N, K), dz.new_empty(N) if bias else None)
    if plan.library:
        _library_dw(dz, x, dw, db)
        return dw, db
    if plan.splits == 1:
        _fused_dw(dz, x, dw, db, 0, plan)
        return dw, db
    size, parts = N * K, dw_parts(dz, x, bias, plan)
    launch.run(
        linear_bwd_reduce_kernel,
        (triton.cdiv(size + N, 512),),
        dw,
        db,
        parts,
        size,
        N,
        plan.splits,
        size + N,
        BLOCK=512,
    )
    return dw, db


def _plan_dw(dz, x) -> "DwPlan | None":
    """Plans `linear_bwd_dw`. None means the reference."""
    if launch.backend(dz, x) != "triton":
        return None
    return dw_plan("linear_bwd_dw", dz, as_matrix(x))


class DwPlan(NamedTuple):
    """How dw = dzᵀ x is computed."""

    options: dict  # of the kernel
    tiles: int  # of dw
    splits: int  # parts of the batch
    rows: int  # of the batch in each part
    library: bool  # True if it is torch's own product, in one part
    blocks: Blocks | None  # of the factors' descriptors, see `tiles.factors`


def dw_plan(kernel: str, dz, x, heavy: bool = False, library: bool = True) -> DwPlan:
    """How to compute dw = dzᵀ x, from dz (M, N) and x (M, K).

    heavy: see `configs.product`. library: True if torch's own product may serve.
    """
    (M, N), K = dz.shape, x.shape[1]
    product = configs.product(kernel, dz, N, K, heavy)
    rows, columns = product.grid(N, K)
    tiles = rows * max(columns, 1)  # if K = 0, one column for db
    splits, length = _split_batch(M, tiles, dz.device)
    if library and product.by_library(N, K, length):
        splits, length, library = 1, M, True
    else:
        library = False
    options = product.over(length, M)
    if dz.dtype == torch.float32 and product.precision == "tf32x3":
        options |= configs.all_registers(dz.device)  # each product of tiles is three products
    block_m, block_n, block_k = product.config[:3]
    blocks = [block_k, block_m], [block_k, block_n]
    # A descriptor ends with the batch. So a split before the last must consist of whole tiles.
    by_tma = product.by_tma(dz, x) and (splits == 1 or length % block_k == 0)
    return DwPlan(options, tiles, splits, length, library, blocks if by_tma else None)


@torch.no_grad()
def _library_dw(dz, x, dw, db) -> None:
    """`linear_bwd_dw` by torch's own product and sum.

    The sum reads dz once more. That is little beside the work of the product.
    """
    torch.mm(dz.t(), x, out=dw)
    if db is not None:
        torch.sum(dz, 0, out=db)


def _fused_dw(dz, x, dw, db, split_stride, plan: DwPlan) -> None:
    """Launches `linear_bwd_dw_kernel`. The splits' parts lie split_stride elements apart.

    dw, db: where the first split writes. db is None without bias.
    """
    (M, N), K = dz.shape, x.shape[1]
    outputs, sizes = (Matrix(dw, *layout((N, K), (K, 1))), db), (M, plan.rows, split_stride)
    transposed = Matrix(dz, *matrix(dz.t())[1:]), Matrix(x, *matrix(x.t())[1:])
    inputs, grid = factors(*transposed, plan.blocks), (plan.tiles, plan.splits)
    launch.run(linear_bwd_dw_kernel, grid, *outputs, *inputs, *sizes, **plan.options)


def dw_parts(dz, x, bias, plan: DwPlan):
    """dw and db of every split of the batch, side by side in float32: (splits, N·K + N).

    With torch's own product there is one split, and dz must be float32.
    """
    N, K = dz.shape[1], x.shape[1]
    size = N * K
    parts = dz.new_empty(plan.splits, size + N, dtype=torch.float32)
    if plan.library:
        _library_dw(dz, x, parts[0, :size].view(N, K), parts[0, size:] if bias else None)
    else:
        _fused_dw(dz, x, parts, parts[:, size:] if bias else None, size + N, plan)
    return parts


def _split_batch(M: int, tiles: int, device) -> tuple[int, int]:
    """(splits, rows of each) of a batch of M rows.

    A split has at least 256 rows. There are no more splits than the device needs to be busy.
    """
    wanted = min(MAX_SPLITS, M // 256, launch.sm_count(device) // max(tiles, 1))
    rows = triton.cdiv(M, max(wanted, 1))
    return (triton.cdiv(M, rows), rows) if M else (1, 1)


def linear_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor | None,
    bias: bool,
    activation: str,
    *,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw, db) from dy (…, N) and what `linear_fwd` saved, of x's dtype.

    dx has x's shape, dw (N, K), db (N,). needs: three bools. A gradient is None if it is not needed
    or if there is no bias. Accumulates in float32, deterministic. See `linear_bwd_dz`,
    `linear_bwd_dx` and `linear_bwd_dw`.
    """
    return _backward(
        dy, x, w, s, bias, activation, needs, linear_bwd_dz, linear_bwd_dx, linear_bwd_dw
    )


def layer_on_tape(x, w, b, activation):
    """act(x wᵀ + b) by torch's own product, with the activation as a node after it, or None.

    It serves where its gradients equal those of the reference, bit for bit. So x and w must be
    contiguous, and x more than one number: torch's tape looks at the strides, and multiplies
    transposed factors in another order.
    """
    act = activations.ACTIVATIONS.get(activation)
    if act is None or launch.takes_loops() or not _serves_tape(x, w, b):
        return None
    x2 = x if x.dim() == 2 else as_matrix(x)
    if not x2.is_contiguous() or x2.numel() == 1:
        return None
    z = _torch_linear(x2, w, b)
    y = tape.pointwise(z, act) if act.on_tape is None else act.on_tape(z)
    return y if x2 is x else tape.reshaped(y, (*x.shape[:-1], w.shape[0]))


def _serves_tape(x, w, b) -> bool:
    """True only if the tensors fit together and are dense, plain memory. x is known to be plain."""
    kinds, dtype, dense = launch.PLAIN, x.dtype, torch.strided
    if type(w) not in kinds or w.dtype is not dtype or not w.is_cpu or w.layout is not dense:
        return False
    if w.is_nested or w.dim() != 2 or x.layout is not dense or x.dim() == 0:
        return False
    rows, columns = w.shape
    if x.shape[-1] != columns or w.stride() != (columns, 1) or not x.is_floating_point():
        return False
    if b is None:
        return True
    if type(b) not in kinds or b.dtype is not dtype or not b.is_cpu or b.layout is not dense:
        return False
    return not b.is_nested and b.dim() == 1 and b.shape[0] == rows


LINEAR = tape.Differentiable(
    name="linear",
    fwd=linear_fwd,
    fwd_ref=linear_fwd_ref,
    bwd=linear_bwd,
    bwd_ref=linear_bwd_ref,
    saved=LinearSaved,
    inputs=3,
    derived={"bias": lambda given: given["b"] is not None},
    on_tape=layer_on_tape,
)


@tape.traceable
def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
) -> torch.Tensor:
    """act(input weightᵀ + bias): `torch.nn.functional.linear` and its activation in one kernel.

    input (…, in), weight (out, in), bias (out,) or None, of one floating-point dtype -> (…, out).
    As in torch, weight may also be (in,), with bias () or None. The result is then (…). activation:
    a name in `kernels.ACTIVATIONS`. Differentiable twice. No Triton kernel takes float64.
    ValueError: shapes that do not fit, mixed dtypes or devices, an unknown activation.
    """
    if isinstance(weight, torch.Tensor) and weight.dim() == 1 and input.shape[-1:] == weight.shape:
        bias = None if bias is None else bias.unsqueeze(0)
        return linear(input, weight.unsqueeze(0), bias, activation).squeeze(-1)
    return tape.call(LINEAR, input, weight, bias, activation)
