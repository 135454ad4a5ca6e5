"""The steps of an epoch, compiled by numba. One function serves all networks, rules and losses.

Everything lies in one flat array, whose dtype is that of the network. A layer's weights are kept
transposed, w[k, n], and the bias is one more row. A layer of few outputs keeps w[n, k] instead.
Zeros pad each row to whole vectors. A step has two halves, and all workers meet after each:

    1. Each worker owns rows of every w. It applies the update of the step before to them. It then
       multiplies its rows of the first layer by this step's inputs, and adds up the products. No
       other worker reads the inputs that belong to these rows.
    2. Each worker owns rows of the batch. It takes them through the remaining layers, the loss and
       the backward pass, down to the first layer's dz.

If many inputs are 0, as in images, the first layer's products leave them out. Each row of a batch
has a list of its other inputs, and each few rows of w have a list of the rows of the batch. What
a pixel of 0 is read as, the background, is the same for all inputs, so it multiplies sums of w and
of dz.

Every number is the sum of the same terms in the same order, whatever the number of workers. The
sums over the first layer's inputs are cut into chunks, which depend on the network alone. The sums
of the chunks are added up in each half of the inputs, and then the two halves. One or two workers
add up the chunks where they compute them. More workers keep a sum for each chunk, and add these up
after they have met.
"""

from typing import NamedTuple

import numpy as np
from numba import carray

from .tiles import ROWS, lanes, mark, scale_octets, scale_reals, size_of
from .waiting import (
    call,
    inside,
    integers,
    meet,
    narrow_integers,
    number,
    numbers,
    octets,
    prefetch,
)

# Columns of `Run.layers`. K, N: inputs and outputs. PITCH: floats of a padded row of outputs. W, Y,
# Z, D: where w, y, z and dz begin. KEPT: where y or z begins, whichever the backward needs. BLOCK:
# rows of w that are updated at a time. ACROSS: 1 if w is kept across, as w[n, k], which suits few
# outputs. TALL, WIDE: rows of w without the bias, and floats of a row.
K, N, PITCH, W, Y, Z, D, KEPT, BLOCK, ACROSS, TALL, WIDE, COLUMNS_OF_LAYER = range(13)
# Entries of `Run.places`. The first ones are where parts of the flat array begin. X: inputs.
# PARTIAL: partial sums. START: what each worker's gradients of the first layer start from. LISTED:
# each worker's list of terms, int32. EVERY: the list of all terms. BITS: a byte for eight inputs of
# a row, see `tiles.mark`. Q: the loss's outputs, targets
# and gradient, without padding. SCRATCH: gradients of w. LOSS: losses of rows. RIGHT: 1 for each
# row that is right, else 0. ONE: a one. ZEROS: a row of zeros. STATE is the number of floats from a
# parameter to its state.
X, PARTIAL, START, LISTED, EVERY, BITS, Q, SCRATCH, LOSS, RIGHT, ONE, ZEROS, STATE = range(13)
# Sizes and choices. CHUNKS: chunks of the inputs. BATCH, ROWS_OF_EPOCH: rows of each. BIAS: 1 with
# biases. MEAN: 1 if a loss is the mean over rows. IGNORED: the label that counts for nothing.
# COUNT: numbers of the rule. TERMS, ROOM: floats of one worker's LISTED and SCRATCH.
CHUNKS, BATCH, ROWS_OF_EPOCH, BIAS, MEAN, IGNORED, COUNT, TERMS, ROOM = range(13, 22)
# Addresses. PIXELS, REALS: the data, bytes or floats. LABELS, TARGETS: int64 labels or targets that
# are floats. The unused one of each pair is 0. PARAMETERS: the loss's parameter for each output.
# ORDER: the int64 order. NUMBERS: the rule's numbers for each step. LOSSES, CORRECT: the results,
# losses and int32 counts of right rows.
PIXELS, REALS, LABELS, TARGETS, PARAMETERS, ORDER, NUMBERS, LOSSES, CORRECT = range(22, 31)
# Addresses of functions. COUNTER: the address of the counter by which threads wait.
FORWARD, BACKWARD, OUT_FORWARD, OUT_BACKWARD, CRITERION, RULE = range(31, 37)
PRODUCT, LISTED_PRODUCT, TRANSPOSED, STEPS, COUNTER = range(37, 42)
# Addresses. BIAS_NUMBERS: the rule's numbers for biases, which may have another weight decay.
# BASE, SIZE: the flat array and its floats. LAYERS, DEPTH: `Run.layers` and its rows. FACTORS: the
# last four fields of `Run`. OCTETS: `products.OCTETS`, or 0 if few inputs are 0. WEIGHTS: a float
# for each row of the data, the factor of its loss. 0 if every row counts as 1.
BIAS_NUMBERS, BASE, SIZE, LAYERS, DEPTH, FACTORS, OCTETS, WEIGHTS, PLACES = range(42, 51)
LINE = 64  # bytes of a cache line
SCRATCH_BYTES = 16384  # room for one worker's gradients, unless LEAST rows take more
LEAST = 8  # rows of w that are updated at a time, or a multiple: a multiple of ROWS
OCTET = 8  # a byte of BITS stands for so many inputs
LOOKS = 16  # once in so many steps, weights are checked to be finite, see `add_weights`
# These have a type, because numba compiles a function once more for each Python literal.
NONE, ONCE = np.int64(0), np.int64(1)


class Run(NamedTuple):
    """All that a worker needs to know of a training.

    Here and below, a float is a number of w's dtype, float32 or float64.
    """

    w: np.ndarray  # (floats,)
    layers: np.ndarray  # (layers, COLUMNS_OF_LAYER) int64
    places: np.ndarray  # (PLACES,) int64
    # The network's input is data · scale + shift + background. The background is left out of the
    # inputs that are read, so that most of them are 0.
    scale: np.floating
    shift: np.floating
    background: np.floating
    loss_scale: np.floating


@inside
def _address(run, offset):
    return run.places[BASE] + size_of(run.w) * offset


@inside
def numbers_of(run, place, step):
    """The address of the rule's numbers for a step. place: NUMBERS or BIAS_NUMBERS."""
    return run.places[place] + size_of(run.w) * step * run.places[COUNT]


@inside
def product(run, a, b, c, shape, add):
    """c[r, n] = (c[r, n] if add else 0) + Σ_j a[r, j] b[j, n].

    shape = (rows, vectors of n, number of j).
    a = (offset, stride of r, stride of j), b = (offset, stride of j), c = (offset, stride of r).
    """
    call(run.places[PRODUCT], (_address(run, NONE), *a, *b, *c, *shape, add))


@inside
def product_listed(run, a, b, first, c, shape, bits, worker):
    """c[r, n] = first[r, n] + Σ_j a[r, j] b[j, n], without terms that are 0 in all rows of a tile.

    shape, a, b and c: as in `product`. first = (offset, stride of r). bits = (the address of a's
    first byte, 1 if a is the transpose of the inputs, else 0).
    """
    listed = run.places[EVERY]
    if run.places[OCTETS]:
        listed = run.places[LISTED] + worker * run.places[TERMS]
    lists = (_address(run, listed), bits[0], bytes_of_batch(run), bits[1], run.places[OCTETS])
    arguments = (_address(run, NONE), *a, *b, *first, *c, *shape, *lists)
    call(run.places[LISTED_PRODUCT], arguments)


@inside
def bytes_of_batch(run):
    """The number of bytes that `tiles.mark` writes for eight inputs: one for each row, padded."""
    return (run.places[BATCH] + 7) // 8 * 8


@inside
def bits_of(run, k):
    """The address of the bytes of input number k, a multiple of 8, and of the next seven."""
    return _address(run, run.places[BITS]) + k // 8 * bytes_of_batch(run)


@inside
def product_transposed(run, a, b, c, shape):
    """c[r, k] = Σ_n a[r, n] b[k, n].

    shape = (rows, number of k, vectors of n). a, b and c are (offset, stride).
    """
    call(run.places[TRANSPOSED], (_address(run, NONE), *a, *b, *c, *shape))


@inside
def _clear(w, start, stop):
    values = w[start:stop]
    for i in range(len(values)):
        values[i] = 0.0


@inside
def _copy(to, source):
    for i in range(len(to)):
        to[i] = source[i]


@inside
def _apply(run, layer, k, rows, gradient, numbers):
    """Update `rows` rows of w, from row k on, by their gradients.

    gradient: where the gradients begin. numbers: the address of the rule's numbers for the step.
    """
    is_across = layer[ACROSS] and k < layer[TALL]
    pitch, outputs = (layer[WIDE], layer[K]) if is_across else (layer[PITCH], layer[N])
    at = layer[W] + k * layer[WIDE]
    state = at + run.places[STATE]
    addresses = (_address(run, at), _address(run, gradient), _address(run, state))
    call(run.places[RULE], (*addresses, run.places[STATE], numbers, rows * pitch))
    if outputs < pitch:  # the padding stays 0, whatever the rule makes of zeros
        for row in range(rows):
            _clear(run.w, at + row * pitch + outputs, at + (row + 1) * pitch)


@inside
def update_rows(run, l, begin, end, rows, worker, step):
    """Apply the update of `step`, a batch of `rows` rows, to rows `begin` to `end` of w of layer l.

    It is a layer behind the first one. Forward was z = x w + b, so dw = xᵀ dz. The bias is the row
    behind the last one, and its input is 1.
    """
    layer, stride = run.layers[l], run.layers[l - 1, PITCH]
    pitch, block, x = layer[PITCH], layer[BLOCK], run.layers[l - 1, Y]
    gradient = run.places[SCRATCH] + worker * run.places[ROOM]
    right, target, vectors = (layer[D], pitch), (gradient, pitch), pitch // lanes(run.w)
    row = numbers_of(run, NUMBERS, step)
    if layer[ACROSS]:  # dwᵀ = dzᵀ x, the whole matrix at once
        wide, outputs = layer[WIDE], (layer[D], ONCE, pitch)
        shape = (layer[N], wide // lanes(run.w), rows)
        product(run, outputs, (x, stride), (gradient, wide), shape, NONE)
        _apply(run, layer, NONE, layer[N], gradient, row)
    else:
        for k in range(begin, end, block):
            count = np.int64(min(block, end - k))
            product(run, (x + k, ONCE, stride), right, target, (count, vectors, rows), NONE)
            _apply(run, layer, k, count, gradient, row)
    if end == layer[K]:
        update_bias(run, layer, gradient, rows, step)


@inside
def update_bias(run, layer, gradient, rows, step):
    """Apply the update of `step` to a layer's bias, whose gradient is Σ dz."""
    pitch = layer[PITCH]
    if run.places[BIAS]:
        ones, shape = (run.places[ONE], NONE, NONE), (ONCE, pitch // lanes(run.w), rows)
        product(run, ones, (layer[D], pitch), (gradient, pitch), shape, NONE)
        row = numbers_of(run, BIAS_NUMBERS, step)
        _apply(run, layer, layer[TALL], ONCE, gradient, row)


@inside
def start_gradients(run, rows, worker):
    """Write the part of the first layer's gradients that comes from the background.

    It is background · Σ dz, the same for every row of w. Returns its place.
    """
    layer = run.layers[0]
    if run.places[OCTETS] == 0:  # there is no background
        return run.places[ZEROS]
    pitch = layer[PITCH]
    start = run.places[START] + worker * pitch
    ones, shape = (run.places[ONE], NONE, NONE), (ONCE, pitch // lanes(run.w), rows)
    product(run, ones, (layer[D], pitch), (start, pitch), shape, NONE)
    values = run.w[start : start + pitch]
    for i in range(len(values)):
        values[i] *= run.background
    return start


@inside
def update_first(run, inputs, start, rows, worker, step):
    """As `update_rows`, for the first layer.

    inputs = (first row of w, row behind the last, offset of their inputs). start: see
    `start_gradients`.
    """
    layer = run.layers[0]
    (begin, end, x), pitch, block = inputs, layer[PITCH], layer[BLOCK]
    gradient = run.places[SCRATCH] + worker * run.places[ROOM]
    right, target, vectors = (layer[D], pitch), (gradient, pitch), pitch // lanes(run.w)
    row = numbers_of(run, NUMBERS, step)
    for k in range(begin, end, block):
        count = np.int64(min(block, end - k))
        left, shape = (x + k - begin, ONCE, end - begin), (count, vectors, rows)
        bits = (bits_of(run, k), ONCE)
        product_listed(run, left, right, (start, NONE), target, shape, bits, worker)
        _apply(run, layer, k, count, gradient, row)
    if end == layer[K]:
        update_bias(run, layer, gradient, rows, step)


@inside
def read_inputs(run, first, rows, begin, end, to):
    """Write features `begin` to `end` of a batch, without the background, from w[to] on.

    The batch starts at order[first].
    """
    width, order, size = end - begin, integers(run.places[ORDER]), size_of(run.w)
    features, pixels, reals = run.layers[0, K], run.places[PIXELS], run.places[REALS]
    whole, x = np.int64(width // lanes(run.w)), to
    for m in range(rows):
        at = order[first + m] * features + begin
        values = numbers(run.w, _address(run, x))
        if pixels:
            scale_octets(run.w, x, pixels + at, whole, run.scale, run.shift)
            bytes_ = octets(pixels + at)
            for i in range(whole * lanes(run.w), width):
                values[i] = number(run.w, bytes_[i]) * run.scale + run.shift
        elif whole:
            scale_reals(run.w, x, reals + size * at, width, run.scale, run.shift)
        else:
            given = numbers(run.w, reals + size * at)
            for i in range(width):
                values[i] = given[i] * run.scale + run.shift
        x += width
    if run.places[OCTETS]:
        mark_inputs(run, rows, begin, end, to)


@inside
def mark_inputs(run, rows, begin, end, x):
    """Write a bit for each input from `begin` to `end`, which lie from w[x] on: 1 if it is not 0.

    The bits of rows up to the next multiple of 8 become 0.
    """
    width, stride, bits = end - begin, bytes_of_batch(run), bits_of(run, begin)
    whole = width // 8
    for m in range(rows):
        mark(run.w, bits + m, stride, x + m * width, whole)
        if 8 * whole < width:
            byte = 0
            for i in range(8 * whole, width):
                byte |= (run.w[x + m * width + i] != 0) << (i - 8 * whole)
            octets(bits + whole * stride + m)[0] = np.uint8(byte)
    for m in range(rows, (rows + 7) // 8 * 8):
        for i in range((width + 7) // 8):
            octets(bits + i * stride + m)[0] = np.uint8(0)


@inside
def read_ahead(run, first, rows, begin, end):
    """Prefetch what `read_inputs` will read of a batch. Its samples lie anywhere in memory."""
    at, size = run.places[PIXELS], np.int64(1)
    if at == 0:
        at, size = run.places[REALS], size_of(run.w)
    order, row = integers(run.places[ORDER]), size * run.layers[0, K]
    for m in range(rows):
        start = at + order[first + m] * row
        for address in range(start + size * begin, start + size * end, LINE):
            prefetch(address)


@inside
def part(count, unit, worker, workers):
    """Where a worker's share of `count` begins. Shares consist of whole units.

    A share ends where the next one begins. For worker = workers the result is `count`.
    """
    blocks = (count + unit - 1) // unit
    return min(count, unit * (blocks * worker // workers))


@inside
def first_half(run, worker, workers, step, begin, end):
    """Update this worker's rows of the weights by step - 1, and start the forward of `step`."""
    places = run.places
    batch, samples = places[BATCH], places[ROWS_OF_EPOCH]
    before = min(batch, samples - (step - 1) * batch)
    if step > begin:
        for l in range(1, len(run.layers)):
            inputs = run.layers[l, K]
            k, stop = part(inputs, ROWS, worker, workers), part(inputs, ROWS, worker + 1, workers)
            if run.layers[l, ACROSS]:  # the first worker takes the whole matrix
                k, stop = NONE if worker == 0 else inputs, inputs
            if k < stop:
                update_rows(run, l, k, stop, before, worker, step - 1)
    features, chunks, start = run.layers[0, K], places[CHUNKS], NONE
    unit = max(OCTET, lanes(run.w))
    if step > begin:
        start = start_gradients(run, before, worker)
    for chunk in range(chunks * worker // workers, chunks * (worker + 1) // workers):
        k, stop = part(features, unit, chunk, chunks), part(features, unit, chunk + 1, chunks)
        x = places[X] + k * batch
        if step > begin:
            update_first(run, (k, stop, x), start, before, worker, step - 1)
        if step < end:
            rows = min(batch, samples - step * batch)
            read_inputs(run, step * batch, rows, k, stop, x)
            following = min(batch, samples - (step + 1) * batch)
            read_ahead(run, (step + 1) * batch, following, k, stop)
            half, added = chunk, NONE
            if workers <= 2:
                half = 2 * chunk // chunks * chunks // 2
                added = min(chunk - half, ONCE)
            add_products(run, (k, stop), x, rows, half, added, worker)
            add_weights(run, (k, stop), step, half, added)


@inside
def _few_outputs(run, l, m, stop):
    """Compute rows m to stop of z = y' w + b, for a layer that keeps its weights across.

    y' is the output of the layer below. The padding of z stays 0.
    """
    w, layer, below = run.w, run.layers[l], run.layers[l - 1, PITCH]
    pitch, left = layer[PITCH], (run.layers[l - 1, Y] + m * below, below)
    sums, outputs = layer[Y] + m * pitch, layer[N]
    shape = (stop - m, outputs, layer[WIDE] // lanes(w))
    product_transposed(run, left, (layer[W], layer[WIDE]), (sums, pitch), shape)
    bias = numbers(w, _address(run, layer[W] + layer[TALL] * layer[WIDE]))
    z, given = numbers(w, _address(run, layer[Z] + m * pitch)), numbers(w, _address(run, sums))
    for row in range(0, (stop - m) * pitch, pitch):
        for n in range(outputs):
            z[row + n] = bias[n] + given[row + n]


@inside
def has_one_part(run):
    """True if the first layer's z is the sum of the bias and of one product."""
    return run.places[CHUNKS] == 1 and run.places[OCTETS] == 0


@inside
def add_products(run, inputs, x, rows, place, added, worker):
    """Compute the part of the first layer's z that comes from inputs = (k, stop).

    It becomes partial sum number `place`. If `added`, it is added to that sum. If there is no other
    part, the result is z itself.
    """
    (k, stop), pitch = inputs, run.layers[0, PITCH]
    weights = (run.layers[0, W] + k * pitch, pitch)
    to = (run.places[PARTIAL] + place * (run.places[BATCH] + 1) * pitch, pitch)
    first = to if added else (run.places[ZEROS], NONE)
    if has_one_part(run):
        to, first = (run.layers[0, Z], pitch), (run.layers[0, W] + stop * pitch, NONE)
    left, bits = (x, stop - k, ONCE), (bits_of(run, k), NONE)
    shape = (rows, pitch // lanes(run.w), stop - k)
    product_listed(run, left, weights, first, to, shape, bits, worker)


@inside
def add_weights(run, inputs, step, place, added):
    """Add up the weights of inputs = (k, stop), which the background multiplies.

    They become the row behind the batch of partial sum number `place`. If `added`, they are added
    to that row. Without a background, the sum serves only to make the loss NaN if a weight is not
    finite, as 0 · inf does. So it is computed once in LOOKS steps, and only if inputs are left out.
    """
    if has_one_part(run):
        return
    (k, stop), pitch = inputs, run.layers[0, PITCH]
    at = run.places[PARTIAL] + ((place + 1) * (run.places[BATCH] + 1) - 1) * pitch
    looks = run.places[OCTETS] != 0 and step % LOOKS == 0
    if run.background != 0 or looks:
        ones, shape = (run.places[ONE], NONE, NONE), (ONCE, pitch // lanes(run.w), stop - k)
        weights = (run.layers[0, W] + k * pitch, pitch)
        product(run, ones, weights, (at, pitch), shape, added)
    elif not added:
        _clear(run.w, at, at + pitch)


@inside
def add_partial(run, to, place, m, stop):
    """Add rows m to stop of partial sum number `place` to the floats from w[to] on."""
    pitch = run.layers[0, PITCH]
    size, start = (stop - m) * pitch, (place * (run.places[BATCH] + 1) + m) * pitch
    total, partial = run.w[to : to + size], run.w[run.places[PARTIAL] + start :]
    for i in range(size):
        total[i] += partial[i]


@inside
def add_background(run, z, spare, workers):
    """Add the part of the first layer's z that comes from the background, the same for every row.

    z: the offset of a row. spare: the offset of a row that is free.
    """
    w, pitch, chunks, batch = run.w, run.layers[0, PITCH], run.places[CHUNKS], run.places[BATCH]
    for half in range(0, chunks, (chunks + 1) // 2):
        _clear(w, spare, spare + pitch)
        for chunk in range(half, half + max(1, chunks // 2) if workers > 2 else half + 1):
            add_partial(run, spare, chunk, batch, batch + 1)
        row, sums = w[z : z + pitch], w[spare : spare + pitch]
        for i in range(pitch):
            row[i] += run.background * sums[i]


@inside
def first_forward(run, m, stop, workers):
    """Add up rows m to stop of the first layer's z."""
    if has_one_part(run):
        return
    layer, chunks, batch = run.layers[0], run.places[CHUNKS], run.places[BATCH]
    z, pitch = layer[Z] + m * layer[PITCH], layer[PITCH]
    fill_bias(run, 0, m, m + 1)
    add_background(run, z, layer[Y] + m * pitch, workers)
    for row in range(1, stop - m):
        _copy(run.w[z + row * pitch : z + (row + 1) * pitch], run.w[z : z + pitch])
    for half in range(0, chunks, (chunks + 1) // 2):
        if workers > 2:
            at = run.places[PARTIAL] + (half * (batch + 1) + m) * pitch
            for chunk in range(half + 1, half + chunks // 2):
                add_partial(run, at, chunk, m, stop)
        add_partial(run, z, half, m, stop)


@inside
def fill_bias(run, l, m, stop):
    """Write the bias to rows m to stop of z."""
    layer = run.layers[l]
    bias, pitch = layer[W] + layer[TALL] * layer[WIDE], layer[PITCH]
    for row in range(m, stop):
        z = layer[Z] + row * pitch
        _copy(run.w[z : z + pitch], run.w[bias : bias + pitch])


@inside
def forward(run, m, stop, workers):
    """Take rows m to stop of a batch from the first layer's partial sums to the last layer's y."""
    w, places, count = run.w, run.places, len(run.layers)
    first_forward(run, m, stop, workers)
    for l in range(count):
        layer = run.layers[l]
        pitch = layer[PITCH]
        z = layer[Z] + m * pitch
        if l > 0 and layer[ACROSS]:
            _few_outputs(run, l, m, stop)
        elif l > 0:
            fill_bias(run, l, m, stop)
            below = run.layers[l - 1, PITCH]
            left = (run.layers[l - 1, Y] + m * below, below, ONCE)
            shape = (stop - m, pitch // lanes(w), layer[K])
            product(run, left, (layer[W], pitch), (z, pitch), shape, ONCE)
        act = places[OUT_FORWARD if l == count - 1 else FORWARD]
        call(act, (_address(run, z), _address(run, layer[Y] + m * pitch), (stop - m) * pitch))


@inside
def fill_targets(run, first, m, stop):
    """Write the targets of rows m to stop as numbers, without padding.

    They are the given targets, or a one-hot row for each label.
    """
    w, classes, order = run.w, run.layers[-1, N], integers(run.places[ORDER])
    targets = numbers(w, _address(run, run.places[Q] + run.places[BATCH] * classes))
    given, labels = numbers(w, run.places[TARGETS]), integers(run.places[LABELS])
    is_labels = run.places[LABELS] != 0
    for row in range(m, stop):
        sample, at = order[first + row], row * classes
        if is_labels:
            for i in range(classes):
                targets[at + i] = 0.0
            if 0 <= labels[sample] < classes:
                targets[at + labels[sample]] = 1.0
        else:
            for i in range(classes):
                targets[at + i] = given[sample * classes + i]


@inside
def is_ignored(run, row):
    """True if the row's label counts for nothing. row: its place in the order."""
    if run.places[LABELS] == 0:
        return False
    return integers(run.places[LABELS])[integers(run.places[ORDER])[row]] == run.places[IGNORED]


@inside
def row_weight(run, row):
    """The factor of a row's loss, or 0 if its label is ignored, or NaN if it is no class.

    The factor is 1, unless rows have weights. row: its place in the order.
    """
    sample, weight = integers(run.places[ORDER])[row], number(run.w, 1.0)
    if run.places[WEIGHTS]:
        weight = numbers(run.w, run.places[WEIGHTS])[sample]
    if run.places[LABELS] == 0:
        return weight
    label = integers(run.places[LABELS])[sample]
    if label == run.places[IGNORED]:
        return number(run.w, 0.0)
    return weight if 0 <= label < run.layers[-1, N] else number(run.w, np.nan)


@inside
def sum_of_weights(run, first, rows):
    """The sum of `row_weight` over a batch of `rows` rows, which starts at order[first]."""
    if run.places[LABELS] == 0 and run.places[WEIGHTS] == 0:
        return number(run.w, rows)
    total = number(run.w, 0.0)
    for row in range(first, first + rows):
        total += row_weight(run, row)
    return total


@inside
def largest(values, count):
    """The first place of the largest of `count` values. -1 if every value is NaN or -inf."""
    best, place = -np.inf, -1
    for i in range(count):
        if values[i] > best:
            best, place = values[i], i
    return place


@inside
def copy_outputs(run, source, pitch, to, other, rows):
    """Copy the last layer's columns, without their padding, between two addresses.

    pitch, other: floats of a row at `source` and at `to`.
    """
    values, copies, classes = numbers(run.w, source), numbers(run.w, to), run.layers[-1, N]
    if classes == 1:
        for row in range(rows):
            copies[row * other] = values[row * pitch]
        return
    for row in range(rows):
        for i in range(classes):
            copies[row * other + i] = values[row * pitch + i]


@inside
def multiply(values, count, factor):
    """Multiply `count` values by a factor."""
    for i in range(count):
        values[i] *= factor


@inside
def judge_rows(run, first, m, stop, gradient, factor):
    """Multiply losses and gradients of rows m to stop by the rows' weights and a factor.

    Also note whether each row is right, if there are labels. gradient: the address of row m of
    ∂loss/∂y.
    """
    w, layer, classes = run.w, run.layers[-1], run.layers[-1, N]
    order, labels = integers(run.places[ORDER]), integers(run.places[LABELS])
    losses = numbers(w, _address(run, run.places[LOSS]))
    right = numbers(w, _address(run, run.places[RIGHT]))
    for row in range(m, stop):
        share = row_weight(run, first + row) * factor
        counted = not is_ignored(run, first + row)
        losses[row] = losses[row] * share if counted else number(w, 0.0)
        values = numbers(w, gradient + size_of(w) * (row - m) * classes)
        for i in range(classes):
            values[i] = values[i] * share if counted else number(w, 0.0)
        hit = False
        if counted and run.places[LABELS]:
            y = numbers(w, _address(run, layer[Y] + row * layer[PITCH]))
            hit = largest(y, classes) == labels[order[first + row]]
        right[row] = 1.0 if hit else 0.0


@inside
def criterion(run, first, rows, m, stop):
    """Compute losses and ∂loss/∂y of rows m to stop, and whether each row is right.

    The batch has `rows` rows and starts at order[first].
    """
    w, places, layer = run.w, run.places, run.layers[-1]
    pitch, classes = layer[PITCH], layer[N]
    # The loss reads no padding. So with one output, a vector holds several rows instead of zeros.
    outputs = _address(run, places[Q] + m * classes)
    targets = outputs + size_of(w) * places[BATCH] * classes
    gradient = targets + size_of(w) * places[BATCH] * classes
    losses = _address(run, places[LOSS] + m)
    y, d = _address(run, layer[Y] + m * pitch), _address(run, layer[D] + m * pitch)
    copy_outputs(run, y, pitch, outputs, classes, stop - m)
    fill_targets(run, first, m, stop)
    addresses = (outputs, targets, gradient, losses)
    call(places[CRITERION], (*addresses, places[PARAMETERS], stop - m, classes, classes))
    count = sum_of_weights(run, first, rows)
    factor = count * number(w, 0.0) + run.loss_scale  # NaN if a label of the batch is no class
    if places[MEAN]:
        factor = factor / count
    if places[LABELS] or places[WEIGHTS]:
        judge_rows(run, first, m, stop, gradient, factor)
    else:
        multiply(numbers(w, losses), stop - m, factor)
        multiply(numbers(w, gradient), (stop - m) * classes, factor)
    copy_outputs(run, gradient, classes, d, pitch, stop - m)  # the padding of dz stays 0


@inside
def backward(run, m, stop):
    """Compute dz of every layer, for rows m to stop.

    Forward was y = act(z) and z = y' w + b, so dz = dy · act'(z) and dy' = dz wᵀ.
    """
    last = len(run.layers) - 1
    for l in range(last, -1, -1):
        layer = run.layers[l]
        pitch = layer[PITCH]
        d, kept = layer[D] + m * pitch, layer[KEPT] + m * pitch
        act = run.places[OUT_BACKWARD if l == last else BACKWARD]
        call(act, (_address(run, d), _address(run, kept), (stop - m) * pitch))
        if l > 0:
            below = run.layers[l - 1, PITCH]
            to = (run.layers[l - 1, D] + m * below, below)
            if layer[ACROSS]:
                shape, weights = (
                    (stop - m, below // lanes(run.w), layer[N]),
                    (layer[W], layer[WIDE]),
                )
                product(run, (d, pitch, ONCE), weights, to, shape, NONE)
            else:
                shape = (stop - m, layer[K], pitch // lanes(run.w))
                product_transposed(run, (d, pitch), (layer[W], pitch), to, shape)


@inside
def add_up(run, step):
    """Write the results of a step: its loss, and how many of its rows were right."""
    batch = run.places[BATCH]
    rows = min(batch, run.places[ROWS_OF_EPOCH] - step * batch)
    values, hits = run.w[run.places[LOSS] :], run.w[run.places[RIGHT] :]
    loss, right = number(run.w, 0.0), number(run.w, 0.0)
    for row in range(rows):
        loss += values[row]
        right += hits[row]
    # The mean over no rows is 0 / 0, as in torch.
    if run.places[MEAN] and sum_of_weights(run, step * batch, rows) == 0:
        loss = number(run.w, np.nan)
    numbers(run.w, run.places[LOSSES])[step] = loss
    narrow_integers(run.places[CORRECT])[step] = np.int32(right)


@inside
def steps(run, worker, workers, begin, end, trains):
    """Train on the batches `begin` to `end` of the epoch. Each worker calls this.

    If `trains` is 0, only compute outputs and losses. The last batch's outputs stay in y of the
    last layer.
    """
    meetings, batch = 1, run.places[BATCH]
    for step in range(begin, end + 1):
        if step > begin and worker == 0:
            add_up(run, step - 1)
        first_half(run, worker, workers, step, begin if trains else step, end)
        if step < end:
            meetings = meet(run.places[COUNTER], workers, meetings)
            first = step * batch
            rows = min(batch, run.places[ROWS_OF_EPOCH] - first)
            m, stop = part(rows, ROWS, worker, workers), part(rows, ROWS, worker + 1, workers)
            if m < stop:
                forward(run, m, stop, workers)
                criterion(run, first, rows, m, stop)
                if trains:
                    backward(run, m, stop)
            meetings = meet(run.places[COUNTER], workers, meetings)


def steps_at(w_ptr, places_ptr, worker, workers, begin, end, trains):
    """`steps` for a caller that knows its address, and the addresses of w and places."""
    places = carray(places_ptr, (PLACES,))
    w = carray(w_ptr, (places[SIZE],))
    layers = carray(integers(places[LAYERS]), (places[DEPTH], COLUMNS_OF_LAYER))
    factors = numbers(w, places[FACTORS])
    run = Run(w, layers, places, factors[0], factors[1], factors[2], factors[3])
    steps(run, worker, workers, begin, end, trains)
