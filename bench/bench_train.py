"""A training step of the small reference network with SGD, by every engine, by eager PyTorch and by
its faster ways.
"""

from functools import partial

import torch

import mlp

from .rivals import Captured, Compiled, Eager
from .table import Table
from .training import ours, table

MODES = ("default", "reduce-overhead", "max-autotune")


def run() -> Table:
    """µs a step, of the host and of the device, and the ratio to eager.

    The network is 784-100-50-10 with sigmoid, at batch 32.
    """
    sgd = partial(torch.optim.SGD, lr=0.1)
    constructors = {
        "eager": partial(Eager, optimizer=sgd),
        "eager, CUDA graph": partial(Captured, optimizer=sgd),
        **ours(partial(mlp.SGD, lr=0.1)),
        **{f"compile, {mode}": partial(Compiled, optimizer=sgd, mode=mode) for mode in MODES},
    }
    note = "Only our engines count correct predictions and check every loss."
    return table("Training step with SGD", "python -m bench train", constructors, 1e-4, note)
