"""A torch scheduler inside a training: when it steps, which metric it gets, how it is resumed."""

import copy
import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer, lr_scheduler

from .state import copied
from .stopping import watched

INTERVALS = ("epoch", "step")
_PER_STEP = (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR)  # torch defines them per batch
# Schedulers that change nothing but the rates, and call no function of the user.
_CALM = (
    lr_scheduler.ConstantLR,
    lr_scheduler.CosineAnnealingLR,
    lr_scheduler.CosineAnnealingWarmRestarts,
    lr_scheduler.ExponentialLR,
    lr_scheduler.LinearLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.PolynomialLR,
    lr_scheduler.SequentialLR,
    lr_scheduler.StepLR,
)


class Plan(NamedTuple):
    """The training for which a named schedule is made.

    epochs: of the whole training. steps: of an epoch. warmup: epochs in which the rate rises to its
    full value.
    """

    epochs: int
    steps: int
    warmup: int = 0

    def warmed(self, make: Callable[[Optimizer, int], Any]) -> Callable[[Optimizer], Any]:
        """A function of the optimizer: a warm-up in equal steps, then the scheduler of `make`.

        make: called with the optimizer and the number of epochs after the warm-up.
        """

        def both(optimizer: Optimizer) -> Any:
            if not self.warmup:
                return make(optimizer, self.epochs)
            start = 1 / (self.warmup + 1)
            rise = lr_scheduler.LinearLR(optimizer, start, 1.0, self.warmup)
            after = make(optimizer, self.epochs - self.warmup)
            return lr_scheduler.SequentialLR(optimizer, [rise, after], [self.warmup])

        return both


def _constant(plan: Plan) -> Callable[[Optimizer], Any] | None:
    def make(optimizer, epochs):
        return lr_scheduler.ConstantLR(optimizer, 1.0, epochs)

    return plan.warmed(make) if plan.warmup else None


def _cosine(plan: Plan) -> Callable[[Optimizer], Any]:
    return plan.warmed(lr_scheduler.CosineAnnealingLR)


def _step(plan: Plan) -> Callable[[Optimizer], Any]:
    return plan.warmed(lambda o, epochs: lr_scheduler.StepLR(o, max(1, epochs // 3), 0.1))


def _plateau(plan: Plan) -> Callable[[Optimizer], Any]:
    if plan.warmup:
        raise ValueError("schedule plateau has no warm-up; leave one of the two out")
    return lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=_PATIENCE)


def _one_cycle(plan: Plan) -> Callable[[Optimizer], Any]:
    def make(optimizer):
        return lr_scheduler.OneCycleLR(
            optimizer,
            # In a resumed optimizer, "lr" is that of the last step.
            [group.get("max_lr", group["lr"]) for group in optimizer.param_groups],
            total_steps=plan.epochs * plan.steps,
            pct_start=plan.warmup / plan.epochs or _RISE,
            cycle_momentum=False,
        )

    return make


class Named(NamedTuple):
    """A row of SCHEDULES.

    about: one line for people. make: called with a Plan, returns a function of the optimizer, as
    `Trainer.fit` takes it, or None if the rate is constant. ends: True if it has a last epoch.
    moves: True if it changes the rate.
    """

    about: str
    make: Callable[[Plan], Callable[[Optimizer], Any] | None]
    ends: bool = False
    moves: bool = True


SCHEDULES: dict[str, Named] = {
    "constant": Named("the same rate", _constant, moves=False),
    "cosine": Named("down to 0 along a cosine", _cosine, ends=True),
    "step": Named("a tenth after each third of the epochs", _step),
    "plateau": Named("a tenth when the loss has not fallen for 3 epochs", _plateau),
    "onecycle": Named("up to the rate and down to almost 0, step by step", _one_cycle, ends=True),
}
_PATIENCE = 3  # epochs that `plateau` waits before it lowers the rate
_RISE = 0.3  # the share of `onecycle` in which the rate rises, as in torch


def known(name: str) -> Named:
    """The row of SCHEDULES with this name. ValueError, which lists them, for an unknown name."""
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}; known: {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


def named(name: str, plan: Plan) -> Callable[[Optimizer], Any] | None:
    """A schedule for `Trainer.fit`: a function of the optimizer, or None if the rate is constant.

    ValueError for an unknown name, for a warm-up that is not shorter than the training, and for a
    schedule that has no warm-up.
    """
    if not 0 <= plan.warmup < max(plan.epochs, 1):
        raise ValueError(
            f"the warm-up must be shorter than the {plan.epochs} epochs, got {plan.warmup}"
        )
    return known(name).make(plan)


class Schedule:
    """A scheduler of the trainer's optimizer, and the times at which it steps.

    scheduler: a torch scheduler, or a function of the optimizer that makes one. interval: "epoch",
    or "step" (after each batch). None is "step" for OneCycleLR and CyclicLR, else "epoch".
    """

    def __init__(
        self, scheduler: Any, optimizer: torch.optim.Optimizer, interval: str | None = None
    ):
        if interval not in (None, *INTERVALS):
            raise ValueError(
                f"fit: interval must be one of {', '.join(INTERVALS)}, got {interval!r}"
            )
        self.given = scheduler
        self.made: dict[str, str] | None = None
        if isinstance(scheduler, type) or not hasattr(scheduler, "step"):
            if not callable(scheduler):
                raise TypeError(
                    "fit: scheduler must be a torch scheduler, or a function of the optimizer, "
                    f"got {scheduler!r}"
                )
            scheduler = scheduler(optimizer)
            if not hasattr(scheduler, "step"):
                raise TypeError(f"fit: the scheduler's function returned {scheduler!r}")
            self.made = _settings(scheduler.state_dict())
        if getattr(scheduler, "optimizer", optimizer) is not optimizer:
            raise ValueError(
                "fit: the scheduler belongs to another optimizer than the trainer's; make it for "
                "trainer.optimizer, or give fit a function of the optimizer"
            )
        self.scheduler, self.interval = scheduler, interval
        self.per_step = interval == "step" or (
            interval is None and isinstance(scheduler, _PER_STEP)
        )
        self.takes_metric = "metrics" in inspect.signature(type(scheduler).step).parameters
        if self.per_step and self.takes_metric:
            raise ValueError(
                f"fit: {self.name} needs an epoch's loss, but its interval is 'step'; give 'epoch'"
            )

    @property
    def name(self) -> str:
        """The name of the scheduler's class."""
        return type(self.scheduler).__name__

    @property
    def is_known_ahead(self) -> bool:
        """True if the rates of later epochs are known now, and to step ahead has no other effect.

        Each scheduler inside another one must be such a scheduler too.
        """
        return _is_calm(self.scheduler)

    def is_of(self, scheduler: Any, interval: str | None) -> bool:
        """True if this schedule was made from this same scheduler or function."""
        return self.interval == interval and (
            scheduler is self.given or scheduler is self.scheduler
        )

    def is_again(self, before: "Schedule") -> bool:
        """True if a function made an equal scheduler to that of an earlier schedule."""
        return self.made is not None and (self.name, self.made, self.interval) == (
            before.name,
            before.made,
            before.interval,
        )

    def check(self, steps: int) -> None:
        """ValueError if the scheduler ends before `steps` more of its steps."""
        total = getattr(self.scheduler, "total_steps", math.inf)
        done = getattr(self.scheduler, "last_epoch", 0)
        if isinstance(total, int) and done + steps > total:
            raise ValueError(
                f"fit: {self.name} has total_steps={total}, but this training steps it "
                f"{done + steps} times, once {'a batch' if self.per_step else 'an epoch'}; give it "
                f"total_steps={done + steps}, or another interval"
            )

    def after_step(self) -> None:
        """Step the scheduler if it steps after each batch."""
        if self.per_step:
            self.scheduler.step()

    def after_epoch(self, row: dict) -> None:
        """Step the scheduler if it steps after each epoch.

        A scheduler that takes a metric gets the row's loss, or the accuracy in mode "max", see
        `stopping.watched`.
        """
        if self.per_step:
            return
        if not self.takes_metric:
            self.scheduler.step()
            return
        kind = "accuracy" if getattr(self.scheduler, "mode", "min") == "max" else "loss"
        _, metric = watched(row, kind)
        if metric is None:
            raise ValueError(
                f"fit: {self.name} with mode='max' needs the accuracy, but these targets are no "
                "labels; use mode='min' for the loss"
            )
        self.scheduler.step(metric)

    def state_dict(self) -> dict:
        """The state for resuming: that of the scheduler, and its class's name."""
        state = copy.deepcopy(self.scheduler.state_dict())
        return {"name": self.name, "state": state, "made": self.made}

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`.

        ValueError if it is of a scheduler of another class or with other settings.
        """
        if state["name"] != self.name:
            raise ValueError(
                f"fit: the state is of a {state['name']}, but the scheduler given is a {self.name}"
            )
        before = state["made"]
        if self.made is not None and before is not None and self.made != before:
            pairs = [(key, before.get(key), value) for key, value in self.made.items()]
            key, was, now = next(pair for pair in pairs if pair[1] != pair[2])
            raise ValueError(
                f"fit: the state is of a {self.name} with {key} {was}, but the scheduler given has "
                f"{now}; give the same, or load the state with state['scheduler'] = None"
            )
        self.scheduler.load_state_dict(copy.deepcopy(state["state"]))


def _is_calm(scheduler: Any) -> bool:
    if type(scheduler) is lr_scheduler.OneCycleLR:
        return not scheduler.cycle_momentum
    inner = getattr(scheduler, "_schedulers", ())
    return type(scheduler) in _CALM and all(map(_is_calm, inner)) and "step" not in vars(scheduler)


def _settings(state: dict) -> dict[str, str]:
    """A new scheduler's state as texts, without values that depend on the current rates."""
    kept = {key: value for key, value in state.items() if key != "_last_lr"}
    if isinstance(kept.get("_schedulers"), list):
        kept["_schedulers"] = [_settings(inner) for inner in kept["_schedulers"]]
    return {key: repr(value) for key, value in kept.items()}


def options_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    """The options of each parameter group, which schedulers change: all but the parameters."""
    return [
        {name: copied(value) for name, value in group.items() if name != "params"}
        for group in optimizer.param_groups
    ]


def restore_options(optimizer: torch.optim.Optimizer, options: list[dict]) -> None:
    """Restore `options_of`, after a new scheduler has written its first values."""
    for group, numbers in zip(optimizer.param_groups, options, strict=True):
        group.update(copy.deepcopy(numbers))
