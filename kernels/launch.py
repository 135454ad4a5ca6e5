"""What every operation shares: which implementation runs, how a kernel is launched, how a Function
remembers.

A leaf: it imports no operation. The path is chosen here and nowhere else:

    CUDA, HIP or XPU tensor                 -> the Triton kernel
    CPU tensor under TRITON_INTERPRET=1     -> the same kernel, in Triton's interpreter
    any other tensor, or float64 anywhere   -> the reference, in plain torch

and `use("torch")` or `use("triton")` forces one of them.
"""

import contextlib
import functools

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
_AUTOCAST = ("cpu", *_ACCELERATORS)

_forced: str | None = None
_observers: list = []
# public function -> how `compiled` calls its operator; the first output is the function's
operators: dict = {}
_target: tuple[str, int] | None = None  # (architecture, processors) while dry_run is open


def use(path: str):
    """`with use("torch"):` forces the reference, `with use("triton"):` the kernels, inside it and
    in every thread.

    Forcing `"triton"` on tensors that no kernel can take (float64, or a CPU without the
    interpreter) is an error.
    """
    if path not in ("torch", "triton"):
        raise ValueError(f'use: path must be "torch" or "triton", got {path!r}')
    return _using(path)


@contextlib.contextmanager
def _using(path):
    global _forced
    before, _forced = _forced, path
    try:
        yield
    finally:
        _forced = before


def path(*tensors) -> str:
    """`"triton"` or `"torch"`: the implementation that serves these tensors (None and non-tensors
    are ignored).
    """
    if _forced == "torch":
        return "torch"
    if (
        _forced is None
        and _target is None
        and not INTERPRETED
        and tensors
        and tensors[0].device.type == "cpu"
    ):
        return "torch"  # the short way, for the CPU's training loop
    if watched():
        return "torch"
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if all(t.dtype in KERNEL_DTYPES and _has_kernels(t.device) for t in tensors):
        return "triton"
    if _forced == "triton":
        got = ", ".join(sorted({f"{t.dtype} on {t.device.type}" for t in tensors}))
        raise ValueError(
            f'use("triton"): no kernel takes {got}; kernels take float32, float16 and bfloat16 on '
            "a GPU, "
            "or on the CPU when TRITON_INTERPRET=1 is set before the first import"
        )
    return "torch"


def _has_kernels(device: torch.device) -> bool:
    return (
        device.type in _ACCELERATORS
        or _target is not None
        or (INTERPRETED and device.type == "cpu")
    )


def run(kernel, grid: tuple[int, ...], *args, **options) -> None:
    """Launch `kernel[grid](*args, **options)` on the device of the first tensor among `args`;
    nothing for an empty grid.
    """
    if 0 in grid:
        return
    for observer in _observers:
        observer(kernel, grid, args, options)
    if _target is not None:
        return
    device = next(
        t.device
        for a in args
        for t in (a if isinstance(a, tuple) else (a,))
        if isinstance(t, torch.Tensor)
    )
    # Triton launches on the current device, which need not be the tensors'.
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        kernel[grid](*args, enable_fp_fusion=True, **options)


@contextlib.contextmanager
def observe(callback):
    """Call `callback(kernel, grid, args, options)` before every launch: how benchmarks count
    launches and bytes.
    """
    _observers.append(callback)
    try:
        yield
    finally:
        _observers.remove(callback)


@contextlib.contextmanager
def dry_run(arch: str, sms: int):
    """Choose paths and configurations as on that GPU, and launch nothing: results stay unwritten.

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


def sm_count(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a device; 1 in the interpreter, which runs one
    program at a time.
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
    """`input_precision` of float32 products: torch.get_float32_matmul_precision() in Triton's
    words.
    """
    if _target[0].startswith("gfx") if _target else torch.version.hip:
        return "ieee"
    return {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[
        torch.get_float32_matmul_precision()
    ]


def check_same(op: str, **tensors) -> None:
    """All tensors (None is skipped) are dense, of one dtype, on one device, else a ValueError that
    names the odd one.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first, reference = next(iter(given.items()))
    for name, t in given.items():
        if t.dtype != reference.dtype:
            raise ValueError(
                f"{op}: {name} must be {reference.dtype} as {first} is, got {t.dtype}; convert "
                "one of them"
            )
        if t.device != reference.device:
            raise ValueError(
                f"{op}: {name} must be on {reference.device} as {first} is, got {t.device}; move "
                "one of them"
            )
        if t.layout is not torch.strided:
            raise ValueError(
                f"{op}: {name} must be dense, got {t.layout}; convert it with .to_dense()"
            )


def watched() -> bool:
    """Whether somebody follows every torch operation: torch.func, forward-mode AD, torch.export,
    make_fx, fake tensors.

    Then no kernel may run, as it would not be seen, and no value may be read.
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or forward_ad._current_level >= 0
    )


def autocasting(tensor) -> bool:
    """Whether torch.autocast is on for this tensor's device."""
    device = tensor.device.type
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def call(name: str, function, fwd, *args, autocast=None):
    """What a public function does with its arguments: of the four ways there are to compute, the
    one that serves here.

    Under torch.autocast, cast the arguments as torch does, to autocast's dtype or to the one given,
    and then: compiled, the operator of this name; watched, the reference `fwd` in differentiable
    torch operations; else the autograd function.
    """
    if not isinstance(args[0], torch.Tensor):
        raise TypeError(
            f"{name}: input must be a torch.Tensor, got {type(args[0]).__name__}; convert it with "
            "torch.as_tensor"
        )
    if autocasting(args[0]):
        device = args[0].device.type
        dtype = autocast or torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return call(name, function, fwd, *(_autocast(a, device, dtype) for a in args))
    transformed = torch._C._are_functorch_transforms_active()
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not transformed:
        return operators[name](*args)[0]
    if watched():
        return fwd(*args)[0]
    return function.apply(*args)


def _autocast(value, device: str, dtype):
    """Floating-point tensors on this device in this dtype, but for float64, which torch leaves
    alone as well.
    """
    if (
        not isinstance(value, torch.Tensor)
        or not value.is_floating_point()
        or value.dtype == torch.float64
    ):
        return value
    return value.to(dtype) if value.device.type == device else value


def remember(ctx, inputs: tuple, saved: tuple) -> None:
    """Keep a Function's inputs and what its forward saved: tensors through save_for_backward, the
    rest on ctx.
    """
    values = (*inputs, *saved)
    tensors = {
        id(v): v for v in values if isinstance(v, torch.Tensor)
    }  # a tensor that is there twice is saved once
    ctx.save_for_backward(*tensors.values())
    places = {key: place for place, key in enumerate(tensors)}
    ctx.values = [places.get(id(v), (v,)) for v in values]
    ctx.input_count = len(inputs)


def recall(ctx) -> tuple[tuple, tuple]:
    """`(inputs, saved)` as given to `remember`."""
    tensors = ctx.saved_tensors
    values = tuple(v[0] if isinstance(v, tuple) else tensors[v] for v in ctx.values)
    return values[: ctx.input_count], values[ctx.input_count :]


def differentiate(ctx, dy, bwd, fwd_ref, bwd_ref, needs):
    """A Function's backward: `bwd(dy, *saved)`, or under create_graph=True the reference, itself
    differentiable.

    The kernels' results carry no graph, so what the second derivative needs is computed again from
    the inputs.
    """
    if autocasting(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return differentiate(ctx, dy, bwd, fwd_ref, bwd_ref, needs)
    inputs, saved = recall(ctx)
    if torch.is_grad_enabled():
        return bwd_ref(dy, *fwd_ref(*inputs)[1], needs=needs)
    return bwd(dy, *saved, needs=needs)
