"""What the kernels share: rounding, a tile's dot, a tile's sum of products."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from . import launch
from .language import TensorDescriptor, tl, triton


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x.to(dtype), rounded to nearest even.

    The interpreter alone would truncate float32 to bfloat16, so the bits are rounded there.
    """
    if launch.INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b, accumulated in float32.

    The interpreter gets float32 operands, because it would multiply the raw bits of bfloat16.
    """
    if launch.INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def settled(x):
    """x, rounded, so that a sum over lanes may take it.

    x may be a product. The compiler would fuse it with the sum's first addition, which adds
    another lane's value. Each lane would then round the other's product but not its own, and lanes
    that store the same sum would hold different values. The tl.where after the product prevents
    the fusion.
    """
    return tl.where(x == 0.0, 0.0, x)


# Rows of tiles that are computed together. With a hundred programs at once, eight rows and their
# columns make a block about as high as wide. Such a block reads the fewest tiles.
GROUP = tl.constexpr(8)


class Matrix(NamedTuple):
    """A matrix as a kernel takes it: its address, its number of rows, and its strides."""

    ptr: Any
    rows: Any
    stride_row: Any
    stride_col: Any
    wide: Any  # constexpr: True if offsets in the matrix need 64 bits


def matrix(t: torch.Tensor) -> Matrix:
    """t (rows, columns), of any strides, as a kernel's Matrix."""
    return Matrix(t, *layout(t.shape, t.stride()))


_WIDE, _NARROW = tl.constexpr(True), tl.constexpr(False)


def layout(shape: Sequence[int], strides: Sequence[int]) -> tuple:
    """The fields of a Matrix after its address, for a matrix of this shape and these strides.

    Offsets take 32 bits if the last element lies less than 2³¹ elements behind the first. This
    depends on the strides: an expanded tensor has many elements in little memory, and a slice may
    have few elements in much memory.
    """
    (rows, columns), (stride_row, stride_col) = shape, strides
    last = (rows - 1) * stride_row + (columns - 1) * stride_col
    return rows, stride_row, stride_col, _WIDE if last >= 2**31 else _NARROW


Blocks = tuple[list[int], list[int]]


def factors(left: Matrix, right: Matrix, blocks: Blocks | None) -> tuple:
    """The factors of a product as a kernel takes them: Matrices, or descriptors of their memory.

    The tensor memory accelerator reads descriptors, in blocks (rows, columns) of each tensor. The
    tensors' strides must allow this, see `configs.Product.by_tma`. Without blocks, or where memory
    does not begin at a multiple of 16 bytes, the factors stay Matrices. So they do where torch has
    not applied a minus sign yet, because a descriptor hides its tensor from `launch.run`.
    """
    tensors = left.ptr, right.ptr
    if blocks is None or any([t.data_ptr() % 16 or t.is_neg() for t in tensors]):
        return left, right
    return tuple(TensorDescriptor(t, t.shape, t.stride(), b) for t, b in zip(tensors, blocks))


@triton.jit
def offsets(a, rows, columns):
    """Offsets of elements of a Matrix from its address. rows and columns broadcast.

    They have 64 bits where the Matrix needs them. Offsets outside the matrix may overflow, so they
    must be masked. A descriptor is read by places instead, so its offsets are 0.
    """
    if isinstance(a, tl.tensor_descriptor):
        return 0
    else:
        if a.wide:
            rows = rows.to(tl.int64)
            columns = columns.to(tl.int64)
        return rows * a.stride_row + columns * a.stride_col


@triton.jit
def load_tile(a, offs_m, offs_n, mask):
    """Elements of a Matrix in float32, 0 outside the mask. offs_m and offs_n broadcast."""
    ptrs = a.ptr + offsets(a, offs_m, offs_n)
    return tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def tile_of_program(rows):
    """(row, column) of this program's tile, in a grid of one axis with one program for each tile.

    rows: how many rows of tiles there are. One axis counts all tiles, because CUDA takes at most
    65,535 programs along each other axis.

    A device starts programs by number, all rows of one column of tiles after another. Programs that
    run at once would read the whole left matrix again for each column. Here, programs take GROUP
    rows of tiles, column after column, then the next GROUP rows. Tiles of both matrices are then
    still in the cache when they are read again. Triton's tutorial on matrix multiplication has the
    same order.
    """
    columns = tl.num_programs(0) // rows
    number = tl.program_id(0)
    first = number // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    within = number - first * columns
    return first + within % height, within // height


@triton.jit
def rows_of(a, TRANSPOSED: tl.constexpr):
    """The number of rows of a factor. TRANSPOSED: a descriptor describes the transpose."""
    if isinstance(a, tl.tensor_descriptor):
        return a.shape[1 if TRANSPOSED else 0]
    else:
        return a.rows


@triton.jit
def factor_tile(a, offs, mask, row, column, TRANSPOSED: tl.constexpr, FLIP: tl.constexpr):
    """A tile of a factor, 0 outside the mask.

    A Matrix is read at its offsets. A descriptor reads the tile that begins at (row, column) of its
    matrix, and gives 0 outside the matrix. FLIP: the tile must be transposed after that.
    """
    if isinstance(a, tl.tensor_descriptor):
        if TRANSPOSED:
            tile = a.load([column, row])
        else:
            tile = a.load([row, column])
        return tile.T if FLIP else tile
    else:
        return tl.load(a.ptr + offs, mask=mask, other=0.0)


@triton.jit
def product_tile(
    a,  # [M, K]: a Matrix, or a descriptor
    b,  # [N, K]: a Matrix, or a descriptor
    m,  # the tile's first row of a
    n,  # the tile's first row of b
    k_start,
    k_end,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_SUM: tl.constexpr,
    WHOLE: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # of a and b: whether their descriptors describe [K, M] and [K, N]
):
    """acc[m, n] = Σ_k a[m, k] b[n, k] for k in [k_start, k_end), and with ROW_SUM also Σ_k a[m, k].

    The forward and both products of the backward are this sum. They differ only in strides. WHOLE:
    k_end - k_start is a multiple of BLOCK_K, so no tile of the sum needs a mask. A descriptor knows
    no k_end, so there the sum must be WHOLE or end with the matrix.
    """
    offs_m = m + tl.arange(0, BLOCK_M)
    offs_n = n + tl.arange(0, BLOCK_N)
    offs_k = k_start + tl.arange(0, BLOCK_K)
    inside_m = offs_m < rows_of(a, TRANSPOSED[0])
    inside_n = offs_n < rows_of(b, TRANSPOSED[1])
    a_offs = offsets(a, offs_m[:, None], offs_k[None, :])  # [BLOCK_M, BLOCK_K]
    b_offs = offsets(b, offs_n[None, :], offs_k[:, None])  # [BLOCK_K, BLOCK_N]
    same_row = tl.full((), 0, tl.int32)
    step = tl.full((), BLOCK_K, tl.int32)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(k_start, k_end, BLOCK_K):
        mask_a = inside_m[:, None]
        mask_b = inside_n[None, :]
        if not WHOLE:
            inside_k = k + tl.arange(0, BLOCK_K) < k_end
            mask_a = mask_a & inside_k[None, :]
            mask_b = inside_k[:, None] & mask_b
        a_tile = factor_tile(a, a_offs, mask_a, m, k, TRANSPOSED[0], TRANSPOSED[0])
        b_tile = factor_tile(b, b_offs, mask_b, n, k, TRANSPOSED[1], not TRANSPOSED[1])
        acc = dot(a_tile, b_tile, acc, PRECISION)
        if ROW_SUM:
            row_sum += tl.sum(a_tile.to(tl.float32), axis=1)
        a_offs += offsets(a, same_row, step)
        b_offs += offsets(b, same_row, step)
    # Triton 3.8 allows only one use of a sum that a loop carries (pass OptimizeThreadLocality).
    return acc, tl.where(inside_m, row_sum, 0.0)
