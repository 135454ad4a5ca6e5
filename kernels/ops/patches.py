"""How a convolution reads images: its geometry, its errors, images as a matrix of patches.

`conv` and `conv_bwd` share it. Row m of the matrix is an output position (n, oh, ow), and column k
is a tap (c, kh, kw):

    patch[m, k] = x[n, c, oh·SH - TOP + kh·DH, ow·SW - LEFT + kw·DW]        0 outside the image
"""

from typing import Any, NamedTuple

import torch

from .. import launch
from ..language import tl, triton

Extent = int | tuple[int, int]  # one number for height and width, or one for each


class Geometry(NamedTuple):
    """Kernel (K), stride (S), padding, dilation (D) and pooling window (P) of a convolution.

    H stands for height, W for width. Kernels take it as one constexpr.
    """

    KH: int
    KW: int
    SH: int
    SW: int
    TOP: int
    LEFT: int
    BOTTOM: int
    RIGHT: int
    DH: int
    DW: int
    PH: int
    PW: int

    @property
    def pooled(self) -> bool:
        """True if there is a pooling window of more than one output."""
        return (self.PH, self.PW) != (1, 1)

    def conv_size(self, h: int, w: int) -> tuple[int, int]:
        """Height and width of the convolution of an h × w image, before pooling.

        A number is below 1 if the kernel does not fit into the image.
        """
        return (
            (h + self.TOP + self.BOTTOM - self.DH * (self.KH - 1) - 1) // self.SH + 1,
            (w + self.LEFT + self.RIGHT - self.DW * (self.KW - 1) - 1) // self.SW + 1,
        )

    def image_size(self, oh: int, ow: int) -> tuple[int, int]:
        """Height and width of the image that a convolution of oh × ow outputs reads.

        The padding before the image (TOP, LEFT) is subtracted at both ends.
        """
        return (
            (oh - 1) * self.SH + self.DH * (self.KH - 1) + 1 - 2 * self.TOP,
            (ow - 1) * self.SW + self.DW * (self.KW - 1) + 1 - 2 * self.LEFT,
        )


class Images(NamedTuple):
    """Images (N, C, H, W) as a kernel takes them: address, height, width and strides."""

    ptr: Any
    H: Any
    W: Any
    stride_n: Any
    stride_c: Any
    stride_h: Any
    stride_w: Any


class Sizes(NamedTuple):
    """Sizes of a convolution's product.

    M: rows of the result. K: terms of each sum. height, width: of the planes whose positions are
    the rows. OH, OW: of the convolution before pooling.
    """

    M: Any
    K: Any
    height: Any
    width: Any
    OH: Any
    OW: Any


def as_images(x: torch.Tensor) -> Images:
    """x (N, C, H, W), of any strides, as a kernel's Images."""
    return Images(x, *x.shape[2:], *x.stride())


def _pair(value, name: str, least: int, op: str) -> tuple[int, int]:
    pair = (
        (value, value)
        if isinstance(value, int)
        else tuple(value)
        if isinstance(value, (tuple, list))
        else ()
    )
    if len(pair) != 2 or not all(isinstance(v, int) and v >= least for v in pair):
        raise ValueError(
            f"{op}: {name} must be an integer of at least {least}, or two (height, width), got "
            f"{value!r}"
        )
    height, width = pair
    return height, width


def geometry(kernel, stride=1, padding=0, dilation=1, max_pool=1, op="conv2d") -> Geometry:
    """The arguments of `conv2d` as a Geometry. A value out of range is a ValueError.

    kernel: (height, width). The others: an integer, or two (height, width). padding may also be
    "same" or "valid".
    """
    stride, dilation = _pair(stride, "stride", 1, op), _pair(dilation, "dilation", 1, op)
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'{op}: padding must be integers, "same" or "valid", got {padding!r}')
        if padding == "same" and stride != (1, 1):
            raise ValueError(
                f'{op}: padding "same" needs stride 1, as in torch, got stride {stride}; give '
                "padding as integers"
            )
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation)]
        before = total[0] // 2, total[1] // 2
        after = total[0] - before[0], total[1] - before[1]
    else:
        before = after = _pair(padding, "padding", 0, op)
    sizes = (*kernel, *stride, *before, *after, *dilation, *_pair(max_pool, "max_pool", 1, op))
    return Geometry._make(sizes)


def check_conv(x, w, b, stride, padding, dilation, max_pool, groups, op="conv2d") -> Geometry:
    """The Geometry of a convolution and its pooling.

    Raises a ValueError, which names both values, unless shapes, dtypes and devices fit.
    """
    if groups != 1:
        raise ValueError(
            f"{op}: groups must be 1, got {groups}; call it once for each group of channels"
        )
    if x.dim() not in (3, 4):
        raise ValueError(
            f"{op}: input must be images (N, C, H, W), or one (C, H, W), got {tuple(x.shape)}"
        )
    if w.dim() != 4 or w.shape[1] != x.shape[-3] or 0 in w.shape[2:]:
        raise ValueError(
            f"{op}: weight must be (out, in, height, width) with in = {x.shape[-3]} (input is "
            f"{tuple(x.shape)}), "
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
    g = geometry(tuple(w.shape[2:]), stride, padding, dilation, max_pool, op)
    h, w = x.shape[-2:]
    oh, ow = g.conv_size(h, w)
    if min(oh, ow) < 1:
        raise ValueError(
            f"{op}: weight of {g.KH} × {g.KW} at dilation {g.DH, g.DW} must fit in the padded "
            "image of "
            f"{h + g.TOP + g.BOTTOM} × {w + g.LEFT + g.RIGHT}; pad it more"
        )
    if oh < g.PH or ow < g.PW:
        raise ValueError(
            f"{op}: max_pool of {g.PH} × {g.PW} must fit in the convolution's output of {oh} × {ow}"
        )
    return g


@triton.jit
def locate(first, height, width):
    """(image, place): the image of position `first` of (N, height, width), and its place there.

    This is the only 64-bit division. Positions counted from that image's start fit in 32 bits.
    """
    image = first // (height * width)
    return image, (first - image * (height * width)).to(tl.int32)


@triton.jit
def unravel(image, flat, height, width):
    """(image, row, column) of positions that are counted from the start of `image`."""
    plane = height * width
    return image + flat // plane, flat % plane // width, flat % width


@triton.jit
def load_patches(
    x,  # Images (N, C, H, W)
    n,
    oh,
    ow,
    k,
    mask_m,
    mask_k,
    G: tl.constexpr,
):
    """The patches of output positions (n, oh, ow) at taps k: [BLOCK_M, BLOCK_K].

    They are 0 outside the image and outside the masks.
    """
    top = oh * G.SH - G.TOP
    left = ow * G.SW - G.LEFT
    down = k // G.KW % G.KH * G.DH
    right = k % G.KW * G.DW
    corners = n * x.stride_n + top.to(tl.int64) * x.stride_h + left.to(tl.int64) * x.stride_w
    taps = (
        (k // (G.KH * G.KW)).to(tl.int64) * x.stride_c
        + down.to(tl.int64) * x.stride_h
        + right.to(tl.int64) * x.stride_w
    )
    h = top[:, None] + down[None, :]
    w = left[:, None] + right[None, :]
    inside = (h >= 0) & (h < x.H) & (w >= 0) & (w < x.W) & mask_m[:, None] & mask_k[None, :]
    return tl.load(x.ptr + corners[:, None] + taps[None, :], mask=inside, other=0.0)
