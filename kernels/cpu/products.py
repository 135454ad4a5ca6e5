"""Matrix products of register tiles. Each is compiled once and called by its address.

A function that numba compiles holds a copy of every function that it calls. The tiles are most of
the code of a step. So most of the time to compile would go into copies of them.
"""

import functools

import numpy as np
from numba import carray, types

from . import rows
from .tiles import (
    COLUMNS,
    ROWS,
    WIDEST,
    dot_tile,
    lanes,
    list_inputs,
    list_rows,
    listed_row,
    listed_tile,
    outer_tile,
)
from .waiting import inside

# Row number `mask` begins with the places of the ones in a mask of eight bits.
OCTETS = np.zeros((256, 8), np.uint8)
for _mask in range(256):
    _ones = [bit for bit in range(8) if _mask >> bit & 1]
    OCTETS[_mask, : len(_ones)] = _ones

# A tile needs about 12 sums to keep the processor's units busy, so narrow tiles have more rows.
TALLER, TALLEST = 6, 8  # rows of a tile of two vectors, and of one
_FOUR = min(4, COLUMNS)
_full_1, _full_2, _full_3 = (outer_tile(ROWS, columns) for columns in (1, 2, 3))
_one_1, _one_2, _one_3 = (outer_tile(1, columns) for columns in (1, 2, 3))
_full_4, _one_4 = outer_tile(ROWS, _FOUR), outer_tile(1, _FOUR)
_full_all, _one_all = outer_tile(ROWS, COLUMNS), outer_tile(1, COLUMNS)
_tallest_1, _taller_2 = outer_tile(TALLEST, 1), outer_tile(TALLER, 2)
_many_1, _many_2, _many_3 = (listed_tile(ROWS, columns) for columns in (1, 2, 3))
_many_4, _many_all = listed_tile(ROWS, _FOUR), listed_tile(ROWS, COLUMNS)
_many_tallest_1, _many_taller_2 = listed_tile(TALLEST, 1), listed_tile(TALLER, 2)
_dot_44, _dot_41, _dot_14, _dot_11 = dot_tile(4, 4), dot_tile(4, 1), dot_tile(1, 4), dot_tile(1, 1)


@inside
def _width(vectors):
    """The vectors of the next tile of a row of so many. No tile is narrow where that can be."""
    if vectors == COLUMNS or vectors >= COLUMNS + 3:
        return np.int64(COLUMNS)
    return np.int64((vectors + 1) // 2 if vectors > COLUMNS else vectors)


@inside
def _height(vectors, rows):
    """The rows of the next tiles, of `rows` rows that are left."""
    tall = TALLEST if vectors == 1 else TALLER if vectors == 2 else ROWS
    if rows < tall:
        tall = ROWS
    return np.int64(tall if rows >= tall else 1)


def _strip(widest, four, three, two, one):
    """A function that computes rows of `_product` by tiles of 1 to COLUMNS vectors."""

    @inside
    def strip(w, a, b, c, vectors, terms, add):
        b_at, c_at = b[0], c[0]
        while vectors > 0:
            width = _width(vectors)
            if width == COLUMNS:
                widest(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            elif width == 4:
                four(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            elif width == 3:
                three(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            elif width == 2:
                two(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            else:
                one(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            vectors -= width
            b_at += width * lanes(w)
            c_at += width * lanes(w)

    return strip


_rows_full = _strip(_full_all, _full_4, _full_3, _full_2, _full_1)  # ROWS rows
_rows_single = _strip(_one_all, _one_4, _one_3, _one_2, _one_1)  # one row


@inside
def _listed_full(w, places, a, b, first, c, vectors, terms):
    """Compute ROWS rows of `_product_listed`, by tiles of 1 to COLUMNS vectors."""
    f_at, b_at, c_at = first[0], b[0], c[0]
    while vectors > 0:
        width = _width(vectors)
        if width == COLUMNS:
            _many_all(w, places, a[0], a[1], a[2], b_at, b[1], f_at, first[1], c_at, c[1], terms)
        elif width == 4:
            _many_4(w, places, a[0], a[1], a[2], b_at, b[1], f_at, first[1], c_at, c[1], terms)
        elif width == 3:
            _many_3(w, places, a[0], a[1], a[2], b_at, b[1], f_at, first[1], c_at, c[1], terms)
        elif width == 2:
            _many_2(w, places, a[0], a[1], a[2], b_at, b[1], f_at, first[1], c_at, c[1], terms)
        else:
            _many_1(w, places, a[0], a[1], a[2], b_at, b[1], f_at, first[1], c_at, c[1], terms)
        vectors -= width
        step = width * lanes(w)
        b_at += step
        f_at += step
        c_at += step


@inside
def _listed_single(w, places, a, b, first, c, vectors, terms):
    """Compute a row of `_product_listed`, by tiles of about the same width."""
    strips = (vectors + WIDEST - 1) // WIDEST
    at = 0
    for strip in range(strips):
        end = vectors * (strip + 1) // strips
        offset = at * lanes(w)
        f_at, b_at, c_at = first[0] + offset, b[0] + offset, c[0] + offset
        listed_row(w, places, a[0], a[2], b_at, b[1], f_at, c_at, terms, end - at)
        at = end


@inside
def _listed(lists, r, height, terms):
    """List the terms of `height` rows of `_product_listed` from row r on. Returns their number."""
    listed, bits, stride, is_transposed, table = lists
    if table == 0:  # the list holds all terms
        return terms
    octets = (terms + 7) // 8
    if is_transposed:
        chosen = ((1 << height) - 1) << (r % 8)
        return list_rows(listed, bits + r // 8 * stride, chosen, octets, table)
    return list_inputs(listed, bits + r, stride, octets, table)


@inside
def _product_listed(w, a, b, first, c, shape, lists):
    """c[r, n] = first[r, n] + Σ_j a[r, j] b[j, n], without the j at which a is 0 in all rows of a
    tile.

    shape, a, b and c: as in `_product`. first is like c. lists = (address of a list of int32,
    address of the bytes that `mark` wrote, their stride, 1 if they are of a's transpose, address of
    `OCTETS`). If the latter is 0, the list holds all terms, and none is left out.
    """
    rows, vectors, terms = shape
    r = 0
    while r < rows:
        if lists[4] == 0:
            height = _height(vectors, rows - r)
        else:
            # A tile of one row reads more of b, but only what that row needs.
            height = np.int64(ROWS if lists[3] and r + ROWS <= rows else 1)
        count = _listed(lists, r, height, terms)
        from_row, before = (a[0] + r * a[1], a[1], a[2]), (first[0] + r * first[1], first[1])
        to = (c[0] + r * c[1], c[1])
        operands = (a[0] + r * a[1], a[1], a[2], b[0], b[1], *before, *to, count)
        if height == TALLEST:
            _many_tallest_1(w, lists[0], *operands)
        elif height == TALLER:
            _many_taller_2(w, lists[0], *operands)
        elif height == ROWS:
            _listed_full(w, lists[0], from_row, b, before, to, vectors, count)
        else:
            _listed_single(w, lists[0], from_row, b, before, to, vectors, count)
        r += height


@inside
def _product(w, a, b, c, shape, add):
    """c[r, n] = (c[r, n] if add else 0) + Σ_j a[r, j] b[j, n].

    shape = (rows, vectors of n, number of j).
    a = (offset, stride of r, stride of j), b = (offset, stride of j), c = (offset, stride of r).
    """
    rows, vectors, terms = shape
    r = 0
    while r < rows:
        height = _height(vectors, rows - r)
        from_row, to = (a[0] + r * a[1], a[1], a[2]), (c[0] + r * c[1], c[1])
        if height == TALLEST:
            _tallest_1(w, *from_row, *b, *to, terms, add)
        elif height == TALLER:
            _taller_2(w, *from_row, *b, *to, terms, add)
        elif height == ROWS:
            _rows_full(w, from_row, b, to, vectors, terms, add)
        else:
            _rows_single(w, from_row, b, to, vectors, terms, add)
        r += height


@inside
def _product_transposed(w, a, b, c, shape):
    """c[r, k] = Σ_n a[r, n] b[k, n].

    shape = (rows, number of k, vectors of n). a, b and c are (offset, stride).
    """
    rows, columns, vectors = shape
    r = 0
    while r < rows:
        tall = r + 4 <= rows
        a_at, c_at = a[0] + r * a[1], c[0] + r * c[1]
        k = 0
        while k < columns:
            b_at = b[0] + k * b[1]
            wide = k + 4 <= columns
            if tall and wide:
                _dot_44(w, a_at, a[1], b_at, b[1], c_at + k, c[1], vectors)
            elif tall:
                _dot_41(w, a_at, a[1], b_at, b[1], c_at + k, c[1], vectors)
            elif wide:
                _dot_14(w, a_at, a[1], b_at, b[1], c_at + k, c[1], vectors)
            else:
                _dot_11(w, a_at, a[1], b_at, b[1], c_at + k, c[1], vectors)
            k += 4 if wide else 1
        r += 4 if tall else 1


def _product_at(w_ptr, a, ar, aj, b, bj, c, cr, rows, vectors, terms, add):
    w = carray(w_ptr, (1,))  # any length, because numba checks no bounds
    _product(w, (a, ar, aj), (b, bj), (c, cr), (rows, vectors, terms), add)


def _product_listed_at(
    w_ptr,
    a,
    ar,
    aj,
    b,
    bj,
    first,
    fr,
    c,
    cr,
    rows,
    vectors,
    terms,
    listed,
    bits,
    stride,
    flips,
    table,
):
    w, lists = carray(w_ptr, (1,)), (listed, bits, stride, flips, table)
    _product_listed(w, (a, ar, aj), (b, bj), (first, fr), (c, cr), (rows, vectors, terms), lists)


def _product_transposed_at(w_ptr, a, ar, b, bk, c, cr, rows, columns, vectors):
    w = carray(w_ptr, (1,))
    _product_transposed(w, (a, ar), (b, bk), (c, cr), (rows, columns, vectors))


@functools.cache
def compiled(kind: np.dtype) -> tuple[rows.Compiled, rows.Compiled, rows.Compiled]:
    """The code behind `loop.product`, `product_listed` and `product_transposed`.

    It is compiled or read from disk. kind: the dtype of the flat array.
    """
    numbers = rows.pointer_to(kind)
    return (
        rows.address(_product_at, types.void(numbers, *[types.int64] * 11), kind),
        rows.address(_product_listed_at, types.void(numbers, *[types.int64] * 17), kind),
        rows.address(_product_transposed_at, types.void(numbers, *[types.int64] * 9), kind),
    )
