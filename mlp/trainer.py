"""The Trainer: fit, evaluate, predict and resume, with one engine."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from kernels import launch

from . import engines
from .data import arrays, given
from .data.dataset import Dataset, permutation
from .data.given import check_columns
from .data.seen import Seen, rows
from .data.shifts import Shifts, check_shifts
from .engines import means, shared, takeover
from .engines.precision import Precision
from .engines.stepwise import Demands, Diverged, EpochResult
from .engines.updates import parameters as parameters_in
from .loss import check_outputs
from .metrics import measure, outputs
from .modules import ends, loss_of, whole
from .net import Net
from .optim import OPTIMIZERS, SGD, check_state
from .progress import shown
from .schedule import Schedule, options_of, restore_options
from .state import Snapshot, copied, in_mode, load_state, parameters_of, state_of
from .stopping import EarlyStopping, resumed

_BATCH_SIZE = 32
# The keys of these parts of a trainer's state.
_STATES = {
    "scheduler": {"name", "state", "made"},
    "precision": {"name", "skipped", "scaler"},
    "seen": set(Seen._fields) - set(Seen._field_defaults),
    "stopping": set(EarlyStopping.FIELDS),
}


class History(list):
    """The history of a training: a list with one dict for each epoch.

    The keys are epoch, train_loss, train_accuracy, seconds and samples_per_second. With `evaluate`
    there are test_loss and test_accuracy, with `validation` validation_loss and
    validation_accuracy. A loss is the mean over the samples, also with reduction "sum". An accuracy
    is a share from 0 to 1, or None if the targets are no labels.
    """

    def __str__(self):
        return "\n".join(line(row) for row in self)


def line(row: dict) -> str:
    """One epoch in one line of text."""
    parts = [f"epoch {row['epoch']:3d}", f"loss {row['train_loss']:.4f}"]
    for key, label in (
        ("train_accuracy", "accuracy"),
        ("validation_loss", "validation loss"),
        ("validation_accuracy", "validation accuracy"),
        ("test_loss", "test loss"),
        ("test_accuracy", "test accuracy"),
    ):
        if row.get(key) is not None:
            parts.append(
                f"{label} {row[key]:.2%}" if "accuracy" in key else f"{label} {row[key]:.4f}"
            )
    return "  ".join([*parts, f"{row['samples_per_second']:,.0f} samples/s"])


def as_dataset(data: Any, device: torch.device | str) -> Dataset:
    """Anything that `fit` takes, as a data set on the device."""
    return Dataset.of(data).to(device)


class _Task(NamedTuple):
    """The data and numbers of a call of `fit`.

    samples: the count in an epoch. shifts: random shifts of the images, or None.
    """

    train: Dataset
    evaluate: Dataset | None
    validation: Dataset | None
    batch_size: int
    samples: int
    seed: int
    shifts: Shifts | None = None


class Trainer:
    """Trains a network with one engine.

    model: an `mlp` module, any nn.Module, or a Net, already on its device. loss: a loss of
    `mlp.loss`, a name in `mlp.loss.LOSSES`, or any function of (output, target), which the autograd
    engine trains. None is softmax cross-entropy. optimizer: an Optimizer over the model's
    parameters, a function of them, a class, or a name in `mlp.optim.OPTIMIZERS`, which has torch's
    defaults. None is SGD with lr 0.1. engine: a name in `mlp.ENGINES`, or "auto" for the fastest
    that serves. verbose: print which engine "auto" has chosen, and why. precision: "fp32" computes
    in the network's own dtype. "bf16" and "fp16" keep float32 weights and compute products in 16
    bits, see `mlp.engines.precision`. clip_norm: the largest norm of all gradients of a step
    together, as in `torch.nn.utils.clip_grad_norm_`.

    ValueError for an unknown name, a network without parameters, an optimizer of other parameters,
    a loss that is not one number, and an engine that cannot train this network.
    """

    def __init__(
        self,
        model: Net | torch.nn.Module,
        loss: Any = None,
        optimizer: Any = None,
        engine: str = "auto",
        verbose: bool = True,
        precision: str = "fp32",
        clip_norm: float | None = None,
    ):
        self.model: Any = model
        self.loss = _made_loss(loss)
        if means.reading(self.loss).reduction == "none":
            raise ValueError(
                "Trainer: the loss must be one number, its reduction mean or sum, got none"
            )
        parameters = parameters_of(model)
        if not parameters:
            raise ValueError(f"Trainer: {type(model).__name__} has no parameters to train")
        if any(torch.nn.parameter.is_lazy(p) for p in parameters.values()):
            raise ValueError(
                "Trainer: the network has no weights yet; run a batch through the model first"
            )
        self.optimizer = _made_optimizer(optimizer, list(parameters.values()))
        if clip_norm is not None and not 0 < clip_norm < math.inf:
            raise ValueError(f"Trainer: clip_norm must be positive and finite, got {clip_norm}")
        self.requested, self.verbose, self.clip_norm = engine, verbose, clip_norm
        self.precision = Precision(precision, self.device.type)
        reason = self._mismatch() or self.precision.refuses(parameters)
        if reason is not None:
            raise ValueError(f"Trainer: {reason}")
        self.history = History()
        # Trains the epochs of engine `epoch` beside those of other trainers: see `mlp.together`.
        self.together: Callable[..., Any] | None = None
        # Seconds of all calls of `fit`: in the steps, and in measuring after an epoch.
        self.times = {"steps": 0.0, "evaluate": 0.0}
        self.schedule: Schedule | None = None
        self._pending: _Pending | None = None
        self._seen: Seen | None = None
        self.stopping: EarlyStopping | None = None
        self._choose(1, Demands(precision=precision, clip_norm=clip_norm))

    @property
    def _shape(self) -> tuple[int, ...] | None:
        """The shape of a sample, if the network is not ours and the data have more dimensions."""
        shape = None if self._seen is None else self._seen.shape
        return None if shape is None or takeover.description(self.model) is None else shape

    @property
    def device(self) -> torch.device:
        """The device of the network now."""
        return next(iter(parameters_of(self.model).values())).device

    def fit(
        self,
        train: Any,
        epochs: int = 10,
        batch_size: int | None = None,
        evaluate: Any = None,
        seed: int = 0,
        *,
        drop_last: bool | None = None,
        scheduler: Any = None,
        interval: str | None = None,
        on_epoch: Callable[[dict], object] | None = None,
        on_step: Callable[..., object] | None = None,
        early_stopping: int | None = None,
        augment: int = 0,
        validation: Any = None,
        progress: bool | None = False,
    ) -> History:
        """Train until `epochs` epochs are done, and return the history of all epochs.

        The epochs of a resumed run count. A later call reads its data as the first did: words are
        numbered by the first call's classes, and other words, columns or units are refused. To
        train the network on other data, make a new Trainer.

        The network trains in training mode and is measured in evaluation mode. At the end it has
        its earlier modes again.

        train, evaluate, validation: a Dataset of `mlp.data`, a pair (inputs, targets) of tensors,
        numpy arrays or pandas frames, a torch data set, or a DataLoader, which is read once. Both
        evaluate and validation are measured after each epoch. Early stopping and schedulers use the
        loss of validation, else of evaluate, else of train.
        batch_size: None is the DataLoader's, else 32.
        seed: of the order of the samples.
        drop_last: leave out a last, smaller batch. None is the DataLoader's, else False.
        scheduler: a torch scheduler of `self.optimizer`, or a function that makes one for it. If
        the same function is given again, its schedule goes on.
        interval: "epoch" or "step", the interval at which the scheduler steps. None is "step" for
        OneCycleLR and CyclicLR, else "epoch".
        on_epoch, on_step: on_epoch(row) and on_step() are called after each epoch and step. If one
        returns False, the training ends there. The row is then of the samples seen. An engine that
        trains an epoch in one launch calls on_step(steps) once after it.
        early_stopping: end after so many epochs without a lower loss, and keep the best epoch's
        weights, see `mlp.stopping`.
        augment: shift every training image by up to so many pixels in each epoch, at random, see
        `mlp.data.shifts`.
        progress: True shows a bar with the loss and the time that is left, a line in a terminal and
        a widget in a notebook. None shows it there, but not in a log file.

        ValueError, before any training, for data or arguments that do not fit. Diverged if the loss
        is not finite. Then weights, buffers, optimizer and scheduler are those of the epoch's
        start.
        """
        task = self._task(train, batch_size, (evaluate, validation), seed, drop_last)
        if augment:
            task = task._replace(
                shifts=Shifts(task.train, whole("fit: augment", augment), task.seed)
            )
        epochs = whole("fit: epochs", epochs, least=0)
        schedule = self._scheduled(scheduler, interval)
        self._check(task, epochs, schedule)
        self.schedule, self._pending = schedule, None
        if self.verbose and 0 < epochs <= len(self.history):
            print(
                f"nothing is trained: {len(self.history)} epochs are done, and epochs={epochs} "
                f"counts them; give epochs={len(self.history) + epochs} to train {epochs} more"
            )
        self.stopping = resumed(self.stopping, early_stopping, self._parts())
        stopping = self.stopping
        if (
            self.verbose
            and stopping is not None
            and stopping.is_over
            and epochs > len(self.history)
        ):
            print(
                f"nothing is trained: early stopping has ended this training, because "
                f"{stopping.waited} epochs had no lower loss than epoch {stopping.epoch}; give "
                f"early_stopping={stopping.waited + 1} or more, or None, to go on"
            )
        if self.requested == "auto" and self.verbose:
            print(self.engine_note)
        left = max(epochs - len(self.history), 0) * math.ceil(task.samples / task.batch_size)
        looks = on_epoch is not None or on_step is not None
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            in_mode(self.model, True),
            shown(progress, left, on_epoch, on_step) as told,
        ):
            self._train(task, epochs, looks, *told)
        if self.stopping is not None:
            self.stopping.take_best(self._parts())
        return self.history

    def check(
        self,
        train: Any,
        epochs: int = 1,
        batch_size: int | None = None,
        evaluate: Any = None,
        *,
        drop_last: bool | None = None,
        augment: int = 0,
        validation: Any = None,
    ) -> None:
        """Raise the errors that `fit` would raise before a training.

        If the engine does not serve such batches, another one is chosen.
        """
        seen = self._seen
        try:
            task = self._task(train, batch_size, (evaluate, validation), 0, drop_last)
            if augment:
                check_shifts(task.train, whole("fit: augment", augment))
            self._check(task, epochs, None)
        finally:
            self._seen = seen  # nothing was trained on these data

    def _train(self, task: _Task, epochs: int, looks: bool, on_epoch, on_step) -> None:
        """Train until `epochs` epochs are done, or something ends the training.

        looks: True if one of the functions is the user's.
        """
        pace = _Pace(task.samples) if self._runs_ahead(task, looks) else None
        while len(self.history) < epochs:
            if self.stopping is not None and self.stopping.is_over:
                break
            if pace is not None and (count := pace.next(epochs - len(self.history))) > 1:
                trained = self._several(task, count, on_epoch, on_step)
                pace.took(count, trained, self.history)
                continue
            row, goes_on = self._row(len(self.history) + 1, task, on_step)
            self.history.append(row)
            if self.schedule is not None:
                self.schedule.after_epoch(row)
            if self.stopping is not None:
                self.stopping.after_epoch(row, self._parts())
            if pace is not None:
                pace.took(1, 1, self.history)
            if on_epoch is not None and on_epoch(row) is False:
                break
            if not goes_on:
                break
            if looks or not self._is_calm():
                self._still_serves(task)

    def _is_calm(self) -> bool:
        """True if the schedule calls nothing that could change the network between two epochs."""
        return self.schedule is None or self.schedule.is_known_ahead

    def _runs_ahead(self, task: _Task, looks: bool) -> bool:
        """True if nothing needs the network, or an epoch's loss, before the next epoch starts."""
        return (
            self.engine.runs_ahead
            and not looks
            and self.stopping is None
            and (task.evaluate, task.validation, task.shifts) == (None, None, None)
            and self._is_calm()
        )

    def _several(self, task: _Task, count: int, on_epoch, on_step) -> int:
        """Train several epochs in one call, and return how many were trained.

        If an epoch's loss is not finite, only the epochs before it are trained. To train that epoch
        alone then raises the error. After Ctrl-C, the history has the whole epochs.
        """
        done, steps = len(self.history), math.ceil(task.samples / task.batch_size)
        orders = [self._order(task, done + i) for i in range(1, count + 1)]
        before, started = _Saved(self), time.perf_counter()
        found: list[EpochResult] = []
        good = None
        try:
            self._prepare_engine()
            schedule = self.schedule
            after = None if schedule is None else functools.partial(schedule.after_epoch, {})
            self.engine.epochs(task.train, torch.stack(orders), task.batch_size, found, after)
        except FloatingPointError:
            before.restore(self)
            good, found = len(found), []
        finally:
            seconds = time.perf_counter() - started
            self.times["steps"] += seconds
            if len(found) < count:
                before.rewind(self, len(found), steps)
            for result in found:
                self.history.append(_measures(len(self.history) + 1, result, seconds / len(found)))
        if good is not None:
            return self._several(task, good, on_epoch, on_step) if good else 0
        for row in self.history[done:]:
            if on_step is not None:
                on_step(steps)
            if on_epoch is not None:
                on_epoch(row)
        return len(found)

    def _order(self, task: _Task, epoch: int) -> torch.Tensor:
        """The rows of an epoch, in the order of its steps."""
        on = task.train.inputs.device
        return permutation(len(task.train), task.seed, epoch, on)[: task.samples]

    def _row(self, epoch: int, task: _Task, on_step) -> tuple[dict, bool]:
        """Train an epoch and measure. Returns (row of the history, True if training goes on)."""
        order = self._order(task, epoch)
        started = time.perf_counter()
        if task.shifts is not None:
            task = task._replace(train=task.shifts.epoch(epoch))
        after = self._after_step(on_step)
        result = self._epoch(epoch, task, order, after)
        ended = time.perf_counter()
        measured = {
            **self._validated(task.validation),
            **(self._measured(task.evaluate) if task.evaluate is not None else {}),
        }
        row = _measures(epoch, result, ended - started, measured)
        self.times["evaluate"] += time.perf_counter() - ended
        return row, after is None or not after.stopped

    def _validated(self, data: Dataset | None) -> dict:
        """{"validation_loss", "validation_accuracy"} of the validation data, {} without any."""
        if data is None:
            return {}
        found = self._measured(data)
        return {f"validation_{key.removeprefix('test_')}": value for key, value in found.items()}

    def _task(self, train, batch_size, measured, seed, drop_last) -> _Task:
        """The arguments of `fit` as data sets on the device and plain numbers.

        measured: (evaluate, validation).
        """
        ignored = means.reading(self.loss).ignore_index
        before = self._seen if self.history else None  # a trained network keeps its classes
        taken = (
            given.take(train, ignored)
            if before is None
            else before.more(train, ignored, means.is_entropy(self.loss))
        )
        size = batch_size if batch_size is not None else taken.batch_size or _BATCH_SIZE
        drops = drop_last if drop_last is not None else bool(taken.drop_last)
        size = whole("fit: batch_size", size)
        if taken.note is not None and self.verbose:
            print(f"{taken.note}, {size} at a time")
        seen = Seen.of(taken) if before is None else before.joined(taken)
        evaluate, validation = (
            None if part is None else self._fitted(seen.take(part, ignored)) for part in measured
        )
        train = self._fitted(taken.data)
        self._seen = seen
        for part in (evaluate, validation):
            if part is not None:
                check_columns(part.columns, train.columns, f"fit: {part.name}")
        count = len(train) // size * size if drops else len(train)
        return _Task(train, evaluate, validation, size, count, whole("fit: seed", seed, least=None))

    def _fitted(self, data: Dataset) -> Dataset:
        """A data set as this network can meet it."""
        outputs = None  # only numbers are met by columns
        if not data.is_classification and takeover.description(self.model) is None:
            outputs = ends(self.model.config())[1]
        dtype = next(iter(parameters_of(self.model).values())).dtype
        return given.fitted(data, self.device, dtype, outputs)

    def _scheduled(self, scheduler, interval) -> Schedule | None:
        """The schedule of this call: a new one, the earlier one, or a stored one that goes on."""
        if scheduler is None:
            if self._pending is not None:
                raise ValueError(
                    f"fit: the state loaded was trained with a {self._pending.state['name']}; give "
                    "fit the scheduler again, or load the state with state['scheduler'] = None"
                )
            return None
        last = self.schedule
        if last is not None and last.is_of(scheduler, interval):
            return last
        before = options_of(self.optimizer)
        schedule = Schedule(scheduler, self.optimizer, interval)
        if self._pending is not None:
            schedule.load_state_dict(self._pending.state)
            made_now = schedule.scheduler is not scheduler
            restore_options(self.optimizer, before if made_now else self._pending.options)
        elif last is not None and schedule.is_again(last):
            schedule.load_state_dict(last.state_dict())
            restore_options(self.optimizer, before)
        return schedule

    def _check(self, task: _Task, epochs: int, schedule: Schedule | None) -> None:
        """Raise errors before the training, and choose an engine for this task."""
        if task.samples == 0:
            raise ValueError(
                f"fit: drop_last leaves nothing of {len(task.train)} samples in batches of "
                f"{task.batch_size}"
            )
        reason = self._mismatch() or self.precision.refuses(parameters_of(self.model))
        if reason is not None:
            raise ValueError(f"fit: {reason}")
        for data in (task.train, task.evaluate, task.validation):
            if data is not None:
                self._check_data(data)
        if schedule is not None:
            left = max(epochs - len(self.history), 0)
            steps = math.ceil(task.samples / task.batch_size) if schedule.per_step else 1
            schedule.check(left * steps)
        mask = means.counted(self.loss, task.train.targets)
        demands = Demands(
            per_step=schedule is not None and schedule.per_step,
            ignored=mask is not None and not bool(mask.all()),
            soft=means.reading(self.loss).weight is not None and not task.train.is_classification,
            precision=self.precision.name,
            clip_norm=self.clip_norm,
            world=shared.world(),
        )
        left = max(epochs - len(self.history), 0) * math.ceil(task.samples / task.batch_size)
        self._choose(task.batch_size, demands, left)

    def _choose(self, batch_size: int, demands: Demands, steps: int | None = None) -> None:
        """Keep the engine if it still serves, and under "auto" is worth its start. Else choose one.

        steps: of the training, or None if not known.
        """
        arguments = self.model, self.loss, self.optimizer
        engine: Any = getattr(self, "engine", None)
        serves = (
            engine is not None
            and engine.demands == demands
            and engine.refuses(*arguments, batch_size) is None
        )
        if serves and self.requested == "auto" and steps is not None:
            serves = engine.costs(*arguments, batch_size, steps) is None
        if not serves:
            self.engine, self.engine_note = engines.choose(
                self.requested, *arguments, batch_size, demands, steps
            )
        self.engine.precision, self.engine.together = self.precision, self.together
        self.engine.planned = self.engine.planned if steps is None else steps

    def _still_serves(self, task: _Task) -> None:
        """Choose again if a callback changed what the engine trains, such as a parameter frozen."""
        if not self.engine.still_serves(task.batch_size):
            self._choose(task.batch_size, self.engine.demands)
            if self.verbose:
                print(self.engine_note)

    def _mismatch(self) -> str | None:
        """The reason why this optimizer cannot train this network, or None."""
        held = {id(p) for p in parameters_of(self.model).values()}
        if not held & {id(p) for p in parameters_in(self.optimizer)}:
            return (
                "the optimizer has none of the network's parameters; make it for the network as it "
                "is now"
            )
        return takeover.needs_closure(self.optimizer)

    def _prepare_engine(self) -> None:
        self.engine.shape = self._shape
        self.engine.moves = None if self.schedule is None else self.schedule.after_step
        launch.changed([*parameters_of(self.model).values()])  # engines may write past autograd

    def _epoch(self, epoch: int, task: _Task, order, after_step):
        before = _Saved(self)
        self._prepare_engine()
        started = time.perf_counter()
        try:
            result = self.engine.epoch(task.train, order, task.batch_size, after_step)
            self.times["steps"] += time.perf_counter() - started
            return result
        except FloatingPointError as error:
            lr = float(self.optimizer.param_groups[0]["lr"])
            before.restore(self)
            untrained = epoch == 1 and str(error).endswith("at step 1")
            advice = (
                "nothing was trained yet; look for numbers in the data that are not finite"
                if untrained
                else f"the weights are those of the end of epoch {epoch - 1}; "
                "try a smaller learning rate"
            )
            raise Diverged(
                f"training stopped: {error} of epoch {epoch} with learning rate {lr:g}; {advice}"
            ) from None

    def _parts(self) -> list:
        """The trained parts: the network, and the loss if it has parameters."""
        has = isinstance(self.loss, torch.nn.Module) and any(True for _ in self.loss.parameters())
        return [self.model, self.loss] if has else [self.model]

    def _after_step(self, on_step):
        """The function that an engine calls after a step, or None.

        It steps a scheduler with interval "step", and calls on_step.
        """
        moves = self.schedule is not None and self.schedule.per_step and not self.engine.reads_ahead
        if not moves and on_step is None:
            return None
        return _AfterStep(self.schedule if moves else None, on_step)

    def _check_data(self, data: Dataset) -> None:
        is_numbers = not data.is_classification and data.targets.shape[1:] in ((), (1,))
        if is_numbers and means.is_entropy(self.loss):
            raise ValueError(
                "fit: softmax cross-entropy takes integer labels (N,) or probabilities "
                f"(N, classes), but the targets of {data.name} are numbers "
                f"{tuple(data.targets.shape)}; use MeanSquaredError for them"
            )
        self._check_features("fit", data)
        if takeover.description(self.model) is not None:
            return
        width = ends(self.model.config())[1]
        check_outputs("fit", self.loss, data, width)
        if data.is_classification and width < len(data.classes):
            as_numbers = "" if means.is_entropy(self.loss) else "; give numbers as floating point"
            as_numbers += f"; {data._gaps}" if data._gaps else ""
            raise ValueError(
                f"fit: the network has {width} outputs, but {data.name} has {len(data.classes)} "
                f"classes{as_numbers}"
            )
        words = None if self._seen is None else self._seen.words
        if data.is_classification and words is not None and width > len(words):
            raise ValueError(
                f"fit: the network has {width} outputs, but the labels of {data.name} are "
                f"{len(words)} words; make it with {len(words)} outputs, or give numbers of the "
                "classes as labels"
            )

    def _check_features(self, op: str, data: Dataset, hint: str = "") -> None:
        """ValueError if the network is ours and takes rows of another width."""
        if takeover.description(self.model) is not None:
            return
        features = ends(self.model.config())[0]
        if features != data.features:
            raise ValueError(
                f"{op}: the network takes {features} features, but {data.name} has "
                f"{data.features}{hint}"
            )

    def evaluate(self, data: Any) -> dict:
        """{"test_loss", "test_accuracy"} of the whole data set, in evaluation mode.

        The loss is the mean over the samples, also with reduction "sum", so data sets of any size
        compare. It is computed in the weights' own dtype. The accuracy is None if the targets are
        no labels. Labels that the loss ignores do not count.

        data: as for `fit`. ValueError for data of another width.
        """
        ignored = means.reading(self.loss).ignore_index
        seen = self._seen
        taken = given.take(data, ignored).data if seen is None else seen.take(data, ignored)
        data = self._fitted(taken)
        self._check_features("evaluate", data)
        if takeover.description(self.model) is None:
            width = ends(self.model.config())[1]
            check_outputs("evaluate", self.loss, data, width)
        if self._seen is not None:
            check_columns(data.columns, self._seen.columns, "evaluate")
        return self._measured(data)

    def _measured(self, data: Dataset) -> dict:
        """As `evaluate`, for a data set that `fit` or `evaluate` has checked."""
        return measure(self.model, self.loss, data, self._shape)

    def predict(self, x: Any) -> torch.Tensor | np.ndarray:
        """The network's prediction for each row of x, in the form of the targets.

        For a network that was trained on labels, these are labels (N,): words, bytes or bools if
        the labels were, else int64. If the loss reads outputs as logits of several labels, such as
        binary cross-entropy, the targets are numbers from 0 to 1. A prediction is then 1 if its
        probability is above one half, else 0, also where targets were between 0 and 1. Else
        predictions are numbers. Both are (N, outputs), or (N,) if the targets were.

        x: rows in the form that `fit` took, (N, …), or a Dataset. The result is a tensor if x is
        one and the targets were no words, else an array. ValueError for rows of another width.
        """
        found, seen = self._outputs(x), self._seen
        if self._is_classifier():
            found = found[:, : None if seen is None else seen.named].argmax(1)
            if seen is not None and seen.words is not None:
                return seen.spelled(found.cpu().numpy())
            is_bool = seen is not None and seen.is_labels and seen.kind == "bool"
        else:
            is_bool = self._are_logits() and seen is not None and seen.kind == "bool"
            if self._are_logits():
                found = (self.loss.predict(found) > 0.5).to(found.dtype)
            if seen is not None and seen.column and found[0].numel() == 1:
                found = found.flatten()
        found = found.bool() if is_bool else found
        return found if isinstance(x, torch.Tensor) else found.cpu().numpy()

    def predict_proba(self, x: Any) -> torch.Tensor | np.ndarray:
        """The probability of each class, (N, classes), or of each label, (N, labels).

        x, and the type of the result: as for `predict`. ValueError if the network was trained on
        numbers.
        """
        if not (self._is_classifier() or self._are_logits()):
            raise ValueError(
                "predict_proba: this network was trained on numbers, which have no probabilities; "
                "use predict"
            )
        found = self._outputs(x)
        as_shares = getattr(self.loss, "probabilities", lambda rows: torch.softmax(rows, -1))
        found = as_shares(found)
        return found if isinstance(x, torch.Tensor) else found.cpu().numpy()

    def _is_classifier(self) -> bool:
        labels = self._seen is not None and self._seen.is_labels
        return labels or means.is_entropy(self.loss)

    def _are_logits(self) -> bool:
        """True if the loss reads outputs as logits, so that `loss.predict` makes probabilities."""
        row = getattr(self.loss, "row", None)
        return row is not None and not row.reads_values

    @torch.no_grad()
    def _outputs(self, x) -> torch.Tensor:
        """The network's outputs (N, outputs) for rows, which are read as the training data were."""
        hint = ""
        if not isinstance(x, Dataset):
            dtype = torch.promote_types(self.engine.dtype, torch.float32)
            seen = self._seen
            plain = rows(arrays.numbers(x, "predict: x")[0]) if seen is None else None
            read = seen.read(x, dtype) if seen is not None else plain
            hint = "; give one row as x[None]" if np.ndim(x) == 1 else ""
            x = read
        self._check_features("predict", x, hint)
        found = outputs(self.model, x.to(self.device), shape=self._shape)
        return torch.cat([out for out, _ in found])

    def state_dict(self) -> dict:
        """The state for resuming, as a dict of tensors and plain data.

        It holds weights and buffers (also those of a loss), the states of optimizer, scheduler,
        precision and early stopping, the history, and facts about the data.
        """
        scheduled = self.schedule.state_dict() if self.schedule is not None else None
        if self._pending is not None:
            scheduled = self._pending.state
        return {
            "model": state_of(self.model),
            "loss": [state_of(part) for part in self._parts()[1:]],
            "optimizer": self.optimizer.state_dict(),
            "history": list(self.history),
            "scheduler": scheduled,
            "precision": self.precision.state_dict(),
            "seen": None if self._seen is None else self._seen.to_dict(),
            "stopping": None if self.stopping is None else self.stopping.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore a `state_dict`. The next `fit` goes on from there.

        If that training had a scheduler, the next `fit` must get it again. ValueError for the state
        of another network or optimizer, or with missing parts. After an error nothing is changed.
        """
        _check_parts(state, len(self._parts()))
        stopping, seen = state.get("stopping"), state.get("seen")
        stopping = None if stopping is None else EarlyStopping.of(stopping)
        seen, history = None if seen is None else Seen.of_dict(seen), History(state["history"])
        before, precision = _Saved(self), copied(self.precision.state_dict())
        try:
            for part, kept in zip(self._parts(), [state["model"], *state.get("loss", ())]):
                load_state(part, kept)
            check_state(self.optimizer, state["optimizer"])
            self._load_optimizer(state["optimizer"])
            if state.get("precision") is not None:
                self.precision.load_state_dict(state["precision"])
        except BaseException:
            before.restore(self)
            self.precision.load_state_dict(precision)
            raise
        self.history, self.schedule, self._pending = history, None, None
        self._seen, self.stopping = seen, stopping
        if state.get("scheduler") is not None:
            self._pending = _Pending(state["scheduler"], options_of(self.optimizer))

    def _load_optimizer(self, state: dict) -> None:
        """Load the optimizer's state, and make a new engine, which has not recorded old tensors."""
        self.optimizer.load_state_dict(state)
        engine = type(self.engine)(self.model, self.loss, self.optimizer)
        engine.demands, engine.precision = self.engine.demands, self.precision
        engine.planned = self.engine.planned
        engine.together = self.together
        self.engine = engine


class _Saved:
    """Copies of all that an epoch of a trainer changes."""

    def __init__(self, trainer: Trainer):
        optimizer, schedule = trainer.optimizer, trainer.schedule
        self.parts = [Snapshot(part) for part in trainer._parts()]
        self.state, self.options = copied(optimizer.state_dict()), options_of(optimizer)
        self.scheduled = None if schedule is None else schedule.state_dict()

    def restore(self, trainer: Trainer) -> None:
        """Undo what was trained since."""
        for part in self.parts:
            part.restore()
        trainer._load_optimizer(self.state)
        self.rewind(trainer, 0, 0)

    def rewind(self, trainer: Trainer, epochs: int, steps: int) -> None:
        """Move the schedule to where so many epochs, of so many steps, leave it."""
        schedule = trainer.schedule
        if schedule is None or self.scheduled is None:
            return
        schedule.load_state_dict(self.scheduled)
        restore_options(trainer.optimizer, self.options)
        for _ in range(epochs):
            for _ in range(steps):
                schedule.after_step()
            schedule.after_epoch({})


class _Pace:
    """The number of epochs for each call: as many as take about `SECONDS`."""

    SECONDS, INDICES = 0.25, 2_000_000

    def __init__(self, samples: int):
        self.most, self.count = max(1, self.INDICES // samples), 1

    def next(self, left: int) -> int:
        """The number of epochs for the next call, at most `left`."""
        return min(left, self.count)

    def took(self, asked: int, trained: int, history: list[dict]) -> None:
        """Note that a call trained so many epochs, and was asked for so many."""
        fit = int(self.SECONDS / history[-1]["seconds"]) if trained == asked else 1
        self.count = min(max(1, fit), self.most)


def _measures(epoch: int, result: EpochResult, seconds: float, more: dict | None = None) -> dict:
    """A row of the history. more: other measures."""
    return {
        "epoch": epoch,
        "train_loss": result.loss,
        "train_accuracy": result.accuracy,
        **(more or {}),
        "seconds": seconds,
        "samples_per_second": result.samples / seconds,
    }


class _AfterStep:
    """The function that an engine calls after a step. stopped: on_step has returned False."""

    def __init__(self, schedule: Schedule | None, on_step: Callable[..., object] | None):
        self.schedule, self.on_step, self.stopped = schedule, on_step, False

    def __call__(self, *count: int) -> bool:
        if self.schedule is not None:
            self.schedule.after_step()
        if self.on_step is not None and self.on_step(*count) is False:
            self.stopped = True
        return not self.stopped


class _Pending(NamedTuple):
    """A loaded scheduler's state, and the optimizer's options, until `fit` gets the scheduler."""

    state: dict
    options: list[dict]


def _check_parts(state: dict, parts: int) -> None:
    """ValueError if a trainer's state lacks something. parts: network and loss, if it has weights.

    The parts of a state are checked here only for what they hold.
    """
    missing = [name for name in ("model", "optimizer", "history") if name not in state]
    if missing:
        raise ValueError(f"the state of a trainer must hold {', '.join(missing)}")
    for name, keys in _STATES.items():
        part = state.get(name)
        if part is not None and not (isinstance(part, dict) and keys <= part.keys()):
            raise ValueError(f"the state of {name} must hold {', '.join(sorted(keys))}")
    if len(state.get("loss", ())) != parts - 1:
        raise ValueError(
            f"the state is of another loss: it has the weights of {len(state.get('loss', ()))} "
            f"losses, but {parts - 1} is needed"
        )


def _made_loss(loss):
    """A loss from a name, a class, a module or a function, see `modules.loss_of`."""
    return loss_of(loss() if isinstance(loss, type) else loss)


def _made_optimizer(optimizer, parameters: list):
    """An optimizer from a name, a class, a function of the parameters, or an optimizer."""
    if optimizer is None:
        return SGD(parameters, lr=0.1)
    if isinstance(optimizer, torch.optim.Optimizer):
        return optimizer
    if isinstance(optimizer, str):
        if optimizer not in OPTIMIZERS:
            raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}")
        return OPTIMIZERS[optimizer](parameters)
    built = optimizer(parameters)
    if not isinstance(built, torch.optim.Optimizer):
        raise TypeError(f"Trainer: the optimizer's function returned {type(built).__name__}")
    return built
