"""Register tiles of matrix products, for numba. A compiler does not find them by itself.

Everything lies in one flat float32 array. A matrix is an offset into it, with strides. A tile keeps
its sums in vector registers while it walks over the terms. Each element is the sum of the same
terms in the same order, whatever the tile's shape. So results do not depend on how a product is cut
into tiles, or on the number of threads.
"""

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

_MANY = bool(binding.get_host_cpu_features().get("avx512f"))  # True: 32 vector registers. False: 16
# znver4 computes 512 bits in two halves, so they gain nothing.
_HALVED = binding.get_host_cpu_name() == "znver4"
LANES = 16 if _MANY and not _HALVED else 8  # floats of a vector
# Rows of a tile, and its columns in vectors. The registers hold so many sums beside the operands.
ROWS, COLUMNS = 4, 3 if not _MANY else 5 if _HALVED else 4

_I64, _F32 = ir.IntType(64), ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)


def pointer(context, builder, signature, args, position, offset):
    """The address of element `offset` of the float32 array in argument number `position`."""
    array = context.make_array(signature.args[position])(context, builder, args[position])
    return builder.gep(array.data, [offset])


def _load(builder, pointer, kind=_VECTOR):
    return builder.load(builder.bitcast(pointer, kind.as_pointer()), align=4)


def _store(builder, value, pointer):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=4)


def _splat(builder, scalar):
    single = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), scalar, ir.IntType(32)(0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(single, ir.Constant(_VECTOR, ir.Undefined), zeros)


def _multiply_add(builder, a, b, c):
    kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
    name = f"llvm.fmuladd.v{LANES}f32"
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, [a, b, c])


def _loop(builder, count, values, body):
    """`values` after `count` rounds of `body(index, values) -> values`. They stay in registers."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(_I64)
    index.add_incoming(_I64(0), before)
    phis = [builder.phi(value.type) for value in values]
    for phi, value in zip(phis, values):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", index, count), inside, after)
    builder.position_at_end(inside)
    results = body(index, phis)
    index.add_incoming(builder.add(index, _I64(1)), builder.block)
    for phi, result in zip(phis, results):
        phi.add_incoming(result, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return phis


def outer_tile(rows: int, columns: int):
    """A numba function that computes c[r, v] = (c[r, v] if add else 0) + Σ_j a[r, j] b[j, v].

    c has `rows` rows of `columns` vectors. a is read by scalars with both strides, b and c by
    vectors. w is the flat array. The function is
    f(w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add).
    """

    @intrinsic
    def tile(typing, w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add):
        def generate(context, builder, signature, args):
            _, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add = args
            at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
            targets = [
                at(builder.add(c, builder.add(builder.mul(_I64(r), stride_cr), _I64(v * LANES))))
                for r in range(rows)
                for v in range(columns)
            ]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)
            lefts = [at(builder.add(a, builder.mul(_I64(r), stride_ar))) for r in range(rows)]
            right = at(b)

            def body(j, sums):
                step, line = builder.mul(j, stride_aj), builder.mul(j, stride_bj)
                base = builder.gep(right, [line])
                vectors = [
                    _load(builder, builder.gep(base, [_I64(v * LANES)])) for v in range(columns)
                ]
                result = []
                for r, left in enumerate(lefts):
                    scalar = _splat(builder, builder.load(builder.gep(left, [step])))
                    for v, vector in enumerate(vectors):
                        result.append(_multiply_add(builder, scalar, vector, sums[r * columns + v]))
                return result

            sums = _loop(builder, terms, [zero] * (rows * columns), body)
            with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (then, otherwise):
                with then:
                    for value, target in zip(sums, targets):
                        _store(builder, builder.fadd(_load(builder, target), value), target)
                with otherwise:
                    for value, target in zip(sums, targets):
                        _store(builder, value, target)
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 9), generate

    return tile


def dot_tile(rows: int, columns: int):
    """A numba function that computes c[r, k] = Σ_n a[r, n] b[k, n], for whole vectors of n.

    It is f(w, a, stride_ar, b, stride_bk, c, stride_cr, vectors). w is the flat array.
    """

    @intrinsic
    def tile(typing, w, a, stride_ar, b, stride_bk, c, stride_cr, vectors):
        def generate(context, builder, signature, args):
            _, a, stride_ar, b, stride_bk, c, stride_cr, vectors = args
            at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
            lefts = [at(builder.add(a, builder.mul(_I64(r), stride_ar))) for r in range(rows)]
            rights = [at(builder.add(b, builder.mul(_I64(k), stride_bk))) for k in range(columns)]
            zero = ir.Constant(_VECTOR, [0.0] * LANES)

            def body(j, sums):
                offset = builder.mul(j, _I64(LANES))
                x = [_load(builder, builder.gep(left, [offset])) for left in lefts]
                y = [_load(builder, builder.gep(right, [offset])) for right in rights]
                return [
                    _multiply_add(builder, x[r], y[k], sums[r * columns + k])
                    for r in range(rows)
                    for k in range(columns)
                ]

            sums = _loop(builder, vectors, [zero] * (rows * columns), body)
            for r in range(rows):
                line = at(builder.add(c, builder.mul(_I64(r), stride_cr)))
                for k in range(columns):
                    total = _sum(builder, sums[r * columns + k])
                    builder.store(total, builder.gep(line, [_I64(k)]), align=4)
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 7), generate

    return tile


@intrinsic
def scale_octets(typing, w, to, address, vectors, scale, shift):
    """w[to + i] = scale · pixel + shift, for `vectors` vectors of bytes at an address."""

    def generate(context, builder, signature, args):
        _, to, address, vectors, scale, shift = args
        target = pointer(context, builder, signature, args, 0, to)
        octets = builder.inttoptr(address, ir.IntType(8).as_pointer())
        factor, addend = _splat(builder, scale), _splat(builder, shift)

        def body(j, _):
            at, kind = builder.mul(j, _I64(LANES)), ir.VectorType(ir.IntType(8), LANES)
            pixels = builder.bitcast(builder.gep(octets, [at]), kind.as_pointer())
            values = builder.uitofp(builder.load(pixels, align=1), _VECTOR)
            values = builder.fadd(builder.fmul(values, factor), addend)
            _store(builder, values, builder.gep(target, [at]))
            return ()

        _loop(builder, vectors, (), body)
        return context.get_dummy_value()

    kinds = types.int64, types.int64, types.int64, types.float32, types.float32
    return types.void(w, *kinds), generate


def _sum(builder, vector):
    """The sum of a vector's lanes. Each round adds the upper half to the lower."""
    undefined, index = ir.Undefined, ir.IntType(32)
    count = LANES
    while count > 1:
        count //= 2
        kind = ir.VectorType(index, count)
        low, high = (
            builder.shuffle_vector(
                vector,
                ir.Constant(vector.type, undefined),
                ir.Constant(kind, list(range(start, start + count))),
            )
            for start in (0, count)
        )
        vector = builder.fadd(low, high)
    return builder.extract_element(vector, index(0))
