"""Cross-entropy of labels in compiled loops, with the results of `kernels.ops.cross_entropy`.

forward    log p = z - max - log Σ exp(z - max), and ℓ = Σ -log p_y over rows that count
backward   g = -dy at the label, divided by the count for the mean, and dz = g - p Σ g

max and Σ exp are those of the compiled epoch's loss, see `rows`.
"""

import array
import functools
import math

import torch
from numba import carray

from . import DTYPES, blocks, rows
from .rows import largest_and_sum
from .waiting import integers, number

# Entries of a block. Addresses: Z, the logits, or log p for the backward. T: labels, int64. OUT:
# log p, or dz. LOSS: the loss, or dy. COUNTED: the number of labels that count. The forward writes
# it, or -1 if a label is no class. MEAN: 1 if the loss is the mean.
Z, T, OUT, LOSS, COUNTED, ROWS, CLASSES, IGNORED, MEAN = range(9)
_MOST = 1 << 13  # logits from which torch's vector instructions are faster

# As in `dense`, an exp, and see `rows`.
FLOATS = EXP = EXPONENTIALS = None


def _forward(address):
    block = integers(address)
    labels, loss, classes, count = integers(block[T]), FLOATS(block[LOSS]), block[CLASSES], 0
    shape = block[ROWS], classes
    z, out = carray(FLOATS(block[Z]), shape), carray(FLOATS(block[OUT]), shape)
    EXPONENTIALS(z, out, carray(FLOATS(block[OUT]), (shape[0] * classes,)), classes)
    loss[0] = 0
    for r in range(shape[0]):
        label, counts = labels[r], labels[r] != block[IGNORED]
        if counts and not 0 <= label < classes:
            block[COUNTED] = -1
            return
        largest, total = largest_and_sum(z, out, r, classes)
        high = number(z, math.log(total))
        for c in range(classes):
            out[r, c] = (z[r, c] - largest) - high
        if counts:
            loss[0] -= out[r, label]
            count += 1
    if block[MEAN]:
        loss[0] /= number(z, count)
    block[COUNTED] = count


def _backward(address):
    block = integers(address)
    labels, classes, dy = integers(block[T]), block[CLASSES], FLOATS(block[LOSS])
    size = block[ROWS] * classes
    logp, out = carray(FLOATS(block[Z]), (size,)), carray(FLOATS(block[OUT]), (size,))
    for i in range(size):
        out[i] = EXP(logp[i])
    scale = dy[0] / number(out, block[COUNTED]) if block[MEAN] else dy[0]
    for r in range(block[ROWS]):
        counts, at = labels[r] != block[IGNORED], r * classes
        total = scale if counts else number(out, 0.0)
        for c in range(at, at + classes):
            out[c] *= total
        if counts and 0 <= labels[r] < classes:
            out[at + labels[r]] -= total
        elif counts:  # the labels were changed since the forward
            block[COUNTED] = -1


@functools.cache
def _compiled(dtype: torch.dtype) -> tuple[blocks.Code, blocks.Code]:
    exponentials, exp = rows.exponentials(DTYPES[dtype]), rows.LANGUAGES[DTYPES[dtype]].exp
    forward = blocks.Code(_forward, dtype, EXPONENTIALS=exponentials)
    return forward, blocks.Code(_backward, dtype, EXP=exp)


def _serves(z: torch.Tensor, target: torch.Tensor, reduction: str) -> bool:
    """True if the loops serve logits, or log p, (N, C) and labels (N,)."""
    if reduction == "none" or type(target) is not torch.Tensor or target.dtype is not torch.int64:
        return False
    if not (target.is_cpu and target.is_contiguous() and z.is_contiguous()) or z.is_neg():
        return False
    return 0 < z.numel() <= _MOST and target.shape == z.shape[:1]


def forward(
    z: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, int] | None:
    """(loss, log p, number of labels that count) of logits (N, C) and labels (N,).

    None if the reference serves them, or if a label is no class, of which it makes an error. A
    tensor without memory, as torch's unwritten zeros are, is the reference's too.
    """
    if not _serves(z, target, reduction):
        return None
    logp, loss = torch.empty(z.shape, dtype=z.dtype), torch.empty((), dtype=z.dtype)
    at = z.data_ptr(), target.data_ptr(), logp.data_ptr(), loss.data_ptr()
    if not (at[0] and at[1]):
        return None
    block = array.array("q", (*at, 0, *z.shape, ignore_index, reduction == "mean"))
    blocks.run(_compiled(z.dtype)[0], block.buffer_info()[0])
    return None if block[COUNTED] < 0 else (loss, logp, block[COUNTED])


def backward(
    dy: torch.Tensor,
    logp: torch.Tensor,
    counted: torch.Tensor | int,
    reduction: str,
    target: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor | None:
    """∂loss/∂z from dy, a scalar, and what the forward returned. None: the reference serves it."""
    if type(counted) is not int or not _serves(logp, target, reduction):
        return None
    if dy.dtype is not logp.dtype or dy.is_neg():
        return None
    dz = torch.empty(logp.shape, dtype=logp.dtype)
    at = logp.data_ptr(), target.data_ptr(), dz.data_ptr(), dy.data_ptr()
    if not (at[0] and at[1] and at[3]):
        return None
    block = array.array("q", (*at, counted, *logp.shape, ignore_index, reduction == "mean"))
    blocks.run(_compiled(logp.dtype)[1], block.buffer_info()[0])
    return None if block[COUNTED] < 0 else dz
