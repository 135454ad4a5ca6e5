"""What the kernels of several operations compute in registers: rounding, one tile's dot, and the
sum of a product's tile.
"""

import triton
import triton.language as tl

from . import launch


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x.to(dtype), rounding to nearest even also in the interpreter, which truncates float32 to
    bfloat16.
    """
    if launch.INTERPRET and dtype == tl.bfloat16:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a·b in float32; the interpreter would multiply bfloat16's raw bits, so it gets
    float32.
    """
    if launch.INTERPRET:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def product_tile(
    a_ptr,
    b_ptr,
    offs_m,
    offs_n,
    M,
    N,
    k_start,
    k_end,
    stride_am,
    stride_ak,
    stride_bn,
    stride_bk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ROW_SUM: tl.constexpr,
):
    """acc[m, n] = Σ_k a[m, k] b[n, k] for k in [k_start, k_end), and with ROW_SUM also Σ_k a[m, k].

    The forward and both products of the backward are this sum; they differ in strides. Offsets are
    64-bit.
    """
    offs_k = k_start + tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = (offs_m < M)[:, None]
    mask_n = (offs_n < N)[None, :]
    a_ptrs = (
        a_ptr + offs_m.to(tl.int64)[:, None] * stride_am + offs_k[None, :] * stride_ak
    )  # [BLOCK_M, BLOCK_K]
    b_ptrs = (
        b_ptr + offs_n.to(tl.int64)[None, :] * stride_bn + offs_k[:, None] * stride_bk
    )  # [BLOCK_K, BLOCK_N]
    step = tl.full((), BLOCK_K, tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for k in range(k_start, k_end, BLOCK_K):
        mask_k = k + tl.arange(0, BLOCK_K) < k_end
        a = tl.load(a_ptrs, mask=mask_m & mask_k[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=mask_k[:, None] & mask_n, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        if ROW_SUM:
            row_sum += tl.sum(a.to(tl.float32), axis=1)
        a_ptrs += step * stride_ak
        b_ptrs += step * stride_bk
    return acc, row_sum
