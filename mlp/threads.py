"""How many threads torch computes with, for a while."""

import contextlib
import threading
from collections.abc import Iterator

import torch

_lock = threading.Lock()
_inside, _before = 0, 0


@contextlib.contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with `count` CPU threads; None leaves them as they are.

    Blocks of several Python threads may overlap. The first one that enters notes the number, and
    each one that leaves sets it again, so the last one leaves torch as the first one found it.
    """
    global _inside, _before
    if count is None:
        yield
        return
    with _lock:
        if _inside == 0:
            _before = torch.get_num_threads()
        _inside += 1
        torch.set_num_threads(count)
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            torch.set_num_threads(_before)
