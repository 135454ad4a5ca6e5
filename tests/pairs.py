"""Every differentiable operation as users call it, with torch's function, and cases to compare them
on.
"""

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from kernels.operations import OPERATIONS, Make, flatten

# operation -> (our function, torch's, the number of first arguments that have gradients)
PAIRS = {
    name: (op.function, op.oracle, op.definition.inputs)
    for name, op in OPERATIONS.items()
    if op.bwd
}


def cases(name, device="cpu", dtype=torch.float32, shape=(7, 17, 5)) -> list[tuple]:
    """The arguments of every case of an operation."""
    return [args for _, args in OPERATIONS[name].cases(Make(device, dtype), *shape)]


def of_tensors(function, args, chosen=lambda t: True):
    """(`function` as a function of the chosen tensors among its arguments, those tensors).

    The arguments may be nested. The others stay as they are.
    """
    values, structure = tree_flatten(args)
    places = [
        i for i, value in enumerate(values) if isinstance(value, torch.Tensor) and chosen(value)
    ]

    def call(*tensors):
        given = dict(zip(places, tensors))
        return function(
            *tree_unflatten([given.get(i, value) for i, value in enumerate(values)], structure)
        )

    return call, tuple(values[i] for i in places)


def leaves(name, args) -> tuple:
    """Copies of the arguments. Floating-point tensors that the operation gives gradients for want
    them.
    """

    def leaf(value):
        if isinstance(value, (list, tuple)):
            return [leaf(v) for v in value]
        return (
            value.detach().clone().requires_grad_()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
        )

    count = PAIRS[name][2]
    return *map(leaf, args[:count]), *args[count:]


def gradients(outputs, args) -> list:
    """[*outputs, *gradients of the outputs' sum by each leaf among the arguments]."""
    tensors = [t for t in flatten(args) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.float().sum() for y in outputs), tensors)]
