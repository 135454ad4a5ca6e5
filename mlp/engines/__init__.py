"""The table of engines: all train on the same batches in the same order.

Their losses agree to rounding.

An engine says in `refuses` why it cannot serve a network, else it is built and its `epoch` called
once an epoch. To add one: a class with `name`, `refuses` and `epoch`, and its place in the table:
"auto" takes the last that serves.
"""

from typing import Any

import torch

from ..net import Net
from .epochwise import Epoch
from .graphs import Graph
from .lean import Lean
from .stepwise import Autograd, Demands, Diverged, Engine, EpochResult, Manual, parameters_of

__all__ = [
    "ENGINES",
    "Autograd",
    "Demands",
    "Diverged",
    "Engine",
    "Epoch",
    "EpochResult",
    "Graph",
    "Lean",
    "Manual",
    "choose",
    "parameters_of",
]

ENGINES: dict[str, type[Engine]] = {
    engine.name: engine for engine in (Lean, Autograd, Manual, Graph, Epoch)
}


def choose(
    name: str,
    model: Net | torch.nn.Module,
    loss: Any,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 1,
    demands: Demands | None = None,
    steps: int | None = None,
) -> tuple[Engine, str]:
    """The engine of that name, or under "auto" the last of ENGINES that serves, and that pays for
    so many steps if their number is known; and one line that says why.
    """
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; known: auto, {', '.join(ENGINES)}")
    demands = demands or Demands()
    candidates = list(ENGINES) if name == "auto" else [name]
    refusals: list[str] = []
    for candidate in reversed(candidates):
        kind = ENGINES[candidate]
        reason = kind.refuses(model, loss, optimizer, batch_size) or kind.cannot(demands)
        if reason is None and name == "auto" and steps is not None:
            reason = kind.costs(model, loss, optimizer, batch_size, steps)
        if reason is None:
            note = f"engine {candidate}" + (f" ({'; '.join(refusals)})" if refusals else "")
            engine = kind(model, loss, optimizer)
            engine.demands = demands
            return engine, note
        refusals.append(reason)
    raise ValueError("; ".join(refusals))
