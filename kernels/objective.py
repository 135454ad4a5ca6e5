"""Loss, gradient and count of correct predictions of one batch, whose outputs a program holds in
one tile.

The formulas are in `network`. Labels of -100 are ignored, as in torch; a label that is no class
makes loss and gradient NaN.
"""

import triton
import triton.language as tl

from .cross_entropy import label_weight, softmax_loss_tile, target_tile

LOWEST = tl.constexpr(-3.0e38)  # of a column that does not exist: finite, so that 0 times it is 0


@triton.jit
def loss(y, t_ptr, rows, mask_m, NET: tl.constexpr):
    """(loss, correct predictions, ∂loss/∂y) of the outputs y [block_m, tile], against labels or
    rows of targets.
    """
    C: tl.constexpr = NET.sizes[len(NET.sizes) - 1]
    offs_c = tl.arange(0, NET.tiles[len(NET.sizes) - 1])
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    label = rows * 0
    weight = tl.where(mask_m, 1.0, 0.0)
    if not NET.soft:
        label = tl.load(t_ptr + rows, mask=mask_m, other=-100).to(tl.int64)
        weight = label_weight(label, mask_m, None, C, 0, -100)
    q, counted = target_tile(
        t_ptr + rows * C, label, offs_c, mask, None, C, 1, 0, 0.0, -100, NET.soft
    )
    z = tl.where((offs_c < C)[None, :], y, LOWEST)
    m = tl.max(z, axis=1)
    if NET.loss == "cross_entropy":
        rows_loss, dy = softmax_loss_tile(
            z, m, tl.sum(tl.exp(z - m[:, None]), axis=1), q, counted, tl.sum(q, axis=1)
        )
    else:
        d = tl.where(mask, y - q, 0.0) * weight[:, None]
        rows_loss, dy = tl.sum(d * d, axis=1), 2.0 * d
    count = tl.sum(weight, axis=0)
    factor = count * 0.0 + NET.loss_scale  # NaN if a label is no class
    if NET.loss_mean:
        factor = factor / count
    if NET.soft:
        label = first_largest(tl.where((offs_c < C)[None, :], q, LOWEST), offs_c)
    correct = mask_m & (first_largest(z, offs_c) == label)
    dy = tl.where(count == 0, 0.0, dy * factor)  # every row ignored: no gradient, as torch
    return tl.sum(rows_loss, axis=0) * factor, tl.sum(correct.to(tl.int32), axis=0), dy


@triton.jit
def first_largest(z, offs_c):
    """The first column of each row's maximum, as torch.argmax; a large number where there is none
    (NaN).
    """
    return tl.min(tl.where(z == tl.max(z, axis=1)[:, None], offs_c[None, :], 1 << 30), axis=1)
