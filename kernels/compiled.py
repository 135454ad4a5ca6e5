"""The operations as torch.library operators: for `torch.compile`, one opaque node each way.

An operator calls the launchers that eager mode calls, so a compiled network has the gradients of an
eager one, bit for bit. Its fake implementation tells the compiler the shapes. It is the reference,
run on fake tensors, unless the operation has a fake of its own. Eager mode does not use these
operators, because the wrapper of an operator costs tens of µs a call.

`register` makes both operators of any operation, with one schema for all:

    handgrad::linear(Tensor[] tensors, str arguments) -> Tensor[]
    handgrad::linear_bwd(Tensor dy, Tensor[] saved, str fields, bool[] needs) -> Tensor[]

`arguments` is the tuple of arguments as Python writes it, with `...` for each tensor. For linear it
is "(..., ..., None, 'relu', )". Options of any kind can pass this way, and a new operation needs no
code here.

An operator may not return its inputs, None, or one tensor twice. So a forward returns y and the
other tensors that it made. Marks replace the rest. A mark is a tensor without elements whose shape
says what it replaces. A backward returns only the gradients that `needs` asks for.
"""

import ast
import functools
from typing import Any

import torch

ops = torch.ops.handgrad
# name of an operation -> its forward operator: (tensors, arguments) -> [y, …]
operators: dict = {}

# A mark has the shape (0, kind, number). It stands for None, for output `number` (y is 0), or for a
# tuple of `number` items.
_NOTHING, _OUTPUT, _TUPLE = range(3)


def written(value, tensors: list) -> str:
    """A value as Python writes it, with `...` for each tensor. The tensors are added to `tensors`.

    torch.compile traces this function, so it uses only what torch.compile can trace.
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
    """The value that `written` wrote, with these tensors in their places. Lists become tuples."""
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
    """Registers the two operators of a `tape.Differentiable`, and the gradient of the first."""

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
        make: Any = torch.library.custom_op  # its stubs allow no schema with a plain function
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
        needs = [need is True for need in first]  # one bool for each argument; None gives False
        backward_operator = getattr(ops, f"{operation.name}_bwd")
        grads = iter(backward_operator(dys[0], list(ctx.saved_tensors), ctx.fields, needs))
        count = sum(need is not None for need in first)
        return [next(grads) if n and i < count else None for i, n in enumerate(given)], None

    return setup_context, backward


def _gradients(bwd, dy, saved, fields, needs) -> list[torch.Tensor]:
    """The gradients that are needed, contiguous. The fake implementation returns the same."""
    grads = flat(bwd(dy, *read(fields, saved), needs=tuple(needs)))
    return [g.contiguous() for g, needed in zip(grads, needs) if needed]


def _made(operation) -> list[str]:
    """Names of the saved fields that the forward made: no arguments and no derived values."""
    known = {*operation.parameters, *operation.derived}
    return [field for field in operation.saved._fields if field not in known]


def _outputs(operation, y, saved) -> list[torch.Tensor]:
    """y, then what the forward made and saved, with marks for what an operator may not return."""
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
        elif not isinstance(value, torch.Tensor):  # a number, which the kernels give as a tensor
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
    """What the forward saved, built from its arguments and from what its operator returned."""
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
