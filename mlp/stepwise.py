"""Engines of one step at a time.

autograd   module forward, loss.backward(), optimizer.step(): any network, loss and optimizer
manual     Net with preallocated buffers, no tape: the networks whose backward we wrote
"""

import contextlib
import math
from typing import NamedTuple

import torch

import kernels

from . import loss as losses
from .modules import MLP, ConvNet
from .net import Net
from .replay import Replay

_OUTPUTS = 64  # steps whose outputs are kept before their predictions are read off
# multiply-adds of a product that one CPU thread does sooner than two, or on a busy machine much
# sooner
_ALONE = 4_000_000


class Diverged(ArithmeticError):
    """The loss was not finite at some step; the trainer restored the weights of the epoch's
    beginning.
    """


class EpochResult(NamedTuple):
    """What an epoch measured: the mean loss over samples, and how many were classified rightly
    (None without labels).
    """

    loss: float
    correct: int | None
    samples: int


class Engine:
    """The loop that engines of one step at a time share: batches, losses, predictions."""

    name: str

    def __init__(self, model, loss, optimizer):
        self.model, self.loss, self.optimizer = model, loss, optimizer
        self.dtype = next(iter(parameters_of(model).values())).dtype

    @classmethod
    def refuses(cls, model, loss, optimizer, batch_size: int = 1) -> str | None:
        """Why this engine cannot train that, or None if it can."""
        raise NotImplementedError

    def step(self, x, y) -> tuple[torch.Tensor, torch.Tensor]:
        """Train on one batch; returns the network's outputs and the loss before the update."""
        raise NotImplementedError

    def epoch(self, data, order, batch_size: int, on_step=None) -> EpochResult:
        """Train on the samples of `order`, `batch_size` at a time. FloatingPointError at the first
        loss that is not finite.

        On a GPU nothing is read back before the end, so the error comes then, but names the step
        all the same.
        """
        values, sizes = [], []
        predictions, outputs = (torch.empty_like(order) if data.is_classification else None), []
        on_cpu = order.device.type == "cpu"
        for indices in order.split(batch_size):
            x, y = data.batch(indices, self.dtype)
            output, value = self.step(x, y)
            values.append(value.item() if on_cpu else value.detach().clone())
            sizes.append(len(indices))
            if predictions is not None:
                outputs.append(output.clone())
                if len(outputs) == _OUTPUTS or sum(sizes) == len(
                    order
                ):  # one argmax for many steps
                    end = sum(sizes)
                    torch.argmax(
                        torch.cat(outputs), 1, out=predictions[end - sum(map(len, outputs)) : end]
                    )
                    outputs.clear()
            if on_cpu and not math.isfinite(values[-1]):
                break
            if on_step is not None:
                on_step()
        if values and isinstance(values[0], torch.Tensor):
            values = torch.stack(values).tolist()
        for step, value in enumerate(values):
            if not math.isfinite(value):
                raise FloatingPointError(f"the loss is {value} at step {step}")
        correct = None if predictions is None else int((predictions == data.targets[order]).sum())
        total = sum(
            losses.per_sample(self.loss, value, size) * size for value, size in zip(values, sizes)
        )
        return EpochResult(total / max(len(order), 1), correct, len(order))


class Autograd(Engine):
    """A module on PyTorch's tape."""

    name = "autograd"

    @classmethod
    def refuses(cls, model, loss, optimizer, batch_size=1):
        return (
            None
            if isinstance(model, torch.nn.Module)
            else f"autograd: needs an nn.Module, got {type(model).__name__}"
        )

    def step(self, x, y):
        output = self.model(x)
        value = self.loss(output, y)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return output.detach(), value.detach()


class Manual(Engine):
    """A Net: forward, backward and update called one after the other."""

    name = "manual"

    @classmethod
    def refuses(cls, model, loss, optimizer, batch_size=1):
        if not isinstance(model, (Net, MLP, ConvNet)):
            return (
                f"manual: has no backward for {type(model).__name__}, only for Net, MLP and ConvNet"
            )
        frozen = [
            name
            for name, p in parameters_of(model).items()
            if not (isinstance(model, Net) or p.requires_grad)
        ]
        if frozen:
            return f"manual: trains every parameter, but {frozen[0]} does not require a gradient"
        if not hasattr(loss, "backward"):
            return (
                f"manual: needs one of the losses {', '.join(losses.LOSSES)}, got "
                f"{type(loss).__name__}"
            )
        return None

    def __init__(self, model, loss, optimizer):
        super().__init__(model, loss, optimizer)
        self.net = model if isinstance(model, Net) else Net.of(model)
        self._constants = getattr(optimizer, "constants", lambda: None)
        self._replays, self._labels_valid = {}, False
        self.update = getattr(optimizer, "update", None) or self._foreign_update
        self._bind()

    def _bind(self):
        """Take the module's parameters back if they were moved since, and list gradients in the
        optimizer's order.
        """
        parameters = parameters_of(self.model)
        if any(
            p.data_ptr() != self.net.parameters[name].data_ptr() for name, p in parameters.items()
        ):
            self.net = Net.of(self.model)
            self._replays.clear()
        names = {id(p): name for name, p in parameters.items()}
        self._updated = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._grads = [self.net.grads.get(names.get(id(p))) for p in self._updated]
        rule = self.optimizer.rule(parameters.values()) if hasattr(self.optimizer, "rule") else None
        # Without kernels only these two gain by it.
        worth = rule in ("sgd", "momentum") or kernels.path(self.net.flat) == "triton"
        self.inlines = rule is not None and len(self.net.stages) == 1 and worth

    def _foreign_update(self, grads):
        """Any other torch optimizer reads .grad."""
        for p, g in zip(self._updated, grads):
            p.grad = g
        self.optimizer.step()

    def epoch(self, data, order, batch_size, on_step=None):
        self._bind()
        self.trust(data)
        largest = max((batch_size * p.numel() for p in self.net.parameters.values()), default=0)
        alone = order.device.type == "cpu" and len(self.net.stages) == 1 and largest <= _ALONE
        with torch.no_grad(), _threads(1 if alone else torch.get_num_threads()):
            return super().epoch(data, order, batch_size, on_step)

    def step(self, x, y):
        if not (self._labels_valid and x.device.type == "cpu" and kernels.path(x) == "torch"):
            return self._train(x, y)
        constants = self._constants()
        key = (x.data_ptr(), y.data_ptr(), len(x), constants)
        if key not in self._replays:
            if len(self._replays) > 1:
                self._replays.clear()
            if self.inlines:
                self.optimizer.hyper(
                    x.device
                )  # numbers, to be made and read outside of the recording
            with Replay() as replay:
                result = self._gradients(x, y) if constants is None else self._train(x, y)
            self._replays[key] = replay, result
        else:
            replay, result = self._replays[key]
            replay()
        if constants is None:
            self.update(self._grads)
        return result

    def trust(self, data):
        """Check no labels from now on: a data set's are classes. Whether one of them is ignored is
        the loss's business.
        """
        ignored = self.loss.options[1] if isinstance(self.loss, losses.SoftmaxCrossEntropy) else -1
        self._labels_valid = data.is_classification and not 0 <= ignored < len(data.classes)

    def _train(self, x, y):
        """Outputs and loss of a batch, and the update: where it can be, in the epilogue of the
        backward.
        """
        if not self.inlines:
            result = self._gradients(x, y)
            self.update(self._grads)
            return result
        result = self._forward(x, y)
        self.net.update(self.loss.backward(), *self.optimizer.inline())
        return result

    def _gradients(self, x, y):
        """Outputs and loss of a batch, with the gradients left in the net."""
        result = self._forward(x, y)
        self.net.backward(self.loss.backward())
        return result

    def _forward(self, x, y):
        output = self.net.forward(x)
        return output, self.loss.forward(output, y, labels_valid=self._labels_valid)


@contextlib.contextmanager
def _threads(count: int):
    """torch with that many CPU threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def parameters_of(model) -> dict[str, torch.Tensor]:
    """Name -> parameter, of a Net or a module."""
    return model.parameters if isinstance(model, Net) else dict(model.named_parameters())
