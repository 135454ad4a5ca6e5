"""The host's side of the compiled epoch: its memory, its threads, the pieces it is cut into."""

import collections
import concurrent.futures
import functools
import threading
import time
from typing import Any

import numpy as np
import torch
from numba import njit

import kernels
from kernels import activations

from . import loop, products, rows, team
from .tiles import LANES, ROWS

_PIECE = 0.25  # seconds between two looks at whether to stop, about
_TRIAL = 0.005  # seconds of a piece that measures a number of threads
_TRIALS = 3  # of each number, of which the best counts: one may meet a neighbour, or cold caches
_AGAIN = 8  # pieces until a number of threads that lost is measured again
_CHUNKS = 8  # that the first layer's inputs are cut into, at most
_SPEED, _OVERHEAD = 5e10, 1e-5  # floating-point operations a second, seconds of a step: a guess
_choices: dict[tuple, "_Choice"] = {}  # by sizes, batch and threads


@functools.cache
def compiled() -> Any:
    """`loop.steps` and the products that it calls, compiled or read from disk."""
    products.compiled()
    return rows.cached(njit, rows.named(loop.steps), nogil=True, error_model="numpy")


def is_compiled() -> bool:
    """Whether this version has compiled the steps for this processor, now or on disk."""
    return rows.is_kept(compiled())


class Memory:
    """The flat array of a training and where everything lies in it.

    spec: a `kernels.Spec`; batch: the largest; workers: the most that will share it.
    """

    def __init__(self, spec: Any, batch: int, workers: int):
        self.spec, self.batch, self.size = spec, batch, 0
        count, lists = len(spec.sizes) - 1, len(spec.rule.states)
        acts = [spec.activation] * (count - 1) + [spec.output_activation]
        layers = np.zeros((count, loop.COLUMNS_OF_LAYER), np.int64)
        places = np.zeros(loop.PLACES, np.int64)
        pitches = [_pitch(size) for size in spec.sizes[1:]]
        for i, (layer, k, n, pitch) in enumerate(zip(layers, spec.sizes, spec.sizes[1:], pitches)):
            across = i > 0 and 2 * n <= LANES and n * _pitch(k) <= loop.SCRATCH_FLOATS
            layer[:3] = k, n, pitch
            layer[loop.ACROSS], layer[loop.WIDE] = across, _pitch(k) if across else pitch
            layer[loop.TALL] = n if across else k
            layer[loop.W] = self._take((layer[loop.TALL] + 1) * layer[loop.WIDE])
            layer[loop.BLOCK] = max(ROWS, loop.SCRATCH_FLOATS // pitch // ROWS * ROWS)
            if across:
                layer[loop.BLOCK] = k
        places[loop.STATE] = self.size
        self.size *= 1 + lists
        for layer, pitch, name in zip(layers, pitches, acts):
            # y and z apart: a loop that writes where it reads is not made of vectors.
            for column in (loop.Y, loop.Z, loop.D):
                layer[column] = self._take(batch * pitch)
            needs_z = activations.get(name).needs == "z"
            layer[loop.KEPT] = layer[loop.Z if needs_z else loop.Y]
        chunks = max(1, min(_CHUNKS, spec.sizes[0] // 64 * 2))  # one, or the same in each half
        places[loop.CHUNKS] = chunks
        places[loop.X] = self._take(batch * spec.sizes[0])
        places[loop.PARTIAL] = self._take(chunks * batch * pitches[0])
        places[loop.Q] = self._take(3 * batch * spec.sizes[-1])
        scratch = max(loop.SCRATCH_FLOATS, max(pitches) * ROWS)
        places[loop.SCRATCH] = self._take(workers * scratch)
        places[loop.LOSS], places[loop.RIGHT] = self._take(batch), self._take(batch)
        places[loop.ONE] = self._take(1)
        places[loop.BIAS], places[loop.MEAN] = spec.bias, spec.loss_mean
        places[loop.IGNORED], places[loop.BATCH] = spec.loss.ignored, batch
        self.layers, self.places = layers, places
        whole = np.zeros(self.size + LANES, np.float32)
        start = -whole.ctypes.data % (4 * LANES) // 4  # vectors start on cache lines
        self.w = whole[start : start + self.size]
        self.w[places[loop.ONE]] = 1.0

    def _take(self, floats: int) -> int:
        start = self.size
        self.size += -(-floats // LANES) * LANES
        return start

    def matrices(self, tensors: Any, at: int) -> Any:
        """(tensor as numpy's, its place in w) of parameters, or of states `at` floats behind."""
        step = 1 + self.spec.bias
        for layer, tensor in zip(self.layers, tensors[::step]):
            k, n, start = layer[loop.K], layer[loop.N], at + layer[loop.W]
            tall, wide = layer[loop.TALL], layer[loop.WIDE]
            place = self.w[start : start + tall * wide].reshape(tall, wide)
            yield tensor.numpy(), place[:, :k] if layer[loop.ACROSS] else place[:, :n].T
        for layer, tensor in zip(self.layers, tensors[1::2] if self.spec.bias else ()):
            start = at + layer[loop.W] + layer[loop.TALL] * layer[loop.WIDE]
            yield tensor.numpy(), self.w[start : start + layer[loop.N]]

    def loss_numbers(self) -> np.ndarray:
        """(batch, outputs): the loss's parameter for each output of each row."""
        shape = self.batch, self.spec.sizes[-1]
        return np.broadcast_to(np.float32(self.spec.loss_numbers), shape).copy()

    def copy(self, lists: Any, back: bool = False) -> None:
        """Parameters and states into w, or back."""
        for i, tensors in enumerate(lists):
            for outside, inside in self.matrices(tensors, i * self.places[loop.STATE]):
                if back:
                    outside[...] = inside
                else:
                    inside[...] = outside


def _pitch(size: int) -> int:
    """Floats of a row of `size`: whole vectors, and rows do not all fall on the same cache sets."""
    padded = -(-size // LANES) * LANES
    return padded + LANES if padded % 256 == 0 else padded


def train_epoch(run: kernels.Run) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.train_epoch`, on a CPU: trains in place, (losses, correct) of every step.

    Any width, batch and number of classes. correct counts labels; of targets that are numbers it
    is 0. The threads are torch's. KeyboardInterrupt: at most a piece of the epoch later, with
    parameters, states and count as they were after some step.
    """
    spec, workers = run.spec, max(1, torch.get_num_threads())
    memory = Memory(spec, min(run.batch, len(run.order)), workers)
    table = _numbers(spec.rule, run.hyper, float(run.count), run.steps)
    task = _Task(memory, run.data, run.targets, run.order, table, run.scale, run.shift)
    choice, stopped = _choice(spec, memory.batch, workers), threading.Event()
    with team.threads(workers) as pool:
        # Beside the calling thread, which alone Ctrl-C interrupts.
        future = pool.submit(_train, task, [run.parameters, *run.states], choice, stopped, pool)
        try:
            future.result()
        finally:
            stopped.set()
            concurrent.futures.wait([future])
            run.count += task.done
    return torch.from_numpy(task.losses), torch.from_numpy(task.correct)


def train_replicas(run: kernels.Run) -> tuple[torch.Tensor, torch.Tensor]:
    """As `kernels.train_replicas`, on a CPU: each of torch's threads takes a network at a time."""
    spec, batch, stopped = run.spec, min(run.batch, run.order.shape[1]), threading.Event()

    def one(replica: int) -> _Task:
        memory = Memory(spec, batch, 1)
        numbers = _numbers(spec.rule, run.hyper[replica], float(run.count), run.steps)
        order = run.order[replica]
        task = _Task(memory, run.data, run.targets, order, numbers, run.scale, run.shift)
        lists = [[t[replica] for t in tensors] for tensors in (run.parameters, *run.states)]
        _train(task, lists, _choice(spec, memory.batch, 1), stopped)
        return task

    compiled(), rows.of(spec)  # once, not by every thread
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


def _numbers(rule, hyper, taken: float, steps: int) -> np.ndarray:
    """(steps, columns) numbers of the rule at each step, from float64. hyper: a row, or one for
    each step; or (…, 1, columns) of several trainings, of which (…, steps, columns) are made.
    """
    at = torch.arange(taken + 1, taken + steps + 1, dtype=torch.float64)
    columns = rule.at_ref(torch.as_tensor(hyper, dtype=torch.float64).unbind(-1), at)
    *columns, _ = torch.broadcast_tensors(*columns, at)
    return torch.stack(columns, -1).float().numpy()


class _Task:
    """A `loop.Run` with the arrays whose addresses it holds, which must live as long."""

    def __init__(self, memory: Memory, data, targets, indices, numbers, scale, shift):
        spec, steps, self.memory, self.done = memory.spec, len(numbers), memory, 0
        soft = targets.is_floating_point()
        self.losses, self.correct = np.zeros(steps, np.float32), np.zeros(steps, np.int32)
        self.counter = np.zeros(8, np.int64)
        # The steps read bytes or float32; any other type is converted.
        is_bytes = data.dtype == torch.uint8
        samples = (data if is_bytes else data.float()).contiguous().numpy()
        self.held = {
            loop.PIXELS if is_bytes else loop.REALS: samples,
            loop.TARGETS if soft else loop.LABELS: (targets.float() if soft else targets.long())
            .contiguous()
            .numpy(),
            loop.PARAMETERS: memory.loss_numbers(),
            loop.ORDER: indices.long().contiguous().numpy(),
            loop.NUMBERS: numbers,
            loop.LOSSES: self.losses,
            loop.CORRECT: self.correct,
            loop.COUNTER: self.counter,
        }
        places = memory.places.copy()
        places[loop.ROWS_OF_EPOCH], places[loop.COUNT] = len(indices), numbers.shape[1]
        for place, array in self.held.items():
            places[place] = array.ctypes.data
        places[loop.BIAS_NUMBERS] = places[loop.NUMBERS]
        places[loop.BASE] = memory.w.ctypes.data
        functions = *rows.of(spec), *products.compiled()
        for place, function in enumerate(functions, loop.FORWARD):
            places[place] = function.address
        self.run = loop.Run(
            memory.w, memory.layers, places, *map(np.float32, (scale, shift, spec.loss_scale))
        )


class _Choice:
    """How many threads to use: the number that took least in its last few pieces.

    One slow piece says little: a thread may have started late. A neighbour that needs a core makes
    several of them slow. The numbers that lost are measured again in turns. The results are the
    same whatever the number.
    """

    def __init__(self, workers: int, guess: float):
        self.counts = [1 << i for i in range(workers.bit_length()) if 1 << i < workers] + [workers]
        # Number of threads -> seconds of a step, the least of the last pieces; and those of each.
        self.seconds: dict[int, float] = {}
        self._last = {count: collections.deque[float](maxlen=_TRIALS) for count in self.counts}
        self.guess, self.turn, self.trials = guess, 0, _TRIALS * self.counts

    def next(self) -> tuple[int, int]:
        """(threads, steps) of the next piece."""
        self.turn += 1
        if self.trials:
            return self._trial(self.trials[0])
        best = min(self.seconds, key=self.seconds.__getitem__)
        others = [count for count in self.counts if count != best]
        if others and self.turn % _AGAIN == 0:
            return self._trial(others[self.turn // _AGAIN % len(others)])
        return best, max(1, int(_PIECE / self.seconds[best]))

    def _trial(self, workers: int) -> tuple[int, int]:
        known = self.seconds.get(workers, min(self.seconds.values(), default=self.guess))
        return workers, max(1, int(_TRIAL / known))

    def took(self, workers: int, seconds: float) -> None:
        """So many threads took so long for a step."""
        if workers in self.trials:
            self.trials.remove(workers)
        self._last[workers].append(seconds)
        self.seconds[workers] = min(self._last[workers])


def _choice(spec, batch: int, workers: int) -> _Choice:
    """What is known of such trainings so far."""
    key = (spec.sizes, batch, workers)
    if key not in _choices:
        products = sum(k * n for k, n in zip(spec.sizes, spec.sizes[1:]))
        _choices[key] = _Choice(workers, _OVERHEAD + 6 * batch * products / _SPEED)
    return _choices[key]


def _train(task: _Task, lists, choice: _Choice, stopped: threading.Event, pool=None) -> None:
    """All steps in pieces, until stopped. lists: parameters and states, read, then written."""
    memory, steps = task.memory, len(task.losses)
    memory.copy(lists)
    while task.done < steps and not stopped.is_set():
        workers, count = choice.next()
        count = min(count, steps - task.done)
        started = time.perf_counter()
        _piece(task, workers, count, pool)
        choice.took(workers, (time.perf_counter() - started) / count)
    memory.copy(lists, back=True)


def _piece(task: _Task, workers: int, count: int, pool=None) -> None:
    """Some steps more by this thread, and others of the pool."""
    task.counter[:] = 0
    call, run, begin = compiled(), task.run, task.done
    end = begin + count
    team.together(pool, workers, lambda worker: call(run, worker, workers, begin, end))
    task.done = end
