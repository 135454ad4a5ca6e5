"""linear_cross_entropy, the last layer and its loss in one kernel, against torch's two
functions.
"""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from kernels import launch, linear_cross_entropy_bwd, linear_cross_entropy_fwd
from kernels.ops.linear_cross_entropy import FUSED_CLASSES
from tests.checks import DTYPES, LAYOUTS, assert_as_accurate, compare, double

# Keywords of each case. weight=True means class weights. "probabilities" replaces the labels.
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "weights": {"weight": True, "label_smoothing": 0.1},
    "ignore some": {"ignore_index": 1, "reduction": "none", "weight": True},
    "ignore all": {"ignore_index": 0, "reduction": "mean"},
    "probabilities": {"label_smoothing": 0.1},
}


def draw(m, k, c, device="cpu", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return [
        t.to(device, dtype)
        for t in (torch.randn(m, k), torch.randn(c, k) * k**-0.5, torch.randn(c))
    ]


def pair(options, m, c, device):
    """(our function, torch's function) of x, w, b."""
    keywords = dict(OPTIONS[options])
    weighted = keywords.pop("weight", False)
    target = (
        torch.rand(m, c)
        if options == "probabilities"
        else torch.arange(m) % (1 if options == "ignore all" else c)
    )

    def arguments(x):
        weight = torch.linspace(0.5, 1.5, c).to(x) if weighted else None
        return (target.to(x) if target.is_floating_point() else target.to(device)), weight

    def ours(x, w, b):
        t, weight = arguments(x)
        return kernels.linear_cross_entropy(x, w, b, t, weight, **keywords)

    def torchs(x, w, b):
        t, weight = arguments(x)
        return F.cross_entropy(F.linear(x, w, b), t, weight, **keywords)

    return ours, torchs


@pytest.mark.parametrize("options", [o for o in OPTIONS if o != "ignore all"])
def test_gradcheck(options):
    tensors = [t.requires_grad_() for t in draw(3, 4, 5)]
    assert gradcheck(pair(options, 3, 5, "cpu")[0], tensors)
    assert gradgradcheck(pair(options, 3, 5, "cpu")[0], tensors)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
def test_against_torch(options, dtype, device):
    for m, k, c in [(17, 33, 10), (1, 7, 1), (33, 16, 100)]:
        compare(*pair(options, m, c, device), draw(m, k, c, device, dtype), what=f"{(m, k, c)}")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_rows(reduction, device):
    compare(*pair(reduction, 0, 4, device), draw(0, 3, 4, device, torch.float32))


def test_no_bias(device):
    x, w, _ = draw(17, 33, 10, device, torch.float32)
    compare(*pair("mean", 17, 10, device), (x, w, None), (w[:1] + x, 2 * w, None), (x - 1, w, None))


@pytest.mark.interpreter
@pytest.mark.parametrize("classes", [FUSED_CLASSES, FUSED_CLASSES + 1])
def test_fused_up_to(classes, device):
    """Up to the limit the logits are never stored. With one class more, two operations run, to the
    same accuracy.
    """
    x, w, b = draw(5, 7, classes, device, torch.float32)
    names = []
    with launch.observe(lambda kernel, grid, args, options: names.append(kernel.fn.__name__)):
        linear_cross_entropy_fwd(x, w, b, torch.arange(5, device=device))
    assert ("linear_cross_entropy_fwd_kernel" in names) == (classes <= FUSED_CLASSES)
    assert ("linear_fwd_kernel" in names) == (classes > FUSED_CLASSES)
    compare(*pair("none", 5, classes, device), (x, w, b), what=f"{classes}")


def test_second_derivative_through_kernels(device):
    def penalty(function):
        def of(*tensors):
            return sum(
                g.square().sum()
                for g in torch.autograd.grad(function(*tensors), tensors, create_graph=True)
            )

        return of

    compare(*map(penalty, pair("weights", 16, 7, device)), draw(16, 17, 7, device, torch.float32))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, device):
    arrange = LAYOUTS[layout]
    x, w, b = map(arrange, draw(17, 33, 10, device, torch.float32))
    weight = arrange(torch.rand(10, device=device) + 0.5)
    dy = arrange(torch.rand(17, device=device))
    for target in (
        arrange(torch.arange(17, device=device) % 10),
        arrange(torch.rand(17, 10, device=device)),
    ):
        loss, saved = linear_cross_entropy_fwd(x, w, b, target, weight, reduction="none")
        ours = [loss, *linear_cross_entropy_bwd(dy, *saved)]

        def by_torch(cast, target=target):
            tensors = [cast(t).requires_grad_() for t in (x, w, b)]
            t = cast(target) if target.is_floating_point() else target
            loss = F.cross_entropy(F.linear(*tensors), t, cast(weight), reduction="none")
            return [loss, *torch.autograd.grad(loss, tensors, cast(dy))]

        exact = functools.partial(by_torch, torch.Tensor.double)
        assert_as_accurate(ours, by_torch(torch.Tensor.detach), exact, layout)


@pytest.mark.interpreter
def test_labels_out_of_range(device, monkeypatch):
    x, w, b = draw(3, 4, 5, device, torch.float32)
    target = torch.tensor([0, 5, 1], device=device)
    with (
        kernels.check_labels(),
        pytest.raises(IndexError, match=r"target\[1\] is 5, but there are 5 classes"),
    ):
        kernels.linear_cross_entropy(x, w, b, target)
    monkeypatch.setitem(linear_cross_entropy_fwd.__globals__, "check_range", lambda *args: False)
    assert kernels.linear_cross_entropy(x, w, b, target).isnan()


def test_is_the_two_operations(device):
    """In float64 the reference runs. It equals the two functions, bit for bit."""
    x, w, b = double(draw(7, 5, 4, device))
    target = torch.arange(7, device=device) % 4
    expected = kernels.cross_entropy(kernels.linear(x, w, b), target)
    assert torch.equal(kernels.linear_cross_entropy(x, w, b, target), expected)
