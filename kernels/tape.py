"""How an operation joins autograd: how a call is dispatched, what is kept, and the derivative.

An operation file ends with one `Differentiable`. It holds two launchers, their two references, and
the NamedTuple that the forward returns beside y. Everything else follows from this row:

- the node of the tape, and double backward
- casting under torch.autocast
- the operators that torch.compile sees (`compiled`)
- the reference under torch.func, and for tensors that are not plain memory
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from . import compiled, launch

# torch's C functions. Every call asks them.
_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled
_is_functorch_tensor: Callable[[Any], bool] = torch._C._functorch.is_functorch_wrapped_tensor
_is_batched: Callable[[Any], bool] = torch._C._functorch.is_legacy_batchedtensor
_unsafe_view: Any = torch.ops.aten._unsafe_view.default


@dataclasses.dataclass(frozen=True, eq=False)
class Differentiable:
    """An operation with a gradient. Creating one registers it for torch.compile.

    name: its name in the table of operations, and the name of its operators.
    fwd, fwd_ref: `(*arguments) -> (y, saved)`. The arguments are positional.
    bwd, bwd_ref: `(dy, *saved, needs) -> gradients` of the first `inputs` arguments, in order. For
        a list of tensors it is a list. `needs` has one bool for each tensor of those arguments. If
        it is False, the gradient is None.
    saved: the NamedTuple that both forwards return. A field named like an argument of `fwd` is that
        argument. A field in `derived` is computed from the arguments, by name. Every other field is
        a tensor that the forward made, None, a number, or a tuple of these.
    inputs: how many of the first arguments have gradients.
    autocast: the dtype under torch.autocast, or None for autocast's own dtype.
    autocast_on: the types of devices on which autocast applies, as for torch's own function.
    on_tape: (*arguments) -> y by torch's own differentiable function, or None if it does not serve.
        It serves where there is no kernel, because torch's tape in C++ is faster than a Function in
        Python. Its gradients are those of the reference, bit for bit. If `use` forces the kernels
        or the reference, the Function runs.
    fake_fwd, fake_bwd: results of the right shapes, for operations whose references ask fake
        tensors for more than their shapes. None means the references.
    """

    name: str
    fwd: Callable[..., tuple[torch.Tensor, tuple]]
    fwd_ref: Callable[..., tuple[torch.Tensor, tuple]]
    bwd: Callable[..., tuple]
    bwd_ref: Callable[..., tuple]
    saved: type
    inputs: int
    derived: Mapping[str, Callable[[Mapping[str, Any]], Any]] = dataclasses.field(
        default_factory=dict
    )
    autocast: torch.dtype | None = None
    autocast_on: tuple[str, ...] = launch.AUTOCAST
    on_tape: Callable[..., torch.Tensor | None] | None = None
    fake_fwd: Callable | None = None
    fake_bwd: Callable | None = None

    def __post_init__(self) -> None:
        compiled.register(self)

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the positional arguments."""
        kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
        found = inspect.signature(self.fwd).parameters.values()
        return tuple(p.name for p in found if p.kind in kinds)

    @functools.cached_property
    def sources(self) -> tuple[int | None, ...]:
        """For each field of `saved`, the position of the argument that it is, or None."""
        positions = {name: i for i, name in enumerate(self.parameters)}
        fields: tuple[str, ...] = self.saved._fields  # type: ignore[attr-defined]  # a NamedTuple
        return tuple(positions.get(field) for field in fields)


def traceable(function: Callable) -> Callable:
    """A public function that torch.fx records as one call, and that tensor subclasses may override.

    This is `__torch_function__`, the protocol of torch's own functions. It applies if `input` is
    such a tensor.
    """

    @functools.wraps(function)
    def dispatch(input, *args, **kwargs):
        if has_torch_function_unary(input):
            return handle_torch_function(dispatch, (input,), input, *args, **kwargs)
        return function(input, *args, **kwargs)

    return dispatch


def call(operation: Differentiable, *args) -> torch.Tensor:
    """y of an operation. Every public function calls this with its arguments.

    Dispatch: autocast, then the compiled operator, torch's own function (`on_tape`), the autograd
    Function, or the traced reference. TypeError: `input` is not a tensor. ValueError: a nested
    tensor, or what the operation's forward raises.
    """
    first = args[0]
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            f"{operation.name}: input must be a torch.Tensor, got {type(first).__name__}; convert "
            "it with torch.as_tensor"
        )
    if _any_autocast() and autocasting(first) and first.device.type in operation.autocast_on:
        device = first.device.type
        dtype = operation.autocast or torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return call(operation, *(_autocast(a, device, dtype) for a in args))
    if torch.compiler.is_compiling():
        return _traced(operation, args)
    if operation.on_tape is not None and launch.on_reference(first):
        y = operation.on_tape(*args)
        if y is not None:
            return y
    flat, lengths = _spread(args[: operation.inputs])
    options = args[operation.inputs :]
    if not _SAVED.issuperset(map(type, flat)):
        _check_tensors(operation, args)
    elif _NO_TENSORS.issuperset(map(type, options)) and not launch.followed() and _dense(flat):
        # By far the most calls of kernels come here.
        if not torch.is_grad_enabled():
            return operation.fwd(*args)[0]
        return _apply((operation, args, lengths), *flat)
    if not launch.followed() and launch.plain(*flat, *options):
        apply = Function.apply if any(map(_wrapped, flat)) else _apply
        return apply((operation, args, lengths), *flat)
    if any([t.is_nested for t in flat if isinstance(t, torch.Tensor)]):
        raise ValueError(
            f"{operation.name}: nested tensors are not served; pad them with "
            "torch.nested.to_padded_tensor(input, 0.0)"
        )
    return operation.fwd(*args)[0]


def _check_tensors(operation: Differentiable, args: tuple) -> None:
    """TypeError if an argument is no tensor, None or a tuple of these."""
    for name, given in zip(operation.parameters, args[: operation.inputs]):
        for one in given if isinstance(given, tuple) else (given,):
            if one is not None and not isinstance(one, torch.Tensor):
                raise TypeError(
                    f"{operation.name}: {name} must be a torch.Tensor, got {type(one).__name__}; "
                    "convert it with torch.as_tensor"
                )


def _traced(operation: Differentiable, args: tuple) -> torch.Tensor:
    """y for a compiler, by the compiled operator.

    torch.export and torch.func get the reference, whose operations they follow.
    """
    # The flag of `torch.compiler.is_exporting`. In torch 2.11 a compiler takes the call for True.
    if torch.compiler._is_exporting_flag or torch._C._are_functorch_transforms_active():
        return operation.fwd(*args)[0]
    tensors: list[torch.Tensor] = []
    return compiled.operators[operation.name](tensors, compiled.written(args, tensors))[0]


class Function(torch.autograd.Function):
    """An operation as one node of the tape.

    call: (operation, its arguments, lengths). flat: the arguments with gradients once more, with
    the lists of tensors spread out, because torch looks for tensors only among the direct
    arguments. lengths: of these lists, see `_spread`.
    """

    @staticmethod
    def forward(ctx, call, *flat):
        operation, args, lengths = call
        y, saved = operation.fwd(*args)
        remember(ctx, operation, args, lengths, flat, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        return None, *differentiate(ctx, dy, ctx.needs_input_grad[1:])


# `Function.apply` without the Python code that torch puts around it. That code serves transforms of
# torch.func, which `launch.followed` excludes, and tensors that outlived such a transform.
_apply: Callable = super(torch.autograd.Function, Function).apply


class _Pointwise(torch.autograd.Function):
    """An activation as one node of the tape, by its row's torch functions."""

    @staticmethod
    def forward(ctx, z, act):
        y = act.forward_ref(z)
        ctx.act = act
        ctx.save_for_backward(y if act.needs == "y" else z)
        return y

    @staticmethod
    def backward(ctx, dy):
        return ctx.act.backward_ref(dy, *ctx.saved_tensors), None


# (z, row) -> act(z), for rows without a torch operator of their own. See `_apply`.
pointwise: Callable = super(torch.autograd.Function, _Pointwise).apply


def _dense(flat: Sequence[torch.Tensor | None]) -> bool:
    """True if every tensor of type Tensor or Parameter is plain memory, and no `_wrapped` one."""
    for t in flat:
        if t is not None and (t.is_nested or _is_batched(t) or _is_functorch_tensor(t)):
            return False
    return True


def _wrapped(value: torch.Tensor | None) -> bool:
    """True for a tensor of a transform of torch.func, also after the transform has ended."""
    return value is not None and _is_functorch_tensor(value)


def reshaped(y: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """An operation's output y in another shape, in the same memory.

    torch forbids in-place changes to a view that a Function returns, so this is no view.
    """
    if launch.followed():  # no Function runs then; a trace follows the sizes of `view` alone
        return y.view(shape)
    return _unsafe_view(y, shape)


def _spread(inputs: tuple) -> tuple[Sequence, tuple | None]:
    """(flat, lengths): the arguments with their tuples spread out, and the lengths of the tuples.

    lengths has None for an argument that is no tuple. It is None if there are no tuples.
    """
    if tuple not in map(type, inputs):
        return inputs, None
    flat: list = []
    lengths: list = []
    for a in inputs:
        if type(a) is tuple:
            flat += a
            lengths.append(len(a))
        else:
            flat.append(a)
            lengths.append(None)
    return flat, tuple(lengths)


def _gathered(flat: tuple, lengths: tuple | None) -> tuple:
    """The arguments that `_spread` spread out."""
    if lengths is None:
        return flat
    args, start = [], 0
    for length in lengths:
        end = start + (1 if length is None else length)
        args.append(flat[start] if length is None else flat[start:end])
        start = end
    return tuple(args)


def autocasting(tensor: torch.Tensor) -> bool:
    """True if torch.autocast is on for this tensor's device."""
    if tensor.is_cpu:
        return torch.is_autocast_enabled("cpu")
    device = tensor.device.type
    return device in launch.AUTOCAST and torch.is_autocast_enabled(device)


def _autocast(value, device: str, dtype: torch.dtype):
    """The value, with its floating-point tensors on this device cast to this dtype.

    float64 stays, as in torch. Lists become tuples.
    """
    if isinstance(value, (list, tuple)):
        return tuple(_autocast(v, device, dtype) for v in value)
    if (
        not isinstance(value, torch.Tensor)
        or not value.is_floating_point()
        or value.dtype == torch.float64
    ):
        return value
    return value.to(dtype) if value.device.type == device else value


def remember(ctx, operation, args: tuple, lengths, flat: tuple, saved: tuple) -> None:
    """Keeps a Function's arguments and what its forward made.

    Tensors go through save_for_backward, the inputs first. Everything else is stored in `ctx.kept`:
    (operation, lengths, number of inputs, number of options, places, constants, has_places).
    constants ends with the options, the last option first. places: for each field of `saved` its
    position in tensors + constants; a slice stands for a tuple of tensors. has_places: True if a
    constant is a `_Place` or a `_Places`.
    """
    tensors: list = [*flat]
    options = args[operation.inputs :]
    has_places = not _NO_TENSORS.issuperset(map(type, options))
    constants: list = [*(_placed(options, tensors) if has_places else options)]
    places: list = []
    for place, value in zip(_known_places(operation, lengths, len(args)), saved):
        if place is None:
            kind = type(value)
            if kind is torch.Tensor:
                place = len(tensors)
                tensors.append(value)
            elif kind is tuple and _SAVED.issuperset(map(type, value)):
                place = slice(len(tensors), len(tensors) + len(value))
                tensors += value
            else:
                if kind not in _NO_TENSORS:
                    (value,) = _placed((value,), tensors)
                    has_places = has_places or type(value) in (_Place, _Places)
                constants.append(value)
                place = -len(constants)
        places.append(place)
    constants.reverse()
    ctx.kept = operation, lengths, len(flat), len(options), places, tuple(constants), has_places
    ctx.save_for_backward(*tensors)


@functools.lru_cache(1024)
def _known_places(operation, lengths: tuple | None, count: int) -> tuple[int | slice | None, ...]:
    """The places of `remember` for the fields of `saved` that are arguments, else None.

    count: how many arguments there are.
    """
    inputs = operation.inputs
    starts: list[int | slice] = []
    start = 0
    for length in lengths or (None,) * inputs:
        end = start + (1 if length is None else length)
        starts.append(start if length is None else slice(start, end))
        start = end
    places = starts + [inputs - at - 1 for at in range(inputs, count)]
    return tuple([None if at is None or at >= count else places[at] for at in operation.sources])


_NO_TENSORS = {str, int, float, bool, type(None)}
_SAVED = {torch.Tensor, torch.nn.Parameter, type(None)}  # save_for_backward takes None too


class _Place(int):
    """The position of a tensor among those that a node of the tape saved."""


class _Places(tuple):
    """A tuple with a `_Place` in it or in one of its tuples."""


def _placed(values: tuple, tensors: list) -> tuple:
    """The values with a `_Place` for each tensor. The tensors are added to `tensors`.

    The result is a `_Places` if it has a place in it, else a tuple.
    """
    if _NO_TENSORS.issuperset(map(type, values)):
        return values
    found: list = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(_Place(len(tensors)))
            tensors.append(value)
        else:
            found.append(_placed(value, tensors) if type(value) is tuple else value)
    known = any([type(value) in (_Place, _Places) for value in found])
    return _Places(found) if known else tuple(found)


def _found(values: tuple, tensors: tuple) -> tuple:
    """The values with the tensors back in the places that `_placed` made."""
    if type(values) is not _Places:
        return values
    found: list = []
    for value in values:
        kind = type(value)
        if kind is _Place:
            found.append(tensors[value])
        else:
            found.append(_found(value, tensors) if kind is _Places else value)
    return tuple(found)


def differentiate(ctx, dy: torch.Tensor, needs: tuple[bool, ...]) -> Sequence:
    """The gradients of a Function's first inputs, one after the other.

    They come from `bwd(dy, *saved)`. Under create_graph=True they come from the reference, which is
    itself differentiable. The kernels' results carry no graph, so the forward runs again from the
    inputs. The reference also serves a dy that is not plain memory, as in is_grads_batched=True.
    """
    if _any_autocast() and autocasting(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return differentiate(ctx, dy, needs)
    operation, lengths, inputs, options, places, constants, has_places = ctx.kept
    kept = tensors = ctx.saved_tensors
    if has_places:
        constants = tuple(
            [tensors[c] if type(c) is _Place else _found(c, tensors) for c in constants]
        )
    kept += constants
    if torch.is_grad_enabled():
        arguments = _gathered(tensors[:inputs], lengths) + kept[: -options - 1 : -1]
        _, saved = operation.fwd_ref(*arguments)
        bwd = operation.bwd_ref
    else:
        saved = [kept[place] for place in places]
        bwd = operation.bwd_ref  # what `bwd` would choose, without the choice for each layer
        if (launch.may_take(dy) and launch.plain(dy)) or launch.takes_loops(dy):
            bwd = operation.bwd
    grads = bwd(dy, *saved, needs=needs)
    if lengths is None:
        return grads
    return [g for given in grads for g in (given if type(given) in (list, tuple) else (given,))]
