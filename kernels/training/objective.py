"""Loss, gradient and number of correct predictions of a batch whose outputs fit in one tile.

The formulas are in `losses`. Labels that the loss ignores count for nothing, as in torch. A label
that is no class makes loss and gradient NaN.
"""

from ..language import tl, triton
from ..losses import Classes, label_weight, same_class, target_tile


@triton.jit
def parameters(offs_c, NET: tl.constexpr):
    """The loss's parameter for each output, [1, tile]. One number serves all outputs."""
    numbers = offs_c * 0.0 + NET.loss_numbers[0]
    for i in tl.static_range(1, len(NET.loss_numbers)):
        numbers = tl.where(offs_c == i, NET.loss_numbers[i], numbers)
    return numbers[None, :]


@triton.jit
def loss(y, t_ptr, rows, mask_m, NET: tl.constexpr):
    """(loss, number of correct predictions, ∂loss/∂y) of the outputs y [block_m, tile].

    Targets are labels, or with NET.soft rows of numbers.
    """
    C: tl.constexpr = NET.sizes[len(NET.sizes) - 1]
    offs_c = tl.arange(0, NET.tiles[len(NET.sizes) - 1])
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    classes = Classes(C, None, 0, NET.loss.ignored, 0.0)
    label = rows * 0
    weight = tl.where(mask_m, 1.0, 0.0)
    if not NET.soft:
        label = tl.load(t_ptr + rows, mask=mask_m, other=0).to(tl.int64)
        weight = label_weight(label, mask_m, classes)
    q, counted = target_tile(t_ptr + rows * C, 1, label, offs_c, mask, classes, NET.soft)
    rows_loss, dy = NET.loss.tile(y, q, mask, counted, parameters(offs_c, NET), NET)
    count = tl.sum(weight, axis=0)
    factor = count * 0.0 + NET.loss_scale  # NaN if a label is no class
    if NET.loss_mean:
        factor = factor / count
    if NET.soft:
        right = NET.loss.correct(y, q, mask, offs_c)
    else:
        right = same_class(y, q, mask, offs_c)
    correct = (weight == 1.0) & right
    # If every row is ignored there is no gradient, as in torch.
    dy = tl.where(count == 0, 0.0, dy * factor)
    return tl.sum(rows_loss, axis=0) * factor, tl.sum(correct.to(tl.int32), axis=0), dy
