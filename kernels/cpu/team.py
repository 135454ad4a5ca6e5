"""The threads of a training. They are kept for the next epoch, and each has a core of its own.

Workers wait for each other by spinning. So two of them on one core take twice as long as one alone.
Linux sometimes starts two on one core, and leaves them there longer than a small epoch takes.
"""

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

# Returns the core that the calling thread runs on. None where a thread cannot choose its core.
_core: Callable[[], int] | None = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
)
_idle: dict[int, list[ThreadPoolExecutor]] = {}  # number of threads -> pools that no training uses


@contextlib.contextmanager
def threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of `count` threads that no other training uses meanwhile."""
    pools = _idle.setdefault(count, [])
    try:
        pool = pools.pop()
    except IndexError:  # all pools are in use
        pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pools.append(pool)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_idle.clear)  # the child has no such threads


def together(pool: ThreadPoolExecutor | None, workers: int, work: Callable[[int], Any]) -> None:
    """Run work(0) on this thread, and work(1), …, work(workers - 1) on threads of the pool."""
    if workers == 1 or pool is None:
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

    others = [pool.submit(apart, worker) for worker in range(1, workers)]
    try:
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
