"""The backward of `conv2d`. The formulas are in `conv`."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .. import activations, configs, launch
from ..language import tl, triton
from ..tiles import cast, dot, matrix
from .linear import linear_bwd_reduce_kernel
from .patches import Geometry, Sizes, as_images, load_patches, locate, unravel

# Up to so many columns of patches, a product computes the reference's dw faster than a convolution
# with dz does.
NARROW = 64
MAX_SPLITS = 128  # of the positions in dw, because a convolution has many of them and few weights


def conv2d_bwd_dz_ref(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    winner: torch.Tensor | None,
    activation: str,
    g: Geometry,
    size: tuple[int, int],
) -> torch.Tensor:
    """The reference of `conv2d_bwd_dz`: same arguments, same results, plain torch."""
    dz = dy if s is None else activations.get(activation).backward_ref(dy, s)
    if winner is None:
        return dz
    n, o = dz.shape[:2]
    oh, ow = g.conv_size(*size)
    places, dz = (t.reshape(n, o, winner.shape[2] * winner.shape[3]) for t in (winner, dz))
    return dz.new_zeros(n, o, oh * ow).scatter(2, places.long(), dz).view(n, o, oh, ow)


def conv2d_bwd_dx_ref(
    dz: torch.Tensor, w: torch.Tensor, g: Geometry, size: tuple[int, int]
) -> torch.Tensor:
    """The reference of `conv2d_bwd_dx`: a transposed convolution, cut to the size of the image."""
    # rest: rows and columns at the end that the stride skipped. If the padding is longer at the
    # end, the result has one row or column too many, which is cut off below.
    reached = g.image_size(*dz.shape[2:])
    rest = [max(n - r, 0) for n, r in zip(size, reached)]
    dx = F.conv_transpose2d(dz, w, None, (g.SH, g.SW), (g.TOP, g.LEFT), rest, 1, (g.DH, g.DW))
    return dx if dx.shape[2:] == size else dx[:, :, : size[0], : size[1]]


def conv2d_bwd_dw_ref(
    dz: torch.Tensor, x: torch.Tensor, g: Geometry, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The reference of `conv2d_bwd_dw`.

    Up to NARROW columns it is a product with the unfolded patches, else a correlation.
    """
    (N, O), C = dz.shape[:2], x.shape[1]
    db = dz.sum((0, 2, 3)) if bias else None
    if C * g.KH * g.KW <= NARROW or N == 0:
        padded = F.pad(x, (g.LEFT, g.RIGHT, g.TOP, g.BOTTOM))
        windows = padded.unfold(2, g.DH * (g.KH - 1) + 1, g.SH).unfold(
            3, g.DW * (g.KW - 1) + 1, g.SW
        )
        patches = (
            windows[..., :: g.DH, :: g.DW].permute(0, 1, 4, 5, 2, 3).flatten(1, 3).flatten(2)
        )  # (N, K, OH·OW)
        places = dz.reshape(N, O, dz.shape[2] * dz.shape[3])
        return torch.bmm(places, patches.mT).sum(0).view(O, C, g.KH, g.KW), db
    # A convolution of x with dz as its kernel, with batch and channels exchanged in both. It sums
    # over the batch, and the places of the outputs are the taps.
    x, dz = pad_end(x, g).transpose(0, 1), dz.transpose(0, 1)
    dw = F.conv2d(x, dz, None, (g.DH, g.DW), (g.TOP, g.LEFT), (g.SH, g.SW))
    return dw[:, :, : g.KH, : g.KW].transpose(0, 1).contiguous(), db


def pad_end(x, g):
    """x, padded by the rows and columns that its padding has more at the end than before.

    torch can only pad both ends alike.
    """
    return (
        x
        if (g.TOP, g.LEFT) == (g.BOTTOM, g.RIGHT)
        else F.pad(x, (0, g.RIGHT - g.LEFT, 0, g.BOTTOM - g.TOP))
    )


def conv2d_bwd_ref(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor | None,
    winner: torch.Tensor | None,
    bias: bool,
    activation: str,
    g: Geometry,
    *,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """The reference of `conv2d_bwd`: same arguments, same results, plain torch."""
    parts = conv2d_bwd_dz_ref, conv2d_bwd_dx_ref, conv2d_bwd_dw_ref
    return _backward(dy, x, w, s, winner, bias, activation, g, needs, *parts)


def _backward(dy, x, w, s, winner, bias, activation, g, needs, bwd_dz, bwd_dx, bwd_dw):
    """(dx, dw, db), by the given implementations of dz, dx and dw. One image is a batch of one."""
    needs_dx, needs_dw, needs_db = needs
    g = Geometry(*g)  # an operator of torch.compile passes it as a plain tuple
    images, dy, s = (t if t is None or t.dim() == 4 else t.unsqueeze(0) for t in (x, dy, s))
    size = tuple(images.shape[2:])
    dz = bwd_dz(dy, s, winner, activation, g, size)
    dx = bwd_dx(dz, w, g, size).view(x.shape) if needs_dx else None
    dw, db = bwd_dw(dz, images, g, bias and needs_db) if needs_dw or needs_db else (None, None)
    return dx, dw if needs_dw else None, db


@triton.jit
def conv2d_bwd_dz_kernel(
    dz_ptr,
    dy,  # Images (N, O, height, width)
    s_ptr,
    winner_ptr,
    rows,
    O,
    OH,
    OW,
    ACT_BWD: tl.constexpr,
    G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Forward was y = act(z) at the winner of each window, so dz = dy ⊙ act' there and 0 elsewhere.

    A tile is BLOCK_M planes of BLOCK_N convolution outputs. There are height × width windows in a
    plane, and each output reads whether it is the winner of its window.
    """
    columns = tl.cdiv(OH * OW, BLOCK_N)  # of tiles
    tile = tl.program_id(0)
    row = (tile // columns).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    place = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    height = dy.H
    width = dy.W
    h = place // OW // G.PH
    w = place % OW // G.PW
    mask = (row < rows) & (place < OH * OW)
    # Outputs at the end that fill no whole window are not pooled.
    inside = mask & (h < height) & (w < width)
    dy_ptrs = dy.ptr + row // O * dy.stride_n + row % O * dy.stride_c
    dy_ptrs += h.to(tl.int64) * dy.stride_h + w.to(tl.int64) * dy.stride_w
    dz = tl.load(dy_ptrs, mask=inside, other=0.0).to(tl.float32)
    pooled = row * height * width + h * width + w
    if s_ptr is not None:
        dz = ACT_BWD(dz, tl.load(s_ptr + pooled, mask=inside, other=0.0).to(tl.float32))
    if winner_ptr is not None:
        dz = tl.where(tl.load(winner_ptr + pooled, mask=inside, other=-1) == place, dz, 0.0)
    tl.store(dz_ptr + row * OH * OW + place, cast(dz, dz_ptr.dtype.element_ty), mask=mask)


@triton.jit
def conv2d_bwd_dx_kernel(
    dx_ptr,
    dz_ptr,
    w,  # Matrix [O, C·KH·KW]
    C,
    sizes,  # Sizes, of dx
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx of one tile of positions.

    Forward was z[n, o, oh, ow] = Σ w[o, c, kh, kw] x[n, c, h, w] with h = oh·SH - TOP + kh·DH, and
    w likewise.

    So dx[n, c, h, w] = Σ w[o, c, kh, kw] dz[n, o, oh, ow] over k = (o, kh, kw), with oh = (h + TOP
    - kh·DH) / SH where that is a whole number in range. A tile's rows are pixels (n, h, w), and its
    columns are c. Every pixel gathers its own sum, so nothing is added in memory.
    """
    H = sizes.height
    W = sizes.width
    OH = sizes.OH
    OW = sizes.OW
    K = sizes.K
    image, start = locate(tl.program_id(0).to(tl.int64) * BLOCK_M, H, W)
    flat = start + tl.arange(0, BLOCK_M)
    mask_m = flat < sizes.M - image * H * W
    n, down_to, right_to = unravel(image, flat, H, W)  # image, row and column of the pixel
    offs_c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_c = offs_c < C
    TAPS: tl.constexpr = G.KH * G.KW
    images = n * (K // TAPS) * (OH * OW)
    dx = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        o = (k // TAPS).to(tl.int64)
        down = (down_to + G.TOP)[:, None] - (k // G.KW % G.KH * G.DH)[None, :]  # [BLOCK_M, BLOCK_K]
        right = (right_to + G.LEFT)[:, None] - (k % G.KW * G.DW)[None, :]
        inside = (
            (down >= 0)
            & (down < OH * G.SH)
            & (right >= 0)
            & (right < OW * G.SW)
            & mask_m[:, None]
            & (k < K)[None, :]
        )
        inside = inside & (down % G.SH == 0) & (right % G.SW == 0)
        dz_ptrs = (
            dz_ptr
            + images[:, None]
            + (o * (OH * OW))[None, :]
            + (down // G.SH * OW + right // G.SW)
        )
        dz = tl.load(dz_ptrs, mask=inside, other=0.0)
        w_ptrs = (
            w.ptr
            + (o * w.stride_row + k % TAPS * w.stride_col)[:, None]
            + offs_c.to(tl.int64)[None, :] * TAPS * w.stride_col
        )
        weights = tl.load(
            w_ptrs, mask=(k < K)[:, None] & mask_c[None, :], other=0.0
        )  # [BLOCK_K, BLOCK_N]
        dx = dot(dz, weights, dx, PRECISION)
    dx_ptrs = (
        dx_ptr
        + (n * C * (H * W) + (down_to * W + right_to))[:, None]
        + (offs_c.to(tl.int64) * (H * W))[None, :]
    )
    tl.store(dx_ptrs, cast(dx, dx_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_c[None, :])


@triton.jit
def conv2d_bwd_dw_kernel(
    dw_ptr,
    db_ptr,
    dz_ptr,
    x,  # Images (N, C, H, W)
    O,
    sizes,  # Sizes, of dz; K are the columns of dw
    rows,
    split_stride,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dw[o, k] = Σ_m dz[m, o] patch[m, k] and db[o] = Σ_m dz[m, o].

    Forward was z[m, o] = Σ_k patch[m, k] w[o, k] + b[o].

    A tile's rows are o, and its columns are k = (c, kh, kw). Its sum runs over the positions
    m = (n, oh, ow) of one split. The programs of the first column of tiles read all of dz, so they
    also sum db. Each split writes its own part, split_stride elements after the last one's.
    """
    o = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2).to(tl.int64)
    OH = sizes.OH
    OW = sizes.OW
    K = sizes.K
    image, start = locate(split * rows, OH, OW)
    count = tl.minimum(sizes.M - split * rows, rows).to(tl.int32)
    dw = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    db = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, count, BLOCK_K):
        offs = first + tl.arange(0, BLOCK_K)
        n, oh, ow = unravel(image, start + offs, OH, OW)
        dz_ptrs = (
            dz_ptr
            + (o.to(tl.int64) * (OH * OW))[:, None]
            + (n * O * (OH * OW) + (oh * OW + ow))[None, :]
        )
        dz = tl.load(
            dz_ptrs, mask=(o < O)[:, None] & (offs < count)[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        patches = load_patches(x, n, oh, ow, k, offs < count, k < K, G)
        dw = dot(dz, patches, dw, PRECISION)
        if db_ptr is not None:
            db += tl.sum(dz.to(tl.float32), axis=1)
    if db_ptr is not None:  # noqa: SIM102  this is known at compile time, the next is not
        if tl.program_id(1) == 0:
            tl.store(
                db_ptr + split * split_stride + o, cast(db, db_ptr.dtype.element_ty), mask=o < O
            )
    dw_ptrs = dw_ptr + split * split_stride + o.to(tl.int64)[:, None] * K + k[None, :]
    tl.store(dw_ptrs, cast(dw, dw_ptr.dtype.element_ty), mask=(o < O)[:, None] & (k < K)[None, :])


def conv2d_bwd_dz(
    dy: torch.Tensor,
    s: torch.Tensor | None,
    winner: torch.Tensor | None,
    activation: str,
    g: Geometry,
    size: tuple[int, int],
) -> torch.Tensor:
    """dz (N, O, OH, OW), contiguous, from dy (N, O, height, width) of any strides.

    s, winner: as `conv2d_fwd` saved them. size: (H, W) of the images. Reads dy, s and winner once,
    and writes dz once. In each window, at most one element of dz is not 0.
    """
    if launch.backend(dy, s) != "triton":
        return conv2d_bwd_dz_ref(dy, s, winner, activation, g, size)
    if s is None and winner is None:
        return dy.contiguous()
    (N, O), (OH, OW) = dy.shape[:2], g.conv_size(*size)
    dz = dy.new_empty(N, O, OH, OW)
    s, winner = (None if t is None else t.contiguous() for t in (s, winner))
    block_n = min(512, triton.next_power_of_2(OH * OW))
    block_m = 512 // block_n
    launch.run(
        conv2d_bwd_dz_kernel,
        (triton.cdiv(N * O, block_m) * triton.cdiv(OH * OW, block_n),),
        dz,
        as_images(dy),
        s,
        winner,
        N * O,
        O,
        OH,
        OW,
        ACT_BWD=activations.get(activation).backward,
        G=g,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
    )
    return dz


def conv2d_bwd_dx(
    dz: torch.Tensor, w: torch.Tensor, g: Geometry, size: tuple[int, int]
) -> torch.Tensor:
    """dx (N, C, H, W) from a contiguous dz (N, O, OH, OW) and w (O, C, KH, KW). size is (H, W).

    It is a product, and nothing is unfolded in memory. Accumulates in float32 and in a fixed order,
    so it is deterministic.
    """
    if launch.backend(dz, w) != "triton":
        return conv2d_bwd_dx_ref(dz, w, g, size)
    (N, O, OH, OW), C, (H, W) = dz.shape, w.shape[1], size
    dx = dz.new_empty(N, C, H, W)
    M = N * H * W
    w = w.flatten(1)
    config = configs.convolution("conv2d_bwd_dx", dz, M, C)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(C, config["BLOCK_N"]))
    launch.run(
        conv2d_bwd_dx_kernel,
        grid,
        dx,
        dz,
        matrix(w),
        C,
        Sizes(M, O * g.KH * g.KW, H, W, OH, OW),
        G=g,
        **config,
    )
    return dx


def conv2d_bwd_dw(
    dz: torch.Tensor, x: torch.Tensor, g: Geometry, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dw (O, C, KH, KW) and db (O,) from a contiguous dz (N, O, OH, OW) and x (N, C, H, W).

    db is None without bias. x may have any strides.

    The positions are split among programs. Each writes a float32 part, and a second kernel adds the
    parts in a fixed order. So two runs are bitwise equal.
    """
    if launch.backend(dz, x) != "triton":
        return conv2d_bwd_dw_ref(dz, x, g, bias)
    (N, O, OH, OW), C = dz.shape, x.shape[1]
    M, K = N * OH * OW, C * g.KH * g.KW
    dw, db = dz.new_empty(O, C, g.KH, g.KW), dz.new_empty(O) if bias else None
    config = configs.convolution("conv2d_bwd_dw", dz, O, K)
    tiles = triton.cdiv(O, config["BLOCK_M"]), triton.cdiv(K, config["BLOCK_N"])
    splits, rows = _split(M, tiles[0] * tiles[1], dz.device)
    size = O * K
    # Splits write their parts side by side. A single split writes dw and db themselves.
    parts = dz.new_empty(splits, size + O, dtype=torch.float32) if splits > 1 else None
    launch.run(
        conv2d_bwd_dw_kernel,
        (*tiles, splits),
        dw if parts is None else parts,
        (db if parts is None else parts[:, size:]) if bias else None,
        dz,
        as_images(x),
        O,
        Sizes(M, K, OH, OW, OH, OW),
        rows,
        0 if parts is None else size + O,
        G=g,
        **config,
    )
    if parts is None:
        return dw, db
    launch.run(
        linear_bwd_reduce_kernel,
        (triton.cdiv(size + O, 512),),
        dw,
        db,
        parts,
        size,
        O,
        splits,
        size + O,
        BLOCK=512,
    )
    return dw, db


def _split(M: int, tiles: int, device) -> tuple[int, int]:
    """(splits, positions of each) of M positions.

    A split has at least 256 positions. There are no more splits than the device needs to be busy,
    but always so many that 32-bit numbers can count the positions of each.
    """
    wanted = min(MAX_SPLITS, M // 256, launch.sm_count(device) // max(tiles, 1))
    rows = triton.cdiv(M, max(wanted, M >> 30, 1))
    return (triton.cdiv(M, rows), rows) if M else (1, 1)


def conv2d_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    w: torch.Tensor,
    s: torch.Tensor | None,
    winner: torch.Tensor | None,
    bias: bool,
    activation: str,
    g: Geometry,
    *,
    needs: Sequence[bool] = (True, True, True),
) -> tuple[torch.Tensor | None, ...]:
    """(dx, dw, db) from dy of y's shape and what `conv2d_fwd` saved.

    dx has x's shape, dw (O, C, KH, KW), db (O,). needs: three bools. A gradient is None if it is
    not needed or if there is no bias. Accumulates in float32, deterministic. See `conv2d_bwd_dz`,
    `conv2d_bwd_dx` and `conv2d_bwd_dw`.
    """
    parts = conv2d_bwd_dz, conv2d_bwd_dx, conv2d_bwd_dw
    return _backward(dy, x, w, s, winner, bias, activation, g, needs, *parts)
