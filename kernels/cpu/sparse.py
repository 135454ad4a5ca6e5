"""The products of a linear layer without the zeros of its input x. Compiled by numba.

    forward   z = x wᵀ    the vectors of a row of x in which all numbers are 0 are left out
    dw        dw = dzᵀ x  of each vector of columns of x, the rows in which it is 0 are left out

Results have the bits of `dense`, because the other terms are added in the same order, and a term of
0 changes no sum. Only 0 · inf would: so where a factor of x is not finite, nothing is left out.

The functions take the same blocks as those of `dense`, and as many threads may call them. `look`
and `look_dw` come first, in one thread. They say whether enough of x is 0.
"""

import numpy as np
from numba import carray

from .dense import (
    DEEP,
    DONE,
    FINISHED,
    HEIGHT,
    LEFT,
    LEFT_PITCH,
    LISTED,
    NEXT,
    OUT,
    RIGHT,
    RIGHT_PITCH,
    TERMS,
    VECTOR,
    M,
    N,
    finish_rows,
    offset_of,
    outer,
    sum_of_rows,
)
from .tiles import (
    finite_tile,
    lanes,
    list_vectors,
    sparse_dot_tile,
    sparse_outer_tile,
)
from .waiting import (
    arrivals,
    arrive,
    claim,
    give_way,
    inside,
    integers,
    narrow_integers,
    numbers,
    pause,
)

FLOATS = None  # as in `dense`
WIDE = 8  # columns of a share of the forward: as many rows of w as the nearest cache holds
PAIR = 2  # vectors of a share of dw: a cache line
SAMPLES = 4  # rows of x that are looked at to decide
ENTRY = np.int64(4)  # bytes of an int32, as lists hold them
SPINS = 2000  # rounds before a thread that waits offers its core to others

_dots_8, _dots_4, _dots_1 = (sparse_dot_tile(columns) for columns in (8, 4, 1))
_finite_8, _finite_4, _finite_1 = (finite_tile(rows) for rows in (8, 4, 1))
_outer_12, _outer_4, _outer_1 = (sparse_outer_tile(rows) for rows in (12, 4, 1))


@inside
def _height(rows):
    """The rows of the next tile of columns or rows, of so many that are left."""
    return np.int64(WIDE if rows >= WIDE else 4 if rows >= 4 else 1)


@inside
def _are_finite(w, at, stride, rows, vectors):
    """True if whole vectors of rows are finite. Row r begins at w[at + r stride]."""
    r = 0
    while r < rows:
        height, line = _height(rows - r), at + r * stride
        if height == WIDE:
            found = _finite_8(w, line, stride, vectors)
        elif height == 4:
            found = _finite_4(w, line, stride, vectors)
        else:
            found = _finite_1(w, line, stride, vectors)
        if found != 0:  # NaN too
            return False
        r += height
    return True


@inside
def _has_zeros(w, at, stride, rows, vectors, listed):
    """True if at least 3 of 8 vectors of some rows are 0, so that leaving them out pays."""
    total = np.int64(0)
    for sample in range(SAMPLES):
        row = at + sample * rows // SAMPLES * stride
        total += list_vectors(w, listed, row, lanes(w), vectors)
    return 8 * total <= 5 * SAMPLES * vectors


def look(address):
    """Make the lists of the forward. If too few numbers of x are 0, set LISTED to 0 instead.

    LISTED is the address of int32. For each row of x there is the number of vectors that are not 0,
    and then which. One more row lists all vectors.
    """
    block = integers(address)
    w, listed = carray(FLOATS(block[OUT]), (1,)), block[LISTED]
    x, pitch, vectors = offset_of(w, block, LEFT), block[LEFT_PITCH], block[TERMS] // lanes(w)
    if not _has_zeros(w, x, pitch, block[M], vectors, listed):
        block[LISTED] = 0
        return
    size = ENTRY * (vectors + 1)
    for r in range(block[M]):
        found = list_vectors(w, listed + ENTRY, x + r * pitch, lanes(w), vectors)
        narrow_integers(listed)[0] = np.int32(found)
        listed += size
    every = narrow_integers(listed)
    every[0] = np.int32(vectors)
    for v in range(vectors):
        every[v + 1] = np.int32(v)


@inside
def _columns(w, block, n, width):
    """Compute `width` columns of z, from column n on, without the bias."""
    columns, pitch, terms = block[N], block[RIGHT_PITCH], block[TERMS]
    vectors = terms // lanes(w)
    rest, size = terms - vectors * lanes(w), ENTRY * (vectors + 1)
    a, b = offset_of(w, block, LEFT), offset_of(w, block, RIGHT) + n * pitch
    finite = _are_finite(w, b, pitch, width, vectors)
    for r in range(block[M]):
        row = block[LISTED] + (r if finite else block[M]) * size
        count, to = np.int64(narrow_integers(row)[0]), r * columns + n
        if width == WIDE:
            _dots_8(w, a, b, pitch, to, vectors, rest, row + ENTRY, count)
        elif width == 4:
            _dots_4(w, a, b, pitch, to, vectors, rest, row + ENTRY, count)
        else:
            _dots_1(w, a, b, pitch, to, vectors, rest, row + ENTRY, count)
        a += block[LEFT_PITCH]


def forward(address):
    """Compute shares of z, each of WIDE columns. When all are there, compute shares of y."""
    block = integers(address)
    w = carray(FLOATS(block[OUT]), (1,))
    rows, columns = block[M], block[N]
    shares, done = (columns + WIDE - 1) // WIDE, address + DONE * 8
    share = claim(address + NEXT * 8)
    while share < shares:
        n, end = share * WIDE, min((share + 1) * WIDE, columns)
        while n < end:
            width = _height(end - n)
            _columns(w, block, n, width)
            n += width
        arrive(done)
        share = claim(address + NEXT * 8)
    waited = 0
    while arrivals(done) < shares:
        waited += 1
        if waited < SPINS:
            pause()
        else:
            give_way()
    r = claim(address + FINISHED * 8) * HEIGHT
    while r < rows:
        finish_rows(w, block, r, min(np.int64(HEIGHT), rows - r))
        r = claim(address + FINISHED * 8) * HEIGHT


def look_dw(address):
    """Set LISTED to 0 if too few numbers of x are 0, or if dz is not finite.

    LISTED is the address of memory for int32: for each vector of columns, of the rows of x or DEEP.
    """
    block = integers(address)
    w, terms = carray(FLOATS(block[OUT]), (1,)), block[TERMS]
    vectors = block[N] // lanes(w)
    x, pitch = offset_of(w, block, RIGHT), block[RIGHT_PITCH]
    dz, stride = offset_of(w, block, LEFT), block[LEFT_PITCH]
    whole = block[M] // lanes(w)
    pays = _has_zeros(w, x, pitch, terms, vectors, block[LISTED])
    if not (pays and _are_finite(w, dz, stride, terms, whole)):
        block[LISTED] = 0
    else:
        rest = numbers(w, block[LEFT])
        for r in range(0, terms * stride, stride):
            for n in range(whole * lanes(w), block[M]):
                if rest[r + n] * 0 != 0:
                    block[LISTED] = 0


@inside
def _vector_of_columns(w, block, v):
    """Compute vector number v of all rows of dw."""
    rows, columns, terms, pitch = block[M], block[N], block[TERMS], block[RIGHT_PITCH]
    dz, step, at = offset_of(w, block, LEFT), block[LEFT_PITCH], v * lanes(w)
    x, listed = offset_of(w, block, RIGHT) + at, block[LISTED] + ENTRY * v * min(terms, DEEP)
    for j in range(0, terms, DEEP):
        count = list_vectors(w, listed, x, pitch, min(terms - j, DEEP))
        r, add = 0, np.int64(j > 0)
        while r < rows:
            left, to = dz + r, r * columns + at
            if r + 12 <= rows:
                _outer_12(w, left, 1, step, x, pitch, to, columns, count, add, listed)
                r += 12
            elif r + 4 <= rows:
                _outer_4(w, left, 1, step, x, pitch, to, columns, count, add, listed)
                r += 4
            else:
                _outer_1(w, left, 1, step, x, pitch, to, columns, count, add, listed)
                r += 1
        dz += DEEP * step
        x += DEEP * pitch


def dw(address):
    """Compute shares of dw, each of PAIR vectors of columns. The first share includes db.

    The columns that fill no vector are a share too.
    """
    block = integers(address)
    w = carray(FLOATS(block[OUT]), (1,))
    rows, columns, terms = block[M], block[N], block[TERMS]
    vectors = columns // lanes(w)
    share = claim(address + NEXT * 8)
    while share * PAIR < vectors + PAIR:
        for v in range(share * PAIR, min((share + 1) * PAIR, vectors)):
            _vector_of_columns(w, block, v)
        if share == 0 and block[VECTOR]:
            sum_of_rows(w, block)
        at = vectors * lanes(w)
        if (share - 1) * PAIR < vectors <= share * PAIR and at < columns:
            dz = offset_of(w, block, LEFT), np.int64(1), block[LEFT_PITCH]
            x = offset_of(w, block, RIGHT) + at, block[RIGHT_PITCH]
            outer(w, dz, x, (at, columns), (rows, columns - at, terms))
        share = claim(address + NEXT * 8)


FUNCTIONS = look, forward, look_dw, dw
