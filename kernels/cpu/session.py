"""Many epochs of a small network in one compiled call.

An epoch of a small table takes less time than Python needs to prepare one. So a `Session` keeps
memory and addresses, and `epochs` trains until something stops it. The code that looks at a loss or
a score after each epoch is compiled too. Two things are as in scikit-learn. Weight decay applies to
weights alone, and has another value for the last batch. The penalty is a part of the loss.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit

from ..rules import Rule, row_of
from ..training import Spec
from . import DTYPES, epoch, loop, rows
from .waiting import call, inside, integers, number, numbers

# What a `Watch` looks at after an epoch: the training loss, or a value of the held-out rows. That
# is the loss, the share of right labels, the share of rows whose outputs all have the right sign,
# or R².
TRAINING_LOSS, LOSS, LABELS, SIGNS, R2 = KINDS = tuple(np.int64(i) for i in range(5))
# Entries of `_Many.watch`.
_BEST, _WAITED, _TOL, _STRICT, _PATIENCE, _KEEPS, _DONE, _STOPPED, _FAILED, _ENTRIES = range(10)
# About the most seconds that a call takes, and the most indices that its orders hold.
_PIECE, _INDICES = 0.25, 2_000_000


@dataclass
class Watch:
    """What ends a training, and which epoch's weights are kept.

    kind: LOSS, LABELS, SIGNS or R2 of held-out rows, or TRAINING_LOSS.
    tol, strict: an epoch is better if its value gains at least `tol` on the best so far. If
        `strict`, it is better if its value gains anything.
    patience: training ends after more than `patience` epochs in a row that are not better.
    keeps: copy the parameters of the epoch with the best value.
    best: the best value so far. A loss counts with a minus.
    waited: epochs since a better one.
    """

    kind: Any = TRAINING_LOSS
    patience: float = math.inf
    tol: float = 0.0
    strict: bool = False
    keeps: bool = False
    best: float = -math.inf
    waited: int = 0


class Held(NamedTuple):
    """Rows that are measured after each epoch. data: (n, features). targets: as in training."""

    data: torch.Tensor
    targets: torch.Tensor
    rows: torch.Tensor | None = None  # indices of the rows that count; None for all
    weights: torch.Tensor | None = None  # (n,) how much each row counts; None for 1 each


class Draws(NamedTuple):
    """Orders that the compiled code draws, one after another in the same row of memory."""

    state: np.ndarray  # (625,) uint32: the 624 words of MT19937 and the place in them
    epochs: int  # the most epochs


class Found(NamedTuple):
    """What `Session.epochs` measured: a number for each epoch that was trained."""

    losses: list[float]
    values: list[float]  # of `Watch.kind`; here a loss has no minus
    stopped: bool  # True if the watch ended the training
    failed: int | None = None  # the step of the next epoch whose loss is not finite


class _Network(NamedTuple):
    """A network, and the data that it reads. See `loop.Run`."""

    w: np.ndarray
    layers: np.ndarray
    places: np.ndarray


class _Many(NamedTuple):
    """What a compiled call needs besides a network."""

    # (epochs, rows) int64. If orders are drawn, one row, which first holds the order before them.
    orders: np.ndarray
    # (625,) uint32: the state of MT19937 and the place in it. It is empty if the orders are given.
    draws: np.ndarray
    numbers: np.ndarray  # (epochs · steps, columns) floats, for weights
    bias_numbers: np.ndarray  # the same for biases
    shares: np.ndarray  # (steps,) float64: the factor of each step in an epoch's loss
    held_shares: np.ndarray  # (steps of the held-out rows,) float64, likewise
    held_weights: np.ndarray  # (held-out rows,) float64: how much each counts
    spread: np.ndarray  # (outputs,) float64: Σ weight · (t - mean t)² of the held-out targets
    losses: np.ndarray  # (epochs,) float64
    values: np.ndarray  # (epochs,) float64
    watch: np.ndarray  # (_ENTRIES,) float64: a `Watch` and what happened
    best: np.ndarray  # (floats of the parameters,)
    penalty: np.float64  # before each step, penalty · Σ w² is added to the epoch's loss
    # If rows have weights, the weight decay of a step is alpha / Σ weights of its batch. It belongs
    # in this column of numbers. Else alpha is 0.
    alpha: np.float64
    column: np.int64
    kind: np.int64


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _sum_of_squares(w):
    total = number(w, 0.0)
    for i in range(len(w)):
        total += w[i] * w[i]
    return total


@inside
def _squares(run):
    """The sum of the squares of all weights, without biases. The padding is 0."""
    total = 0.0
    for l in range(len(run.layers)):
        start = run.layers[l, loop.W]
        stop = start + run.layers[l, loop.TALL] * run.layers[l, loop.WIDE]
        total += _sum_of_squares(run.w[start:stop])
    return total


@inside
def _steps(run, begin, end, trains):
    """`loop.steps`, called by its address. So this code holds no copy of it."""
    addresses = run.places[loop.BASE], np.int64(run.places.ctypes.data)
    call(run.places[loop.STEPS], (*addresses, loop.NONE, loop.ONCE, begin, end, trains))


@inside
def _outputs(run, step):
    """Compute outputs and losses of a batch of the held-out rows, in y of the last layer.

    Returns the number of rows.
    """
    batch = run.places[loop.BATCH]
    _steps(run, step, step + 1, loop.NONE)
    return min(batch, run.places[loop.ROWS_OF_EPOCH] - step * batch)


@inside
def _targets(run, sample):
    """A pointer to the targets of a sample, which are floats."""
    offset = run.w.itemsize * sample * run.layers[-1, loop.N]
    return numbers(run.w, run.places[loop.TARGETS] + offset)


@inside
def _share_of_signs(run, weights):
    """The share of rows whose outputs are positive exactly where targets are above one half.

    weights: how much each row counts. NaN if an output is NaN.
    """
    layer, places = run.layers[-1], run.places
    right, whole, samples, classes = 0.0, 0.0, places[loop.ROWS_OF_EPOCH], layer[loop.N]
    for step in range((samples + places[loop.BATCH] - 1) // places[loop.BATCH]):
        for row in range(_outputs(run, step)):
            y = layer[loop.Y] + row * layer[loop.PITCH]
            sample = integers(places[loop.ORDER])[step * places[loop.BATCH] + row]
            targets = _targets(run, sample)
            hit = True
            for i in range(classes):
                if run.w[y + i] != run.w[y + i]:
                    return np.nan
                hit = hit and (run.w[y + i] > 0) == (targets[i] > 0.5)
            weight = weights[step * places[loop.BATCH] + row]
            right += weight * hit
            whole += weight
    return right / whole


@inside
def _r2(run, spread, weights):
    """The mean R² of all outputs. NaN if an output is not finite.

    spread: Σ weight · (t - mean t)² of each output. weights: how much each row counts. If an
    output's targets are all the same, its R² is 1 if they are met exactly, else 0. This is
    scikit-learn's rule.
    """
    layer, places = run.layers[-1], run.places
    samples, classes = places[loop.ROWS_OF_EPOCH], layer[loop.N]
    errors = np.zeros(classes)
    for step in range((samples + places[loop.BATCH] - 1) // places[loop.BATCH]):
        for row in range(_outputs(run, step)):
            y = layer[loop.Y] + row * layer[loop.PITCH]
            sample = integers(places[loop.ORDER])[step * places[loop.BATCH] + row]
            targets = _targets(run, sample)
            weight = weights[step * places[loop.BATCH] + row]
            for i in range(classes):
                d = np.float64(run.w[y + i]) - np.float64(targets[i])
                errors[i] += weight * (d * d)
    total = 0.0
    for i in range(classes):
        if not np.isfinite(errors[i]):
            return np.nan
        if spread[i] > 0:
            total += 1.0 - errors[i] / spread[i]
        elif errors[i] == 0:
            total += 1.0
    return total / classes


@inside
def _loss(run, shares):
    """The mean loss of the held-out rows."""
    _steps(run, loop.NONE, np.int64(len(shares)), loop.NONE)
    total = 0.0
    for step in range(len(shares)):
        if shares[step] != 0:  # else its weights sum to 0, and it has no mean loss
            total += numbers(run.w, run.places[loop.LOSSES])[step] * shares[step]
    return total


@inside
def _share_of_labels(run, weights):
    """The share of rows whose largest output is that of their label. NaN if a loss is not finite.

    weights: how much each row counts.
    """
    places, right, whole = run.places, 0.0, 0.0
    samples = places[loop.ROWS_OF_EPOCH]
    for step in range((samples + places[loop.BATCH] - 1) // places[loop.BATCH]):
        rows_, before = _outputs(run, step), whole
        for row in range(rows_):
            weight = weights[step * places[loop.BATCH] + row]
            right += weight * run.w[places[loop.RIGHT] + row]
            whole += weight
        # A batch whose weights sum to 0 has no mean loss, and counts for nothing.
        if whole != before and not np.isfinite(numbers(run.w, places[loop.LOSSES])[step]):
            return np.nan
    return right / whole


@inside
def _measured(held, many):
    """The value of the held-out rows that the watch looks at. `Session.epochs` checks its kind."""
    value = np.nan
    if many.kind == SIGNS:
        value = _share_of_signs(held, many.held_weights)
    elif many.kind == R2:
        value = _r2(held, many.spread, many.held_weights)
    elif many.kind == LOSS:
        value = _loss(held, many.held_shares)
    elif many.kind == LABELS:
        value = _share_of_labels(held, many.held_weights)
    return value


@inside
def _judge(run, many, loss, value):
    """Note the loss and the value of an epoch. True if training ends."""
    watch, done = many.watch, int(many.watch[_DONE])
    many.losses[done] = loss
    many.values[done] = value
    watch[_DONE] += 1
    is_loss = many.kind == TRAINING_LOSS or many.kind == LOSS
    v = -value if is_loss else value
    better = v > watch[_BEST] if watch[_STRICT] else v >= watch[_BEST] + watch[_TOL]
    watch[_WAITED] = 0 if better else watch[_WAITED] + 1
    if v > watch[_BEST]:
        watch[_BEST] = v
        if watch[_KEEPS]:
            for i in range(len(many.best)):
                many.best[i] = run.w[i]
    return watch[_WAITED] > watch[_PATIENCE]


@inside
def _twisted(a, b):
    y = (a & np.uint32(0x80000000)) | (b & np.uint32(0x7FFFFFFF))
    return (y >> np.uint32(1)) ^ ((y & np.uint32(1)) * np.uint32(0x9908B0DF))


@inside
def _twist(draws):
    """The next 624 words of MT19937's state, by Matsumoto and Nishimura."""
    for i in range(227):
        draws[i] = draws[i + 397] ^ _twisted(draws[i], draws[i + 1])
    for i in range(227, 623):
        draws[i] = draws[i - 227] ^ _twisted(draws[i], draws[i + 1])
    draws[623] = draws[396] ^ _twisted(draws[623], draws[0])
    draws[624] = 0


@inside
def _temper(draws, words):
    """Write the 624 numbers that MT19937 gives in this state, as numpy's RandomState does."""
    for i in range(624):
        y = draws[i]
        y ^= y >> np.uint32(11)
        y ^= (y << np.uint32(7)) & np.uint32(0x9D2C5680)
        y ^= (y << np.uint32(15)) & np.uint32(0xEFC60000)
        words[i] = y ^ (y >> np.uint32(18))


@inside
def _draw(many, words):
    """Shuffle the order of the epoch before, as sklearn.utils.shuffle does.

    words: the numbers of `_temper`.
    """
    draws, place = many.draws, np.int64(many.draws[624])
    order = integers(np.int64(many.orders.ctypes.data))
    i, mask = many.orders.shape[1] - 1, 1
    while mask < i:
        mask = 2 * mask + 1
    # Whether a number is small enough cannot be predicted. So there is no branch for it: instead,
    # the last element changes places with itself.
    while i > 0:
        if place == 624:
            _twist(draws)
            _temper(draws, words)
            place = 0
        mask = mask >> 1 if mask >> 1 >= i else mask
        j = np.int64(words[place]) & mask
        place += 1
        to = j if j <= i else i
        last, order[i] = order[i], order[to]
        order[to] = last
        i -= j <= i
    draws[624] = place


@inside
def _point_at(run, many, e):
    """Let the steps read the order and the numbers of epoch e."""
    order, row, steps = many.orders.shape[1], min(e, len(many.orders) - 1), len(many.shares)
    offset = many.numbers.itemsize * e * steps * run.places[loop.COUNT]
    run.places[loop.ORDER] = np.int64(many.orders.ctypes.data) + 8 * row * order
    run.places[loop.NUMBERS] = np.int64(many.numbers.ctypes.data) + offset
    run.places[loop.BIAS_NUMBERS] = np.int64(many.bias_numbers.ctypes.data) + offset


@inside
def _rows_of(run, step):
    """(the first row of a batch, the number of its rows)."""
    first = step * run.places[loop.BATCH]
    return first, min(run.places[loop.BATCH], run.places[loop.ROWS_OF_EPOCH] - first)


@inside
def _decay(run, many, step):
    """A pointer to the weight decay of a step of this epoch. Its array's type forbids writing."""
    address = loop.numbers_of(run, loop.NUMBERS, step)
    return numbers(run.w, address + many.numbers.itemsize * many.column)


@inside
def _weigh_decays(run, many):
    """Write the weight decay of each step of an epoch, which depends on the weights of its rows."""
    for step in range(len(many.shares)):
        total = np.float64(loop.sum_of_weights(run, *_rows_of(run, step)))
        _decay(run, many, step)[0] = many.alpha / total


@inside
def _penalty(run, many, step):
    """The penalty before a step of this epoch. It is divided as the losses are."""
    share = 1.0
    if many.alpha > 0:
        decay = np.float64(_decay(run, many, step)[0])
        share = _rows_of(run, step)[1] * decay / many.alpha
    return many.penalty * share * _squares(run)


@inside
def _after_epoch(run, held, many, penalty):
    """Note an epoch's loss and the watched value, and whether training ends here."""
    loss = penalty
    for step in range(len(many.shares)):
        value = numbers(run.w, run.places[loop.LOSSES])[step]
        if not np.isfinite(value):
            many.watch[_FAILED] = step
            many.watch[_STOPPED] = 1
            return
        loss += value * many.shares[step]
    value = loss if many.kind == TRAINING_LOSS else _measured(held, many)
    many.watch[_STOPPED] = _judge(run, many, loss, value)


def _epochs(run, held, many):
    """Train until the watch ends it, or until all epochs are done."""
    steps, words = len(many.shares), np.empty(624, np.uint32)
    if len(many.draws):
        _temper(many.draws, words)
    for e in range(len(many.losses)):
        if len(many.draws):
            _draw(many, words)
        _point_at(run, many, e)
        if many.alpha > 0:
            _weigh_decays(run, many)
        # With a penalty, a call takes one step, because it needs the weights before each step.
        size = 1 if many.penalty > 0 else steps
        penalty = 0.0
        for step in range(0, steps, size):
            if many.penalty > 0:
                penalty += _penalty(run, many, step)
            _steps(run, step, step + size, loop.ONCE)
        _after_epoch(run, held, many, penalty)
        if many.watch[_STOPPED]:
            break


@functools.cache
def compiled(kind: np.dtype) -> Any:
    """`_epochs` for networks of this dtype, compiled or read from disk at its first call."""
    return rows.cached(njit, rows.named(_epochs, kind.name), nogil=True, error_model="numpy")


def is_loaded(kind: np.dtype) -> bool:
    """True if this process has trained many epochs of a network of this dtype."""
    return bool(compiled(kind).signatures)


def is_compiled(kind: np.dtype) -> bool:
    """True if the code of this version for this dtype is compiled, here or on disk."""
    here = is_loaded(kind) or rows.is_kept(rows.named(_epochs, kind.name))
    return here and epoch.is_compiled(kind)


class Session:
    """A network in training, held in the memory of the compiled epoch.

    parameters: [w_1, b_1, w_2, …], all float32 or all float64.
    states: a list of the same shapes for each state of the rule. Parameters and states are read
        here and written by `store`.
    samples: the fields of `epoch.Samples`, as in `kernels.Run`.
    count: rows of an epoch.
    batch: rows of a step.
    held: what is measured after each epoch.
    """

    def __init__(
        self,
        spec: Spec,
        parameters: list[torch.Tensor],
        states: list[list[torch.Tensor]],
        samples: tuple,
        count: int,
        batch: int,
        held: Held | None = None,
    ) -> None:
        samples = epoch.Samples(*samples)
        kind = DTYPES[parameters[0].dtype]
        self.memory = epoch.Memory(spec, kind, min(batch, count), 1)
        self._pairs = self.memory.pairs([parameters, *states])
        self.steps, self.count = -(-count // batch), count
        order = torch.zeros(count, dtype=torch.int64, device="cpu")
        self._task = self._task_of(samples, order)
        self._held, self._weighted = self._task, samples.weights is not None
        self._held_shares = self._spread = self._held_weights = np.zeros(0)
        if held is not None:
            every = torch.arange(len(held.data), device="cpu")
            chosen = every if held.rows is None else held.rows
            rows_held = samples._replace(data=held.data, targets=held.targets, weights=held.weights)
            self._held = self._task_of(rows_held, chosen)
            weights = np.ones(len(chosen))
            if held.weights is not None:
                weights = held.weights[chosen].double().numpy()
            self._held_weights = weights
            self._held_shares = _shares(spec, weights, self.memory.batch)
            if held.targets.is_floating_point():
                true = held.targets[chosen].double().numpy().reshape(len(chosen), -1)
                away = np.square(true - np.average(true, 0, weights))
                self._spread = weights @ away
        self._shares = _shares(spec, np.ones(count), batch)
        self._best = np.empty(0, kind)
        self.load()

    def _task_of(self, samples: epoch.Samples, order: torch.Tensor) -> Any:
        steps = -(-len(order) // self.memory.batch)
        numbers = np.zeros((steps, len(self.memory.spec.rule.columns)), self.memory.kind)
        return epoch._Task(self.memory, samples, order, numbers)

    def load(self) -> None:
        """Read parameters and states from their tensors."""
        epoch.read(self._pairs)

    def store(self) -> None:
        """Write parameters and states to their tensors."""
        epoch.write(self._pairs)

    def take_best(self) -> bool:
        """Let `store` write the parameters of the best epoch. False if none were kept."""
        if not len(self._best):
            return False
        self.memory.w[: len(self._best)] = self._best
        return True

    def epochs(
        self,
        orders: np.ndarray,
        numbers: Any,
        taken: int,
        watch: Watch,
        alpha: float | None = None,
        scale: float = 1.0,
        draws: Draws | None = None,
    ) -> Found:
        """Train for an epoch on each of the orders, or until `watch` stops it.

        Training also ends where a loss is not finite. ValueError for a watch of no known kind, and
        for one of held-out rows if there are none.

        orders: (epochs, rows) int64.
        numbers: a row of the rule's hyperparameters, or one row for each step.
        taken: the steps taken so far.
        alpha: scikit-learn's penalty. numbers are then the rule's hyperparameters by name, without
            weight decay. It is divided by the rows of a batch, or by the sum of their weights.
        scale: a factor of the mean loss that is reported.
        draws: the state of numpy's RandomState, which then shuffles each order from the one before.
            `orders` has one row, which at first holds the order before the first epoch, and in the
            end that of the last one.
        """
        known = KINDS if self._held is not self._task else (TRAINING_LOSS,)
        if watch.kind not in known:
            rows_ = "held-out rows" if len(known) > 1 else "no held-out rows"
            raise ValueError(
                f"Session: a watch with {rows_} looks at kind {' or '.join(map(str, known))}, "
                f"got {watch.kind}"
            )
        count = len(orders) if draws is None else draws.epochs
        of_weights, of_biases = self._tables(numbers, taken, count, alpha)
        if watch.keeps and not len(self._best):
            self._best = self.memory.w[: self.memory.places[loop.STATE]].copy()
        state = np.zeros(_ENTRIES)
        state[:_DONE] = (
            *(watch.best, watch.waited, watch.tol, watch.strict),
            *(watch.patience, watch.keeps),
        )
        state[_FAILED] = -1
        many = _Many(
            orders,
            np.empty(0, np.uint32) if draws is None else draws.state,
            of_weights,
            of_biases,
            self._shares * scale,
            self._held_shares,
            self._held_weights,
            self._spread,
            np.zeros(count),
            np.zeros(count),
            state,
            self._best,
            np.float64(0.5 * alpha / self.count if alpha else 0.0),
            np.float64(alpha if alpha and self._weighted else 0.0),
            np.int64(self.memory.spec.rule.columns.index("weight_decay")),
            watch.kind,
        )
        self._call(many)
        done, failed = int(state[_DONE]), int(state[_FAILED])
        watch.best, watch.waited = float(state[_BEST]), int(state[_WAITED])
        losses, values = many.losses[:done].tolist(), many.values[:done].tolist()
        stopped = bool(state[_STOPPED]) and failed < 0
        return Found(losses, values, stopped, failed if failed >= 0 else None)

    def ahead(self, epochs: int) -> int:
        """The number of epochs for the next call, at most `epochs`.

        A call should be short, because it cannot be interrupted. Its orders should not fill the
        memory.
        """
        each = self.steps * epoch.seconds(self.memory)
        most = min(_PIECE / each, _INDICES / self.count)
        return max(1, min(epochs, int(most)))

    def bad_loss(self, step: int) -> str:
        """A sentence about the loss that is not finite. step: counted from 0."""
        return f"the loss is {self._task.losses[step]} at step {step + 1}"

    def _call(self, many: _Many) -> None:
        memory, train = self.memory, compiled(self.memory.kind)
        run, held = (
            _Network(memory.w, memory.layers, task.places) for task in (self._task, self._held)
        )
        train(run, held, many)

    def _tables(
        self, numbers: Any, taken: int, count: int, alpha: float | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The rule's numbers for weights, and those for biases.

        Both are (steps of all epochs, columns).
        """
        rule, steps, kind = self.memory.spec.rule, count * self.steps, self.memory.kind
        if alpha is None:
            both = epoch._numbers(rule, numbers, float(taken), steps, kind)
            return both, both
        batch, last = self.memory.batch, self.count - (self.steps - 1) * self.memory.batch
        decays = 0.0, alpha / batch, alpha / last
        rows_ = tuple(row_of(rule, **numbers, weight_decay=decay) for decay in decays)
        of_weights, of_biases = _decayed(rule, rows_, float(taken), steps, self.steps, kind)
        return of_weights.copy() if self._weighted else of_weights, of_biases


# Kept for the other folds of a search, which train with the same numbers.
@functools.lru_cache(maxsize=16)
def _decayed(
    rule: Rule,
    rows_: tuple[tuple, ...],
    taken: float,
    steps: int,
    every: int,
    kind: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """The tables of `Session._tables` with weight decay. Nobody may write into them.

    rows_: the rule's rows for biases, for weights, and for the last of `every` steps.
    """
    of_biases, of_weights, of_last = epoch._numbers(
        rule, [[row] for row in rows_], taken, steps, kind
    )
    of_weights[every - 1 :: every] = of_last[every - 1 :: every]
    return of_weights, of_biases


def _shares(spec: Spec, weights: np.ndarray, batch: int) -> np.ndarray:
    """The factor of each batch's loss in the mean over all rows.

    A batch's loss is a mean or a sum. weights: how much each row counts, in the order of the rows.
    """
    sums = np.add.reduceat(weights, range(0, len(weights), batch))
    return (sums if spec.loss_mean else np.ones(len(sums))) / sums.sum()
