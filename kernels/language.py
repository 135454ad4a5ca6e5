"""Triton, under the two names that kernels use: `triton` and `tl`, its language.

Triton has builds for Linux only. Elsewhere its place is taken by what the rest of the library needs
of it: a kernel's Python code, which `kernels.cpu` compiles, and the kernels' names. Kernels then
cannot run, and `launch` chooses the reference in torch on every device.
"""

import functools
import os
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

ADVICE = "Triton is not installed; on Linux: pip install triton"


class _Constant:
    """In the place of `tl.constexpr`."""

    def __init__(self, value: Any):
        self.value = value


class _Kernel:
    """In the place of what `@triton.jit` makes. fn: the Python function."""

    def __init__(self, fn: Callable):
        self.fn = fn
        functools.update_wrapper(self, fn)

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"{self.fn.__name__}: this kernel cannot run, because {ADVICE}")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self[()]


VERSION: tuple[int, ...] = (0, 0)
try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ImportError(
            f"TRITON_INTERPRET=1 asks for Triton's interpreter, but {ADVICE}"
        ) from None
    IS_INSTALLED, INTERPRETED = False, False
    triton = SimpleNamespace(
        __version__="not installed",
        jit=_Kernel,
        cdiv=lambda x, y: -(-x // y),
        next_power_of_2=lambda n: 1 << max(n - 1, 0).bit_length(),
    )
    tl = ModuleType("tl")  # a module, as code looks for it in the globals of a scalar
    vars(tl)["constexpr"] = _Constant
    TensorDescriptor = None
else:
    IS_INSTALLED = True
    VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
    # Read once. @triton.jit also reads it once, so later changes of the variable would not reach
    # the kernels.
    INTERPRETED = bool(triton.knobs.runtime.interpret)
