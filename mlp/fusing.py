"""`fuse` replaces torch's modules by handgrad's in a model that is already built.

    nn.Linear, nn.Conv2d, nn.LayerNorm, and the losses nn.CrossEntropyLoss, nn.MSELoss,
    nn.BCEWithLogitsLoss, nn.HuberLoss     get our class
    nn.Sequential                          becomes mlp.Sequential, which runs a layer, its
                                           activation and its max-pool as one operation

Every module stays the same object with the same parameters and computes the same. Only its class
changes.
"""

import copyreg
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from .modules import (
    BCEWithLogitsLoss,
    Conv2d,
    CrossEntropyLoss,
    HuberLoss,
    LayerNorm,
    Linear,
    MSELoss,
)
from .sequential import FOLLOWERS, FUSED, Sequential, keys_from, next_place, operation

TWINS = {
    nn.Linear: Linear,
    nn.Conv2d: Conv2d,
    nn.LayerNorm: LayerNorm,
    nn.CrossEntropyLoss: CrossEntropyLoss,
    nn.MSELoss: MSELoss,
    nn.BCEWithLogitsLoss: BCEWithLogitsLoss,
    nn.HuberLoss: HuberLoss,
}
_LAYERS = (nn.Linear, nn.Conv2d, nn.LayerNorm)  # modules with parameters


def fuse(module: nn.Module, report: Callable[[str], object] | None = None) -> nn.Module:
    """Replace torch's modules in `module` by handgrad's, in place, and return `module`.

    Outputs and gradients stay the same, also those of each layer called by itself. Modules and
    parameters are the same objects under the same names, so optimizers and checkpoints keep
    working. nn.MSELoss is the exception: where torch's repeats a target of another shape, ours
    raises a ValueError. TypeError if `module` is no nn.Module.

    report: is called with one line for each layer, activation and loss. The line says what replaced
    it and what runs as one operation, or why it was left alone. `report=print` shows the lines and
    `report=lines.append` keeps them. Without `report`, they go to the logger "handgrad" at level
    INFO.

    Some modules are left alone: subclasses of layers, parametrized, pruned and lazy layers, and
    objects or subclasses of nn.Sequential with a forward of their own. An activation and its layer
    run as one operation if the activation directly follows the layer in an nn.Sequential, see
    `Sequential`. A module with a hook is called by itself; the hook may come before or after
    `fuse`. Layers that are added later stay torch's until `fuse` is called again.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"fuse: module must be an nn.Module, got {type(module).__name__}")
    report = report or logging.getLogger("handgrad").info
    children_first = reversed([*module.modules()])
    changes = {child: _change(child) for child in children_first}
    places = dict(module.named_modules(remove_duplicate=False))
    runs: dict[str, str | None] = {}
    for path, child in places.items():
        if isinstance(child, nn.Sequential):
            runs |= {f"{path}.{slot}".lstrip("."): line for slot, line in _runs(child)}
    for path, child in places.items():
        alone = f"{type(child).__name__} left alone: {_ALONE}" if _is_follower(child) else None
        for line in (changes.pop(child, None), runs.get(path, alone)):
            if line is not None:
                report(f"{path or 'module'}: {line}")
    return module


_ALONE = "it does not directly follow a Linear or Conv2d in an nn.Sequential"


def _change(module: nn.Module) -> str | None:
    """Make a module ours. Returns what became of it, or None if it is of no kind of ours."""
    kind: Any = type(module)
    if isinstance(module, nn.Sequential):
        kinds = [type(child) for child in module._modules.values()]
        if FUSED.keys().isdisjoint(kinds) or _obstacle_of_sequential(module) is not None:
            return None  # it has no layer of ours to fuse with, or may not be changed
        ours = _ours_of(kind)
    else:
        if (reason := _obstacle(module)) is not None:
            return f"{kind.__name__} left alone: {reason}"
        ours = TWINS.get(kind, kind)
    if ours is kind:
        return None
    module.__class__ = ours
    vars(module).update(FUSED.get(ours, {}))
    return f"{kind.__name__} -> mlp.{'Sequential' if isinstance(module, Sequential) else module}"


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


def _obstacle_of_sequential(sequential: nn.Sequential) -> str | None:
    """The reason why this nn.Sequential cannot run its children as `Sequential` does, or None."""
    kind: Any = type(sequential)
    unchanged = kind.forward in (nn.Sequential.forward, Sequential.forward)
    if not unchanged or "forward" in vars(sequential):
        return f"its {kind.__name__} has a forward of its own"
    if kind.__iter__ is not nn.Sequential.__iter__:
        return f"its {kind.__name__} has an order of its own"
    if kind is not nn.Sequential and kind.__module__.startswith("torch."):
        return f"torch knows its {kind.__name__} by this class"
    try:
        _ours_of(kind)
    except Exception as error:  # from its metaclass or its __init_subclass__
        return f"its {kind.__name__} takes no subclass ({type(error).__name__}: {error})"
    return None


@functools.cache
def _ours_of(kind: Any) -> Any:
    """`Sequential` for nn.Sequential. For a subclass, the same subclass with our forward."""
    if issubclass(kind, Sequential):
        return kind
    if kind is nn.Sequential:
        return Sequential
    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    made: Any = type(kind.__name__, (Sequential, kind), own)

    def reduce(self, protocol):
        """What `kind` has defined for a pickle, with names that pickle can find."""
        found = super(made, self).__reduce_ex__(max(2, protocol))
        if type(self) is not made or isinstance(found, str):
            return found
        function, arguments, *more = found
        if function is copyreg.__newobj__:
            function = _new
        return kind if function is made else function, _named(arguments, made, kind), *more

    made.__reduce_ex__ = reduce  # pickle cannot find `made` by its name
    return made


def _named(arguments: tuple, made: type, kind: type) -> tuple:
    return tuple(kind if one is made else one for one in arguments)


def _new(kind: Any, *arguments: Any) -> Sequential:
    """An object of `_ours_of(kind)` without attributes. Pickle and copy fill them in."""
    made = _ours_of(kind)
    return made.__new__(made, *arguments)


def _runs(sequential: nn.Sequential) -> Iterator[tuple[str, str | None]]:
    """(slot, line) for each operation of several children and each follower that is left alone.

    The line is None for a follower that is part of an operation.
    """
    slots, children = list(sequential._modules), list(sequential._modules.values())
    obstacle = _obstacle_of_sequential(sequential)
    if obstacle is not None:
        for slot, child in sequential._modules.items():
            if _is_follower(child):
                yield slot, f"{type(child).__name__} left alone: {obstacle}"
        return
    keys: tuple = ()
    while len(keys) < len(children):
        keys += keys_from(children, len(keys))
    kinds = [type(child).__name__ for child in children]
    for at, layer in enumerate(children):
        options, end, reason = operation(keys, at)
        if options:
            names = " + ".join(kind for kind in kinds[at:end] if kind != "Identity")
            yield slots[at], f"{names} run as one operation"
            yield from ((slot, None) for slot in slots[at + 1 : end])
        place = next_place(keys, end - 1)
        if reason is None and isinstance(layer, (nn.Linear, nn.Conv2d)):
            reason = "the {layer} before it is left alone"
        if reason is not None and place < len(children) and _is_follower(children[place]):
            reason = reason.format(layer=kinds[at], follower=children[place])
            yield slots[place], f"{kinds[place]} left alone: {reason}"


def _is_follower(module) -> bool:
    """True if a layer may be fused with this module: a pooling, or one of torch's activations."""
    if type(module) in TWINS:  # it is replaced itself
        return False
    homes = {kind.__module__ for kind in type(module).__mro__}
    return type(module) in FOLLOWERS or (
        nn.ReLU.__module__ in homes and not isinstance(module, nn.MultiheadAttention)
    )
