"""Records the torch calls of a step once, then repeats them without the Python code between.

It does on a CPU what a CUDA graph does on a GPU.

A step of a small network makes about thirty calls of a few microseconds each. The Python code
around them takes as long again. The buffers are the same in every step, so the calls are too. Every
result has a fixed place. Views and constants are made once. Calls that wrote into `out` or in place
are repeated unchanged. All other calls write into the memory of their first result.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch.overrides import TorchFunctionMode

R = TypeVar("R")
_OPERATORS = {
    "__neg__": "neg",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__truediv__": "div",
    "__add__": "add",
    "__radd__": "add",
    "__sub__": "sub",
    "__pow__": "pow",
}
_HOST_READS = (
    "item",
    "tolist",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
    "numpy",
    "equal",
    "allclose",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
)
_BUFFERS = ("empty", "new_empty", "empty_like")
_IN_PLACE = ("__iadd__", "__isub__", "__imul__", "__itruediv__", "__ipow__", "__setitem__")
_CONSTANTS = ("new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like")


class NotReplayable(RuntimeError):
    """The computation reads a tensor on the host. A replay would not repeat this reading."""


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, (tuple, list)) else []


def _memory(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Replay(TorchFunctionMode):
    """`with Replay() as replay: …` runs and records the calls. `replay()` repeats them.

    It reads the contents that the input buffers have at that time.
    """

    def __init__(self):
        super().__init__()
        self.calls, self._constants = [], {}

    def __call__(self):
        """Repeat the recorded calls."""
        for call in self.calls:
            call()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.calls = [call for call in self.calls if call is not None]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__
        inputs = _tensors([*args, *kwargs.values()])
        if name in _HOST_READS or (
            name == "__getitem__" and any(t.dtype == torch.bool for t in inputs[1:])
        ):
            raise NotReplayable(f"{name} reads a tensor on the host")
        result = func(*args, **kwargs)
        in_place = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        # torch's operators of derivatives call it grad_input
        out = kwargs.get("out", kwargs.get("grad_input"))
        if in_place or out is not None:
            for t in _tensors(args[0] if out is None else out):
                if (
                    _memory(t) in self._constants
                ):  # it is changed in place, so it is no constant: a replay makes it again
                    position, remake = self._constants.pop(_memory(t))
                    self.calls[position] = remake
            self.calls.append(functools.partial(func, *args, **kwargs))
        elif isinstance(result, torch.Tensor):
            if name in _BUFFERS:
                pass  # a later call writes into it
            elif not inputs or name in _CONSTANTS:
                self._constants[_memory(result)] = (
                    len(self.calls),
                    lambda: result.copy_(func(*args, **kwargs)),
                )
                self.calls.append(None)
            elif _memory(result) not in map(_memory, inputs):  # not a view of an input
                self.calls.append(self._into(result, name, func, args, kwargs))
        elif _tensors(result):
            self.calls.append(
                lambda: torch._foreach_copy_(_tensors(result), _tensors(func(*args, **kwargs)))
            )
        return result

    def _into(self, result, name, func, args, kwargs):
        """The call that writes into the memory of `result`."""
        function = getattr(torch, _OPERATORS.get(name, name), None)
        kwargs = {key: value for key, value in kwargs.items() if key != "out"}
        try:
            function(*args, **kwargs, out=result)
        except TypeError:  # torch has no such function, or it takes no `out`
            return lambda: result.copy_(func(*args, **kwargs))
        return functools.partial(function, *args, **kwargs, out=result)


class Recordings:
    """The replays of a step for the two latest keys.

    A key holds everything that a recording depends on, except the contents of its buffers.
    """

    def __init__(self):
        self._known = {}

    def __reduce__(self):
        return Recordings, ()  # a copy has other tensors, so it records again

    def __contains__(self, key) -> bool:
        return key in self._known

    def clear(self) -> None:
        """Remove all recordings, when their tensors are no longer used."""
        self._known.clear()

    def run(self, key: tuple, function: Callable[[], R]) -> R:
        """The result of `function`, from a replay if one is recorded under this key."""
        if key in self._known:
            replay, result = self._known[key]
            replay()
            return result
        if len(self._known) > 1:
            self._known.clear()
        with Replay() as replay:
            result = function()
        self._known[key] = replay, result
        return result
