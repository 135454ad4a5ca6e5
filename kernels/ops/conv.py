"""Convolution with activation and max-pooling: y = max_pool(act(z)), z = conv(x, w) + b.

    x (N, C, H, W)   w (O, C, KH, KW)   b (O,)   z (N, O, OH, OW)   y (N, O, OH // PH, OW // PW)

    z[n, o, oh, ow] = b[o] + Σ_{c, kh, kw} w[o, c, kh, kw] x[n, c, oh·SH - TOP + kh·DH, ow·SW - LEFT
    + kw·DW]
    y[n, o, i, j]   = max of act(z) over the window of PH × PW outputs at (i·PH, j·PW)

The convolution is a product of w with patches of x. A patch is a row with columns k = (c, kh, kw).
No kernel stores the patches.

Backward, from dy of y's shape. In each window only the winner, its first maximum, has a gradient.
So the forward keeps the winner's place and its y or z, but not all of z or act(z):
    dz[winner] = dy ⊙ act'     and 0 elsewhere
    dw[o, k] = Σ_m dz[m, o] patch[m, k],   db[o] = Σ_m dz[m, o]          m = (n, oh, ow)
    dx[n, c, h, w] = Σ_{o, kh, kw} w[o, c, kh, kw] dz[n, o, oh, ow]      over the outputs (oh, ow)
        that read (h, w)
The kernels of the backward are in `conv_bwd`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .. import activations, configs, launch, tape
from ..language import tl, triton
from ..tiles import cast, dot, load_tile, matrix
from .conv_bwd import conv2d_bwd, conv2d_bwd_ref, pad_end
from .linear import kept
from .patches import (
    Extent,
    Geometry,
    Sizes,
    as_images,
    check_conv,
    geometry,
    load_patches,
    locate,
    unravel,
)


class Conv2dSaved(NamedTuple):
    """What the forward keeps for the backward."""

    x: torch.Tensor  # (N, C, H, W) or (C, H, W)
    w: torch.Tensor  # (O, C, KH, KW)
    s: torch.Tensor | None  # y, z or None, of the winners: what act' is computed from
    winner: torch.Tensor | None  # with pooling, the place of each window's winner, int32
    bias: bool
    activation: str
    g: Geometry


def conv2d_fwd_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    stride: Extent = 1,
    padding: Extent | str = 0,
    activation: str = "identity",
    max_pool: Extent = 1,
    dilation: Extent = 1,
    groups: int = 1,
) -> tuple[torch.Tensor, Conv2dSaved]:
    """The reference of `conv2d_fwd`: same arguments, same results, plain torch."""
    act = activations.get(activation, "conv2d")
    g = check_conv(x, w, b, stride, padding, dilation, max_pool, groups)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    z = F.conv2d(pad_end(images, g), w, b, (g.SH, g.SW), (g.TOP, g.LEFT), (g.DH, g.DW))
    y = act.forward_ref(
        z, out=z if act.needs == "y" and not (z.requires_grad or launch.watched()) else None
    )
    winner = None
    if g.pooled:
        y, winner = _max_pool_ref(y, (g.PH, g.PW))
        if act.needs == "z":
            z = z.flatten(2).gather(2, winner.long().flatten(2)).view_as(y)
    y = y if x.dim() == 4 else tape.reshaped(y, y.shape[1:])
    return y, Conv2dSaved(x, w, kept(act, y, z), winner, b is not None, activation, g)


def _max_pool_ref(y, pool):
    """(max_pool2d, the place of each winner in its plane).

    torch vectorises over the channels of channels-last images. Pooling treats batch and channels
    alike, so the longer of the two becomes the channels.
    """
    # vmap has no channels-last, and a compiler must not specialise on which one is longer.
    if launch.watched():
        y, winner = F.max_pool2d(y, pool, return_indices=True)
        return y, winner.int()
    swap = y.shape[0] > y.shape[1]
    y = (y.transpose(0, 1) if swap else y).contiguous(memory_format=torch.channels_last)
    y, winner = F.max_pool2d(y, pool, return_indices=True)
    y, winner = (y.transpose(0, 1), winner.transpose(0, 1)) if swap else (y, winner)
    return y.contiguous(), winner.to(torch.int32, memory_format=torch.contiguous_format)


@triton.jit
def convolution_tile(
    x,  # Images (N, C, H, W)
    w,  # Matrix [O, K]
    n,  # [BLOCK_M], like oh and ow: the places of the outputs
    oh,
    ow,
    o,  # [BLOCK_N]
    mask_m,
    K,
    G: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """z without bias, [BLOCK_M, BLOCK_N]: the product of the outputs' patches with w."""
    z = tl.zeros((oh.shape[0], o.shape[0]), dtype=tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        patches = load_patches(x, n, oh, ow, k, mask_m, k < K, G)
        w_ptrs = w.ptr + o.to(tl.int64)[None, :] * w.stride_row
        w_ptrs += k.to(tl.int64)[:, None] * w.stride_col
        mask = (k < K)[:, None] & (o < w.rows)[None, :]
        weights = tl.load(w_ptrs, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        z = dot(patches, weights, z, PRECISION)
    return z


@triton.jit
def conv2d_fwd_kernel(
    y_ptr,
    s_ptr,
    winner_ptr,
    x,  # Images (N, C, H, W)
    w,  # Matrix [O, K]
    b,  # Matrix [O, 1], or None
    sizes,  # Sizes, of y
    G: tl.constexpr,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y (N, O, height, width). Its rows are pooled outputs (n, i, j), its columns o.

    Each element of the window is one product of the tile's patches with w. The maximum of act(z)
    stays in registers. Its place is kept too if winner_ptr is not None, and its z if s_ptr is not
    None. The maximum is taken before rounding to y's dtype.
    """
    height = sizes.height
    width = sizes.width
    image, start = locate(tl.program_id(0).to(tl.int64) * BLOCK_M, height, width)
    flat = start + tl.arange(0, BLOCK_M)
    mask_m = flat < sizes.M - image * height * width
    n, i, j = unravel(image, flat, height, width)
    o = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if b is not None:
        bias = load_tile(b, o, 0, o < w.rows)
    best = tl.full((BLOCK_M, BLOCK_N), float("-inf"), dtype=tl.float32)
    best_z = best
    winner = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for element in range(G.PH * G.PW):
        oh = i * G.PH + element // G.PW
        ow = j * G.PW + element % G.PW
        z = convolution_tile(x, w, n, oh, ow, o, mask_m, sizes.K, G, PRECISION, BLOCK_K)
        z += bias[None, :]
        y = ACT(z)
        # The first maximum wins, but a NaN wins always, as in torch.
        higher = (y > best) | (y != y) | (element == 0)
        best = tl.where(higher, y, best)
        if s_ptr is not None:
            best_z = tl.where(higher, z, best_z)
        if winner_ptr is not None:
            winner = tl.where(higher, (oh * sizes.OW + ow)[:, None], winner)
    plane = height * width
    offs_m = n * w.rows * plane + (i * width + j)
    offs = offs_m[:, None] + (o.to(tl.int64) * plane)[None, :]
    mask = mask_m[:, None] & (o < w.rows)[None, :]
    tl.store(y_ptr + offs, cast(best, y_ptr.dtype.element_ty), mask=mask)
    if s_ptr is not None:
        tl.store(s_ptr + offs, cast(best_z, s_ptr.dtype.element_ty), mask=mask)
    if winner_ptr is not None:
        tl.store(winner_ptr + offs, winner, mask=mask)


def conv2d_fwd(
    x: torch.Tensor,
    w: torch.Tensor,
    b: torch.Tensor | None = None,
    stride: Extent = 1,
    padding: Extent | str = 0,
    activation: str = "identity",
    max_pool: Extent = 1,
    dilation: Extent = 1,
    groups: int = 1,
) -> tuple[torch.Tensor, Conv2dSaved]:
    """y = max_pool(act(conv(x, w) + b)) in one kernel, and the Conv2dSaved that `conv2d_bwd` takes.

    x (N, C, H, W) or (C, H, W), w (O, C, KH, KW), b (O,) or None, of one floating-point dtype and
    any strides. w is made contiguous. stride, padding, dilation: as in
    `torch.nn.functional.conv2d`. max_pool: the window, which is also its stride, as in
    `max_pool2d`. y has the shape (N, O, OH // PH, OW // PW), or (O, …) for one image.

    The forward saves the place of each window's winner (int32), and y or z, of y's size.
    Accumulates in float32, deterministic. For each column of tiles it reads x KH·KW times, mostly
    from the cache. It writes y and what it saves once. ValueError: shapes that do not fit, groups
    other than 1, mixed dtypes or devices, an unknown activation.
    """
    act = activations.get(activation, "conv2d")
    g = check_conv(x, w, b, stride, padding, dilation, max_pool, groups)
    if launch.backend(x, w, b) != "triton":
        return conv2d_fwd_ref(x, w, b, stride, padding, activation, max_pool, dilation, groups)
    images = x if x.dim() == 4 else x.unsqueeze(0)
    (N, _, H, W), O = images.shape, w.shape[0]
    OH, OW = g.conv_size(H, W)
    shape = N, O, OH // g.PH, OW // g.PW
    M = N * shape[2] * shape[3]
    y = x.new_empty(shape)
    z = x.new_empty(shape) if act.needs == "z" else None
    winner = x.new_empty(shape, dtype=torch.int32) if g.pooled else None
    flat = w.flatten(1)
    config = configs.convolution("conv2d_fwd", x, M, O)
    launch.run(
        conv2d_fwd_kernel,
        (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(O, config["BLOCK_N"])),
        y,
        z,
        winner,
        as_images(images),
        matrix(flat),
        None if b is None else matrix(b.unsqueeze(1)),
        Sizes(M, flat.shape[1], *shape[2:], OH, OW),
        G=g,
        ACT=act.forward,
        **config,
    )
    y = y if x.dim() == 4 else tape.reshaped(y, y.shape[1:])
    return y, Conv2dSaved(x, w, kept(act, y, z), winner, b is not None, activation, g)


def _fake_fwd(x, w, b, stride, padding, activation="identity", max_pool=1, dilation=1, groups=1):
    """Fake tensors of the forward's shapes.

    torch's own fake convolution reads the size of the batch, so torch.compile would compile again
    for each size.
    """
    g = check_conv(x, w, b, stride, padding, dilation, max_pool, groups)
    oh, ow = g.conv_size(*x.shape[-2:])
    images = (x.shape[0] if x.dim() == 4 else 1, w.shape[0], oh // g.PH, ow // g.PW)
    y = x.new_empty(images if x.dim() == 4 else images[1:])
    act = activations.get(activation, "conv2d")
    z = x.new_empty(images) if act.needs == "z" else None
    winner = x.new_empty(images, dtype=torch.int32) if g.pooled else None
    return y, Conv2dSaved(x, w, kept(act, y, z), winner, b is not None, activation, g)


def _fake_bwd(dy, x, w, s, winner, bias, activation, g, *, needs):
    """Fake tensors of the gradients' shapes."""
    return torch.empty_like(x), torch.empty_like(w), w.new_empty(w.shape[:1]) if bias else None


def _geometry(given) -> Geometry:
    options = (given[name] for name in ("stride", "padding", "dilation", "max_pool"))
    return geometry(given["w"].shape[2:], *options)


CONV2D = tape.Differentiable(
    name="conv2d",
    fwd=conv2d_fwd,
    fwd_ref=conv2d_fwd_ref,
    bwd=conv2d_bwd,
    bwd_ref=conv2d_bwd_ref,
    saved=Conv2dSaved,
    inputs=3,
    derived={"bias": lambda given: given["b"] is not None, "g": _geometry},
    fake_fwd=_fake_fwd,
    fake_bwd=_fake_bwd,
)


@tape.traceable
def conv2d(
    input: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Extent = 1,
    padding: Extent | str = 0,
    activation: str = "identity",
    max_pool: Extent = 1,
    dilation: Extent = 1,
    groups: int = 1,
) -> torch.Tensor:
    """max_pool2d(act(conv2d(input, weight, bias, …)), max_pool), as in `torch.nn.functional`.

    input (N, in, H, W) or (in, H, W), weight (out, in, KH, KW), bias (out,) or None, of one
    floating-point dtype. stride, dilation, max_pool: an integer, or two (height, width). padding:
    likewise, or "same" or "valid". groups: must be 1. activation: a name in `kernels.ACTIVATIONS`.
    Differentiable twice. float64 is computed by the reference. ValueError: shapes that do not fit,
    groups other than 1, mixed dtypes or devices, an unknown activation.
    """
    options = stride, padding, activation, max_pool, dilation, groups
    return tape.call(CONV2D, input, weight, bias, *options)
