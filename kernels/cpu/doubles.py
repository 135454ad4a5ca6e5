"""The functions that the tables' scalars call (`tl.exp`, `tl.where`, …), for float64, by numba.

They are those of `language`, with more terms. Errors are a few units in the last place.
"""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .. import activations
from .bits import of_type
from .language import abs, maximum, minimum, sqrt, where

__all__ = ["INSTEAD", "abs", "erf", "exp", "expm1", "log", "maximum", "minimum", "sqrt", "where"]

_LOG2E = 1.4426950408889634
# ln 2 in two parts. n times the first one is exact, because it ends in 32 zero bits.
_LN2_HIGH, _LN2_LOW = 0.6931471803691238, 1.9082149292705877e-10
_LARGEST, _SMALLEST = 709.8, -746.0  # beyond these, exp is infinite or 0
_LEAST, _RAISED = 2.2250738585072014e-308, 54.0  # the smallest normal number


_power_of_two, _bits, _of_bits = of_type(np.dtype(np.float64))


@intrinsic
def _whole(typing, x):
    """The nearest whole number, as int64 and as float64. |x| is below 2 ** 51.

    The sum with 1.5 · 2 ** 52 has the whole number in its last bits. So no instruction has to turn
    a float64 into an int64, which few processors can do in vectors.
    """

    def generate(context, builder, signature, args):
        i64, f64 = ir.IntType(64), ir.DoubleType()
        magic = f64(6755399441055744.0)
        sum_ = builder.fadd(args[0], magic)
        bits = builder.sub(builder.bitcast(sum_, i64), builder.bitcast(magic, i64))
        return context.make_tuple(builder, signature.return_type, [bits, builder.fsub(sum_, magic)])

    return types.Tuple([types.int64, types.float64])(types.float64), generate


@njit(forceinline=True)
def _parts(x):
    """(n, q) with e ** x = 2 ** n · (1 + q), and |q| < 0.42."""
    clipped = _LARGEST if x > _LARGEST else x
    clipped = _SMALLEST if clipped < _SMALLEST else clipped
    number = clipped if clipped == clipped else 0.0  # NaN has no whole number
    n, whole = _whole(number * _LOG2E)
    r = clipped - whole * _LN2_HIGH - whole * _LN2_LOW
    # Σ rⁿ / n! up to n = 13. |r| is at most ln 2 / 2, so what is left out is below 5e-18.
    q = 1.0 / 6227020800.0
    q = q * r + 1.0 / 479001600.0
    q = q * r + 1.0 / 39916800.0
    q = q * r + 1.0 / 3628800.0
    q = q * r + 1.0 / 362880.0
    q = q * r + 1.0 / 40320.0
    q = q * r + 1.0 / 5040.0
    q = q * r + 1.0 / 720.0
    q = q * r + 1.0 / 120.0
    q = q * r + 1.0 / 24.0
    q = q * r + 1.0 / 6.0
    q = q * r + 0.5
    return n, q * r * r + r


@njit(forceinline=True)
def exp(x):
    """e ** x."""
    n, q = _parts(np.float64(x))
    # There are two factors, because 2 ** 1024 and 2 ** -1074 are no normal floats.
    half = n >> 1
    return (1.0 + q) * _power_of_two(half) * _power_of_two(n - half)


@njit(forceinline=True)
def expm1(x):
    """e ** x - 1 for x below 700, without the difference's cancellation near 0."""
    n, q = _parts(np.float64(x))
    half = n >> 1
    power = _power_of_two(half) * _power_of_two(n - half)
    return q * power + (power - 1.0)


@njit(forceinline=True)
def log(x):
    """ln x. x is 2ⁿ (1 + f) with √½ <= 1 + f < √2."""
    x = np.float64(x)
    subnormal = x < _LEAST
    bits = _bits(x * 2.0**54 if subnormal else x)
    n = (bits - 0x3FE6A09E667F3BCD) >> 52
    f = _of_bits(bits - (n << 52)) - 1.0
    e = np.float64(n) - (_RAISED if subnormal else 0.0)
    # With s = f / (2 + f), ln (1 + f) = 2 artanh s = 2 s (1 + s² / 3 + s⁴ / 5 + …). |s| is at most
    # 0.172, so what is left out is below 1e-18.
    s = f / (2.0 + f)
    z = s * s
    q = 1.0 / 23.0
    q = q * z + 1.0 / 21.0
    q = q * z + 1.0 / 19.0
    q = q * z + 1.0 / 17.0
    q = q * z + 1.0 / 15.0
    q = q * z + 1.0 / 13.0
    q = q * z + 1.0 / 11.0
    q = q * z + 1.0 / 9.0
    q = q * z + 1.0 / 7.0
    q = q * z + 1.0 / 5.0
    q = q * z + 1.0 / 3.0
    y = 2.0 * s + (2.0 * s * z * q + e * _LN2_LOW) + e * _LN2_HIGH
    y = y if x < np.inf else x  # x is infinite or NaN
    y = y if x != 0.0 else -np.inf
    return y if not x < 0.0 else np.nan


@njit(forceinline=True)
def erf(x):
    """The error function."""
    return math.erf(x)


def _tanh(z):
    """tanh. The table's polynomial near 0 is exact to float32 only."""
    e = expm1(-2.0 * abs(z))  # tanh |z| = (1 - e ** -2|z|) / (1 + e ** -2|z|)
    t = -e / (2.0 + e)
    return where(z < 0, -t, t)


INSTEAD: dict[Any, Any] = {activations.tanh: _tanh}  # {a scalar of a table: its formula here}
