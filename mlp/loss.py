"""Losses with their gradients: `forward(output, target)` returns the value, `backward()` the
gradient of the output.

Called as a function, `loss(output, target)`, they are differentiable: what the autograd engine
uses.
"""

import torch

import kernels


class SoftmaxCrossEntropy:
    """Softmax cross-entropy; arguments as `torch.nn.CrossEntropyLoss`. `scale` multiplies the value
    and the gradient.
    """

    def __init__(
        self, weight=None, ignore_index=-100, reduction="mean", label_smoothing=0.0, scale=1.0
    ):
        self.options = (weight, ignore_index, reduction, label_smoothing)
        self.reduction = reduction
        self.scale = scale

    def __call__(self, output, target):
        """The loss as part of an autograd graph."""
        value = kernels.cross_entropy(output, target, *self.options)
        return value if self.scale == 1.0 else value * self.scale

    def forward(self, output, target, labels_valid=False):
        """Logits (N, C) and labels (N,) or probabilities (N, C) -> the loss. See
        `kernels.cross_entropy_fwd`.
        """
        value, self._saved = kernels.cross_entropy_fwd(
            output, target, *self.options, labels_valid=labels_valid
        )
        self._value = value
        return value if self.scale == 1.0 else value * self.scale

    def backward(self):
        """Gradient of the latest forward's value with respect to its logits."""
        return kernels.cross_entropy_bwd(
            _seed(self, self.scale), *self._saved, needs=(True, False)
        )[0]

    def probabilities(self, output):
        """(N, C) probabilities that these logits stand for."""
        return torch.softmax(output, -1)


class MeanSquaredError:
    """Squared error of outputs and targets, which may be class labels: then the target is their
    one-hot vector.

    reduction as `torch.nn.MSELoss`; `scale` multiplies the value and the gradient: reduction="sum",
    scale=0.5 is ½ Σ d².
    """

    def __init__(self, reduction="mean", scale=1.0):
        self.options = (reduction,)
        self.reduction = reduction
        self.scale = scale

    def __call__(self, output, target):
        """The loss as part of an autograd graph."""
        return kernels.mse_loss(output, one_hot(target, output), *self.options) * self.scale

    def forward(self, output, target, labels_valid=False):
        """Outputs (N, C) and targets (N, C), or labels (N,) -> the loss."""
        value, self._saved = kernels.mse_fwd(output, one_hot(target, output), *self.options)
        self._value = value
        return value if self.scale == 1.0 else value * self.scale

    def backward(self):
        """Gradient of the latest forward's value with respect to its outputs."""
        return kernels.mse_bwd(_seed(self, self.scale), *self._saved, needs=(True, False))[0]

    def probabilities(self, output):
        """(N, C) outputs as shares of their sum; negative ones count as nothing."""
        positive = output.clamp_min(0)
        return positive / positive.sum(-1, keepdim=True).clamp_min(torch.finfo(output.dtype).tiny)


def _seed(loss, scale):
    """The gradient of scale · value with respect to value, made once for each shape and device of
    values.
    """
    value = getattr(loss, "_value", None)
    if value is None:
        raise RuntimeError(f"{type(loss).__name__}: forward comes before backward")
    key = (value.shape, value.device, value.dtype)
    if getattr(loss, "_seed_key", None) != key:
        loss._seed_key, loss._seed = key, torch.full_like(value, scale)
    return loss._seed


def per_sample(loss, value: float, rows: int) -> float:
    """A batch's loss as a mean over its samples: sums are divided, so that batches of all sizes
    compare.
    """
    return value / rows if getattr(loss, "reduction", "mean") == "sum" else value


def one_hot(target, output):
    """Integer labels (N,) as rows of 0 and 1 shaped like output (N, C); floating-point targets as
    they are.
    """
    if target.is_floating_point():
        return target
    return torch.zeros_like(output).scatter(-1, target.long().unsqueeze(-1), 1)


LOSSES = {"cross_entropy": SoftmaxCrossEntropy, "mse": MeanSquaredError}
