"""Linear layer with its activation: y = act(z), z = x wᵀ + b.

    x (…, K)   w (N, K)   b (N,)   z, y (…, N)        leading dimensions of x are flattened to M

Backward, from dy (…, N):
    dz = dy ⊙ act'(z)          (M, N)    element by element
    dx = dz w                  (M, K)    z = Σ_k x_k w_nk, so ∂z_n/∂x_k = w_nk
    dw = dzᵀ x                 (N, K)    ∂z_n/∂w_nk = x_k, summed over the batch
    db = Σ_m dz                (N,)      ∂z_n/∂b_n = 1, summed over the batch

In a stack, dx of this layer is dy of the one beneath: `linear_bwd_dx` multiplies by that layer's
act' before it stores.

Each product is one fused kernel. Or, where `configs` finds that faster, it is torch's own product
and one kernel for what is left, act or act'. That never takes longer than torch's eager mode: the
product is the same, and what follows it is one kernel there too.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .. import activations, configs, launch, tape
from ..tiles import Matrix, cast, load_tile, matrix, product_tile, tile_of_program

MAX_SPLITS = 32  # of the batch in dw: the workspace is at most this many times dw


class LinearSaved(NamedTuple):
    """What the forward keeps for the backward."""

    x: torch.Tensor  # (…, K)
    w: torch.Tensor  # (N, K)
    s: torch.Tensor | None  # y or z, whichever act' is written in
    bias: bool
    activation: str


def kept(act: activations.Activation, y, z):
    """What the derivative of an activation is written in: y, z or nothing."""
    needs = act.needs
    return y if needs == "y" else z if needs == "z" else None


def as_matrix(t: torch.Tensor) -> torch.Tensor:
    """t (…, n) as (M, n); also where n = 0, which leaves reshape(-1, n) no answer."""
    return t if t.dim() == 2 else t.reshape(math.prod(t.shape[:-1]), t.shape[-1])


def linear_fwd_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    activation: str = "identity",
    *,
    out: Any = None,
) -> tuple[torch.Tensor, tuple]:
    """The reference of `linear_fwd`: same arguments, same results, plain torch."""
    y, s = layer_ref(x, w, b, activation, out=out)
    return y, LinearSaved(x, w, s, b is not None, activation)


def layer_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    activation: str,
    *,
    out: Any = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y of `linear_fwd_ref`, and what act' is written in: y, z or nothing."""
    act = activations.get(activation, "linear")
    y, z = out or (None, None)
    x2 = x if x.dim() == 2 else as_matrix(x)
    target = z if act.needs == "z" else y
    z = torch.mm(x2, w.t(), out=target) if b is None else torch.addmm(b, x2, w.t(), out=target)
    y = z if act.needs == "nothing" else act.forward_ref(z, out=y)
    if x2 is not x:
        # No view, whose output torch would not let anyone overwrite outside of the graph.
        y = torch.ops.aten._unsafe_view(y, (*x.shape[:-1], w.shape[0]))
    return y, kept(act, y, z)


def linear_bwd_dz_ref(
    dy: torch.Tensor, s: torch.Tensor | None, activation: str, *, out: Any = None
) -> Any:
    """The reference of `linear_bwd_dz`."""
    dy = as_matrix(dy)
    if s is None:
        return dy
    return activations.get(activation).backward_ref(dy, as_matrix(s), out=out)


def linear_bwd_dx_ref(
    dz: torch.Tensor,
    w: torch.Tensor,
    s_below: torch.Tensor | None = None,
    activation_below: str = "identity",
    *,
    out: Any = None,
) -> Any:
    """The reference of `linear_bwd_dx`."""
    dx = torch.mm(dz, w, out=out)
    if s_below is None:
        return dx
    return activations.get(activation_below).backward_ref(dx, as_matrix(s_below), out=out)


def linear_bwd_dw_ref(
    dz: torch.Tensor, x: torch.Tensor, bias: bool = True, *, out: Any = None
) -> Any:
    """The reference of `linear_bwd_dw`."""
    dw, db = out or (None, None)
    dw = torch.mm(dz.t(), as_matrix(x), out=dw)
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
    """The reference of `linear_bwd`."""
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
    """The three products of one layer in order, with either implementation of each."""
    needs_dx, needs_dw, needs_db = needs
    dz = bwd_dz(dy, s, activation)
    dx = bwd_dx(dz, w).view(x.shape) if needs_dx else None
    dw, db = bwd_dw(dz, x, bias and needs_db) if needs_dw or needs_db else (None, None)
    return dx, dw if needs_dw else None, db


@triton.jit
def linear_fwd_kernel(
    y_ptr,
    z_ptr,
    x,  # Matrix [M, K]
    w,  # Matrix [N, K]
    b_ptr,
    stride_b,
    K,
    ACT: tl.constexpr,
    WHOLE: tl.constexpr,  # whether K is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y = act(x wᵀ + b).

    z is stored too where z_ptr is not None. y and z are contiguous (M, N).
    """
    row, column = tile_of_program()
    offs_m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    N = w.rows
    z, _ = product_tile(x, w, offs_m, offs_n, 0, K, BLOCK_K, PRECISION, False, WHOLE)
    if b_ptr is not None:
        z += tl.load(b_ptr + offs_n * stride_b, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    offs = offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    mask = (offs_m < x.rows)[:, None] & (offs_n < N)[None, :]
    if z_ptr is not None:
        tl.store(z_ptr + offs, cast(z, z_ptr.dtype.element_ty), mask=mask)
    tl.store(y_ptr + offs, cast(ACT(z), y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_act_kernel(y_ptr, z_ptr, SIZE, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """y = act(z), element by element; y may be z."""
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
    """Forward was y = act(z), so dz = dy ⊙ act'(z), with act' written in s: y or z."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m < dy.rows) & (offs_n < N)
    dz = ACT_BWD(load_tile(dy, offs_m, offs_n, mask), load_tile(s, offs_m, offs_n, mask))
    tl.store(dz_ptr + offs_m * N + offs_n, cast(dz, dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_bwd_dx_kernel(
    dx_ptr,
    dz,  # Matrix [M, N]
    w,  # Matrix [K, N]: transposed
    s,  # Matrix [M, K], or None
    N,
    ACT_BWD: tl.constexpr,
    WHOLE: tl.constexpr,  # whether N is a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of dx = dz w, times act' of the layer below, whose output is x.

    Forward was z_mn = Σ_k x_mk w_nk, so dx_mk = Σ_n dz_mn w_nk.

    Here a tile's columns are k and its sum runs over n, so the names of the block sizes follow the
    result (M, K).
    """
    row, column = tile_of_program()
    offs_m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = column * BLOCK_N + tl.arange(0, BLOCK_N)
    K = w.rows
    dx, _ = product_tile(dz, w, offs_m, offs_k, 0, N, BLOCK_K, PRECISION, False, WHOLE)
    offs_m = offs_m.to(tl.int64)[:, None]
    offs_k = offs_k.to(tl.int64)[None, :]
    mask = (offs_m < dz.rows) & (offs_k < K)
    if s is not None:
        dx = ACT_BWD(dx, load_tile(s, offs_m, offs_k, mask))
    tl.store(dx_ptr + offs_m * K + offs_k, cast(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def linear_bwd_dw_kernel(
    dw_ptr,
    db_ptr,
    dz,  # Matrix [N, M]: transposed
    x,  # Matrix [K, M]: transposed
    M,
    rows,
    split_stride,
    WHOLE: tl.constexpr,  # whether the rows of every split are a multiple of BLOCK_K
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Forward was z_mn = Σ_k x_mk w_nk + b_n, so dw_nk = Σ_m dz_mn x_mk and db_n = Σ_m dz_mn.

    A tile's rows are n, its columns k, its sum runs over the batch rows [split·rows, split·rows +
    rows). The programs of the first column of tiles have dz in hand and sum db: no atomics. Splits
    write apart, split_stride elements on.
    """
    row, column = tile_of_program()
    offs_n = row * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = column * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    start = split * rows
    N = dz.rows
    K = x.rows
    end = tl.minimum(start + rows, M)
    BIAS: tl.constexpr = db_ptr is not None
    dw, db = product_tile(dz, x, offs_n, offs_k, start, end, BLOCK_K, PRECISION, BIAS, WHOLE)
    if BIAS:  # noqa: SIM102  known at compile time, unlike the next
        if column == 0:
            db_ptrs = db_ptr + split.to(tl.int64) * split_stride + offs_n
            tl.store(db_ptrs, cast(db, db_ptr.dtype.element_ty), mask=offs_n < N)
    offs_n = offs_n.to(tl.int64)[:, None]
    offs_k = offs_k[None, :]
    dw_ptrs = dw_ptr + split.to(tl.int64) * split_stride + offs_n * K + offs_k
    tl.store(dw_ptrs, cast(dw, dw_ptr.dtype.element_ty), mask=(offs_n < N) & (offs_k < K))


@triton.jit
def sum_of_splits(parts_ptr, offs, size, splits, split_stride):
    """The splits' parts at offs, added in their order; 0 from `size` on."""
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
    """Sums the splits' parts in a fixed order: dw, and db where db_ptr is not None.

    The parts are (splits, N·K + N).
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
    """Shapes, dtypes and devices of a linear layer; a ValueError that names both values."""
    if w.dim() != 2 or x.dim() < 1 or x.shape[-1] != w.shape[1]:
        features = x.shape[-1] if x.dim() else "at least one dimension"
        raise ValueError(
            f"{op}: weight must be (out, in) with in = {features} (input is {tuple(x.shape)}), "
            f"got {tuple(w.shape)}"
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


def linear_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    activation: str = "identity",
    *,
    out: Any = None,
) -> tuple[torch.Tensor, tuple]:
    """y = act(x wᵀ + b), bias and activation in the product's epilogue.

    x (…, K), w (N, K), b (N,) or None, of one dtype; any strides. `out`: a pair (y, z) of
    contiguous (M, N) buffers to fill, z only for activations whose backward needs it. Returns y (…,
    N) and what `linear_bwd` takes after dy. Accumulates in float32, deterministic; reads x once per
    column of tiles, w once per row of tiles. Where `configs` takes torch's own product, all of that
    is as torch has it, and one kernel more applies act. ValueError: shapes that do not fit, mixed
    dtypes or devices, an unknown activation.
    """
    plan = launch.planned(_plan_fwd, (x, w, b), activation)
    if plan is None:
        return linear_fwd_ref(x, w, b, activation, out=out)
    act, (M, N, K), x2 = plan.act, plan.sizes, as_matrix(x)
    y, z = out or (x.new_empty(M, N), x.new_empty(M, N) if act.needs == "z" else None)
    if plan.library:
        _library_fwd(x2, w, b, act, y, z)
    else:
        matrices = Matrix(x2, *plan.left), Matrix(w, *plan.right)
        launch.run(
            linear_fwd_kernel, plan.grid, y, z, *matrices, b, plan.stride_b, K, **plan.options
        )
    y = y if x.dim() == 2 else torch.ops.aten._unsafe_view(y, (*x.shape[:-1], N))
    return y, LinearSaved(x, w, kept(act, y, z), b is not None, activation)


class Plan(NamedTuple):
    """What a product of a linear layer does with arguments of one kind."""

    act: activations.Activation
    sizes: tuple[int, int, int]  # rows and columns of the result, terms of a sum
    library: bool  # by torch's own product
    grid: tuple[int, int]
    options: dict  # of the fused kernel
    left: tuple  # rows and strides of each operand's Matrix
    right: tuple
    stride_b: int = 0


def _plan_fwd(x, w, b, activation) -> Plan | None:
    """How `linear_fwd` serves these, which are checked; None: by the reference."""
    check_linear(x, w, b)
    act = activations.get(activation, "linear")
    if launch.backend(x, w, b) == "torch":
        return None
    x = as_matrix(x)
    M, (N, K) = x.shape[0], w.shape
    product = configs.product("linear_fwd", x, M, N, heavy=act.needs == "z")
    options = dict(product.over(K), ACT=act.forward)
    grid, library = product.grid(M, N), product.by_library(M, N, K)
    stride = 0 if b is None else b.stride(0)
    return Plan(act, (M, N, K), library, grid, options, matrix(x)[1:], matrix(w)[1:], stride)


@torch.no_grad()
def _library_fwd(x, w, b, act, y, z) -> None:
    """`linear_fwd` by torch's own product, into z where that is kept and else into y itself."""
    product = z if act.needs == "z" else y
    if b is None:
        torch.mm(x, w.t(), out=product)
    else:
        torch.addmm(b, x, w.t(), out=product)
    if act.needs != "nothing":  # of the table, the identity alone needs nothing
        size = product.numel()
        grid = (triton.cdiv(size, 1024),)
        launch.run(linear_act_kernel, grid, y, product, size, ACT=act.forward, BLOCK=1024)


def linear_bwd_dz(
    dy: torch.Tensor, s: torch.Tensor | None, activation: str, *, out: Any = None
) -> Any:
    """dz = dy ⊙ act', (M, N), from dy (…, N) of any strides and s as saved.

    dy itself where act is the identity.

    One read of dy and s, one write. `out`: a contiguous (M, N) buffer.
    """
    if launch.backend(dy, s) == "torch" or s is None:
        return linear_bwd_dz_ref(dy, s, activation, out=out)
    dy = as_matrix(dy)
    s = s.reshape(dy.shape)
    M, N = dy.shape
    dz = dy.new_empty(M, N) if out is None else out
    block_n = min(128, triton.next_power_of_2(max(N, 1)))
    block_m = 1024 // block_n
    launch.run(
        linear_bwd_dz_kernel,
        (triton.cdiv(M, block_m), triton.cdiv(N, block_n)),
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
    out: Any = None,
) -> Any:
    """dx = dz w, (M, K), from dz (M, N) and w (N, K).

    It is multiplied by act' of the layer below where s_below (M, K) is given.

    Float32 accumulation, the derivative applied to the float32 sum; after torch's own product to
    the sum as it was stored. `out`: a contiguous (M, K) buffer.
    """
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
    matrices = Matrix(dz, *plan.left), Matrix(w, *plan.right)
    below = None if s is None else matrix(s)
    launch.run(linear_bwd_dx_kernel, plan.grid, dx, *matrices, below, N, **plan.options)
    return dx


def _plan_dx(dz, w, activation) -> Plan | None:
    """How `linear_bwd_dx` serves these; None: by the reference."""
    act = activations.get(activation)
    if launch.backend(dz, w) == "torch":
        return None
    (M, N), K = dz.shape, w.shape[1]
    product = configs.product("linear_bwd_dx", dz, M, K, heavy=act.needs == "z")
    options = dict(product.over(N), ACT_BWD=act.backward)
    grid, library = product.grid(M, K), product.by_library(M, K, N)
    return Plan(act, (M, K, N), library, grid, options, matrix(dz)[1:], matrix(w.t())[1:])


def linear_bwd_dw(dz: torch.Tensor, x: torch.Tensor, bias: bool = True, *, out: Any = None) -> Any:
    """dw = dzᵀ x, (N, K), and db = Σ_m dz, (N,) or None without bias, from dz (M, N) and x (…, K).

    Where dw has fewer tiles than the device has processors the batch is split: each split writes
    its own float32 part and a second kernel adds them in a fixed order, so two runs are bitwise
    equal. Or it is torch's own product, and torch's sum. `out`: a pair of contiguous buffers.
    """
    plan = launch.planned(_plan_dw, (dz, x))
    if plan is None:
        return linear_bwd_dw_ref(dz, x, bias, out=out)
    x = as_matrix(x)
    (M, N), K = dz.shape, x.shape[1]
    dw, db = out or (dz.new_empty(N, K), dz.new_empty(N) if bias else None)
    if plan.library:
        _library_dw(dz, x, dw, db)
        return dw, db
    size = N * K
    if plan.splits == 1:
        launch.run(
            linear_bwd_dw_kernel,
            (*plan.tiles, 1),
            dw,
            db,
            matrix(dz.t()),
            matrix(x.t()),
            M,
            plan.rows,
            0,
            **plan.options,
        )
        return dw, db
    parts = dw_parts(dz, x, bias, plan)
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
    """How `linear_bwd_dw` serves these; None: by the reference."""
    if launch.backend(dz, x) == "torch":
        return None
    return dw_plan("linear_bwd_dw", dz, (*dz.shape, x.shape[-1]))


class DwPlan(NamedTuple):
    """How dzᵀ x is computed."""

    options: dict  # of the kernel
    tiles: tuple[int, int]
    splits: int  # of the batch
    rows: int  # of the batch in each
    library: bool  # by torch's own product, in one part


def dw_plan(
    kernel: str, dz, sizes: tuple[int, int, int], heavy: bool = False, library: bool = True
) -> DwPlan:
    """How to compute dzᵀ x of sizes (M, N, K).

    heavy: see `configs`. library: whether torch's own product may serve.
    """
    M, N, K = sizes
    product = configs.product(kernel, dz, N, K, heavy)
    rows, columns = product.grid(N, K)
    tiles = rows, max(columns, 1)  # one for db if K = 0
    splits, length = _split_batch(M, tiles[0] * tiles[1], dz.device)
    if library and product.by_library(N, K, length):
        splits, length, library = 1, M, True
    else:
        library = False
    options = product.over(length, M)
    if dz.dtype == torch.float32 and product.precision == "tf32x3":
        options |= configs.all_registers(dz.device)  # three products of every tile
    return DwPlan(options, tiles, splits, length, library)


@torch.no_grad()
def _library_dw(dz, x, dw, db) -> None:
    """`linear_bwd_dw` by torch's own product and sum.

    The sum reads dz again: of all that the product reads and computes, next to nothing.
    """
    torch.mm(dz.t(), x, out=dw)
    if db is not None:
        torch.sum(dz, 0, out=db)


def dw_parts(dz, x, bias, plan: DwPlan):
    """dw and db of every split of the batch, side by side in float32: (splits, N·K + N).

    By the library there is one split, and dz must be float32.
    """
    (M, N), K = dz.shape, x.shape[1]
    size = N * K
    parts = dz.new_empty(plan.splits, size + N, dtype=torch.float32)
    if plan.library:
        _library_dw(dz, x, parts[0, :size].view(N, K), parts[0, size:] if bias else None)
        return parts
    launch.run(
        linear_bwd_dw_kernel,
        (*plan.tiles, plan.splits),
        parts,
        parts[:, size:] if bias else None,
        matrix(dz.t()),
        matrix(x.t()),
        M,
        plan.rows,
        size + N,
        **plan.options,
    )
    return parts


def _split_batch(M: int, tiles: int, device) -> tuple[int, int]:
    """(splits, rows of each): at least 256 rows a split.

    There are no more splits than keep the device busy.
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
    """(dx, dw, db) from dy (…, N) and what `linear_fwd` saved.

    None for each that `needs` does not ask for.
    """
    return _backward(
        dy, x, w, s, bias, activation, needs, linear_bwd_dz, linear_bwd_dx, linear_bwd_dw
    )


LINEAR = tape.Differentiable(
    name="linear",
    fwd=linear_fwd,
    fwd_ref=linear_fwd_ref,
    bwd=linear_bwd,
    bwd_ref=linear_bwd_ref,
    saved=LinearSaved,
    inputs=3,
    derived={"bias": lambda given: given["b"] is not None},
)


@tape.traceable
def linear(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "identity",
) -> torch.Tensor:
    """act(input weightᵀ + bias): `torch.nn.functional.linear` and its activation in one kernel.

    input (…, in), weight (out, in), bias (out,) or None -> (…, out). Differentiable, twice too;
    float64 by the reference. As in torch, weight may also be (in,), with bias () or None: one
    output, without its dimension.
    """
    if weight.dim() == 1 and input.dim() and input.shape[-1:] == weight.shape:
        bias = None if bias is None else bias.unsqueeze(0)
        return linear(input, weight.unsqueeze(0), bias, activation).squeeze(-1)
    return tape.call(LINEAR, input, weight, bias, activation)
