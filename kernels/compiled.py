"""The operations as torch.library operators: for `torch.compile`, one opaque node each way.

An operator calls the launchers that eager mode calls, so a compiled network has the gradients of an
eager one, bit for bit. Its fake implementation, which tells shapes to the compiler, is the same
function by the reference, run on fake tensors. Eager mode does not come through here: the wrapper
of an operator costs tens of µs a call.

`register` makes both operators of any operation, with one schema for all:

    handgrad::linear(Tensor[] tensors, str arguments) -> Tensor[]
    handgrad::linear_bwd(Tensor dy, Tensor[] saved, str fields, bool[] needs) -> Tensor[]

`arguments` is the tuple of arguments as Python writes it, with `...` for each tensor: for linear,
"(..., ..., None, 'relu', )". So options of any kind pass, and a new operation needs no code here.
An operator may return neither its inputs nor None nor one tensor twice. So a forward returns y and
only what it made beside it; for the rest there are marks, tensors without elements whose shape says
what stands there. A backward returns only the gradients that `needs` asks for.
"""

import ast
import functools
from typing import Any

import torch

ops = torch.ops.handgrad
# name of an operation -> its forward operator: (tensors, arguments) -> [y, …]
operators: dict = {}

# What a mark stands for: its shape is (0, kind, number).
_NOTHING, _OUTPUT, _TUPLE = range(3)  # None; the fresh tensor `number`, y the first; a tuple


def written(value, tensors: list) -> str:
    """A value as Python writes it, with `...` for each tensor, which goes to `tensors`.

    torch.compile traces this, so it is made of what that knows.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return "..."
    if isinstance(value, (tuple, list)):
        return "(" + "".join([written(v, tensors) + ", " for v in value]) + ")"
    if isinstance(value, float):
        return repr(value).replace("inf", "1e999")
    if isinstance(value, torch.SymInt):
        return repr(int(value))
    return repr(value)


_literal = functools.cache(ast.literal_eval)


def read(text: str, tensors) -> tuple:
    """The value that `written` wrote, with these tensors in their places; lists are tuples."""
    remaining = iter(tensors)

    def fill(value):
        if value is ...:
            return next(remaining)
        return tuple(map(fill, value)) if isinstance(value, tuple) else value

    return fill(_literal(text))


def flat(values) -> list:
    """The values in nested tuples and lists, in order."""
    found: list = []
    for value in values:
        found.extend(flat(value)) if isinstance(value, (tuple, list)) else found.append(value)
    return found


def register(operation) -> None:
    """Make the two operators of a `tape.Differentiable`, and the gradient of the first."""

    def forward(tensors, arguments):
        return _outputs(operation, *operation.fwd(*read(arguments, tensors)))

    def fake_forward(tensors, arguments):
        fwd = operation.fake_fwd or operation.fwd
        return _outputs(operation, *fwd(*read(arguments, tensors)))

    def backward(dy, saved, fields, needs):
        return _gradients(operation.bwd, dy, saved, fields, needs)

    def fake_backward(dy, saved, fields, needs):
        return _gradients(operation.fake_bwd or operation.bwd, dy, saved, fields, needs)

    name = operation.name
    schemas = {
        name: ("(Tensor[] tensors, str arguments) -> Tensor[]", forward, fake_forward),
        f"{name}_bwd": (
            "(Tensor dy, Tensor[] saved, str fields, bool[] needs) -> Tensor[]",
            backward,
            fake_backward,
        ),
    }
    for operator, (schema, function, fake) in schemas.items():
        make: Any = torch.library.custom_op  # its stubs know no schema of a plain function
        registered = make(f"handgrad::{operator}", function, mutates_args=[], schema=schema)
        registered.register_fake(fake)
        if operator == name:
            setup_context, differentiate = _autograd(operation)
            registered.register_autograd(differentiate, setup_context=setup_context)
    operators[name] = getattr(ops, name)


def _autograd(operation):
    """(setup_context, backward) of the forward operator."""

    def setup_context(ctx, inputs, output):
        tensors, ctx.arguments = inputs
        ctx.set_materialize_grads(False)
        saved: list = []
        fields = _saved(operation, read(ctx.arguments, tensors), output)
        ctx.fields = written(tuple(fields), saved)
        ctx.save_for_backward(*saved)

    def backward(ctx, dys):
        given = ctx.needs_input_grad[0]
        first = flat(read(ctx.arguments, given)[: operation.inputs])
        needs = [need is True for need in first]  # a bool for each tensor; None stays one
        backward_operator = getattr(ops, f"{operation.name}_bwd")
        grads = iter(backward_operator(dys[0], list(ctx.saved_tensors), ctx.fields, needs))
        count = sum(need is not None for need in first)
        return [next(grads) if n and i < count else None for i, n in enumerate(given)], None

    return setup_context, backward


def _gradients(bwd, dy, saved, fields, needs) -> list[torch.Tensor]:
    """The gradients that are needed, contiguous: fake and real implementation agree."""
    grads = flat(bwd(dy, *read(fields, saved), needs=tuple(needs)))
    return [g.contiguous() for g, needed in zip(grads, needs) if needed]


def _made(operation) -> list[str]:
    """The fields of what an operation saves that its forward made: no arguments, not derived."""
    known = {*operation.parameters, *operation.derived}
    return [field for field in operation.saved._fields if field not in known]


def _outputs(operation, y, saved) -> list[torch.Tensor]:
    """y, then what the forward made and saved, with marks for all that no operator may return."""
    outputs, places = [y.contiguous()], {id(y): 0}

    def mark(kind, number=0):
        outputs.append(y.new_empty((0, kind, number), dtype=torch.bool))

    def put(value):
        if value is None:
            mark(_NOTHING)
        elif isinstance(value, tuple):
            mark(_TUPLE, len(value))
            for item in value:
                put(item)
        elif not isinstance(value, torch.Tensor):  # a number that the kernels have as a tensor
            dtype = torch.promote_types(y.dtype, torch.float32)
            outputs.append(torch.full((), value, dtype=dtype, device=y.device))
        elif id(value) in places:
            mark(_OUTPUT, places[id(value)])
        else:
            places[id(value)] = len(outputs)
            outputs.append(value.contiguous())

    for field in _made(operation):
        put(getattr(saved, field))
    return outputs


def _saved(operation, args: tuple, outputs: list) -> tuple:
    """What the forward saved, put together from its arguments and what its operator returned."""
    named = dict(zip(operation.parameters, args))
    remaining = iter(outputs[1:])

    def take():
        value = next(remaining)
        if value.dtype != torch.bool:
            return value
        _, kind, number = value.shape
        if kind == _TUPLE:
            return tuple([take() for _ in range(number)])
        return outputs[number] if kind == _OUTPUT else None

    fields = {field: take() for field in _made(operation)}
    fields |= {field: derive(named) for field, derive in operation.derived.items()}
    return operation.saved(
        **{f: fields[f] if f in fields else named[f] for f in operation.saved._fields}
    )
