"""One training step as parts of a kernel. `step`, `epoch` and `exchange` consist of them.

Layer 1 is `input_tile`. It reads w_1 once, applies the update of the step before, and computes this
step's z_1. The other layers, the loss and the backward are `forward`, `loss` and `backward_layer`.
`backward_layer` reads the weights of a layer once for dx, dw and the update. The formulas are in
`network`. l counts from 1.

A program works alone on its network. One phase stores its results for the next in scratch, which
stays in the processor's cache. Scratch holds y_l and dz_l of every layer, NET.block_m rows of
NET.pitch each. If act' needs z, it also holds z_l of the hidden layers. In a network of one layer,
the place of y_1 holds z_1, because `top` applies the output's activation.

A value stored by one thread is read by others only after `tl.debug_barrier()`. Arrays of several
networks, or of private copies, are stacked, and `r` selects one. Tiles are bounded by the
configuration, not by the network. Rows beyond the batch have dz = 0. Columns beyond a layer's width
meet weights that were loaded as 0.
"""

from typing import Any, NamedTuple

from ..language import tl, triton
from ..ops.optim import numbers_at, update_tile
from ..tiles import Matrix, dot, product_tile, settled
from .objective import loss
from .run import Results, Scratch


class Rows(NamedTuple):
    """The rows of the data that form a batch, [block_m], and a mask of those that exist."""

    index: Any
    mask: Any


@triton.jit
def scratch_of(scratch, r, NET: tl.constexpr):
    """Program r's part of the scratch."""
    size: tl.constexpr = (len(NET.sizes) - 1) * NET.block_m * NET.pitch
    return Scratch(scratch.y + r * size, scratch.dz + r * size, scratch.z + r * size)


@triton.jit
def results_at(results, t):
    """Where the results of step t go."""
    return Results(results.loss + t, results.correct + t)


@triton.jit
def numbers_of(hyper_ptr, t, step, NET: tl.constexpr):
    """The rule's numbers of the epoch's step t. step is its count in the whole training, from 1.

    They come from row t of hyper if NET.scheduled, else from the only row.
    """
    if NET.scheduled:
        hyper_ptr += tl.maximum(t, 0) * len(NET.columns)
    return numbers_at(hyper_ptr, step, NET)


@triton.jit
def update_bias(net, r, offs_n, dz, live, numbers, l: tl.constexpr, NET: tl.constexpr):
    """Columns offs_n of b_l, updated where `live`.

    Forward was z_mn = … + b_n, so db_n = Σ_m dz_mn.
    """
    i: tl.constexpr = 2 * l - 1
    base = r * NET.sizes[l]
    mask = offs_n < NET.sizes[l]
    b = tl.load(net.tensors[i] + base + offs_n, mask=mask, other=0.0)
    # The interpreter cannot `&` a tile and one truth value.
    mask = offs_n < tl.where(live, NET.sizes[l], 0)
    db = tl.sum(settled(dz), axis=0)
    # Several warps hold the same columns.
    return tl.where(live, update_tile(net, i, base, offs_n, mask, b, db, numbers, NET, True), b)


@triton.jit
def batch_rows(order, t, NET: tl.constexpr):
    """The Rows of batch t of the permutation. None exist for t = -1 or past the end."""
    offs_m = tl.arange(0, NET.block_m)
    mask = offs_m < tl.where(t >= 0, tl.minimum(order.batch, order.n - t * order.batch), 0)
    index = tl.load(order.indices + t * order.batch + offs_m, mask=mask, other=0).to(tl.int64)
    return Rows(index, mask)


@triton.jit
def inputs(x_ptrs, mask, samples):
    """A tile of data · scale + shift, in float32.

    It is 0 outside the mask, where the shift must not be added.
    """
    x = tl.load(x_ptrs, mask=mask, other=0).to(tl.float32)
    return tl.where(mask, x * samples.scale + samples.shift, 0.0)


@triton.jit
def input_tile(
    net,  # Parameters
    r,
    samples,  # Samples
    rows,  # Rows
    before,  # Rows of the step before
    dz,  # [block_m, columns], of that step
    live,
    offs_n,  # [columns]
    numbers,
    NET: tl.constexpr,
):
    """Columns offs_n of z_1 = x w_1ᵀ + b_1, after the pending update of w_1 and b_1.

    One reading of w_1 serves the update and the product.

    The forward of the step before was z_mn = Σ_k x_mk w_nk, so dw_nk = Σ_m dz_mn x_mk, with the
    rows x and the dz of that step. Before the first step, `live` is false, and nothing is applied.
    Tiles of w are transposed: [block_k, columns].
    """
    K: tl.constexpr = NET.sizes[0]
    PRECISION: tl.constexpr = NET.precision
    base = r * (NET.sizes[1] * K)
    mask_n = offs_n < NET.sizes[1]
    x_ptrs, xt_ptrs = (
        (samples.x + rows.index * K)[:, None],
        (samples.x + before.index * K)[None, :],
    )
    z = tl.zeros(dz.shape, dtype=tl.float32)
    if NET.bias:
        z += update_bias(net, r, offs_n, dz, live, numbers, 1, NET)[None, :]
    for k in tl.range(0, K, NET.block_k):
        offs_k = k + tl.arange(0, NET.block_k)
        mask_k = offs_k < K
        offs_w = offs_n[None, :] * K + offs_k[:, None]
        mask = mask_k[:, None] & mask_n[None, :]
        w = tl.load(net.tensors[0] + base + offs_w, mask=mask, other=0.0)
        xt = inputs(xt_ptrs + offs_k[:, None], mask_k[:, None] & before.mask[None, :], samples)
        dw = dot(xt, dz, tl.zeros(w.shape, dtype=tl.float32), PRECISION)
        mask = (offs_k < tl.where(live, K, 0))[:, None] & mask_n[None, :]
        SHARED: tl.constexpr = offs_w.numel < NET.threads
        new = update_tile(net, 0, base, offs_w, mask, w, dw, numbers, NET, SHARED)
        w = tl.where(live, new, w)
        x = inputs(x_ptrs + offs_k[None, :], rows.mask[:, None] & mask_k[None, :], samples)
        z = dot(x, w, z, PRECISION)
    return z


@triton.jit
def offsets(l: tl.constexpr, offs, NET: tl.constexpr):
    """Offsets [block_m, columns] of columns offs of layer l, in the scratch of y, dz or z."""
    return (
        (l - 1) * (NET.block_m * NET.pitch)
        + tl.arange(0, NET.block_m)[:, None] * NET.pitch
        + offs[None, :]
    )


@triton.jit
def load_columns(ptr, l: tl.constexpr, offs, NET: tl.constexpr):
    """Columns offs of y_l, dz_l or z_l from scratch, 0 beyond the layer's width."""
    return tl.load(ptr + offsets(l, offs, NET), mask=(offs < NET.sizes[l])[None, :], other=0.0)


@triton.jit
def first_tile(
    scratch,  # Scratch
    net,  # Parameters
    r,
    samples,  # Samples
    rows,  # Rows
    before,  # Rows of the step before
    live,
    offs_n,  # [columns]
    numbers,
    NET: tl.constexpr,
):
    """`input_tile` with dz_1 of the step before from scratch. This step's y_1 goes to scratch."""
    offs = offsets(1, offs_n, NET)
    mask = (offs_n < tl.where(live, NET.sizes[1], 0))[None, :]
    dz = tl.load(scratch.dz + offs, mask=mask, other=0.0)
    z = input_tile(net, r, samples, rows, before, dz, live, offs_n, numbers, NET)
    keep(scratch, 1, offs_n, z, NET)


@triton.jit
def first_act(z, NET: tl.constexpr):
    """y_1 = act(z_1), or z_1 itself if layer 1 is the last."""
    if len(NET.sizes) == 2:
        return z
    else:
        return NET.act(z)


@triton.jit
def keep(scratch, l: tl.constexpr, offs_n, z, NET: tl.constexpr):
    """Stores columns offs_n of y_l, made from z_l, and of z_l too if the backward needs it."""
    offs = offsets(l, offs_n, NET)
    tl.store(scratch.y + offs, first_act(z, NET))
    if NET.keeps_z:
        tl.store(scratch.z + offs, z)


@triton.jit
def forward_tile(scratch, net, r, n, l: tl.constexpr, NET: tl.constexpr):
    """Columns n … n + tile of z_l = y_{l-1} w_lᵀ + b_l."""
    K: tl.constexpr = NET.sizes[l - 1]
    N: tl.constexpr = NET.sizes[l]
    PRECISION: tl.constexpr = NET.precision
    offs_n = n + tl.arange(0, NET.tiles[l])
    y_ptr = scratch.y + (l - 2) * (NET.block_m * NET.pitch)
    w_ptr = net.tensors[(l - 1) * (1 + NET.bias)] + r * (N * K)
    WHOLE: tl.constexpr = K % NET.block_r == 0
    # A Matrix with a name would turn its constants into tensors.
    z, _ = product_tile(
        Matrix(y_ptr, NET.block_m, NET.pitch, 1, False),
        Matrix(w_ptr, N, K, 1, False),
        0,
        n,
        0,
        K,
        NET.block_m,
        NET.tiles[l],
        NET.block_r,
        PRECISION,
        False,
        WHOLE,
        (False, False),
    )
    if NET.bias:
        z += tl.load(net.tensors[2 * l - 1] + r * N + offs_n, mask=offs_n < N, other=0.0)[None, :]
    return z


@triton.jit
def forward(scratch, net, r, NET: tl.constexpr):
    """z_L [block_m, classes' tile], from y_1 in scratch. y_2 … y_{L-1} are stored in scratch."""
    L: tl.constexpr = len(NET.sizes) - 1
    for l in tl.static_range(2, L):
        for n in tl.range(0, NET.sizes[l], NET.tiles[l], num_stages=1):
            z = forward_tile(scratch, net, r, n, l, NET)
            keep(scratch, l, n + tl.arange(0, NET.tiles[l]), z, NET)
        tl.debug_barrier()
    if L > 1:
        return forward_tile(scratch, net, r, 0, L, NET)
    else:
        return load_columns(scratch.y, 1, tl.arange(0, NET.tiles[1]), NET)


@triton.jit
def top(
    scratch,  # Scratch
    results,  # Results of this step
    net,  # Parameters
    r,
    samples,  # Samples
    rows,  # Rows
    numbers,
    writer,
    NET: tl.constexpr,
):
    """Forward from y_1 in scratch to the loss, and back to dz_L, which it stores in scratch.

    It also updates b_L. If `writer`, it stores the loss and the number of correct predictions.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    z = forward(scratch, net, r, NET)
    y = NET.out(z)
    value, correct, dy = loss(y, samples.targets, rows.index, rows.mask, NET)
    tl.store(results.loss, value, mask=writer)
    tl.store(results.correct, correct, mask=writer)
    if NET.out_needs_z:
        dz = NET.out_bwd(dy, z)
    else:
        dz = NET.out_bwd(dy, y)
    offs_c = tl.arange(0, NET.tiles[L])
    tl.store(scratch.dz + offsets(L, offs_c, NET), dz)
    if NET.bias and L > 1:
        update_bias(net, r, offs_c, dz, True, numbers, L, NET)
    tl.debug_barrier()


@triton.jit
def backward_tile(
    dz_ptr,
    net,  # Parameters
    r,
    y,  # [block_m, columns]
    offs_k,  # [columns]
    numbers,
    l: tl.constexpr,
    DX: tl.constexpr,
    UPDATE: tl.constexpr,
    NET: tl.constexpr,
):
    """Columns offs_k of dy_{l-1} = dz_l w_l (DX), and the update of those columns of w_l (UPDATE).

    One reading of w_l serves both. y: those columns of y_{l-1}.

    Forward was z_mn = Σ_k y_mk w_nk. So dy_mk = Σ_n dz_mn w_nk with w before its update, and
    dw_nk = Σ_m dz_mn y_mk.
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
    scratch,  # Scratch
    net,  # Parameters
    r,
    numbers,
    l: tl.constexpr,
    DX: tl.constexpr,
    NET: tl.constexpr,
):
    """Updates w_l from dz_l and y_{l-1} in scratch.

    With DX it also stores dz_{l-1} = dy_{l-1} ⊙ act' in scratch, and updates b_{l-1} for l > 2.
    """
    for k in tl.range(0, NET.sizes[l - 1], NET.tiles[l - 1], num_stages=1):
        offs_k = k + tl.arange(0, NET.tiles[l - 1])
        y = load_columns(scratch.y, l - 1, offs_k, NET)
        dy = backward_tile(scratch.dz, net, r, y, offs_k, numbers, l, DX, True, NET)
        if DX:
            s = y
            if NET.keeps_z:
                s = load_columns(scratch.z, l - 1, offs_k, NET)
            dz = NET.act_bwd(dy, s)
            tl.store(scratch.dz + offsets(l - 1, offs_k, NET), dz)
            if NET.bias and l > 2:  # b_1 is updated together with w_1
                update_bias(net, r, offs_k, dz, True, numbers, l - 1, NET)
    tl.debug_barrier()
