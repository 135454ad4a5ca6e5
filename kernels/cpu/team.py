"""The threads of a training. They are kept for the next epoch, and each has a core of its own.

Workers wait for each other by spinning. So two of them on one core take twice as long as one alone.
Linux sometimes starts two on one core, and leaves them there longer than a small epoch takes.
"""

import contextlib
import ctypes
import os
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import Any

# Returns the core that the calling thread runs on. None where a thread cannot choose its core.
_core: Callable[[], int] | None = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
)


class Team(Executor):
    """Threads that run what is submitted, `count` calls at the same time.

    ThreadPoolExecutor does not serve here, for two reasons. Since Python 3.12, it sometimes starts
    a thread too few, and calls that wait for each other then wait forever. And it takes no work
    after the main thread has ended, although another thread may still train.
    """

    def __init__(self, count: int):
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        try:
            for _ in range(count):
                threading.Thread(target=_serve, args=(self._calls,), daemon=True).start()
        except BaseException:  # the system gives no more threads, or Ctrl-C
            for _ in range(count):
                self._calls.put(None)
            raise

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        """Let a thread call fn. Returns the future of its result."""
        future: Future = Future()
        self._calls.put((future, fn, args, kwargs))
        return future


def _serve(calls: queue.SimpleQueue) -> None:
    """Run one call after another, until None comes."""
    while (call := calls.get()) is not None:
        future, fn, args, kwargs = call
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(fn(*args, **kwargs))
            except BaseException as error:  # the one that waits for the result gets it
                future.set_exception(error)
        del call, future, fn, args, kwargs  # their memory is not kept until the next call


_idle: dict[int, list[Team]] = {}  # number of threads -> teams that nothing uses


@contextlib.contextmanager
def threads(count: int) -> Iterator[Team]:
    """A team of `count` threads that nothing else uses meanwhile."""
    teams = _idle.setdefault(count, [])
    try:
        team = teams.pop()
    except IndexError:  # all teams are in use
        team = Team(count)
    try:
        yield team
    finally:
        teams.append(team)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # the child has no such threads


def together(team: Executor | None, workers: int, work: Callable[[int], Any]) -> None:
    """Run work(0) on this thread, and work(1), …, work(workers - 1) on threads of the team.

    The team must have `workers` - 1 threads without work, because each may wait for the others.
    """
    if workers == 1 or team is None:
        work(0)
        return
    allowed: set[int] = set() if _core is None else os.sched_getaffinity(0)
    own: set[int] = set() if _core is None else {_core()} & allowed
    taken = set(own)

    def apart(worker: int) -> None:
        with _on(allowed - taken, allowed):
            if _core is not None:
                taken.add(_core())
            work(worker)

    others: list[Future] = []
    try:
        for worker in range(1, workers):
            others.append(team.submit(apart, worker))
        with _on(own, allowed):
            work(0)
    finally:  # after Ctrl-C too: the others still use memory that the caller then gives up
        wait(others)
    for other in others:
        other.result()


@contextlib.contextmanager
def _on(cores: set[int], allowed: set[int]) -> Iterator[None]:
    """Keep this thread on `cores` inside the block.

    If `cores` is empty, or if the system takes them away, the thread may run on all allowed cores.
    """
    if cores:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        if cores:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, allowed)
