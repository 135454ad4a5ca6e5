"""One training step as pieces of a kernel: what `step` and `epoch` are made of.

Layer 1 is `input_tile`: one reading of w_1 applies the update of the step before and computes this
step's z_1. Layers 2 … L, loss and backward are `forward`, `loss` and `backward_layer`, which takes
dx, dw and the update of a layer in one reading of its weights. The formulas are in `network`; l
counts from 1.

A program works alone on its network. What one phase leaves for the next is in scratch, which stays
in the processor's cache: y_l and dz_l of every layer, each NET.block_m rows of NET.pitch. A value
stored by one thread is read by others only behind `tl.debug_barrier()`. Arrays of several networks,
or of private copies, are stacked: `r` selects one. Tiles are bounded by the configuration, not by
the network. Rows beyond the batch have dz = 0, columns beyond a layer's width meet weights that
were loaded as 0.
"""

import triton
import triton.language as tl

from .objective import loss
from .optim import update_tile
from .tiles import Matrix, dot, product_tile


@triton.jit
def update_bias(net, r, offs_n, dz, live, numbers, l: tl.constexpr, NET: tl.constexpr):
    """Forward was z_mn = … + b_n, so db_n = Σ_m dz_mn. Returns the columns offs_n of b_l, updated
    where `live`.
    """
    i: tl.constexpr = 2 * l - 1
    base = r * NET.sizes[l]
    mask = offs_n < NET.sizes[l]
    b = tl.load(net.tensors[i] + base + offs_n, mask=mask, other=0.0)
    mask = offs_n < tl.where(
        live, NET.sizes[l], 0
    )  # the interpreter cannot `&` a tile and one truth value
    return tl.where(
        live,
        # Several warps hold the same columns.
        update_tile(net, i, base, offs_n, mask, b, tl.sum(dz, axis=0), numbers, NET, True),
        b,
    )


@triton.jit
def batch_rows(i_ptr, t, n, batch, NET: tl.constexpr):
    """The data rows of batch t of the permutation, [block_m], and which of them exist: none for t =
    -1 or past the end.
    """
    offs_m = tl.arange(0, NET.block_m)
    mask = offs_m < tl.where(t >= 0, tl.minimum(batch, n - t * batch), 0)
    return tl.load(i_ptr + t * batch + offs_m, mask=mask, other=0).to(tl.int64), mask


@triton.jit
def inputs(x_ptrs, mask, scale, shift):
    """A tile of the data, data · scale + shift in float32; 0 outside the mask, where the shift must
    not reach either.
    """
    return tl.where(mask, tl.load(x_ptrs, mask=mask, other=0).to(tl.float32) * scale + shift, 0.0)


@triton.jit
def input_tile(
    net,
    r,
    x_ptr,
    rows,
    mask_m,
    rows_before,
    mask_before,
    dz,
    live,
    offs_n,
    numbers,
    scale,
    shift,
    NET: tl.constexpr,
):
    """Columns offs_n of z_1 = x w_1ᵀ + b_1, after w_1 and b_1 took the update of the step before:
    one reading of w_1.

    That step's forward was z_mn = Σ_k x_mk w_nk, so dw_nk = Σ_m dz_mn x_mk, with its rows x and dz
    [block_m, columns]. Before the first step (`live` is false) there is nothing to apply. Tiles of
    w lie transposed: [block_k, columns].
    """
    K: tl.constexpr = NET.sizes[0]
    PRECISION: tl.constexpr = NET.precision
    base = r * (NET.sizes[1] * K)
    mask_n = offs_n < NET.sizes[1]
    x_ptrs, xt_ptrs = (x_ptr + rows * K)[:, None], (x_ptr + rows_before * K)[None, :]
    z = tl.zeros(dz.shape, dtype=tl.float32)
    if NET.bias:
        z += update_bias(net, r, offs_n, dz, live, numbers, 1, NET)[None, :]
    for k in tl.range(0, K, NET.block_k):
        offs_k = k + tl.arange(0, NET.block_k)
        mask_k = offs_k < K
        offs_w = offs_n[None, :] * K + offs_k[:, None]
        mask = mask_k[:, None] & mask_n[None, :]
        w = tl.load(net.tensors[0] + base + offs_w, mask=mask, other=0.0)
        xt = inputs(xt_ptrs + offs_k[:, None], mask_k[:, None] & mask_before[None, :], scale, shift)
        dw = dot(xt, dz, tl.zeros(w.shape, dtype=tl.float32), PRECISION)
        mask = (offs_k < tl.where(live, K, 0))[:, None] & mask_n[None, :]
        SHARED: tl.constexpr = offs_w.numel < NET.threads
        new = update_tile(net, 0, base, offs_w, mask, w, dw, numbers, NET, SHARED)
        w = tl.where(live, new, w)
        x = inputs(x_ptrs + offs_k[None, :], mask_m[:, None] & mask_k[None, :], scale, shift)
        z = dot(x, w, z, PRECISION)
    return z


@triton.jit
def scratch(l: tl.constexpr, offs, NET: tl.constexpr):
    """Offsets of columns offs of layer l in the scratch of y or dz, [block_m, columns]."""
    return (
        (l - 1) * (NET.block_m * NET.pitch)
        + tl.arange(0, NET.block_m)[:, None] * NET.pitch
        + offs[None, :]
    )


@triton.jit
def load_columns(ptr, l: tl.constexpr, offs, NET: tl.constexpr):
    """Columns offs of y_l or dz_l from scratch, 0 beyond the layer's width."""
    return tl.load(ptr + scratch(l, offs, NET), mask=(offs < NET.sizes[l])[None, :], other=0.0)


@triton.jit
def first_tile(
    y_ptr,
    dz_ptr,
    net,
    r,
    x_ptr,
    rows,
    mask_m,
    rows_before,
    mask_before,
    live,
    offs_n,
    numbers,
    scale,
    shift,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    NET: tl.constexpr,
):
    """`input_tile` from dz_1 of the step before to y_1 of this step, both columns offs_n in
    scratch.
    """
    offs = scratch(1, offs_n, NET)
    dz = tl.load(dz_ptr + offs, mask=(offs_n < tl.where(live, NET.sizes[1], 0))[None, :], other=0.0)
    z = input_tile(
        net,
        r,
        x_ptr,
        rows,
        mask_m,
        rows_before,
        mask_before,
        dz,
        live,
        offs_n,
        numbers,
        scale,
        shift,
        NET,
    )
    tl.store(y_ptr + offs, first_act(z, ACT, OUT, NET))


@triton.jit
def first_act(z, ACT: tl.constexpr, OUT: tl.constexpr, NET: tl.constexpr):
    """y_1 = act(z_1): the output's activation where layer 1 is the last."""
    if len(NET.sizes) == 2:
        return OUT(z)
    else:
        return ACT(z)


@triton.jit
def forward_tile(y_ptr, net, r, n, l: tl.constexpr, NET: tl.constexpr):
    """Columns n … n + tile of z_l = y_{l-1} w_lᵀ + b_l."""
    K: tl.constexpr = NET.sizes[l - 1]
    N: tl.constexpr = NET.sizes[l]
    PRECISION: tl.constexpr = NET.precision
    offs_n = n + tl.arange(0, NET.tiles[l])
    y = Matrix(y_ptr + (l - 2) * (NET.block_m * NET.pitch), NET.block_m, NET.pitch, 1)
    w = Matrix(net.tensors[(l - 1) * (1 + NET.bias)] + r * (N * K), N, K, 1)
    offs_m = tl.arange(0, NET.block_m)
    z, _ = product_tile(y, w, offs_m, offs_n, 0, K, NET.block_r, PRECISION, False)
    if NET.bias:
        z += tl.load(net.tensors[2 * l - 1] + r * N + offs_n, mask=offs_n < N, other=0.0)[None, :]
    return z


@triton.jit
def forward(y_ptr, net, r, ACT: tl.constexpr, OUT: tl.constexpr, NET: tl.constexpr):
    """y_L [block_m, classes' tile], from y_1 in scratch; y_2 … y_{L-1} are left there."""
    L: tl.constexpr = len(NET.sizes) - 1
    for l in tl.static_range(2, L):
        for n in tl.range(0, NET.sizes[l], NET.tiles[l], num_stages=1):
            y = ACT(forward_tile(y_ptr, net, r, n, l, NET))
            tl.store(y_ptr + scratch(l, n + tl.arange(0, NET.tiles[l]), NET), y)
        tl.debug_barrier()
    if L > 1:
        return OUT(forward_tile(y_ptr, net, r, 0, L, NET))
    else:
        return load_columns(y_ptr, 1, tl.arange(0, NET.tiles[1]), NET)


@triton.jit
def top(
    y_ptr,
    dz_ptr,
    loss_ptr,
    correct_ptr,
    net,
    r,
    t_ptr,
    rows,
    mask_m,
    numbers,
    writer,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    OUT_BWD: tl.constexpr,
    NET: tl.constexpr,
):
    """From y_1 up to the loss and down to dz_L, both in scratch; stores loss and count where
    `writer`, updates b_L.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    y = forward(y_ptr, net, r, ACT, OUT, NET)
    value, correct, dy = loss(y, t_ptr, rows, mask_m, NET)
    tl.store(loss_ptr, value, mask=writer)
    tl.store(correct_ptr, correct, mask=writer)
    dz = OUT_BWD(dy, y)
    offs_c = tl.arange(0, NET.tiles[L])
    tl.store(dz_ptr + scratch(L, offs_c, NET), dz)
    if NET.bias and L > 1:
        update_bias(net, r, offs_c, dz, True, numbers, L, NET)
    tl.debug_barrier()


@triton.jit
def backward_tile(
    dz_ptr,
    net,
    r,
    y,
    offs_k,
    numbers,
    l: tl.constexpr,
    DX: tl.constexpr,
    UPDATE: tl.constexpr,
    NET: tl.constexpr,
):
    """Columns offs_k of dy_{l-1} = dz_l w_l, and the update of those columns of w_l: one reading of
    them does both.

    Forward was z_mn = Σ_k y_mk w_nk, so dy_mk = Σ_n dz_mn w_nk with w as it was, and dw_nk = Σ_m
    dz_mn y_mk.
    """
    K: tl.constexpr = NET.sizes[l - 1]
    N: tl.constexpr = NET.sizes[l]
    PRECISION: tl.constexpr = NET.precision
    i: tl.constexpr = (l - 1) * (1 + NET.bias)
    base = r * (N * K)
    dy = tl.zeros(y.shape, dtype=tl.float32)
    for n in tl.range(0, N, NET.block_r):
        offs_n = n + tl.arange(0, NET.block_r)
        dz = load_columns(dz_ptr, l, offs_n, NET)
        offs_w = offs_n[:, None] * K + offs_k[None, :]
        mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        w = tl.load(net.tensors[i] + base + offs_w, mask=mask, other=0.0)
        if DX:
            dy = dot(dz, w, dy, PRECISION)
        if UPDATE:
            dw = dot(tl.trans(dz), y, tl.zeros(w.shape, dtype=tl.float32), PRECISION)
            SHARED: tl.constexpr = offs_w.numel < NET.threads
            update_tile(net, i, base, offs_w, mask, w, dw, numbers, NET, SHARED)
    return dy


@triton.jit
def backward_layer(
    y_ptr,
    dz_ptr,
    net,
    r,
    numbers,
    l: tl.constexpr,
    DX: tl.constexpr,
    ACT_BWD: tl.constexpr,
    NET: tl.constexpr,
):
    """Updates w_l from dz_l and y_{l-1} in scratch; with DX stores dz_{l-1} = dy_{l-1} ⊙ act' there
    and updates b_{l-1}.
    """
    for k in tl.range(0, NET.sizes[l - 1], NET.tiles[l - 1], num_stages=1):
        offs_k = k + tl.arange(0, NET.tiles[l - 1])
        y = load_columns(y_ptr, l - 1, offs_k, NET)
        dy = backward_tile(dz_ptr, net, r, y, offs_k, numbers, l, DX, True, NET)
        if DX:
            dz = ACT_BWD(dy, y)
            tl.store(dz_ptr + scratch(l - 1, offs_k, NET), dz)
            if NET.bias and l > 2:  # b_1 takes its update with w_1
                update_bias(net, r, offs_k, dz, True, numbers, l - 1, NET)
    tl.debug_barrier()
