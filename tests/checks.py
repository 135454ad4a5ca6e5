"""Shared helpers of tests: the tolerance rule, buffers that start as NaN, memory layouts."""

import functools

import torch

from kernels.operations import Make, flatten
from kernels.rounding import errors, floor, worst, worst_errors

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Draw(Make):
    """Numbers scaled so that a product of two matrices is standard normal. With larger numbers tanh
    saturates, and its derivative is mostly rounding.
    """

    def real(self, *shape):
        return super().real(*shape) * max(shape[-1], 1) ** -0.25


def assert_as_accurate(ours, torchs, exact, what=""):
    """The project's only tolerance.

    Our error against the float64 result `exact` may be twice torch's error in our precision, plus
    the rounding of the result: one ulp of its largest number, three on a GPU (`rounding.floor`).
    Where simulated rounding gives more, our error may be twice that.

    Torch's own error is partly luck. Another processor, BLAS or number of threads adds in another
    order. The error may be 0, and a result may cancel although the terms of its sums do not. So
    where we exceed the first limit, `exact` is computed again under simulated rounding
    (kernels/rounding.py, with its sources), and the worst error of several draws counts.

    exact: a function of no arguments that computes the results in float64. It may also be the
    results, where each is a single step from its arguments, so that torch's error suffices. Where
    torch overflows or has NaN, we must have the same or the exact result. Nested lists and tuples
    of tensors are compared one by one.
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
        info = torch.finfo(a.dtype)
        ulps = floor(a.dtype, a.device)
        allowed = 2 * worst(b, c) + ulps * max(_scale(c), info.smallest_normal)
        if callable(again) and (_wrong(a, b, c) > allowed).any():
            allowed = max(allowed, 2 * simulated(a.dtype)[i])
        _assert_within(allowed, a, b, c, f"{what}[{i}]")


def _wrong(ours, torchs, exact):
    """Our errors. They are 0 where torch overflows or has NaN and we have the same."""
    same = (ours == torchs) | (ours.isnan() & torchs.isnan())
    return errors(ours, exact).masked_fill(same & ~torchs.isfinite(), 0)


def _scale(exact) -> float:
    """The largest finite number's size."""
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
    """Σ ‖∂(Σ y²)/∂t‖² over the function's tensors t. Its gradient is a second derivative."""

    def of(*tensors):
        y = function(*tensors)
        gradients = torch.autograd.grad(y.square().sum(), tensors, create_graph=True)
        return sum(g.square().sum() for g in gradients)

    return of


def compare(ours, torchs, *draws, what=""):
    """Compares values and gradients of a function of tensors with torch's, by the rule above.

    A tensor may be None. Several draws are compared as one, because torch's error in a single
    number is a matter of luck.
    """
    results = [with_gradients(ours, tensors) for tensors in draws]
    same = [with_gradients(torchs, tensors) for tensors in draws]

    def exact():
        return stacked([with_gradients(torchs, double(tensors)) for tensors in draws])

    assert_as_accurate(stacked(results), stacked(same), exact, what)


def stacked(draws):
    """One list of results, each stacked over the draws. draws: lists of equal length."""
    return [torch.stack(results) for results in zip(*draws)]


def with_gradients(function, tensors):
    """[value, *gradients of the tensors]. The incoming gradient is positive, so that sums over a
    batch do not cancel.
    """
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = 1.5 + torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy)]


def poison_fresh_buffers(monkeypatch):
    """Fills every uninitialised floating-point buffer with NaN, so an element that a kernel forgets
    to write fails.
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
    """The same values amid NaN, with an offset, gaps and a last stride of 2. A read outside of them
    gives NaN.
    """
    around = t.new_full(
        [3 + 2 * size for size in t.shape], float("nan") if t.is_floating_point() else 1 << 20
    )
    return around[tuple(slice(2, 2 + 2 * size, 2) for size in t.shape)].copy_(t.detach())


def expanded(t):
    """The same shape with the first row, or a vector's first element, repeated with stride 0."""
    return t.detach()[:1].expand(t.shape)


LAYOUTS = {
    "contiguous": lambda t: t.detach().contiguous(),
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
}


def double(value):
    """The same nested value with every floating-point tensor in float64, detached."""
    if isinstance(value, torch.Tensor):
        return value.detach().double() if value.is_floating_point() else value
    return type(value)(map(double, value)) if isinstance(value, (tuple, list)) else value


def snapshot(value):
    """Copies of all tensors in nested tuples and lists, for a later comparison."""
    return [t.clone() for t in flatten(value)]


def assert_equal(ours, theirs, what=""):
    """Checks that nested tensors are bitwise equal. NaN equals NaN."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert len(ours) == len(theirs), what
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
