"""Losses with their gradients.

`forward(output, target)` returns the value. `backward()` then returns the gradient of the output.

`loss(output, target)` returns a value that torch's autograd can differentiate. The autograd engine
uses it. The formulas are the rows of `kernels.LOSSES`. A class here adds its arguments and keeps
what the backward needs.

To add one, write its row in kernels/losses.py, and a class below with `row` and its arguments.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch

import kernels

# Any loss: one below, a module of torch or a function. It maps (output, target) to the loss.
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Criterion:
    """The common part of all losses. `scale` multiplies the value and the gradient."""

    row: kernels.Loss

    def __init__(
        self,
        reduction: str = "mean",
        scale: float = 1.0,
        parameter: float | Sequence[float] | None = None,
    ):
        self.reduction, self.scale = reduction, scale
        self.parameter = parameter  # a number, one number for each output, or None
        self._value: torch.Tensor | None = None
        self._seeded: torch.Tensor | None = None  # see `_seed`
        self._seeded_scale = scale

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss as part of an autograd graph."""
        value = self._on_tape(output, self.targets_for(output, target))
        return value if self.scale == 1.0 else value * self.scale

    def forward(
        self, output: torch.Tensor, target: torch.Tensor, labels_valid: bool = False
    ) -> torch.Tensor:
        """The loss of outputs (N, C) and targets (N, C), or labels (N,).

        The result is a scalar, or one number for each term under reduction="none". labels_valid:
        the caller knows that every label is a class, so the labels are not checked.
        """
        for name, given in (("output", output), ("target", target)):
            if not isinstance(given, torch.Tensor):
                raise TypeError(
                    f"{type(self).__name__}: {name} must be a torch.Tensor, got "
                    f"{type(given).__name__}; convert it with torch.as_tensor"
                )
        target = self.targets_for(output, target, labels_valid)
        value, self._saved = self._forward(output, target, labels_valid)
        self._value = value
        return value if self.scale == 1.0 else value * self.scale

    def backward(self) -> torch.Tensor:
        """The gradient of the latest forward's value, of its outputs' shape and dtype.

        RuntimeError before the first `forward`.
        """
        return self._backward(self._seed(), *self._saved)

    def targets_for(
        self, output: torch.Tensor, target: torch.Tensor, labels_valid: bool = False
    ) -> torch.Tensor:
        """The targets in the form that the operation takes for these outputs."""
        raise NotImplementedError

    def _on_tape(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _forward(
        self, output: torch.Tensor, target: torch.Tensor, labels_valid: bool
    ) -> tuple[torch.Tensor, tuple]:
        raise NotImplementedError

    def _backward(self, dy: torch.Tensor, *saved: Any) -> torch.Tensor:
        raise NotImplementedError

    def columns(self, target: torch.Tensor, outputs: int) -> torch.Tensor:
        """A data set's targets in the form that the training kernels take, for so many outputs."""
        return target

    def predict(self, output: torch.Tensor) -> torch.Tensor:
        """Predictions from outputs, in the targets' units: values, or probabilities."""
        return self.row.predict(output)

    def probabilities(self, output: torch.Tensor) -> torch.Tensor:
        """The probability of each class, (N, C), from outputs (N, C), if the targets are labels."""
        return self.row.probabilities(output)

    def row_weights(self, target: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
        """The factors of the rows' losses, (N,) of like's dtype, or None if each row counts as 1.

        A mean is divided by their sum over the batch.
        """
        return None

    def criterion(self, outputs: int, like: torch.Tensor | None = None) -> dict | str:
        """The fields of `kernels.Spec` for this loss, in a network with `outputs` outputs.

        If the training kernels cannot compute it, the result is a string that says why. like: a
        parameter of the network, if the caller multiplies rows by `row_weights`. Else None.
        """
        if self.reduction == "none":
            return f"takes reduced losses, got {type(self).__name__} with reduction 'none'"
        mean = self.reduction == "mean"
        numbers = self.row.numbers(self.parameter)
        if numbers and len(numbers) not in (1, outputs):
            return (
                f"takes one {self.row.parameter}, or one for each of {outputs} outputs, got "
                f"{len(numbers)}"
            )
        return {
            "loss": self.row,
            "loss_scale": self.scale / (outputs if mean and self.row.per_element else 1),
            "loss_mean": mean,
            "loss_parameter": numbers or None,
        }

    def _seed(self):
        """The gradient of scale · value with respect to value.

        It is kept until `scale` changes, or a value has another shape, device or dtype.
        """
        value = self._value
        if value is None:
            raise RuntimeError(
                f"{type(self).__name__}: backward was called before forward; call forward first"
            )
        seed = self._seeded
        if seed is None or self._seeded_scale != self.scale or _kind(seed) != _kind(value):
            self._seeded = seed = torch.full_like(value, self.scale)
            self._seeded_scale = self.scale
        return seed


def _kind(t: torch.Tensor) -> tuple:
    return t.shape, t.dtype, t.device


def _tensor(
    numbers: Sequence[float], output: torch.Tensor, kept: torch.Tensor | None
) -> torch.Tensor:
    """The numbers on the output's device, in float64 if the output is, else in float32.

    kept: the result of an earlier call, or None. It is returned if it still fits.
    """
    dtype = torch.float64 if output.dtype == torch.float64 else torch.float32
    if kept is not None and (kept.dtype, kept.device) == (dtype, output.device):
        return kept
    with torch.inference_mode(False):  # a later call may be on the tape
        return torch.tensor(numbers, dtype=dtype, device=output.device)


class SoftmaxCrossEntropy(Criterion):
    """Softmax cross-entropy, with the arguments of `torch.nn.CrossEntropyLoss`.

    Outputs are logits (N, C), floating point. Targets are integer labels (N,) or probabilities
    (N, C). weight: a tensor or sequence (C,). scale: multiplies the loss. IndexError for a label
    that is no class. ValueError for shapes that do not fit, and for a single output with
    floating-point targets.
    """

    row = kernels.LOSSES["cross_entropy"]

    def __init__(
        self,
        weight: torch.Tensor | Sequence[float] | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        scale: float = 1.0,
    ):
        super().__init__(reduction, scale)
        self._numbers: tuple[float, ...] | None = None  # weights that were given as a list
        if weight is not None and not isinstance(weight, torch.Tensor):
            self._numbers = tuple(float(w) for w in weight)
            weight = torch.tensor(self._numbers, dtype=torch.float32)
        self.options = (weight, ignore_index, reduction, label_smoothing)

    def targets_for(
        self, output: torch.Tensor, target: torch.Tensor, labels_valid: bool = False
    ) -> torch.Tensor:
        """The targets unchanged. ValueError if a single output cannot learn them."""
        if output.shape[-1] == 1 and (reason := self.row.refusal(1, target)):
            raise ValueError(reason)
        return target

    def row_weights(self, target: torch.Tensor, like: torch.Tensor) -> torch.Tensor | None:
        """The class weight of each row's label, or None if classes have no weights.

        A label that is no class gets any class's weight, because the loss is NaN there. ValueError
        for probabilities, whose class weights are no factors of rows.
        """
        weight = self._options(like)[0]
        if weight is None:
            return None
        if target.is_floating_point():
            raise ValueError(
                "SoftmaxCrossEntropy: class weights multiply probabilities, not rows; use engine "
                "'manual'"
            )
        return weight.detach()[target.long().clamp(0, len(weight) - 1)]

    def criterion(self, outputs: int, like: torch.Tensor | None = None) -> dict | str:
        weight, ignore_index, _, smoothing = self.options
        if smoothing != 0 or 0 <= ignore_index < outputs or (weight is not None and like is None):
            also = "class weights, " if like is None else ""
            return f"takes cross-entropy without {also}smoothing or an ignored class"
        if weight is not None and like is not None:
            weight = self._options(like)[0]
            if (weight.dtype, weight.shape) != (like.dtype, (outputs,)):
                return (
                    f"takes class weights {like.dtype} ({outputs},), got {weight.dtype} "
                    f"{tuple(weight.shape)}"
                )
        return super().criterion(outputs, like)

    def _options(self, output: torch.Tensor) -> tuple:
        """The arguments of the operation, with the weights on the output's device.

        Weights that were given as a list are in float64 for outputs in float64, else in float32.
        """
        weight = self.options[0]
        if weight is None:
            return self.options
        if self._numbers is not None:
            weight = _tensor(self._numbers, output, weight)
        elif weight.device != output.device:
            with torch.inference_mode(False):
                weight = weight.to(output.device)
        if weight is not self.options[0]:
            self.options = (weight, *self.options[1:])
        return self.options

    def _on_tape(self, output, target):
        return kernels.cross_entropy(output, target, *self._options(output))

    def _forward(self, output, target, labels_valid):
        options = self._options(output)
        return kernels.cross_entropy_fwd(output, target, *options, labels_valid=labels_valid)

    def _backward(self, dy, *saved):
        return kernels.cross_entropy_bwd(dy, *saved, needs=(True, False))[0]


class Elementwise(Criterion):
    """A loss that is a sum of terms, one for each element. The mean is over all elements.

    Outputs are (N, C), floating point. Targets are numbers (N, C), or integer labels (N,), which
    become one-hot rows. ValueError for shapes that do not fit. IndexError for a label that is no
    class.
    """

    def targets_for(
        self, output: torch.Tensor, target: torch.Tensor, labels_valid: bool = False
    ) -> torch.Tensor:
        """Targets of the output's shape: labels as one-hot rows, numbers as from `columns`."""
        op, outputs = self.row.function, output.shape[-1]
        if target.is_floating_point():
            fits = target.shape == output.shape  # true also for a single sample (C,)
            return (target if fits else self.columns(target, outputs)).to(output.dtype)
        if target.shape != output.shape[:-1]:
            raise ValueError(
                f"{op}: integer targets are labels {tuple(output.shape[:-1])} for outputs "
                f"{tuple(output.shape)}, got {tuple(target.shape)}; convert numbers with .float()"
            )
        if not labels_valid:
            kernels.check_range(target, outputs, op=op)
        return one_hot(target, output)

    def columns(self, target: torch.Tensor, outputs: int) -> torch.Tensor:
        """Numbers (N,) as a column (N, 1), numbers (N, C) unchanged.

        If the loss has one parameter for each output, such as several quantiles of one value, a
        column is expanded to all outputs.
        """
        if target.is_floating_point() and target.dim() == 1:
            target = target.unsqueeze(1)
        each = isinstance(self.parameter, Sequence) and target.is_floating_point()
        return target.expand(-1, outputs) if each and target.shape[1:] == (1,) else target

    def _options(self, output):
        """The arguments of the operation that follow the target."""
        parameter = self.parameter
        if isinstance(parameter, Sequence):
            self._kept = parameter = _tensor(parameter, output, getattr(self, "_kept", None))
        return self.row.name, parameter, None, self.reduction

    def _on_tape(self, output, target):
        return kernels.elementwise_loss(output, target, *self._options(output))

    def _forward(self, output, target, labels_valid):
        return kernels.elementwise_loss_fwd(output, target, *self._options(output))

    def _backward(self, dy, *saved):
        return kernels.elementwise_loss_bwd(dy, *saved, needs=(True, False))[0]


class MeanSquaredError(Elementwise):
    """Squared error, as `torch.nn.MSELoss`. See `Elementwise` for shapes and errors.

    scale: multiplies the loss. With d = output - target, reduction="sum" and scale=0.5 give ½ Σ d².
    """

    row = kernels.LOSSES["mse"]

    def __init__(self, reduction: str = "mean", scale: float = 1.0):
        super().__init__(reduction, scale)


class BinaryCrossEntropy(Elementwise):
    """Binary cross-entropy of logits, as `torch.nn.BCEWithLogitsLoss`.

    A row has several labels, each 0 or 1. See `Elementwise` for shapes and errors.
    pos_weight: multiplies the loss of targets that are 1. It is one number, or one for each output.
    scale: multiplies the loss.
    """

    row = kernels.LOSSES["bce"]

    def __init__(
        self,
        reduction: str = "mean",
        pos_weight: float | Sequence[float] | torch.Tensor | None = None,
        scale: float = 1.0,
    ):
        super().__init__(reduction, scale, _numbers(self.row, pos_weight))


class Huber(Elementwise):
    """Squared error up to |d| = delta, linear beyond it, as `torch.nn.HuberLoss`.

    d is output - target. See `Elementwise` for shapes and errors. scale: multiplies the loss.
    RuntimeError unless `delta` is above 0, as in torch.
    """

    row = kernels.LOSSES["huber"]

    def __init__(self, reduction: str = "mean", delta: float = 1.0, scale: float = 1.0):
        super().__init__(reduction, scale, _numbers(self.row, delta))


class Pinball(Elementwise):
    """The loss of quantile regression: each output learns a quantile of the targets.

    quantile: a number in (0, 1), or one for each output. With one for each output, targets (N,) or
    (N, 1) serve all outputs. See `Elementwise` for shapes and errors. scale: multiplies the loss.
    """

    row = kernels.LOSSES["pinball"]

    def __init__(
        self,
        quantile: float | Sequence[float] | torch.Tensor = 0.5,
        reduction: str = "mean",
        scale: float = 1.0,
    ):
        super().__init__(reduction, scale, _numbers(self.row, quantile))


def _numbers(row, parameter):
    """The loss's parameter as a number or a tuple of numbers. ValueError if it is out of range."""
    if isinstance(parameter, torch.Tensor):
        parameter = parameter.detach().flatten().tolist()
    numbers = row.numbers(parameter)
    return numbers[0] if len(numbers) == 1 else numbers


def check_outputs(op: str, loss: LossFunction, data: Any, outputs: int) -> None:
    """ValueError if the numbers to meet of a Dataset do not fit so many outputs of a network.

    loss: one that is not of this file may take any targets. So may one of a class derived from it.
    """
    targets = data.targets
    if not targets.is_floating_point() or not isinstance(loss, Criterion):
        return
    if type(loss) not in LOSSES.values():
        return
    there = loss.columns(targets, outputs)
    if there.dim() > 2:
        return
    count = there.shape[1] if there.dim() == 2 else 1
    if count != outputs:
        raise ValueError(
            f"{op}: the network has {_counted(outputs, 'output')}, but {data.name} has "
            f"{_counted(count, 'target')} a row; make the network with "
            f"{_counted(count, 'output')}"
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def per_sample(loss: LossFunction, value: float, rows: int) -> float:
    """A batch's loss as a mean over its samples.

    A loss with reduction="sum" is divided by `rows`, so that batches of different sizes compare.
    """
    return value / rows if getattr(loss, "reduction", "mean") == "sum" else value


def one_hot(target: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Integer labels (N,) as rows of 0 and 1, of the shape and dtype of output (N, C).

    Floating-point targets are returned unchanged.
    """
    if target.is_floating_point():
        return target
    return torch.zeros_like(output).scatter(-1, target.long().unsqueeze(-1), 1)


LOSSES = {
    kind.row.name: kind
    for kind in (SoftmaxCrossEntropy, MeanSquaredError, BinaryCrossEntropy, Huber, Pinball)
}


def get(loss: str) -> Criterion:
    """The loss of that name, with its defaults.

    ValueError for an unknown name. It lists the known ones.
    """
    if loss not in LOSSES:
        raise ValueError(f"unknown loss {loss!r}; known: {', '.join(LOSSES)}")
    return LOSSES[loss]()
