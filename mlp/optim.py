"""torch's optimizers, and Lion, with one kernel launch for each step of a parameter group.

`step` can also take the gradients as an argument. The classes derive from torch's. Arguments,
defaults, parameter groups, state_dict and learning-rate schedulers are torch's own. Only the update
is ours. It is a row of `kernels.RULES`. `foreach` and `fused` have no effect. `differentiable`,
`amsgrad` and `centered` raise a ValueError.

To add one, write its row in kernels/rules.py and a class here. The class's `row` returns the row
for a parameter group. The row uses torch's names of states and hyperparameters.
"""

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch.optim.optimizer import (
    ParamsT,
    _global_optimizer_post_hooks,
    _global_optimizer_pre_hooks,
)

import kernels
from kernels import launch
from kernels.ops.optim import apply_checked

from .views import Views, are_plain

P = ParamSpec("P")
R = TypeVar("R")
Gradients = Sequence[torch.Tensor | None] | Mapping[str, torch.Tensor | None]


class Part:
    """Parameters that one launch can update: they share a group and a count of steps taken.

    The parameters are fixed. Everything else is read from the optimizer at each access.
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
        """True if a step goes along the gradient, False if it goes against it."""
        return self.group["maximize"]

    @property
    def numbers(self) -> tuple:
        """The rule's row of numbers, see `kernels.row_of`. Numbers on a device stay tensors."""
        return self.optimizer._numbers(self.group)

    def states(self) -> list[list[torch.Tensor]]:
        """One list for each of the rule's states, in the parameters' order.

        Missing states are made.
        """
        self.optimizer._make(self.group, self.parameters)
        kept = [self.optimizer.state[p] for p in self.parameters]
        return [[state[name] for state in kept] for name in self.rule.states]

    @property
    def taken(self) -> int | torch.Tensor:
        """Steps taken: a number, or a one-element tensor on the device.

        If torch's class keeps no count, this is 0 before the first step, then 1.
        """
        return self.optimizer._taken(self.group, self.parameters[0])

    def advance(self, steps: int = 1) -> int | torch.Tensor:
        """Count steps that a kernel takes in the optimizer's place.

        Returns the number of the last step. If torch's class keeps no count, this is 1 for a first
        step, else 2.
        """
        return self.optimizer._advance(self.group, self.parameters, steps)[0]

    def frozen(self) -> tuple | None:
        """(rule, numbers, maximize): all that a step reads besides parameters, gradients, states.

        None if they change from step to step, or may change without notice.
        """
        if self.optimizer.counted or not self.optimizer._are_numbers(self.group):
            return None
        if any([self.optimizer._fresh(self.group, p) for p in self.parameters]):
            return None
        return self.rule, self.numbers, self.maximize


def _light(method: Callable[P, R]) -> Callable[P, R]:
    """A method of torch's optimizers without its wrapper.

    The wrapper keeps the method out of compiled code. It imports torch._dynamo, which takes a
    second. Nothing can be compiled before another module has imported torch._dynamo, so until then
    the wrapper is not needed.
    """
    inside = getattr(method, "__wrapped__", None)
    if inside is None or "torch._dynamo" in sys.modules:
        return method
    return functools.partial(inside, getattr(method, "__self__", None))


_REFUSED = ("differentiable", "amsgrad", "centered")


# Every class below also derives from a class of torch. A type checker must know that of the base.
if TYPE_CHECKING:
    from torch.optim import Optimizer as _Torch
else:
    _Torch = object


class _Ruled(_Torch):
    """The common part of all optimizers here: the update is a row of `kernels.RULES`."""

    counted = True  # True if torch's class keeps a "step" in the state of each parameter

    def row(self, group: dict) -> kernels.Rule:
        """The row of `kernels.RULES` that updates this parameter group."""
        raise NotImplementedError

    def initial(self, group: dict) -> float:
        """The value of all states before the first step."""
        return 0.0

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # torch's classes return True under fused=True. Then GradScaler expects the step to unscale
        # gradients and to skip infinite ones. Our step expects GradScaler to do both.
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
        """Update every parameter from its .grad, or from `grads`.

        grads: a sequence in the parameters' order, or a mapping from name to gradient. The names
        are those that the optimizer got, as in `SGD(model.named_parameters(), lr=0.1)` or
        `SGD(net.parameters.items(), lr=0.1)`. If it got none, `net.grads` knows the parameters of
        its network, and any other mapping must be in the parameters' order. Each gradient is dense
        and has its parameter's shape. A parameter whose gradient is None stays as it is, as in
        torch. Returns the loss of `closure`, or None without one.

        ValueError for another shape, for a name that is missing or unknown, and for a mapping
        without known names in which two gradients have the same shape: a wrong order of these
        could not be noticed. RuntimeError without any gradient, if no parameter can have a .grad:
        a `Net` keeps its own in `net.grads`.
        """
        # torch runs hooks and a profiler's record around every step. On a CPU this costs as much as
        # a small update. Here only a step with a hook or a profiler pays for it. If a subclass
        # defines its own step, torch wraps that one.
        if self._is_followed() and type(self).step is _Ruled.step:
            return _followed_step(self, closure, grads=grads)
        return self.update(grads) if closure is None else self._step(closure, grads=grads)

    step.hooked = True  # type: ignore[attr-defined]  # torch then does not wrap it

    def _is_followed(self) -> bool:
        """True if a hook, a profiler or a compiler observes this step."""
        if torch.compiler.is_compiling():  # a compiler cannot trace the checks below
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
        """`step` without torch's hooks and profiler record."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(grads)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Without a profiler it writes no record for one."""
        if not set_to_none or self._is_followed():
            super().zero_grad(set_to_none)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def add_param_group(self, param_group: dict) -> None:
        """As torch's. ValueError for an option that is not supported."""
        self._refuse({**self.defaults, **param_group})
        _light(super().add_param_group)(param_group)

    def state_dict(self) -> dict[str, Any]:
        """As torch's."""
        return _light(super().state_dict)()

    def load_state_dict(self, state_dict: dict) -> None:
        """As torch's. Parameters that have names here keep them.

        ValueError if the state has an option that is not supported, is of another optimizer or of
        other parameters, or has the same names in another order. Then nothing is changed.

        Step counts move to the CPU unless they are for CUDA graphs (capturable). To read a count on
        a GPU, the host would have to wait for the GPU.
        """
        for group in state_dict["param_groups"]:
            self._refuse(group)
        named = [group.get("param_names") for group in self.param_groups]
        for group, names in zip(state_dict["param_groups"], named):
            saved = group.get("param_names")
            if names and saved and names != saved and sorted(names) == sorted(saved):
                raise ValueError(
                    f"{type(self).__name__}: the state is of the same parameters in another order, "
                    f"{', '.join(saved)}, not {', '.join(names)}"
                )
        check_state(self, state_dict)
        _light(super().load_state_dict)(state_dict)
        for group, names in zip(self.param_groups, named):
            if names:  # torch would take over the state's names, which may have a prefix
                group["param_names"] = names
            for state in (self.state[p] for p in group["params"] if p in self.state):
                if isinstance(state.get("step"), torch.Tensor) and not group.get("capturable"):
                    state["step"] = state["step"].cpu()

    def _refuse(self, group: dict) -> None:
        name = type(self).__name__
        for option in _REFUSED:
            if group.get(option):
                raise ValueError(f"{name}: {option}=True is not supported; use torch.optim.{name}")

    def parts(self, parameters: Iterable[torch.Tensor] | None = None) -> list[Part]:
        """All parameters, or these, in parts that one launch can update.

        An engine that takes the steps itself needs them. An engine that only has gradients calls
        `update` instead.
        """
        chosen = None if parameters is None else {id(p) for p in parameters}
        found = []
        for group in self.param_groups:
            together: dict[int | None, list] = {}
            for p in group["params"]:
                if chosen is None or id(p) in chosen:
                    taken = self._taken(group, p)
                    # Counts in device memory advance together, so one of them serves all.
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
        """`step` without torch's hooks and profiler record. Engines call it."""
        self._note_step()
        if torch.compiler.is_compiling():
            with torch.no_grad():
                self._update_groups(None if grads is None else self._in_order(grads))
            return
        # As torch.no_grad() does, at a fifth of its cost.
        enabled = torch.is_grad_enabled()
        launch.set_grad_enabled(False)
        try:
            if not (type(grads) is Views and self._update_whole(grads)):
                self._update_groups(None if grads is None else self._in_order(grads))
        finally:
            launch.set_grad_enabled(enabled)

    def _in_order(self, grads: Gradients) -> list:
        """The gradients in the parameters' order. ValueError if they do not fit."""
        params, kind = self._params(), type(self).__name__
        if isinstance(grads, Mapping):
            if isinstance(grads, Views) and grads.fit(params):
                return list(grads.values())
            names = [name for group in self.param_groups for name in group.get("param_names", ())]
            if names:
                return _by_name(kind, names, grads)
        given = list(grads.values() if isinstance(grads, Mapping) else grads)
        if len(given) != len(params):
            raise ValueError(f"{kind}: {len(params)} parameters but {len(given)} gradients")
        if isinstance(grads, Views) and grads.beside is not None:
            return _by_memory(kind, params, grads, grads.beside)
        return _by_shape(kind, params, grads) if isinstance(grads, Mapping) else given

    def _update_whole(self, grads: Views) -> bool:
        """One step on the flat tensors of a `Net`, if that is a step of every parameter.

        False if it is not, because of other parameters, several groups, or states.
        """
        if len(self.param_groups) != 1:
            return False
        (group,) = self.param_groups
        rule, whole = self.row(group), grads.beside
        if rule.states or self.counted or not grads.are_of(group["params"]):
            return False
        assert isinstance(whole, Views)  # `are_of` says so
        numbers, maximize = self._numbers(group), group["maximize"]
        apply_checked(rule, [whole.flat], [grads.flat], [], numbers, 2, maximize=maximize)
        return True

    def _note_step(self) -> None:
        """Tells torch's schedulers, which check it, that a step was taken."""
        if not torch.compiler.is_compiling():  # torch 2.11 cannot trace the assignment
            self._opt_called = True

    def _update_groups(self, given_all: list | None) -> None:
        """One step of every group from these gradients, or from .grad if None."""
        start, updated = 0, False
        for group in self.param_groups:
            params = group["params"]
            if given_all is None:
                given = [p.grad for p in params]
            else:
                given = given_all[start : start + len(params)]
                start += len(params)
            if not self._are_known(params, given):
                params = [p for p, g in zip(params, given) if g is not None]
                given = [g for g in given if g is not None]
                self._check(params, given)
            if params:
                self._update(group, params, given)
                updated = True
        if given_all is None and not updated:
            self._check_any_can_have_gradients()

    def _check_any_can_have_gradients(self) -> None:
        """RuntimeError if all parameters are plain tensors, such as a `Net`'s, which get no .grad.

        No error for an `nn.Parameter` that is frozen, or if there were gradients before: torch then
        leaves the parameters as they are.
        """
        params = self._params()
        if params and are_plain(params) and not any(self.__dict__.get("_known", ())):
            raise RuntimeError(
                f"{type(self).__name__}: step() got no gradients; call step(grads=net.grads)"
            )

    def _are_known(self, params: list, grads: list) -> bool:
        """True if these parameters were checked before, and each gradient is like its parameter.

        It is False if a gradient is None. A compiler always checks, because it traces this only
        once.
        """
        if torch.compiler.is_compiling():
            return False
        dense = torch.strided
        for p, g in zip(params, grads):
            if g is None or g.shape != p.shape or g.dtype is not p.dtype or g.layout is not dense:
                return False
            if g.device != p.device:
                return False
        return tuple(map(id, params)) in self.__dict__.setdefault("_known", set())

    def _check(self, params: list, grads: list) -> None:
        """ValueError unless the gradients fit the parameters. These are then known."""
        if self._are_known(params, grads):
            return
        kernels.check_update(type(self).__name__, params, grads)
        if torch.compiler.is_compiling():
            return
        known = self.__dict__.setdefault("_known", set())
        if len(known) > 2 * len(self.param_groups):
            known.clear()
        known.add(tuple(map(id, params)))

    def _update(self, group, params, grads):
        """One launch for the parameters that take the same step."""
        rule, numbers, maximize = self.row(group), self._numbers(group), group["maximize"]
        if not (rule.states or self.counted):
            apply_checked(rule, params, grads, [], numbers, 2, maximize=maximize)
            return
        steps = self._advance(group, params)
        kept = [self.state[p] for p in params]
        states = [[state[name] for state in kept] for name in rule.states]
        # Counts in device memory advance together, so one of them serves all.
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
        """Count steps. Returns each parameter's number of the last one, see `Part.advance`."""
        self._note_step()
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
        # The host must not read counts on a device or in fake tensors.
        if group.get("capturable") or not launch.plain(*counts):
            return counts
        return [int(count) for count in counts]

    def _fresh(self, group, p) -> bool:
        """True if a state of this parameter is missing, or None, as older torch saved it."""
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
        """The rule's hyperparameters by name.

        Tensors in CPU memory become numbers, because kernels cannot read them there.
        """
        given = {name: group[name] for name, _ in self.row(group).hyperparameters}
        return {name: _number(value) for name, value in given.items()}

    def _are_numbers(self, group: dict) -> bool:
        """True if every hyperparameter is a number. Tensors and lists may change without notice."""
        given = (group[name] for name, _ in self.row(group).hyperparameters)
        return all([type(v) in (float, int) for value in given for v in _spread(value)])

    def _numbers(self, group) -> tuple:
        """The row's numbers. Tensors in device memory stay there.

        The row is kept while the group holds the same objects. Tensors and lists may change in
        place, so a group with them is read each time.
        """
        rule = self.row(group)
        given = [group[name] for name, _ in rule.hyperparameters]
        if torch.compiler.is_compiling():  # torch 2.11 cannot trace the lines below
            return kernels.row_of(rule, **self._hyperparameters(group))
        kept = self.__dict__.setdefault("_numbers_of", {})
        made = kept.get(id(group))
        if made is not None and made[0] is rule and all(map(operator.is_, made[1], given)):
            return made[2]
        row = kernels.row_of(rule, **self._hyperparameters(group))
        if self._are_numbers(group):
            kept[id(group)] = rule, given, row
        return row


def check_state(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """ValueError if a `state_dict` is of another optimizer, or of parameters of other shapes.

    torch loads such a state without an error, and the next step fails or computes something else.
    Optimizers differ in the options that rules of `kernels.RULES` read, or in the states that they
    keep.
    """
    kind, read = type(optimizer).__name__, {n for r in kernels.RULES.values() for n in _options(r)}
    expected = read & optimizer.defaults.keys()
    for group in state["param_groups"]:
        found = read & group.keys()
        if found != expected:
            raise ValueError(
                f"{kind}: the state is of another optimizer: it has the options "
                f"{', '.join(sorted(found))}, but {kind} has {', '.join(sorted(expected))}"
            )
        needed = {*optimizer.row(group).states} if isinstance(optimizer, _Ruled) else set()
        for index in group["params"]:
            kept = state["state"].get(index, {}).keys() - {"step"}
            if needed - kept and kept - needed:
                raise ValueError(
                    f"{kind}: the state is of another optimizer: it keeps "
                    f"{', '.join(sorted(kept))} of a parameter, but {kind} keeps "
                    f"{', '.join(sorted(needed))}"
                )
    saved = [index for group in state["param_groups"] for index in group["params"]]
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for place, (index, p) in enumerate(zip(saved, params, strict=False)):
        for name, value in state["state"].get(index, {}).items():
            is_one = not isinstance(value, torch.Tensor) or value.numel() == 1
            if not is_one and value.shape != p.shape:
                raise ValueError(
                    f"{kind}: the state is of other parameters: {name} of parameter {place} is "
                    f"{tuple(value.shape)}, but the parameter is {tuple(p.shape)}"
                )


def _options(rule: kernels.Rule) -> list[str]:
    return [name for name, _ in rule.hyperparameters]


def _by_name(kind: str, names: list[str], grads: Mapping) -> list:
    """The gradients of these parameters. ValueError unless the names are the same, each once."""
    if names == [*grads]:
        return [*grads.values()]
    wrong = {
        "no gradient for": [name for name in names if name not in grads],
        "no parameter called": [name for name in grads if name not in names],
        "several parameters called": sorted({name for name in names if names.count(name) > 1}),
    }
    if any(wrong.values()):
        found = (f"{what} {', '.join(map(str, which))}" for what, which in wrong.items() if which)
        raise ValueError(
            f"{kind}: {' and '.join(found)}; None as a gradient leaves a parameter as it is"
        )
    return [grads[name] for name in names]


def _by_memory(kind: str, params: list[torch.Tensor], grads: Views, beside: Mapping) -> list:
    """A network's gradients, for parameters that are the network's own or share their memory.

    beside: the network's parameters by name. ValueError unless these are all of them.
    """
    places = {_place(p): name for name, p in beside.items()}
    found = [places.get(_place(p), "") for p in params]
    if set(found) != set(grads):
        raise ValueError(
            f"{kind}: these are gradients of a network with other parameters than this optimizer's;"
            f" hand in a list in the optimizer's order, such as [*net.grads.values()]"
        )
    return [grads[name] for name in found]


def _place(p: torch.Tensor) -> tuple:
    return p.data_ptr(), p.shape, p.stride()


def _by_shape(kind: str, params: list[torch.Tensor], grads: Mapping) -> list:
    """Gradients in the parameters' order, which the shapes must prove."""
    names: dict[torch.Size, Any] = {}
    for p, (name, gradient) in zip(params, grads.items()):
        if gradient is not None and gradient.shape != p.shape:
            raise ValueError(
                f"{kind}: gradient {name} is {tuple(gradient.shape)}, but the parameter in its "
                f"place is {tuple(p.shape)}"
            )
        if names.setdefault(p.shape, name) != name:
            raise ValueError(
                f"{kind}: gradients {names[p.shape]} and {name} have the same shape, and this "
                f"optimizer knows no names; make it from named parameters, as in "
                f"{kind}(model.named_parameters(), …), or hand in a list in its order"
            )
    return [*grads.values()]


# `step` as torch wraps it: with hooks and a profiler's record.
_followed_step = torch.optim.Optimizer.profile_hook_step(_Ruled._step)


def _spread(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _number(value):
    """A hyperparameter, where tensors on the CPU become numbers. A pair is converted by element."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_number, value))
    on_host = isinstance(value, torch.Tensor) and value.device.type == "cpu"
    return float(value) if on_host and launch.plain(value) else value


class SGD(_Ruled, torch.optim.SGD):
    """`torch.optim.SGD`, with all its options but `differentiable`.

    lr: a number, or a tensor on the parameters' device. The parameters may be float32, float16,
    bfloat16 or float64. ValueError: see `torch.optim.SGD`, and for `differentiable`.
    """

    counted = False

    def row(self, group: dict) -> kernels.Rule:
        """Plain, momentum or Nesterov."""
        if not group["momentum"]:
            return kernels.RULES["sgd"]
        return kernels.RULES["nesterov" if group["nesterov"] else "momentum"]


class Adam(_Ruled, torch.optim.Adam):
    """`torch.optim.Adam`, with all its options but `amsgrad` and `differentiable`.

    With capturable=True the step counts are on the device, for CUDA graphs. ValueError: see
    `torch.optim.Adam`, and for the two options.
    """

    def row(self, group: dict) -> kernels.Rule:
        """AdamW if decoupled_weight_decay is set, else Adam."""
        return kernels.RULES["adamw" if group.get("decoupled_weight_decay") else "adam"]


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`: Adam, but the weight decay does not enter the moments.

    ValueError: as for `Adam`.
    """

    def row(self, group: dict) -> kernels.Rule:
        """AdamW."""
        return kernels.RULES["adamw"]


class RMSprop(_Ruled, torch.optim.RMSprop):
    """`torch.optim.RMSprop`, with or without momentum.

    ValueError: see `torch.optim.RMSprop`, and for `centered` and `differentiable`.
    """

    def row(self, group: dict) -> kernels.Rule:
        """The row with momentum if the group has one, else the row without."""
        return kernels.RULES["rmsprop_momentum" if group["momentum"] else "rmsprop"]


class Adagrad(_Ruled, torch.optim.Adagrad):
    """`torch.optim.Adagrad`, with all its options but `differentiable`.

    ValueError: see `torch.optim.Adagrad`, and for `differentiable`.
    """

    def row(self, group: dict) -> kernels.Rule:
        """Adagrad."""
        return kernels.RULES["adagrad"]

    def initial(self, group: dict) -> float:
        """The initial value of the sums of squares."""
        return group["initial_accumulator_value"]


class Lion(_Ruled, torch.optim.Optimizer):
    """Lion (Chen et al. 2023): every step has size lr, along the sign of an average gradient.

    lr is usually 3 to 10 times smaller than Adam's, and weight_decay as many times larger. betas:
    the first is for the average whose sign is taken, the second for the average that is kept.
    ValueError if lr or weight_decay is negative, or a beta is outside [0, 1).
    """

    counted = False

    def __init__(
        self,
        params: ParamsT,
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


def default_rate(name: str) -> float:
    """The learning rate that an optimizer of OPTIMIZERS has by default."""
    return inspect.signature(OPTIMIZERS[name]).parameters["lr"].default
