"""fit, evaluate, resume: epochs of one engine, what they measured, and the run folder."""

import copy
import time

import torch

from . import engines
from .data import Dataset, permutation
from .loss import SoftmaxCrossEntropy, per_sample
from .modules import ends
from .net import Net
from .optim import SGD
from .stepwise import Diverged, parameters_of

_EVALUATION_ROWS = 4096


class History(list):
    """One dict an epoch: epoch, train_loss, train_accuracy, test_loss, test_accuracy, seconds,
    samples_per_second.
    """

    def __str__(self):
        return "\n".join(line(row) for row in self)


def line(row: dict) -> str:
    """One epoch for people."""
    parts = [f"epoch {row['epoch']:3d}", f"loss {row['train_loss']:.4f}"]
    for key, label in (
        ("train_accuracy", "accuracy"),
        ("test_loss", "test loss"),
        ("test_accuracy", "test accuracy"),
    ):
        if row.get(key) is not None:
            parts.append(
                f"{label} {row[key]:.2%}" if "accuracy" in key else f"{label} {row[key]:.4f}"
            )
    return "  ".join([*parts, f"{row['samples_per_second']:,.0f} samples/s"])


def as_dataset(data, device) -> Dataset:
    """A data set of `mlp.data`, or a pair of tensors (inputs, targets), on the device."""
    return (data if isinstance(data, Dataset) else Dataset(*data)).to(device)


class Trainer:
    """Trains a network with one engine.

    model: an `mlp` module, any nn.Module, or a Net, already on its device. loss: one of `mlp.loss`,
    or any function of (output, target) for the autograd engine; softmax cross-entropy if None.
    optimizer: an Optimizer over the model's parameters, or a function of them; SGD with lr 0.1 if
    None. engine: "auto" takes the fastest that serves and prints which and why (unless verbose is
    False).
    """

    def __init__(self, model, loss=None, optimizer=None, engine="auto", verbose=True):
        self.model = model
        self.loss = SoftmaxCrossEntropy() if loss is None else loss
        if getattr(self.loss, "reduction", "mean") == "none":
            raise ValueError(
                "Trainer: the loss must be one number, its reduction mean or sum, got none"
            )
        parameters = parameters_of(model)
        self.device = next(iter(parameters.values())).device
        optimizer = (lambda params: SGD(params, lr=0.1)) if optimizer is None else optimizer
        is_made = isinstance(optimizer, torch.optim.Optimizer)
        self.optimizer = optimizer if is_made else optimizer(list(parameters.values()))
        self.requested, self.verbose = engine, verbose
        self.engine, self.engine_note = engines.choose(engine, model, self.loss, self.optimizer)
        self.history = History()

    def fit(
        self,
        train,
        epochs=10,
        batch_size=32,
        evaluate=None,
        seed=0,
        *,
        drop_last=False,
        scheduler=None,
        on_epoch=None,
        on_step=None,
    ) -> History:
        """Train until `epochs` epochs are done, counting those of a resumed run; returns the
        history of all.

        train, evaluate: data sets, or pairs of tensors. seed: of the order of samples. drop_last:
        leave out the last, smaller batch. scheduler: a torch learning-rate scheduler of
        `self.optimizer`, or a function that makes one of it, stepped once an epoch. on_epoch(row)
        and on_step() are called after each. Diverged if the loss is not finite: the weights are
        then those of the epoch's beginning.
        """
        train = as_dataset(train, self.device)
        evaluate = None if evaluate is None else as_dataset(evaluate, self.device)
        self.check(train, epochs, batch_size, evaluate, drop_last=drop_last)
        if scheduler is not None and not hasattr(scheduler, "step"):
            if not callable(scheduler):
                raise TypeError(
                    "fit: scheduler must be a torch scheduler, or a function of the optimizer, "
                    f"got {scheduler!r}"
                )
            scheduler = scheduler(self.optimizer)
        if self.requested == "auto" and self.verbose:
            print(self.engine_note)
        count = len(train) // batch_size * batch_size if drop_last else len(train)
        for epoch in range(len(self.history) + 1, epochs + 1):
            order = permutation(len(train), seed, epoch, self.device)[:count]
            started = time.perf_counter()
            result = self._epoch(epoch, train, order, batch_size, on_step)
            seconds = time.perf_counter() - started
            row = {
                "epoch": epoch,
                "train_loss": result.loss,
                "train_accuracy": None
                if result.correct is None
                else result.correct / result.samples,
                **(self.evaluate(evaluate) if evaluate is not None else {}),
                "seconds": seconds,
                "samples_per_second": result.samples / seconds,
            }
            self.history.append(row)
            if scheduler is not None:
                scheduler.step()
            if on_epoch is not None:
                on_epoch(row)
        return self.history

    def check(self, train, epochs=1, batch_size=32, evaluate=None, *, drop_last=False) -> None:
        """Raise what `fit` would, before anything is trained; takes another engine, if this one
        does not serve such batches.
        """
        if batch_size < 1 or epochs < 0:
            raise ValueError(
                f"fit: batch_size must be positive and epochs not negative, got {batch_size} and "
                f"{epochs}"
            )
        if drop_last and len(train) < batch_size:
            raise ValueError(
                f"fit: drop_last leaves nothing of {len(train)} samples in batches of {batch_size}"
            )
        for data in (train,) if evaluate is None else (train, evaluate):
            self._check_data(data)
        if self.engine.refuses(self.model, self.loss, self.optimizer, batch_size) is not None:
            chosen = engines.choose(
                self.requested, self.model, self.loss, self.optimizer, batch_size
            )
            self.engine, self.engine_note = chosen

    def _epoch(self, epoch, train, order, batch_size, on_step):
        parameters = parameters_of(self.model).values()
        before, state = (
            [p.detach().clone() for p in parameters],
            copy.deepcopy(self.optimizer.state_dict()),
        )
        try:
            return self.engine.epoch(train, order, batch_size, on_step)
        except FloatingPointError as error:
            with torch.no_grad():
                for p, good in zip(parameters, before):
                    p.copy_(good)
            self._load_optimizer(state)
            lr = float(self.optimizer.param_groups[0]["lr"])
            untrained = epoch == 1 and str(error).endswith("at step 0")
            advice = (
                "nothing was trained yet: look for what is not finite in the data"
                if untrained
                else f"the weights are those of the end of epoch {epoch - 1}: "
                "try a smaller learning rate"
            )
            raise Diverged(
                f"training stopped: {error} of epoch {epoch} with learning rate {lr:g}; {advice}"
            ) from None

    def _check_data(self, data):
        if not hasattr(self.model, "config"):
            return
        features, outputs = ends(self.model.config())
        if features != data.features:
            raise ValueError(
                f"fit: the network takes {features} features, but {data.name} has {data.features}"
            )
        if data.is_classification and outputs < len(data.classes):
            raise ValueError(
                f"fit: the network has {outputs} outputs, but {data.name} has {len(data.classes)} "
                "classes"
            )

    @torch.no_grad()
    def evaluate(self, data) -> dict:
        """{"test_loss", "test_accuracy"} of the whole data set; accuracy None where targets are not
        labels.
        """
        data = as_dataset(data, self.device)
        forward = self.model.predict if isinstance(self.model, Net) else self.model
        total, correct = 0.0, 0
        for x, y in data.chunks(_EVALUATION_ROWS, self.engine.dtype):
            output = forward(x)
            total += per_sample(self.loss, float(self.loss(output, y)), len(x)) * len(x)
            correct += int((output.argmax(1) == y).sum()) if data.is_classification else 0
        return {
            "test_loss": total / len(data),
            "test_accuracy": correct / len(data) if data.is_classification else None,
        }

    def state_dict(self) -> dict:
        """What resuming needs: weights, optimizer state and history."""
        parameters = {name: p.detach() for name, p in parameters_of(self.model).items()}
        return {
            "model": parameters,
            "optimizer": self.optimizer.state_dict(),
            "history": list(self.history),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken."""
        parameters = parameters_of(self.model)
        found, expected = (
            {name: tuple(t.shape) for name, t in tensors.items()}
            for tensors in (state["model"], parameters)
        )
        if found != expected:
            raise ValueError(f"the state of another network: has {found}, needs {expected}")
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(state["model"][name])
        self._load_optimizer(state["optimizer"])
        self.history = History(state["history"])

    def _load_optimizer(self, state: dict) -> None:
        """Its state is then in other tensors than the engine may have recorded: make that anew."""
        self.optimizer.load_state_dict(state)
        self.engine = type(self.engine)(self.model, self.loss, self.optimizer)
