"""Layer normalisation: each row to mean 0 and variance 1, then scale and shift of each element.

    x (…, *S)   w, b of shape S         S: normalized_shape, of N elements; M rows of them

    μ = Σ_n x_n / N      ρ = 1 / √(Σ_n (x_n - μ)² / N + ε)      x̂_n = (x_n - μ) ρ
    y_n = x̂_n w_n + b_n

Backward, from dy of x's shape, with g_n = dy_n w_n:
    dx_n = ρ (g_n - Σ_k g_k / N - x̂_n Σ_k g_k x̂_k / N)      μ and ρ are functions of every x_k
    dw_n = Σ_m dy_mn x̂_mn,   db_n = Σ_m dy_mn               summed over the rows

Statistics and sums are float32 also for half precision. A row may be wider than a tile. The tiles'
means and sums of squares are then combined by the formula of Chan, Golub and LeVeque (1979,
"Updating formulae and a pairwise algorithm for computing sample variances"). It takes no difference
of large sums.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .. import launch, tape
from ..language import tl, triton
from ..tiles import cast, load_tile, matrix
from .linear import linear_bwd_reduce_kernel

_TILE = 4096  # elements of one program's tile
MAX_SPLITS = 64  # of the rows in dw


class LayerNormSaved(NamedTuple):
    """What the forward keeps for the backward."""

    x: torch.Tensor  # (…, *S)
    w: torch.Tensor | None  # S
    b: torch.Tensor | None  # S; the backward reads only its shape and dtype
    mean: torch.Tensor  # (M,), float32 (float64 of float64)
    rstd: torch.Tensor  # (M,), ρ
    normalized_shape: tuple[int, ...]


def layer_norm_fwd_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    normalized_shape: Sequence[int],
    eps: float = 1e-5,
) -> tuple[torch.Tensor, LayerNormSaved]:
    """The reference of `layer_norm_fwd`: same arguments, same results, plain torch."""
    rows = _rows(x, normalized_shape)
    centred = rows - rows.mean(1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(1, keepdim=True) + eps)
    y = centred * rstd
    y = y if w is None else y * _flat(w, rows)
    y = y if b is None else y + _flat(b, rows)
    y = tape.reshaped(y.to(x.dtype), x.shape)
    saved = x, w, b, rows.mean(1), rstd.squeeze(1), tuple(normalized_shape)
    return y, LayerNormSaved(*saved)


def layer_norm_bwd_ref(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    normalized_shape: Sequence[int],
    *,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The reference of `layer_norm_bwd`: same arguments, same results, plain torch."""
    rows, dy = _rows(x, normalized_shape), _rows(dy, normalized_shape)
    xhat = (rows - mean.unsqueeze(1)) * rstd.unsqueeze(1)
    dx = dw = db = None
    if needs[0]:
        g = dy if w is None else dy * _flat(w, rows)
        projected = xhat * (g * xhat).mean(1, keepdim=True)
        dx = (g - g.mean(1, keepdim=True) - projected) * rstd.unsqueeze(1)
        dx = dx.to(x.dtype).view(x.shape)
    if needs[1] and w is not None:
        dw = (dy * xhat).sum(0).to(w.dtype).view(w.shape)
    if needs[2] and b is not None:
        db = dy.sum(0).to(b.dtype).view(b.shape)
    return dx, dw, db


def _rows(t, normalized_shape):
    """t (…, *S) as (M, N). Half precision becomes float32."""
    size = math.prod(normalized_shape)
    rows = t.reshape(math.prod(t.shape[: t.dim() - len(normalized_shape)]), size)
    return rows.float() if t.dtype in (torch.float16, torch.bfloat16) else rows


def _flat(parameter, like):
    return parameter.reshape(-1).to(like.dtype)


@triton.jit
def product(a, b, mask):
    """a b where mask, else 0, so that a sum over lanes may take it.

    The compiler would fuse a bare product with the sum's first addition, which adds another lane's
    value. Each lane would then round the other's product but not its own, and the lanes of one row
    would hold different sums. The tl.where after the product prevents the fusion.
    """
    return tl.where(mask, a * b, 0.0)


@triton.jit
def layer_norm_fwd_kernel(
    y_ptr,  # [M, N]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    x,  # Matrix [M, N]
    w_ptr,  # [N], or None
    b_ptr,  # [N], or None
    N,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of y and their statistics, tile by tile. The second loop reads x from the cache."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < x.rows
    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)  # Σ (x - mean)² of the tiles so far
    seen = 0.0
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        tile = load_tile(x, rows[:, None], offs_n[None, :], mask)
        count = tl.minimum(N - start, BLOCK_N).to(tl.float32)
        tile_mean = tl.sum(tile, axis=1) / count
        centred = tile - tile_mean[:, None]
        apart = tile_mean - mean
        share = count / (seen + count)
        mean += apart * share
        squares += tl.sum(product(centred, centred, mask), axis=1) + apart * apart * (seen * share)
        seen += count
    rstd = 1.0 / tl.sqrt(squares / N + eps)
    tl.store(mean_ptr + rows, mean, mask=mask_m)
    tl.store(rstd_ptr + rows, rstd, mask=mask_m)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        mask = mask_m[:, None] & (offs_n < N)[None, :]
        tile = load_tile(x, rows[:, None], offs_n[None, :], mask)
        y = (tile - mean[:, None]) * rstd[:, None]
        if w_ptr is not None:
            y *= tl.load(w_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        if b_ptr is not None:
            y += tl.load(b_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
        offs = rows[:, None] * N + offs_n[None, :]
        tl.store(y_ptr + offs, cast(y, y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def gradient_tile(dy, x, w_ptr, rows, offs_n, mean, rstd, N):
    """(g, x̂, mask) of the module's formulas for one tile.

    g is 0 outside the mask, where no element exists.
    """
    mask = (rows < x.rows)[:, None] & (offs_n < N)[None, :]
    tile = load_tile(x, rows[:, None], offs_n[None, :], mask)
    xhat = (tile - mean[:, None]) * rstd[:, None]
    g = load_tile(dy, rows[:, None], offs_n[None, :], mask)
    if w_ptr is not None:
        w = tl.load(w_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)
        g = product(g, w[None, :], mask)
    return g, xhat, mask


@triton.jit
def layer_norm_bwd_dx_kernel(
    dx_ptr,  # [M, N]
    dy,  # Matrix [M, N]
    x,  # Matrix [M, N]
    w_ptr,  # [N], or None
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dx = ρ (g - mean(g) - x̂ mean(g x̂)), with g = dy w.

    Forward was y = x̂ w + b. The first loop computes the two means of each row, the second its dx.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = rows < x.rows
    mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
    rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
    g_sum = tl.zeros((BLOCK_M,), tl.float32)
    projection = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        g, xhat, mask = gradient_tile(dy, x, w_ptr, rows, offs_n, mean, rstd, N)
        g_sum += tl.sum(g, axis=1)
        projection += tl.sum(product(g, xhat, mask), axis=1)
    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        g, xhat, mask = gradient_tile(dy, x, w_ptr, rows, offs_n, mean, rstd, N)
        dx = (g - (g_sum / N)[:, None] - xhat * (projection / N)[:, None]) * rstd[:, None]
        offs = rows[:, None] * N + offs_n[None, :]
        tl.store(dx_ptr + offs, cast(dx, dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_bwd_dw_kernel(
    parts_ptr,  # [splits, 2 N]
    dy,  # Matrix [M, N]
    x,  # Matrix [M, N]
    mean_ptr,  # [M]
    rstd_ptr,  # [M]
    N,
    rows_each,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums dw = Σ_m dy x̂ and db = Σ_m dy over one split of the rows, side by side.

    Forward was y = x̂ w + b.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1).to(tl.int64)
    end = tl.minimum((split + 1) * rows_each, x.rows)
    dw = tl.zeros((BLOCK_N,), tl.float32)
    db = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(split * rows_each, end, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        mask_m = rows < end
        mean = tl.load(mean_ptr + rows, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=mask_m, other=0.0)
        rows = tl.where(mask_m, rows, x.rows)  # a row of the next split becomes one that is masked
        g, xhat, mask = gradient_tile(dy, x, None, rows, offs_n, mean, rstd, N)
        dw += tl.sum(product(g, xhat, mask), axis=0)
        db += tl.sum(g, axis=0)
    parts_ptr += split * 2 * N
    tl.store(parts_ptr + offs_n, dw, mask=offs_n < N)
    tl.store(parts_ptr + N + offs_n, db, mask=offs_n < N)


def check_layer_norm(x, w, b, normalized_shape) -> None:
    """Raises a ValueError, which names both values, unless shapes, dtypes and devices fit.

    The requirements are torch's.
    """
    shape = tuple(normalized_shape)
    if not shape or tuple(x.shape[-len(shape) :]) != shape:
        raise ValueError(
            f"layer_norm: input must end with normalized_shape {shape}, at least one dimension, "
            f"got {tuple(x.shape)}"
        )
    for name, t in (("weight", w), ("bias", b)):
        if t is not None and tuple(t.shape) != shape:
            raise ValueError(
                f"layer_norm: {name} must be {shape} as normalized_shape is, got {tuple(t.shape)}"
            )
    if not x.is_floating_point():
        raise ValueError(
            f"layer_norm: input must be floating point, got {x.dtype}; convert it, for example "
            "with .float()"
        )
    # As in torch, parameters may be float32 while the input is of half precision.
    mixed = x.dtype in (torch.float16, torch.bfloat16)
    given = {"weight": w, "bias": b}
    launch.check_placed("layer_norm", input=x, **given)
    for name, t in given.items():
        if t is not None and not (mixed and t.dtype == torch.float32):
            launch.check_same("layer_norm", input=x, **{name: t})


def _tiles(M: int, N: int) -> dict[str, int]:
    block_n = min(_TILE, max(16, triton.next_power_of_2(N)))
    block_m = max(1, min(_TILE // 4 // block_n, triton.next_power_of_2(max(M, 1))))
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 8 if block_n > 2048 else 4}


def _contiguous(parameter):
    return None if parameter is None else parameter.contiguous()


def layer_norm_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    normalized_shape: Sequence[int],
    eps: float = 1e-5,
) -> tuple[torch.Tensor, LayerNormSaved]:
    """y = x̂ w + b of x's shape and dtype, and the LayerNormSaved that `layer_norm_bwd` takes.

    x (…, *S), floating point, of any strides. w, b: of shape S, or None. They have x's dtype, or
    float32 if x is of half precision. normalized_shape: S, not empty. eps: added to the variance.

    The forward saves x and the two statistics of each row. Computes in float32, deterministic.
    Reads x twice, the second time from the cache, and writes y once. ValueError: shapes that do not
    fit, other dtypes, devices that differ.
    """
    check_layer_norm(x, w, b, normalized_shape)
    if launch.backend(x, w, b) != "triton" or x.numel() == 0:
        return layer_norm_fwd_ref(x, w, b, normalized_shape, eps)
    N = math.prod(normalized_shape)
    x2 = x.reshape(math.prod(x.shape[: x.dim() - len(normalized_shape)]), N)
    M = x2.shape[0]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mean, rstd = (x.new_empty(M, dtype=torch.float32) for _ in range(2))
    tiles = _tiles(M, N)
    launch.run(
        layer_norm_fwd_kernel,
        (triton.cdiv(M, tiles["BLOCK_M"]),),
        y,
        mean,
        rstd,
        matrix(x2),
        _contiguous(w),
        _contiguous(b),
        N,
        float(eps),
        **tiles,
    )
    return y, LayerNormSaved(x, w, b, mean, rstd, tuple(normalized_shape))


def layer_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    normalized_shape: Sequence[int],
    *,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw, db) from dy of x's shape and what `layer_norm_fwd` saved.

    needs: three bools. A gradient is None if it is not needed, or if there is no w or b. Each has
    the shape and dtype of its tensor.

    dw and db are sums over the rows. Each split of the rows writes its float32 part, and a second
    kernel adds the parts in a fixed order. So two runs are bitwise equal. x and dy are read once
    from memory for dx, and once more for dw and db.
    """
    if launch.backend(dy, x, w) != "triton" or x.numel() == 0:
        return layer_norm_bwd_ref(dy, x, w, b, mean, rstd, normalized_shape, needs=needs)
    M, N = mean.shape[0], math.prod(normalized_shape)
    dy, x2 = dy.reshape(M, N), x.reshape(M, N)
    dx = None
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        tiles = _tiles(M, N)
        grid = (triton.cdiv(M, tiles["BLOCK_M"]),)
        rows = matrix(dy), matrix(x2)
        launch.run(
            layer_norm_bwd_dx_kernel, grid, dx, *rows, _contiguous(w), mean, rstd, N, **tiles
        )
    wanted = [t if needed else None for t, needed in zip((w, b), needs[1:])]
    return dx, *_parameter_grads(dy, x2, mean, rstd, *wanted)


def _parameter_grads(dy, x, mean, rstd, w, b):
    """(dw, db), shaped like w and b. dw is None if w is None, and db if b is None."""
    if w is None and b is None:
        return None, None
    M, N = x.shape
    like = b if w is None else w
    dw = torch.empty(like.shape, dtype=like.dtype, device=x.device)
    db = None if b is None else torch.empty(b.shape, dtype=b.dtype, device=x.device)
    block_n = min(128, max(16, triton.next_power_of_2(N)))
    columns = triton.cdiv(N, block_n)
    wanted = min(MAX_SPLITS, M // 64, launch.sm_count(x.device) // max(columns, 1))
    rows_each = max(triton.cdiv(M, max(wanted, 1)), 1)
    splits = max(triton.cdiv(M, rows_each), 1)
    parts = x.new_empty(splits, 2 * N, dtype=torch.float32)
    launch.run(
        layer_norm_bwd_dw_kernel,
        (columns, splits),
        parts,
        matrix(dy),
        matrix(x),
        mean,
        rstd,
        N,
        rows_each,
        BLOCK_M=16,
        BLOCK_N=block_n,
    )
    grid = (triton.cdiv(2 * N, 512),)
    launch.run(linear_bwd_reduce_kernel, grid, dw, db, parts, N, N, splits, 2 * N, BLOCK=512)
    return None if w is None else dw, db


LAYER_NORM = tape.Differentiable(
    name="layer_norm",
    fwd=layer_norm_fwd,
    fwd_ref=layer_norm_fwd_ref,
    bwd=layer_norm_bwd,
    bwd_ref=layer_norm_bwd_ref,
    saved=LayerNormSaved,
    inputs=3,
    autocast=torch.float32,
    autocast_on=("cuda", "xpu"),  # on a CPU, torch's own function does not cast half precision
)


@tape.traceable
def layer_norm(
    input: torch.Tensor,
    normalized_shape: int | Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """`torch.nn.functional.layer_norm`. The module has the formulas.

    input (…, *normalized_shape), floating point. weight, bias: of normalized_shape, or None, of
    input's dtype, or float32 if input is of half precision. eps: added to the variance. The result
    has input's shape and dtype. Differentiable twice. float64 is computed by the reference.
    ValueError: shapes that do not fit, mixed dtypes or devices.
    """
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
    return tape.call(LAYER_NORM, input, weight, bias, shape, eps)
