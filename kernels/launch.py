"""What every operation shares: which implementation runs, how a kernel is launched, device facts.

A leaf: it imports no operation. The backend is chosen here and nowhere else:

    CUDA, HIP or XPU tensor                 -> the Triton kernel
    CPU tensor under TRITON_INTERPRET=1     -> the same kernel, in Triton's interpreter
    any other tensor, or float64 anywhere   -> the reference, in plain torch
    somebody follows every operation        -> the reference: torch.func, torch.export, torch.jit
    a tensor that is no plain memory        -> the reference: DTensor, FakeTensor, other subclasses

and `use("torch")` or `use("triton")` forces one of them. Which kernels compute the products of
linear layers says `configs`, and `use(products=…)` forces that.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd import forward_ad

# Read once, at import, because @triton.jit reads it once as well: later changes of the variable
# would not reach the kernels.
INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRET = tl.constexpr(INTERPRETED)

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ACCELERATORS = ("cuda", "xpu")
AUTOCAST = ("cpu", *_ACCELERATORS)

PRODUCTS = ("fused", "library")

_forced: str | None = None
_products: str | None = None
_observers: list = []
# update of an optimizer -> how `compiled_optim` calls its operator
operators: dict = {}
_target: tuple[str, int] | None = None  # (architecture, processors) while dry_run is open


def use(
    backend: str | None = None, *, products: str | None = None
) -> contextlib.AbstractContextManager[None]:
    """`with use("torch"):` forces the reference, `with use("triton"):` the kernels.

    products forces how kernels multiply in linear layers. `with use(products="fused"):` product,
    bias and activation are one Triton kernel. `with use(products="library"):` the product is
    torch's own, by cuBLAS, and a Triton kernel applies the activation or its derivative. Without
    it, `kernels.configs` chooses by size and precision. The library follows torch's precision
    settings: TF32 only where torch itself would take it.

    Both hold in every thread.

    Forcing `"triton"` on tensors that no kernel can take (float64, or a CPU without the
    interpreter) is an error.
    """
    if backend is None and products is None:
        raise ValueError('use: give a backend, "torch" or "triton", or products=, got neither')
    if backend not in ("torch", "triton", None):
        raise ValueError(f'use: backend must be "torch" or "triton", got {backend!r}')
    if products not in (*PRODUCTS, None):
        raise ValueError(f'use: products must be "fused" or "library", got {products!r}')
    return _using(backend, products)


@contextlib.contextmanager
def _using(backend, products):
    global _forced, _products
    before = _forced, _products
    _forced, _products = backend or _forced, products or _products
    try:
        yield
    finally:
        _forced, _products = before


def products() -> str | None:
    """How linear layers must multiply, `"fused"` or `"library"`; None where `configs` may choose.

    Under torch.use_deterministic_algorithms it is the fused kernel, unless `use` says otherwise:
    cuBLAS is deterministic only with settings of its environment, and torch refuses it without.
    """
    if _products is None and torch.are_deterministic_algorithms_enabled():
        return "fused"
    return _products


def backend(*tensors: torch.Tensor | None) -> str:
    """`"triton"` or `"torch"`: the implementation that serves these tensors.

    None and non-tensors are ignored.
    """
    if _forced == "torch":
        return "torch"
    if _forced is None and _target is None and tensors and on_cpu(tensors[0]):
        return "torch"  # the short way, for the CPU's training loop
    if watched() or not plain(*tensors):
        return "torch"
    real = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if all([t.dtype in KERNEL_DTYPES and _has_kernels(t.device) for t in real]):
        return "triton"
    if _forced == "triton":
        got = ", ".join(sorted({f"{t.dtype} on {t.device.type}" for t in real}))
        raise ValueError(
            f'use("triton"): no kernel takes {got}; kernels take float32, float16 and bfloat16 on '
            "a GPU, "
            "or on the CPU when TRITON_INTERPRET=1 is set before the first import"
        )
    return "torch"


def on_cpu(tensor: torch.Tensor | None) -> bool:
    """Whether no kernel takes this tensor, as it lies on a CPU without the interpreter."""
    return not INTERPRETED and tensor is not None and tensor.is_cpu


def path(*tensors: torch.Tensor | None) -> str:
    """Deprecated: the name that `backend` had before version 0.2; it goes with version 0.3."""
    return backend(*tensors)


_PLAIN = (torch.Tensor, torch.nn.Parameter)
_NO_TENSORS = (str, type(None), int, float, bool)
# Those of is_grads_batched=True.
_batched: Callable[[Any], bool] = torch._C._functorch.is_legacy_batchedtensor
_NO_DISPATCH = torch.Tensor.__torch_dispatch__
# Asked in every call: each step of Python between costs as much as the answer.
_are_functorch_transforms_active: Callable[[], bool] = torch._C._are_functorch_transforms_active
_len_torch_dispatch_stack: Callable[[], int] = torch._C._len_torch_dispatch_stack
_is_tracing: Callable[[], bool] = torch._C._is_tracing


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether all of these are plain memory, which a kernel can take a pointer of.

    Not so: subclasses with a __torch_dispatch__ of their own (DTensor, FakeTensor), nested tensors,
    and the batched gradients of is_grads_batched=True. For torch.func's see `watched`. None and
    non-tensors are ignored.
    """
    for t in tensors:
        kind: Any = type(t)
        if kind in _NO_TENSORS:
            continue
        if kind not in _PLAIN:
            if not isinstance(t, torch.Tensor):
                continue
            if kind.__torch_dispatch__ is not _NO_DISPATCH:
                return False
        if t.is_nested or _batched(t):  # type: ignore[union-attr]  # it is no None
            return False
    return True


def has_kernels(t: torch.Tensor) -> bool:
    """Whether kernels take a tensor of this type on this device, whoever watches or forces."""
    if t.is_cpu and not INTERPRETED and _target is None:
        return False  # the short way
    return t.dtype in KERNEL_DTYPES and _has_kernels(t.device)


def is_forced() -> bool:
    """Whether `use` says which backend to take."""
    return _forced is not None


def _has_kernels(device: torch.device) -> bool:
    return (
        device.type in _ACCELERATORS
        or _target is not None
        or (INTERPRETED and device.type == "cpu")
    )


_plans: dict[tuple, Any] = {}
_MOST_PLANS = 4096  # kept: more kinds of arguments are planned anew


def planned(make: Callable[..., Any], tensors: tuple, *options: Any) -> Any:
    """`make(*tensors, *options)`, once for each kind of arguments.

    For what an operation does before it allocates: checks, the choice of the implementation, tiles
    and strides. `make` may ask of a tensor its type, shape, strides, dtype, device and layout, and
    it may ask what is in force here and in torch's settings of products. What it returns must hold
    no tensor. An error is raised each time.
    """
    if (_forced is None and _target is None and on_cpu(tensors[0])) or watched():
        return make(*tensors, *options)  # on a CPU to ask costs as little as to look it up
    key: list[Any] = [make, options, _forced, _target, INTERPRETED, dot_precision(), products()]
    for t in tensors:
        if t is None:
            key.append(None)
        elif type(t) in _PLAIN and t.layout is torch.strided and plain(t):
            key += (t.shape, t.stride(), t.dtype, t.device)
        else:
            return make(*tensors, *options)
    known = tuple(key)
    plan = _plans.get(known, _plans)
    if plan is _plans:  # which is no plan
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        plan = _plans[known] = make(*tensors, *options)
    return plan


def forget() -> None:
    """Plan everything anew: for tests, which change what a device is."""
    _plans.clear()


def run(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launches `kernel[grid](*args, **options)` on the device of the first tensor among `args`.

    An empty grid launches nothing.

    Tensors whose minus sign is still to be applied, as `z.conj().imag` gives them, are inputs: the
    kernel gets a copy that has it.
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
    if first.is_cuda and first.get_device() != torch.cuda.current_device():
        # Triton launches on the current device.
        with torch.cuda.device(first.device):
            kernel[grid](*args, enable_fp_fusion=True, **options)
    else:
        kernel[grid](*args, enable_fp_fusion=True, **options)


def _looked_over(values: tuple) -> tuple[Any, bool]:
    """(the first tensor among values and in their tuples, whether one of them has a minus sign
    still to be applied).
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
    """The tensors, however nested, without torch's lazy minus sign.

    Pointers do not carry the sign. Strides are kept, as they have been read already.
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
    """Calls `callback(kernel, grid, args, options)` before every launch.

    Benchmarks count launches and bytes with it.
    """
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


@contextlib.contextmanager
def dry_run(arch: str, sms: int):
    """Choose backend and configurations as on that GPU, and launch nothing: results stay unwritten.

    With `observe` and tensors on the meta device this lists what an operation would launch there:
    for compiling without a GPU and for counting.
    """
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
    """Threads of a warp: 64 on AMD's CDNA, 32 elsewhere."""
    return 64 if arch.startswith("gfx9") else 32


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device.

    1 in the interpreter, which runs one program at a time.
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

    It follows torch.get_float32_matmul_precision(), or torch's newer setting where that is in
    force.
    """
    if _target[0].startswith("gfx") if _target else torch.version.hip:
        return "ieee"
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch refuses to say where the newer setting contradicts it
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[older]


def check_same(op: str, **tensors: torch.Tensor | None) -> None:
    """Raises a ValueError unless all tensors are dense, of one dtype, on one device.

    It names the odd one. None is skipped.
    """
    if _alike(tensors.values()):
        return
    given = {name: t for name, t in tensors.items() if t is not None}
    first, reference = next(iter(given.items()))
    for name, t in given.items():
        if t.dtype != reference.dtype:
            raise ValueError(
                f"{op}: {name} must be {reference.dtype} as {first} is, got {t.dtype}; convert "
                "one of them"
            )
    check_placed(op, **given)


def _alike(tensors) -> bool:
    """Whether `check_same` has nothing to say of these: the short way, for every call."""
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

    It names the odd one. None is skipped.
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
    """Whether a profiler of torch is on, which wants a record of every step."""
    return torch.autograd._profiler_enabled()


def watched() -> bool:
    """True while something follows every torch operation.

    torch.func, forward-mode AD, torch.export, torch.jit.trace, make_fx, fake tensors.

    Then no kernel may run, as it would not be seen, and no value may be read.
    """
    return torch.compiler.is_compiling() or followed()


def followed() -> bool:
    """`watched` for a caller that knows that nothing is being compiled."""
    return (
        _are_functorch_transforms_active()
        or _len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
        or _is_tracing()
    )
