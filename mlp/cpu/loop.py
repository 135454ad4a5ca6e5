"""The steps of an epoch, compiled by numba. One function serves all networks, rules and losses.

Everything lies in one flat float32 array. A layer's weights are kept transposed, w[k, n], and the
bias is one more row. A layer of few outputs keeps w[n, k] instead. Zeros pad each row to whole
vectors. A step has two halves, and all workers meet after each:

    1. Each worker owns rows of every w. It applies the update of the step before to them. It then
       multiplies its rows of the first layer by this step's inputs, and adds up the products. No
       other worker reads the inputs that belong to these rows.
    2. Each worker owns rows of the batch. It takes them through the remaining layers, the loss and
       the backward pass, down to the first layer's dz.

Every number is the sum of the same terms in the same order, whatever the number of workers. The
sums over the first layer's inputs are cut into chunks, which depend on the network alone. The sums
of the chunks are added up in each half of the inputs, and then the two halves. One or two workers
add up the chunks where they compute them. More workers keep a sum for each chunk, and add these up
after they have met.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from .tiles import LANES, ROWS, scale_octets
from .waiting import call, floats, integers, meet, narrow_integers, octets, prefetch

# Columns of `Run.layers`. K, N: inputs and outputs. PITCH: floats of a padded row of outputs. W, Y,
# Z, D: where w, y, z and dz begin. KEPT: where y or z begins, whichever the backward needs. BLOCK:
# rows of w that are updated at a time. ACROSS: 1 if w is kept across, as w[n, k], which suits few
# outputs. TALL, WIDE: rows of w without the bias, and floats of a row.
K, N, PITCH, W, Y, Z, D, KEPT, BLOCK, ACROSS, TALL, WIDE, COLUMNS_OF_LAYER = range(13)
# Entries of `Run.places`. The first ones are where parts of the flat array begin. X: inputs.
# PARTIAL: partial sums. Q: the loss's outputs, targets and gradient, without padding. SCRATCH:
# gradients of w. LOSS: losses of rows. RIGHT: 1 for each row that is right, else 0. ONE: a one.
# STATE is the number of floats from a parameter to its state.
X, PARTIAL, Q, SCRATCH, LOSS, RIGHT, ONE, STATE = range(8)
# Sizes and choices. CHUNKS: chunks of the inputs. BATCH, ROWS_OF_EPOCH: rows of each. BIAS: 1 with
# biases. MEAN: 1 if a loss is the mean over rows. IGNORED: the label that counts for nothing.
# COUNT: numbers of the rule.
CHUNKS, BATCH, ROWS_OF_EPOCH, BIAS, MEAN, IGNORED, COUNT = range(8, 15)
# Addresses. PIXELS, REALS: the data, uint8 or float32. LABELS, TARGETS: int64 labels or float32
# targets. The unused one of each pair is 0. PARAMETERS: the loss's parameter for each output.
# ORDER: the int64 order. NUMBERS: the rule's numbers for each step. LOSSES, CORRECT: the results,
# float32 losses and int32 counts of right rows.
PIXELS, REALS, LABELS, TARGETS, PARAMETERS, ORDER, NUMBERS, LOSSES, CORRECT = range(15, 24)
# Addresses of functions. COUNTER: the address of the counter by which threads wait.
FORWARD, BACKWARD, OUT_FORWARD, OUT_BACKWARD, CRITERION, RULE = range(24, 30)
PRODUCT, TRANSPOSED, COUNTER = range(30, 33)
# Addresses. BIAS_NUMBERS: the rule's numbers for biases, which may have another weight decay.
# BASE: the flat array.
BIAS_NUMBERS, BASE, PLACES = range(33, 36)
LINE = 64  # bytes of a cache line
SCRATCH_FLOATS = 4096  # room for one worker's gradients, unless ROWS rows take more
# These have a type, because numba compiles a function once more for each Python literal.
NONE, ONCE = np.int64(0), np.int64(1)


class Run(NamedTuple):
    """All that a worker needs to know of a training.

    It has few arrays, because numba passes each array in parts.
    """

    w: np.ndarray  # (floats,) float32
    layers: np.ndarray  # (layers, COLUMNS_OF_LAYER) int64
    places: np.ndarray  # (PLACES,) int64
    scale: np.float32  # the network's input is data · scale + shift
    shift: np.float32
    loss_scale: np.float32


@njit(nogil=True)
def _address(run, offset):
    return run.places[BASE] + 4 * offset


@njit(nogil=True)
def product(run, a, b, c, shape, add):
    """c[r, n] = (c[r, n] if add else 0) + Σ_j a[r, j] b[j, n].

    shape = (rows, vectors of n, number of j).
    a = (offset, stride of r, stride of j), b = (offset, stride of j), c = (offset, stride of r).
    """
    call(run.places[PRODUCT], (_address(run, NONE), *a, *b, *c, *shape, add))


@njit(nogil=True)
def product_transposed(run, a, b, c, shape):
    """c[r, k] = Σ_n a[r, n] b[k, n].

    shape = (rows, number of k, vectors of n). a, b and c are (offset, stride).
    """
    call(run.places[TRANSPOSED], (_address(run, NONE), *a, *b, *c, *shape))


@njit(nogil=True)
def _clear(w, start, stop):
    values = w[start:stop]
    for i in range(len(values)):
        values[i] = np.float32(0.0)


@njit(nogil=True)
def _copy(to, source):
    for i in range(len(to)):
        to[i] = source[i]


@njit(nogil=True)
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


@njit(nogil=True)
def update_rows(run, l, inputs, rows, worker, step):
    """Apply the update of `step`, a batch of `rows` rows, to some rows of layer l's weights.

    inputs = (first row, row behind the last, offset of their inputs, stride of batch rows). Forward
    was z = x w + b, so dw = xᵀ dz. The bias is the row behind the last one, and its input is 1.
    """
    layer = run.layers[l]
    begin, end, x, stride = inputs
    pitch, block = layer[PITCH], layer[BLOCK]
    gradient = run.places[SCRATCH] + worker * max(SCRATCH_FLOATS, pitch * ROWS)
    right, target, vectors = (layer[D], pitch), (gradient, pitch), pitch // LANES
    numbers = 4 * step * run.places[COUNT]
    if layer[ACROSS]:  # dwᵀ = dzᵀ x, the whole matrix at once
        wide, outputs = layer[WIDE], (layer[D], ONCE, pitch)
        shape = (layer[N], wide // LANES, rows)
        product(run, outputs, (x, stride), (gradient, wide), shape, NONE)
        _apply(run, layer, NONE, layer[N], gradient, run.places[NUMBERS] + numbers)
    else:
        for k in range(begin, end, block):
            count = np.int64(min(block, end - k))
            left = (x + k - begin, ONCE, stride)
            product(run, left, right, target, (count, vectors, rows), NONE)
            _apply(run, layer, k, count, gradient, run.places[NUMBERS] + numbers)
    if end == layer[K] and run.places[BIAS]:
        product(run, (run.places[ONE], NONE, NONE), right, target, (ONCE, vectors, rows), NONE)
        _apply(run, layer, layer[TALL], ONCE, gradient, run.places[BIAS_NUMBERS] + numbers)


@njit(nogil=True)
def read_inputs(run, first, rows, begin, end, to):
    """Write features `begin` to `end` of a batch, scaled and shifted, from w[to] on.

    The batch starts at order[first].
    """
    width, order = end - begin, integers(run.places[ORDER])
    whole = width // LANES * LANES
    for m in range(rows):
        at = order[first + m] * run.layers[0, K] + begin
        x = to + m * width
        if run.places[PIXELS]:
            scale_octets(run.w, x, run.places[PIXELS] + at, whole // LANES, run.scale, run.shift)
            pixels = octets(run.places[PIXELS] + at)
            for i in range(whole, width):
                run.w[x + i] = np.float32(pixels[i]) * run.scale + run.shift
        else:
            reals, values = floats(run.places[REALS] + 4 * at), run.w[x : x + width]
            for i in range(width):
                values[i] = reals[i] * run.scale + run.shift


@njit(nogil=True)
def read_ahead(run, first, rows, begin, end):
    """Prefetch what `read_inputs` will read of a batch. Its samples lie anywhere in memory."""
    at, size = run.places[PIXELS], np.int64(1)
    if at == 0:
        at, size = run.places[REALS], np.int64(4)
    order, row = integers(run.places[ORDER]), size * run.layers[0, K]
    for m in range(rows):
        start = at + order[first + m] * row
        for address in range(start + size * begin, start + size * end, LINE):
            prefetch(address)


@njit(nogil=True)
def part(count, unit, worker, workers):
    """Where a worker's share of `count` begins. Shares consist of whole units.

    A share ends where the next one begins. For worker = workers the result is `count`.
    """
    blocks = (count + unit - 1) // unit
    return min(count, unit * (blocks * worker // workers))


@njit(nogil=True)
def first_half(run, worker, workers, step, begin, end):
    """Update this worker's rows of the weights by step - 1, and start the forward of `step`."""
    places = run.places
    batch, samples = places[BATCH], places[ROWS_OF_EPOCH]
    before = min(batch, samples - (step - 1) * batch)
    if step > begin:
        for l in range(1, len(run.layers)):
            inputs, pitch = run.layers[l, K], run.layers[l - 1, PITCH]
            k, stop = part(inputs, ROWS, worker, workers), part(inputs, ROWS, worker + 1, workers)
            if run.layers[l, ACROSS]:  # the first worker takes the whole matrix
                k, stop = NONE if worker == 0 else inputs, inputs
            if k < stop:
                rows = (k, stop, run.layers[l - 1, Y] + k, pitch)
                update_rows(run, l, rows, before, worker, step - 1)
    features, chunks = run.layers[0, K], places[CHUNKS]
    for chunk in range(chunks * worker // workers, chunks * (worker + 1) // workers):
        k, stop = part(features, LANES, chunk, chunks), part(features, LANES, chunk + 1, chunks)
        x = places[X] + k * batch
        if step > begin:
            update_rows(run, 0, (k, stop, x, stop - k), before, worker, step - 1)
        if step < end:
            rows = min(batch, samples - step * batch)
            read_inputs(run, step * batch, rows, k, stop, x)
            following = min(batch, samples - (step + 1) * batch)
            read_ahead(run, (step + 1) * batch, following, k, stop)
            half, added = chunk, NONE
            if workers <= 2:
                half = 2 * chunk // chunks * chunks // 2
                added = min(chunk - half, ONCE)
            add_products(run, (k, stop), x, rows, half, added)


@njit(nogil=True)
def _few_outputs(run, l, m, stop):
    """Add y' w to rows m to stop of z, for a layer that keeps its weights across.

    z holds the bias. y' is the output of the layer below.
    """
    w, layer, below = run.w, run.layers[l], run.layers[l - 1, PITCH]
    pitch, left = layer[PITCH], (run.layers[l - 1, Y] + m * below, below)
    z, sums = layer[Z] + m * pitch, layer[Y] + m * pitch
    shape = (stop - m, layer[N], layer[WIDE] // LANES)
    product_transposed(run, left, (layer[W], layer[WIDE]), (sums, pitch), shape)
    for row in range(stop - m):
        for n in range(layer[N]):
            w[z + row * pitch + n] += w[sums + row * pitch + n]


@njit(nogil=True)
def add_products(run, inputs, x, rows, place, added):
    """Compute the part of the first layer's z that comes from inputs = (k, stop).

    It becomes partial sum number `place`. If `added`, it is added to that sum.
    """
    (k, stop), pitch = inputs, run.layers[0, PITCH]
    weights = (run.layers[0, W] + k * pitch, pitch)
    to = (run.places[PARTIAL] + place * run.places[BATCH] * pitch, pitch)
    product(run, (x, stop - k, ONCE), weights, to, (rows, pitch // LANES, stop - k), added)


@njit(nogil=True)
def add_partial(run, to, place, m, stop):
    """Add rows m to stop of partial sum number `place` to the floats from w[to] on."""
    pitch = run.layers[0, PITCH]
    size, start = (stop - m) * pitch, (place * run.places[BATCH] + m) * pitch
    total, partial = run.w[to : to + size], run.w[run.places[PARTIAL] + start :]
    for i in range(size):
        total[i] += partial[i]


@njit(nogil=True)
def forward(run, m, stop, workers):
    """Take rows m to stop of a batch from the first layer's partial sums to the last layer's y."""
    w, places, count = run.w, run.places, len(run.layers)
    for l in range(count):
        layer = run.layers[l]
        pitch = layer[PITCH]
        z, bias = layer[Z] + m * pitch, layer[W] + layer[TALL] * layer[WIDE]
        for row in range(stop - m):
            _copy(w[z + row * pitch : z + (row + 1) * pitch], w[bias : bias + pitch])
        if l == 0:
            chunks = places[CHUNKS]
            for half in range(0, chunks, (chunks + 1) // 2):
                if workers > 2:
                    at = places[PARTIAL] + (half * places[BATCH] + m) * pitch
                    for chunk in range(half + 1, half + chunks // 2):
                        add_partial(run, at, chunk, m, stop)
                add_partial(run, z, half, m, stop)
        else:
            below = run.layers[l - 1, PITCH]
            left = (run.layers[l - 1, Y] + m * below, below, ONCE)
            if layer[ACROSS]:
                _few_outputs(run, l, m, stop)
            else:
                shape = (stop - m, pitch // LANES, layer[K])
                product(run, left, (layer[W], pitch), (z, pitch), shape, ONCE)
        act = places[OUT_FORWARD if l == count - 1 else FORWARD]
        call(act, (_address(run, z), _address(run, layer[Y] + m * pitch), (stop - m) * pitch))


@njit(nogil=True)
def fill_targets(run, first, m, stop):
    """Write the targets of rows m to stop as numbers, without padding.

    They are the given targets, or a one-hot row for each label.
    """
    classes = run.layers[-1, N]
    at = run.places[Q] + (run.places[BATCH] + m) * classes
    for row in range(m, stop):
        sample = integers(run.places[ORDER])[first + row]
        if run.places[LABELS] == 0:
            given = floats(run.places[TARGETS] + 4 * sample * classes)
            for i in range(classes):
                run.w[at + i] = given[i]
        else:
            _clear(run.w, at, at + classes)
            label = integers(run.places[LABELS])[sample]
            if 0 <= label < classes:
                run.w[at + label] = np.float32(1.0)
        at += classes


@njit(nogil=True)
def row_weight(run, row):
    """1, or 0 if the row's label is ignored, or NaN if it is no class.

    row: its place in the order.
    """
    if run.places[LABELS] == 0:
        return np.float32(1.0)
    label = integers(run.places[LABELS])[integers(run.places[ORDER])[row]]
    if label == run.places[IGNORED]:
        return np.float32(0.0)
    return np.float32(1.0) if 0 <= label < run.layers[-1, N] else np.float32(np.nan)


@njit(nogil=True)
def largest(values):
    """The first place of the largest value. -1 if every value is NaN or -inf."""
    best, place = -np.inf, -1
    for i in range(len(values)):
        if values[i] > best:
            best, place = values[i], i
    return place


@njit(nogil=True)
def criterion(run, first, rows, m, stop):
    """Compute losses and ∂loss/∂y of rows m to stop, and whether each row is right.

    The batch has `rows` rows and starts at order[first].
    """
    w, places, layer = run.w, run.places, run.layers[-1]
    pitch, classes = layer[PITCH], layer[N]
    # The loss reads no padding. So with one output, a vector holds several rows instead of zeros.
    outputs = places[Q] + m * classes
    targets = outputs + places[BATCH] * classes
    gradient = targets + places[BATCH] * classes
    for row in range(stop - m):
        for i in range(classes):
            w[outputs + row * classes + i] = w[layer[Y] + (m + row) * pitch + i]
    fill_targets(run, first, m, stop)
    addresses = (
        _address(run, outputs),
        _address(run, targets),
        _address(run, gradient),
        _address(run, places[LOSS] + m),
    )
    parameters = places[PARAMETERS]
    call(places[CRITERION], (*addresses, parameters, stop - m, classes, classes))
    count = np.float32(rows)
    if places[LABELS]:
        count = np.float32(0.0)
        for row in range(rows):
            count += row_weight(run, first + row)
    factor = count * np.float32(0.0) + run.loss_scale  # NaN if a label of the batch is no class
    if places[MEAN]:
        factor = factor / count
    for row in range(m, stop):
        weight = row_weight(run, first + row)
        counted = weight != 0
        w[places[LOSS] + row] = w[places[LOSS] + row] * weight * factor if counted else 0.0
        to = layer[D] + row * pitch  # the padding of dz stays 0
        for i in range(classes):
            w[to + i] = w[gradient + i] * factor if counted else np.float32(0.0)
        gradient += classes
        hit = False
        if places[LABELS] and counted:
            y = w[layer[Y] + row * pitch : layer[Y] + row * pitch + classes]
            hit = largest(y) == integers(places[LABELS])[integers(places[ORDER])[first + row]]
        w[places[RIGHT] + row] = np.float32(1.0) if hit else np.float32(0.0)


@njit(nogil=True)
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
                shape, weights = (stop - m, below // LANES, layer[N]), (layer[W], layer[WIDE])
                product(run, (d, pitch, ONCE), weights, to, shape, NONE)
            else:
                shape = (stop - m, layer[K], pitch // LANES)
                product_transposed(run, (d, pitch), (layer[W], pitch), to, shape)


@njit(nogil=True)
def add_up(run, step):
    """Write the results of a step: its loss, and how many of its rows were right."""
    batch = run.places[BATCH]
    rows = min(batch, run.places[ROWS_OF_EPOCH] - step * batch)
    loss, right = np.float32(0.0), np.float32(0.0)
    counted = False
    for row in range(rows):
        loss += run.w[run.places[LOSS] + row]
        right += run.w[run.places[RIGHT] + row]
        counted = counted or row_weight(run, step * batch + row) != 0
    # The mean over no rows is 0 / 0, as in torch.
    is_nan = run.places[MEAN] and not counted
    floats(run.places[LOSSES])[step] = np.float32(np.nan) if is_nan else loss
    narrow_integers(run.places[CORRECT])[step] = np.int32(right)


def steps(run, worker, workers, begin, end):
    """Train on the batches `begin` to `end` of the epoch. Each worker calls this."""
    meetings, batch = 1, run.places[BATCH]
    for step in range(begin, end + 1):
        if step > begin and worker == 0:
            add_up(run, step - 1)
        first_half(run, worker, workers, step, begin, end)
        if step < end:
            meetings = meet(run.places[COUNTER], workers, meetings)
            first = step * batch
            rows = min(batch, run.places[ROWS_OF_EPOCH] - first)
            m, stop = part(rows, ROWS, worker, workers), part(rows, ROWS, worker + 1, workers)
            if m < stop:
                forward(run, m, stop, workers)
                criterion(run, first, rows, m, stop)
                backward(run, m, stop)
            meetings = meet(run.places[COUNTER], workers, meetings)
