"""torch's optimizers with one launch a step, and gradients that may be handed in; and Lion.

They are torch's classes: arguments, defaults, parameter groups, state_dict and learning-rate
schedulers are torch's own. Only the update differs: it is a row of `kernels.RULES`. `foreach` and
`fused` have no effect; `differentiable`, `amsgrad` and `centered` are refused.

To add one: its row in kernels/rules.py, and a class here that says which row serves a parameter
group. The row's names of states and hyperparameters are torch's.
"""

import functools
import operator
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

import kernels
from kernels import launch
from kernels.ops.optim import apply_checked

Gradients = Sequence[torch.Tensor | None] | dict[str, torch.Tensor | None]


class Part:
    """Parameters of one group that have taken as many steps: what a launch can update.

    The parameters stay the same. All else is read from the optimizer when it is asked for.
    """

    __slots__ = ("group", "optimizer", "parameters")

    def __init__(self, optimizer: "_Ruled", group: dict, parameters: list[torch.Tensor]):
        self.optimizer, self.group, self.parameters = optimizer, group, parameters

    @property
    def rule(self) -> kernels.Rule:
        """The row of `kernels.RULES` that updates them."""
        return self.optimizer.row(self.group)

    @property
    def maximize(self) -> bool:
        """Whether steps go along the gradient."""
        return self.group["maximize"]

    @property
    def numbers(self) -> tuple:
        """The rule's row of numbers, see `kernels.row_of`. Those in device memory stay tensors."""
        return self.optimizer._numbers(self.group)

    def states(self) -> list[list[torch.Tensor]]:
        """A list for each of the rule's states, in the parameters' order. Missing ones are made."""
        self.optimizer._make(self.group, self.parameters)
        kept = [self.optimizer.state[p] for p in self.parameters]
        return [[state[name] for state in kept] for name in self.rule.states]

    @property
    def taken(self) -> int | torch.Tensor:
        """Steps taken: a number, or a one-element tensor on the device.

        Where torch's class counts none: 0 before the first step, then 1.
        """
        return self.optimizer._taken(self.group, self.parameters[0])

    def advance(self, steps: int = 1) -> int | torch.Tensor:
        """Count steps that a kernel takes in the optimizer's place. Returns the last one's number.

        Where torch's class counts none: 1 for a first step, else 2.
        """
        return self.optimizer._advance(self.group, self.parameters, steps)[0]

    def frozen(self) -> tuple | None:
        """What a step depends on besides parameters, gradients and states.

        None while that changes from step to step, or may change unseen.
        """
        if self.optimizer.counted or not self.optimizer._are_numbers(self.group):
            return None
        if any([self.optimizer._fresh(self.group, p) for p in self.parameters]):
            return None
        return self.rule, self.numbers, self.maximize


def _light(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of torch's optimizers without its wrapper, which keeps it out of compiled code.

    The wrapper imports torch._dynamo, which takes a second. Until somebody else has imported that,
    nothing can be compiled.
    """
    inside = getattr(method, "__wrapped__", None)
    if inside is None or "torch._dynamo" in sys.modules:
        return method
    return functools.partial(inside, getattr(method, "__self__", None))


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
        return self.update(grads) if closure is None else self._step(closure, grads=grads)

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

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's, without its record for a profiler where there is none."""
        if not set_to_none or self._is_followed():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def add_param_group(self, param_group: dict) -> None:
        """As torch's; a refused option is a ValueError."""
        self._refuse({**self.defaults, **param_group})
        _light(super().add_param_group)(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        return _light(super().state_dict)()

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's; the state of an optimizer with a refused option is a ValueError.

        Step counts that are not for CUDA graphs go to the CPU: reading one on a GPU would wait.
        """
        for group in state_dict["param_groups"]:
            self._refuse(group)
        _light(super().load_state_dict)(state_dict)
        for group in self.param_groups:
            for state in (self.state[p] for p in group["params"] if p in self.state):
                if isinstance(state.get("step"), torch.Tensor) and not group.get("capturable"):
                    state["step"] = state["step"].cpu()

    def _refuse(self, group: dict) -> None:
        name = type(self).__name__
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"{name}: {option}=True is not supported; use torch.optim.{name}")

    def parts(self, parameters: Iterable[torch.Tensor] | None = None) -> list[Part]:
        """All parameters, or these, in parts that a launch can update: what engines do that take
        steps themselves. An engine that only hands in gradients calls `update`.
        """
        chosen = None if parameters is None else {id(p) for p in parameters}
        found = []
        for group in self.param_groups:
            together: dict[int | None, list] = {}
            for p in group["params"]:
                if chosen is None or id(p) in chosen:
                    taken = self._taken(group, p)
                    # Of counts in device memory one serves all: they advance together.
                    key = None if isinstance(taken, torch.Tensor) else taken
                    together.setdefault(key, []).append(p)
            found += [Part(self, group, members) for members in together.values()]
        return found

    def _taken(self, group: dict, p: torch.Tensor) -> int | torch.Tensor:
        """See `Part.taken`."""
        if not self.counted:
            return 0 if self._fresh(group, p) else 1
        count = self.state.get(p, {}).get("step", 0)
        on_device = isinstance(count, torch.Tensor) and count.device.type != "cpu"
        return count if on_device else int(count)

    def update(self, grads: Gradients | None = None) -> None:
        """`step` without torch's hooks and profiler record around it, which engines call."""
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        given_all = None
        if grads is not None:
            given_all = list(grads.values() if isinstance(grads, dict) else grads)
            count = len(self._params())
            if len(given_all) != count:
                raise ValueError(
                    f"{type(self).__name__}: {count} parameters but {len(given_all)} gradients"
                )
        if not torch.is_grad_enabled():
            self._update_groups(given_all)
            return
        with torch.no_grad():
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
                if given_all is not None or not self._are_known(params, given):
                    kernels.check_update(type(self).__name__, params, given)
                self._update(group, params, given)

    def _are_known(self, params: list, grads: list) -> bool:
        """Whether these parameters were checked before, so that their .grad, which torch keeps to
        their shapes and types, needs no check but for its layout.
        """
        if not all([g.layout is torch.strided for g in grads]):
            return False
        known, found = self.__dict__.setdefault("_known", set()), tuple(map(id, params))
        if found in known:
            return True
        if len(known) > 2 * len(self.param_groups):
            known.clear()
        known.add(found)
        return False

    def _update(self, group, params, grads):
        """One launch for the parameters that take the same step."""
        rule, numbers, maximize = self.row(group), self._numbers(group), group["maximize"]
        if not (rule.states or self.counted):
            apply_checked(rule, params, grads, [], numbers, 2, maximize=maximize)
            return
        steps = self._advance(group, params)
        kept = [self.state[p] for p in params]
        states = [[state[name] for state in kept] for name in rule.states]
        # Of counts in device memory one serves all: they advance together.
        if isinstance(steps[0], torch.Tensor) or steps.count(steps[0]) == len(steps):
            lists = params, grads, states
            apply_checked(rule, *lists, numbers, steps[0], maximize=maximize)
            return
        together: dict = {}
        for i, step in enumerate(steps):
            together.setdefault(step, []).append(i)
        for step, members in together.items():
            lists = [[ts[i] for i in members] for ts in (params, grads, *states)]
            apply_checked(rule, *lists[:2], lists[2:], numbers, step, maximize=maximize)

    def _advance(self, group: dict, params: list, steps: int = 1) -> list:
        """Counts steps; the last one's number for each parameter, see `Part.advance`."""
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        if not self.counted:
            if not self.row(group).states:
                return [2] * len(params)
            fresh = [self._fresh(group, p) for p in params]
            if any(fresh):
                self._make(group, params)
            return [1 if first else 2 for first in fresh]
        self._make(group, params)
        counts = [self.state[p]["step"] for p in params]
        torch._foreach_add_(counts, steps)
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

    def _are_numbers(self, group: dict) -> bool:
        """Whether every hyperparameter is a number. A tensor, or a list, may change unseen."""
        given = (group[name] for name, _ in self.row(group).hyperparameters)
        return all([type(v) in (float, int) for value in given for v in _spread(value)])

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
        if self._are_numbers(group):
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
