"""Losses, forward and backward through autograd, against torch.nn.functional."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

import kernels

from .harness import compare, conclude, microseconds
from .table import Table, device

CLASSES = {  # rows and classes
    "cpu": ((32, 10), (256, 1000), (64, 50_000)),
    "cuda": ((32, 10), (8192, 1000), (4096, 32_768), (4096, 131_072)),
}
NUMBERS = {"cpu": ((32, 10), (256, 100)), "cuda": ((32, 10), (8192, 1000))}  # rows and outputs
OF_NUMBERS = {
    "mse": (kernels.mse_loss, F.mse_loss),
    "huber": (kernels.huber_loss, F.huber_loss),
    "bce": (kernels.binary_cross_entropy_with_logits, F.binary_cross_entropy_with_logits),
}


def _of_classes(classes: int, on: torch.device) -> dict[str, tuple[Callable, Callable]]:
    """Ours and torch's cross-entropy for each kind of options."""
    kinds: dict[str, dict] = {
        "cross_entropy": {},
        "cross_entropy, class weights": {"weight": torch.rand(classes, device=on) + 0.1},
        "cross_entropy, smoothing 0.1": {"label_smoothing": 0.1},
    }
    return {
        name: (partial(kernels.cross_entropy, **options), partial(F.cross_entropy, **options))
        for name, options in kinds.items()
    }


def _provider(function, outputs, target):
    def run():
        return torch.autograd.grad(function(outputs, target), outputs)

    return run


def _row(loss, functions, outputs, target) -> tuple[dict, dict[str, str]]:
    """A row of the table, and what was computed wrong."""
    ours, torchs = functions
    providers = {
        "handgrad": _provider(ours, outputs, target),
        "eager": _provider(torchs, outputs, target),
    }
    if outputs.is_cuda:
        providers["compile"] = _provider(torch.compile(torchs), outputs, target)
    found: dict[str, str] = {}
    times = compare(providers, 2e-3, found)
    rows, width = outputs.shape
    wrong = {f"{name}, {loss}, {rows} × {width}": why for name, why in found.items()}
    seconds = times["handgrad"]
    bandwidth = {"handgrad GB/s": 4 * outputs.nbytes / seconds / 1e9} if seconds else {}
    shape = {"loss": loss, "rows": rows, "outputs": width}
    return {**shape, **microseconds(times, "eager"), **bandwidth}, wrong


def run() -> Table:
    """µs of forward and backward for each loss and shape.

    GB/s counts the outputs four times, twice read and twice written.
    """
    on = device()
    table = Table("Losses, forward and backward", "python -m bench losses")
    wrong: dict[str, str] = {}
    cases = [
        (name, functions, shape, torch.randint(shape[1], shape[:1], device=on))
        for shape in CLASSES[on.type]
        for name, functions in _of_classes(shape[1], on).items()
    ]
    cases += [
        (name, functions, shape, torch.rand(shape, device=on))
        for shape in NUMBERS[on.type]
        for name, functions in OF_NUMBERS.items()
    ]
    for name, functions, shape, target in cases:
        outputs = torch.randn(shape, device=on, requires_grad=True)
        row, failed = _row(name, functions, outputs, target)
        table.rows.append(row)
        wrong |= failed
    conclude(table, wrong)
    return table
