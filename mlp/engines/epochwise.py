"""The engine `epoch`: an epoch is one launch, or on a CPU one call of compiled code.

The launch is `kernels.train_epoch`, the call is that of `kernels.cpu`. Nothing is read back before
the end of the epoch, and no gradients are stored. `Fused` is the common base of `epoch` and
`graph`.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

import kernels
from kernels import cpu

from .. import loss as losses
from ..data.dataset import Dataset
from ..net import Net
from ..optim import Part
from ..state import parameters_of
from . import means, takeover, updates
from .stepwise import Demands, Engine, EpochResult


def spec_of(
    model: Net | torch.nn.Module, loss: Any, rule: kernels.Rule | None, weighs: bool = False
) -> kernels.Spec | str:
    """The description of network, loss and rule for the training kernels.

    If the kernels cannot train them, the result is a string that says why. rule: see `rule_of`.
    weighs: True if the caller multiplies the losses of rows by `loss.row_weights`.
    """
    describe: Any = getattr(model, "config", None)
    config: dict[str, Any] = describe() if describe else {"kind": type(model).__name__}
    if config["kind"] != "mlp":
        return f"trains multilayer perceptrons, got {config['kind']}"
    parameters = list(parameters_of(model).values())
    if reason := _wrong_dtype(parameters):
        return reason
    criterion = _criterion(loss, config["sizes"][-1], parameters[0].detach() if weighs else None)
    if isinstance(criterion, str):
        return criterion
    if rule is None:
        return (
            "trains with one parameter group of mlp's optimizers, all of them after as many steps"
        )
    return kernels.Spec(
        tuple(config["sizes"]),
        config["activation"],
        config["output_activation"],
        config["bias"],
        **criterion,
        rule=rule,
    )


def _wrong_dtype(parameters: list[torch.Tensor]) -> str | None:
    """The reason why neither kernels nor compiled code train such parameters, or None.

    The kernels serve float32. The compiled epoch of a CPU serves float64 too.
    """
    first, found = parameters[0], {p.dtype: None for p in parameters}
    if len(found) > 1:
        return f"trains networks of one dtype, got {' and '.join(map(str, found))}"
    if first.dtype == torch.float32 or cpu.serves(first):
        return None
    double = torch.empty(0, dtype=torch.float64, device=first.device)
    served = "float32 and float64" if cpu.serves(double) else "float32"
    return f"trains {served} networks, got {first.dtype}"


def _wrong_states(
    optimizer: torch.optim.Optimizer, parameters: Iterable[torch.Tensor]
) -> str | None:
    """The reason why the optimizer's states do not fit the parameters, or None.

    After `model.double()` they are float32 still. Compiled code would round them at each call.
    """
    for p in parameters:
        for name, state in optimizer.state.get(p, {}).items():
            if getattr(state, "shape", None) == p.shape and state.dtype != p.dtype:
                return (
                    f"trains states of the parameters' dtype {p.dtype}, but {name} is "
                    f"{state.dtype}; make a new optimizer"
                )
    return None


def rule_of(model: Net | torch.nn.Module, optimizer: torch.optim.Optimizer) -> kernels.Rule | None:
    """The rule that updates all parameters of the model, or None if there is not just one."""
    part = updates.whole(optimizer, parameters_of(model).values())
    return None if part is None else part.rule


def _criterion(loss, classes: int, like: torch.Tensor | None) -> dict | str:
    """The fields of `kernels.Spec` for a loss of `mlp.loss`, or the reason why there are none."""
    if hasattr(loss, "criterion"):
        return loss.criterion(classes, like)
    return f"takes the losses {', '.join(losses.LOSSES)}, got {type(loss).__name__}"


class Trained(NamedTuple):
    """What an epoch trains: network, loss and optimizer as they are at its start."""

    spec: kernels.Spec
    part: Part  # its parameters are those of the network, in the same order


class Fused(Engine):
    """The base of `epoch` and `graph`: model, optimizer and data in the form for the kernels."""

    reads_ahead = True

    @property
    def spec(self) -> kernels.Spec | str:
        """Network, loss and optimizer as they are now, see `spec_of`."""
        return spec_of(self.model, self.loss, rule_of(self.model, self.optimizer))

    def count(self, part: Part) -> torch.Tensor:
        """The count of steps taken, as one number on the device. The kernels increase it.

        Call this before the states are made, because after that a first step looks like any other.
        """
        taken, device = part.taken, part.parameters[0].device
        if isinstance(taken, torch.Tensor):
            return taken.detach().to(device, torch.float32).reshape(1).clone()
        return torch.full((1,), float(taken), device=device)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The network's current parameters, detached."""
        return [p.detach() for p in parameters_of(self.model).values()]

    def targets(self, data: Dataset, outputs: int) -> torch.Tensor:
        """The targets in the form for the kernels: numbers have a column for each output."""
        return self.loss.columns(data.targets, outputs).contiguous()

    @classmethod
    def cannot(
        cls,
        demands: Demands,
        model: Net | torch.nn.Module | None = None,
        loss: Any = None,
    ) -> str | None:
        """See `Engine.cannot`. A launch updates before a norm is known, and counts every label."""
        if demands.clip_norm is not None:
            return (
                f"{cls.name}: updates a layer before the others have gradients, so it cannot clip "
                "the norm of them all"
            )
        if demands.ignored:
            return f"{cls.name}: counts every label, but the loss ignores some of them"
        return super().cannot(demands, model, loss)

    @classmethod
    def differs(
        cls, model: Net | torch.nn.Module, loss: Any, optimizer: torch.optim.Optimizer
    ) -> str | None:
        """The reason why the kernels may not replace this network, loss or optimizer, or None."""
        return takeover.network(model) or takeover.criterion(loss) or takeover.optimizer(optimizer)

    def numbers(self, parts: list[Part], steps: int) -> list[torch.Tensor]:
        """The numbers of these parts of the optimizer, in device memory for the kernels.

        Each part has a row with its current numbers. If the scheduler changes them at each step,
        each part has a table with a row for each of so many steps. ValueError if the scheduler
        changes a momentum to or from 0, because that changes the rule.
        """
        per_step, rules = self.demands.per_step, [part.rule for part in parts]
        tables: list[list] = [[] for _ in parts]
        if self.moves is not None:
            for part in parts:
                part.advance(0)  # torch's schedulers check that a step was taken
        for step in range(steps if per_step else 1):
            for part, rule, rows in zip(parts, rules, tables):
                if part.rule is not rule:
                    raise ValueError(
                        f"{self.name}: the schedule moves {rule.name} to {part.rule.name} at step "
                        f"{step + 1} of the epoch, but one launch takes all steps by one rule; use "
                        "engine 'manual'"
                    )
                rows.append([float(number) for number in part.numbers])
            if per_step and self.moves is not None:
                self.moves()
        like = parts[0].parameters[0]
        made = [updates.table(rows, like.device, like.dtype) for rows in tables]
        return made if per_step else [rows[0] for rows in made]

    def run(
        self,
        trained: Trained,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        count: torch.Tensor,
        numbers: torch.Tensor,
    ) -> kernels.Run:
        """An epoch of this training in the form for the kernels."""
        return kernels.Run(
            trained.spec,
            [p.detach() for p in trained.part.parameters],
            trained.part.states(),
            data.inputs,
            self.targets(data, trained.spec.sizes[-1]),
            order,
            batch_size,
            numbers,
            count,
            data.scale,
            data.shift,
            weights=self.loss.row_weights(data.targets, trained.part.parameters[0].detach()),
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
        """The epoch's measures. Losses and counts are read back here, once.

        FloatingPointError names the first step whose loss is not finite.
        """
        found = values.tolist()
        result = self.result(found, None, data, order, batch_size)
        if on_step is not None:
            on_step(len(found))
        if not data.is_classification:
            return result
        counted = len(order)
        if self.demands.ignored:
            mask = means.counted(self.loss, data.targets[order])
            counted = counted if mask is None else max(int(mask.sum()), 1)
        return result._replace(accuracy=int(correct.sum()) / counted)


class Epoch(Fused):
    """Trains an epoch in one launch. On a CPU it is one call of compiled code and needs numba."""

    name = "epoch"
    _checked: takeover.Checked | None = None  # the network, as it was when it was last checked

    @staticmethod
    def described(
        model: Net | torch.nn.Module, loss: Any, rule: kernels.Rule | None
    ) -> kernels.Spec | str:
        """See `spec_of`. On a CPU, rows may have weights."""
        first = next(iter(parameters_of(model).values())).detach()
        return spec_of(model, loss, rule, weighs=cpu.serves(first))

    @classmethod
    def cannot(
        cls,
        demands: Demands,
        model: Net | torch.nn.Module | None = None,
        loss: Any = None,
    ) -> str | None:
        """As `Fused.cannot`. But the compiled epoch of a CPU leaves out the labels that its row of
        the table of losses ignores. It knows weights of rows, but not of a row's probabilities.
        """
        if demands.soft:
            return "epoch: multiplies rows by class weights, but the targets are probabilities"
        if demands.ignored and model is not None:
            on_cpu = cpu.serves(next(iter(parameters_of(model).values())).detach())
            row = getattr(loss, "row", None)
            if on_cpu and row is not None and means.reading(loss).ignore_index == row.ignored:
                demands = demands._replace(ignored=False)
        return super().cannot(demands, model, loss)

    @classmethod
    def refuses(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int = 1,
    ) -> str | None:
        return cls._refuses(cls.differs(model, loss, optimizer), model, loss, optimizer, batch_size)

    @classmethod
    def _refuses(
        cls,
        differs: str | None,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
    ) -> str | None:
        """As `refuses`. differs: the reason why the kernels may not replace them, or None."""
        first = next(iter(parameters_of(model).values())).detach()
        on_cpu = cpu.serves(first)
        if not on_cpu and kernels.backend(first) != "triton":
            if first.device.type == "cpu" and first.dtype in cpu.DTYPES:
                return f"epoch: {cpu.NEEDS}"
            if first.dtype == torch.float32:
                return "epoch: needs a GPU"
        spec = differs or cls.described(model, loss, rule_of(model, optimizer))
        if isinstance(spec, str):
            return f"epoch: {spec}"
        if reason := _wrong_states(optimizer, parameters_of(model).values()):
            return f"epoch: {reason}"
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
        spec = cls.described(model, loss, rule_of(model, optimizer))
        assert not isinstance(spec, str)  # `refuses` would have said so
        if not cpu.serves(first):
            return kernels.outgrown(spec, batch_size, "epoch")
        reason = cpu.costs(spec.sizes, batch_size, steps, first.dtype)
        return None if reason is None else f"epoch: {reason}"

    def still_serves(self, batch_size: int) -> bool:
        model, loss, optimizer = parts = self.model, self.loss, self.optimizer
        if self._checked is None or not self._checked.holds(model):
            self._checked = takeover.Checked.of(model)
            return self.refuses(*parts, batch_size) is None
        differs = takeover.criterion(loss) or takeover.optimizer(optimizer)
        return self._refuses(differs, *parts, batch_size) is None

    def _trained(self) -> Trained:
        part = updates.whole(self.optimizer, parameters_of(self.model).values())
        spec = self.described(self.model, self.loss, None if part is None else part.rule)
        assert part is not None and not isinstance(spec, str)  # `refuses` checked it
        return Trained(spec, part)

    @torch.no_grad()
    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None = None,
    ) -> EpochResult:
        now = self._trained()
        part = now.part
        count, steps = self.count(part), math.ceil(len(order) / batch_size)
        (numbers,) = self.numbers([part], steps)
        before, run = int(count), self.run(now, data, order, batch_size, count, numbers)
        alone = cpu.train_epoch if cpu.serves(run.parameters[0]) else kernels.train_epoch
        train = self.together or alone
        try:
            values, correct = train(run)
        finally:
            part.advance(int(count) - before)
        return self.measured(values, correct, data, order, batch_size, on_step)

    @property
    def runs_ahead(self) -> bool:
        """True on a CPU, where one call prepares several epochs."""
        first = next(iter(parameters_of(self.model).values())).detach()
        return self.together is None and cpu.serves(first)

    @torch.no_grad()
    def epochs(
        self,
        data: Dataset,
        orders: torch.Tensor,
        batch_size: int,
        found: list[EpochResult],
        after_epoch: Callable[[], None] | None = None,
    ) -> None:
        now = self._trained()
        part = now.part
        count, steps = self.count(part), math.ceil(orders.shape[1] / batch_size)
        if after_epoch is None or self.demands.per_step:
            (numbers,) = self.numbers([part], len(orders) * steps)
        else:
            numbers = self._numbers_of_epochs(part, len(orders), steps, after_epoch)
        first = numbers if numbers.dim() == 1 else numbers[:steps]
        run = self.run(now, data, orders[0], batch_size, count, first)
        before, trained = int(count), cpu.epochs(run, orders, numbers)

        def note(epoch: int) -> None:
            results = trained.losses[epoch], trained.correct[epoch]
            found.append(self.measured(*results, data, orders[epoch], batch_size, None))

        try:
            trained.train(note)
        finally:
            part.advance(int(count) - before)

    def _numbers_of_epochs(
        self, part: Part, epochs: int, steps: int, after_epoch: Callable[[], None]
    ) -> torch.Tensor:
        """(steps of all epochs, columns): the optimizer's numbers under a schedule for each epoch.

        The scheduler is stepped through these epochs.
        """
        rows = []
        for _ in range(epochs):
            rows += self.numbers([part], 1)
            after_epoch()
        return torch.stack(rows).repeat_interleave(steps, 0)
