"""How the manual step updates the parameters: in the backward, by our optimizer, or by another one.

An update is made for an epoch. `finish(gradient)` runs the backward and updates; `numbers()` gives
what a recording of that would freeze, or None if a recording must stop before the update, which is
then `apply()`.

Of one of our optimizers an update uses two things: `update(grads)` takes a step, and `parts()` are
the parameters that a kernel can update in its place.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch

import kernels

from ..net import Net
from ..optim import OPTIMIZERS, Part
from . import takeover
from .precision import clip


class Separate:
    """Gradients into the net, then one of our optimizers updates from them.

    named: name -> parameter, as the optimizer holds them.
    """

    def __init__(self, net: Net, optimizer: torch.optim.Optimizer, named: dict):
        self.net, self.named = net, named
        self.optimizer: Any = optimizer  # ours, but in `Foreign`
        self.parts: list[Part] | None = None

    @functools.cached_property
    def grads(self) -> list:
        """The net's gradients in the optimizer's order; None for what is no parameter of it. They
        are made when they are first asked for.
        """
        found = {id(p): self.net.grads.get(name) for name, p in self.named.items()}
        return [found.get(id(p)) for p in parameters(self.optimizer)]

    def finish(self, gradient: torch.Tensor) -> None:
        """Backward from the gradient of the outputs, and the update."""
        self.net.backward(gradient)
        self.apply()

    def apply(self) -> None:
        """The update from the gradients that are in the net."""
        self.optimizer.update(self.grads)

    def numbers(self) -> tuple | None:
        """The optimizer's numbers, if they can be frozen."""
        if self.parts is None:
            self.parts = self.optimizer.parts()
        found = [part.frozen() for part in self.parts]
        return None if any([numbers is None for numbers in found]) else tuple(found)


class Inline(Separate):
    """The update in the epilogue of the backward: gradients are not stored."""

    def __init__(self, net: Net, part: Part, named: dict):
        super().__init__(net, part.optimizer, named)
        self.part = part
        self._written: tuple | None = None
        self._row = torch.empty(0)

    def finish(self, gradient: torch.Tensor) -> None:
        """Backward and update in one."""
        part, step = self.part, self.part.advance()
        self.net.update(gradient, part.states(), self._hyper(gradient.device), step, part.rule)

    def _hyper(self, device: torch.device) -> torch.Tensor | tuple:
        """The part's numbers as they are now; on a GPU a row, written when they change."""
        numbers = self.part.numbers
        if device.type == "cpu":
            return numbers
        if self._written != numbers:
            self._written = numbers
            self._row = torch.tensor(numbers, dtype=torch.float32, device=device)
        return self._row


class Foreign(Separate):
    """An optimizer that reads .grad: torch's own, and ours where its step was changed."""

    def __init__(self, net: Net, optimizer: torch.optim.Optimizer, named: dict):
        super().__init__(net, optimizer, named)
        self.parameters = parameters(optimizer)

    def apply(self) -> None:
        """Hand the gradients to .grad and step."""
        for p, gradient in zip(self.parameters, self.grads):
            p.grad = gradient
        self.optimizer.step()

    def numbers(self) -> tuple | None:
        """Never frozen: what another optimizer does is not ours to know."""
        return None


class Clipped(Separate):
    """Another update, of gradients whose norm is brought down to a limit before."""

    def __init__(self, update: Separate, limit: float):
        super().__init__(update.net, update.optimizer, update.named)
        self.update, self.limit = update, limit

    def apply(self) -> None:
        """Clip what is in the net, and update from it."""
        clip(self.grads, self.limit)
        self.update.apply()

    def numbers(self) -> tuple | None:
        """Never frozen: a recording stops at the gradients."""
        return None


class InMemory(Separate):
    """The update with every number and count of the optimizer in device memory, for a CUDA graph:
    `write` brings them up to date, and `advance` takes note of the steps that replays made.

    parts: of the optimizer. numbers: of each part a row, or a table of which row `position`, a
    one-element tensor, is the next step's.
    """

    def __init__(self, update: Separate, parts: list, numbers: list, position: torch.Tensor):
        super().__init__(update.net, update.optimizer, update.named)
        # A first step of some parameters alone is no part of the backward.
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
        """Parts, counts and numbers as they are now."""
        self.live = parts
        own = *self.counts, *self.tables
        for kept, given in zip(own, (*counts, *numbers), strict=True):
            kept.copy_(given)

    def finish(self, gradient: torch.Tensor) -> None:
        """Backward and update, in one where it was."""
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
        """Take note of so many steps."""
        for part in self.live:
            part.advance(steps)


def parameters(optimizer: torch.optim.Optimizer) -> list:
    """All parameters of an optimizer, group after group."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def whole(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]) -> Part | None:
    """One of our optimizers as one part that has just these parameters, or None.

    None also where a number of it lies in device memory, or steps go along the gradient.
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
    """The update of this net by this optimizer. named: name -> parameter, as the optimizer holds
    them. clip_norm: the largest norm of all gradients together; they are stored then.
    """
    is_foreign = takeover.optimizer(optimizer) is not None
    inlines = not is_foreign and clip_norm is None and len(net.stages) == 1
    part = whole(optimizer, named.values()) if inlines else None
    on_kernels = kernels.path(next(iter(net.parameters.values()))) == "triton"
    # Without kernels it gains only where the step is a product.
    if part is not None and (on_kernels or part.rule.product_ref is not None):
        return Inline(net, part, named)
    update = (Foreign if is_foreign else Separate)(net, optimizer, named)
    return update if clip_norm is None else Clipped(update, clip_norm)
