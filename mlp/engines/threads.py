"""How many threads torch computes with, for a while."""

import contextlib
import threading
from collections.abc import Iterator

import torch

# Multiply-adds of a product that one CPU thread does sooner than two, or on a busy machine much
# sooner.
ALONE = 4_000_000


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with `count` CPU threads; None leaves them as they are.

    Only Python's main thread changes the number. A new thread takes over the number that another
    one has set for a while, and keeps it; so threads that overlapped could never put it back.
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
