"""The host's side of the compiled epoch: its memory, its threads and its pieces."""

import collections
import concurrent.futures
import ctypes
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import types

from .. import activations
from ..training import Run
from . import DTYPES, loop, products, rows, team
from .tiles import VECTOR

# About the seconds of a piece. After each, the host checks whether to stop, and chooses threads
# anew: where a system moves virtual cores apart, two threads may suddenly be slower than one.
_PIECE = 0.05
# Seconds of a piece that measures a number of threads. In a shorter one, several threads would look
# slow: they start late, and each finds the numbers in another core's cache.
_TRIAL = 0.02
# Measurements of each number of threads. The best one counts, because another process or cold
# caches may slow a measurement down.
_TRIALS = 3
# A number of threads that lost is measured again after 2 pieces, 4, 8, 16, and then once in 32. A
# short piece, as in a small epoch, counts as a part of one.
_SOON, _AGAIN = 2, 32
_CHUNKS = 8  # most chunks that the first layer's inputs are cut into
# Guesses: floating-point operations a second times bytes of a number, and the seconds that each
# step takes besides.
_SPEED, _OVERHEAD = 2e11, 1e-5
_SPARE = 8  # int32 that a list of terms is written past its end
# Inputs that are 0 are left out of products, if at least this share of the data is 0.
_ZEROS, _SAMPLED = 0.4, 64
_BLOCK = 1024  # steps whose numbers are computed together, and kept
# Memories of ended trainings, the latest last: at most so many, each of at most so many bytes.
_idle: list["Memory"] = []
_MOST_IDLE, _MOST_BYTES = 4, 8_000_000
_lending = threading.Lock()
_choices: dict[tuple, "_Choice"] = {}  # the key is (sizes, batch, threads, dtype)
_compiling = threading.Lock()  # otherwise several threads would compile the same code
_made: dict[np.dtype, "_Steps"] = {}


class Samples(NamedTuple):
    """The rows that a network learns, as in `kernels.Run`. weights: (n,), or None for 1 each."""

    data: torch.Tensor
    targets: torch.Tensor
    scale: float = 1.0
    shift: float = 0.0
    weights: torch.Tensor | None = None

    @classmethod
    def of(cls, run: Run) -> "Samples":
        """The samples of a run."""
        return cls(run.data, run.targets, run.scale, run.shift, run.weights)


class _Steps:
    """`loop.steps` for networks of a dtype, compiled or read from disk."""

    def __init__(self, kind: np.dtype):
        floats, count = rows.pointer_to(kind), 5
        signature = types.void(floats, types.CPointer(types.int64), *[types.int64] * count)
        self.code = rows.address(loop.steps_at, signature, kind)
        kinds = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * count
        # A call holds no lock of Python.
        self.call = ctypes.CFUNCTYPE(None, *kinds)(self.code.address)


def compiled(kind: np.dtype) -> "_Steps":
    """The steps for networks of this dtype. The products that they call are compiled first."""
    with _compiling:
        if kind not in _made:
            products.compiled(kind)
            _made[kind] = _Steps(kind)
        return _made[kind]


def is_loaded(kind: np.dtype) -> bool:
    """True if this process has the compiled steps for networks of this dtype."""
    return kind in _made


def is_compiled(kind: np.dtype) -> bool:
    """True if the steps of this version for this dtype are compiled, here or on disk."""
    return is_loaded(kind) or rows.is_kept(rows.named(loop.steps_at, kind.name))


class Memory:
    """The flat array of a training, and where everything lies in it.

    spec: a `kernels.Spec`. kind: the dtype of the network, float32 or float64. batch: rows of the
    largest batch. workers: the most that will share the array.
    """

    def __init__(self, spec: Any, kind: np.dtype, batch: int, workers: int):
        self.spec, self.kind, self.batch, self.size = spec, kind, batch, 0
        self.key = spec, kind, batch, workers
        self.lanes, scratch = VECTOR // kind.itemsize, loop.SCRATCH_BYTES // kind.itemsize
        count, lists = len(spec.sizes) - 1, len(spec.rule.states)
        acts = [spec.activation] * (count - 1) + [spec.output_activation]
        layers = np.zeros((count, loop.COLUMNS_OF_LAYER), np.int64)
        places = np.zeros(loop.PLACES, np.int64)
        pitches = [self._pitch(size) for size in spec.sizes[1:]]
        for i, (layer, k, n, pitch) in enumerate(zip(layers, spec.sizes, spec.sizes[1:], pitches)):
            across = i > 0 and 2 * n <= self.lanes and n * self._pitch(k) <= scratch
            layer[:3] = k, n, pitch
            layer[loop.ACROSS], layer[loop.WIDE] = across, self._pitch(k) if across else pitch
            layer[loop.TALL] = n if across else k
            layer[loop.W] = self._take((layer[loop.TALL] + 1) * layer[loop.WIDE])
            layer[loop.BLOCK] = max(1, scratch // pitch // loop.LEAST) * loop.LEAST
            if across:
                layer[loop.BLOCK] = k
        places[loop.STATE] = self.size
        self.size *= 1 + lists
        for layer, pitch, name in zip(layers, pitches, acts):
            # y and z have places of their own. A loop that writes where it reads does not become
            # vector instructions.
            for column in (loop.Y, loop.Z, loop.D):
                layer[column] = self._take(batch * pitch)
            needs_z = activations.get(name).needs == "z"
            layer[loop.KEPT] = layer[loop.Z if needs_z else loop.Y]
        self._place(places, workers, pitches, scratch)
        whole = np.zeros(self.size + self.lanes, kind)
        start = -whole.ctypes.data % VECTOR // kind.itemsize  # w begins on a multiple of VECTOR
        self.w = whole[start : start + self.size]
        places[loop.BASE], places[loop.SIZE] = self.w.ctypes.data, self.size
        places[loop.LAYERS], places[loop.DEPTH] = layers.ctypes.data, len(layers)
        self.layers, self.places = layers, places
        self._bind()
        self._fill()

    def _bind(self) -> None:
        """Note the addresses of the functions, the loss's numbers, and where each tensor lies."""
        functions = *rows.of(self.spec, self.kind), *products.compiled(self.kind)
        self._steps = compiled(self.kind)
        for place, function in enumerate((*functions, self._steps.code), loop.FORWARD):
            self.places[place] = function.address
        shape = self.batch, self.spec.sizes[-1]
        numbers = np.array(self.spec.loss_numbers, self.kind)
        self.loss_numbers = np.broadcast_to(numbers, shape).copy()  # for each output of each row
        self.places[loop.PARAMETERS] = _at(self.loss_numbers)
        state = int(self.places[loop.STATE])
        self._insides = [self._inside(i * state) for i in range(1 + len(self.spec.rule.states))]

    def _fill(self) -> None:
        """Write what a new memory holds. The rest is 0."""
        places = self.places
        self.w[places[loop.ONE]] = 1.0
        every = self.w[places[loop.EVERY] :][: places[loop.TERMS]].view(np.int32)
        every[: places[loop.TERMS]] = np.arange(places[loop.TERMS])

    def renew(self) -> None:
        """Make this memory as it was when it was new."""
        self.w.fill(0)
        self._fill()

    def _place(self, places: Any, workers: int, pitches: list[int], scratch: int) -> None:
        """Note sizes, and give a place to all that a step needs besides the layers.

        pitches: floats of a padded row of each layer's outputs. scratch: the least floats of a
        worker's scratch.
        """
        spec, batch, kind = self.spec, self.batch, self.kind
        chunks = max(1, min(_CHUNKS, spec.sizes[0] // 64 * 2))  # one, or equally many in each half
        places[loop.CHUNKS] = chunks
        places[loop.X] = self._take(batch * spec.sizes[0])
        places[loop.PARTIAL] = self._take(chunks * (batch + 1) * pitches[0])
        places[loop.START] = self._take(workers * pitches[0])
        terms = max(batch, spec.sizes[0]) + _SPARE
        places[loop.TERMS], places[loop.LISTED] = terms, self._take(workers * terms)
        places[loop.EVERY], places[loop.ZEROS] = self._take(terms), self._take(pitches[0])
        octets = -(-spec.sizes[0] // loop.OCTET) * -(-batch // loop.OCTET)
        places[loop.BITS] = self._take(octets * loop.OCTET // kind.itemsize)
        places[loop.Q] = self._take(3 * batch * spec.sizes[-1])
        places[loop.ROOM] = max(scratch, max(pitches) * loop.LEAST)
        places[loop.SCRATCH] = self._take(workers * places[loop.ROOM])
        places[loop.LOSS], places[loop.RIGHT] = self._take(batch), self._take(batch)
        places[loop.ONE] = self._take(1)
        places[loop.BIAS], places[loop.MEAN] = spec.bias, spec.loss_mean
        places[loop.IGNORED], places[loop.BATCH] = spec.loss.ignored, batch

    def _take(self, floats: int) -> int:
        start = self.size
        self.size += -(-floats // self.lanes) * self.lanes
        return start

    def _pitch(self, size: int) -> int:
        """Floats of a row of `size` numbers, padded to whole vectors.

        If its bytes are a multiple of 1024, a row gets one vector more. Otherwise all rows would
        fall on the same cache sets.
        """
        padded = -(-size // self.lanes) * self.lanes
        return padded + self.lanes if padded * self.kind.itemsize % 1024 == 0 else padded

    def array(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> np.ndarray:
        """A tensor as a contiguous array of this dtype, by default the network's."""
        return tensor.to(dtype or torch.from_numpy(self.w).dtype).contiguous().numpy()

    def _inside(self, at: int) -> list[np.ndarray]:
        """Views of w that have the shapes of [w_1, b_1, w_2, …], in this order.

        at: 0 for parameters. For states, the floats from a parameter to its state.
        """
        views = []
        for layer in self.layers.tolist():
            k, n, start = layer[loop.K], layer[loop.N], at + layer[loop.W]
            tall, wide = layer[loop.TALL], layer[loop.WIDE]
            place = self.w[start : start + tall * wide].reshape(tall, wide)
            views.append(place[:, :k] if layer[loop.ACROSS] else place[:, :n].T)
            if self.spec.bias:
                views.append(self.w[start + tall * wide :][:n])
        return views

    def pairs(self, lists: Any) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tensor as a numpy array, its place in w) of all parameters and states."""
        return [
            (tensor.numpy(), inside)
            for tensors, insides in zip(lists, self._insides, strict=True)
            for tensor, inside in zip(tensors, insides, strict=True)
        ]

    def take(self, places: np.ndarray, worker: int, workers: int, begin: int, end: int) -> None:
        """Take the steps from `begin` to `end` of these places, as one of so many workers."""
        self._steps.call(_at(self.w), _at(places), worker, workers, begin, end, True)


def _at(array: np.ndarray) -> int:
    """The address of an array's first element."""
    return array.__array_interface__["data"][0]


def read(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy parameters and states into a memory. pairs: of `Memory.pairs`."""
    for outside, inside in pairs:
        inside[...] = outside


def write(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Copy parameters and states from a memory to their tensors."""
    for outside, inside in pairs:
        outside[...] = inside


def _lent(spec: Any, kind: np.dtype, batch: int, workers: int) -> Memory:
    """A memory as new, for one training: one that is idle, or else a new one."""
    key = spec, kind, batch, workers
    with _lending:
        found = next((memory for memory in _idle if memory.key == key), None)
        if found is not None:
            _idle.remove(found)
    if found is None:
        return Memory(*key)
    found.renew()
    return found


def _give_back(memory: Memory) -> None:
    """Keep a memory for the next training of this kind."""
    if memory.w.nbytes <= _MOST_BYTES:
        with _lending:
            _idle.append(memory)
            del _idle[:-_MOST_IDLE]


def train_epoch(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.train_epoch` on a CPU. Trains in place and returns (losses, correct) of every step.

    It takes any width, batch and number of classes. correct counts right labels, and is 0 where
    targets are numbers. There are at most as many threads as torch uses. A KeyboardInterrupt is
    raised at most a piece of the epoch later. Parameters, states and count are then as they were
    after some step.
    """
    trained = Epochs(run, run.order[None], run.hyper)
    trained.train()
    return trained.losses[0], trained.correct[0]


class Epochs:
    """Several epochs of one training, prepared together. The bits are those of one after another.

    run: the training, with the order of the first epoch. orders: (epochs, rows), the order of each
    epoch. hyper: (columns,), or (steps of all epochs, columns).
    losses, correct: (epochs, steps), the results.
    """

    def __init__(self, run: Run, orders: torch.Tensor, hyper: torch.Tensor):
        spec, self.run, self.workers = run.spec, run, max(1, torch.get_num_threads())
        kind = DTYPES[run.parameters[0].dtype]
        memory = _lent(spec, kind, min(run.batch, orders.shape[1]), self.workers)
        steps = len(orders) * run.steps
        table = _numbers(spec.rule, hyper, float(run.count), steps, kind)
        self._task = _Task(memory, Samples.of(run), orders, table)
        shape = len(orders), run.steps
        self.losses = torch.from_numpy(self._task.losses).view(shape)
        self.correct = torch.from_numpy(self._task.correct).view(shape)

    def train(self, after_epoch: Callable[[int], None] | None = None) -> None:
        """Train all epochs, once. An error or a KeyboardInterrupt ends this as in `train_epoch`.

        after_epoch: called with the number of each whole epoch, from 0 on, by the thread that
        trains. A KeyboardInterrupt cannot come between an epoch and this call.
        """
        task, run = self._task, self.run
        choice = _choice(task.memory, self.workers)
        pairs = task.memory.pairs([run.parameters, *run.states])
        if after_epoch is None and choice.is_short(len(task.losses)):
            try:
                _train_here(task, pairs, choice)
            finally:
                run.count += task.done
        else:
            self._train_there(pairs, choice, after_epoch)
        _give_back(task.memory)

    def _train_there(self, pairs: list, choice: "_Choice", after_epoch: Any) -> None:
        """Train in another thread, because Ctrl-C interrupts only the calling one."""
        task, run = self._task, self.run
        known, stopped = threading.Event(), threading.Event()

        def train() -> None:
            known.wait()
            if not stopped.is_set():
                _train(task, pairs, choice, stopped, pool, after_epoch)

        with team.threads(self.workers) as pool:
            futures: list[concurrent.futures.Future] = []
            try:
                # The thread starts when its future is known here. So an interrupt leaves none that
                # nobody waits for.
                futures.append(pool.submit(train))
                known.set()
                futures[0].result()
            finally:
                stopped.set()
                known.set()
                concurrent.futures.wait(futures)
                run.count += task.done


def train_replicas(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """`kernels.train_replicas` on a CPU. Each thread trains one network at a time.

    There are as many threads as torch uses.
    """
    spec, batch, stopped = run.spec, min(run.batch, run.order.shape[1]), threading.Event()
    kind = DTYPES[run.parameters[0].dtype]

    def one(replica: int) -> _Task:
        memory = _lent(spec, kind, batch, 1)
        numbers = _numbers(spec.rule, run.hyper[replica], float(run.count), run.steps, kind)
        task = _Task(memory, Samples.of(run), run.order[replica], numbers)
        lists = [[t[replica] for t in tensors] for tensors in (run.parameters, *run.states)]
        _train(task, memory.pairs(lists), _choice(memory, 1), stopped)
        _give_back(memory)
        return task

    compiled(kind), rows.of(spec, kind)  # compiled once, before the threads start
    with team.threads(max(1, torch.get_num_threads())) as pool:
        futures = [pool.submit(one, replica) for replica in range(run.replicas)]
        try:
            tasks = [future.result() for future in futures]
        finally:
            stopped.set()
            concurrent.futures.wait(futures)
    run.count += run.steps
    return (
        torch.from_numpy(np.stack([task.losses for task in tasks])),
        torch.from_numpy(np.stack([task.correct for task in tasks])),
    )


def _numbers(rule, hyper, taken: float, steps: int, kind: np.dtype) -> np.ndarray:
    """The rule's numbers at each step: (steps, columns) of this dtype, computed in float64.

    hyper: one row, or one row for each step. For several trainings it is (…, 1, columns), and the
    result is (…, steps, columns). taken: the steps taken so far. Nobody may write into the result.
    """
    row = torch.as_tensor(hyper, dtype=torch.float64, device="cpu")
    if row.dim() > 1:
        at = torch.arange(taken + 1, taken + steps + 1, dtype=torch.float64, device="cpu")
        return _columns(rule, row, at, kind)
    first, start = divmod(int(taken), _BLOCK)
    count = -(-(start + steps) // _BLOCK)
    plain = tuple(row.tolist())
    blocks = [_block(rule, plain, first + i, kind) for i in range(count)]
    return (blocks[0] if count == 1 else np.concatenate(blocks))[start : start + steps]


# Kept for the next epochs, which train with the same row. Nobody may write into it. It is not
# read-only for numba, which would compile a session once more for read-only arrays.
@functools.lru_cache(maxsize=8)
def _block(rule, row: tuple[float, ...], index: int, kind: np.dtype) -> np.ndarray:
    """The numbers of a block of steps, (_BLOCK, columns)."""
    first = index * _BLOCK
    at = torch.arange(first + 1, first + _BLOCK + 1, dtype=torch.float64, device="cpu")
    return _columns(rule, torch.tensor(row, dtype=torch.float64, device="cpu"), at, kind)


def _columns(rule, row: torch.Tensor, at: torch.Tensor, kind: np.dtype) -> np.ndarray:
    """The rule's numbers at these steps, which count from 1."""
    columns = rule.at_ref(row.unbind(-1), at)
    *columns, _ = torch.broadcast_tensors(*columns, at)
    return torch.stack(columns, -1).numpy().astype(kind)


class _Task:
    """A training's places, and the arrays whose addresses they hold. These must live as long.

    indices: (rows,), the order of an epoch, or (epochs, rows). numbers: (steps of all epochs,
    columns). losses, correct: of all steps. done: the count of steps whose results are in the
    tensors, or will be when the training ends.
    """

    def __init__(self, memory: Memory, samples: Samples, indices: Any, numbers: np.ndarray):
        spec, steps, self.memory, self.done = memory.spec, len(numbers), memory, 0
        data, targets, scale, shift, weights = samples
        self.steps = -(-indices.shape[-1] // memory.batch)
        soft = targets.is_floating_point()
        self.losses, self.correct = np.zeros(steps, memory.kind), np.zeros(steps, np.int32)
        self.counter = np.zeros(8, np.int64)
        # The steps read bytes, or numbers of the network's dtype. Any other type is converted.
        is_bytes = data.dtype == torch.uint8
        inputs = memory.array(data, data.dtype if is_bytes else None)
        # The share of zeros depends on the data alone, so the results do too.
        some = inputs[:: max(1, len(inputs) // _SAMPLED)]
        skips = np.count_nonzero(some) <= (1 - _ZEROS) * some.size
        shifts = (0.0, shift) if skips else (shift, 0.0)
        self.orders, self.numbers = memory.array(indices, torch.int64), numbers
        kinds = None if soft else torch.int64
        self.held = {
            loop.PIXELS if is_bytes else loop.REALS: inputs,
            loop.TARGETS if soft else loop.LABELS: memory.array(targets, kinds),
            loop.ORDER: self.orders,
            loop.NUMBERS: numbers,
            loop.FACTORS: np.array((scale, *shifts, spec.loss_scale), memory.kind),
            loop.LOSSES: self.losses,
            loop.CORRECT: self.correct,
            loop.COUNTER: self.counter,
        }
        if weights is not None:
            self.held[loop.WEIGHTS] = memory.array(weights)
        places = memory.places.copy()
        places[loop.ROWS_OF_EPOCH], places[loop.COUNT] = indices.shape[-1], numbers.shape[1]
        for place, array in self.held.items():
            places[place] = _at(array)
        places[loop.BIAS_NUMBERS] = places[loop.NUMBERS]
        places[loop.OCTETS] = _at(products.OCTETS) if skips else 0
        self.places = places

    def take(self, worker: int, workers: int, begin: int, end: int) -> None:
        """Take the steps from `begin` to `end`, as one of so many workers."""
        self.memory.take(self.places, worker, workers, begin, end)

    def point_at(self, epoch: int) -> None:
        """Let the steps read the order and the numbers of this epoch, and write its results."""
        places, first = self.places, epoch * self.steps
        rows = epoch * int(places[loop.ROWS_OF_EPOCH])
        places[loop.ORDER] = _at(self.orders) + rows * self.orders.itemsize
        numbers = _at(self.numbers) + first * self.numbers.strides[0]
        places[loop.NUMBERS] = places[loop.BIAS_NUMBERS] = numbers
        places[loop.LOSSES] = _at(self.losses) + first * self.losses.itemsize
        places[loop.CORRECT] = _at(self.correct) + first * self.correct.itemsize


class _Choice:
    """How many threads to use: the number that was fastest in its last few pieces.

    One slow piece says little, because a thread may have started late. If another process needs a
    core, several pieces are slow. The numbers that lost are measured again in turns. Before another
    number takes over, it is measured anew, because its seconds may be from before the other process
    started. The results are the same for every number.
    """

    def __init__(self, workers: int, guess: float):
        self.counts = [1 << i for i in range(workers.bit_length()) if 1 << i < workers] + [workers]
        # Number of threads -> seconds of a step: the least of its last pieces, which `_last` holds.
        self.seconds: dict[int, float] = {}
        self._last = {count: collections.deque[float](maxlen=_TRIALS) for count in self.counts}
        self.guess, self.trials = guess, _TRIALS * self.counts
        # Pieces so far, the piece at which one that lost is measured, and how many such were.
        self.turn, self.due, self.again = 0.0, float(_SOON), 0
        self.used = 0  # the number of the last piece that was no trial, 0 before the first

    def next(self, left: float = math.inf) -> tuple[int, int]:
        """(threads, steps) of the next piece, which has at most `left` steps."""
        if self.trials:
            return self._trial(self.trials[0], left)
        best = min(self.seconds, key=self.seconds.__getitem__)
        before, self.used = self.used or best, best
        steps = max(1, int(_PIECE / self.seconds[best]))
        self.turn += min(1.0, left / steps)
        if before != best:
            self._last[best].clear()
            return self._trial(best, left)
        others = [count for count in self.counts if count != best]
        if others and self.turn >= self.due:
            self.due = self.turn + min(self.turn, _AGAIN)
            self.again += 1
            return self._trial(others[self.again % len(others)], left)
        return best, int(min(steps, left))

    def is_short(self, left: int) -> bool:
        """True if the next piece takes all `left` steps on one thread, as far as is known."""
        if self.counts != [1] and (self.trials or self.turn >= self.due):
            return False
        known = min(self.seconds.values(), default=self.guess)
        return self.seconds.get(1, self.guess) == known and left * known <= _PIECE

    def _trial(self, workers: int, left: float) -> tuple[int, int]:
        # An unknown number may be much faster than the guess, and a trial must not be too short.
        unknown = min(self.seconds.values(), default=self.guess / 2) / 2
        known = self.seconds.get(workers, unknown)
        return workers, int(min(max(1, _TRIAL / known), left))

    def took_short(self, seconds: float, steps: int) -> None:
        """Note a short piece of one thread. seconds: of a step."""
        self.turn += min(1.0, steps * seconds / _PIECE)
        self.took(1, seconds)

    def took(self, workers: int, seconds: float) -> None:
        """Note that a step with `workers` threads took so many seconds."""
        if workers in self.trials:
            self.trials.remove(workers)
        self._last[workers].append(seconds)
        # Another thread that trains a network of this size may have cleared them meanwhile.
        self.seconds[workers] = min(self._last[workers], default=seconds)


def _choice(memory: Memory, workers: int) -> _Choice:
    """The `_Choice` for trainings of this size, with all that it has measured so far."""
    key = (memory.spec.sizes, memory.batch, workers, memory.kind)
    if key not in _choices:
        _choices[key] = _Choice(workers, seconds(memory))
    return _choices[key]


def seconds(memory: Memory) -> float:
    """A guess of the seconds of a step."""
    products = sum(k * n for k, n in itertools.pairwise(memory.spec.sizes))
    return _OVERHEAD + 6 * memory.batch * products * memory.kind.itemsize / _SPEED


def _train_here(task: _Task, pairs: list, choice: _Choice) -> None:
    """Train a short epoch in the calling thread. A KeyboardInterrupt leaves all of it or nothing.

    Another thread takes up to 0.1 ms to start, as long as such an epoch.
    """
    read(pairs)
    started, steps = time.perf_counter(), len(task.losses)
    task.take(0, 1, 0, steps)
    choice.took_short((time.perf_counter() - started) / steps, steps)
    try:
        write(pairs)
        task.done = steps
    except BaseException:  # an interrupt came between two copies
        write(pairs)
        task.done = steps
        raise


def _train(
    task: _Task,
    pairs: list,
    choice: _Choice,
    stopped: threading.Event,
    pool: Any = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """Take all steps in pieces, until `stopped` is set.

    pairs: of `Memory.pairs`. The tensors are read at the start and written at the end. after_epoch:
    see `Epochs.train`.
    """
    read(pairs)
    try:
        for epoch in range(len(task.losses) // task.steps):
            first, end = epoch * task.steps, (epoch + 1) * task.steps
            task.point_at(epoch)
            while task.done < end:
                if stopped.is_set():
                    return
                workers, count = choice.next(end - task.done)
                started = time.perf_counter()
                _piece(task, workers, task.done - first, count, pool)
                choice.took(workers, (time.perf_counter() - started) / count)
            if after_epoch is not None:
                after_epoch(epoch)
    finally:
        write(pairs)


def _piece(task: _Task, workers: int, begin: int, count: int, pool=None) -> None:
    """Take `count` steps, from step `begin` of the epoch on.

    They run on this thread and on workers - 1 threads of the pool.
    """
    task.counter[:] = 0
    end = begin + count
    team.together(pool, workers, lambda worker: task.take(worker, workers, begin, end))
    task.done += count
