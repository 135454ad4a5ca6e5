"""Checks that an engine may replace the calls of a network, loss or optimizer by its own code.

All engines but autograd compute what the network's `config()` describes. They may do so only if a
call of the network computes exactly that. Each function here returns None if so, else the reason.
"""

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from kernels import tape

from .. import loss as losses
from ..modules import MLP, Conv2d, ConvNet, Linear, build
from ..net import Net
from ..optim import OPTIMIZERS

# The forward of each class at its definition. A later replacement is noticed.
_FORWARD = {kind: kind.forward for kind in (MLP, ConvNet, Linear, Conv2d)}
_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_STEP_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


def network(model: Net | torch.nn.Module) -> str | None:
    """The reason why a call of `model` may compute or train something else than its description."""
    return call(model) or _parameters(model)


def call(model: Net | torch.nn.Module) -> str | None:
    """The reason why a call of `model` may compute something else than its description, or None."""
    return description(model) or _hooks(model)


def description(model: Net | torch.nn.Module) -> str | None:
    """The reason why `model.config()` may not describe what the model computes, or None."""
    if isinstance(model, Net):
        return _net(model)
    kind = type(model)
    if kind not in (MLP, ConvNet):
        ours = [base.__name__ for base in (MLP, ConvNet) if isinstance(model, base)]
        if ours:
            return f"{kind.__name__} is a subclass of {ours[0]} and may compute something else"
        return f"has no backward for {kind.__name__}, only for Net, MLP and ConvNet"
    return _layers(model) or _settings(model)


def _net(net: Net) -> str | None:
    if type(net) is not Net:
        return f"{type(net).__name__} is a subclass of Net and may compute something else"
    changed = [name for name in vars(net) if hasattr(Net, name)]
    if changed:
        return f"this Net has a {changed[0]} of its own"
    stages = [p for stage in net.stages for p in stage.bound]
    if [id(p) for p in net.parameters.values()] != [id(p) for p in stages]:
        return "the parameters of this Net were replaced; copy into them instead"
    return None


def _layers(model) -> str | None:
    """The first difference from the submodules that the class makes, or None."""
    lists: list[tuple[Any, str, type]]
    if type(model) is ConvNet:
        if model._modules.keys() != {"conv", "mlp"}:
            return f"its submodules are {', '.join(model._modules) or 'none'}, not conv and mlp"
        lists = [(model.conv, "conv.", Conv2d), (model.mlp, "mlp.", Linear)]
        for module, made, name in ((model.conv, nn.ModuleList, "conv"), (model.mlp, MLP, "mlp")):
            if type(module) is not made:
                return f"{name} is a {type(module).__name__}, not the {made.__name__} it was"
    else:
        lists = [(model, "", Linear)]
    for parent, prefix, kind in lists:
        count = len(model.arguments["channels"]) if kind is Conv2d else len(parent.sizes) - 1
        if list(parent._modules) != [str(i) for i in range(count)]:
            return f"its layers are {', '.join(parent._modules)}, not 0 to {count - 1}"
        for name, layer in parent._modules.items():
            if type(layer) is not kind:
                return f"{prefix}{name} is a {type(layer).__name__}, not the {kind.__name__} it was"
    return None


_twins: dict[str, nn.Module] = {}  # the latest twin by description; building one takes 1 ms


def _twin(described: str, config: Callable[[], dict]) -> nn.Module:
    """A network of that description, on the meta device. Its parameters take no memory."""
    if described not in _twins:
        _twins.clear()
        _twins[described] = build(config(), device="meta")
    return _twins[described]


def _settings(model) -> str | None:
    """The first difference in sizes, options or methods from a network built from the description.

    None if there is none.
    """
    twin = _twin(repr(model.config()), model.config)
    for (name, module), made in zip(model.named_modules(), twin.modules(), strict=True):
        name = name or type(module).__name__
        kind, expected = type(module), {k: v for k, v in vars(made).items() if k[0] != "_"}
        if kind in _FORWARD and kind.forward is not _FORWARD[kind]:
            return f"{kind.__name__}.forward was replaced"
        for key, value in vars(module).items():
            if key == "_compiled_call_impl" and value is not None:
                return f"{name} is compiled"
            if key not in vars(made) and hasattr(kind, key):
                return f"{name} has a {key} of its own"
            if key in expected and key != "training" and value != expected[key]:
                return f"{name} has {key} {value}, not {expected[key]}"
        if module._buffers:
            return f"{name} has a buffer {next(iter(module._buffers))}"
        shapes, found = (
            {key: None if p is None else tuple(p.shape) for key, p in m._parameters.items()}
            for m in (made, module)
        )
        if found != shapes:
            return f"{name} has the parameters {found}, not {shapes}"
    return None


def _hooks(model) -> str | None:
    if isinstance(model, Net):
        return None
    for name, module in model.named_modules():
        if any(getattr(module, hooks) for hooks in _HOOKS):
            return f"{name or type(model).__name__} has a hook"
    if any(getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS):
        return "a hook on all modules is registered"
    if tape.autocasting(next(model.parameters())):
        return "autocast is on, so a call of the network computes in fewer bits"
    for name, p in model.named_parameters():
        if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None):
            return f"{name} has a gradient hook"
    return None


def _parameters(model) -> str | None:
    """The reason why the parameters cannot be trained as plain tensors of one kind, or None."""
    if isinstance(model, Net):
        return None
    named = dict(model.named_parameters(remove_duplicate=False))
    first_name, first = next(iter(named.items()))
    for name, p in named.items():
        if type(p) is not nn.Parameter:
            return f"{name} is a {type(p).__name__}, not a plain parameter"
        if not p.requires_grad:
            return f"trains every parameter, but {name} does not require a gradient"
        if (p.dtype, p.device) != (first.dtype, first.device):
            return (
                f"{name} is {p.dtype} on {p.device}, but {first_name} {first.dtype} on "
                f"{first.device}"
            )
        if not p.is_contiguous():
            return f"{name} is not contiguous"
    spans = sorted(
        (p.data_ptr(), p.data_ptr() + p.numel() * p.element_size(), name)
        for name, p in named.items()
        if p.numel()
    )
    for (_, end, one), (start, _, other) in itertools.pairwise(spans):
        if start < end:
            return f"{one} and {other} share memory"
    return None


class Checked:
    """A network that `network` has accepted, to notice changes faster than `network` does.

    It compares objects, not values: all attributes of all modules, and what is known of the
    parameters. So it may take an equal network for a changed one, but no changed one for the same.
    """

    def __init__(self, model: nn.Module):
        self._facts, self._held = _facts(model)  # no held object's id can become another's

    @classmethod
    def of(cls, model: Net | nn.Module) -> "Checked | None":
        """A network as it is now. None if `network` refuses it, or if it must check each time."""
        if not isinstance(model, MLP) or any(map(_has_lists, model.modules())):
            return None
        return cls(model) if network(model) is None else None

    def holds(self, model: nn.Module) -> bool:
        """True if nothing has changed that `network` looks at."""
        if any([kind.forward is not _FORWARD[kind] for kind in _FORWARD]):
            return False
        if any([getattr(nn.modules.module, f"_global{hooks}") for hooks in _HOOKS]):
            return False
        facts, _ = _facts(model)
        return facts == self._facts and not torch.is_autocast_enabled("cpu")


def _has_lists(module: nn.Module) -> bool:
    """True if an attribute may change in place, other than those that nn.Module has."""
    known = vars(nn.Module())
    return any([type(v) in (list, set, dict) for k, v in vars(module).items() if k not in known])


def _facts(model: nn.Module) -> tuple[list, list]:
    """(what identifies a network's modules and parameters, the objects that it names by id)."""
    held: list = []
    facts: list = []
    left: list = [model]
    while left:
        module = left.pop()
        own = vars(module)
        held += [module, type(module), *own.values()]
        facts += own
        for inner in own.values():
            if isinstance(inner, dict) and inner:
                held += inner.values()
                facts += inner
        left += own["_modules"].values()
        for p in own["_parameters"].values():
            if p is not None:
                facts += (type(p), p.shape, p.dtype, p.device, p.data_ptr(), p.requires_grad)
                hooks = p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)
                facts += (p.is_contiguous(), not hooks)
    facts += map(id, held)
    return facts, held


def criterion(loss: losses.LossFunction) -> str | None:
    """The reason why the loss may differ from its class, or has no gradient of ours; or None."""
    if type(loss) in losses.LOSSES.values():
        changed = [name for name in vars(loss) if hasattr(type(loss), name)]
        return f"this {type(loss).__name__} has a {changed[0]} of its own" if changed else None
    for kind in losses.LOSSES.values():
        if isinstance(loss, kind):
            return (
                f"{type(loss).__name__} is a subclass of {kind.__name__} and may compute "
                "something else"
            )
    if hasattr(loss, "forward") and hasattr(loss, "backward"):
        return None
    return f"needs one of the losses {', '.join(losses.LOSSES)}, got {type(loss).__name__}"


def optimizer(optimizer: torch.optim.Optimizer) -> str | None:
    """The reason why a step of the optimizer may differ from its class's update, or None."""
    kind = type(optimizer)
    if kind not in OPTIMIZERS.values():
        names = ", ".join(known.__name__ for known in OPTIMIZERS.values())
        return f"needs mlp's {names}, got {kind.__module__.split('.')[0]}'s {kind.__name__}"
    if any(getattr(optimizer, hooks) for hooks in _STEP_HOOKS):
        return f"this {kind.__name__} has a hook on its steps"
    if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return "a hook on the steps of all optimizers is registered"
    own = vars(optimizer).get("step")  # torch's schedulers wrap step without changing its result
    if own is not None and getattr(own, "__wrapped__", None) is not kind.step:
        return f"this {kind.__name__} has a step of its own"
    return None


def needs_closure(optimizer: torch.optim.Optimizer) -> str | None:
    """The reason why one backward is not enough for an optimizer's step, as for LBFGS; or None."""
    for name, parameter in inspect.signature(type(optimizer).step).parameters.items():
        if name == "closure" and parameter.default is parameter.empty:
            return (
                f"{type(optimizer).__name__} computes the loss several times a step, which a "
                "Trainer does not do; write the loop yourself: optimizer.step(closure)"
            )
    return None
