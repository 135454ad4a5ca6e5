"""CUDA graphs imitated on the CPU.

A capture keeps the calls of torch and the launches, with their tensors and host values. A replay
repeats them. Reading a tensor on the host during a capture is an error, as on a GPU.
"""

import functools

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from kernels import launch
from kernels.ops import cross_entropy, elementwise_loss
from mlp.engines import graphs

_READS = (
    "item",
    "tolist",
    "numpy",
    "cpu",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__contains__",
)
_COPIES = ("tensor", "from_numpy", "new_tensor")  # a replay would repeat a copy from the host
_FRESH = ("aten::empty", "aten::new_empty")


class CaptureError(RuntimeError):
    """The captured code reads a tensor on the host, or copies from it."""


class _Host(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ in (*_READS, *_COPIES):
            raise CaptureError(f"{func.__name__} while capturing")
        return func(*args, **(kwargs or {}))


class Capture(TorchDispatchMode):
    """`with Capture() as capture: …` records calls. `capture()` repeats them."""

    def __init__(self):
        super().__init__()
        self.calls, self._before = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        schema, call = func._schema, functools.partial(func, *args, **kwargs)
        if schema.name == "aten::_local_scalar_dense":
            raise CaptureError("a number is read while capturing")
        if schema.is_mutable:
            self.keep((args, kwargs))
            self.calls.append(call)
            return call()
        result = call()
        outputs = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        inputs = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        is_view = any(t.untyped_storage().data_ptr() in inputs for t in outputs)
        if not is_view and not schema.name.startswith(_FRESH):
            self.calls.append(functools.partial(_again, outputs, call))
        return result

    def launched(self, run, args, options):
        """Records and runs a launch."""
        self.keep(args)
        self.calls.append(functools.partial(run, *args, **options))
        with _disable_current_modes():
            run(*args, **options)

    def keep(self, values):
        """Keeps the contents of tensors that may be written now."""
        with _disable_current_modes():
            for t in _tensors(values):
                self._before.setdefault(t.untyped_storage().data_ptr(), (t, _whole(t).clone()))

    def restore(self):
        """Restores all tensors, because on a GPU a capture runs nothing."""
        with _disable_current_modes():
            for t, before in self._before.values():
                _whole(t).copy_(before)
        self._before.clear()

    def __call__(self):
        for call in self.calls:
            call()


def _tensors(values):
    leaves = tree_leaves(values)
    return [t for t in leaves if isinstance(t, torch.Tensor) and t.numel()]


def _whole(t):
    """All memory of a tensor's storage, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _again(outputs, call):
    fresh = [t for t in tree_leaves(call()) if isinstance(t, torch.Tensor)]
    for old, new in zip(outputs, fresh, strict=True):
        old.copy_(new)


def install(monkeypatch, steps: int) -> list[int]:
    """Makes the graph engine use these captures on the CPU, of `steps` steps each.

    Returns a list that gets each capture's number of calls.
    """
    run, current, sizes = launch.run, [], []

    def recorded(*args, **options):
        if not current:
            return run(*args, **options)
        return current[-1].launched(run, args, options)

    def captured(step, times, device):
        step()
        capture = Capture()
        current.append(capture)
        try:
            with _Host(), capture:
                for _ in range(times):
                    step()
                    capture.restore()
        finally:
            current.pop()
        sizes.append(len(capture.calls))
        return capture

    monkeypatch.setattr(launch, "run", recorded)
    monkeypatch.setattr(launch, "watched", lambda: False)
    monkeypatch.setattr(graphs, "_captured", captured)
    monkeypatch.setattr(graphs, "_CAPTURED", steps)
    monkeypatch.setattr(graphs, "_has_graphs", lambda device: True)
    for module in (cross_entropy, elementwise_loss):  # on a GPU no label is checked
        if hasattr(module, "check_range"):
            monkeypatch.setattr(module, "check_range", lambda *args, **options: False)
    return sizes
