"""Means over all samples from the values of batches: the loss, and the share of right predictions.

A batch's mean loss is divided by the sum of the weights of its labels. The mean over an epoch
weights each batch by that sum. So it equals the loss of all samples in one batch.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from ..data.dataset import has_float64
from ..loss import LossFunction, SoftmaxCrossEntropy

_ENTROPIES = (SoftmaxCrossEntropy, nn.CrossEntropyLoss, nn.NLLLoss)
_FUNCTIONS = (F.cross_entropy, F.nll_loss)


class Reading(NamedTuple):
    """How a loss reduces a batch: weights of labels, ignored label, mean or sum.

    weight: a (classes,) tensor or None. ignore_index: a label, or None if the loss ignores none.
    """

    weight: torch.Tensor | None = None
    ignore_index: int | None = None
    reduction: str = "mean"


def reading(loss: LossFunction) -> Reading:
    """How this loss reduces a batch.

    loss: one of our losses, of torch's modules, or of torch's functions, also as a partial. Any
    other function is treated as a mean over the samples.
    """
    if isinstance(loss, SoftmaxCrossEntropy):
        weight, ignore_index, reduction, _ = loss.options
        return Reading(weight, ignore_index, reduction)
    if isinstance(loss, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return Reading(loss.weight, loss.ignore_index, loss.reduction)
    options = loss.keywords if isinstance(loss, functools.partial) else {}
    function = loss.func if isinstance(loss, functools.partial) else loss
    reduction = options.get("reduction", getattr(loss, "reduction", "mean"))
    if function in _FUNCTIONS:
        return Reading(options.get("weight"), options.get("ignore_index", -100), reduction)
    return Reading(reduction=reduction)


def is_entropy(loss: LossFunction) -> bool:
    """True if the loss reads outputs as logits of classes."""
    function = loss.func if isinstance(loss, functools.partial) else loss
    return isinstance(loss, _ENTROPIES) or function in _FUNCTIONS


def counted(loss: LossFunction, targets: torch.Tensor) -> torch.Tensor | None:
    """(N,) bool, True for labels that the loss does not ignore. None if it ignores no label."""
    ignored = reading(loss).ignore_index
    if ignored is None or targets.is_floating_point():
        return None
    return targets.long() != ignored  # in uint8, 156 would equal -100


def weights(loss: LossFunction, targets: torch.Tensor) -> torch.Tensor:
    """(N,) float64: the share of each sample in the number that divides a batch's loss.

    targets: labels (N,), or numbers (N, …), where every sample weighs 1. A loss with reduction
    "sum" is not divided. Its mean is taken over the samples that are not ignored, 1 each.
    """
    targets = targets if has_float64(targets.device) else targets.cpu()
    weight, _, reduction = reading(loss)
    mask = counted(loss, targets)
    if mask is None:
        return torch.ones(len(targets), dtype=torch.float64, device=targets.device)
    if weight is None or reduction == "sum":
        return mask.double()
    known = targets.long().clamp(0, len(weight) - 1)
    return weight.detach().to(targets.device, torch.float64)[known] * mask


def share(
    loss: LossFunction, part: torch.Tensor, whole: torch.Tensor, ignored: bool = True
) -> float:
    """The factor of the loss of `part` in the loss of the batch `whole` that contains it.

    The batch's loss is the sum of its parts' losses, each times its share. ignored: False if the
    caller knows that the loss ignores no label of them.
    """
    weight, ignore_index, reduction = reading(loss)
    if reduction == "sum":
        return float(len(part) > 0)
    if weight is None and (ignore_index is None or not ignored):
        return len(part) / len(whole)
    return float(weights(loss, part).sum() / weights(loss, whole).sum())


def mean(
    loss: LossFunction,
    values: Sequence[float],
    targets: torch.Tensor,
    batch_size: int,
    finite: bool = True,
) -> float:
    """The loss of all samples, from the losses of their batches of `batch_size`.

    targets: of all samples, in the order of the batches. A batch with only ignored labels has no
    loss and does not count. finite: raise FloatingPointError for the first batch whose loss is not
    finite. The result is NaN if no sample counts.
    """
    sums, some = _batches(loss, targets, batch_size)
    total, is_sum = 0.0, reading(loss).reduction == "sum"
    for step, (value, weight, counts) in enumerate(zip(values, sums, some, strict=False)):
        if not counts:
            continue
        if finite and not math.isfinite(value):
            raise FloatingPointError(f"the loss is {value} at step {step + 1}")
        total += value if is_sum else value * weight
    return total / sum(sums) if sum(sums) else math.nan


def _batches(loss, targets: torch.Tensor, batch_size: int) -> tuple[list[float], list[bool]]:
    """(sums of the weights of each batch, True for each batch with a label that counts)."""
    count = len(targets)  # of a tensor, too slow for a loop over the batches
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    mask = counted(loss, targets)
    plain = mask is None or (reading(loss).weight is None and bool(mask.all()))
    if mask is None or plain or not sizes:
        return [float(size) for size in sizes], [True] * len(sizes)
    shares = weights(loss, targets)
    rows = torch.stack([shares, mask.to(shares)])
    padded = torch.nn.functional.pad(rows, (0, len(sizes) * batch_size - count))
    sums, counts = padded.view(2, len(sizes), batch_size).sum(2).tolist()
    return sums, [count > 0 for count in counts]


def right(loss: LossFunction, predictions: torch.Tensor, targets: torch.Tensor) -> tuple[int, int]:
    """(correct predictions, labels) of the labels (N,) that the loss does not ignore."""
    mask, hits = counted(loss, targets), predictions == targets
    if mask is None:
        return int(hits.sum()), len(targets)
    return int((hits & mask).sum()), int(mask.sum())


def aligned(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Numbers (N,) as a column (N, 1) if the outputs are (N, 1), else the targets unchanged.

    Without the column, the loss would broadcast them to (N, N).
    """
    if not target.is_floating_point():
        return target
    column = (*target.shape, 1)
    return target.view(column) if output.shape == column else target
