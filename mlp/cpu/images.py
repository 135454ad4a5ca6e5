"""The convolutions of a batch, compiled by numba. Each image stays in a core's cache.

A layer is y = max_pool(act(conv(x, w) + b)), with stride 1 and without padding. Its formulas are in
`kernels.ops.conv`. Here only the winners of the max-pool have a place in memory.

Forward. The outputs of an image are numbered as its pixels are, row by row, so a row has some
outputs too many. Output number p of channel o is Σ_k w[o, k] x[p + place of tap k]. So a product
over a list of places needs no matrix of patches.

Backward. Only winners have a gradient. Each one that is not 0 adds g · patch to its channel's dw,
and g · w to the patch of dx that it read.

A batch is cut into chunks, which depend on its size alone. Each has its own sums of gradients,
which are added up in order. So results do not depend on the number of threads.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from .tiles import LANES, add_scaled
from .waiting import call, floats

# Columns of `Run.layers`: sizes. C, H, W: of an image. O: channels out. K: side of the kernel.
# P: side of the pooling window. PH, PW: of the pooled image. PITCH: floats of a channel's outputs.
# WIDE: floats of a row of the kernel, padded. TERMS: taps.
C, H, W, O, K, P, PH, PW, PITCH, WIDE, TERMS = range(11)
# Where things begin in the flat array. SPREAD: the weights, each tap at its place in an image.
# PADDED: the weights in rows of WIDE. BIAS. PLACES: the places of the taps, int32. Y, KEPT, WINNER,
# D: of the winners, for each image. KEPT is what act' is computed from, and D is dy, then dz. DW,
# DB: sums of gradients, for each chunk.
SPREAD, PADDED, BIAS, PLACES, Y, KEPT, WINNER, D, DW, DB, COLUMNS = range(11, 22)
# Entries of `Run.places`: where each worker's scratch begins, and sizes. IMAGE: an image. Z, ACT:
# outputs of one image. DX: its gradient. ZEROS. SHARE: floats of a worker's scratch. CHUNK: images
# of a chunk. BASE: the address of the flat array.
IMAGE, Z, ACT, DX, ZEROS, SHARE, CHUNK, BASE = range(8)
# Addresses of functions. NEEDS: 1 if act' is computed from y, 2 if from z, 0 from neither.
FORWARD, BACKWARD, PRODUCT, NEEDS, ENTRIES = range(8, 13)


class Run(NamedTuple):
    """The flat array of the layers, and where everything lies in it."""

    w: np.ndarray  # (floats,) float32
    whole: np.ndarray  # (floats,) int32, the same memory
    layers: np.ndarray  # (layers, COLUMNS) int64
    places: np.ndarray  # (ENTRIES,) int64


def load(run, l, weight, bias):
    """Copy a layer's parameters, which lie at these addresses, into the flat array."""
    layer, w = run.layers[l], run.w
    given, side = floats(weight), layer[K]
    size = layer[C] * layer[H] * layer[W]
    for o in range(layer[O]):
        w[layer[BIAS] + o] = floats(bias)[o]
        for row in range(layer[C] * side):
            to = layer[PADDED] + (o * layer[C] * side + row) * layer[WIDE]
            spread = layer[SPREAD] + o * size
            for i in range(side):
                value = given[(o * layer[C] * side + row) * side + i]
                w[to + i] = value
                w[spread + run.whole[layer[PLACES] + row * side + i]] = value


@njit(nogil=True)
def _outputs(run, layer, x, scratch):
    """Compute z and act(z) of the image that begins at w[x]."""
    w, places, pitch = run.w, run.places, layer[PITCH]
    z, base = scratch + places[Z], places[BASE]
    zero, one = np.int64(0), np.int64(1)
    left, first = (layer[SPREAD], layer[C] * layer[H] * layer[W], one), (places[ZEROS], zero)
    shape = (layer[O], pitch // LANES, layer[TERMS])
    lists = (base + 4 * layer[PLACES], zero, zero, zero, zero)
    call(places[PRODUCT], (base, *left, x, one, *first, z, pitch, *shape, *lists))
    for o in range(layer[O]):
        plane, bias = w[z + o * pitch : z + (o + 1) * pitch], w[layer[BIAS] + o]
        for i in range(pitch):
            plane[i] += bias
    addresses = (base + 4 * z, base + 4 * (scratch + places[ACT]))
    call(places[FORWARD], (*addresses, layer[O] * pitch))


@njit(nogil=True)
def _pool(run, layer, image, scratch):
    """Keep the winner of each window of `image`: y, its place, and z if the backward needs it.

    The first maximum wins. But a NaN wins always, as in torch.
    """
    w, side, pitch = run.w, layer[P], layer[PITCH]
    to = image * layer[O] * layer[PH] * layer[PW]
    for o in range(layer[O]):
        act = w[scratch + run.places[ACT] + o * pitch : scratch + run.places[ACT] + (o + 1) * pitch]
        z = scratch + run.places[Z] + o * pitch
        for i in range(layer[PH]):
            for j in range(layer[PW]):
                start = i * side * layer[W] + j * side
                best, place = act[start], start
                for row in range(side):
                    for at in range(start + row * layer[W], start + row * layer[W] + side):
                        value = act[at]
                        higher = (value > best) | (value != value)
                        best = value if higher else best
                        place = at if higher else place
                w[layer[Y] + to] = best
                run.whole[layer[WINNER] + to] = place
                if run.places[NEEDS] == 2:
                    w[layer[KEPT] + to] = w[z + place]
                to += 1


def forward(run, x, worker, begin, end):
    """Take images `begin` to `end` through all layers. x: the address of the batch's images."""
    first, scratch = run.layers[0], worker * run.places[SHARE]
    size, given = first[C] * first[H] * first[W], floats(x)
    image = scratch + run.places[IMAGE]
    for n in range(begin, end):
        for i in range(size):
            run.w[image + i] = given[n * size + i]
        at = image
        for l in range(len(run.layers)):
            layer = run.layers[l]
            _outputs(run, layer, at, scratch)
            _pool(run, layer, n, scratch)
            at = layer[Y] + n * layer[O] * layer[PH] * layer[PW]


@njit(nogil=True)
def _winners(run, layer, image, chunk, x, dx):
    """Add up what the winners of `image` give dw, db and, unless dx is 0, dx.

    x: where the layer's input begins. dx: where its gradient begins.
    """
    w, side, wide, plane = run.w, layer[K], layer[WIDE], layer[H] * layer[W]
    size, pooled = layer[C] * side * wide, layer[PH] * layer[PW]
    to = layer[DW] + chunk * layer[O] * size
    at = image * layer[O] * pooled
    for o in range(layer[O]):
        total, weights, sums = np.float32(0.0), layer[PADDED] + o * size, to + o * size
        for m in range(at + o * pooled, at + (o + 1) * pooled):
            g = w[layer[D] + m]
            total += g
            if g == 0:
                continue
            place, row = run.whole[layer[WINNER] + m], np.int64(0)
            for c in range(layer[C]):
                for line in range(place + c * plane, place + c * plane + side * layer[W], layer[W]):
                    for i in range(0, wide, LANES):
                        add_scaled(w, sums + row + i, x + line + i, g)
                        if dx:
                            add_scaled(w, dx + line + i, weights + row + i, g)
                    row += wide
        w[layer[DB] + chunk * layer[O] + o] += total


@njit(nogil=True)
def _clear(w, start, count):
    values = w[start : start + count]
    for i in range(count):
        values[i] = np.float32(0.0)


@njit(nogil=True)
def _image_back(run, n, chunk, x, scratch):
    """Take image n from the last layer's dy to the gradients of all layers."""
    w, first, places = run.w, run.layers[0], run.places
    size, given, image = first[C] * first[H] * first[W], floats(x), scratch + places[IMAGE]
    for i in range(size):
        w[image + i] = given[n * size + i]
    for l in range(len(run.layers) - 1, -1, -1):
        layer = run.layers[l]
        count = layer[O] * layer[PH] * layer[PW]
        d, kept = layer[D] + n * count, layer[KEPT] + n * count
        base = places[BASE]
        if places[NEEDS]:
            call(places[BACKWARD], (base + 4 * d, base + 4 * kept, count))
        if l == 0:
            _winners(run, layer, n, chunk, image, np.int64(0))
            continue
        size, dx = layer[C] * layer[H] * layer[W], scratch + places[DX]
        below = run.layers[l - 1]
        _clear(w, dx, size)
        _winners(run, layer, n, chunk, below[Y] + n * size, dx)
        for i in range(size):
            w[below[D] + n * size + i] = w[dx + i]


def backward(run, x, dy, worker, begin, end, count):
    """Compute the gradients of chunks `begin` to `end` of `count` images, one sum for each chunk.

    x, dy: the addresses of the batch's images and of the gradient of the last layer's y.
    """
    w, last = run.w, run.layers[-1]
    size, given = last[O] * last[PH] * last[PW], floats(dy)
    for chunk in range(begin, end):
        for l in range(len(run.layers)):
            layer = run.layers[l]
            each = layer[O] * layer[C] * layer[K] * layer[WIDE]
            _clear(w, layer[DW] + chunk * each, each)
            _clear(w, layer[DB] + chunk * layer[O], layer[O])
        start = chunk * run.places[CHUNK]
        for n in range(start, min(count, start + run.places[CHUNK])):
            for i in range(size):
                w[last[D] + n * size + i] = given[n * size + i]
            _image_back(run, n, chunk, x, worker * run.places[SHARE])


def add_up(run, l, chunks, dw, db):
    """Write the gradients of layer l to these addresses: the sums over all chunks."""
    layer, w = run.layers[l], run.w
    side, wide = layer[K], layer[WIDE]
    lines = layer[O] * layer[C] * side
    for chunk in range(1, chunks):
        total, part = w[layer[DW] : layer[DW] + lines * wide], w[layer[DW] + chunk * lines * wide :]
        for i in range(lines * wide):
            total[i] += part[i]
        for o in range(layer[O]):
            w[layer[DB] + o] += w[layer[DB] + chunk * layer[O] + o]
    for line in range(lines):
        for i in range(side):
            floats(dw)[line * side + i] = w[layer[DW] + line * wide + i]
    for o in range(layer[O]):
        floats(db)[o] = w[layer[DB] + o]
