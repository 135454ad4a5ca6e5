"""cross_entropy's kernels in their hard cases: extreme logits, many classes, odd labels, memory
layouts.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F

import kernels
from kernels import cross_entropy, cross_entropy_bwd, cross_entropy_fwd
from kernels.ops import cross_entropy as module
from tests.checks import DTYPES, LAYOUTS, assert_as_accurate, compare, double, with_gradients

INF = math.inf
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pair(target, **options):
    """(our loss, torch's loss) of the logits."""
    return tuple(lambda z, f=f: f(z, target, **options) for f in (cross_entropy, F.cross_entropy))


@PRECISIONS
@pytest.mark.parametrize("classes", [1, 7, 16, 17, 33, 100, 5000])
def test_numbers_of_classes(classes, dtype, device):
    """From one class to more than a tile holds. 5,000 classes need two tiles and the online
    softmax.
    """
    torch.manual_seed(classes)
    target = torch.randint(0, classes, (5,), device=device)
    compare(*pair(target, reduction="none"), [torch.randn(5, classes).to(device, dtype)])


@pytest.mark.parametrize("soft", [False, True], ids=["labels", "probabilities"])
def test_many_tiles(soft, device, monkeypatch):
    """Rows and classes take many small tiles. The maximum rises and falls from tile to tile, which
    tests the rescaling of the sum.
    """
    monkeypatch.setattr(module, "_TILE", 16)
    logits = 20 * torch.sin(torch.arange(7 * 100, device=device) / 9).view(7, 100)
    target = torch.rand(7, 100, device=device) if soft else torch.arange(0, 98, 14, device=device)
    compare(*pair(target, label_smoothing=0.1, reduction="none"), [logits])


def test_50000_classes_in_one_row(device):
    logits = 3 * torch.randn(1, 50_000, device=device)
    compare(*pair(torch.tensor([49_999], device=device)), [logits], [logits.flip(1)])


@PRECISIONS
def test_sum_over_programs(dtype, device):
    """The program that adds partial sums gets more than it adds at a time. Its last lanes are
    empty.
    """
    parts = torch.rand(3 * 2500, device=device)
    loss, denominator = module.finish(parts, 2500, parts.to(dtype), (), "mean")

    def by_torch(parts):
        total, weight, _ = parts.view(3, 2500).sum(1)
        return total / weight, weight

    mean, weight = by_torch(parts)
    torchs = [mean.to(dtype), weight]
    assert_as_accurate([loss, denominator], torchs, lambda: by_torch(double(parts)))


@PRECISIONS
@pytest.mark.parametrize(
    "row",
    [
        [1e4, -1e4, 0.0],
        [-1e4, -1e4, -1e4],
        [1e4, 1e4, 1e4],
        [INF, 0.0, 0.0],
        [-INF, 0.0, 0.0],
        [0.0, -INF, 0.0],
        [0.0, -INF, -INF],
        [-INF, -INF, -INF],
        [math.nan, 0.0, 0.0],
        [0.0, math.nan, 0.0],
        [0.0, 0.0, INF],
    ],
    ids=str,
)
def test_extreme_logits(row, dtype, device):
    """Losses and gradients are infinite, NaN or finite where torch's are. The other row stays
    right.
    """
    logits = torch.tensor([row, [0.5, -1.0, 2.0]]).to(device, dtype)
    for label in (0, 1):
        target = torch.tensor([label, 2], device=device)
        ours, torchs = (with_gradients(f, [logits]) for f in pair(target, reduction="none"))
        exact = functools.partial(
            with_gradients, pair(target, reduction="none")[1], double([logits])
        )
        assert_as_accurate(ours, torchs, exact, f"label {label}")


@PRECISIONS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(7, 17), (3, 5, 4)], ids=str)
def test_layouts(shape, layout, dtype, device):
    """Logits, targets, class weights and incoming gradients may have any strides. The gaps hold
    NaN.
    """
    arrange = LAYOUTS[layout]
    torch.manual_seed(0)
    logits = arrange(torch.randn(shape).to(device, dtype))
    weight = arrange((torch.rand(shape[1]) + 0.5).to(device, dtype))
    labels = torch.randint(0, shape[1], shape[:1] + shape[2:], device=device)
    dy = arrange(torch.rand(labels.shape).to(device, dtype))
    for target in (arrange(labels), arrange(torch.rand(shape).to(device, dtype))):

        def results(function, cast=torch.Tensor.detach, target=target):
            z = cast(logits).requires_grad_()
            t = cast(target) if target.is_floating_point() else target
            value = function(z, t, cast(weight), reduction="none", label_smoothing=0.1)
            return value, torch.autograd.grad(value, z, cast(dy))

        exact = functools.partial(results, F.cross_entropy, torch.Tensor.double)
        assert_as_accurate(results(cross_entropy), results(F.cross_entropy), exact, layout)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64], ids=str)
def test_integer_types_of_labels(dtype, device):
    """torch takes uint8 and int64. We take every integer type, in kernels and reference."""
    target = torch.tensor([0, 2, 1], device=device)
    logits = torch.randn(3, 4, device=device)
    for backend in ("triton", "torch"):
        with kernels.use(backend):
            assert torch.equal(
                cross_entropy(logits, target.to(dtype)), cross_entropy(logits, target)
            )


@pytest.mark.parametrize("bad", [4, -1, 1 << 40])
def test_label_out_of_range(bad, device, monkeypatch):
    """On a CPU an error names the label. On a GPU the loss is NaN, because a check would wait for
    the GPU. check_labels() turns the check on.
    """
    logits, target = torch.randn(3, 4, device=device), torch.tensor([0, bad, 1], device=device)
    message = (
        rf"target\[1\] is {bad}, but there are 4 classes: labels are 0 to 3, or ignore_index = -100"
    )
    for backend in ("torch", "triton"):
        with kernels.use(backend), kernels.check_labels(), pytest.raises(IndexError, match=message):
            cross_entropy(logits, target)
    monkeypatch.setattr(module, "check_range", lambda *args: False)
    assert cross_entropy(logits, target).isnan()
    losses = cross_entropy(logits, target, reduction="none")
    assert losses[1].isnan() and losses[[0, 2]].isfinite().all()


def test_check_labels_ends_with_its_context(device, monkeypatch):
    check_range, target = module.check_range, torch.tensor([9], device="meta")
    assert check_range(target, 4, -100) is False  # outside the CPU no label is read
    with kernels.check_labels(), pytest.raises(Exception, match="meta"):
        check_range(target, 4, -100)
    assert check_range(target, 4, -100) is False


def test_logits_are_not_overwritten_and_gradients_are_fresh(device):
    logits, target = (
        torch.randn(7, 5, device=device),
        torch.zeros(7, dtype=torch.int64, device=device),
    )
    before = logits.clone()
    loss, saved = cross_entropy_fwd(logits, target)
    kept = saved[0].clone()
    gradients = [cross_entropy_bwd(torch.ones_like(loss), *saved)[0] for _ in range(2)]
    assert torch.equal(logits, before) and torch.equal(saved[0], kept)
    assert len({t.data_ptr() for t in (logits, saved[0], *gradients)}) == 4


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("ignored", [(), (0, 1, 2)], ids=["counted", "ignored"])
def test_mean_of_weights_that_are_all_zero(ignored, backend, device):
    """Loss and gradient are NaN where labels count, as in torch. Where all labels are ignored, only
    the loss is NaN.
    """
    target, w = torch.tensor([0, 2, 1], device=device), torch.zeros(4, device=device)
    target[list(ignored)] = -100
    with kernels.use(backend):
        for smoothing in (0.0, 0.1):
            compare(
                *(
                    lambda z, f=f, s=smoothing: f(z, target, w.to(z), label_smoothing=s)
                    for f in (kernels.cross_entropy, F.cross_entropy)
                ),
                [torch.randn(3, 4, device=device)],
            )
        x, weights = torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)
        compare(
            lambda x, m: kernels.linear_cross_entropy(x, m, None, target, w.to(x)),
            lambda x, m: F.cross_entropy(F.linear(x, m), target, w.to(x)),
            [x, weights],
        )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_label_that_wraps_to_the_ignored_one(backend, device):
    """156 as uint8 has the bits of -100 as int8. It still is a wrong label, not an ignored one."""
    target = torch.tensor([0, 156], dtype=torch.uint8, device=device)
    with kernels.use(backend), kernels.check_labels():
        with pytest.raises(IndexError, match=r"target\[1\] is 156"):
            kernels.cross_entropy(torch.randn(2, 4, device=device), target)
        with pytest.raises(IndexError, match=r"target\[1\] is 156"):
            kernels.linear_cross_entropy(
                torch.randn(2, 3, device=device), torch.randn(4, 3, device=device), None, target
            )


def test_label_smoothing_out_of_range():
    """We raise the type of error that torch raises."""
    for function in (kernels.cross_entropy, F.cross_entropy):
        with pytest.raises(RuntimeError, match="label_smoothing must be between 0"):
            function(torch.randn(2, 4), torch.tensor([0, 1]), label_smoothing=1.5)
