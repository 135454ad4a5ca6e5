"""A context that sets the number of threads that torch computes with."""

import contextlib
import threading
from collections.abc import Iterator

import torch

# Below this number of multiply-adds, one CPU thread is faster than two, on a busy machine by far.
ALONE = 4_000_000


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """A context in which torch uses `count` CPU threads. None does not change their number.

    Only Python's main thread changes it. A new thread inherits the number that is set at its start
    and keeps it. So threads that overlap could never restore the number.
    """
    if count is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
