"""What every operation shares: which implementation runs, how a kernel is launched, device facts.

This module imports no operation. Only this module chooses the backend:

    CUDA, HIP or XPU tensor                   -> the Triton kernel
    CPU tensor under TRITON_INTERPRET=1       -> the same kernel, in Triton's interpreter
    any other tensor, or float64 anywhere     -> the reference, in plain torch
    any tensor where Triton is not installed  -> the reference
    torch.func, torch.export or torch.jit     -> the reference, because they must see every
    follows the operations                       operation
    DTensor, FakeTensor, other subclasses     -> the reference, because a kernel needs plain memory

`use("torch")` or `use("triton")` forces one of them. Under `use("numba")`:

    linear layers and cross-entropy           -> loops that numba compiles (`kernels.cpu`), for
                                                 float32 and float64 on a CPU; else ValueError
    all other operations                      -> the reference, in plain torch

`configs` chooses the kernels for the products of linear layers, and `use(products=…)` forces that
choice.
"""

import contextlib
import functools
import importlib.util
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

from .language import ADVICE, INTERPRETED, IS_INSTALLED, tl

INTERPRET = tl.constexpr(INTERPRETED)

LOOP_DTYPES = (torch.float32, torch.float64)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACCELERATORS = ("cuda", "xpu")
AUTOCAST = ("cpu", *_ACCELERATORS)

BACKENDS = ("torch", "triton", "numba")
_NAMES = '"torch", "triton" or "numba"'
PRODUCTS = ("fused", "library")

_forced: str | None = None
_products: str | None = None
_tma: bool | None = None
_open: list[list] = []  # [backend, products, tma] of every open block of `use`, the latest last
_opening = threading.RLock()  # held while `_open` and the three settings change
_observers: list = []
# update of an optimizer -> how `compiled_optim` calls its operator
operators: dict = {}
_target: tuple[str, int] | None = None  # (architecture, processors) while dry_run is open


def use(
    backend: str | None = None, *, products: str | None = None, tma: bool | None = None
) -> contextlib.AbstractContextManager[None]:
    """A context manager. `use("torch")` forces the reference, `use("triton")` forces the kernels.

    `use("numba")` is for a CPU. `linear` and `mlp`, their launchers and their gradients then run in
    loops that numba compiles, on as many threads as torch uses, and so do the launchers of
    cross-entropy for labels. Everything else, and products with 1 MB of weights or more, runs in
    the reference. float32 and float64 are served. Results differ from torch's in the last digits,
    and are the same for any number of threads. The first call compiles for a few seconds, or reads
    the code from disk. It needs numba: pip install 'handgrad[cpu]'.

    products forces how kernels multiply in linear layers. With "fused", one Triton kernel does
    product, bias and activation. With "library", torch computes the product (by cuBLAS), and a
    Triton kernel applies the activation or its derivative. Without products, `kernels.configs`
    chooses by size and precision. The library follows torch's precision settings: it takes TF32
    only where torch itself would.

    tma forces how fused products of aligned half-precision tensors load their tiles on NVIDIA GPUs
    from Hopper on. True: by the tensor memory accelerator. False: by pointers. Without tma,
    `kernels.configs` chooses by size. Results have the same bits.

    The settings hold in every thread. Threads may leave their blocks in any order. A setting holds
    until the block that made it ends, or while a later block makes another.

    ValueError: no argument, an unknown value, or a backend that is not installed. Under
    `"triton"`, an operation also raises it for tensors that no kernel takes (float64, or on a CPU
    without the interpreter). Under `"numba"`, an operation that has loops raises it for those that
    no loop takes (half precision, or on a GPU).
    """
    if backend is None and products is None and tma is None:
        raise ValueError(f"use: give a backend, {_NAMES}, or products= or tma=, got none")
    if backend not in (*BACKENDS, None):
        raise ValueError(f"use: backend must be {_NAMES}, got {backend!r}")
    if backend == "numba" and not has_numba():
        raise ValueError("use: backend \"numba\" needs numba: pip install 'handgrad[cpu]'")
    if backend == "triton" and not IS_INSTALLED:
        raise ValueError(f'use: backend "triton" needs Triton; {ADVICE}')
    if products not in (*PRODUCTS, None):
        raise ValueError(f'use: products must be "fused" or "library", got {products!r}')
    if tma not in (True, False, None):
        raise ValueError(f"use: tma must be True or False, got {tma!r}")
    return _using(backend, products, tma)


@functools.cache
def has_numba() -> bool:
    """True if numba is installed. To look for it takes longer than an epoch of a small table."""
    return importlib.util.find_spec("numba") is not None


@contextlib.contextmanager
def _using(backend, products, tma):
    block = [backend, products, tma]
    with _alone():
        _open.append(block)
        _set_latest()
    try:
        yield
    finally:
        with _alone():
            # By identity, because another thread may have an equal block.
            del _open[[other is block for other in _open].index(True)]
            _set_latest()


def _alone():
    """A context for one thread at a time. torch.compile traces in one, and takes no lock."""
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _opening


if hasattr(os, "register_at_fork"):  # else a child may wait for a thread that it does not have
    os.register_at_fork(
        before=_opening.acquire,
        after_in_parent=_opening.release,
        after_in_child=_opening.release,
    )


def _set_latest() -> None:
    """Each setting is that of the latest open block that gives one."""
    global _forced, _products, _tma
    latest = [[given for given in column if given is not None] for column in zip(*_open)]
    _forced, _products, _tma = [(found or [None])[-1] for found in latest or [[]] * 3]


def products() -> str | None:
    """How linear layers must multiply: `"fused"`, `"library"`, or None if `configs` may choose.

    Under torch.use_deterministic_algorithms it is "fused", unless `use` forces "library". cuBLAS is
    deterministic only with certain environment variables, and torch refuses it without them.
    """
    if _products is None and torch.are_deterministic_algorithms_enabled():
        return "fused"
    return _products


def tma() -> bool | None:
    """True if fused products load tiles by TMA, False if not, None if `configs` may choose."""
    return _tma


def backend(*tensors: torch.Tensor | None) -> str:
    """`"triton"`, `"numba"` or `"torch"`: what serves these tensors, see the module.

    None and non-tensors are ignored. Under `use("numba")` it is "numba" if compiled loops take all
    tensors, else "torch". ValueError: `use("triton")` is in force, and no kernel takes one of the
    tensors.
    """
    if _forced == "torch":
        return "torch"
    if _forced != "numba" and tensors and tensors[0] is not None and not may_take(tensors[0]):
        return "torch"  # a shortcut that saves time in training loops on the CPU
    if watched() or not plain(*tensors):
        return "torch"
    real = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if _forced == "numba":
        taken = [_has_loops(t) and t.layout is torch.strided for t in real]
        return "numba" if all(taken) else "torch"
    if all([t.dtype in KERNEL_DTYPES and _has_kernels(t.device) for t in real]):
        return "triton"
    if _forced == "triton":
        raise ValueError(
            f'use("triton"): no kernel takes {_kinds(real)}; kernels take float32, float16 and '
            "bfloat16 on a GPU, or on the CPU when TRITON_INTERPRET=1 is set before the first "
            "import"
        )
    return "torch"


def _kinds(tensors: list[torch.Tensor]) -> str:
    return ", ".join(sorted({f"{t.dtype} on {t.device.type}" for t in tensors}))


def _has_loops(tensor: torch.Tensor) -> bool:
    """True if compiled loops take numbers of this dtype and device."""
    return tensor.is_cpu and tensor.dtype in LOOP_DTYPES


def takes_loops(*tensors: torch.Tensor | None) -> bool:
    """True if compiled loops serve these tensors: `backend` is "numba". A fast test.

    Only an operation that has loops asks. ValueError: `use("numba")` is in force, and one of the
    tensors has another dtype or device than loops take.
    """
    if _forced != "numba":
        return False
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN or not _has_loops(t):
            return _takes_odd_loops(tensors)
        if t.layout is not torch.strided or t.is_nested or is_batched(t):
            return _takes_odd_loops(tensors)
    return not watched()


def _takes_odd_loops(tensors: tuple) -> bool:
    """`takes_loops` of tensors that need a closer look."""
    if watched() or not plain(*tensors):
        return False
    real = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not all(map(_has_loops, real)):
        raise ValueError(
            f'use("numba"): no compiled loop takes {_kinds(real)}; they take float32 and '
            'float64 on a CPU; leave the block, or take use("torch")'
        )
    return backend(*tensors) == "numba"


def on_cpu(tensor: torch.Tensor | None) -> bool:
    """True if the tensor is on a CPU without the interpreter, so no kernel takes it."""
    return not INTERPRETED and tensor is not None and tensor.is_cpu


def path(*tensors: torch.Tensor | None) -> str:
    """Deprecated alias of `backend`, its name before version 0.2. Version 0.3 removes it."""
    return backend(*tensors)


PLAIN = frozenset((torch.Tensor, torch.nn.Parameter))
_NO_TENSORS = frozenset((str, type(None), int, float, bool))
# True for the batched gradients of is_grads_batched=True.
is_batched: Callable[[Any], bool] = torch._C._functorch.is_legacy_batchedtensor
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
# These are torch's C functions themselves. Every call asks them, and one Python call in between
# costs as much as the answer.
_are_functorch_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_len_torch_dispatch_stack: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_tracing: Callable[[], bool] = torch._C._is_tracing
# The setting of torch.no_grad. A context manager costs five times as much.
set_grad_enabled: Callable[[bool], None] = torch._C._set_grad_enabled


def plain(*tensors: torch.Tensor | None) -> bool:
    """True if all tensors are plain memory, so a kernel can take pointers to them.

    False for subclasses with their own __torch_dispatch__ (DTensor, FakeTensor), for nested
    tensors, and for the batched gradients of is_grads_batched=True. `watched` covers the tensors of
    torch.func. None and non-tensors are ignored.
    """
    for t in tensors:
        kind: Any = type(t)
        if kind not in PLAIN:
            if kind in _NO_TENSORS or not isinstance(t, torch.Tensor):
                continue
            if kind.__torch_dispatch__ is not _NO_DISPATCH:
                return False
        if t.is_nested or is_batched(t):  # type: ignore[union-attr]  # None was skipped
            return False
    return True


def has_kernels(t: torch.Tensor) -> bool:
    """True if kernels take tensors of this dtype on this device.

    It does not ask `use` or `watched`.
    """
    if t.is_cpu and not INTERPRETED and _target is None:
        return False  # a shortcut
    return t.dtype in KERNEL_DTYPES and _has_kernels(t.device)


def on_reference(t: torch.Tensor) -> bool:
    """True if t is plain memory that no kernel takes, and nothing follows torch's operations.

    torch.compile is not asked. This one test of a call replaces several, and calls no `may_take`
    because every call on a CPU makes it.
    """
    return (
        type(t) in PLAIN
        and t.is_cpu
        and not INTERPRETED
        and (_forced is None or _forced == "numba")
        and _target is None
        and not followed()
        and not t.is_nested
        and not is_batched(t)
    )


def may_take(t: torch.Tensor) -> bool:
    """False if no Triton kernel takes t. A fast test, without exceptions."""
    forced = _forced is not None and _forced != "numba"
    return not t.is_cpu or INTERPRETED or forced or _target is not None


def is_forced() -> bool:
    """True if `use` forces the reference or the kernels."""
    return _forced is not None and _forced != "numba"


def _has_kernels(device: torch.device) -> bool:
    return (
        (device.type in _ACCELERATORS and IS_INSTALLED)
        or _target is not None
        or (INTERPRETED and device.type == "cpu")
    )


_plans: dict[tuple, Any] = {}
_MOST_PLANS = 4096  # when so many are kept, all are dropped and planned again


def planned(make: Callable[..., Any], tensors: tuple, *options: Any) -> Any:
    """`make(*tensors, *options)`, called once for each kind of arguments and then remembered.

    An operation uses it for its work before allocation: checks, the choice of the implementation,
    tiles and strides. `make` may read a tensor's type, shape, strides, dtype, device and layout. It
    may also read the settings of this module and torch's settings of products. Its result must hold
    no tensor. Errors are not remembered: each call raises them again.
    """
    if (_forced is None and _target is None and on_cpu(tensors[0])) or watched():
        return make(*tensors, *options)  # on a CPU, the call is as cheap as the look-up
    key: list[Any] = [make, options, _forced, _target, INTERPRETED, dot_precision()]
    key += (products(), _tma)
    for t in tensors:
        if t is None:
            key.append(None)
        elif type(t) in PLAIN and t.layout is torch.strided and plain(t):
            key += (t.shape, t.stride(), t.dtype, t.device)
        else:
            return make(*tensors, *options)
    known = tuple(key)
    plan = _plans.get(known, _plans)
    if plan is _plans:  # the default of get: there is no plan yet
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[known] = make(*tensors, *options)
    return plan


def forget() -> None:
    """Drop all plans. For tests, which change the facts of a device."""
    _plans.clear()


def changed(*lists: list[torch.Tensor]) -> None:
    """Tell autograd that these tensors were changed in place, by code that torch does not see.

    A backward that saved one of them before then raises torch's RuntimeError, as after an update by
    torch.optim. torch's fused updates tell nothing either.
    """
    torch.autograd.graph.increment_version([t for tensors in lists for t in tensors])


def run(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launches `kernel[grid](*args, **options)` on the device of the first tensor among `args`.

    An empty grid launches nothing.

    A tensor may have a minus sign that torch has not applied yet, as `z.conj().imag` has. The
    kernel then gets a copy with the sign applied, so such a tensor can only be an input.
    """
    if 0 in grid:
        return
    first, is_signed = _looked_over(args)
    if is_signed:
        args = tuple(_signed(a) for a in args)
    for observer in _observers:
        observer(kernel, grid, args, options)
    if _target is not None:
        return
    if not first.is_cpu:
        module = torch.get_device_module(first.device)  # torch.cuda or torch.xpu
        if first.get_device() != module.current_device():
            # Triton launches on the current device.
            with module.device(first.device):
                kernel[grid](*args, enable_fp_fusion=True, **options)
            return
    kernel[grid](*args, enable_fp_fusion=True, **options)


def _looked_over(values: tuple) -> tuple[Any, bool]:
    """(first tensor, is_signed) of the values and the tuples among them.

    is_signed: True if a tensor has a minus sign that torch has not applied yet.
    """
    first, is_signed = None, False
    for value in values:
        kind = type(value)
        if kind is int or kind is float or value is None:
            continue
        if isinstance(value, torch.Tensor):
            found, signed = value, value.is_neg()
        elif isinstance(value, tuple):
            found, signed = _looked_over(value)
        else:
            continue
        first = found if first is None else first
        is_signed = is_signed or signed
    return first, is_signed


def _signed(value):
    """The value, a tensor or nested tuples, with torch's lazy minus signs applied.

    A pointer does not carry the sign. The strides stay the same, because the caller has already
    read them.
    """
    if isinstance(value, torch.Tensor) and value.is_neg():
        raw = torch._neg_view(value)  # the memory as it is
        spans = ((size - 1) * stride for size, stride in zip(raw.shape, raw.stride()))
        length = 1 + sum(spans) if raw.numel() else 0
        stretch = raw.as_strided((length,), (1,)).neg()
        return stretch.as_strided(raw.shape, raw.stride(), 0)
    if isinstance(value, tuple) and any(isinstance(v, (torch.Tensor, tuple)) for v in value):
        items = map(_signed, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


@contextlib.contextmanager
def observe(callback):
    """A context in which `callback(kernel, grid, args, options)` is called before every launch.

    Benchmarks count launches and bytes with it.
    """
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


@contextlib.contextmanager
def dry_run(arch: str, sms: int):
    """A context that chooses backend and configurations as on that GPU, and launches nothing.

    arch: such as "sm_90". sms: how many multiprocessors it has. Results stay unwritten. With
    `observe` and tensors on the meta device, it shows what an operation would launch on that GPU.
    Tests compile these kernels without a GPU, and benchmarks count them. RuntimeError: Triton is
    not installed.
    """
    if not IS_INSTALLED:
        raise RuntimeError(f"dry_run: {ADVICE}")
    global _target
    before, _target = _target, (arch, sms)
    try:
        yield
    finally:
        _target = before


def arch(device: torch.device) -> str:
    """`"sm_90"`, `"gfx942"`, … of a device; `"cpu"` for the interpreter."""
    return _target[0] if _target else _device_facts(device)[0]


def lanes(arch: str) -> int:
    """Threads of a warp: 64 on AMD's CDNA, 32 on other devices."""
    return 64 if arch.startswith("gfx9") else 32


def sm_count(device: torch.device) -> int:
    """How many streaming multiprocessors (compute units) a device has.

    It is 1 in the interpreter, which runs one program at a time.
    """
    return _target[1] if _target else _device_facts(device)[1]


@functools.cache
def _device_facts(device: torch.device) -> tuple[str, int]:
    if device.type != "cuda":
        return device.type, 1
    properties = torch.cuda.get_device_properties(device)
    name = (
        properties.gcnArchName.split(":")[0]
        if torch.version.hip
        else f"sm_{properties.major}{properties.minor}"
    )
    return name, properties.multi_processor_count


def dot_precision() -> str:
    """The precision of float32 products, as Triton's `input_precision`.

    "ieee", "tf32x3" or "tf32". It follows torch.get_float32_matmul_precision(), or torch's newer
    setting if that one is used. On AMD it is always "ieee".
    """
    if _target[0].startswith("gfx") if _target else torch.version.hip:
        return "ieee"
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch raises this if the newer setting contradicts the older one
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[older]


def check_same(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises a ValueError unless all tensors are dense, of one dtype and on one device.

    The error names the tensor that differs. None is skipped.
    """
    if _alike(tensors.values()):
        return
    given = {name: t for name, t in tensors.items() if t is not None}
    first, reference = next(iter(given.items()))
    for name, t in given.items():
        if t.dtype != reference.dtype and t.is_floating_point() > reference.is_floating_point():
            raise ValueError(
                f"{op}: {first} must be {t.dtype} as {name} is, got {reference.dtype}; convert it"
            )
        if t.dtype != reference.dtype:
            raise ValueError(
                f"{op}: {name} must be {reference.dtype} as {first} is, got {t.dtype}; convert "
                "one of them"
            )
    check_placed(op, **given)


def _alike(tensors) -> bool:
    """True if `check_same` would not raise. A fast test, because every call makes it."""
    dtype = device = None
    for t in tensors:
        if t is None:
            continue
        if device is None:
            dtype, device = t.dtype, t.device
        if t.dtype != dtype or t.device != device or t.layout is not torch.strided:
            return False
    return device is not None


def check_placed(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises a ValueError unless all tensors are dense and on one device.

    The error names the tensor that differs. None is skipped.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first, reference = next(iter(given.items()))
    for name, t in given.items():
        if t.device != reference.device:
            raise ValueError(
                f"{op}: {name} must be on {reference.device} as {first} is, got {t.device}; move "
                "one of them"
            )
        if t.layout is not torch.strided:
            raise ValueError(
                f"{op}: {name} must be dense, got {t.layout}; convert it with .to_dense()"
            )


def profiled() -> bool:
    """True if one of torch's profilers is on. It needs a record of every step."""
    return torch.autograd._profiler_enabled()


def watched() -> bool:
    """True while something follows every torch operation.

    Such are torch.compile, torch.func, forward-mode AD, torch.export, torch.jit.trace, make_fx and
    fake tensors. No kernel may run then, because they would not see it. No value may be read.
    """
    return torch.compiler.is_compiling() or followed()


def followed() -> bool:
    """`watched` for a caller that has excluded torch.compile already."""
    return (
        _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or _is_tracing()
    )
