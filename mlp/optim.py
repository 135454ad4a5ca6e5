"""SGD, Adam and AdamW: torch's optimizers with one launch a step, and gradients that may be handed
in.

They are torch's classes: arguments, defaults, parameter groups, state_dict and learning-rate
schedulers are torch's own. Only the update differs. `foreach` and `fused` have no effect;
`differentiable` and `amsgrad` are refused.
"""

import torch

import kernels
from kernels import launch


def _refuse(name, **options):
    for option, value in options.items():
        if value:
            raise ValueError(f"{name}: {option}=True is not supported; use torch.optim.{name}")


class _Stepper:
    """What the three share: which gradients a step uses."""

    def step(self, closure=None, *, grads=None):
        """Update every parameter from its .grad, or from `grads`: a sequence or dict in the
        parameters' order.

        A parameter whose gradient is None is left alone, as in torch. Returns the closure's loss,
        if one is given.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.update(grads)
        return loss

    def add_param_group(self, param_group):
        """As torch's; a group of its own with a refused option is refused."""
        _refuse(
            type(self).__name__,
            differentiable=param_group.get("differentiable"),
            amsgrad=param_group.get("amsgrad"),
        )
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict):
        """As torch's; the state of an optimizer with a refused option is refused."""
        for group in state_dict["param_groups"]:
            _refuse(
                type(self).__name__,
                differentiable=group.get("differentiable"),
                amsgrad=group.get("amsgrad"),
            )
        super().load_state_dict(state_dict)

    def constants(self) -> tuple | None:
        """What an update depends on besides parameters, gradients and states; None while that
        changes from step to step.
        """
        return None

    def rule(self, parameters) -> kernels.Rule | None:
        """The row of `kernels.RULES` that this update of just these parameters is; None if there is
        none.
        """
        group, pointers = self.param_groups[0], [p.data_ptr() for p in parameters]
        known = type(self) in OPTIMIZERS.values() and len(self.param_groups) == 1
        numbers = not (group["maximize"] or isinstance(group["lr"], torch.Tensor))
        return (
            self._rule(group)
            if known and numbers and [p.data_ptr() for p in group["params"]] == pointers
            else None
        )

    def hyper(self, device) -> torch.Tensor | tuple:
        """The numbers of `rule` as they are now, see `kernels.hyperparameters`: on a GPU always the
        same tensor, rewritten.
        """
        (group,) = self.param_groups
        rule = self._rule(group)
        options = {name: group[name] for name, _ in rule.hyperparameters}
        known = self.__dict__.setdefault("_rows", {})
        values, row = known.get(device, (None, None))
        if values != (rule, options):
            numbers = kernels.rules.row_of(rule, **options)
            if device.type == "cpu":
                row = numbers
            else:
                numbers = torch.tensor(numbers, dtype=torch.float32)
                row = numbers.to(device) if row is None else row.copy_(numbers)
            known[device] = (rule, options), row
        return row

    def inline(self) -> tuple:
        """Count a step that the backward takes itself, see `Net.update`: (states, hyper, step,
        rule).
        """
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        (group,) = self.param_groups
        return *self._inline(group), self._rule(group)

    @torch.no_grad()
    def update(self, grads=None):
        """`step` without torch's hooks and profiler record around it: what the engines call."""
        if isinstance(grads, dict):
            grads = grads.values()
        grads = None if grads is None else list(grads)
        self._opt_called = True  # torch's schedulers ask whether a step was taken
        count = sum(len(group["params"]) for group in self.param_groups)
        if grads is not None and len(grads) != count:
            raise ValueError(
                f"{type(self).__name__}: {count} parameters but {len(grads)} gradients"
            )
        start = 0
        for group in self.param_groups:
            params = group["params"]
            given = (
                [p.grad for p in params] if grads is None else grads[start : start + len(params)]
            )
            start += len(params)
            if any(g is None for g in given):
                params = [p for p, g in zip(params, given) if g is not None]
                given = [g for g in given if g is not None]
            if params:
                self._update(group, params, given)


class SGD(_Stepper, torch.optim.SGD):
    """`torch.optim.SGD`: momentum, dampening, weight decay, Nesterov, maximize; lr a number or a
    device tensor.
    """

    def __init__(self, params, lr=1e-3, momentum=0, **options):
        _refuse("SGD", differentiable=options.get("differentiable"))
        super().__init__(params, lr=lr, momentum=momentum, **options)

    def constants(self):
        """The hyperparameters, once momentum buffers exist and unless the learning rate is a
        tensor.
        """
        if any(
            g["momentum"] and not all(self.state[p] for p in g["params"]) for g in self.param_groups
        ):
            return None
        names = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
        values = tuple(group[name] for group in self.param_groups for name in names)
        return None if any(isinstance(value, torch.Tensor) for value in values) else values

    def states(self, capturable=False):
        """(lists of states as the training kernels take them, count of steps): momentum buffers,
        made if there are none.
        """
        params = [p for group in self.param_groups for p in group["params"]]
        fresh = any(self.state[p].get("momentum_buffer") is None for p in params)
        count = torch.full((1,), 0.0 if fresh else 1.0, device=params[0].device)
        if not self.param_groups[0]["momentum"]:
            return [], count
        for p in params:
            if self.state[p].get("momentum_buffer") is None:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        return [[self.state[p]["momentum_buffer"] for p in params]], count

    def advance(self, steps: int) -> None:
        """Take note of steps that a training kernel made: SGD counts none."""

    def _rule(self, group):
        if not group["momentum"]:
            return kernels.RULES["sgd"]
        return kernels.RULES["nesterov" if group["nesterov"] else "momentum"]

    def _inline(self, group):
        states, hyper = (
            [self.state[p] for p in group["params"]],
            self.hyper(group["params"][0].device),
        )
        if not group["momentum"]:
            return [], hyper, 1
        fresh = any(s.get("momentum_buffer") is None for s in states)
        if fresh:
            self.states()
        return [[s["momentum_buffer"] for s in states]], hyper, 1 if fresh else 2

    def _update(self, group, params, grads):
        options = (group["dampening"], group["weight_decay"], group["nesterov"], group["maximize"])
        momentum = group["momentum"]
        if not momentum:
            return kernels.sgd(params, grads, params, group["lr"], 0.0, *options)
        fresh = [self.state[p].get("momentum_buffer") is None for p in params]
        for first in set(fresh):
            members = [i for i, is_fresh in enumerate(fresh) if is_fresh == first]
            for i in members:
                if first:
                    self.state[params[i]]["momentum_buffer"] = torch.empty_like(params[i])
            buffers = [self.state[params[i]]["momentum_buffer"] for i in members]
            subset, given = [params[i] for i in members], [grads[i] for i in members]
            kernels.sgd(subset, given, buffers, group["lr"], momentum, *options, first)


class Adam(_Stepper, torch.optim.Adam):
    """`torch.optim.Adam`; with capturable=True the step counts live on the device, for CUDA
    graphs.
    """

    def __init__(self, params, lr=1e-3, **options):
        _refuse(
            type(self).__name__,
            differentiable=options.get("differentiable"),
            amsgrad=options.get("amsgrad"),
        )
        super().__init__(params, lr=lr, **options)

    def _make_states(self, group):
        for p in group["params"]:
            if not self.state[p]:
                on = p.device if group["capturable"] else "cpu"
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32, device=on)
                self.state[p]["exp_avg"] = torch.zeros_like(p)
                self.state[p]["exp_avg_sq"] = torch.zeros_like(p)

    def states(self, capturable=False):
        """(lists of states as the training kernels take them, count of steps); step counts go to
        the device if capturable.
        """
        for group in self.param_groups:
            group["capturable"] = group["capturable"] or capturable
            self._make_states(group)
        params = [p for group in self.param_groups for p in group["params"]]
        for p in params if capturable else ():
            self.state[p]["step"] = self.state[p]["step"].to(p.device)
        count = self.state[params[0]]["step"].detach().to(params[0].device).reshape(1).clone()
        return [[self.state[p][name] for p in params] for name in ("exp_avg", "exp_avg_sq")], count

    def advance(self, steps: int) -> None:
        """Take note of steps that a training kernel made."""
        torch._foreach_add_([state["step"] for state in self.state.values()], steps)

    def _rule(self, group):
        return kernels.RULES["adamw" if self._decoupled(group) else "adam"]

    def _inline(self, group):
        self._make_states(group)
        states = [self.state[p] for p in group["params"]]
        self.advance(1)
        step = states[0]["step"] if group["capturable"] else int(states[0]["step"])
        lists = [[s[name] for s in states] for name in ("exp_avg", "exp_avg_sq")]
        return lists, self.hyper(group["params"][0].device), step

    def _update(self, group, params, grads):
        self._make_states(group)
        states = [self.state[p] for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        # No host read on a device, nor of fake tensors: parameters of a group advance together.
        together = group["capturable"] or not launch.plain(*steps)
        if together:
            groups = {0: range(len(params))}
        else:
            groups = {}
            for i, step in enumerate(steps):
                groups.setdefault(int(step), []).append(i)
        for count, members in groups.items():
            kernels.adam(
                [params[i] for i in members],
                [grads[i] for i in members],
                [states[i]["exp_avg"] for i in members],
                [states[i]["exp_avg_sq"] for i in members],
                steps[members[0]] if together else count,
                group["lr"],
                group["betas"],
                group["eps"],
                group["weight_decay"],
                self._decoupled(group),
                group["maximize"],
            )

    def _decoupled(self, group):
        return group.get("decoupled_weight_decay", False)


class AdamW(Adam, torch.optim.AdamW):
    """`torch.optim.AdamW`: Adam whose weight decay does not pass through the moments."""

    def _decoupled(self, group):
        return True


OPTIMIZERS = {"sgd": SGD, "adam": Adam, "adamw": AdamW}
