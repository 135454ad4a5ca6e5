"""Every differentiable operation as users call it, beside the same written in torch's functions, on
the cases of the table.
"""

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

import kernels
from kernels.activations import ACTIVATIONS
from kernels.operations import OPERATIONS, Make, flatten


def _linear(x, w, b, activation):
    return ACTIVATIONS[activation].torch(F.linear(x, w, b))


def _mlp(x, weights, biases, activation, output_activation):
    for layer, (w, b) in enumerate(zip(weights, biases), 1):
        x = _linear(x, w, b, activation if layer < len(weights) else output_activation)
    return x


def _cross_entropy(
    input, target, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0
):
    options = {
        "ignore_index": ignore_index,
        "reduction": reduction,
        "label_smoothing": label_smoothing,
    }
    return F.cross_entropy(input, target, weight, **options)


def _linear_cross_entropy(x, w, b, *options):
    return _cross_entropy(F.linear(x, w, b), *options)


def _mse(x, t, reduction):
    return F.mse_loss(x, t, reduction=reduction)


def _conv2d(x, w, b, stride, padding, activation, max_pool, *options):
    return F.max_pool2d(
        ACTIVATIONS[activation].torch(F.conv2d(x, w, b, stride, padding, *options)), max_pool
    )


# Operation -> ours, torch's, and how many of the first arguments have gradients.
PAIRS = {
    "linear": (kernels.linear, _linear, 3),
    "mlp": (kernels.mlp, _mlp, 3),
    "cross_entropy": (kernels.cross_entropy, _cross_entropy, 2),
    "linear_cross_entropy": (kernels.linear_cross_entropy, _linear_cross_entropy, 3),
    "mse": (kernels.mse_loss, _mse, 2),
    "conv2d": (kernels.conv2d, _conv2d, 3),
}


def cases(name, device="cpu", dtype=torch.float32, shape=(7, 17, 5)) -> list[tuple]:
    """The arguments of every case of an operation."""
    return [args for _, args in OPERATIONS[name].cases(Make(device, dtype), *shape)]


def of_tensors(function, args, chosen=lambda t: True):
    """`function` as one of the chosen tensors among its arguments, however nested, and those
    tensors.
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
    """Copies of the arguments whose floating-point tensors want gradients, where the operation
    gives some.
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
    """[*outputs, the gradient of each leaf among the arguments], of the outputs' sum."""
    tensors = [t for t in flatten(args) if t.requires_grad]
    return [*outputs, *torch.autograd.grad(sum(y.float().sum() for y in outputs), tensors)]
