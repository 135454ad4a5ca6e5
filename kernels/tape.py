"""How an operation joins autograd: how a call is dispatched, what is kept, and the derivative.

An operation file ends with one `Differentiable`: its two launchers, their two references, and the
NamedTuple that its forward returns beside y. Everything else follows from that row: the node of the
tape, casting under torch.autocast, the operators that torch.compile sees (`compiled`), double
backward, and the reference under torch.func and for tensors that are no plain memory.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import handle_torch_function, has_torch_function

from . import compiled, launch


@dataclasses.dataclass(frozen=True, eq=False)
class Differentiable:
    """An operation with a gradient. To make one registers it for torch.compile.

    name: its name in the table of operations, and of its operators.
    fwd, fwd_ref: `(*arguments) -> (y, saved)`; the arguments are positional.
    bwd, bwd_ref: `(dy, *saved, needs) -> gradients` of the first `inputs` arguments, in order; for
        a list of tensors a list. `needs` has one bool for each tensor of those arguments; where it
        is False the gradient is None.
    saved: the NamedTuple that both forwards return. A field named like an argument of `fwd` is that
        argument. A field in `derived` is computed from the arguments, by name. Every other field is
        a tensor that the forward made, None, a number, or a tuple of these.
    inputs: so many of the first arguments have gradients.
    autocast: the dtype under torch.autocast, or None for autocast's own; on devices of the types
        `autocast_on`, as torch's own function does.
    fake_fwd, fake_bwd: results of the right shapes, for operations whose references ask fake
        tensors more than their shapes; None for the references.
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


def traceable(function: Callable) -> Callable:
    """A public function that torch.fx records as one call, and that tensor subclasses may override.

    This is `__torch_function__`, the protocol of torch's own functions. `input` decides.
    """

    @functools.wraps(function)
    def dispatch(input, *args, **kwargs):
        if has_torch_function((input,)):
            return handle_torch_function(dispatch, (input,), input, *args, **kwargs)
        return function(input, *args, **kwargs)

    return dispatch


def call(operation: Differentiable, *args) -> torch.Tensor:
    """y of an operation: what a public function does with its arguments.

    Dispatch: autocast, then the compiled operator, the traced reference, or the autograd Function.
    """
    first = args[0]
    if not isinstance(first, torch.Tensor):
        raise TypeError(
            f"{operation.name}: input must be a torch.Tensor, got {type(first).__name__}; convert "
            "it with torch.as_tensor"
        )
    if autocasting(first) and first.device.type in operation.autocast_on:
        device = first.device.type
        dtype = operation.autocast or torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return call(operation, *(_autocast(a, device, dtype) for a in args))
    compiling = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    if compiling and not torch._C._are_functorch_transforms_active():
        tensors: list[torch.Tensor] = []
        return compiled.operators[operation.name](tensors, compiled.written(args, tensors))[0]
    lengths = tuple(
        [len(a) if isinstance(a, (list, tuple)) else None for a in args[: operation.inputs]]
    )
    flat = _spread(args, operation.inputs)
    if any([a.is_nested for a in flat if isinstance(a, torch.Tensor)]):
        raise ValueError(
            f"{operation.name}: nested tensors are not served; pad them with "
            "torch.nested.to_padded_tensor(input, 0.0)"
        )
    if launch.watched() or not launch.plain(*flat):
        return operation.fwd(*args)[0]
    return Function.apply(operation, lengths, *flat)


class Function(torch.autograd.Function):
    """An operation as one node of the tape. Arguments that are lists of tensors come one by one."""

    @staticmethod
    def forward(ctx, operation, lengths, *flat):
        y, saved = operation.fwd(*_gathered(flat, lengths))
        ctx.operation, ctx.lengths = operation, lengths
        remember(ctx, flat, saved)
        return y

    @staticmethod
    def backward(ctx, dy):
        given = ctx.needs_input_grad[2:]
        count = sum([1 if n is None else n for n in ctx.lengths])
        grads = differentiate(ctx, dy, given[:count])
        return (None, None, *grads, *(None,) * (len(given) - count))


def _spread(args: tuple, inputs: int) -> list:
    """The arguments, with lists among the first `inputs` of them spread out."""
    flat: list = []
    for a in args[:inputs]:
        flat.extend(a) if isinstance(a, (list, tuple)) else flat.append(a)
    return flat + list(args[inputs:])


def _gathered(flat: tuple, lengths: tuple) -> list:
    """The arguments that `_spread` spread out."""
    args, start = [], 0
    for length in lengths:
        end = start + (1 if length is None else length)
        args.append(flat[start] if length is None else flat[start:end])
        start = end
    return args + list(flat[start:])


def autocasting(tensor: torch.Tensor) -> bool:
    """Whether torch.autocast is on for this tensor's device."""
    device = tensor.device.type
    return device in launch.AUTOCAST and torch.is_autocast_enabled(device)


def _autocast(value, device: str, dtype: torch.dtype):
    """The floating-point tensors on this device, cast to this dtype.

    float64 stays, as in torch.
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


def remember(ctx, inputs: tuple, saved: tuple) -> None:
    """Keeps a Function's inputs and what its forward saved.

    Tensors go through save_for_backward, each once. The rest goes on ctx.
    """
    tensors: list[torch.Tensor] = []
    places: dict[int, _Place] = {}
    ctx.inputs, ctx.saved = _placed(inputs, tensors, places), _placed(saved, tensors, places)
    ctx.save_for_backward(*tensors)


class _Place(int):
    """Where a tensor stands among those that a node of the tape saved."""


_PLACES = [_Place(i) for i in range(256)]  # made once: to make one takes longer than to look it up


def _placed(values: Iterable, tensors: list, places: dict) -> tuple:
    """The values with a place for each tensor, which goes to `tensors` if it is new.

    One call for each tuple, not for each value: this runs in every forward.
    """
    found: list = []
    for value in values:
        if isinstance(value, torch.Tensor):
            at = places.get(id(value))
            if at is None:
                count = len(tensors)
                at = _PLACES[count] if count < len(_PLACES) else _Place(count)
                places[id(value)] = at
                tensors.append(value)
            found.append(at)
        else:
            found.append(_placed(value, tensors, places) if type(value) is tuple else value)
    return tuple(found)


def recall(values: tuple, tensors: tuple) -> tuple:
    """`ctx.inputs` or `ctx.saved` as given to `remember`, from `ctx.saved_tensors`."""
    return tuple(
        [
            tensors[value]
            if type(value) is _Place
            else (recall(value, tensors) if type(value) is tuple else value)
            for value in values
        ]
    )


def differentiate(ctx, dy: torch.Tensor, needs: tuple[bool, ...]) -> list:
    """The gradients of a Function's first inputs, one after the other.

    By `bwd(dy, *saved)`; under create_graph=True by the reference, itself differentiable: the
    kernels' results carry no graph, so what the second derivative needs is computed again from the
    inputs. By the reference too for a dy that is no plain memory, as is_grads_batched gives one.
    """
    if autocasting(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return differentiate(ctx, dy, needs)
    operation = ctx.operation
    tensors = ctx.saved_tensors
    if torch.is_grad_enabled():
        inputs = recall(ctx.inputs, tensors)
        _, again = operation.fwd_ref(*_gathered(inputs, ctx.lengths))
        return compiled.flat(operation.bwd_ref(dy, *again, needs=needs))
    bwd = operation.bwd if launch.plain(dy) else operation.bwd_ref
    return compiled.flat(bwd(dy, *recall(ctx.saved, tensors), needs=needs))
