"""Bytes of living tensors, counted on any device, even for meta tensors, which have no memory.

Temporaries inside one of torch's operations are not counted.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live:
    """Counts results of torch's functions until their memory is freed.

    now, peak: bytes. `operations()` counts results of torch's operators, also in autograd's
    backward passes. handgrad's kernels do not run then. `calls()` counts results of functions that
    Python calls.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._known: set[int] = set()

    @contextlib.contextmanager
    def operations(self) -> Iterator[None]:
        """A context in which results of all operators count."""
        with _Operations(self):
            yield

    @contextlib.contextmanager
    def calls(self) -> Iterator[None]:
        """A context in which results of torch's functions that Python calls count."""
        with _Calls(self):
            yield

    def leave_out(self, *tensors: torch.Tensor) -> None:
        """Never counts the memory of these tensors, which must stay alive."""
        self._known.update(id(tensor.untyped_storage()) for tensor in tensors)

    def add(self, result: Any) -> Any:
        """Counts the memory of the tensors in a result, each piece once. Returns the result."""
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            key = id(storage)  # torch keeps the same object as long as the memory lives
            if key not in self._known:
                self._known.add(key)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class _Operations(TorchDispatchMode):
    def __init__(self, live: Live):
        super().__init__()
        self.live = live

    def __torch_dispatch__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        return self.live.add(func(*args, **(kwargs or {})))


class _Calls(TorchFunctionMode):
    def __init__(self, live: Live):
        super().__init__()
        self.live = live

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        inside = getattr(func, "__wrapped__", None)
        if inside is not None:  # a Python function that calls others
            with _Calls(self.live):
                return inside(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        # `add` itself calls untyped_storage, so counting that would never end.
        return result if func.__name__ == "untyped_storage" else self.live.add(result)
