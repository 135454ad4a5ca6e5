"""The products of a linear layer, and its activation alone. Compiled by numba.

    forward   z = x wᵀ + b, y = act(z)     rows of w are multiplied by rows of x: `dot_tile`
    dx        dx = (dz w) ⊙ act'(s)        scalars of dz multiply rows of w: `outer_tile`
    dw        dw = dzᵀ x, db = Σ_m dz      scalars of dz multiply rows of x: `outer_tile`
    pointwise y = act(z), dz = dy ⊙ act'(s)  without a product

Matrices lie as torch stores them. A row ends anywhere, so its last vector is read and written under
a mask. A function takes the address of a block of int64, see `NEXT`. Several threads may call it
with the same block. Each claims a share of the result, then the next one, until none is left. A
number is computed within one share, so the number of threads changes no bit.
"""

import numpy as np
from numba import carray

from .tiles import COLUMNS, ROWS, lanes, outer_tile, ragged_dot_tile, ragged_outer_tile, size_of
from .waiting import call, claim, inside, integers, numbers

# Entries of a block. NEXT: the first share that no thread has claimed. The matrices' addresses:
# OUT, the result (M, N), contiguous. LEFT (M, terms) and RIGHT, with the elements from one row to
# the next. M, N: rows and columns of the result. TERMS: terms of each of its sums. VECTOR: the
# address of the bias, or of db, or 0. ACT: the address of the activation's loop, or 0. BESIDE: the
# address of y of the forward, of s of dx, or of a one for db. LISTED: see `sparse`. DONE, FINISHED:
# counters of `sparse`.
NEXT, OUT, LEFT, LEFT_PITCH, RIGHT, RIGHT_PITCH, M, N, TERMS, VECTOR, ACT, BESIDE = range(12)
LISTED, DONE, FINISHED = range(12, 15)
HEIGHT = 4  # rows of a share of the forward
TALL = 8  # rows of a share of dx
DEEP = 256  # most terms that a sum of dw or dx takes at a time, so that they stay in the cache

FLOATS = None  # makes a pointer to numbers of an address, in the dtype that is compiled for

_dot_44, _dot_41 = ragged_dot_tile(4, 4), ragged_dot_tile(4, 1)
_dot_14, _dot_11 = ragged_dot_tile(1, 4), ragged_dot_tile(1, 1)
_full_1, _full_2, _full_3 = (outer_tile(ROWS, columns) for columns in (1, 2, 3))
_one_1, _one_2, _one_3 = (outer_tile(1, columns) for columns in (1, 2, 3))
_full_all, _one_all = outer_tile(ROWS, COLUMNS), outer_tile(1, COLUMNS)
_last_full, _last_one = ragged_outer_tile(ROWS), ragged_outer_tile(1)
_NONE, _ONE = np.int64(0), np.int64(1)


@inside
def _dots(w, a, b, c, shape):
    """c[r, k] = Σ_n a[r, n] b[k, n] for one row r, or four.

    shape = (rows, number of k, number of n). a, b and c are (offset, stride).
    """
    rows, columns, terms = shape
    vectors = terms // lanes(w)
    rest = terms - vectors * lanes(w)
    k = 0
    while k < columns:
        b_at, to = b[0] + k * b[1], c[0] + k
        wide = k + 4 <= columns
        if rows == 4 and wide:
            _dot_44(w, a[0], a[1], b_at, b[1], to, c[1], vectors, rest)
        elif rows == 4:
            _dot_41(w, a[0], a[1], b_at, b[1], to, c[1], vectors, rest)
        elif wide:
            _dot_14(w, a[0], a[1], b_at, b[1], to, c[1], vectors, rest)
        else:
            _dot_11(w, a[0], a[1], b_at, b[1], to, c[1], vectors, rest)
        k += 4 if wide else 1


@inside
def _panel(w, a, b, c, shape, add):
    """c[r, v] = (c[r, v] if add else 0) + Σ_j a[r, j] b[j, v] for all rows r and a few vectors.

    shape = (rows, vectors, number of j). vectors: 1, 2, 3 or COLUMNS. a = (offset, stride of r,
    stride of j), b = (offset, stride of j), c = (offset, stride of r).
    """
    rows, vectors, terms = shape
    r = 0
    while r < rows:
        a_at, to = a[0] + r * a[1], c[0] + r * c[1]
        if r + ROWS <= rows:
            if vectors == COLUMNS:
                _full_all(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            elif vectors == 3:
                _full_3(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            elif vectors == 2:
                _full_2(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            else:
                _full_1(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            r += ROWS
        else:
            if vectors == COLUMNS:
                _one_all(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            elif vectors == 3:
                _one_3(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            elif vectors == 2:
                _one_2(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            else:
                _one_1(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add)
            r += 1


@inside
def _last_panel(w, a, b, c, shape, add):
    """As `_panel`, for the last columns, which fill no vector. shape = (rows, columns, terms)."""
    rows, columns, terms = shape
    r = 0
    while r < rows:
        a_at, to = a[0] + r * a[1], c[0] + r * c[1]
        if r + ROWS <= rows:
            _last_full(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add, columns)
            r += ROWS
        else:
            _last_one(w, a_at, a[1], a[2], b[0], b[1], to, c[1], terms, add, columns)
            r += 1


@inside
def outer(w, a, b, c, shape):
    """c[r, n] = Σ_j a[r, j] b[j, n]. shape = (rows, columns, number of j). a, b, c: see `_panel`.

    A panel of a few columns is computed for all rows, because its part of b then stays in the
    cache.
    """
    rows, columns, terms = shape
    at = _NONE
    while at < columns:
        vectors = (columns - at) // lanes(w)
        vectors = COLUMNS if vectors >= COLUMNS else min(vectors, 3)
        width = max(vectors * lanes(w), _ONE)
        if vectors == 0:
            width = columns - at
        j = _NONE
        while j == 0 or j < terms:  # without terms, the sums are 0
            some = min(terms - j, DEEP)
            left, right = (a[0] + j * a[2], a[1], a[2]), (b[0] + j * b[1] + at, b[1])
            to, add = (c[0] + at, c[1]), np.int64(j > 0)
            if vectors == 0:
                _last_panel(w, left, right, to, (rows, width, some), add)
            else:
                _panel(w, left, right, to, (rows, vectors, some), add)
            j += DEEP
        at += width


@inside
def offset_of(w, block, matrix):
    """Where a matrix begins: elements from the result on, because all offsets are from there."""
    return (block[matrix] - block[OUT]) // size_of(w)


@inside
def finish_rows(w, block, r, height):
    """Add the bias to `height` rows of z from row r on. Then compute these rows of y."""
    columns = block[N]
    start = size_of(w) * r * columns
    z = numbers(w, block[OUT] + start)
    if block[VECTOR]:
        bias = numbers(w, block[VECTOR])
        for row in range(height):
            for n in range(columns):
                z[row * columns + n] += bias[n]
    if block[ACT]:
        call(block[ACT], (block[OUT] + start, block[BESIDE] + start, height * columns))


def forward(address):
    """Compute shares of z and y, each of HEIGHT rows. Without an activation, only z."""
    block = integers(address)
    w = carray(FLOATS(block[OUT]), (1,))  # any length, because numba checks no bounds
    rows, columns, terms = block[M], block[N], block[TERMS]
    left, right = offset_of(w, block, LEFT), (offset_of(w, block, RIGHT), block[RIGHT_PITCH])
    r = claim(address) * HEIGHT
    while r < rows:
        height = min(np.int64(HEIGHT), rows - r)
        tall = np.int64(HEIGHT if height == HEIGHT else 1)
        for row in range(r, r + height, tall):
            a = (left + row * block[LEFT_PITCH], block[LEFT_PITCH])
            _dots(w, a, right, (row * columns, columns), (tall, columns, terms))
        finish_rows(w, block, r, height)
        r = claim(address) * HEIGHT


def dx(address):
    """Compute shares of dx, each of TALL rows. With an activation, they are multiplied by act'."""
    block = integers(address)
    w = carray(FLOATS(block[OUT]), (1,))
    rows, columns, terms = block[M], block[N], block[TERMS]
    left, right = offset_of(w, block, LEFT), (offset_of(w, block, RIGHT), block[RIGHT_PITCH])
    r = claim(address) * TALL
    while r < rows:
        height = min(np.int64(TALL), rows - r)
        a = (left + r * block[LEFT_PITCH], block[LEFT_PITCH], _ONE)
        outer(w, a, right, (r * columns, columns), (height, columns, terms))
        if block[ACT]:
            start = size_of(w) * r * columns
            call(block[ACT], (block[OUT] + start, block[BESIDE] + start, height * columns))
        r = claim(address) * TALL


@inside
def sum_of_rows(w, block):
    """Compute db, the sums of the columns of dz. LEFT is dz (terms, M)."""
    ones, db = (offset_of(w, block, BESIDE), _NONE, _NONE), offset_of(w, block, VECTOR)
    dz, rows = (offset_of(w, block, LEFT), block[LEFT_PITCH]), block[M]
    outer(w, ones, dz, (db, rows), (_ONE, rows, block[TERMS]))


def dw(address):
    """Compute shares of dw, each of COLUMNS vectors of columns. The first share includes db.

    LEFT is dz (terms, M) here, and RIGHT is x.
    """
    block = integers(address)
    w = carray(FLOATS(block[OUT]), (1,))
    rows, columns, terms = block[M], block[N], block[TERMS]
    left, right = offset_of(w, block, LEFT), offset_of(w, block, RIGHT)
    width = COLUMNS * lanes(w)
    share = claim(address)
    while share == 0 or share * width < columns:
        at = share * width
        a = (left, _ONE, block[LEFT_PITCH])
        shape = (rows, min(columns - at, width), terms)
        outer(w, a, (right + at, block[RIGHT_PITCH]), (at, columns), shape)
        if share == 0 and block[VECTOR]:
            sum_of_rows(w, block)
        share = claim(address)


def pointwise(address):
    """Compute shares of act, from z (OUT) to y (BESIDE), or of dz (OUT) = dy ⊙ act'(s) (BESIDE).

    LEFT is dy, which is copied to dz first, or 0. A share has HEIGHT rows.
    """
    block = integers(address)
    w = carray(FLOATS(block[OUT]), (1,))
    rows, columns, pitch = block[M], block[N], block[LEFT_PITCH]
    r = claim(address) * HEIGHT
    while r < rows:
        height, start = min(np.int64(HEIGHT), rows - r), size_of(w) * r * columns
        if block[LEFT]:
            dz = numbers(w, block[OUT] + start)
            dy = numbers(w, block[LEFT] + size_of(w) * r * pitch)
            for row in range(height):
                for n in range(columns):
                    dz[row * columns + n] = dy[row * pitch + n]
        call(block[ACT], (block[OUT] + start, block[BESIDE] + start, height * columns))
        r = claim(address) * HEIGHT


FUNCTIONS = forward, dx, dw, pointwise
