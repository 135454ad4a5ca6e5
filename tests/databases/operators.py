"""Which entries of torch's op_db are ours, as functions of the same arguments, and what of them we
refuse.
"""

import torch
import torch.nn.functional as F

import kernels


def activation(name):
    """An activation by itself: a layer with one input and one output, of weight 1."""

    def of(x, approximate="none"):
        row = name if approximate == "none" else f"{name}_{approximate}"
        return kernels.linear(
            x.reshape(-1, 1), torch.ones(1, 1, dtype=x.dtype, device=x.device), None, row
        ).view(x.shape)

    return of


def log_softmax(x, dim, dtype=None):
    """-cross_entropy of every class: the logits are repeated, with stride 0, once for each
    label.
    """
    x = x.to(dtype or x.dtype)
    rows = (x if x.dim() else x.unsqueeze(0)).movedim(dim, -1)
    classes = rows.shape[-1]
    logits = rows.reshape(rows.shape[:-1].numel(), classes, 1).expand(-1, -1, classes)
    labels = torch.arange(classes, device=x.device).expand(logits.shape[0], classes)
    loss = kernels.cross_entropy(logits, labels, reduction="none")
    return -loss.view(rows.shape).movedim(-1, dim).view(x.shape)


def nll_loss(x, target, **options):
    """torch's loss of log-probabilities, which are made here of the sample's numbers."""
    return F.nll_loss(F.log_softmax(x, min(x.dim() - 1, 1)), target, **options)


def pool_of(z):
    """A window of 2 × 2 as far as it fits into the convolution's result."""
    return tuple(min(2, side) for side in z.shape[-2:])


def conv_relu_pool(x, *args, **options):
    """The three in one, as our kernel has them."""
    return kernels.conv2d(
        x, *args, **options, activation="relu", max_pool=pool_of(F.conv2d(x, *args, **options))
    )


def torchs_conv_relu_pool(*args, **options):
    z = F.conv2d(*args, **options)
    return F.max_pool2d(F.relu(z), pool_of(z))


def max_pool2d(x, kernel_size, **options):
    """The pooling by itself: after a convolution of one tap that copies every channel."""
    return kernels.conv2d(
        x,
        torch.eye(x.shape[-3], dtype=x.dtype, device=x.device)[..., None, None],
        max_pool=kernel_size,
    )


# Our name -> (name in op_db, ours, torch's if it is not the operator itself)
OPERATORS = {
    "linear": ("nn.functional.linear", kernels.linear, None),
    "cross_entropy": ("nn.functional.cross_entropy", kernels.cross_entropy, None),
    "nll_loss": ("nn.functional.nll_loss", kernels.cross_entropy, nll_loss),
    "log_softmax": ("log_softmax", log_softmax, None),
    "log_softmax.with_dtype": ("log_softmax", log_softmax, None),
    "mse_loss": ("nn.functional.mse_loss", kernels.mse_loss, None),
    "binary_cross_entropy_with_logits": (
        "nn.functional.binary_cross_entropy_with_logits",
        kernels.binary_cross_entropy_with_logits,
        None,
    ),
    "huber_loss": ("nn.functional.huber_loss", kernels.huber_loss, None),
    "conv2d": ("nn.functional.conv2d", kernels.conv2d, None),
    "conv2d, relu, max_pool2d": ("nn.functional.conv2d", conv_relu_pool, torchs_conv_relu_pool),
    "max_pool2d": ("nn.functional.max_pool2d", max_pool2d, None),
    "sigmoid": ("sigmoid", activation("sigmoid"), None),
    "tanh": ("tanh", activation("tanh"), None),
    **{
        name: (f"nn.functional.{name}", activation(name), None)
        for name in ("relu", "leaky_relu", "gelu", "silu")
    },
}


def groups(x, *args, groups=1, **options):
    return groups != 1


def other_windows(
    x, kernel_size=1, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
):
    return (
        stride not in (None, kernel_size)
        or padding != 0
        or dilation != 1
        or ceil_mode
        or return_indices
    )


# What torch accepts and we do not: operator -> (why, which samples, what the error says or None:
# there is no argument for it)
GROUPS = (
    "groups other than 1: a convolution of each group of channels does it",
    groups,
    "groups must be 1",
)
REFUSED = {
    "conv2d": GROUPS,
    "conv2d, relu, max_pool2d": GROUPS,
    "max_pool2d": (
        "windows that overlap, leave gaps or are padded, and the places of maxima: each output "
        "has one winner and "
        "each input at most one output",
        other_windows,
        None,
    ),
}
# its samples ask for float64, which no kernel computes: left to the reference
FLOAT64 = "log_softmax.with_dtype"
