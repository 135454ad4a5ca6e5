"""What a training takes: one object on the host, and bundles of pointers for kernels.

`step_ref` is one step of it in plain torch.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from .. import rules
from ..ops.optim import Parameters
from .network import Spec, gradients_ref


class Scratch(NamedTuple):
    """Pointers to what one phase of a step stores for the next, [layer, block_m, pitch] each.

    y, dz: of every layer. z: of the hidden layers. It is unused unless act' needs z.
    """

    y: Any
    dz: Any
    z: Any


class Samples(NamedTuple):
    """Data and targets. The network's inputs are x · scale + shift."""

    x: Any
    targets: Any
    scale: Any
    shift: Any


class Order(NamedTuple):
    """The rows of the data in the order of an epoch. There are n, and a step takes `batch`."""

    indices: Any
    n: Any
    batch: Any


class Results(NamedTuple):
    """Pointers to the losses and the numbers of correct predictions, one for each step."""

    loss: Any
    correct: Any


@dataclasses.dataclass
class Run:
    """A training of one network, or, with a two-dimensional order, of several stacked networks.

    spec: the network, its loss and its rule.
    parameters: [w_1, b_1, w_2, …], or [w_1, w_2, …] without biases. float32, contiguous.
    states: for each of the rule's states a list of the same shapes, zeros at first.
    data: (n, features), of any real dtype. The network's input is data · scale + shift.
    targets: (n,) integer labels, or (n, classes) float32.
    order: the epoch's rows of data, int32 or int64. The last batch may be smaller than `batch`.
    batch: rows of a step.
    hyper: (columns,), a row of `hyperparameters`, read at launch. Or (steps, columns): one row for
        each step of the epoch, as a schedule gives them.
    count: a one-element tensor, the number of steps taken so far. Training advances it.
    losses, correct: (steps,) buffers for the results, float32 and integer. Made if None.
    weights: (n,) floating point, the factor of each row's loss. A mean is then divided by the sum
        of the batch's weights. None counts every row as 1. The kernels of a GPU take no weights.

    For R networks, parameters, states, order (R, n), hyper (R, …), losses and correct have a first
    dimension of R. Data, targets, weights and count are shared. All tensors are on one device.
    ValueError, which names both values: shapes or layouts that do not fit.
    """

    spec: Spec
    parameters: list[torch.Tensor]
    states: list[list[torch.Tensor]]
    data: torch.Tensor
    targets: torch.Tensor
    order: torch.Tensor
    batch: int
    hyper: torch.Tensor
    count: torch.Tensor
    scale: float = 1.0
    shift: float = 0.0
    losses: torch.Tensor | None = None
    correct: torch.Tensor | None = None
    weights: torch.Tensor | None = None

    def __post_init__(self):
        self.order = self.order.contiguous()
        self._check_parameters()
        self._check_samples()
        self._check_numbers()
        shape, like = (*self.lead, self.steps), self.parameters[0]
        if self.losses is None:
            self.losses = like.new_empty(shape)
        if self.correct is None:
            self.correct = like.new_empty(shape, dtype=torch.int32)
        for name, given in (("losses", self.losses), ("correct", self.correct)):
            if tuple(given.shape) != shape or not given.is_contiguous():
                raise ValueError(
                    f"training: {name} must be contiguous {shape}, one for each step, got "
                    f"{tuple(given.shape)}"
                )

    @property
    def lead(self) -> tuple[int, ...]:
        """The first dimension of what is stacked: (R,) for R networks, () for one."""
        return tuple(self.order.shape[:-1])

    @property
    def replicas(self) -> int:
        """How many networks are trained."""
        return math.prod(self.lead)

    @property
    def steps(self) -> int:
        """Steps of an epoch. The last one may have fewer rows."""
        return math.ceil(self.order.shape[-1] / self.batch)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.data.device

    @property
    def scheduled(self) -> bool:
        """True if every step of the epoch has its own row of hyper."""
        return self.hyper.dim() > len(self.lead) + 1

    def rows(self) -> torch.Tensor:
        """The row of every step: (steps, columns), or (R, steps, columns) for R networks."""
        if self.scheduled:
            return self.hyper
        return self.hyper.unsqueeze(-2).expand(*self.lead, self.steps, -1)

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, correct), the buffers for the results."""
        assert self.losses is not None and self.correct is not None  # __post_init__ made them
        return self.losses, self.correct

    def bundles(self) -> tuple[Results, Parameters, Samples, Order]:
        """The arguments that all training kernels take. ValueError if rows have weights."""
        if self.weights is not None:
            raise ValueError(
                "training: the kernels count every row as 1, but the run has weights; train it on "
                "a CPU, under kernels.use('torch')"
            )
        net = Parameters(tuple(self.parameters), tuple(map(tuple, self.states)))
        samples = Samples(self.data, self.targets, float(self.scale), float(self.shift))
        order = Order(self.order, self.order.shape[-1], self.batch)
        return Results(self.losses, self.correct), net, samples, order

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """These rows of data · scale + shift, in the parameters' dtype."""
        x = self.data[rows].to(self.parameters[0].dtype)
        return x if (self.scale, self.shift) == (1.0, 0.0) else x * self.scale + self.shift

    def _check_parameters(self):
        spec, needed = self.spec, len(self.spec.rule.states)
        if len(self.states) != needed:
            raise ValueError(
                f"training: rule {spec.rule.name!r} needs {needed} lists of states, got "
                f"{len(self.states)}"
            )
        lists = {"parameters": self.parameters}
        lists |= {f"states[{i}]": state for i, state in enumerate(self.states)}
        want = [(*self.lead, *shape) for shape in spec.shapes]
        for name, tensors in lists.items():
            got = [tuple(t.shape) for t in tensors]
            if got != want:
                raise ValueError(
                    f"training: {name} must have shapes {want} for sizes {spec.sizes}, got {got}"
                )
            if bad := [i for i, t in enumerate(tensors) if not t.is_contiguous()]:
                raise ValueError(
                    f"training: {name}[{bad[0]}] must be contiguous; pass .contiguous() and copy "
                    "back"
                )

    def _check_samples(self):
        data, targets, sizes = self.data, self.targets, self.spec.sizes
        if data.dim() != 2 or data.shape[1] != sizes[0] or not data.is_contiguous():
            raise ValueError(
                f"training: data must be contiguous (n, {sizes[0]}), got {tuple(data.shape)} of "
                f"strides {data.stride()}; flatten it"
            )
        if reason := self.spec.loss.refusal(sizes[-1], targets):
            raise ValueError(reason)
        want = (len(data), sizes[-1]) if targets.is_floating_point() else (len(data),)
        if tuple(targets.shape) != want or not targets.is_contiguous():
            raise ValueError(
                f"training: targets must be contiguous {want}, got {tuple(targets.shape)} of "
                f"strides {targets.stride()}"
            )
        weights = self.weights
        if weights is not None and not (
            tuple(weights.shape) == (len(data),) and weights.is_floating_point()
        ):
            raise ValueError(
                f"training: weights must be floating point ({len(data)},), one for each row, got "
                f"{weights.dtype} {tuple(weights.shape)}"
            )

    def _check_numbers(self):
        if self.order.dim() not in (1, 2) or self.batch < 1:
            raise ValueError(
                "training: order must be (n,), or (replicas, n), and batch at least 1, got "
                f"{tuple(self.order.shape)} and {self.batch}"
            )
        want = (*self.lead, len(self.spec.rule.columns))
        each = (*self.lead, self.steps, want[-1])
        if tuple(self.hyper.shape) not in (want, each) or not self.hyper.is_contiguous():
            raise ValueError(
                f"training: hyper must be contiguous {want} for rule {self.spec.rule.name!r}, see "
                f"hyperparameters, or {each} with a row for each step, got "
                f"{tuple(self.hyper.shape)}"
            )


def step_ref(
    run: Run, rows: torch.Tensor, row: Sequence | torch.Tensor, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, correct) of one training step, taken in place by the references.

    rows: rows of the data, (M,) or (R, M). row: the numbers of a row of hyper, or for R networks a
    tensor (R, columns). step: the count of this step, 1 at the first.
    """
    x, target = run.inputs(rows), run.targets[rows]
    weights = None if run.weights is None else run.weights[rows].to(x.dtype)
    loss, correct, grads = gradients_ref(run.spec, run.parameters, x, target, weights)
    rules.apply_ref(run.spec.rule, run.parameters, grads, run.states, row, step)
    return loss, correct
