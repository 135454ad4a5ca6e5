"""Cross-entropy of labels in compiled loops, with the results of `kernels.ops.cross_entropy`.

forward    log p = z - max - log Σ exp(z - max), and ℓ = Σ -log p_y over rows that count
backward   g = -dy at the label, divided by the count for the mean, and dz = g - p Σ g
"""

import functools
import math

import torch

from . import DTYPES, blocks, rows
from .waiting import integers

# Entries of a block. Addresses: Z, the logits, or log p for the backward. T: labels, int64. OUT:
# log p, or dz. LOSS: the loss, or dy. COUNTED: the number of labels that count, or -1 if a label is
# no class. MEAN: 1 if the loss is the mean.
Z, T, OUT, LOSS, COUNTED, ROWS, CLASSES, IGNORED, MEAN = range(9)
_MOST = 1 << 13  # logits from which torch's vector instructions are faster

FLOATS = EXP = None  # as in `dense`, and an exp


def _forward(address):
    block = integers(address)
    z, out, labels = FLOATS(block[Z]), FLOATS(block[OUT]), integers(block[T])
    loss, count, classes = FLOATS(block[LOSS]), FLOATS(block[COUNTED]), block[CLASSES]
    loss[0], count[0] = 0, 0
    for r in range(block[ROWS]):
        at, label = r * classes, labels[r]
        if label != block[IGNORED] and not 0 <= label < classes:
            count[0] = -1
            return
        largest = z[at]
        for c in range(1, classes):
            largest = max(largest, z[at + c])
        total = EXP(z[at] - largest)
        for c in range(1, classes):
            total += EXP(z[at + c] - largest)
        high = math.log(total)
        for c in range(classes):
            out[at + c] = (z[at + c] - largest) - high
        if label != block[IGNORED]:
            loss[0] -= out[at + label]
            count[0] += 1
    if block[MEAN]:
        loss[0] /= count[0]


def _backward(address):
    block = integers(address)
    logp, out, labels = FLOATS(block[Z]), FLOATS(block[OUT]), integers(block[T])
    dy, count, classes = FLOATS(block[LOSS]), FLOATS(block[COUNTED]), block[CLASSES]
    scale = dy[0] / count[0] if block[MEAN] else dy[0]
    for r in range(block[ROWS]):
        at, label = r * classes, labels[r]
        total = -scale if label != block[IGNORED] else count[0] - count[0]
        for c in range(classes):
            out[at + c] = -EXP(logp[at + c]) * total
        if label != block[IGNORED]:
            out[at + label] += total


@functools.cache
def _compiled(dtype: torch.dtype) -> tuple[blocks.Code, blocks.Code]:
    exp = {"EXP": rows.LANGUAGES[DTYPES[dtype]].exp}
    return blocks.Code(_forward, dtype, **exp), blocks.Code(_backward, dtype, **exp)


def _serves(z: torch.Tensor, target: torch.Tensor, reduction: str) -> bool:
    """True if the loops serve logits, or log p, (N, C) and labels (N,)."""
    if reduction == "none" or type(target) is not torch.Tensor or target.dtype is not torch.int64:
        return False
    if not (target.is_cpu and target.is_contiguous() and z.is_contiguous()) or z.is_neg():
        return False
    return 0 < z.numel() <= _MOST and target.shape == z.shape[:1]


def forward(
    z: torch.Tensor, target: torch.Tensor, ignore_index: int, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """(loss, log p, number of labels that count) of logits (N, C) and labels (N,).

    None if the reference serves them, or if a label is no class, of which it makes an error. A
    tensor without memory, as torch's unwritten zeros are, is the reference's too.
    """
    if not _serves(z, target, reduction):
        return None
    dtype = z.dtype
    logp = torch.empty(z.shape, dtype=dtype)
    loss, counted = torch.empty((), dtype=dtype), torch.empty((), dtype=dtype)
    addresses = z.data_ptr(), target.data_ptr(), logp.data_ptr(), loss.data_ptr()
    if not all(addresses):
        return None
    options = *z.shape, ignore_index, reduction == "mean"
    blocks.run(_compiled(dtype)[0], (*addresses, counted.data_ptr(), *options))
    return None if counted.item() < 0 else (loss, logp, counted)


def backward(
    dy: torch.Tensor,
    logp: torch.Tensor,
    counted: torch.Tensor,
    reduction: str,
    target: torch.Tensor,
    ignore_index: int,
) -> torch.Tensor | None:
    """∂loss/∂z from dy, a scalar, and what the forward returned. None: the reference serves it."""
    if not _serves(logp, target, reduction) or dy.dtype is not logp.dtype:
        return None
    if counted.dtype is not logp.dtype or dy.is_neg():
        return None
    dz = torch.empty(logp.shape, dtype=logp.dtype)
    addresses = logp.data_ptr(), target.data_ptr(), dz.data_ptr(), dy.data_ptr()
    if not all(addresses):
        return None
    options = *logp.shape, ignore_index, reduction == "mean"
    blocks.run(_compiled(logp.dtype)[1], (*addresses, counted.data_ptr(), *options))
    return dz
