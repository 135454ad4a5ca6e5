"""Operations that the compiled epoch needs and numba does not have.

With them, threads wait for each other, call functions by their address and read memory ahead.
"""

import ctypes
import platform
import sys
from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I64, _I32 = ir.IntType(64), ir.IntType(32)
# The decorator of functions that only compiled code calls. Code by which others could call them
# would take a quarter of the time to compile.
_compiler: Any = njit  # Any, because its stubs know fewer options
inside = _compiler(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)
_SPINS = 2000  # rounds before a waiting thread offers its core to others
# The instruction that tells a processor that a thread waits: LLVM's name and the arguments.
_X86, _ARM = ("llvm.x86.sse2.pause", ()), ("llvm.aarch64.hint", (1,))
# Each system has its own name of a processor: Linux, Windows, macOS.
_PAUSES = {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "ARM64": _ARM, "arm64": _ARM}


if sys.platform == "win32":  # it has another name there
    _yield = ctypes.cast(ctypes.windll.kernel32.SwitchToThread, ctypes.c_void_p).value
    binding.add_symbol("sched_yield", _yield)


def _pointer_to(kind):
    @intrinsic
    def at(typing, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(kind)(types.int64), generate

    return at


# Each makes a pointer of an address. Code reads and writes what lies there by index.
octets, integers, narrow_integers = map(_pointer_to, (types.uint8, types.int64, types.int32))
floats, doubles = map(_pointer_to, (types.float32, types.float64))


@intrinsic
def numbers(typing, w, address):
    """A pointer to numbers of the dtype of the array w. They lie at an address."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[1], context.get_value_type(signature.return_type))

    return types.CPointer(w.dtype)(w, types.int64), generate


@intrinsic
def number(typing, w, value):
    """A value in the dtype of the array w. A loop that mixes dtypes has slower instructions."""

    def generate(context, builder, signature, args):
        return context.cast(builder, args[1], signature.args[1], signature.return_type)

    return w.dtype(w, value), generate


@intrinsic
def arrive(typing, counter):
    """Add one to the int64 at an address. All threads see it."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        builder.atomic_rmw("add", pointer, _I64(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def claim(typing, counter):
    """Add one to the int64 at an address, and return what it was. No other thread gets the same."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, _I64(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def arrivals(typing, counter):
    """The present value of the int64 at an address."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def pause(typing):
    """Tell the processor that this thread waits."""

    def generate(context, builder, signature, args):
        if platform.machine() in _PAUSES:
            name, numbers = _PAUSES[platform.machine()]
            kind = ir.FunctionType(ir.VoidType(), [_I32] * len(numbers))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [_I32(number) for number in numbers])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def give_way(typing):
    """Let another thread run on this core."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(_I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def prefetch(typing, address):
    """Start to read the cache line at an address. It will be needed soon."""

    def generate(context, builder, signature, args):
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), *[_I32] * 3])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        builder.call(function, [pointer, _I32(0), _I32(3), _I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def call(typing, address, arguments):
    """Call the function at `address` with a tuple of int64 numbers.

    The function returns nothing.
    """

    def generate(context, builder, signature, args):
        values = cgutils.unpack_tuple(builder, args[1])
        kind = ir.FunctionType(ir.VoidType(), [value.type for value in values])
        builder.call(builder.inttoptr(args[0], kind.as_pointer()), values)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


@inside
def meet(counter, workers, meetings):
    """Wait until all workers have called this for the `meetings`th time.

    Returns the number of the next meeting.
    """
    if workers > 1:
        arrive(counter)
        waited = 0
        while arrivals(counter) < workers * meetings:
            waited += 1
            if waited < _SPINS:
                pause()
            else:
                give_way()
    return meetings + 1
