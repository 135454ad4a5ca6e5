"""A check that buffers to fill share no memory with each other or with inputs."""

from collections.abc import Sequence

import torch

from . import launch


def check_apart(op: str, out: Sequence, inputs: Sequence) -> None:
    """Raises a ValueError if a buffer to fill shares elements with an input or another buffer.

    A product reads its inputs while it writes. torch's own products then return wrong numbers.
    """
    buffers, inputs = ([t for t in ts if t is not None] for ts in (out, inputs))
    if not buffers or launch.watched() or not launch.plain(*buffers, *inputs):
        return
    if buffers[0].is_meta:
        return
    spans = [_span(t) for t in (*inputs, *buffers)]
    for i, (start, end) in enumerate(spans[len(inputs) :], len(inputs)):
        for k, (low, high) in enumerate(spans[:i]):
            if low >= end or start >= high:
                continue
            buffer, other = buffers[i - len(inputs)], (*inputs, *buffers)[k]
            if _share(buffer, other):
                kind = "input" if k < len(inputs) else "buffer"
                raise ValueError(
                    f"{op}: each buffer of out needs memory of its own, but that of shape "
                    f"{tuple(buffer.shape)} shares elements with the {kind} of shape "
                    f"{tuple(other.shape)}; give another one"
                )


def _span(t: torch.Tensor) -> tuple[int, int]:
    """The addresses from the first element to behind the last. Equal where there is no memory."""
    start, size = t.data_ptr(), t.nbytes
    if not size or not start:
        return 0, 0
    if not t.is_contiguous():
        last = sum([(size - 1) * stride for size, stride in zip(t.shape, t.stride())])
        size = (last + 1) * t.element_size()
    return start, start + size


def _share(a: torch.Tensor, b: torch.Tensor) -> bool:
    """True if two tensors whose spans overlap have an element in common, as rows of a table may."""
    if a.element_size() != b.element_size() or (a.data_ptr() - b.data_ptr()) % a.element_size():
        return True
    start = min(a.data_ptr(), b.data_ptr())
    ends = [_span(t)[1] for t in (a, b)]
    # On a CPU: it holds no element, and a GPU would have to be waited for.
    used = torch.zeros((max(ends) - start) // a.element_size(), dtype=torch.bool, device="cpu")
    views = [
        used.as_strided(t.shape, t.stride(), (t.data_ptr() - start) // t.element_size())
        for t in (a, b)
    ]
    views[0].fill_(True)
    return bool(views[1].any())
