"""PyTorch's own databases of test cases, and how one of them is compared: ours against torch, on
the same tensors.

They come with torch, in torch.testing._internal, and need the package expecttest.
"""

import functools

import torch
from torch.utils._pytree import tree_leaves


@functools.cache
def databases():
    """(op_db, module_db, optim_db). They take seconds to import, so a test asks for them when it
    runs: every process of the suite imports the tests.
    """
    from torch.testing._internal.common_methods_invocations import op_db
    from torch.testing._internal.common_modules import module_db
    from torch.testing._internal.common_optimizers import optim_db

    # Their import forbids setting torch.backends' flags, which is not for us to decide for the
    # other tests.
    torch.backends.__allow_nonbracketed_mutation_flag = True
    return op_db, module_db, optim_db


def operators(name) -> list:
    """The entries of op_db of that name, in its order."""
    return [entry for entry in databases()[0] if entry.name == name]


def module(cls):
    """The one entry of module_db of a class."""
    (entry,) = [entry for entry in databases()[1] if entry.module_cls is cls]
    return entry


def optimizer(cls):
    """The one entry of optim_db of a class."""
    (entry,) = [entry for entry in databases()[2] if entry.optim_cls is cls]
    return entry


def tensors_in(inputs) -> list:
    """The tensors in nested containers."""
    return [t for t in tree_leaves(inputs) if isinstance(t, torch.Tensor)]


def weights_like(t):
    """Numbers between 0.5 and 2.5 in t's shape: what a sum over t's elements is weighted by."""
    return (
        (1.5 + torch.cos(torch.arange(t.numel(), device=t.device, dtype=torch.float64)))
        .view(t.shape)
        .to(t.dtype)
    )


def outcome(function, inputs, second):
    """[value, its gradients by every tensor of the inputs that wants one, and if `second` those of
    their weighted sum].
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
    """Values, gradients and, in float64, second derivatives: equal within torch.testing's tolerance
    of the dtype.

    `inputs`: the tensors that both functions use, in any containers.
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
    """The inputs for people: shapes of tensors, other values as they are."""
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
    """An error of the usual kinds that says on one line what is wrong."""
    assert isinstance(error, (ValueError, IndexError, TypeError, RuntimeError)), repr(error)
    assert str(error) and "\n" not in str(error).strip(), str(error)
