"""`fuse` replaces torch's modules by handgrad's in a model that is already built.

The new modules share every parameter with the old ones.

    nn.Linear, nn.Conv2d, nn.LayerNorm, and the losses
        nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss,
        nn.HuberLoss                                         get our class; the object stays the
        same
    in an nn.Sequential: Linear, activation                  become mlp.Linear with that activation,
        nn.Identity
                         Conv2d, activation, MaxPool2d       become mlp.Conv2d with both,
                             nn.Identity, nn.Identity

A layer that is fused with its neighbours is a shallow copy. Another model or a list may also hold
the original layer, which still computes what it did before. Names and positions do not change.
"""

import copy
import dis
import inspect
import logging
import types
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
}  # arguments that only our classes have, with the value that changes nothing
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)  # modules with parameters
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LISTS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_WALKS = {"modules", "named_modules", "children", "named_children", "_modules"}
_STEPS = ("BINARY_SUBSCR", "FOR_ITER", "UNPACK_SEQUENCE")
_SEEN = ("__init__", "forward")  # other checks see them
_ALONE = "it does not directly follow a Linear or Conv2d in an nn.Sequential"


def fuse(module: nn.Module, report: Callable[[str], object] | None = None) -> nn.Module:
    """Replace torch's modules in `module` by handgrad's, in place, and return `module`.

    Outputs and gradients stay the same. Parameters are the same objects under the same names, so
    optimizers and checkpoints keep working. TypeError if `module` is no nn.Module.

    report: is called with one line for each layer, activation and loss. The line says what replaced
    it, or why it was left alone. `report=print` shows the lines and `report=lines.append` keeps
    them. Without `report`, they go to the logger "handgrad" at level INFO.

    Some modules are left alone: subclasses, parametrized, pruned and lazy layers, and objects with
    a forward of their own. An activation is left alone if it does not directly follow its layer in
    an nn.Sequential, or if a hook on either would see other values than before. So register hooks
    first, then fuse, then call `torch.compile`. The layers of an nn.Sequential stay apart if a
    method of the model uses it otherwise than by calling it, as `self.body[0](x)` does. Code
    outside of the model that calls one layer gets the activated output.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse: module must be an nn.Module, got {type(module).__name__}")
    report = report or logging.getLogger("handgrad").info
    copies: dict[tuple, tuple] = {}
    reasons: dict[int, str] = {}
    uses = [_uses(function) for function in _functions(module)]
    for (
        path,
        child,
    ) in (
        module.named_modules()
    ):  # named_modules looks children up after it has yielded their parent, so they are fused
        if isinstance(child, nn.Sequential):
            if (apart := _taken_apart(module, path, child, uses)) is not None:
                reasons |= {id(layer): apart for layer in child}
            else:
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


class _Uses(NamedTuple):
    """What a function of the model does with the model's attributes, read from its bytecode.

    names: attributes that it reads without calling them at once, and those that it names as texts.
    steps: how often it indexes or iterates. walks: True if it may call any module of the model.
    """

    names: set[str]
    steps: int
    walks: bool


def _taken_apart(
    module: nn.Module, path: str, sequential: nn.Sequential, uses: Sequence[_Uses]
) -> str | None:
    """The reason why a function of the model may call the layers of an nn.Sequential one by one.

    None if no function does. A Sequential inside of k lists is reached by k steps. One more step
    takes it apart.
    """
    own = [kind for kind in type(sequential).__mro__ if not _is_foreign(kind.__module__)]
    methods = [v for kind in own for name, v in vars(kind).items() if name not in _SEEN]
    if any(map(_unwrapped, methods)):
        return f"its {type(sequential).__name__} has methods of its own, which may call it"
    if _hooked(sequential):
        return f"a hook on its {type(sequential).__name__} may call it"
    parts, depth = path.split("."), 0
    while parts and isinstance(module.get_submodule(".".join(parts[:-1])), _LISTS):
        depth += 1
        parts.pop()
    for use in uses:
        if use.walks:
            return "a method of the model goes through all its modules"
        if parts and parts[-1] in use.names and use.steps >= depth + (depth > 0):
            return f"a method of the model does more with {parts[-1]} than call it"
    return None


def _is_foreign(name: str) -> bool:
    """True if this is the name of a module of Python, torch or ours."""
    return name.split(".")[0] in ("torch", "builtins", "mlp", "kernels")


def _functions(module: nn.Module) -> list[types.FunctionType]:
    """The functions of the model's own classes and objects, without __init__ and torch's."""
    children = [*module.modules()]
    kinds = {kind for child in children for kind in type(child).__mro__}
    values = [
        value
        for kind in kinds
        if not _is_foreign(kind.__module__)
        for name, value in vars(kind).items()
        if name != "__init__"
    ]
    values += [value for child in children for value in vars(child).values()]
    hooks = [getattr(child, name) for child in children for name in _HOOKS]
    values += [hook for by_handle in hooks for hook in by_handle.values()]
    found = [function for value in values for function in _unwrapped(value)]
    return [function for function in found if not _is_foreign(function.__module__ or "")]


def _unwrapped(value: object) -> list[types.FunctionType]:
    """The functions in a method, a property, a partial function or a decorated function."""
    if isinstance(value, property):
        return [f for part in (value.fget, value.fset) for f in _unwrapped(part)]
    for name in ("__func__", "func", "__wrapped__"):
        if not isinstance(value, nn.Module) and callable(inner := getattr(value, name, None)):
            return _unwrapped(inner)
    return [value] if isinstance(value, types.FunctionType) else []


def _uses(function: types.FunctionType) -> _Uses:
    """See `_Uses`. Python loads an attribute that is called at once in another way."""
    codes, names, steps, walks = [function.__code__], set(), 0, False
    takes_inputs = len(inspect.signature(function).parameters) > 1
    while codes:
        code = codes.pop()
        walks |= takes_inputs and not _WALKS.isdisjoint(code.co_names)
        for value in code.co_consts:
            if isinstance(value, types.CodeType):
                codes.append(value)
            elif isinstance(value, str) and all(
                p.isidentifier() or p.isdigit() for p in value.split(".")
            ):
                names |= set(value.split("."))
                steps += value.count(".")
        last = ""
        for step in dis.get_instructions(code):
            is_step = step.opname in _STEPS or (step.opname, step.argrepr) == ("BINARY_OP", "[]")
            steps += is_step and last != "FOR_ITER"  # `for i, layer in …` is one step
            last = step.opname
            if step.opname == "LOAD_ATTR" and "NULL" not in step.argrepr:
                names.add(step.argval)
    return _Uses(names, steps, walks)


def _make_ours(layer, options=()):
    """`layer` itself, with our class and these options."""
    layer.__class__ = TWINS.get(type(layer), type(layer))
    vars(layer).update(OPTIONS.get(type(layer), {}), **dict(options))
    return layer


def _obstacle(module: nn.Module) -> str | None:
    """The reason why this layer or loss cannot be replaced, or None.

    The result is also None for modules of other kinds.
    """
    if not any(isinstance(module, kind) for kind in TWINS):
        return None
    if parametrize.is_parametrized(module):
        return "it is parametrized"
    if isinstance(module, LazyModuleMixin):
        return "it has no weights yet; run a batch through the model first"
    if type(module) in TWINS.values():
        return None
    if type(module) not in TWINS:
        return "a subclass may compute something else"
    if own := vars(module).keys() & {"forward", "_compiled_call_impl", "activation", "max_pool"}:
        return f"this object has {', '.join(sorted(own))} of its own"
    if isinstance(module, nn.Conv2d) and (module.groups != 1 or module.padding_mode != "zeros"):
        return (
            f"mlp.Conv2d takes groups 1 and padding_mode zeros, this one has {module.groups} and "
            f"{module.padding_mode}"
        )
    return _odd_parameters(module) if isinstance(module, _LAYERS) else None


def _odd_parameters(layer) -> str | None:
    """The reason why a layer's parameters cannot be used, or None.

    Such parameters are pruned, normalised, kept as buffers, sharded, quantised or complex.
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
    """Fuse each layer of an nn.Sequential with the modules that follow it.

    Returns [(slot, description of the new layer)]. copies: the fused layers made so far. A layer
    that stands in two places with the same followers becomes one object again. reasons: gets, for
    the id of each follower that stays, the reason.
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
            )  # the original is kept, so that no other object gets its id
        sequential._modules[slot] = copies[key][1]
        for (place, _), follower in zip(slots[i + 1 :], taken):
            sequential._modules[place] = nn.Identity().train(follower.training)
        names = " + ".join(type(member).__name__ for member in (layer, *taken))
        changes.append((slot, f"{names} -> mlp.{copies[key][1]}"))
    return changes


def _followers(sequential, line, reasons) -> tuple[dict, list]:
    """(options of the first layer of `line`, modules after it that these options replace)."""
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
    """The reason why `follower` cannot be fused into a layer that has these options, or None.

    after: the module that comes after `follower`, or None.
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
    activated = not kernels.ACTIVATIONS[options["activation"]].is_identity
    if options.get("max_pool", 1) != 1 or ("activation" in option and activated):
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
    """True if a layer may be fused with this module: a pooling, or one of torch's activations."""
    if type(module) in TWINS:  # it is replaced itself
        return False
    homes = {kind.__module__ for kind in type(module).__mro__}
    return type(module) is nn.MaxPool2d or (
        nn.ReLU.__module__ in homes and not isinstance(module, nn.MultiheadAttention)
    )


def _option(module) -> dict:
    """The option by which a layer does this module's work: an activation or a pooling window.

    {} if no option does it.
    """
    if type(module) is nn.MaxPool2d and _same(module, nn.MaxPool2d(module.kernel_size)):
        window = _spread(module.kernel_size)
        return {"max_pool": window[0] if window[0] == window[-1] else window}
    for name, row in kernels.ACTIVATIONS.items():
        if row.module is not None and _same(module, row.module()):
            return {"activation": name}
    return {}


def _same(module, model) -> bool:
    """True if `module` has the type and the settings of `model`. `inplace` may differ."""
    settings = {
        name: value
        for name, value in vars(model).items()
        if name[0] != "_" and name not in ("training", "inplace")
    }
    return type(module) is type(model) and all(
        _spread(getattr(module, name)) == _spread(settings[name]) for name in settings
    )


def _spread(setting):
    """2 and [2, 2] as (2, 2). Other settings are returned unchanged."""
    if isinstance(setting, int):
        return setting, setting
    return tuple(setting) if isinstance(setting, list) else setting
