"""The entries of torch's op_db that we have, as functions of the same arguments, and the samples
that we refuse.
"""

import torch
import torch.nn.functional as F

import kernels


def activation(name):
    """An activation alone, as a layer with one input, one output and weight 1."""

    def of(x, approximate="none"):
        row = name if approximate == "none" else f"{name}_{approximate}"
        return kernels.linear(
            x.reshape(-1, 1), torch.ones(1, 1, dtype=x.dtype, device=x.device), None, row
        ).view(x.shape)

    return of


def log_softmax(x, dim, dtype=None):
    """-cross_entropy of every class. The logits are repeated for each label, with stride 0."""
    x = x.to(dtype or x.dtype)
    rows = (x if x.dim() else x.unsqueeze(0)).movedim(dim, -1)
    classes = rows.shape[-1]
    logits = rows.reshape(rows.shape[:-1].numel(), classes, 1).expand(-1, -1, classes)
    labels = torch.arange(classes, device=x.device).expand(logits.shape[0], classes)
    loss = kernels.cross_entropy(logits, labels, reduction="none")
    return -loss.view(rows.shape).movedim(-1, dim).view(x.shape)


def nll_loss(x, target, **options):
    """torch's nll_loss of the sample's numbers, which log_softmax makes log-probabilities first."""
    return F.nll_loss(F.log_softmax(x, min(x.dim() - 1, 1)), target, **options)


def pool_of(z):
    """A window of 2 × 2, or smaller where the convolution's result is smaller."""
    return tuple(min(2, side) for side in z.shape[-2:])


def conv_relu_pool(x, *args, **options):
    """Convolution, relu and pooling in one call, as our kernel computes them."""
    return kernels.conv2d(
        x, *args, **options, activation="relu", max_pool=pool_of(F.conv2d(x, *args, **options))
    )


def torchs_conv_relu_pool(*args, **options):
    z = F.conv2d(*args, **options)
    return F.max_pool2d(F.relu(z), pool_of(z))


def max_pool2d(x, kernel_size, **options):
    """The pooling alone, after a 1 × 1 convolution that copies every channel."""
    return kernels.conv2d(
        x,
        torch.eye(x.shape[-3], dtype=x.dtype, device=x.device)[..., None, None],
        max_pool=kernel_size,
    )


# our name -> (name in op_db, our function, torch's function or None for the operator itself)
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


# Samples that torch accepts and we do not: operator -> (reason, function that says which samples,
# text of our error, or None where our function has no such argument).
GROUPS = (
    "groups other than 1: call it once for each group of channels",
    groups,
    "groups must be 1",
)
REFUSED = {
    "conv2d": GROUPS,
    "conv2d, relu, max_pool2d": GROUPS,
    "max_pool2d": (
        "windows that overlap, leave gaps or are padded, and return_indices: ours has windows side "
        "by side only",
        other_windows,
        None,
    ),
}
# Its samples ask for float64. No kernel computes that, so only the reference is tested.
FLOAT64 = "log_softmax.with_dtype"
