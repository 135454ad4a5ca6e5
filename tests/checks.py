"""Shared helpers of tests: the rule of accuracy, buffers that start as NaN, memory layouts."""

import contextlib
import functools
import signal
import threading
import time
from unittest import mock

import torch

import kernels
from kernels.operations import Make, flatten
from kernels.rounding import errors, floor, worst, worst_errors
from tests import PATIENCE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Draw(Make):
    """Numbers scaled so that a product of two matrices is standard normal. With larger numbers tanh
    saturates, and all that is left is rounding.
    """

    def real(self, *shape):
        return super().real(*shape) * max(shape[-1], 1) ** -0.25


def assert_as_accurate(ours, torchs, exact, what="", computed_in=None):
    """Asserts the project's only tolerance.

    The error of `ours` against the float64 result `exact` may be the larger of

    - twice torch's worst error in the same precision, plus the rounding of the result itself: one
      ulp of its largest number, three on a GPU (`rounding.floor`);
    - twice the worst error of several draws of simulated rounding (kernels/rounding.py).

    Torch's own error is a matter of luck, so the first does not always suffice. Another processor,
    BLAS or number of threads adds in another order. Torch's error may be 0, and a result may cancel
    while the terms of its sums do not. The simulation takes time, so it runs only where the first
    does not suffice.

    ours, torchs: tensors, or nested lists and tuples of tensors, which are compared one by one.
    exact: a function without arguments that computes the results in float64. Or the results, if
    each is a single step from its arguments, so that torch's error suffices.
    computed_in: the precision of the computation. None: the precision of each result. Under
    autocast, results may have more digits than the products they come from.

    Where torch overflows or has NaN, ours must be the same as torch's, or right.
    """
    ours, torchs = flatten(ours), flatten(torchs)
    again, exact = exact, flatten(exact() if callable(exact) else exact)
    assert len(ours) == len(torchs) == len(exact), (
        f"{what}: {len(ours)}, {len(torchs)}, {len(exact)} results"
    )
    simulated = functools.cache(lambda dtype: worst_errors(again, dtype))
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact)):
        a, b, c = a.detach(), b.detach(), c.detach()
        assert a.shape == b.shape == c.shape, f"{what}[{i}]: {a.shape} {b.shape} {c.shape}"
        assert a.dtype == b.dtype, f"{what}[{i}]: {a.dtype}, torch {b.dtype}"
        dtype = computed_in or a.dtype
        ulps = floor(dtype, a.device)
        allowed = 2 * worst(b, c) + ulps * max(_scale(c), torch.finfo(dtype).smallest_normal)
        if callable(again) and (_wrong(a, b, c) > allowed).any():
            allowed = max(allowed, 2 * simulated(dtype)[i])
        _assert_within(allowed, a, b, c, f"{what}[{i}]")


def _wrong(ours, torchs, exact):
    """Our errors. 0 where torch overflows or has NaN and ours is the same."""
    same = (ours == torchs) | (ours.isnan() & torchs.isnan())
    return errors(ours, exact).masked_fill(same & ~torchs.isfinite(), 0)


def _scale(exact) -> float:
    """The size of the largest finite number, 0 if there is none."""
    finite = exact[exact.isfinite()]
    return finite.abs().amax().item() if finite.numel() else 0.0


def _assert_within(allowed, ours, torchs, exact, what):
    error = _wrong(ours, torchs, exact)
    bad = error > allowed
    if bad.any():
        index = tuple(bad.nonzero()[error[bad].argmax()].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are off by more than "
            f"{allowed:.3g} (torch by {worst(torchs, exact):.3g}, scale {_scale(exact):.3g}); "
            f"worst at {index}, off by {error[index].item():.3g}: {ours[index].item():.9g}, torch "
            f"{torchs[index].item():.9g}, exact {exact[index].item():.9g}"
        )


def gradient_penalty(function):
    """The function Σ ‖∂(Σ y²)/∂t‖² over its tensors. Its gradient needs second derivatives."""

    def of(*tensors):
        y = function(*tensors)
        gradients = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return sum(g.square().sum() for g in gradients)

    return of


def compare(ours, torchs, *draws, what=""):
    """Compares values and gradients with torch's by `assert_as_accurate`.

    ours, torchs: functions of tensors. draws: their arguments, one tuple a draw; None is allowed in
    the place of a tensor. Several draws are judged together, because torch's error in a single
    number is a matter of luck.
    """
    results = [with_gradients(ours, tensors) for tensors in draws]
    same = [with_gradients(torchs, tensors) for tensors in draws]

    def exact():
        return stacked([with_gradients(torchs, double(tensors)) for tensors in draws])

    assert_as_accurate(stacked(results), stacked(same), exact, what)


def stacked(draws):
    """Lists of n results each -> one list of n results, those of all draws stacked."""
    return [torch.stack(results) for results in zip(*draws)]


def with_gradients(function, tensors):
    """[value, gradient of every tensor]. The incoming gradient is positive, so sums over a batch do
    not cancel.
    """
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = 1.5 + torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy)]


def poison_fresh_buffers(monkeypatch):
    """Fills every uninitialised floating-point buffer with NaN, so that an element shows which a
    kernel forgets to write.
    """

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            buffer = allocate(*args, **kwargs)
            return buffer.fill_(float("nan")) if buffer.is_floating_point() else buffer

        return allocate_poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def transposed(t):
    """The same values with the last two strides exchanged. A vector gets a stride of 2."""
    if t.dim() < 2:
        return t.repeat_interleave(2)[::2]
    return t.detach().mT.contiguous().mT


def sliced(t):
    """The same values amid NaN, with an offset, gaps and a last stride of 2. A kernel that reads
    beside them returns NaN.
    """
    around = t.new_full(
        [3 + 2 * size for size in t.shape], float("nan") if t.is_floating_point() else 1 << 20
    )
    return around[tuple(slice(2, 2 + 2 * size, 2) for size in t.shape)].copy_(t.detach())


def expanded(t):
    """The first row, of a vector the first element, repeated with stride 0. The shape stays, the
    values do not.
    """
    return t.detach()[:1].expand(t.shape)


LAYOUTS = {
    "contiguous": lambda t: t.detach().contiguous(),
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
}


def double(value):
    """The same nested tuple with every floating-point tensor in float64, detached."""
    if isinstance(value, torch.Tensor):
        return value.detach().double() if value.is_floating_point() else value
    return type(value)(map(double, value)) if isinstance(value, (tuple, list)) else value


def snapshot(value):
    """Copies of the tensors in nested tuples and lists, for a later comparison."""
    return [t.clone() for t in flatten(value)]


def assert_equal(ours, theirs, what=""):
    """Asserts that nested tensors are equal, bit for bit; NaN equals NaN."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert len(ours) == len(theirs), what
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )


def operations(function) -> list:
    """What the layers compute while `function` runs: the activation of each linear layer,
    (activation, max_pool) of each convolution, and a list of the activations of each stack.
    """
    found, linear, conv2d, stack = [], kernels.linear, kernels.conv2d, kernels.mlp

    def noted_linear(*args):
        found.append(args[3])
        return linear(*args)

    def noted_conv2d(*args):
        found.append(args[5:7])
        return conv2d(*args)

    def noted_mlp(input, weights, biases, activation, output_activation):
        found.append([activation] * (len(weights) - 1) + [output_activation])
        return stack(input, weights, biases, activation, output_activation)

    noted = {"linear": noted_linear, "conv2d": noted_conv2d, "mlp": noted_mlp}
    with mock.patch.multiple(kernels, **noted):
        function()
    return found


@contextlib.contextmanager
def ctrl_c():
    """Gives a function that presses Ctrl-C. Call it in a thread that the main thread waits for.

    It returns when the main thread has got its KeyboardInterrupt. A timer would not do: it may ring
    while Python removes a weak reference, and Python drops an error that is raised there.
    """
    taken = threading.Event()

    def handler(*_):
        if not taken.is_set():
            taken.set()
            raise KeyboardInterrupt

    def press():
        assert threading.current_thread() is not threading.main_thread()
        end = time.monotonic() + PATIENCE
        # Python may lose sight of one signal. If it comes just before the main thread waits for a
        # lock, Python handles it only after the wait, or with the next signal.
        while not taken.is_set() and time.monotonic() < end:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
            taken.wait(0.1)
        assert taken.is_set()

    before = signal.signal(signal.SIGUSR1, handler)
    try:
        yield press
    finally:
        signal.signal(signal.SIGUSR1, before)
