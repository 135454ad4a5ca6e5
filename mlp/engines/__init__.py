"""The table of engines.

All engines train on the same batches in the same order. Their losses agree to rounding.

`refuses` of an engine returns the reason why it cannot serve a network, or None. A trainer then
builds the engine and calls its `epoch` once for each epoch. To add one, write a class with `name`,
`refuses` and `epoch`, and put it into the table. "auto" takes the last engine that serves.
"""

import torch

from ..loss import LossFunction
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
    loss: LossFunction,
    optimizer: torch.optim.Optimizer,
    batch_size: int = 1,
    demands: Demands | None = None,
    steps: int | None = None,
) -> tuple[Engine, str]:
    """(the engine, one line that says why it was chosen).

    name: a key of ENGINES, or "auto" for the last engine that serves. steps: the number of steps of
    the training, if known. "auto" then passes over engines whose start costs more than they save.
    ValueError for an unknown name, for a network on the meta device, and if no engine serves.
    """
    if name != "auto" and name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}; known: auto, {', '.join(ENGINES)}")
    if any(p.is_meta for p in parameters_of(model).values()):
        raise ValueError(
            "the network is on the device meta, where nothing has values; move it to the data's"
        )
    demands = demands or Demands()
    candidates = list(ENGINES) if name == "auto" else [name]
    refusals: list[str] = []
    for candidate in reversed(candidates):
        kind = ENGINES[candidate]
        reason = kind.refuses(model, loss, optimizer, batch_size) or kind.cannot(
            demands, model, loss
        )
        if reason is None and name == "auto" and steps is not None:
            reason = kind.costs(model, loss, optimizer, batch_size, steps)
        if reason is None:
            note = f"engine {candidate}" + (f" ({'; '.join(refusals)})" if refusals else "")
            engine = kind(model, loss, optimizer)
            engine.demands, engine.planned = demands, steps
            return engine, note
        refusals.append(reason)
    raise ValueError("; ".join(refusals))
