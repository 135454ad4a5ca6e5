"""What a training takes: one object on the host, bundles of pointers in kernels."""

import dataclasses
import math
from typing import Any, NamedTuple

import torch

from ..ops.optim import Parameters
from .network import Spec


class Scratch(NamedTuple):
    """Pointers to what one phase of a step leaves for the next, [layer, block_m, pitch] each.

    y and dz of every layer, and z of the hidden ones, which is unused unless act' needs it.
    """

    y: Any
    dz: Any
    z: Any


class Samples(NamedTuple):
    """Data and targets: inputs are x · scale + shift."""

    x: Any
    targets: Any
    scale: Any
    shift: Any


class Order(NamedTuple):
    """The rows of the data in the order of an epoch: n of them, `batch` at a time."""

    indices: Any
    n: Any
    batch: Any


class Results(NamedTuple):
    """Where losses and numbers of correct predictions go, one for each step."""

    loss: Any
    correct: Any


@dataclasses.dataclass
class Run:
    """A training: one network, or with a two-dimensional order several that are stacked.

    parameters: [w_1, b_1, w_2, …] float32, or without biases; states: for each state of the rule a
    list of the same shapes. data (n, features), of any real type, of which data · scale + shift is
    the input; targets (n,) labels, or (n, classes) float32. order: the epoch's rows of data, int32
    or int64, the last batch as small as it comes out. hyper: a row of `hyperparameters`, read at
    launch. count: one-element tensor, steps taken so far, advanced. losses float32, correct
    integer: (steps,) buffers for the results, made if None. hyper may also be (steps, columns): the
    numbers of each step of the epoch, which a schedule moves.

    Of R networks parameters, states, order (R, n), hyper (R, columns), losses and correct have a
    first dimension of R; data, targets and count are shared. All tensors are on one device.
    ValueError: shapes and layouts that do not fit, with both values.
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
        """The first dimension of what is stacked: (R,) of R networks, () of one."""
        return tuple(self.order.shape[:-1])

    @property
    def replicas(self) -> int:
        """How many networks are trained."""
        return math.prod(self.lead)

    @property
    def steps(self) -> int:
        """Steps of an epoch; the last may be smaller."""
        return math.ceil(self.order.shape[-1] / self.batch)

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.data.device

    @property
    def scheduled(self) -> bool:
        """Whether every step of the epoch has numbers of its own."""
        return self.hyper.dim() > len(self.lead) + 1

    def rows(self) -> torch.Tensor:
        """The numbers of every step: (steps, columns), of R networks (R, steps, columns)."""
        if self.scheduled:
            return self.hyper
        return self.hyper.unsqueeze(-2).expand(*self.lead, self.steps, -1)

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(losses, correct): the buffers for the results."""
        assert self.losses is not None and self.correct is not None  # __post_init__ made them
        return self.losses, self.correct

    def bundles(self) -> tuple[Results, Parameters, Samples, Order]:
        """The kernels' arguments that are the same in all kernels."""
        net = Parameters(tuple(self.parameters), tuple(map(tuple, self.states)))
        samples = Samples(self.data, self.targets, float(self.scale), float(self.shift))
        order = Order(self.order, self.order.shape[-1], self.batch)
        return Results(self.losses, self.correct), net, samples, order

    def inputs(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows of the data as the kernels see them, in the parameters' dtype."""
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
                f"training: data must be contiguous (n, {sizes[0]}), got {tuple(data.shape)}; "
                "flatten it"
            )
        if reason := self.spec.loss.refusal(sizes[-1], targets):
            raise ValueError(reason)
        want = (len(data), sizes[-1]) if targets.is_floating_point() else (len(data),)
        if tuple(targets.shape) != want or not targets.is_contiguous():
            raise ValueError(
                f"training: targets must be contiguous {want}, got {tuple(targets.shape)}"
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
