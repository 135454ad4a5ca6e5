"""Many epochs of a small network: memory, addresses and numbers are made once.

An epoch of a small table takes less time than Python needs to prepare one, so `Session` keeps all
that does not change. Two things are its own: weight decay on weights alone, and another decay for
the last batch of an epoch, as scikit-learn's penalty wants it.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

import kernels

from . import epoch, loop, rows

Decay = tuple[float, float]
_compiling = threading.Lock()  # else each of several threads would compile the same
_AHEAD = 64  # epochs whose numbers are made at a time


class Session:
    """A network in training, held in the memory of the compiled epoch.

    parameters: [w_1, b_1, w_2, …] float32; states: a list of the same shapes for each state of the
    rule. They are read here and written by `store`. data, targets, batch: as in `kernels.Run`.
    """

    def __init__(
        self,
        spec: kernels.Spec,
        parameters: list[torch.Tensor],
        states: list[list[torch.Tensor]],
        data: torch.Tensor,
        targets: torch.Tensor,
        batch: int,
    ) -> None:
        with _compiling:
            epoch.compiled(), rows.of(spec)
        count = len(data)
        self.workers = max(1, torch.get_num_threads())
        self.memory = epoch.Memory(spec, min(batch, count), self.workers)
        self.lists = [parameters, *states]
        self.steps = -(-count // batch)
        numbers = np.zeros((self.steps, len(spec.rule.columns)), np.float32)
        order = torch.zeros(count, dtype=torch.int64)
        self._task = epoch._Task(self.memory, data, targets, order, numbers, 1.0, 0.0)
        self._order = self._task.held[loop.ORDER]
        products = sum(k * n for k, n in zip(spec.sizes, spec.sizes[1:]))
        guess = epoch._OVERHEAD + 6 * batch * products / epoch._SPEED
        self._choice = epoch._Choice(self.workers, guess)
        starts = [
            (layer[loop.W], layer[loop.TALL] * layer[loop.WIDE]) for layer in self.memory.layers
        ]
        self._weights = [self.memory.w[start : start + size] for start, size in starts]
        self._pool = ThreadPoolExecutor(self.workers) if self.workers > 1 else None
        self._numbers: tuple | None = None
        sizes = np.full(self.steps, batch)
        sizes[-1] = count - batch * (self.steps - 1)
        self._shares = sizes / count
        self.load()

    def load(self) -> None:
        """Read parameters and states from their tensors."""
        self.memory.copy(self.lists)

    def store(self) -> None:
        """Write parameters and states to their tensors."""
        self.memory.copy(self.lists, back=True)

    def squares(self) -> float:
        """The sum of the squares of all weights, without biases."""
        return sum(float(w @ w) for w in self._weights)

    def epoch(self, order: np.ndarray, numbers: dict[str, Any], taken: int, decay: Decay) -> float:
        """Train on all samples in this order; their mean loss.

        numbers: the rule's hyperparameters by torch's names, but for weight_decay; taken: steps
        taken so far. decay: of the weights in a whole batch, and in the epoch's last one; biases
        have none. FloatingPointError names the first step whose loss is not finite.
        """
        task = self._task
        self._order[:] = order
        self._point_at(numbers, taken, decay)
        task.done = 0
        while task.done < self.steps:
            workers, count = self._choice.next()
            epoch._piece(task, workers, min(count, self.steps - task.done), self._pool)
        loss = float(task.losses @ self._shares)
        if not np.isfinite(loss):
            bad = np.flatnonzero(~np.isfinite(task.losses))
            step = int(bad[0]) if len(bad) else 0
            raise FloatingPointError(f"the loss is {task.losses[step]} at step {step}")
        return loss

    def close(self) -> None:
        """Let the threads go."""
        if self._pool is not None:
            self._pool.shutdown()

    def _point_at(self, numbers: dict[str, Any], taken: int, decay: Decay) -> None:
        """Let the steps read the rows of numbers that belong to this epoch."""
        key, known = (numbers, decay), self._numbers
        if known is None or known[0] != key or not 0 <= taken - known[1] < _AHEAD * self.steps:
            known = self._numbers = key, taken, *self._tables(numbers, taken, decay)
        _, first, of_weights, of_biases = known
        at = 4 * (taken - first) * of_weights.shape[1]
        self._task.run.places[loop.NUMBERS] = of_weights.ctypes.data + at
        self._task.run.places[loop.BIAS_NUMBERS] = of_biases.ctypes.data + at

    def _tables(
        self, numbers: dict[str, Any], taken: int, decay: Decay
    ) -> tuple[np.ndarray, np.ndarray]:
        """(steps of many epochs, columns) numbers of the weights' updates, and of the biases'."""
        rule = self.memory.spec.rule

        def table(weight_decay: float) -> np.ndarray:
            row = kernels.row_of(rule, **numbers, weight_decay=weight_decay)
            return epoch._numbers(rule, row, float(taken), _AHEAD * self.steps)

        of_weights = table(decay[0])
        if decay[1] != decay[0]:
            of_weights[self.steps - 1 :: self.steps] = table(decay[1])[self.steps - 1 :: self.steps]
        return of_weights, table(0.0)
