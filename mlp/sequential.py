"""`Sequential` runs neighbouring children as one operation where a call of each gives the same.

    a layer of ours        and the children after it, in this order
    mlp.Linear             activation
    mlp.Conv2d             activation, max-pool

Linear layers that follow each other, each with its activation, are one operation together,
`kernels.mlp`, if all but the last have the same activation.

The children stay what they are: each computes by itself what it computes in torch. Every call reads
how the children are now: their classes, settings and hooks. So all of these may change between two
calls.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

import kernels

from .modules import Conv2d, Linear, Window, run_stack, runs_forward

# A layer that takes over the work of the children after it -> the arguments of its method `fused`,
# in the order in which they are computed, each with the value that changes nothing. The layer has
# attributes of these names.
FUSED: dict[type, dict[str, Any]] = {
    Linear: {"activation": "identity"},
    Conv2d: {"activation": "identity", "max_pool": 1},
}


class Follower(NamedTuple):
    """A class of torch whose work a layer can take over.

    option: the argument of the layer's `fused`. reads: the names of the settings that change what a
    module of the class computes. value: the function from a tuple of these settings to the
    argument's value, or to None if no value does what the module does.
    """

    option: str
    reads: tuple[str, ...]
    value: Callable[[Any], Any]


def _window(settings: tuple) -> Window | None:
    """The window of a pooling if its windows cover the image side by side, else None."""
    kernel_size, *others = map(_pair, settings[:4])
    plain = others == [kernel_size, (0, 0), (1, 1)] and not any(settings[4:])
    return (kernel_size[0], kernel_size[1]) if plain else None


def _pair(setting: Any) -> tuple[int, ...]:
    """2, (2,) and [2, 2] as (2, 2)."""
    sides = [setting] if hasattr(setting, "__index__") else list(setting)
    sides = [int(side) for side in sides]
    return tuple(sides * 2 if len(sides) == 1 else sides)


# The modules of torch in `kernels.ACTIVATIONS` are followers too.
FOLLOWERS: dict[type, Follower] = {
    nn.MaxPool2d: Follower(
        "max_pool",
        ("kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"),
        _window,
    ),
}


# Child -> what decides how it runs: (class, settings, inplace). settings is None if the child must
# be called by itself. class is None if it is no layer of FUSED and no follower.
Key = tuple[type | None, Any, Any]


class Step(NamedTuple):
    """So many children that run as one operation, or one child that is called by itself.

    options: arguments of the first child's `fused`, or of `run_stack`. Without options, the child
    is called by itself. layers: the places of the layers of a stack, counted from the first child.
    """

    options: dict[str, Any]
    children: int
    layers: tuple[int, ...] = ()


Plan = list[Step]

_followers: dict[type, Follower] = {}  # FOLLOWERS and activations
_known: dict[type, tuple[Callable, tuple[str, ...]]] = {}  # class -> (its forward, its settings)
_plans: dict[tuple[Key, ...], Plan] = {}
_activations: list[str] = []  # names of the activations that the tables above know
_CALL = nn.Module.__call__


def _fill_tables() -> None:
    named: dict[type, dict] = {}
    for table in (_followers, _known, _plans):
        table.clear()
    _followers.update(FOLLOWERS)
    for name, row in kernels.ACTIVATIONS.items():
        if row.module is not None:
            model = row.module()
            attributes, kind = vars(model), type(model)
            free = ("training", "inplace")  # they do not change the output
            reads = tuple(key for key in attributes if key[0] != "_" and key not in free)
            known = named.setdefault(kind, {})
            known[tuple([attributes[key] for key in reads])] = name
            _followers[kind] = Follower("activation", reads, _looked_up(known))
    reads_of: dict[Any, tuple] = {kind: tuple(options) for kind, options in FUSED.items()}
    reads_of |= {kind: row.reads for kind, row in _followers.items()}
    _known.update({kind: (kind.forward, reads) for kind, reads in reads_of.items()})
    _activations[:] = kernels.ACTIVATIONS


def _looked_up(known: dict[Any, str]) -> Callable[[Any], str | None]:
    # torch 2.11 cannot trace a bound dict.get.
    return lambda settings: known.get(settings)


_fill_tables()


def keys_from(children: Sequence[Any], at: int) -> tuple[Key, ...]:
    """The keys of the children from `at` on, up to the first that must be called by itself."""
    if len(_activations) != len(kernels.ACTIVATIONS):
        _fill_tables()
    keys: list[Key] = []
    for place in range(at, len(children)):
        child = children[place]
        kind, own = type(child), child.__dict__
        known = _known.get(kind)
        if (
            known is None
            or not runs_forward(child)
            or known[0] is not kind.forward
            or kind.__call__ is not _CALL  # a tracer of torch.fx replaces it, to see every child
        ):
            keys.append((None if known is None else kind, None, _overwritten(children, place)))
            break
        reads = known[1]
        settings = tuple([own[name] for name in reads]) if reads else ()
        keys.append((kind, settings, own.get("inplace")))
    return tuple(keys)


def _overwritten(children: Sequence[Any], place: int) -> bool:
    """True if this child or one after it may overwrite what this child is given.

    A child in between, such as nn.Flatten, may hand on the same memory. A layer does not.
    """
    for child in itertools.islice(children, place, None):
        if type(child) in FUSED:
            return False
        if child.__dict__.get("inplace"):
            return True
    return False


def plan(keys: tuple[Key, ...]) -> Plan:
    """The operations that compute what children with these keys compute one after the other."""
    found: Plan = []
    stack: list[str] = []  # the activation of each layer, if the last step can take one more layer
    at = 0
    while at < len(keys):
        options, end, _ = operation(keys, at)
        kind, settings, _ = keys[at]
        if kind is not Linear or settings is None:
            stack = []
            found.append(Step(options, end - at))
        else:
            activation = options.get("activation", settings[0])
            if stack and stack[-1] == stack[0]:
                _, count, layers = found.pop()
                names = {"activation": stack[0], "output_activation": activation}
                stack.append(activation)
                found.append(Step(names, count + end - at, (*(layers or (0,)), count)))
            else:
                stack = [activation]
                found.append(Step(options, end - at))
        at = end
    return found


def operation(keys: tuple[Key, ...], at: int) -> tuple[dict[str, Any], int, str | None]:
    """The operation that starts with the child `at`: (options, end, reason).

    It computes the children at, …, end - 1 with these options. reason: why it does not compute the
    next child too, a template for `layer` and `follower`. It is None if there is no next child, or
    no layer that could take it over.
    """
    kind, settings, _ = keys[at]
    options: dict[str, Any] = {}
    end, place = at + 1, next_place(keys, at)
    defaults = None if kind is None else FUSED.get(kind)
    if defaults is None or place == len(keys):
        return options, end, None
    if settings is None:
        return options, end, f"the {{layer}} before it has {_OWN}"
    now = dict(zip(defaults, settings))
    while place < len(keys):
        kind, settings, _ = keys[place]
        after = next_place(keys, place)
        row = None if kind is None else _followers.get(kind)
        if row is None or row.option not in defaults:
            return options, end, "kernels have no {layer} with {follower}"
        if settings is None:
            return options, end, f"it has {_OWN}"
        value = row.value(settings)
        if value is None:
            return options, end, "kernels have no {follower}"
        for name in reversed(defaults):  # this option and those that are computed after it
            if now[name] != defaults[name]:
                return options, end, f"the {{layer}} before it already has {name}={now[name]}"
            if name == row.option:
                break
        if after < len(keys) and keys[after][2]:
            return options, end, "the module after it overwrites its output"
        options[row.option] = now[row.option] = value
        end, place = place + 1, after
    return options, end, None


_OWN = "a hook, a forward of its own or a compiled call"


def next_place(keys: tuple[Key, ...], at: int) -> int:
    """The place of the next child that does something."""
    at += 1
    while at < len(keys) and keys[at][0] is nn.Identity and keys[at][1] is not None:
        at += 1
    return at


class Sequential(nn.Sequential):
    """`nn.Sequential` that runs a layer of ours with its activation and max-pool as one operation.

    Linear layers behind each other run as one operation if all but the last have one activation.
    The arguments are nn.Sequential's. Each child computes by itself what it computes in torch, so
    indexing, iterating, slices and hooks give torch's values. A child with a hook, with a
    parametrisation or with a forward of its own is called by itself. `mlp.fuse` makes one from an
    nn.Sequential, and layers of ours from torch's.
    """

    def forward(self, input: Any) -> Any:
        """The output of the last child."""
        children: list[Any] = list(self)
        at = 0
        while at < len(children):
            if _has_any_global_hook():
                input, at = children[at](input), at + 1
                continue
            for options, count, layers in _planned(keys_from(children, at)):
                run = children[at : at + count]
                output = None
                if options and isinstance(input, torch.Tensor):
                    if layers:
                        output = run_stack(input, [run[place] for place in layers], **options)
                    else:
                        output = run[0].fused(input, **options)
                if output is None:
                    for child in run:
                        input = child(input)
                else:
                    input = output
                at += count
        return input


def _planned(keys: tuple[Key, ...]) -> Plan:
    """`plan`, which is kept."""
    if torch.compiler.is_compiling():  # a compiled graph would depend on all that is kept
        return plan(keys)
    try:
        found = _plans.get(keys)
    except TypeError:  # a setting, such as a list, cannot be a key
        return plan(keys)
    if found is None:
        if len(_plans) > 1000:
            _plans.clear()
        found = _plans[keys] = plan(keys)
    return found
