"""The functions that the tables' scalars call (`tl.exp`, `tl.where`, …), for float32, by numba.

They have no branches and stay in float32. So a loop over them becomes vector instructions.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .bits import of_type

_f = np.float32
_LOG2E, _LN2_HIGH, _LN2_LOW = _f(1.44269504), _f(0.693359375), _f(-2.12194440e-4)
_INFINITE = _f(np.inf)
INSTEAD: dict[Any, Any] = {}  # no scalar needs another formula in float32
_LARGEST, _SMALLEST = _f(88.8), _f(-104.0)  # beyond these, exp is infinite or 0


_power_of_two, _bits, _of_bits = of_type(np.dtype(np.float32))


@intrinsic
def _nearest(typing, x):
    """The nearest whole number, as float32."""

    def generate(context, builder, signature, args):
        return builder.call(
            builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()]), [args[0]]
        )

    return types.float32(types.float32), generate


@njit(forceinline=True)
def exp(x):
    """e ** x, to two units in the last place. It is 2ⁿ · e ** r with |r| <= ln 2 / 2."""
    x = _f(x)
    clipped = _LARGEST if x > _LARGEST else x
    clipped = _SMALLEST if clipped < _SMALLEST else clipped
    n = _nearest(clipped * _LOG2E)
    r = clipped - n * _LN2_HIGH - n * _LN2_LOW
    q = _f(1.9875691500e-4)
    q = q * r + _f(1.3981999507e-3)
    q = q * r + _f(8.3334519073e-3)
    q = q * r + _f(4.1665795894e-2)
    q = q * r + _f(1.6666665459e-1)
    q = q * r + _f(5.0000001201e-1)
    q = q * r * r + r + _f(1.0)
    whole = n if n == n else _f(0.0)  # NaN cannot become an int
    # There are two factors, because 2 ** 128 and 2 ** -140 are no normal floats.
    half = np.int32(whole) >> np.int32(1)
    return q * _power_of_two(np.int32(half)) * _power_of_two(np.int32(np.int32(whole) - half))


@njit(forceinline=True)
def abs(x):
    """|x|."""
    return math.fabs(x)


@njit(forceinline=True)
def where(condition, a, b):
    """a where the condition holds, else b."""
    return a if condition else b


@njit(forceinline=True)
def sqrt(x):
    """√x."""
    return math.sqrt(x)


@njit(forceinline=True)
def log(x):
    """ln x, to two units in the last place. x is 2ⁿ (1 + f) with √½ <= 1 + f < √2."""
    x = _f(x)
    subnormal = x < _f(1.17549435e-38)
    bits = _bits(x * _f(8388608.0) if subnormal else x)
    n = np.int32(np.int32(bits - np.int32(0x3F3504F3)) >> np.int32(23))
    f = _of_bits(np.int32(bits - np.int32(n << np.int32(23)))) - _f(1.0)
    e = _f(n) - (_f(23.0) if subnormal else _f(0.0))
    q = _f(7.0376836292e-2)
    q = q * f + _f(-1.1514610310e-1)
    q = q * f + _f(1.1676998740e-1)
    q = q * f + _f(-1.2420140846e-1)
    q = q * f + _f(1.4249322787e-1)
    q = q * f + _f(-1.6668057665e-1)
    q = q * f + _f(2.0000714765e-1)
    q = q * f + _f(-2.4999993993e-1)
    q = q * f + _f(3.3333331174e-1)
    s = f * f
    y = f + (q * f * s + e * _LN2_LOW - _f(0.5) * s) + e * _LN2_HIGH
    y = y if x < _INFINITE else x  # x is infinite or NaN
    y = y if x != _f(0.0) else -_INFINITE
    return y if not x < _f(0.0) else _f(np.nan)


@njit(forceinline=True)
def maximum(a, b):
    """The larger of two."""
    return a if a > b else b


@njit(forceinline=True)
def minimum(a, b):
    """The smaller of two."""
    return a if a < b else b


@njit(forceinline=True)
def erf(x):
    """The error function. On [-4, 4] it is a quotient of polynomials, and beyond it is ±1."""
    x = _f(x)
    c = _f(4.0) if x > _f(4.0) else x
    c = _f(-4.0) if c < _f(-4.0) else c
    s = c * c
    p = _f(-2.72614225801306e-10)
    p = p * s + _f(2.77068142495902e-08)
    p = p * s + _f(-2.10102402082508e-06)
    p = p * s + _f(-5.69250639462346e-05)
    p = p * s + _f(-7.34990630326855e-04)
    p = p * s + _f(-2.95459980854025e-03)
    p = p * s + _f(-1.60960333262415e-02)
    q = _f(-1.45660718464996e-05)
    q = q * s + _f(-2.13374055278905e-04)
    q = q * s + _f(-1.68282697438203e-03)
    q = q * s + _f(-7.37332916720468e-03)
    q = q * s + _f(-1.42647390514189e-02)
    return c * p / q
