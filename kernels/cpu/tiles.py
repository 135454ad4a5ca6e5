"""Register tiles of matrix products, for numba. A compiler does not find them by itself.

Everything lies in one flat array, float32 or float64. A matrix is an offset into it, with strides.
A tile keeps its sums in vector registers while it walks over the terms. Each element is the sum of
the same terms in the same order, whatever the tile's shape. So results do not depend on how a
product is cut into tiles, or on the number of threads.

The array's dtype decides how many numbers a vector holds. Tiles are as many vectors for both.
"""

from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

# The processor that numba compiles for. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES can name another one.
_, _NAME, _FEATURES = cpu_target.target_context.codegen().magic_tuple()
_MANY = "+avx512f" in _FEATURES.split(",")  # True: 32 vector registers of 64 bytes
# znver4 computes 512 bits in two halves, so they gain nothing.
_HALVED = _NAME == "znver4"
VECTOR = 64 if _MANY and not _HALVED else 32  # bytes of a vector
# Rows of a tile, and its columns in vectors. The registers hold so many sums beside the operands.
ROWS, COLUMNS = 4, 3 if not _MANY else 5 if _HALVED else 4
# Vectors of the widest tile of one row. It reads b from memory and needs one register for a.
WIDEST = 13
LINES = 8  # most rows of `patch_lines`

_I64, _I32, _I8 = ir.IntType(64), ir.IntType(32), ir.IntType(8)


def _size(kind):
    """The bytes of a number of numba's type `kind`."""
    return kind.bitwidth // 8


@intrinsic
def lanes(typing, w):
    """The number of elements of the array w that a vector holds."""

    def generate(context, builder, signature, args):
        return _I64(VECTOR // _size(signature.args[0].dtype))

    return types.int64(w), generate


@intrinsic
def size_of(typing, w):
    """The bytes of an element of the array w."""

    def generate(context, builder, signature, args):
        return _I64(_size(signature.args[0].dtype))

    return types.int64(w), generate


def _vector(context, signature):
    """The type of a vector of elements of the flat array, which is argument number 0."""
    kind = signature.args[0].dtype
    return ir.VectorType(context.get_value_type(kind), VECTOR // _size(kind))


def pointer(context, builder, signature, args, position, offset):
    """The address of element `offset` of the array in argument number `position`."""
    array = context.make_array(signature.args[position])(context, builder, args[position])
    return builder.gep(array.data, [offset])


def _load(builder, pointer, kind, mask=None):
    """A vector from memory. Lanes outside the mask are 0, and their memory is not touched."""
    pointer = builder.bitcast(pointer, kind.as_pointer())
    if mask is None:
        return builder.load(pointer, align=4)
    arguments = pointer, _I32(4), mask, _zeros(kind)
    return builder.call(_masked(builder, "load", kind, arguments, kind), arguments)


def _store(builder, value, pointer, mask=None):
    """Write a vector, or those of its lanes that are in the mask."""
    pointer = builder.bitcast(pointer, value.type.as_pointer())
    if mask is None:
        builder.store(value, pointer, align=4)
    else:
        arguments = value, pointer, _I32(4), mask
        builder.call(_masked(builder, "store", value.type, arguments, ir.VoidType()), arguments)


def _masked(builder, action, kind, arguments, result):
    """LLVM's function that loads or stores a vector under a mask."""
    name = f"llvm.masked.{action}.v{kind.count}{kind.element.intrinsic_name}.p0"
    signature = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.module.globals.get(name) or ir.Function(builder.module, signature, name)


def _first_lanes(builder, count, kind):
    """A mask of the first `count` lanes of a vector."""
    lanes = ir.Constant(ir.VectorType(_I64, kind.count), list(range(kind.count)))
    return builder.icmp_signed("<", lanes, _splat(builder, count, lanes.type))


def _splat(builder, scalar, kind):
    undefined = ir.Constant(kind, ir.Undefined)
    single = builder.insert_element(undefined, scalar, _I32(0))
    zeros = ir.Constant(ir.VectorType(_I32, kind.count), [0] * kind.count)
    return builder.shuffle_vector(single, undefined, zeros)


def _zeros(kind):
    return ir.Constant(kind, [0.0] * kind.count)


def _multiply_add(builder, a, b, c):
    kind = ir.FunctionType(a.type, [a.type] * 3)
    name = f"llvm.fmuladd.v{a.type.count}{a.type.element.intrinsic_name}"
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


def _add_term(builder, lefts, step, base, sums, mask=None):
    """Generate sums[r, v] + left[r][step] · base[v], the next term of a tile's sums."""
    columns, kind = len(sums) // len(lefts), sums[0].type
    places = [_I64(v * kind.count) for v in range(columns)]
    vectors = [_load(builder, builder.gep(base, [place]), kind, mask) for place in places]
    result = []
    for r, left in enumerate(lefts):
        scalar = _splat(builder, builder.load(builder.gep(left, [step])), kind)
        for v, vector in enumerate(vectors):
            result.append(_multiply_add(builder, scalar, vector, sums[r * columns + v]))
    return result


def _outer(context, builder, signature, args, shape, count, listed=None):
    """Generate the code of a tile of outer products. shape = (rows, vectors).

    args: as in `outer_tile`. count: numbers of the last vector that exist, or None for all.
    listed: a pointer to the numbers j of the terms, int32, or None for all j from 0 on.
    """
    rows, columns = shape
    _, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add = args
    at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
    kind = _vector(context, signature)
    mask = None if count is None else _first_lanes(builder, count, kind)
    lines = [builder.add(c, builder.mul(_I64(r), stride_cr)) for r in range(rows)]
    targets = [
        at(builder.add(line, _I64(v * kind.count))) for line in lines for v in range(columns)
    ]
    lefts = [at(builder.add(a, builder.mul(_I64(r), stride_ar))) for r in range(rows)]
    right = at(b)

    def body(j, sums):
        if listed is not None:
            j = builder.zext(builder.load(builder.gep(listed, [j])), _I64)
        step, line = builder.mul(j, stride_aj), builder.mul(j, stride_bj)
        return _add_term(builder, lefts, step, builder.gep(right, [line]), sums, mask)

    sums = _loop(builder, terms, [_zeros(kind)] * (rows * columns), body)
    with builder.if_else(builder.icmp_signed("!=", add, _I64(0))) as (then, otherwise):
        with then:
            for value, target in zip(sums, targets):
                before = _load(builder, target, kind, mask)
                _store(builder, builder.fadd(before, value), target, mask)
        with otherwise:
            for value, target in zip(sums, targets):
                _store(builder, value, target, mask)
    return context.get_dummy_value()


def outer_tile(rows: int, columns: int):
    """A numba function that computes c[r, v] = (c[r, v] if add else 0) + Σ_j a[r, j] b[j, v].

    c has `rows` rows of `columns` vectors. a is read by scalars with both strides, b and c by
    vectors. w is the flat array. The function is
    f(w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add).
    """

    @intrinsic
    def tile(typing, w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add):
        def generate(context, builder, signature, args):
            return _outer(context, builder, signature, args, (rows, columns), None)

        return types.void(w, *[types.int64] * 9), generate

    return tile


def sparse_outer_tile(rows: int):
    """As an `outer_tile` of one column. The j of its terms are listed, as int32 at an address.

    It is f(w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add, listed).
    """

    @intrinsic
    def tile(typing, w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add, listed):
        def generate(context, builder, signature, args):
            listed = builder.inttoptr(args[-1], _I32.as_pointer())
            return _outer(context, builder, signature, args[:-1], (rows, 1), None, listed)

        return types.void(w, *[types.int64] * 10), generate

    return tile


def _listed_sums(builder, at, kind, shape, a, b, first, c, listed, terms):
    """Generate the code of a tile that walks over a list. shape = (rows, vectors of type kind).

    at: the pointer to an element of the flat array. a, b, first and c: an offset and its strides.
    """
    rows, columns = shape
    lefts = [at(builder.add(a[0], builder.mul(_I64(r), a[1]))) for r in range(rows)]
    right = at(b[0])

    def body(i, sums):
        j = builder.zext(builder.load(builder.gep(listed, [i])), _I64)
        step = builder.mul(j, a[2])
        return _add_term(builder, lefts, step, builder.gep(right, [builder.mul(j, b[1])]), sums)

    sums = _loop(builder, terms, [_zeros(kind)] * (rows * columns), body)
    for i, value in enumerate(sums):
        r, lane = _I64(i // columns), _I64(i % columns * kind.count)
        source = at(builder.add(builder.add(first[0], builder.mul(r, first[1])), lane))
        target = at(builder.add(builder.add(c[0], builder.mul(r, c[1])), lane))
        _store(builder, builder.fadd(_load(builder, source, kind), value), target)


def listed_tile(rows: int, columns: int):
    """A numba function that computes c[r, v] = first[r, v] + Σ_j a[r, j] b[j, v] over listed j.

    The list is `terms` int32 at the address `listed`. a, b and c are as in `outer_tile`, and first
    is like c. The function is f(w, listed, a, stride_ar, stride_aj, b, stride_bj, first, stride_fr,
    c, stride_cr, terms).
    """

    @intrinsic
    def tile(typing, w, listed, a, stride_ar, stride_aj, b, stride_bj, first, stride_fr, c, cr, n):
        def generate(context, builder, signature, args):
            listed = builder.inttoptr(args[1], _I32.as_pointer())
            at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
            kind, operands = _vector(context, signature), (args[2:5], args[5:7], args[7:9])
            to, terms = args[9:11], args[11]
            _listed_sums(builder, at, kind, (rows, columns), *operands, to, listed, terms)
            return context.get_dummy_value()

        return types.void(w, *[types.int64] * 11), generate

    return tile


@intrinsic
def listed_row(typing, w, listed, a, stride_aj, b, stride_bj, first, c, terms, vectors):
    """As a `listed_tile` of one row, of any number of vectors from 1 to WIDEST."""

    def generate(context, builder, signature, args):
        listed = builder.inttoptr(args[1], _I32.as_pointer())
        at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
        no, kind = _I64(0), _vector(context, signature)
        operands = (args[2], no, args[3]), args[4:6], (args[6], no), (args[7], no)
        after = builder.append_basic_block("after")
        choice = builder.switch(args[9], after)
        for columns in range(1, WIDEST + 1):
            block = builder.append_basic_block("tile")
            choice.add_case(_I64(columns), block)
            builder.position_at_end(block)
            _listed_sums(builder, at, kind, (1, columns), *operands, listed, args[8])
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 9), generate


@intrinsic
def mark(typing, w, bits, stride, at, octets):
    """Write a byte for each eight numbers from w[at] on. Its bit i is 1 if number i is not 0.

    The bytes begin at the address `bits`, with this stride.
    """

    def generate(context, builder, signature, args):
        _, bits, stride, at, octets = args
        source = pointer(context, builder, signature, args, 0, at)
        target = builder.inttoptr(bits, _I8.as_pointer())
        eight = ir.VectorType(ir.IntType(signature.args[0].dtype.bitwidth), 8)

        def body(i, _):
            line = builder.gep(source, [builder.mul(i, _I64(8))])
            ones = builder.icmp_unsigned(
                "!=", _load(builder, line, eight), ir.Constant(eight, [0] * 8)
            )
            to = builder.gep(target, [builder.mul(i, stride)])
            builder.store(builder.bitcast(ones, _I8), to)
            return ()

        _loop(builder, octets, (), body)
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 4), generate


def _append(builder, table, listed, count, mask, start):
    """Append start + i to a list for each bit i of the mask. Returns the list's new length.

    It has no branches: it writes eight numbers, of which the list's length covers the first ones.
    """
    eight = ir.VectorType(_I32, 8)
    row = builder.gep(table, [builder.mul(builder.zext(mask, _I64), _I64(8))])
    places = builder.bitcast(row, ir.VectorType(_I8, 8).as_pointer())
    places = builder.zext(builder.load(places, align=8), eight)
    undefined = ir.Constant(eight, ir.Undefined)
    start = builder.insert_element(undefined, builder.trunc(start, _I32), _I32(0))
    start = builder.shuffle_vector(start, undefined, ir.Constant(eight, [0] * 8))
    to = builder.bitcast(builder.gep(listed, [count]), eight.as_pointer())
    builder.store(builder.add(start, places), to, align=4)
    return builder.add(count, builder.zext(builder.ctpop(mask), _I64))


@intrinsic
def list_inputs(typing, listed, bits, stride, octets, table):
    """List the inputs that are not 0 in a row of a batch, and return their number.

    bits: the address of the row's first byte, see `mark`. stride: from there to the next one. It
    writes int32 from the address `listed` on. table: the address of `products.OCTETS`.
    """

    def generate(context, builder, signature, args):
        listed, bits, stride, octets, table = args
        to, known = _pointers(builder, listed, table)
        source = builder.inttoptr(bits, _I8.as_pointer())

        def body(i, values):
            mask = builder.load(builder.gep(source, [builder.mul(i, stride)]))
            return [_append(builder, known, to, values[0], mask, builder.mul(i, _I64(8)))]

        return _loop(builder, octets, [_I64(0)], body)[0]

    return types.int64(*[types.int64] * 5), generate


@intrinsic
def list_rows(typing, listed, bits, chosen, octets, table):
    """List the rows of a batch in which one of the chosen inputs is not 0.

    bits: the address of the bytes of eight inputs, one for each row. chosen: a mask of the inputs.
    octets: how many times eight rows. listed, table: as in `list_inputs`. Returns their number.
    """

    def generate(context, builder, signature, args):
        listed, bits, chosen, octets, table = args
        to, known = _pointers(builder, listed, table)
        eight = ir.VectorType(_I8, 8)
        source = builder.inttoptr(bits, eight.as_pointer())
        undefined = ir.Constant(eight, ir.Undefined)
        only = builder.insert_element(undefined, builder.trunc(chosen, _I8), _I32(0))
        only = builder.shuffle_vector(only, undefined, ir.Constant(ir.VectorType(_I32, 8), [0] * 8))

        def body(i, values):
            found = builder.and_(builder.load(builder.gep(source, [i]), align=1), only)
            mask = builder.icmp_unsigned("!=", found, ir.Constant(eight, [0] * 8))
            start = builder.mul(i, _I64(8))
            return [_append(builder, known, to, values[0], builder.bitcast(mask, _I8), start)]

        return _loop(builder, octets, [_I64(0)], body)[0]

    return types.int64(*[types.int64] * 5), generate


def _pointers(builder, listed, table):
    return builder.inttoptr(listed, _I32.as_pointer()), builder.inttoptr(table, _I8.as_pointer())


def _dot(context, builder, signature, args, shape, count, listed=None):
    """Generate the code of a tile of dot products. shape = (rows, columns).

    args: as in `dot_tile`. count: numbers of a row that are behind its whole vectors, or None.
    listed: (pointer to the numbers of vectors, int32, how many) of the vectors to take, or None.
    """
    rows, columns = shape
    _, a, stride_ar, b, stride_bk, c, stride_cr, vectors = args
    at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
    lefts = [at(builder.add(a, builder.mul(_I64(r), stride_ar))) for r in range(rows)]
    rights = [at(builder.add(b, builder.mul(_I64(k), stride_bk))) for k in range(columns)]
    kind = _vector(context, signature)

    def body(j, sums, mask=None):
        offset = builder.mul(j, _I64(kind.count))
        x = [_load(builder, builder.gep(left, [offset]), kind, mask) for left in lefts]
        y = [_load(builder, builder.gep(right, [offset]), kind, mask) for right in rights]
        return [
            _multiply_add(builder, x[r], y[k], sums[r * columns + k])
            for r in range(rows)
            for k in range(columns)
        ]

    zeros = [_zeros(kind)] * (rows * columns)
    if listed is None:
        sums = _loop(builder, vectors, zeros, body)
    else:
        numbers, terms = listed
        number = lambda i: builder.zext(builder.load(builder.gep(numbers, [i])), _I64)  # noqa: E731
        sums = _loop(builder, terms, zeros, lambda i, sums: body(number(i), sums))
    if count is not None:
        sums = body(vectors, sums, _first_lanes(builder, count, kind))
    for r in range(rows):
        line = at(builder.add(c, builder.mul(_I64(r), stride_cr)))
        row = sums[r * columns : (r + 1) * columns]
        for k in range(0, columns - columns % 4, 4):
            _store(builder, _four_sums(builder, row[k : k + 4]), builder.gep(line, [_I64(k)]))
        for k in range(columns - columns % 4, columns):
            builder.store(_sum(builder, row[k]), builder.gep(line, [_I64(k)]), align=4)
    return context.get_dummy_value()


def dot_tile(rows: int, columns: int):
    """A numba function that computes c[r, k] = Σ_n a[r, n] b[k, n], for whole vectors of n.

    It is f(w, a, stride_ar, b, stride_bk, c, stride_cr, vectors). w is the flat array.
    """

    @intrinsic
    def tile(typing, w, a, stride_ar, b, stride_bk, c, stride_cr, vectors):
        def generate(context, builder, signature, args):
            return _dot(context, builder, signature, args, (rows, columns), None)

        return types.void(w, *[types.int64] * 7), generate

    return tile


def ragged_dot_tile(rows: int, columns: int):
    """As `dot_tile`. Each row has `count` more numbers behind its whole vectors."""

    @intrinsic
    def tile(typing, w, a, stride_ar, b, stride_bk, c, stride_cr, vectors, count):
        def generate(context, builder, signature, args):
            return _dot(context, builder, signature, args[:-1], (rows, columns), args[-1])

        return types.void(w, *[types.int64] * 8), generate

    return tile


def sparse_dot_tile(columns: int):
    """As a `ragged_dot_tile` of one row. The vectors to take are listed, as int32 at an address.

    It is f(w, a, b, stride_bk, c, vectors, count, listed, terms). The list has `terms` numbers.
    """

    @intrinsic
    def tile(typing, w, a, b, stride_bk, c, vectors, count, listed, terms):
        def generate(context, builder, signature, args):
            w, a, b, stride_bk, c, vectors, count, listed, terms = args
            known = w, a, _I64(0), b, stride_bk, c, _I64(0), vectors
            chosen = builder.inttoptr(listed, _I32.as_pointer()), terms
            return _dot(context, builder, signature, known, (1, columns), count, chosen)

        return types.void(w, *[types.int64] * 8), generate

    return tile


@intrinsic
def list_vectors(typing, w, listed, at, stride, count):
    """List the i below `count` for which the vector at w[at + i stride] has a number that is not 0.

    It writes int32 from the address `listed` on, and returns how many. -0 is listed too.
    """

    def generate(context, builder, signature, args):
        _, listed, at, stride, count = args
        source = pointer(context, builder, signature, args, 0, at)
        to, lanes = builder.inttoptr(listed, _I32.as_pointer()), _vector(context, signature).count
        bits = ir.VectorType(ir.IntType(signature.args[0].dtype.bitwidth), lanes)

        def body(i, values):
            vector = _load(builder, builder.gep(source, [builder.mul(i, stride)]), bits)
            ones = builder.icmp_unsigned("!=", vector, ir.Constant(bits, [0] * lanes))
            mask = builder.bitcast(ones, ir.IntType(lanes))
            counts = builder.icmp_unsigned("!=", mask, mask.type(0))
            builder.store(builder.trunc(i, _I32), builder.gep(to, [values[0]]), align=4)
            return [builder.add(values[0], builder.zext(counts, _I64))]

        return _loop(builder, count, [_I64(0)], body)[0]

    return types.int64(w, *[types.int64] * 4), generate


def finite_tile(rows: int):
    """A numba function that returns 0.0 if rows of whole vectors are finite, else NaN.

    It is f(w, at, stride, vectors): row r begins at w[at + r stride].
    """

    @intrinsic
    def tile(typing, w, at, stride, vectors):
        def generate(context, builder, signature, args):
            _, at, stride, vectors = args
            kind, zero = _vector(context, signature), _zeros(_vector(context, signature))
            starts = [builder.add(at, builder.mul(_I64(r), stride)) for r in range(rows)]
            lines = [pointer(context, builder, signature, args, 0, start) for start in starts]

            def body(j, sums):
                place = builder.mul(j, _I64(kind.count))
                found = [_load(builder, builder.gep(line, [place]), kind) for line in lines]
                return [_multiply_add(builder, v, zero, s) for v, s in zip(found, sums)]

            sums = _loop(builder, vectors, [zero] * rows, body)
            total = sums[0]
            for value in sums[1:]:
                total = builder.fadd(total, value)
            return _sum(builder, total)

        return w.dtype(w, *[types.int64] * 3), generate

    return tile


def ragged_outer_tile(rows: int):
    """As an `outer_tile` of one column, of which only the first `count` numbers exist."""

    @intrinsic
    def tile(typing, w, a, stride_ar, stride_aj, b, stride_bj, c, stride_cr, terms, add, count):
        def generate(context, builder, signature, args):
            return _outer(context, builder, signature, args[:-1], (rows, 1), args[-1])

        return types.void(w, *[types.int64] * 10), generate

    return tile


@intrinsic
def scale_octets(typing, w, to, address, vectors, scale, shift):
    """w[to + i] = scale · pixel + shift, for `vectors` vectors of bytes at an address."""

    def generate(context, builder, signature, args):
        _, to, address, vectors, scale, shift = args
        target = pointer(context, builder, signature, args, 0, to)
        octets, kind = builder.inttoptr(address, _I8.as_pointer()), _vector(context, signature)
        factor, addend = (_splat(builder, number, kind) for number in (scale, shift))

        def body(j, _):
            at, bytes_ = builder.mul(j, _I64(kind.count)), ir.VectorType(_I8, kind.count)
            pixels = builder.bitcast(builder.gep(octets, [at]), bytes_.as_pointer())
            values = builder.uitofp(builder.load(pixels, align=1), kind)
            values = builder.fadd(builder.fmul(values, factor), addend)
            _store(builder, values, builder.gep(target, [at]))
            return ()

        _loop(builder, vectors, (), body)
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 3, w.dtype, w.dtype), generate


@intrinsic
def scale_reals(typing, w, to, address, count, scale, shift):
    """w[to + i] = scale · number + shift, for `count` numbers of w's dtype at an address.

    They must fill a vector. The last vector overlaps the one before, so no number is on its own.
    """

    def generate(context, builder, signature, args):
        _, to, address, count, scale, shift = args
        target, kind = (
            pointer(context, builder, signature, args, 0, to),
            _vector(context, signature),
        )
        source = builder.inttoptr(address, kind.element.as_pointer())
        factor, addend = (_splat(builder, number, kind) for number in (scale, shift))

        def copy(at):
            values = _load(builder, builder.gep(source, [at]), kind)
            values = builder.fadd(builder.fmul(values, factor), addend)
            _store(builder, values, builder.gep(target, [at]))
            return ()

        whole = builder.sdiv(builder.sub(count, _I64(1)), _I64(kind.count))
        _loop(builder, whole, (), lambda j, _: copy(builder.mul(j, _I64(kind.count))))
        copy(builder.sub(count, _I64(kind.count)))
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 3, w.dtype, w.dtype), generate


@intrinsic
def patch_lines(typing, w, to, stride_to, factors, listed, terms, x, stride_x, lines):
    """w[to + r stride_to + i] += Σ_j factor[j] · w[x + r stride_x + place[j] + i], for one vector.

    The rows r are `lines`, from 1 to LINES. The factors begin at w[factors]. The places are `terms`
    int32 at the address `listed`.
    """

    def generate(context, builder, signature, args):
        _, to, stride_to, factors, listed, terms, x, stride_x, lines = args
        at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
        places, numbers = builder.inttoptr(listed, _I32.as_pointer()), at(factors)
        kind = _vector(context, signature)
        after = builder.append_basic_block("after")
        choice = builder.switch(lines, after)
        for count in range(1, LINES + 1):
            block = builder.append_basic_block("lines")
            choice.add_case(_I64(count), block)
            builder.position_at_end(block)
            targets = [at(builder.add(to, builder.mul(_I64(r), stride_to))) for r in range(count)]
            sources = [at(builder.add(x, builder.mul(_I64(r), stride_x))) for r in range(count)]

            def body(j, sums, sources=sources):
                place = builder.sext(builder.load(builder.gep(places, [j])), _I64)
                factor = _splat(builder, builder.load(builder.gep(numbers, [j])), kind)
                terms = [_load(builder, builder.gep(line, [place]), kind) for line in sources]
                return [_multiply_add(builder, factor, *pair) for pair in zip(terms, sums)]

            before = [_load(builder, target, kind) for target in targets]
            sums = _loop(builder, terms, before, body)
            for value, target in zip(sums, targets):
                _store(builder, value, target)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(w, *[types.int64] * 8), generate


@intrinsic
def add_scaled(typing, w, to, source, factor):
    """w[to + i] += factor · w[source + i], for the elements of one vector."""

    def generate(context, builder, signature, args):
        _, to, source, factor = args
        at = lambda offset: pointer(context, builder, signature, args, 0, offset)  # noqa: E731
        kind = _vector(context, signature)
        total, term = (_load(builder, at(place), kind) for place in (to, source))
        total = _multiply_add(builder, _splat(builder, factor, kind), term, total)
        _store(builder, total, at(to))
        return context.get_dummy_value()

    return types.void(w, types.int64, types.int64, w.dtype), generate


def _pairs(builder, a, b, blocks):
    """The sums of neighbouring lanes of a and b. The blocks of b follow those of a.

    blocks: lists of lanes. Their even lanes are added to their odd lanes.
    """
    both = []
    for first in (0, 1):
        lanes = [lane for block in blocks for lane in block[first::2]]
        mask = ir.Constant(ir.VectorType(_I32, len(lanes)), lanes)
        both.append(builder.shuffle_vector(a, b, mask))
    return builder.fadd(*both)


def _halved(builder, vector, least):
    """Add the upper half of a vector to its lower half, until `least` lanes remain."""
    while vector.type.count > least:
        half = vector.type.count // 2
        halves = [
            builder.shuffle_vector(
                vector, vector, ir.Constant(ir.VectorType(_I32, half), list(range(at, at + half)))
            )
            for at in (0, half)
        ]
        vector = builder.fadd(*halves)
    return vector


def _sum(builder, vector):
    """The sum of a vector's lanes: of pairs, then of fours, then of halves.

    `_four_sums` adds in the same order, so an element does not depend on its tile's shape.
    """
    for _ in range(2):
        vector = _pairs(builder, vector, vector, [list(range(vector.type.count))])
    return builder.extract_element(_halved(builder, vector, 1), _I32(0))


def _four_sums(builder, vectors):
    """A vector of the sums of four vectors, in fewer than half the instructions of four sums.

    A processor's shuffles work within four lanes, so the first two rounds do.
    """

    def added(a, b):
        count = a.type.count
        blocks = [
            list(range(start + at, start + at + 4))
            for at in range(0, count, 4)
            for start in (0, count)
        ]
        return _pairs(builder, a, b, blocks)

    one, two, three, four = vectors
    return _halved(builder, added(added(one, two), added(three, four)), 4)
