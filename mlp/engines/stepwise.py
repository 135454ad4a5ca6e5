"""Engines that call a function for each step.

autograd   module forward, loss.backward(), optimizer.step(), for any network, loss and optimizer
manual     a Net with preallocated buffers and no tape, for the networks whose backward we wrote
"""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

import kernels
from kernels import cpu

from ..data.dataset import Dataset
from ..net import Net, stages
from ..state import parameters_of
from . import means, shared, takeover, updates
from .precision import Precision
from .replay import Recordings
from .threads import ALONE, threads

# Outputs are kept for at most so many steps, or so many elements, before labels are computed.
_OUTPUTS, _ELEMENTS = 64, 1_000_000


class Diverged(ArithmeticError):
    """The loss of a step was not finite.

    The trainer has restored weights, buffers, optimizer and scheduler from the epoch's start.
    """


class EpochResult(NamedTuple):
    """The measures of an epoch.

    loss: mean over its samples. accuracy: the share of labels predicted right, or None without
    labels. samples: their count.
    """

    loss: float
    accuracy: float | None
    samples: int


class Demands(NamedTuple):
    """The demands of a training on an engine, in addition to network, loss and optimizer.

    per_step: the optimizer's numbers change from step to step. ignored: some labels are the loss's
    ignore_index. soft: class weights meet probabilities as targets, so they are no factors of rows.
    precision: a name in `mlp.engines.precision`. clip_norm: the largest norm of all gradients
    together, or None. world: the number of processes that share the training, see
    `mlp.engines.shared`.
    """

    per_step: bool = False
    ignored: bool = False
    soft: bool = False
    precision: str = "fp32"
    clip_norm: float | None = None
    world: int = 1


class Engine:
    """The base of all engines: the loop over batches, with losses and predictions.

    demands: of this training. planned: its number of steps, if known. shape: of a sample, if the
    module takes no flat rows. moves: a function that steps the scheduler ahead, for engines that
    read numbers ahead. together: a function that trains an epoch along with those of other
    trainers, see `mlp.together`.
    """

    name: str
    precisions: tuple[str, ...] = ("fp32",)
    demands = Demands()
    planned: int | None = None
    shape: tuple[int, ...] | None = None
    shares = False  # True if several processes can share a training
    reads_ahead = False  # True if it reads the numbers of all steps before the first
    moves: Callable[[], None] | None = None
    together: Callable[[kernels.Run], tuple[torch.Tensor, torch.Tensor]] | None = None

    @property
    def runs_ahead(self) -> bool:
        """True if `epochs` serves."""
        return False

    def __init__(self, model: Net | torch.nn.Module, loss: Any, optimizer: torch.optim.Optimizer):
        # Any, because `refuses` of each engine checked the methods that it calls.
        self.model: Any = model
        self.loss: Any = loss
        self.optimizer: Any = optimizer
        self.precision = Precision("fp32")

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters now, and so of the inputs."""
        return next(iter(parameters_of(self.model).values())).dtype

    @classmethod
    def refuses(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int = 1,
    ) -> str | None:
        """The reason why this engine cannot train them, or None."""
        raise NotImplementedError

    def still_serves(self, batch_size: int) -> bool:
        """True if nothing has changed since the engine was chosen so that it refuses now."""
        return self.refuses(self.model, self.loss, self.optimizer, batch_size) is None

    @classmethod
    def costs(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int,
        steps: int,
    ) -> str | None:
        """The reason why this engine would be slower than another for so many steps, or None."""
        return None

    @classmethod
    def cannot(
        cls,
        demands: Demands,
        model: Net | torch.nn.Module | None = None,
        loss: Any = None,
    ) -> str | None:
        """The reason why this engine cannot meet these demands, or None.

        Some engines can do more for some networks and losses: for this model and loss, if given.
        """
        if demands.world > 1 and not cls.shares:
            return f"{cls.name}: trains on one device, got {demands.world}; use engine 'autograd'"
        if demands.precision not in cls.precisions:
            return (
                f"{cls.name}: computes in the network's own precision, got precision "
                f"{demands.precision!r}"
            )
        return None

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on one batch. Returns (outputs, loss), both from before the update."""
        raise NotImplementedError

    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None = None,
    ) -> EpochResult:
        """Train on the samples of `order`, `batch_size` at a time.

        on_step: called after each step. If it returns False, the epoch ends, and the result is of
        the samples seen. FloatingPointError names the first step whose loss is not finite. On a GPU
        it is raised at the end of the epoch, because nothing is read back before.
        """
        values: list = []
        dtype = self.dtype
        predictions = _Predictions(order) if data.is_classification else None
        on_cpu = order.device.type == "cpu"
        for indices in order.split(batch_size):
            x, y = data.batch(indices, dtype)
            output, value = self.step(x, y)
            values.append(value.item() if on_cpu else value.detach().clone())
            if predictions is not None:
                predictions.add(output)
            if on_cpu and not math.isfinite(values[-1]) and _counts(self.loss, y):
                break
            if on_step is not None and on_step() is False:
                order = order[: len(values) * batch_size]
                break
        if values and isinstance(values[0], torch.Tensor):
            values = torch.stack(values).tolist()
        return self.result(values, predictions, data, order, batch_size)

    def epochs(
        self,
        data: Dataset,
        orders: torch.Tensor,
        batch_size: int,
        found: list[EpochResult],
        after_epoch: Callable[[], None] | None = None,
    ) -> None:
        """Train an epoch on each of the orders (epochs, samples). Results are those of `epoch`.

        found: gets the measures of each whole epoch, also after a KeyboardInterrupt. after_epoch:
        steps a scheduler. It is called ahead, after the numbers of each epoch were read.
        FloatingPointError if an epoch's loss is not finite. `found` then has the epochs before it.
        """
        raise NotImplementedError

    def result(
        self,
        values: list[float],
        predictions: Any,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
    ) -> EpochResult:
        """The epoch's measures, from the losses of its batches and the predictions."""
        targets = data.targets[order]
        loss = means.mean(self.loss, values, targets, batch_size)
        if predictions is None:
            return EpochResult(loss, None, len(order))
        correct, counted = means.right(self.loss, predictions.labels(), targets)
        return EpochResult(loss, correct / max(counted, 1), len(order))


class _Predictions:
    """The predicted labels of an epoch, computed from the outputs of many steps at once."""

    def __init__(self, order: torch.Tensor):
        self.found, self.end = torch.empty_like(order), 0
        self.outputs: list[torch.Tensor] = []

    def add(self, output: torch.Tensor) -> None:
        """Add a batch's outputs (rows, classes), or its predicted labels (rows,)."""
        if output.dim() == 1:
            self.labels()
            self._put(output)
        elif (len(self.outputs) + 1) * output.numel() > _ELEMENTS:
            self.labels()
            self._put(output.argmax(1))
        else:
            self.outputs.append(output.clone())
            if len(self.outputs) == _OUTPUTS:
                self.labels()

    def _put(self, labels):
        self.found[self.end : self.end + len(labels)] = labels
        self.end += len(labels)

    def labels(self) -> torch.Tensor:
        """The predicted labels so far."""
        if self.outputs:
            rows = torch.cat(self.outputs)
            torch.argmax(rows, 1, out=self.found[self.end : self.end + len(rows)])
            self.end += len(rows)
            self.outputs.clear()
        return self.found[: self.end]


def _counts(loss, y) -> bool:
    """True if a batch has a label that the loss does not ignore."""
    mask = means.counted(loss, y)
    return mask is None or bool(mask.any())


def _threads(model: Any, device: torch.device, batch_size: int) -> int | None:
    """1 if one CPU thread trains this network faster than several, else None.

    This holds for an MLP whose largest product has at most ALONE multiply-adds.
    """
    is_described = device.type == "cpu" and takeover.description(model) is None
    if not is_described or len(stages(model.config())) != 1:
        return None
    largest = max((batch_size * p.numel() for p in parameters_of(model).values()), default=0)
    return 1 if largest <= ALONE else None


class Autograd(Engine):
    """Trains any module by torch's autograd."""

    name = "autograd"
    precisions = ("fp32", "bf16", "fp16")
    shares = True
    _shared: shared.Shared | None = None  # the steps of several processes

    @classmethod
    def cannot(
        cls,
        demands: Demands,
        model: Net | torch.nn.Module | None = None,
        loss: Any = None,
    ) -> str | None:
        if demands.world > 1 and demands.ignored:
            return (
                "autograd: counts every label if several devices share a training, but the loss "
                "ignores some of them"
            )
        return super().cannot(demands, model, loss)

    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None = None,
    ) -> EpochResult:
        if self.demands.world == 1:
            with threads(_threads(self.model, order.device, batch_size)):
                return super().epoch(data, order, batch_size, on_step)
        if self._shared is None:
            self._shared = shared.Shared(self)
        return self._shared.epoch(data, order, batch_size, on_step)

    @classmethod
    def refuses(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int = 1,
    ) -> str | None:
        return (
            None
            if isinstance(model, torch.nn.Module)
            else f"autograd: needs an nn.Module, got {type(model).__name__}"
        )

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.optimizer.zero_grad()  # before the forward, which can then use their memory
        if self.precision.dtype is None:
            output, value = self._forward(x, y)
        else:
            with self.precision.context(x.device):
                output, value = self._forward(x, y)
        if value.numel() != 1:
            raise ValueError(
                f"autograd: the loss must be one number, got {tuple(value.shape)}; take its mean"
            )
        self.precision.step(value, self.optimizer, self.demands.clip_norm)
        return output.detach(), value.detach()

    def _forward(self, x, y):
        """(outputs, loss) of a batch, on the tape."""
        output = self.model(x if self.shape is None else x.view(len(x), *self.shape))
        return output, self.loss(output, means.aligned(y, output))


class Manual(Engine):
    """Trains a Net by calls of forward, backward and update.

    On a CPU with numba, compiled code computes the convolutions of a small ConvNet where that pays.
    """

    name = "manual"

    @classmethod
    def refuses(
        cls,
        model: Net | torch.nn.Module,
        loss: Any,
        optimizer: torch.optim.Optimizer,
        batch_size: int = 1,
    ) -> str | None:
        reason = takeover.network(model) or takeover.criterion(loss)
        return None if reason is None else f"manual: {reason}"

    def __init__(self, model: Net | torch.nn.Module, loss: Any, optimizer: torch.optim.Optimizer):
        super().__init__(model, loss, optimizer)
        self._recordings, self._labels_valid, self._is_convolving = Recordings(), False, False
        self._bound: tuple[int, ...] | None = None
        self._arguments: list = []  # of the loss
        self.net = model if isinstance(model, Net) else Net.over(model)
        self._bind()

    @property
    def inlines(self) -> bool:
        """True if the update is part of the backward."""
        return isinstance(self.update, updates.Inline)

    def _bind(self):
        """Bind to the current parameters, optimizer states and arguments of the loss.

        If they are other objects than before, the recordings are removed.
        """
        named = parameters_of(self.model)
        if any(p.data_ptr() != self.net.parameters[name].data_ptr() for name, p in named.items()):
            self.net = Net.over(self.model)
        bound = memory(self.model, self.optimizer)
        facts = getattr(self.loss, "__dict__", {})
        arguments = [value for name, value in facts.items() if not name.startswith("_")]
        same = len(arguments) == len(self._arguments)
        if bound != self._bound or not (
            same and all(map(operator.is_, arguments, self._arguments))
        ):
            self._recordings.clear()
            self._bound, self._arguments = bound, arguments
        self.update = updates.choose(self.net, self.optimizer, named, self.demands.clip_norm)

    def epoch(
        self,
        data: Dataset,
        order: torch.Tensor,
        batch_size: int,
        on_step: Callable[..., object] | None = None,
    ) -> EpochResult:
        self._bind()
        self.trust(data)
        alone = _threads(self.model, order.device, batch_size)
        with torch.no_grad(), self._convolving(order, batch_size), threads(alone):
            result = super().epoch(data, order, batch_size, on_step)
        self._bound = memory(self.model, self.optimizer)  # includes states made in this epoch
        return result

    @contextlib.contextmanager
    def _convolving(self, order: torch.Tensor, batch_size: int) -> Iterator[None]:
        """A context in which compiled code computes the convolutions, where that pays."""
        steps = self.planned or math.ceil(len(order) / batch_size)
        if not cpu.convolves(self.net.stages, batch_size, steps):
            yield
            return
        stack = self.net.stages[-1]
        largest = max(weight.numel() for weight in stack.weights)
        alone = 1 if batch_size * largest <= ALONE else None
        self._is_convolving = True
        try:
            with cpu.convolving(self.net, batch_size), threads(alone):
                yield
        finally:
            self._is_convolving = False

    def step(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        on_cpu = x.device.type == "cpu" and kernels.backend(x) == "torch"
        # A replay would leave out compiled convolutions, because they are no calls of torch. The
        # recording of a single step is never replayed.
        if self._is_convolving or self.planned == 1 or not (on_cpu and self._labels_valid):
            return self._train(x, y)
        numbers = None if self.demands.per_step else self.update.numbers()
        key = (x.data_ptr(), y.data_ptr(), len(x), numbers)
        step = self._gradients if numbers is None else self._train
        if not self.inlines or numbers is None:
            _ = self.update.grads  # allocates them now, because a recording must not
        result = self._recordings.run(key, lambda: step(x, y))
        if numbers is None:
            self.update.apply()
        return result

    def trust(self, data: Dataset) -> None:
        """Skip label checks if each label is a class, because Dataset validated them."""
        ignored = means.reading(self.loss).ignore_index
        may_ignore = ignored is not None and 0 <= ignored < len(data.classes)
        self._labels_valid = data.is_classification and not may_ignore and not self.demands.ignored

    def _train(self, x, y):
        """(outputs, loss) of a batch. The parameters are updated."""
        result = self._forward(x, y)
        self.update.finish(self.loss.backward())
        return result

    def _gradients(self, x, y):
        """(outputs, loss) of a batch. The net then holds the gradients."""
        result = self._forward(x, y)
        self.net.backward(self.loss.backward())
        return result

    def _forward(self, x, y):
        output = self.net.forward(x)
        return output, self.loss.forward(
            output, means.aligned(y, output), labels_valid=self._labels_valid
        )


def memory(model: Net | torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, ...]:
    """The addresses of parameters and optimizer states, to which a recording is bound."""
    states = [
        t
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, torch.Tensor)
    ]
    return tuple(t.data_ptr() for t in (*parameters_of(model).values(), *states))
