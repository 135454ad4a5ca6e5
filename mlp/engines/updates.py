"""Updates of the manual step: in the backward, by an optimizer of ours, or by another optimizer.

An update object is made for each epoch. `finish(gradient)` runs the backward and the update.
`numbers()` returns the numbers that a recording of `finish` would freeze. If it returns None, a
recording must stop before the update, and `apply()` updates.

An update uses two things of our optimizers. `update(grads)` takes a step. `parts()` are parameters
that a kernel can update instead.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch

import kernels

from ..net import Net
from ..optim import OPTIMIZERS, Part
from . import takeover
from .precision import clip


class Separate:
    """The backward stores the gradients in the net, then an optimizer of ours updates from them.

    named: name -> parameter. The parameters are the objects that the optimizer holds.
    """

    def __init__(self, net: Net, optimizer: torch.optim.Optimizer, named: dict):
        self.net, self.named = net, named
        self.optimizer: Any = optimizer  # one of ours, except in `Foreign`
        self.parts: list[Part] | None = None

    @functools.cached_property
    def grads(self) -> list:
        """The net's gradients in the optimizer's order, None for parameters that the net lacks.

        The first access allocates them.
        """
        found = {id(p): self.net.grads.get(name) for name, p in self.named.items()}
        return [found.get(id(p)) for p in parameters(self.optimizer)]

    def finish(self, gradient: torch.Tensor) -> None:
        """Run the backward from the gradient of the outputs, then update."""
        self.net.backward(gradient)
        self.apply()

    def apply(self) -> None:
        """Update from the gradients that the net holds."""
        self.optimizer.update(self.grads)

    def numbers(self) -> tuple | None:
        """The optimizer's numbers, or None if a recording must not freeze them."""
        if self.parts is None:
            self.parts = self.optimizer.parts()
        found = [part.frozen() for part in self.parts]
        return None if any([numbers is None for numbers in found]) else tuple(found)


class Inline(Separate):
    """The update in the epilogue of the backward, which stores no gradients."""

    def __init__(self, net: Net, part: Part, named: dict):
        super().__init__(net, part.optimizer, named)
        self.part = part
        self._written: tuple | None = None
        self._row = torch.empty(0)

    def finish(self, gradient: torch.Tensor) -> None:
        """Run backward and update in one."""
        part, step = self.part, self.part.advance()
        self.net.update(gradient, part.states(), self._hyper(gradient.device), step, part.rule)

    def _hyper(self, device: torch.device) -> torch.Tensor | tuple:
        """The part's numbers as they are now. On a GPU a tensor, written when they change."""
        numbers = self.part.numbers
        if device.type == "cpu":
            return numbers
        if self._written != numbers:
            self._written = numbers
            self._row = table([numbers], device)[0]
        return self._row


class Foreign(Separate):
    """An optimizer that reads .grad: one of torch's, or one of ours with a changed step."""

    def __init__(self, net: Net, optimizer: torch.optim.Optimizer, named: dict):
        super().__init__(net, optimizer, named)
        self.parameters = parameters(optimizer)

    def apply(self) -> None:
        """Put the gradients into .grad and call the optimizer's step."""
        for p, gradient in zip(self.parameters, self.grads):
            p.grad = gradient
        self.optimizer.step()

    def numbers(self) -> tuple | None:
        """None, because it is unknown what another optimizer does."""
        return None


class Clipped(Separate):
    """Another update, after the norm of all gradients is scaled down to a limit."""

    def __init__(self, update: Separate, limit: float):
        super().__init__(update.net, update.optimizer, update.named)
        self.update, self.limit = update, limit

    def apply(self) -> None:
        """Clip the gradients that the net holds, and update from them."""
        clip(self.grads, self.limit)
        self.update.apply()

    def numbers(self) -> tuple | None:
        """None, so that a recording stops before the gradients are clipped."""
        return None


class InMemory(Separate):
    """The update with all numbers and counts of the optimizer in device memory, for a CUDA graph.

    `write` copies the current values there. `advance` counts the steps that replays took.

    parts: of the optimizer. numbers: for each part one row, or a table with a row for each step.
    position: a one-element tensor, the index of the next step's row.
    """

    def __init__(self, update: Separate, parts: list, numbers: list, position: torch.Tensor):
        super().__init__(update.net, update.optimizer, update.named)
        # With several parts, some parameters are at another step, such as their first. The backward
        # can take only one step for all.
        self.inline = isinstance(update, Inline) and len(parts) == 1
        given: dict = {}
        if not self.inline:
            given = {id(p): g for p, g in zip(parameters(self.optimizer), update.grads)}
        self.live: list[Part] = parts
        self.position = position
        self.grads = [[given.get(id(p)) for p in part.parameters] for part in parts]
        self.tables = [table.clone() for table in numbers]
        self.counts = [torch.zeros(1, device=position.device) for _ in parts]

    def write(self, parts: list, counts: list, numbers: list) -> None:
        """Copy the current parts, counts and numbers."""
        self.live = parts
        own = *self.counts, *self.tables
        for kept, given in zip(own, (*counts, *numbers), strict=True):
            kept.copy_(given)

    def finish(self, gradient: torch.Tensor) -> None:
        """Run backward and update, in one if the original update did so."""
        for count in self.counts:
            count += 1
        rows = [
            table.index_select(0, self.position)[0] if table.dim() > 1 else table
            for table in self.tables
        ]
        if self.inline:
            (part,), (row,), (count,) = self.live, rows, self.counts
            self.net.update(gradient, part.states(), row, count, part.rule)
            return
        self.net.backward(gradient)
        for part, grads, row, count in zip(self.live, self.grads, rows, self.counts):
            parameters = [p.detach() for p in part.parameters]
            lists = parameters, grads, part.states()
            kernels.apply_rule(part.rule, *lists, row.unbind(), count, maximize=part.maximize)

    def advance(self, steps: int) -> None:
        """Count so many steps."""
        for part in self.live:
            part.advance(steps)


def table(
    rows: Sequence[Sequence[float]], device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(rows, columns) on the device: a part's numbers, for kernels or compiled code to read."""
    return torch.tensor(rows, dtype=dtype, device=device)


def parameters(optimizer: torch.optim.Optimizer) -> list:
    """All parameters of an optimizer, in the order of its groups."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def whole(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> Part | None:
    """An optimizer of ours as one part with exactly these parameters, or None.

    The result is also None if a number is in device memory, or if steps go along the gradient.
    """
    ours: Any = optimizer
    parts = ours.parts() if type(optimizer) in OPTIMIZERS.values() else []
    if len(parts) != 1:
        return None
    (part,) = parts
    if part.maximize or any([isinstance(number, torch.Tensor) for number in part.numbers]):
        return None
    same = [p.data_ptr() for p in part.parameters] == [p.data_ptr() for p in parameters]
    return part if same else None


def choose(
    net: Net, optimizer: torch.optim.Optimizer, named: dict, clip_norm: float | None = None
) -> Separate:
    """The update of this net by this optimizer.

    named: name -> parameter. The parameters are the objects that the optimizer holds. clip_norm:
    the largest norm of all gradients together, or None. With a limit, the gradients are stored.
    """
    is_foreign = takeover.optimizer(optimizer) is not None
    inlines = not is_foreign and clip_norm is None and len(net.stages) == 1
    part = whole(optimizer, named.values()) if inlines else None
    on_kernels = kernels.backend(next(iter(net.parameters.values()))) == "triton"
    # Without kernels, an inline update is faster only if the rule takes its step within the
    # gradient's matrix product.
    if part is not None and (on_kernels or part.rule.product_ref is not None):
        return Inline(net, part, named)
    update = (Foreign if is_foreign else Separate)(net, optimizer, named)
    return update if clip_norm is None else Clipped(update, clip_norm)
