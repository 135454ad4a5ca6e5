"""Rows of the tables of `kernels`, compiled for the CPU.

A row's scalars are the `@triton.jit` functions that the GPU runs. Here numba compiles the same
Python code, with `language` in the place of triton's own functions. The result is a loop over an
array, which the compiled epoch calls by its address. So a formula is written once, and another
network of the same rows compiles nothing. Numba keeps its compiled code on disk. The name of the
file contains a digest of the code, so an edited row is compiled again.
"""

import contextlib
import functools
import hashlib
import math
import os
import pickle
import types as python_types
from pathlib import Path
from typing import Any

import numpy as np
from numba import carray, cfunc, from_dtype, njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.registry import cpu_target
from numba.extending import intrinsic

from .. import activations
from . import doubles, language
from .waiting import inside, number

# With numpy's error model, a division by zero raises no exception.
_OPTIONS = {"error_model": "numpy", "nogil": True}
# The functions that scalars call, for each dtype of a network that the compiled code serves.
LANGUAGES = {np.dtype(np.float32): language, np.dtype(np.float64): doubles}


def pointer_to(kind: np.dtype) -> Any:
    """Numba's type of a pointer to numbers of this dtype."""
    return types.CPointer(from_dtype(kind))


def _plain(value, kind):
    """A constant, with numbers of this dtype for Python's floats, which would make all float64."""
    if isinstance(value, float):
        return kind.type(value)
    if isinstance(value, tuple):
        return tuple(_plain(each, kind) for each in value)
    return value


class Scalar:
    """A jit function of a table, compiled by numba for numbers of a dtype.

    `text` holds all its code, for the digest.
    """

    def __init__(self, function: Any, kind: np.dtype):
        plain, known_language = getattr(function, "fn", function), LANGUAGES[kind]
        code = plain.__code__
        # co_consts[0] may be the docstring. Constants of all kinds keep their places.
        code = code.replace(co_consts=tuple(_plain(each, kind) for each in code.co_consts))
        known: dict[str, Any] = {"__builtins__": __builtins__}
        text = [code.co_code.hex(), repr(code.co_consts)]
        for name in code.co_names:
            if name not in plain.__globals__:
                continue  # the name of an attribute
            value = plain.__globals__[name]
            if isinstance(value, python_types.ModuleType):
                value = known_language  # triton.language, under whatever name
            elif hasattr(value, "fn"):
                inner = scalar(value, kind)
                text.append(inner.text)
                value = inner.compiled
            elif hasattr(value, "value"):  # a constexpr
                value = _plain(value.value, kind)
            text.append(f"{name}={value!r}" if not callable(value) else name)
            known[name] = value
        self.text: str = "\n".join([*text, *code.co_names])
        compiler: Any = njit  # Any, because the stubs of njit want each option by name
        self.compiled: Any = compiler(
            python_types.FunctionType(code, known, plain.__name__), forceinline=True, **_OPTIONS
        )


@functools.cache
def scalar(function: Any, kind: np.dtype) -> Scalar:
    """The `Scalar` of a row's jit function for numbers of this dtype, made once."""
    return Scalar(LANGUAGES[kind].INSTEAD.get(function, function), kind)


@functools.cache
def sources() -> str:
    """A digest of this package's modules. With it, results of other code are not used.

    `__init__` is left out, because no part of it is compiled.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def named(function: Any, *texts: str, **known: Any) -> Any:
    """A copy of `function` with the globals `known`. Its name contains a digest of the code.

    texts: other code that the digest covers, besides this package's.
    """
    digest = hashlib.sha256("\n".join((sources(), *texts)).encode()).hexdigest()[:16]
    made = python_types.FunctionType(
        function.__code__, {**function.__globals__, **known}, function.__name__
    )
    made.__qualname__ = f"{function.__name__}_{digest}"
    made.__module__ = function.__module__
    return made


def cached(compiler: Any, function: Any, *arguments: Any, **options: Any) -> Any:
    """`compiler(…)(function)`. Its result is kept on disk if there is a place to write to."""
    _forget_if_damaged(function)
    try:
        return compiler(*arguments, cache=True, **options)(function)
    except RuntimeError as error:
        if "no locator" not in str(error):
            raise
        return compiler(*arguments, **options)(function)


def _forget_if_damaged(function: Any) -> None:
    """Empty the cache of a function if its files cannot be read.

    numba itself would raise each time. A machine that loses its power may leave files that are cut
    off, or that are zeros.
    """
    try:
        cache = FunctionCache(function)
    except RuntimeError:  # there is no place to write to
        return
    files = cache._cache_file
    try:
        for name in files._load_index().values():
            with Path(files._cache_path, name).open("rb") as file:
                file.seek(-1, os.SEEK_END)
                if file.read() != pickle.STOP:  # to load it would take longer
                    raise pickle.UnpicklingError
    except FileNotFoundError:  # another process may be about to write it
        return
    except Exception:  # a damaged pickle may raise nearly any error
        with contextlib.suppress(OSError):
            cache.flush()


def is_kept(function: Any) -> bool:
    """True if the code of a function of `named` is on disk, compiled for this processor."""
    try:
        # A function that cannot be kept has no such file.
        files = FunctionCache(function)._cache_file
        processor = cpu_target.target_context.codegen().magic_tuple()
        return any(
            key[1] == processor and Path(files._cache_path, name).exists()
            for key, name in files._load_index().items()
        )
    except Exception:  # a damaged file, or a numba that stores its index otherwise
        return False


def address(function: Any, signature: Any, kind: np.dtype, *texts: str, **known: Any) -> "Compiled":
    """A function of this signature, compiled or read from disk. texts, known: as in `named`.

    kind: the dtype of the numbers that it computes with.
    """
    made = named(function, kind.name, *texts, **known)
    return Compiled(cached(cfunc, made, signature, **_OPTIONS))


class Compiled:
    """Compiled code, and the address to call it by. The function must outlive the address."""

    def __init__(self, function: Any):
        self.function, self.address = function, function.address


# Each loop below is compiled with the row's function, or with `exponentials`.
SCALAR = EXPONENTIALS = None


def _forward(z_ptr, y_ptr, n):
    z, y = carray(z_ptr, (n,)), carray(y_ptr, (n,))
    for i in range(n):
        y[i] = SCALAR(z[i])


def _backward(d_ptr, s_ptr, n):
    d, s = carray(d_ptr, (n,)), carray(s_ptr, (n,))
    for i in range(n):
        d[i] = SCALAR(d[i], s[i])


@functools.cache
def activation(row: Any, kind: np.dtype) -> tuple[Compiled, Compiled]:
    """Two loops over n elements, the forward and the backward of an activation.

    f(z, y, n) writes y = act(z). f(d, s, n) multiplies d by act'(z), computed from s = y or z.
    """
    floats = pointer_to(kind)
    signature = types.void(floats, floats, types.int64)
    forward, backward = scalar(row.forward, kind), scalar(row.backward, kind)
    return (
        address(_forward, signature, kind, forward.text, SCALAR=forward.compiled),
        address(_backward, signature, kind, backward.text, SCALAR=backward.compiled),
    )


@intrinsic
def _gather(typing, pointer, stride, i, like):
    """(pointer[i], pointer[i + stride], …), with as many elements as `like`."""

    def generate(context, builder, signature, args):
        first, offset, index, _ = args
        values = []
        for _ in range(signature.args[3].count):
            values.append(builder.load(builder.gep(first, [index]), align=4))
            index = builder.add(index, offset)
        return cgutils.pack_array(builder, values) if values else context.get_dummy_value()

    return like(pointer, types.int64, types.int64, like), generate


@intrinsic
def _scatter(typing, pointer, stride, i, values):
    """Write values to pointer[i], pointer[i + stride], …, in the pointer's dtype."""
    count = len(values)

    def generate(context, builder, signature, args):
        first, offset, index, packed = args
        for position, value in enumerate(cgutils.unpack_tuple(builder, packed, count)):
            kind = signature.args[3][position]
            value = context.cast(builder, value, kind, pointer.dtype)
            builder.store(value, builder.gep(first, [index]), align=4)
            index = builder.add(index, offset)
        return context.get_dummy_value()

    return types.void(pointer, types.int64, types.int64, values), generate


STATES = NUMBERS = ()  # zeros, as many as the rule has states and numbers


def _rule(p_ptr, g_ptr, s_ptr, stride, n_ptr, n):
    p, g = carray(p_ptr, (n,)), carray(g_ptr, (n,))
    numbers = _gather(n_ptr, 1, 0, NUMBERS)
    for i in range(n):
        p[i], states = SCALAR(p[i], g[i], _gather(s_ptr, stride, i, STATES), numbers)
        _scatter(s_ptr, stride, i, states)


@functools.cache
def rule(row: Any, kind: np.dtype) -> Compiled:
    """A loop over n elements that updates p and its states by one step.

    It is f(p, g, states, stride of states, numbers, n).
    """
    floats = pointer_to(kind)
    signature = types.void(floats, floats, floats, types.int64, floats, types.int64)
    update, zero = scalar(row.update, kind), kind.type(0.0)
    known = {"STATES": (zero,) * len(row.states), "NUMBERS": (zero,) * len(row.columns)}
    texts = (update.text, repr(known))
    return address(_rule, signature, kind, *texts, SCALAR=update.compiled, **known)


def _elementwise(y_ptr, t_ptr, d_ptr, loss_ptr, parameter_ptr, rows, classes, pitch):
    """One loop over all outputs of all rows, because it becomes vector instructions."""
    n = rows * pitch
    y, t, d = carray(y_ptr, (n,)), carray(t_ptr, (n,)), carray(d_ptr, (n,))
    losses, parameters = carray(loss_ptr, (rows,)), carray(parameter_ptr, (n,))
    for i in range(n):
        loss, d[i] = SCALAR(y[i], t[i], parameters[i])
        t[i] = loss  # t is free here, as each batch writes its targets
    for r in range(rows):
        total = number(t, 0.0)
        for c in range(classes):
            total += t[r * pitch + c]
        losses[r] = total


@functools.cache
def exponentials(kind: np.dtype) -> Any:
    """A function for compiled code: d = exp(y - largest), with the largest number of each row.

    It is f(y, d, every, classes). y and d are (rows, pitch), of which `classes` columns count.
    every: d as one row, because a loop over all of it becomes vector instructions.
    """
    exp = LANGUAGES[kind].exp

    @inside
    def fill(y, d, every, classes):
        rows, pitch = y.shape
        for r in range(rows):
            largest = y[r, 0]
            for c in range(1, classes):
                largest = max(largest, y[r, c])
            for c in range(classes):
                d[r, c] = y[r, c] - largest
            for c in range(classes, pitch):
                d[r, c] = 0.0
        for i in range(rows * pitch):
            every[i] = exp(every[i])

    return fill


@inside
def largest_and_sum(y: Any, d: Any, r: int, classes: int) -> Any:
    """The largest number of row r of y, and the sum of the row's `exponentials`."""
    largest, total = y[r, 0], d[r, 0]
    for c in range(1, classes):
        largest = max(largest, y[r, c])
        total += d[r, c]
    return largest, total


def _softmax(y_ptr, t_ptr, d_ptr, loss_ptr, parameter_ptr, rows, classes, pitch):
    """The loss -Σ_c t_c log p_c with p = softmax(y), and its gradient p Σ t - t.

    It is the only loss without a scalar.
    """
    y, t = carray(y_ptr, (rows, pitch)), carray(t_ptr, (rows, pitch))
    d, losses = carray(d_ptr, (rows, pitch)), carray(loss_ptr, (rows,))
    EXPONENTIALS(y, d, carray(d_ptr, (rows * pitch,)), classes)
    for r in range(rows):
        largest, s = largest_and_sum(y, d, r, classes)
        high = number(y, math.log(s)) + largest
        total, given = number(y, 0.0), number(y, 0.0)
        for c in range(classes):
            given += t[r, c]
        for c in range(classes):
            if t[r, c] != 0:  # where t is 0, an output may be -inf
                total += t[r, c] * (high - y[r, c])
            d[r, c] = d[r, c] / s * given - t[r, c]
        losses[r] = total


@functools.cache
def loss(row: Any, kind: np.dtype) -> Compiled:
    """A function that writes the losses of rows and ∂loss/∂y.

    It is f(y, t, d, losses, parameters, rows, classes, pitch). parameters: one for each output of
    each row, as y. The losses of single outputs may replace t.
    """
    signature = types.void(*[pointer_to(kind)] * 5, *[types.int64] * 3)
    if row.scalar is None:
        return address(_softmax, signature, kind, EXPONENTIALS=exponentials(kind))
    formula = scalar(row.scalar, kind)
    return address(_elementwise, signature, kind, formula.text, SCALAR=formula.compiled)


def of(spec: Any, kind: np.dtype) -> tuple[Compiled, ...]:
    """All functions of a training in this dtype: hidden and output activation, loss, rule."""
    acts = (activations.get(name) for name in (spec.activation, spec.output_activation))
    both = [activation(row, kind) for row in acts]
    return (*both[0], *both[1], loss(spec.loss, kind), rule(spec.rule, kind))
