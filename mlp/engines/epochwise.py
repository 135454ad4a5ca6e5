"""The engine `epoch`: one launch, or on a CPU one call of compiled code.

The launch is kernels.train_epoch, the call is mlp.cpu's. Also here: what it shares with `graph`,
the kernels' view of a training.

Nothing is read back before the epoch's end, and no gradients are stored.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

import kernels

from .. import cpu
from .. import loss as losses
from ..data.dataset import Dataset
from ..net import Net
from ..optim import Part
from ..state import parameters_of
from . import takeover, updates
from .stepwise import Demands, Engine, EpochResult


def spec_of(
    model: Net | torch.nn.Module, loss: Any, rule: kernels.Rule | None
) -> kernels.Spec | str:
    """What the training kernels call this network, loss and rule; or, in words, why they have no
    name for it. rule: see `rule_of`.
    """
    describe: Any = getattr(model, "config", None)
    config: dict[str, Any] = describe() if describe else {"kind": type(model).__name__}
    if config["kind"] != "mlp":
        return f"trains multilayer perceptrons, got {config['kind']}"
    others = [p.dtype for p in parameters_of(model).values() if p.dtype != torch.float32]
    if others:
        return f"trains float32 networks, got {others[0]}"
    criterion = _criterion(loss, config["sizes"][-1])
    if isinstance(criterion, str):
        return criterion
    if rule is None:
        return "trains with one parameter group of mlp's optimizers, all of it with as many steps"
    return kernels.Spec(
        tuple(config["sizes"]),
        config["activation"],
        config["output_activation"],
        config["bias"],
        **criterion,
        rule=rule,
    )


def rule_of(model: Net | torch.nn.Module, optimizer: torch.optim.Optimizer) -> kernels.Rule | None:
    """The one rule that updates all parameters of the model alike, or None."""
    part = updates.whole(optimizer, parameters_of(model).values())
    return None if part is None else part.rule


def _criterion(loss, classes: int) -> dict | str:
    """A loss of `mlp.loss` as the training kernels take it."""
    if hasattr(loss, "criterion"):
        return loss.criterion(classes)
    return f"takes the losses {', '.join(losses.LOSSES)}, got {type(loss).__name__}"


class Fused(Engine):
    """What `epoch` and `graph` share: the kernels' view of model, optimizer and data."""

    reads_ahead = True

    @property
    def spec(self) -> kernels.Spec | str:
        """Network, loss and optimizer as they are now, see `spec_of`."""
        return spec_of(self.model, self.loss, rule_of(self.model, self.optimizer))

    @property
    def part(self) -> Part:
        """The optimizer as it is now, for the kernels to update in its place."""
        part = updates.whole(self.optimizer, parameters_of(self.model).values())
        assert part is not None  # `refuses` would have said so
        return part

    def count(self, part: Part) -> torch.Tensor:
        """Steps taken, one number on the device, for the kernels to count on.

        Ask before the states are made: after that, a first step is not known as one.
        """
        taken, device = part.taken, part.parameters[0].device
        if isinstance(taken, torch.Tensor):
            return taken.detach().to(device, torch.float32).reshape(1).clone()
        return torch.full((1,), float(taken), device=device)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The network's parameters where they lie now."""
        return [p.detach() for p in parameters_of(self.model).values()]

    def targets(self, data: Dataset) -> torch.Tensor:
        """The targets as the kernels take them: numbers have a column for each output."""
        outputs = self.model.config()["sizes"][-1]
        return self.loss.columns(data.targets, outputs).contiguous()

    @classmethod
    def cannot(cls, demands: Demands) -> str | None:
        """Launches of many steps update before the norm is known, and count every label."""
        if demands.clip_norm is not None:
            return (
                f"{cls.name}: updates a layer before the others have gradients, so it cannot clip "
                "the norm of them all"
            )
        if demands.ignored:
            return f"{cls.name}: counts every label, but the loss ignores some of them"
        return super().cannot(demands)

    @classmethod
    def differs(
        cls, model: Net | torch.nn.Module, loss: Any, optimizer: torch.optim.Optimizer
    ) -> str | None:
        """Why the kernels may not stand for this network, loss and optimizer."""
        return takeover.network(model) or takeover.criterion(loss) or takeover.optimizer(optimizer)

    def numbers(self, parts: list[Part], steps: int) -> list[torch.Tensor]:
        """The numbers of these parts of the optimizer, for the kernels to read: rows as they are
        now, or tables with a row for each of so many steps, if the scheduler moves them in between.

        ValueError: a momentum that the scheduler moves to or from 0, which is another rule.
        """
        per_step, rules = self.demands.per_step, [part.rule for part in parts]
        tables: list[list] = [[] for _ in parts]
        for part in parts:
            part.advance(0)  # torch's schedulers ask whether a step was taken
        for step in range(steps if per_step else 1):
            for part, rule, rows in zip(parts, rules, tables):
                if part.rule is not rule:
                    raise ValueError(
                        f"{self.name}: the schedule moves {rule.name} to {part.rule.name} at step "
                        f"{step} of the epoch, but one launch takes all steps by one rule; use "
                        "engine 'manual'"
                    )
                rows.append([float(number) for number in part.numbers])
            if per_step and self.moves is not None:
                self.moves()
        device = parts[0].parameters[0].device
        made = [updates.table(rows, device) for rows in tables]
        return made if per_step else [rows[0] for rows in made]

    def run(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        states: list[list[torch.Tensor]],
        count: torch.Tensor,
        numbers: torch.Tensor,
    ) -> kernels.Run:
        """This training as the kernels take it."""
        spec = self.spec
        assert not isinstance(spec, str)  # `refuses` would have said so
        return kernels.Run(
            spec,
            self.parameters,
            states,
            data.inputs,
            self.targets(data),
            order,
            batch_size,
            numbers,
            count,
            data.scale,
            data.shift,
        )

    def measured(
        self,
        values: torch.Tensor,
        correct: torch.Tensor,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None,
    ) -> EpochResult:
        """The epoch's losses and counts, read back once.

        FloatingPointError names the first step that is not finite.
        """
        found = values.tolist()
        result = self.result(found, None, data, order, batch_size)
        if on_step is not None:
            on_step(len(found))
        if not data.is_classification:
            return result
        return result._replace(accuracy=int(correct.sum()) / len(order))


class Epoch(Fused):
    """One launch trains the whole epoch; on a CPU one call of compiled code, which needs numba."""

    name = "epoch"

    @classmethod
    def refuses(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int = 1,
    ) -> str | None:
        first = next(iter(parameters_of(model).values())).detach()
        on_cpu = cpu.serves(first)
        if not on_cpu and kernels.backend(first) != "triton" and first.dtype == torch.float32:
            return f"epoch: {cpu.NEEDS if first.device.type == 'cpu' else 'needs a GPU'}"
        spec = cls.differs(model, loss, optimizer) or spec_of(
            model, loss, rule_of(model, optimizer)
        )
        if isinstance(spec, str):
            return f"epoch: {spec}"
        return None if on_cpu else kernels.refusal(spec, batch_size, "epoch")

    @classmethod
    def costs(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        steps: int,
    ) -> str | None:
        first = next(iter(parameters_of(model).values())).detach()
        spec = spec_of(model, loss, rule_of(model, optimizer))
        assert not isinstance(spec, str)  # `refuses` would have said so
        if not cpu.serves(first):
            return kernels.outgrown(spec, batch_size, "epoch")
        reason = cpu.costs(spec.sizes, batch_size, steps)
        return None if reason is None else f"epoch: {reason}"

    @torch.no_grad()
    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None = None,
    ) -> EpochResult:
        part = self.part
        count, steps = self.count(part), math.ceil(len(order) / batch_size)
        (numbers,) = self.numbers([part], steps)
        before, run = int(count), self.run(data, order, batch_size, part.states(), count, numbers)
        alone = cpu.train_epoch if cpu.serves(run.parameters[0]) else kernels.train_epoch
        train = self.together or alone
        try:
            values, correct = train(run)
        finally:
            part.advance(int(count) - before)
        return self.measured(values, correct, data, order, batch_size, on_step)
