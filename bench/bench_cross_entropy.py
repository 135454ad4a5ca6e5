"""Softmax cross-entropy, forward and backward, against torch.nn.functional with autograd."""

import torch
import torch.nn.functional as F

import kernels

from .harness import compare, conclude, microseconds
from .table import Table, device

SHAPES = {
    "cpu": ((32, 10), (256, 1000), (64, 50_000)),
    "cuda": ((32, 10), (8192, 1000), (4096, 32_768), (4096, 131_072)),
}


def _provider(function, logits, target):
    def run():
        return torch.autograd.grad(function(logits, target), logits)

    return run


def run() -> Table:
    """µs of forward and backward for each number of rows and classes.

    GB/s counts the logits four times, twice read and twice written.
    """
    on = device()
    table = Table("Softmax cross-entropy, forward and backward", "python -m bench cross_entropy")
    wrong = {}
    for rows, classes in SHAPES[on.type]:
        logits = torch.randn(rows, classes, device=on, requires_grad=True)
        target = torch.randint(0, classes, (rows,), device=on)
        providers = {
            "handgrad": _provider(kernels.cross_entropy, logits, target),
            "eager": _provider(F.cross_entropy, logits, target),
        }
        if on.type == "cuda":
            providers["compile"] = _provider(torch.compile(F.cross_entropy), logits, target)
        found = {}
        times = compare(providers, 2e-3, found)
        wrong |= {f"{name}, {rows} × {classes}": why for name, why in found.items()}
        bandwidth = (
            {"handgrad GB/s": 4 * logits.nbytes / times["handgrad"] / 1e9}
            if times["handgrad"]
            else {}
        )
        table.rows.append(
            {"rows": rows, "classes": classes, **microseconds(times, "eager"), **bandwidth}
        )
    conclude(table, wrong)
    return table
