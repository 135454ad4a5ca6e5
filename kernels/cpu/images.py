"""The convolutions of a batch, compiled by numba. Each image stays in a core's cache.

A layer is y = max_pool(act(conv(x, w) + b)), with stride 1 and without padding. Its formulas are in
`kernels.ops.conv`. Here only the winners of the max-pool have a place in memory.

Forward. The outputs of an image are numbered as its pixels are, row by row, so a row has some
outputs too many. Output number p of channel o is Σ_k w[o, k] x[p + place of tap k]. So a product
over a list of places needs no matrix of patches.

Backward. Only winners have a gradient. Each one that is not 0 adds g · patch to its channel's dw,
and g · w to the patch of dx that it read. So the winners of a channel are listed first.

A batch is cut into chunks, which depend on its size alone. Each has its own sums of gradients,
which are added up in order. So results do not depend on the number of threads.
"""

from typing import NamedTuple

import numpy as np

from .tiles import LINES, add_scaled, lanes, patch_lines
from .waiting import call, inside, numbers

# Columns of `Run.layers`: sizes. C, H, W: of an image. O: channels out. K: side of the kernel.
# P: side of the pooling window. PH, PW: of the pooled image. PITCH: floats of a channel's outputs.
# WIDE: floats of a row of the kernel, padded. TERMS: taps.
C, H, W, O, K, P, PH, PW, PITCH, WIDE, TERMS = range(11)
# Where things begin in the flat array. SPREAD: the weights, each tap at its place in an image.
# PADDED: the weights in rows of WIDE. BIAS. PLACES: the places of the taps, int32. Y, KEPT, WINNER,
# D: of the winners, for each image. KEPT is what act' is computed from, and D is dy, then dz. DW,
# DB: sums of gradients, for each chunk.
SPREAD, PADDED, BIAS, PLACES, Y, KEPT, WINNER, D, DW, DB, COLUMNS = range(11, 22)
# Entries of `Run.places`. Parts of each worker's scratch. IMAGE: an image. Z, ACT: its outputs. DX:
# its gradient. MAXIMA: twice ROOM maxima, then their places, int32. LISTED: ROOM places of winners,
# int32, then ROOM gradients.
IMAGE, Z, ACT, DX, MAXIMA, LISTED = range(6)
# ZEROS, NUMBERS: where zeros and 0, 1, 2, … as int32 begin. ROOM: at least the outputs of a
# channel. SHARE: floats of a worker's scratch. CHUNK: images of a chunk. BASE: the flat array's
# address.
ZEROS, NUMBERS, ROOM, SHARE, CHUNK, BASE = range(6, 12)
# Addresses of functions. NEEDS: 1 if act' is computed from y, 2 if from z, 0 from neither.
FORWARD, BACKWARD, PRODUCT, NEEDS, ENTRIES = range(12, 17)


class Run(NamedTuple):
    """The flat array of the layers, and where everything lies in it."""

    w: np.ndarray  # (floats,) float32
    whole: np.ndarray  # (floats,) int32, the same memory
    layers: np.ndarray  # (layers, COLUMNS) int64
    places: np.ndarray  # (ENTRIES,) int64


def load(run, l, weight, bias):
    """Copy a layer's parameters, which lie at these addresses, into the flat array."""
    layer, w = run.layers[l], run.w
    given, side = numbers(w, weight), layer[K]
    size = layer[C] * layer[H] * layer[W]
    for o in range(layer[O]):
        w[layer[BIAS] + o] = numbers(w, bias)[o]
        for row in range(layer[C] * side):
            to = layer[PADDED] + (o * layer[C] * side + row) * layer[WIDE]
            spread = layer[SPREAD] + o * size
            for i in range(side):
                value = given[(o * layer[C] * side + row) * side + i]
                w[to + i] = value
                w[spread + run.whole[layer[PLACES] + row * side + i]] = value


@inside
def _outputs(run, layer, x, scratch):
    """Compute z and act(z) of the image that begins at w[x]."""
    w, places, pitch = run.w, run.places, layer[PITCH]
    z, base = scratch + places[Z], places[BASE]
    zero, one = np.int64(0), np.int64(1)
    left, first = (layer[SPREAD], layer[C] * layer[H] * layer[W], one), (places[ZEROS], zero)
    shape = (layer[O], pitch // lanes(w), layer[TERMS])
    lists = (base + 4 * layer[PLACES], zero, zero, zero, zero)
    call(places[PRODUCT], (base, *left, x, one, *first, z, pitch, *shape, *lists))
    for o in range(layer[O]):
        plane, bias = w[z + o * pitch : z + (o + 1) * pitch], w[layer[BIAS] + o]
        for i in range(pitch):
            plane[i] += bias
    addresses = (base + 4 * z, base + 4 * (scratch + places[ACT]))
    call(places[FORWARD], (*addresses, layer[O] * pitch))


@inside
def _higher(best, place, values, places):
    """Replace best and place where values are higher. NaN is the highest, and a later one wins.

    The place is computed, not chosen: a loop with two choices does not become vector instructions.
    """
    for i in range(len(best)):
        value, before = values[i], best[i]
        higher = np.int32(value > before) | np.int32(value != value)
        best[i] = value if higher else before
        place[i] += higher * (places[i] - place[i])


@inside
def _window_maxima(run, layer, act, scratch):
    """Find the first maximum of the window that begins at each output of a channel.

    act: where the channel's outputs begin. Returns where the maxima begin, and their places. Most
    windows overlap others, but loops over all outputs become vector instructions.
    """
    side, across = layer[P], layer[W]
    count = (layer[PH] - 1) * side * across + (layer[PW] - 1) * side + 1
    rows, room = count + (side - 1) * across, run.places[ROOM]
    line, found = scratch + run.places[MAXIMA], scratch + run.places[MAXIMA] + room
    best, place = run.w[line : line + rows], run.whole[line + 2 * room : line + 2 * room + rows]
    numbered = run.whole[run.places[NUMBERS] : run.places[NUMBERS] + rows + side]
    outputs = run.w[act : act + rows]
    for i in range(rows):
        best[i] = outputs[i]
        place[i] = numbered[i]
    for column in range(1, side):
        start = act + column
        _higher(best, place, run.w[start : start + rows], numbered[column:])
    maxima, places = run.w[found : found + count], run.whole[found + 2 * room :]
    for i in range(count):
        maxima[i] = best[i]
        places[i] = place[i]
    for row in range(1, side):
        start = row * across
        _higher(maxima, places, best[start:], place[start:])
    return found, found + 2 * room


@inside
def _pool(run, layer, image, scratch):
    """Keep the winner of each window of `image`: y, its place, and z if the backward needs it.

    The first maximum wins. But a NaN wins always, as in torch.
    """
    w, side, pitch = run.w, layer[P], layer[PITCH]
    to = image * layer[O] * layer[PH] * layer[PW]
    for o in range(layer[O]):
        act, z = scratch + run.places[ACT] + o * pitch, scratch + run.places[Z] + o * pitch
        maxima, places = _window_maxima(run, layer, act, scratch)
        for i in range(layer[PH]):
            at = i * side * layer[W]
            for _ in range(layer[PW]):
                place = run.whole[places + at]
                w[layer[Y] + to] = w[maxima + at]
                run.whole[layer[WINNER] + to] = place
                if run.places[NEEDS] == 2:
                    w[layer[KEPT] + to] = w[z + place]
                to += 1
                at += side


def forward(run, x, worker, begin, end):
    """Take images `begin` to `end` through all layers. x: the address of the batch's images."""
    first, scratch = run.layers[0], worker * run.places[SHARE]
    size, given = first[C] * first[H] * first[W], numbers(run.w, x)
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


@inside
def _list_winners(run, layer, first, scratch):
    """List the winners of a channel whose gradient is not 0. Returns their number and Σ dz.

    first: the channel's first winner. The lists are the places, int32, and the gradients.
    """
    places, gradients = (
        scratch + run.places[LISTED],
        scratch + run.places[LISTED] + run.places[ROOM],
    )
    count, total = np.int64(0), np.float32(0.0)
    for m in range(first, first + layer[PH] * layer[PW]):
        g = run.w[layer[D] + m]
        run.whole[places + count] = run.whole[layer[WINNER] + m]
        run.w[gradients + count] = g
        total += g
        count += g != 0
    return count, total


@inside
def _winners(run, layer, image, chunk, x, dx, scratch):
    """Add up what the winners of `image` give dw, db and, unless dx is 0, dx.

    x: where the layer's input begins. dx: where its gradient begins.
    """
    w, side, wide, plane = run.w, layer[K], layer[WIDE], layer[H] * layer[W]
    size, pooled = layer[C] * side * wide, layer[PH] * layer[PW]
    places, gradients = (
        scratch + run.places[LISTED],
        scratch + run.places[LISTED] + run.places[ROOM],
    )
    listed = run.places[BASE] + 4 * places
    for o in range(layer[O]):
        count, total = _list_winners(run, layer, (image * layer[O] + o) * pooled, scratch)
        w[layer[DB] + chunk * layer[O] + o] += total
        sums = layer[DW] + (chunk * layer[O] + o) * size
        for c in range(layer[C]):
            for row in range(0, side, LINES):
                lines = min(LINES, side - row)
                for i in range(0, wide, lanes(w)):
                    to, start = (
                        sums + (c * side + row) * wide + i,
                        x + c * plane + row * layer[W] + i,
                    )
                    patch_lines(w, to, wide, gradients, listed, count, start, layer[W], lines)
        if dx == 0:
            continue
        weights = layer[PADDED] + o * size
        for m in range(count):
            g, row, start = w[gradients + m], weights, dx + run.whole[places + m]
            for _ in range(layer[C]):
                for line in range(start, start + side * layer[W], layer[W]):
                    for i in range(0, wide, lanes(w)):
                        add_scaled(w, line + i, row + i, g)
                    row += wide
                start += plane


@inside
def _clear(w, start, count):
    values = w[start : start + count]
    for i in range(count):
        values[i] = np.float32(0.0)


@inside
def _image_back(run, n, chunk, x, scratch):
    """Take image n from the last layer's dy to the gradients of all layers."""
    w, first, places = run.w, run.layers[0], run.places
    size, given, image = first[C] * first[H] * first[W], numbers(run.w, x), scratch + places[IMAGE]
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
            _winners(run, layer, n, chunk, image, np.int64(0), scratch)
            continue
        size, dx = layer[C] * layer[H] * layer[W], scratch + places[DX]
        below = run.layers[l - 1]
        _clear(w, dx, size)
        _winners(run, layer, n, chunk, below[Y] + n * size, dx, scratch)
        for i in range(size):
            w[below[D] + n * size + i] = w[dx + i]


def backward(run, x, dy, worker, begin, end, count):
    """Compute the gradients of chunks `begin` to `end` of `count` images, one sum for each chunk.

    x, dy: the addresses of the batch's images and of the gradient of the last layer's y.
    """
    w, last = run.w, run.layers[-1]
    size, given = last[O] * last[PH] * last[PW], numbers(w, dy)
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
            numbers(w, dw)[line * side + i] = w[layer[DW] + line * wide + i]
    for o in range(layer[O]):
        numbers(w, db)[o] = w[layer[DB] + o]
