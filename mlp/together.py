"""Trainers side by side: an epoch of all of them is one launch.

On a CPU it is one call, in which each core takes a network. `Together` calls one function for each
trainer, each in its own thread. Only one thread runs at a time, as with coroutines. So the code of
a trainer between two epochs does not have to be thread-safe. A function waits when its trainer has
an epoch to train. When all functions wait, their epochs are trained together, and each function
continues with its result.
"""

import dataclasses
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import kernels
from kernels import cpu

from .engines.epochwise import Epoch, rule_of
from .trainer import Trainer

Results = tuple[torch.Tensor, torch.Tensor]  # an epoch's (losses, correct), (steps,) each


class _Member:
    """A function in its own thread. run: the epoch that it waits for, or None."""

    def __init__(self, lock: threading.Lock):
        self.turn = threading.Condition(lock)
        self.runs, self.ended = False, False
        self.run: kernels.Run | None = None
        self.result: Results | None = None


class Together:
    """Calls functions whose trainers train their epochs together.

    A trainer takes part if its `together` is the `train` of this object and its engine is `epoch`.
    All trainers need networks, rules and batches of the same kind, such as those of several seeds.
    Each `Trainer.fit` needs the same data set. With several data sets, each trainer has its own
    launch or call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._back = threading.Condition(self._lock)
        self._here = threading.local()  # .member is the member of the current thread
        self._members: list[_Member] = []

    def call(self, functions: Sequence[Callable[[], Any]]) -> list[Any]:
        """Call all functions, and return their results.

        A function's error does not end the others. The first error is raised when all have ended.
        """
        self._members = [_Member(self._lock) for _ in functions]
        pool = ThreadPoolExecutor(len(functions))
        with pool, self._lock:
            try:
                pairs = zip(self._members, functions, strict=True)
                futures = [pool.submit(self._thread, *pair) for pair in pairs]
                for member in self._members:
                    self._go_on(member)
                self._epochs()
            finally:  # after an error or Ctrl-C, no thread may wait forever
                for member in self._members:
                    member.ended = True
                    member.turn.notify()
        return [future.result() for future in futures]

    def _epochs(self) -> None:
        """Train until no function waits for an epoch."""
        while waiting := [(m, m.run) for m in self._members if m.run is not None]:
            results = train_all([run for _, run in waiting])
            for (member, _), result in zip(waiting, results, strict=True):
                member.run, member.result = None, result
                self._go_on(member)

    def _go_on(self, member: _Member) -> None:
        """Let a function run until it waits again or has ended."""
        member.runs = True
        member.turn.notify()
        self._back.wait_for(lambda: not member.runs)

    def _thread(self, member: _Member, function: Callable[[], Any]) -> Any:
        with self._lock:
            self._here.member = member
            try:
                self._wait(member)
                return function()
            finally:
                member.runs = False
                self._back.notify()

    def _wait(self, member: _Member) -> None:
        """Wait for this function's turn. KeyboardInterrupt if `call` has ended all functions."""
        member.turn.wait_for(lambda: member.runs or member.ended)
        if member.ended:
            raise KeyboardInterrupt

    def train(self, run: kernels.Run) -> Results:
        """Train an epoch in place, and return (losses, correct), as `kernels.train_epoch` does.

        It waits until every other function has an epoch to train or has ended.
        """
        member: _Member = self._here.member
        member.run, member.runs = run, False
        self._back.notify()
        self._wait(member)
        assert member.result is not None
        return member.result


@torch.no_grad()
def train_all(runs: Sequence[kernels.Run]) -> list[Results]:
    """Train an epoch of each network, and return the results in the same order.

    Networks that read the same data, with the same weights of rows, must be of the same kind. One
    launch or call trains them. Otherwise each network has its own launch or call.
    """
    first, on_cpu = runs[0], cpu.serves(runs[0].parameters[0])
    if len(runs) == 1 or not all(_reads_as(run, first) for run in runs):
        return [(cpu.train_epoch if on_cpu else kernels.train_epoch)(run) for run in runs]
    pack = dataclasses.replace(
        first,
        parameters=_stacked([run.parameters for run in runs]),
        states=[_stacked(each) for each in zip(*(run.states for run in runs), strict=True)],
        order=torch.stack([run.order for run in runs]),
        hyper=torch.stack([run.hyper for run in runs]),
        count=first.count.clone(),
        losses=None,
        correct=None,
    )
    losses, correct = (cpu.train_replicas if on_cpu else kernels.train_replicas)(pack)
    for i, run in enumerate(runs):
        lists = zip([run.parameters, *run.states], [pack.parameters, *pack.states], strict=True)
        for ours, stacked in lists:
            for tensor, all_of_them in zip(ours, stacked, strict=True):
                tensor.copy_(all_of_them[i])
        run.count.copy_(pack.count)
    return list(zip(losses, correct, strict=True))


def _reads_as(run: kernels.Run, other: kernels.Run) -> bool:
    """True if two runs read the same data and weights of rows."""
    if run.data.data_ptr() != other.data.data_ptr():
        return False
    if run.weights is None or other.weights is None:
        return run.weights is other.weights
    return torch.equal(run.weights, other.weights)


def _stacked(lists: Sequence[Sequence[torch.Tensor]]) -> list[torch.Tensor]:
    """The tensors of all networks, stacked: (networks, …) each."""
    return [torch.stack(list(each)) for each in zip(*lists, strict=True)]


def refusal(trainer: Trainer, batch_size: int, steps: int) -> str | None:
    """The reason why networks like this trainer's cannot train together, or None.

    Call the trainer's `check` first. steps: the sum of the steps of all networks.
    """
    if trainer.requested not in ("auto", Epoch.name):
        return f"engine {trainer.requested} trains one network"
    parts = trainer.model, trainer.loss, trainer.optimizer
    reason = Epoch.refuses(*parts, batch_size) or Epoch.cannot(trainer.engine.demands)
    if reason is not None:
        return reason
    if trainer.requested == "auto" and (costs := Epoch.costs(*parts, batch_size, steps)):
        return costs
    spec = Epoch.described(trainer.model, trainer.loss, rule_of(trainer.model, trainer.optimizer))
    assert not isinstance(spec, str)  # `refuses` checked it
    first = next(iter(trainer.model.parameters())).detach()
    return None if cpu.serves(first) else kernels.refusal(spec, batch_size)
