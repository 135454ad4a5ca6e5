"""Floats and their bits, for functions that numba compiles."""

from typing import Any, NamedTuple

import numpy as np
from numba import from_dtype
from numba.extending import intrinsic


class Bits(NamedTuple):
    """The three functions of a float type. Its bits are an integer of the same width."""

    power_of_two: Any  # n -> 2 ** n, which must be a normal number
    of: Any  # x -> its bits
    number: Any  # bits -> x


def of_type(kind: np.dtype) -> Bits:
    """The functions of float32 or float64."""
    facts = np.finfo(kind)
    number, whole = from_dtype(kind), from_dtype(np.dtype(f"int{facts.bits}"))

    @intrinsic
    def power_of_two(typing, exponent):
        def generate(context, builder, signature, args):
            integer = context.get_value_type(whole)
            biased = builder.add(args[0], integer(facts.maxexp - 1))
            bits = builder.shl(biased, integer(facts.nmant))
            return builder.bitcast(bits, context.get_value_type(number))

        return number(whole), generate

    @intrinsic
    def of(typing, x):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(whole))

        return whole(number), generate

    @intrinsic
    def with_bits(typing, bits):
        def generate(context, builder, signature, args):
            return builder.bitcast(args[0], context.get_value_type(number))

        return number(whole), generate

    return Bits(power_of_two, of, with_bits)
