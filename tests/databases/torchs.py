"""PyTorch's own databases of test cases, and the comparison of our function with torch's on one of
them.

The databases come with torch, in torch.testing._internal. They need the package expecttest.
"""

import functools

import torch
from torch.utils._pytree import tree_leaves


@functools.cache
def databases():
    """(op_db, module_db, optim_db).

    Their import takes seconds. Every process of the suite imports the tests, so only a test that
    runs imports them.
    """
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import optim_db

    # Their import forbids setting torch.backends' flags, which other tests do.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return op_db, module_db, optim_db


def operators(name) -> list:
    """The entries of op_db with this name, in op_db's order."""
    return [entry for entry in databases()[0] if entry.name == name]


def module(cls):
    """The only entry of module_db for a class."""
    (entry,) = [entry for entry in databases()[1] if entry.module_cls is cls]
    return entry


def optimizer(cls):
    """The only entry of optim_db for a class."""
    (entry,) = [entry for entry in databases()[2] if entry.optim_cls is cls]
    return entry


def tensors_in(inputs) -> list:
    """The tensors in `inputs`, however nested."""
    return [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]


def weights_like(t):
    """Weights for a sum over t's elements, from 0.5 to 2.5, in t's shape."""
    return (
        (1.5 + torch.cos(torch.arange(t.numel(), device=t.device, dtype=torch.float64)))
        .view(t.shape)
        .to(t.dtype)
    )


def outcome(function, inputs, second):
    """[value, the gradient by each tensor of `inputs` that wants one, …].

    If `second`, the gradients of the weighted sum of these gradients follow.
    """
    y = function()
    wanted = [t for t in tensors_in(inputs) if t.requires_grad]
    dy = weights_like(y).requires_grad_(second)
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(y, wanted, dy, create_graph=second, **options)
    if not second:
        return [y, *first]
    total = sum((g * weights_like(g)).sum() for g in first)
    return [y, *first, *torch.autograd.grad(total, [*wanted, dy], **options)]


def assert_same(ours, theirs, inputs, what):
    """Checks values, gradients and, in float64, second derivatives, within torch.testing's
    tolerance for the dtype.

    inputs: the tensors that both functions use, in any containers.
    """
    second = all(t.dtype == torch.float64 for t in tensors_in(inputs) if t.requires_grad)
    with torch.backends.cudnn.flags(allow_tf32=False):
        results, expected = outcome(ours, inputs, second), outcome(theirs, inputs, second)
    for i, (a, b) in enumerate(zip(results, expected)):
        torch.testing.assert_close(
            a,
            b,
            equal_nan=True,
            msg=lambda m, i=i: f"{what} of {describe(inputs)}, result {i}: {m}",
        )


def describe(inputs) -> str:
    """The inputs as text, with shapes in place of tensors."""
    if isinstance(inputs, torch.Tensor):
        return str(tuple(inputs.shape))
    if isinstance(inputs, dict):
        return ", ".join(f"{k}={describe(v)}" for k, v in inputs.items())
    return (
        ", ".join(filter(None, map(describe, inputs)))
        if isinstance(inputs, (tuple, list))
        else str(inputs)
    )


def assert_clear(error):
    """Checks that the error is of a usual kind and has a text of one line."""
    assert isinstance(error, (ValueError, IndexError, TypeError, RuntimeError)), repr(error)
    assert str(error) and "\n" not in str(error).strip(), str(error)
