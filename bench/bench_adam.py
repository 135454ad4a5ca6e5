"""A training step of the small reference network with Adam, by every engine and by the variants of
torch.optim.Adam.
"""

from functools import partial

import torch

import mlp

from .rivals import Captured, Eager
from .table import Table
from .training import ours, table


def run() -> Table:
    """µs a step, of the host and of the device, and the ratio to eager with the fused Adam."""
    adam = partial(torch.optim.Adam, lr=1e-3)
    constructors = {
        "eager, fused": partial(Eager, optimizer=partial(adam, fused=True)),
        "eager": partial(Eager, optimizer=adam),
        "eager, fused, CUDA graph": partial(
            Captured, optimizer=partial(adam, fused=True, capturable=True)
        ),
        **ours(partial(mlp.Adam, lr=1e-3)),
    }
    note = "Only our engines count correct predictions and check every loss."
    return table("Training step with Adam", "python -m bench adam", constructors, 1e-3, note)
