"""What tests share: the tolerance rule, buffers that start as NaN, memory layouts."""

import torch

from kernels.operations import Make, flatten

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class Draw(Make):
    """Numbers scaled so that a product of two matrices is standard normal: where tanh saturates,
    all is rounding.
    """

    def real(self, *shape):
        return super().real(*shape) * max(shape[-1], 1) ** -0.25


def assert_as_accurate(ours, torchs, exact, what=""):
    """The project's only tolerance: of the float64 result `exact`, we may be off twice as far as
    torch in our precision.

    Plus one ulp of the result's scale, for results that torch happens to get exactly. Where torch
    overflows or has NaN we must have the same, or be right. Nested lists and tuples of tensors are
    compared one by one.
    """
    ours, torchs, exact = flatten(ours), flatten(torchs), flatten(exact)
    assert len(ours) == len(torchs) == len(exact), (
        f"{what}: {len(ours)}, {len(torchs)}, {len(exact)} results"
    )
    for i, (a, b, c) in enumerate(zip(ours, torchs, exact)):
        _assert_as_accurate(a.detach(), b.detach(), c.detach(), f"{what}[{i}]")


def _assert_as_accurate(ours, torchs, exact, what):
    assert ours.shape == torchs.shape == exact.shape, (
        f"{what}: {ours.shape} {torchs.shape} {exact.shape}"
    )
    assert ours.dtype == torchs.dtype, f"{what}: {ours.dtype}, torch {torchs.dtype}"
    info = torch.finfo(ours.dtype)
    error, torch_error = _error(ours, exact), _error(torchs, exact)
    finite = torchs.isfinite()
    scale = exact[exact.isfinite()].abs().amax().item() if exact.isfinite().any() else 0.0
    worst_of_torch = torch_error[finite].amax().item() if finite.any() else 0.0
    allowed = 2 * worst_of_torch + max(info.eps * scale, info.smallest_normal * info.eps)
    same = (ours == torchs) | (ours.isnan() & torchs.isnan())
    bad = (error > allowed) & ~(same & ~finite)
    if bad.any():
        index = tuple(bad.nonzero()[error[bad].argmax()].tolist())
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are off by more than "
            f"{allowed:.3g} (torch by "
            f"{worst_of_torch:.3g}, scale {scale:.3g}); worst at {index}: "
            f"{ours[index].item():.9g}, torch "
            f"{torchs[index].item():.9g}, exact {exact[index].item():.9g}"
        )


def _error(result, exact):
    """|result - exact|; 0 for the same infinity or NaN twice, infinite for NaN or an infinity on
    one side.
    """
    result, exact = result.double(), exact.double()
    error = (result - exact).abs().nan_to_num(nan=float("inf"))
    return torch.where((result == exact) | (result.isnan() & exact.isnan()), 0.0, error)


def compare(ours, torchs, *draws, what=""):
    """Values and gradients of a function of tensors (None allowed) against torch's, in the rule
    above.

    Several draws are judged together: the error of torch in a single number is a matter of luck.
    """
    results = [with_gradients(ours, tensors) for tensors in draws]
    same = [with_gradients(torchs, tensors) for tensors in draws]
    exact = [with_gradients(torchs, double(tensors)) for tensors in draws]
    assert_as_accurate(stacked(results), stacked(same), stacked(exact), what)


def stacked(draws):
    """Lists of as many results each -> one list, of the draws' results stacked."""
    return [torch.stack(results) for results in zip(*draws)]


def with_gradients(function, tensors):
    """[value, gradient of every tensor]. The incoming gradient is positive, so that sums over a
    batch do not cancel.
    """
    tensors = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    y = function(*tensors)
    dy = 1.5 + torch.cos(torch.arange(y.numel(), device=y.device)).view(y.shape).to(y.dtype)
    return [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], dy)]


def poison_fresh_buffers(monkeypatch):
    """Fill every uninitialised floating-point buffer with NaN: an element that a kernel forgets to
    write shows.
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
    """The same values with the last two strides exchanged; of a vector, with a stride of 2."""
    if t.dim() < 2:
        return t.repeat_interleave(2)[::2]
    return t.detach().mT.contiguous().mT


def sliced(t):
    """The same values amid NaN: an offset, gaps, a last stride of 2. Reading beside them shows."""
    around = t.new_full(
        [3 + 2 * size for size in t.shape], float("nan") if t.is_floating_point() else 1 << 20
    )
    return around[tuple(slice(2, 2 + 2 * size, 2) for size in t.shape)].copy_(t.detach())


def expanded(t):
    """The first row (of a vector: the first element) repeated with stride 0. Other values, the same
    shape.
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
    """Copies of the tensors in nested tuples and lists, to compare with later."""
    return [t.clone() for t in flatten(value)]


def assert_equal(ours, theirs, what=""):
    """Bitwise equality of nested tensors, NaN equal to NaN."""
    ours, theirs = flatten(ours), flatten(theirs)
    assert len(ours) == len(theirs), what
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(
            a, b, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
        )
