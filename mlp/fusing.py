"""fuse: swaps torch's modules for handgrad's in a model that is already built.

They share every parameter.

    nn.Linear, nn.Conv2d, nn.LayerNorm, and the losses
        nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss,
        nn.HuberLoss                                         become ours where they stand: the same
        object, of our class
    in an nn.Sequential: Linear, activation                  become mlp.Linear with that activation,
        nn.Identity
                         Conv2d, activation, MaxPool2d       become mlp.Conv2d with both,
                             nn.Identity, nn.Identity

A layer that takes in its neighbours is a shallow copy, so that whoever else holds the layer, such
as another model or a plain list, still gets from it what it computed before. Names and positions
stay as they are.
"""

import copy
import logging
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

import kernels

from .modules import (
    BCEWithLogitsLoss,
    Conv2d,
    CrossEntropyLoss,
    HuberLoss,
    LayerNorm,
    Linear,
    MSELoss,
)

TWINS = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.LayerNorm: LayerNorm,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.MSELoss: MSELoss,
    nn.BCEWithLogitsLoss: BCEWithLogitsLoss,
    nn.HuberLoss: HuberLoss,
}
OPTIONS: dict[type, dict[str, Any]] = {
    Linear: {"activation": "identity"},
    Conv2d: {"activation": "identity", "max_pool": 1},
}  # what ours have besides
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)  # what has parameters
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_ALONE = "it does not directly follow a Linear or Conv2d in an nn.Sequential"


def fuse(module: nn.Module, report: Callable[[str], object] | None = None) -> nn.Module:
    """Swap what handgrad has in `module`, in place, and return it. Outputs and gradients stay the
    same.

    Parameters stay the very same objects under the same names, so optimizers and checkpoints go on
    as before. `report` gets a line for each layer, activation and loss: what became of it, or why
    it was left alone. `report=print` shows them, `report=lines.append` keeps them; without it they
    go to the logger "handgrad", at level INFO.

    Left alone: subclasses; parametrized, pruned and lazy layers; objects with a forward of their
    own; an activation that does not directly follow its layer in an nn.Sequential, or where a hook
    on either would see other values than before. Fuse after registering hooks and before
    `torch.compile`. Code that picks single layers out of an nn.Sequential, as in `self.body[0](x)`,
    gets the activated output.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse: module must be an nn.Module, got {type(module).__name__}")
    report = report or logging.getLogger("handgrad").info
    copies: dict[tuple, tuple] = {}
    reasons: dict[int, str] = {}
    for (
        path,
        child,
    ) in (
        module.named_modules()
    ):  # children are looked up after their parent was yielded, so here fused
        if isinstance(child, nn.Sequential):
            for slot, change in _fuse_neighbours(child, copies, reasons):
                report(f"{path}.{slot}: {change}".lstrip("."))
        kind = type(child).__name__
        reason = _obstacle(child) or (
            reasons.get(id(child), _ALONE) if _is_follower(child) else None
        )
        if reason is not None:
            report(f"{path or 'module'}: {kind} left alone: {reason}")
        elif type(child) in TWINS:
            _make_ours(child)
            report(f"{path or 'module'}: {kind} -> mlp.{child}")
    return module


def _make_ours(layer, options=()):
    """`layer` itself, of our class and with these options."""
    layer.__class__ = TWINS.get(type(layer), type(layer))
    vars(layer).update(OPTIONS.get(type(layer), {}), **dict(options))
    return layer


def _obstacle(module: nn.Module) -> str | None:
    """Why this layer or loss cannot be swapped, or None.

    None also for modules of other kinds.
    """
    if not any(isinstance(module, kind) for kind in TWINS):
        return None
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, LazyModuleMixin):
        return "it has no weights yet: run a batch through the model first"
    if type(module) in TWINS.values():
        return None
    if type(module) not in TWINS:
        return "a subclass may compute something else"
    if own := vars(module).keys() & {"forward", "_compiled_call_impl", "activation", "max_pool"}:
        return f"this object has {', '.join(sorted(own))} of its own"
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        return (
            f"mlp.Conv2d has groups 1 and padding_mode zeros, this one {module.groups} and "
            f"{module.padding_mode}"
        )
    return _odd_parameters(module) if isinstance(module, _LAYERS) else None


def _odd_parameters(layer) -> str | None:
    """What is unusual in a layer's parameters.

    Pruned, normalised, frozen as buffers, sharded, quantised or complex ones.
    """
    if layer._parameters.keys() != {"weight", "bias"}:
        return (
            f"its parameters are {', '.join(sorted(layer._parameters)) or 'none'}, not weight and "
            "bias"
        )
    for name, p in layer._parameters.items():
        if p is not None and (type(p) is not nn.Parameter or not p.is_floating_point()):
            return f"its {name} is a {type(p).__name__} of {p.dtype}"
    return None


def _fuse_neighbours(sequential, copies, reasons) -> list[tuple[str, str]]:
    """Fuse each layer of an nn.Sequential with what follows it: [(slot, what became of it)].

    copies: those made so far, so that a layer standing in two places with the same followers is one
    object again. reasons: id of each follower that stays -> why.
    """
    slots = [
        (slot, child)
        for slot, child in sequential._modules.items()
        if type(child) is not nn.Identity or _hooked(child)
    ]
    changes = []
    for i, (slot, layer) in enumerate(slots):
        if not isinstance(layer, (nn.Linear, nn.Conv2d)):
            continue
        options, taken = _followers(sequential, [child for _, child in slots[i:]], reasons)
        if not taken:
            continue
        key = id(layer), *options.values()
        if key not in copies:
            copies[key] = (
                layer,
                _make_ours(copy.copy(layer), options),
            )  # the layer is kept, so that its id is
        sequential._modules[slot] = copies[key][1]
        for (place, _), follower in zip(slots[i + 1 :], taken):
            sequential._modules[place] = nn.Identity().train(follower.training)
        names = " + ".join(type(member).__name__ for member in (layer, *taken))
        changes.append((slot, f"{names} -> mlp.{copies[key][1]}"))
    return changes


def _followers(sequential, line, reasons) -> tuple[dict, list]:
    """The options of the layer that heads `line`, and the modules after it that they replace."""
    layer, *rest = line
    defaults = OPTIONS.get(TWINS.get(type(layer), type(layer)), {})
    options, taken = {name: getattr(layer, name, default) for name, default in defaults.items()}, []
    for follower, after in zip(rest, [*rest[1:], None]):
        if not _is_follower(follower):
            break
        option = _option(follower)
        reason = _refusal(sequential, layer, options, follower, option, after)
        if reason is not None:
            reasons[id(follower)] = reason
            break
        options.update(option)
        taken.append(follower)
    return options, taken


def _refusal(sequential, layer, options, follower, option, after) -> str | None:
    """Why `follower` stays behind a layer that has `options` so far, or None.

    after: the next in line.
    """
    if type(sequential).forward is not nn.Sequential.forward or "forward" in vars(sequential):
        return f"its {type(sequential).__name__} has a forward of its own"
    if _obstacle(layer) is not None:
        return f"the {type(layer).__name__} before it is left alone"
    if "forward" in vars(follower):
        return "it has a forward of its own"
    if not option:
        return f"kernels have no {follower}"
    if not option.keys() <= options.keys():
        return _ALONE
    if options.get("max_pool", 1) != 1 or (
        "activation" in option and options["activation"] != "identity"
    ):
        have = ", ".join(f"{name}={value}" for name, value in options.items())
        return f"the {type(layer).__name__} before it already has {have}"
    if _hooked(layer) or _hooked(follower):
        return f"a hook on it, or on the {type(layer).__name__} before it, would see other values"
    if (
        getattr(after, "inplace", False)
        and kernels.ACTIVATIONS[{**options, **option}["activation"]].needs == "y"
    ):
        return (
            f"the {type(after).__name__} after it overwrites the output, which the fused backward "
            "needs"
        )
    return None


def _hooked(module) -> bool:
    return any(getattr(module, hooks) for hooks in _HOOKS)


def _is_follower(module) -> bool:
    """Whether a layer may take this module in: a pooling, or one of torch's activations."""
    if type(module) in TWINS:  # swapped where it stands
        return False
    homes = {kind.__module__ for kind in type(module).__mro__}
    return type(module) is nn.MaxPool2d or (
        nn.ReLU.__module__ in homes and not isinstance(module, nn.MultiheadAttention)
    )


def _option(module) -> dict:
    """What a layer needs to do this module's work: an activation or a pooling window.

    {} if nothing would do.
    """
    if type(module) is nn.MaxPool2d and _same(module, nn.MaxPool2d(module.kernel_size)):
        window = _spread(module.kernel_size)
        return {"max_pool": window[0] if window[0] == window[-1] else window}
    for name, row in kernels.ACTIVATIONS.items():
        if row.module is not None and _same(module, row.module()):
            return {"activation": name}
    return {}


def _same(module, model) -> bool:
    """Whether `module` has the type and the settings of `model`.

    In place or not makes no difference.
    """
    settings = {
        name: value
        for name, value in vars(model).items()
        if name[0] != "_" and name not in ("training", "inplace")
    }
    return type(module) is type(model) and all(
        _spread(getattr(module, name)) == _spread(settings[name]) for name in settings
    )


def _spread(setting):
    """2 and [2, 2] as (2, 2); others as they are."""
    if isinstance(setting, int):
        return setting, setting
    return tuple(setting) if isinstance(setting, list) else setting
