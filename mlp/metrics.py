"""Measures of a classifier, by scikit-learn.

They are top-1 and top-k accuracy, the accuracy of each class, and the confusion matrix.
"""

import warnings
from collections.abc import Iterator
from typing import Any

import torch

from .data import Dataset, needs_extra
from .engines import means
from .engines.threads import ALONE, threads
from .net import Net
from .state import in_mode, parameters_of

# Rows that are measured at once: on a CPU so few that their inputs stay in its caches.
_ROWS, _ROWS_ON_CPU = 4096, 1024


@torch.no_grad()
def outputs(
    model: Net | torch.nn.Module,
    data: Dataset,
    rows: int | None = None,
    shape: tuple[int, ...] | None = None,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(outputs, targets) of consecutive pieces of `rows` samples, in evaluation mode.

    rows: None takes what is fast on the network's device. shape: of a sample, if the module does
    not take flat rows.
    """
    parameters = parameters_of(model).values()
    first = next(iter(parameters))
    forward = model.predict if isinstance(model, Net) else model
    rows = rows or _at_once(first.device)
    largest = min(rows, len(data)) * max(p.numel() for p in parameters)
    alone = first.device.type == "cpu" and largest <= ALONE
    with in_mode(model, False), threads(1 if alone else None):
        for x, y in data.to(first.device).chunks(rows, first.dtype):
            yield forward(x if shape is None else x.view(len(x), *shape)), y


def _at_once(device: torch.device) -> int:
    return _ROWS_ON_CPU if device.type == "cpu" else _ROWS


def measure(
    model: Net | torch.nn.Module, loss: Any, data: Dataset, shape: tuple[int, ...] | None = None
) -> dict:
    """{"test_loss", "test_accuracy"} of a data set, in evaluation mode, on the network's device.

    The accuracy is None if the targets are no labels. Labels that the loss ignores do not count.
    """
    values, found = [], []
    rows = _at_once(next(iter(parameters_of(model).values())).device)
    for output, y in outputs(model, data, rows, shape):
        values.append(float(loss(output, means.aligned(y, output))))
        if data.is_classification:
            found.append(output.argmax(1))
    result = means.mean(loss, values, data.targets, rows, finite=False)
    if not data.is_classification:
        return {"test_loss": result, "test_accuracy": None}
    correct, counted = means.right(loss, torch.cat(found), data.targets)
    return {"test_loss": result, "test_accuracy": correct / max(counted, 1)}


def probabilities(model: Net | torch.nn.Module, loss: Any, data: Dataset) -> torch.Tensor:
    """The probability of each class, (N, classes) float32 on the CPU.

    The loss converts outputs into probabilities.
    """
    return torch.cat([loss.probabilities(out).float().cpu() for out, _ in outputs(model, data)])


def classification(scores: torch.Tensor, data: Dataset, k: int = 5) -> dict:
    """{"accuracy", "top_k", "k", "per_class": {name: accuracy}, "confusion"}.

    scores: (N, classes), on the CPU. In the confusion matrix, rows are true classes and columns
    predicted ones. A class without samples has accuracy None. ValueError unless k is from 1 to the
    number of classes.
    """
    try:
        from sklearn import metrics
    except ImportError:
        raise needs_extra("scikit-learn", "measuring a classifier") from None
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"top-k: k must be 1 to {scores.shape[1]}, the number of classes, got {k}")
    labels = range(len(data.classes))
    targets, predicted = data.targets.cpu().numpy(), scores.argmax(1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # scikit-learn warns of a single class, but its 1 × 1 matrix is right
        confusion = metrics.confusion_matrix(targets, predicted, labels=labels)
    top_k = (
        1.0
        if k >= len(data.classes)
        else float((scores.topk(k, 1).indices == data.targets.cpu()[:, None]).any(1).float().mean())
    )
    return {
        "accuracy": float(metrics.accuracy_score(targets, predicted)),
        "top_k": top_k,
        "k": k,
        "per_class": {
            n: int(r[i]) / int(r.sum()) if r.sum() else None
            for i, (n, r) in enumerate(zip(data.classes, confusion))
        },
        "confusion": confusion.tolist(),
    }
