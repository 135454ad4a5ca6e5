"""torch's optimizers with one launch a step, and gradients that may be handed in; and Lion.

They are torch's classes: arguments, defaults, parameter groups, state_dict and learning-rate
schedulers are torch's own. Only the update differs: it is a row of `kernels.RULES`. `foreach` and
`fused` have no effect; `differentiable`, `amsgrad` and `centered` are refused.

To add one: its row in kernels/rules.py, and a class here that says which row serves a parameter
group. The row's names of states and hyperparameters are torch's.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import kernels
from kernels import launch
from kernels.ops.optim import apply_checked

Gradients = Sequence[torch.Tensor | None] | dict[str, torch.Tensor | None]


class Part(NamedTuple):
    """Parameters of one group that have taken as many steps: what a launch can update.

    taken: that many, a number or a one-element tensor; 1 where torch's class counts none. numbers:
    the rule's row as it is now.
    """

    rule: kernels.Rule
    maximize: bool
    parameters: list
    states: list
    taken: Any
    numbers: tuple


_REFUSED = ("differentiable", "amsgrad", "centered")


# Its classes are torch's as well; at run time each of them brings its own.
if TYPE_CHECKING:
    from torch.optim import Optimizer as _Torch
else:
    _Torch = object


class _Ruled(_Torch):
    """A torch optimizer whose update is a row of `kernels.RULES`: what its classes share."""

    counted = True  # whether the state of a parameter has a "step", as torch's class keeps it

    def row(self, group: dict) -> kernels.Rule:
        """The row of `kernels.RULES` that updates this parameter group."""
        raise NotImplementedError

    def initial(self, group: dict) -> float:
        """What states are filled with before the first step."""
        return 0.0

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's classes announce it under fused=True, and GradScaler then leaves it to the step to
        # unscale gradients and to skip infinite ones. Ours leaves that to GradScaler.
        return False

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        pass

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        grads: Gradients | None = None,
    ) -> Any:
        """Updates every parameter from its .grad, or from `grads`.

        grads: a sequence or dict in the parameters' order.

        A parameter whose gradient is None is left alone, as in torch. Returns the closure's loss,
        if one is given.
        """
        # torch wraps hooks and a profiler's record around every step, which on a CPU costs as much
        # as a small update. Here only a step that has a hook or a profiler pays for them. A
        # subclass with a step of its own has them around that one.
        if self._is_followed() and type(self).step is _Ruled.step:
            return _followed_step(self, closure, grads=grads)
        return self._step(closure, grads=grads)

    step.hooked = True  # type: ignore[attr-defined]  # what torch asks before it wraps a step

    def _is_followed(self) -> bool:
        """Whether a hook, a profiler or a compiler takes note of this step."""
        if torch.compiler.is_compiling():  # which cannot trace the other questions
            return True
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or launch.profiled()
        )

    def _step(
        self, closure: Callable[[], Any] | None = None, *, grads: Gradients | None = None
    ) -> Any:
        """`step` without what torch does around it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(grads)
        return loss

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; a refused option is a ValueError."""
        self._refuse({**self.defaults, **param_group})
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; the state of an optimizer with a refused option is a ValueError.

        Step counts that are not for CUDA graphs go to the CPU: reading one on a GPU would wait.
        """
        for group in state_dict["param_groups"]:
            self._refuse(group)
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                if isinstance(state.get("step"), torch.Tensor) and not group.get("capturable"):
                    state["step"] = state["step"].cpu()

    def _refuse(self, group: dict) -> None:
        name = type(self).__name__
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"{name}: {option}=True is not supported; use torch.optim.{name}")

    def rule(self, parameters: Iterable[torch.Tensor]) -> kernels.Rule | None:
        """The row of `kernels.RULES` that updates just these parameters, or None.

        None also if a number of it lies in device memory, or if some have taken more steps than
        others.
        """
        group = self.param_groups[0]
        if type(self) not in OPTIMIZERS.values() or len(self.param_groups) > 1:
            return None
        if group["maximize"] or not self._on_host(group):
            return None
        same = [p.data_ptr() for p in group["params"]] == [p.data_ptr() for p in parameters]
        together = len({self._taken(p)[0] for p in group["params"]}) == 1
        return self.row(group) if same and together else None

    def constants(self) -> tuple | None:
        """What an update depends on besides parameters, gradients and states.

        None while that changes from step to step, or may change unseen.
        """
        groups = self.param_groups
        if self.counted or not all(self._on_host(group) for group in groups):
            return None
        if any(self._fresh(group, p) for group in groups for p in group["params"]):
            return None
        return tuple((self.row(group), self._numbers(group), group["maximize"]) for group in groups)

    def hyper(self, device: torch.device) -> torch.Tensor | tuple:
        """The row's numbers as they are now, see `kernels.hyperparameters`.

        On a GPU it is always the same tensor, rewritten.
        """
        (group,) = self.param_groups
        rule, numbers = self.row(group), self._numbers(group)
        if device.type == "cpu":
            return numbers
        known = self.__dict__.setdefault("_rows", {})
        written, row = known.get((rule, device), (None, None))
        if written != numbers:
            values = torch.tensor(numbers, dtype=torch.float32)
            row = values.to(device) if row is None else row.copy_(values)
            known[rule, device] = numbers, row
        return row

    def states(self, capturable: bool = False) -> tuple[list, torch.Tensor]:
        """(lists of states as the training kernels take them, count of steps taken), made if there
        are none. capturable: step counts go to the parameters' device.
        """
        (group, *_), params = self.param_groups, self._params()
        fresh = any(self._fresh(g, p) for g in self.param_groups for p in g["params"])
        for g in self.param_groups:
            if self.counted:
                g["capturable"] = g.get("capturable", False) or capturable
            self._make(g, g["params"])
        count = torch.full((1,), 0.0 if fresh else 1.0, device=params[0].device)
        if self.counted:
            if capturable:
                for p in params:
                    self.state[p]["step"] = self.state[p]["step"].to(p.device)
            step = self.state[params[0]]["step"].detach()
            count = step.to(params[0].device).reshape(1).clone()
        return [[self.state[p][name] for p in params] for name in self.row(group).states], count

    def parts(self, parameters: list | None = None) -> list[Part]:
        """All parameters, or these, in parts that are updated together; states are made, if there
        are none.
        """
        chosen = None if parameters is None else {id(p) for p in parameters}
        found = []
        for group in self.param_groups:
            params = [p for p in group["params"] if chosen is None or id(p) in chosen]
            self._make(group, params)
            rule, numbers = self.row(group), self._numbers(group)
            together: dict[int | None, tuple[Any, list]] = {}
            for p in params:
                key, taken = self._taken(p)
                together.setdefault(key, (taken, []))[1].append(p)
            for taken, members in together.values():
                states = [[self.state[p][name] for p in members] for name in rule.states]
                found.append(Part(rule, group["maximize"], members, states, taken, numbers))
        return found

    def _taken(self, p):
        """(what parameters with as many steps share, that many); of counts in device memory one
        serves all: they advance together.
        """
        if not self.counted:
            return 1, 1
        count = self.state.get(p, {}).get("step", 0)
        on_device = isinstance(count, torch.Tensor) and count.device.type != "cpu"
        return (None, count) if on_device else (int(count), int(count))

    def advance(self, steps: int, parameters: list | None = None) -> None:
        """Take note of steps that a training kernel made, of all parameters, or of these."""
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        if self.counted:
            states = [self.state[p] for p in parameters or self.state]
            torch._foreach_add_([state["step"] for state in states], steps)

    def inline(self) -> tuple:
        """Counts a step that the backward takes itself: (states, hyper, step, rule).

        See `Net.update`.
        """
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        (group,) = self.param_groups
        params = group["params"]
        step = self._next_steps(group, params)[0]
        lists = [[self.state[p][name] for p in params] for name in self.row(group).states]
        return lists, self.hyper(params[0].device), step, self.row(group)

    def update(self, grads: Gradients | None = None) -> None:
        """`step` without torch's hooks and profiler record around it: what the engines call."""
        handed = grads.values() if isinstance(grads, dict) else grads
        given_all = None if handed is None else list(handed)
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        count = len(self._params())
        if given_all is not None and len(given_all) != count:
            raise ValueError(
                f"{type(self).__name__}: {count} parameters but {len(given_all)} gradients"
            )
        if torch.is_grad_enabled():
            with torch.no_grad():
                self._update_groups(given_all)
        else:
            self._update_groups(given_all)

    def _update_groups(self, given_all: list | None) -> None:
        """One step of every group, from these gradients or, if None, from .grad."""
        start = 0
        for group in self.param_groups:
            params = group["params"]
            given = (
                [p.grad for p in params]
                if given_all is None
                else given_all[start : start + len(params)]
            )
            start += len(params)
            if any([g is None for g in given]):
                params = [p for p, g in zip(params, given) if g is not None]
                given = [g for g in given if g is not None]
            if params:
                self._update(group, params, given)

    def _update(self, group, params, grads):
        """One launch for the parameters that take the same step."""
        rule, numbers = self.row(group), self._numbers(group)
        kernels.check_update(type(self).__name__, params, grads)
        steps = self._next_steps(group, params)
        kept = [self.state[p] for p in params] if rule.states else []
        states = [[state[name] for state in kept] for name in rule.states]
        # Of counts in device memory one serves all: they advance together.
        if isinstance(steps[0], torch.Tensor) or steps.count(steps[0]) == len(steps):
            lists = params, grads, states
            apply_checked(rule, *lists, numbers, steps[0], maximize=group["maximize"])
            return
        together: dict = {}
        for i, step in enumerate(steps):
            together.setdefault(step, []).append(i)
        for step, members in together.items():
            lists = [[ts[i] for i in members] for ts in (params, grads, *states)]
            apply_checked(
                rule, lists[0], lists[1], lists[2:], numbers, step, maximize=group["maximize"]
            )

    def _next_steps(self, group, params) -> list:
        """The count of this step for each parameter, taken note of: numbers, or device tensors.

        Where torch's class counts none, 1 for a first step, else 2.
        """
        if not self.counted:
            if not self.row(group).states:
                return [2] * len(params)
            fresh = [self._fresh(group, p) for p in params]
            if any(fresh):
                self._make(group, params)
            return [1 if first else 2 for first in fresh]
        self._make(group, params)
        counts = [self.state[p]["step"] for p in params]
        torch._foreach_add_(counts, 1)
        # No host read on a device, nor of fake tensors.
        if group.get("capturable") or not launch.plain(*counts):
            return counts
        return [int(count) for count in counts]

    def _fresh(self, group, p) -> bool:
        """Whether a state of this parameter is missing, or None as older torch saved it."""
        state = self.state.get(p, {})
        return any([state.get(name) is None for name in self.row(group).states])

    def _make(self, group, params) -> None:
        names = self.row(group).states
        if not (self.counted or names):
            return
        for p in params:
            state = self.state[p]
            if self.counted and "step" not in state:
                on = p.device if group.get("capturable") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=on)
            for name in names:
                if state.get(name) is None:
                    like = torch.preserve_format
                    state[name] = torch.full_like(p, self.initial(group), memory_format=like)

    def _params(self) -> list:
        return [p for group in self.param_groups for p in group["params"]]

    def _hyperparameters(self, group) -> dict:
        """The rule's hyperparameters.

        Those in CPU memory become numbers, so that kernels may have them.
        """
        given = {name: group[name] for name, _ in self.row(group).hyperparameters}
        return {name: _number(value) for name, value in given.items()}

    def _on_host(self, group) -> bool:
        values = self._hyperparameters(group).values()
        return not any(isinstance(v, torch.Tensor) for value in values for v in _spread(value))

    def _numbers(self, group) -> tuple:
        """The row's numbers; what lies in device memory stays there.

        Kept while the group holds the very same numbers. Those in tensors and lists may change
        where they are, so they are read each time.
        """
        rule = self.row(group)
        given = [group[name] for name, _ in rule.hyperparameters]
        kept = self.__dict__.setdefault("_numbers_of", {})
        made = kept.get(id(group))
        if made is not None and made[0] is rule and all(map(operator.is_, made[1], given)):
            return made[2]
        row = kernels.row_of(rule, **self._hyperparameters(group))
        if all(type(v) in (float, int) for value in given for v in _spread(value)):
            kept[id(group)] = rule, given, row
        return row


# `step` as torch makes it of a class's own: with its hooks and its profiler's record.
_followed_step = torch.optim.Optimizer.profile_hook_step(_Ruled._step)


def _spread(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _number(value):
    """A hyperparameter that is a tensor on the CPU as a number, a pair element by element."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_number, value))
    on_host = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return float(value) if on_host and launch.plain(value) else value


class SGD(_Ruled, torch.optim.SGD):
    """`torch.optim.SGD`: momentum, dampening, weight decay, Nesterov, maximize.

    lr: a number, or a tensor on the device.
    """

    counted = False

    def row(self, group: dict) -> kernels.Rule:
        """Plain, momentum or Nesterov."""
        if not group["momentum"]:
            return kernels.RULES["sgd"]
        return kernels.RULES["nesterov" if group["nesterov"] else "momentum"]


class Adam(_Ruled, torch.optim.Adam):
    """`torch.optim.Adam`.

    With capturable=True the step counts live on the device, for CUDA graphs.
    """

    def row(self, group: dict) -> kernels.Rule:
        """Adam, or AdamW where decoupled_weight_decay is set."""
        return kernels.RULES["adamw" if group.get("decoupled_weight_decay") else "adam"]


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`: Adam whose weight decay does not pass through the moments."""

    def row(self, group: dict) -> kernels.Rule:
        """AdamW."""
        return kernels.RULES["adamw"]


class RMSprop(_Ruled, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, with momentum or without; `centered` is refused."""

    def row(self, group: dict) -> kernels.Rule:
        """With momentum or without."""
        return kernels.RULES["rmsprop_momentum" if group["momentum"] else "rmsprop"]


class Adagrad(_Ruled, torch.optim.Adagrad):
    """`torch.optim.Adagrad`: lr_decay, weight decay, initial_accumulator_value, maximize."""

    def row(self, group: dict) -> kernels.Rule:
        """Adagrad."""
        return kernels.RULES["adagrad"]

    def initial(self, group: dict) -> float:
        """The sums' initial value."""
        return group["initial_accumulator_value"]


class Lion(_Ruled, torch.optim.Optimizer):
    """Lion (Chen et al. 2023): steps of one size, in the direction of the sign of an average.

    lr is usually 3 to 10 times smaller than Adam's, weight_decay as many times larger. betas: of
    the average that is stepped along, and of the one that is kept. ValueError: lr, a beta or
    weight_decay out of range.
    """

    counted = False

    def __init__(
        self,
        params: Any,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
    ):
        if not lr >= 0:
            raise ValueError(f"Lion: the learning rate must be at least 0, got {lr}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"Lion: betas must be in [0, 1), got {betas}")
        if not weight_decay >= 0:
            raise ValueError(f"Lion: weight_decay must be at least 0, got {weight_decay}")
        options = {"betas": betas, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, {"lr": lr, **options})

    def row(self, group: dict) -> kernels.Rule:
        """Lion."""
        return kernels.RULES["lion"]


OPTIMIZERS = {
    "sgd": SGD,
    "adam": Adam,
    "adamw": AdamW,
    "lion": Lion,
    "rmsprop": RMSprop,
    "adagrad": Adagrad,
}
