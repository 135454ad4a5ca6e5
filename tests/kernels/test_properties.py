"""Operations on arguments that hypothesis draws: they are as accurate as torch's, and properties of
their mathematics hold.
"""

import functools
import itertools

import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kernels
from kernels.activations import ACTIVATIONS
from tests.checks import (
    DTYPES,
    LAYOUTS,
    Draw,
    assert_as_accurate,
    assert_equal,
    double,
)

few = functools.partial(settings, derandomize=True, deadline=None, database=None)
sizes, seeds = st.integers(1, 40), st.integers(0, 1000)
dtypes, layouts = st.sampled_from(DTYPES), st.sampled_from(sorted(LAYOUTS))
activations = st.sampled_from(sorted(ACTIVATIONS))
reductions = st.sampled_from(["mean", "sum", "none"])


def gradients(function, tensors, dy=None):
    """[value, gradient of each tensor]. If dy is None, it holds numbers from 0.5 to 2.5, so that
    sums do not cancel.
    """
    tensors = [t.detach().requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = (
        1.5 + torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape)
        if dy is None
        else dy
    )
    return [y.detach(), *torch.autograd.grad(y, tensors, dy.to(y.dtype))]


def assert_accurate(ours, theirs, draw, seed):
    """Compares values and gradients on the tensors of `draw(seed)`."""
    tensors = draw(seed)
    exact = functools.partial(gradients, theirs, double(tensors))
    assert_as_accurate(gradients(ours, tensors), gradients(theirs, tensors), exact)


def smooth_at(z, activation):
    """True if rounding cannot move any pre-activation across a kink, where the derivative jumps."""
    margin = 64 * torch.finfo(z.dtype).eps * (z.abs().max().item() if z.numel() else 0)
    return all(((z.double() - kink).abs() > margin).all() for kink in ACTIVATIONS[activation].kinks)


@few(max_examples=40)
@given(
    sizes,
    sizes,
    sizes,
    dtypes,
    st.tuples(layouts, layouts, layouts),
    activations,
    st.booleans(),
    seeds,
)
def test_linear(device, m, k, n, dtype, layout, activation, bias, seed):
    def draw(seed):
        make = Draw(device, dtype, seed)
        tensors = [
            LAYOUTS[name](make.real(*shape)) for name, shape in zip(layout, ((m, k), (n, k), (n,)))
        ][: 2 + bias]
        assume(smooth_at(F.linear(*tensors), activation))
        return tensors

    ours = functools.partial(kernels.linear, activation=activation)
    assert_accurate(ours, lambda *args: ACTIVATIONS[activation].torch(F.linear(*args)), draw, seed)


@few(max_examples=20)
@given(sizes, st.lists(sizes, min_size=2, max_size=4), dtypes, activations, activations, seeds)
def test_mlp(device, m, widths, dtype, activation, output, seed):
    layers = len(widths) - 1

    def draw(seed):
        make = Draw(device, dtype, seed)
        return [
            make.real(m, widths[0]),
            *(make.real(o, i) for i, o in itertools.pairwise(widths)),
            *map(make.real, widths[1:]),
        ]

    def ours(x, *parameters):
        return kernels.mlp(x, parameters[:layers], parameters[layers:], activation, output)

    def theirs(x, *parameters):
        for layer in range(layers):
            z = F.linear(x, parameters[layer], parameters[layers + layer])
            act = output if layer == layers - 1 else activation
            assume(smooth_at(z.detach(), act))
            x = ACTIVATIONS[act].torch(z)
        return x

    assert_accurate(ours, theirs, draw, seed)


@few(max_examples=40)
@given(
    sizes,
    sizes,
    st.lists(st.integers(1, 3), max_size=2),
    dtypes,
    layouts,
    reductions,
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 1.0]),
    seeds,
)
def test_cross_entropy(
    device, n, c, more, dtype, layout, reduction, soft, weighted, ignored, smoothing, seed
):
    make = Draw(device, dtype, seed)
    target = make.positive(n, c, *more) if soft else make.labels(c, n, *more)
    weight, options = (
        make.positive(c) if weighted else None,
        {"label_smoothing": smoothing, "reduction": reduction},
    )
    if ignored and not soft:
        options["ignore_index"] = int(target.flatten()[0])
        assume((target != options["ignore_index"]).any())  # test_cross_entropy.py ignores all

    def of(function, z):
        t, w = double((target, weight)) if z.dtype == torch.float64 else (target, weight)
        return function(z, t, w, **options)

    functions = (functools.partial(of, f) for f in (kernels.cross_entropy, F.cross_entropy))
    assert_accurate(
        *functions,
        lambda seed: [LAYOUTS[layout](Draw(device, dtype, seed).real(n, c, *more))],
        seed,
    )


@few(max_examples=25)
@given(st.lists(sizes, max_size=2), dtypes, layouts, layouts, reductions, seeds)
def test_mse_loss(device, shape, dtype, first, second, reduction, seed):
    def draw(seed):
        make = Draw(device, dtype, seed)
        return [LAYOUTS[name](make.real(*shape, 1))[..., 0] for name in (first, second)]

    assert_accurate(
        *(functools.partial(f, reduction=reduction) for f in (kernels.mse_loss, F.mse_loss)),
        draw,
        seed,
    )


@few(max_examples=15)
@given(sizes, sizes, sizes, activations, seeds)
def test_permuting_the_batch_permutes_dx(device, m, k, n, activation, seed):
    """A row's result does not depend on the other rows, on a GPU not even by a bit. The interpreter
    multiplies by numpy, whose BLAS may sum each row in its own order.
    """
    make = Draw(device, seed=seed)
    x, w, b, dy = make.real(m, k), make.real(n, k), make.real(n), make.real(m, n)
    assume(smooth_at(F.linear(x, w, b), activation))
    order = torch.randperm(m, generator=make.generator).to(x.device)

    def results(x, dy, w=w, b=b):
        return gradients(lambda x: kernels.linear(x, w, b, activation), [x], dy)

    expected = [result[order] for result in results(x, dy)]
    moved = results(x[order], dy[order])
    if device == "cuda":
        assert_equal(moved, expected)
    assert_as_accurate(moved, expected, lambda: results(*double((x[order], dy[order], w, b))))


@few(max_examples=15)
@given(sizes, sizes, st.integers(-20, 20), st.booleans(), seeds)
def test_shifted_logits(device, n, c, shift, soft, seed):
    """A number added to all logits of a row changes neither loss nor gradient. The additions here
    are exact, so no bit changes.
    """
    make = Draw(device, seed=seed)
    logits = (make.real(n, c) * 1024).round() / 1024
    target = make.positive(n, c) if soft else make.labels(c, n)
    results = [
        gradients(lambda z: kernels.cross_entropy(z, target), [z]) for z in (logits, logits + shift)
    ]
    assert all(map(torch.equal, *results))


@few(max_examples=15)
@given(sizes, sizes, sizes, activations, st.integers(-6, 6), seeds)
def test_scaling_dy_scales_all_gradients(device, m, k, n, activation, power, seed):
    """A power of two scales all gradients exactly."""
    make = Draw(device, seed=seed)
    tensors, dy = [make.real(m, k), make.real(n, k), make.real(n)], make.real(m, n)
    once, scaled = (
        gradients(lambda *args: kernels.linear(*args, activation), tensors, g)
        for g in (dy, dy * 2.0**power)
    )
    assert all(torch.equal(a * 2.0**power, b) for a, b in zip(once[1:], scaled[1:]))


@few(max_examples=15)
@given(sizes, st.integers(1, 300), st.booleans(), seeds)
def test_dlogits_of_a_row_add_to_zero(device, n, c, soft, seed):
    """Σ_c (Q p_c - q_c) = 0. Each of the C terms is at most Q, so rounding leaves at most C ulps of
    Q.
    """
    make = Draw(device, seed=seed)
    target = make.positive(n, c) if soft else make.labels(c, n)
    _, dz = gradients(
        lambda z: kernels.cross_entropy(z, target, reduction="sum"),
        [4 * make.real(n, c)],
        torch.ones(()),
    )
    scale = target.sum(1).max().item() if soft else 1.0
    assert dz.double().sum(1).abs().max() <= c * torch.finfo(dz.dtype).eps * scale
