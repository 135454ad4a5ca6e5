"""Matrix products of register tiles. Each is compiled once and called by its address.

A function that numba compiles holds a copy of every function that it calls. The tiles are most of
the code of a step. So most of the time to compile would go into copies of them.
"""

import functools

from numba import carray, njit, types

from . import rows
from .tiles import COLUMNS, LANES, ROWS, dot_tile, outer_tile

_full_1, _full_2, _full_3 = (outer_tile(ROWS, columns) for columns in (1, 2, 3))
_one_1, _one_2, _one_3 = (outer_tile(1, columns) for columns in (1, 2, 3))
_full_all, _one_all = outer_tile(ROWS, COLUMNS), outer_tile(1, COLUMNS)
_dot_44, _dot_41, _dot_14, _dot_11 = dot_tile(4, 4), dot_tile(4, 1), dot_tile(1, 4), dot_tile(1, 1)


def _strip(widest, three, two, one):
    """A function that computes rows of `_product` by tiles of COLUMNS, 3, 2 and 1 vectors."""

    @njit(nogil=True)
    def strip(w, a, b, c, vectors, terms, add):
        b_at, c_at = b[0], c[0]
        while vectors >= COLUMNS:
            widest(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            vectors -= COLUMNS
            b_at += COLUMNS * LANES
            c_at += COLUMNS * LANES
        if vectors >= 3:
            three(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
            vectors -= 3
            b_at += 3 * LANES
            c_at += 3 * LANES
        if vectors == 2:
            two(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)
        elif vectors == 1:
            one(w, a[0], a[1], a[2], b_at, b[1], c_at, c[1], terms, add)

    return strip


_rows_full = _strip(_full_all, _full_3, _full_2, _full_1)  # ROWS rows
_rows_single = _strip(_one_all, _one_3, _one_2, _one_1)  # one row


@njit(nogil=True)
def _product(w, a, b, c, shape, add):
    """c[r, n] = (c[r, n] if add else 0) + Σ_j a[r, j] b[j, n].

    shape = (rows, vectors of n, number of j).
    a = (offset, stride of r, stride of j), b = (offset, stride of j), c = (offset, stride of r).
    """
    rows, vectors, terms = shape
    r = 0
    while r + ROWS <= rows:
        from_row = (a[0] + r * a[1], a[1], a[2])
        _rows_full(w, from_row, b, (c[0] + r * c[1], c[1]), vectors, terms, add)
        r += ROWS
    while r < rows:
        from_row = (a[0] + r * a[1], a[1], a[2])
        _rows_single(w, from_row, b, (c[0] + r * c[1], c[1]), vectors, terms, add)
        r += 1


@njit(nogil=True)
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


def _product_transposed_at(w_ptr, a, ar, b, bk, c, cr, rows, columns, vectors):
    w = carray(w_ptr, (1,))
    _product_transposed(w, (a, ar), (b, bk), (c, cr), (rows, columns, vectors))


@functools.cache
def compiled() -> tuple[rows.Compiled, rows.Compiled]:
    """The code behind `loop.product` and `loop.product_transposed`, compiled or read from disk."""
    return (
        rows.address(_product_at, types.void(rows.FLOATS, *[types.int64] * 11)),
        rows.address(_product_transposed_at, types.void(rows.FLOATS, *[types.int64] * 9)),
    )
