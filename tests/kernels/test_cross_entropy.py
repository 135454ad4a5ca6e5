"""cross_entropy against torch.nn.functional for every kind of target and option, with gradients and
second derivatives.
"""

import functools
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
from tests.checks import assert_as_accurate, compare, double, with_gradients

EACH_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EACH_TARGET = pytest.mark.parametrize("target", ["labels", "probabilities"])
# (N, C), one class, one vector of logits, images, no rows at all
SHAPES = [(7, 10), (5, 1), (10,), (3, 5, 2, 4), (1, 3, 1), (0, 4), (2, 3, 0)]
# Class weights, label smoothing, how many of the labels are ignored.
OPTIONS = {
    "plain": (False, 0.0, "none"),
    "weight": (True, 0.0, "none"),
    "smoothing": (False, 0.1, "none"),
    "ignore some": (False, 0.0, "some"),
    "ignore all": (True, 0.1, "all"),
    "everything": (True, 0.3, "some"),
}
EACH_OPTION = pytest.mark.parametrize("options", OPTIONS)


def draw(shape, target, options, seed=0):
    """Logits, target and keywords, in float64. Probabilities need not sum to one, as in torch."""
    weighted, smoothing, ignored = OPTIONS[options]
    torch.manual_seed(seed)
    logits, classes = 2 * torch.randn(shape, dtype=torch.float64), shape[min(1, len(shape) - 1)]
    keywords = {"label_smoothing": smoothing}
    if weighted:
        keywords["weight"] = torch.linspace(0.5, 1.5, classes, dtype=torch.float64)
    if target == "probabilities":
        return logits, torch.rand(shape, dtype=torch.float64), keywords
    t = torch.randint(0, classes, shape[:1] * (len(shape) > 1) + shape[2:])
    if ignored != "none":
        keywords["ignore_index"] = 1 if ignored == "some" else -7
    return logits, torch.full_like(t, -7) if ignored == "all" else t, keywords


def loss(function, target, keywords, reduction):
    """The loss as a function of the tensors with a gradient: the logits and, if given as a second
    tensor, probabilities.
    """

    def of(logits, probabilities=None):
        # class weights have the logits' dtype
        k = {
            name: v.to(logits) if isinstance(v, torch.Tensor) else v for name, v in keywords.items()
        }
        t = target.to(logits.device) if probabilities is None else probabilities
        return function(logits, t, **k, reduction=reduction)

    return of


@EACH_REDUCTION
@EACH_OPTION
@EACH_TARGET
def test_gradcheck(target, options, reduction):
    """Logits and probabilities have correct first and second derivatives."""
    for shape in [(3, 4), (2, 3, 2), (4,)]:
        logits, t, keywords = draw(shape, target, options)
        of = loss(kernels.cross_entropy, t, keywords, reduction)
        if of(logits).isnan().any():  # the mean of no labels has no derivative to check
            assert loss(F.cross_entropy, t, keywords, reduction)(logits).isnan()
            continue
        tensors = [
            x.requires_grad_() for x in ([logits, t] if target == "probabilities" else [logits])
        ]
        assert gradcheck(of, tensors)
        assert gradgradcheck(of, tensors)


@EACH_REDUCTION
@EACH_OPTION
@EACH_TARGET
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_against_torch(backend, target, options, reduction, device):
    """Kernel and reference agree with torch in every shape, also in the gradient of probabilities,
    which has no kernel.
    """
    for shape in SHAPES:
        _, t, keywords = draw(shape, target, options)
        ours, torchs = (
            loss(f, t, keywords, reduction) for f in (kernels.cross_entropy, F.cross_entropy)
        )
        drawn = draw(shape, target, options)[: 2 if target == "probabilities" else 1]
        with kernels.use(backend):
            compare(ours, torchs, [x.to(device, torch.float32) for x in drawn], what=f"{shape}")


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("value", [-math.inf, math.inf, math.nan], ids=str)
def test_zero_times_infinity(value, backend, device):
    """0 · inf is NaN where torch multiplies. Torch does not multiply by a smoothing of 0, but does
    by a probability or class weight of 0.
    """
    logits = torch.tensor([[0.5, value, 1.0], [0.1, 0.2, 0.3]], device=device)
    certain, possible = (
        torch.tensor([[0.4, p, 0.6 - p], [1.0, 0.0, 0.0]], device=device) for p in (0.0, 0.5)
    )
    labels = [torch.tensor([label, 2], device=device) for label in (0, 1, -100)]
    for target, weight, smoothing in itertools.product(
        (certain, possible, *labels), (None, (1.0, 0.0, 2.0)), (0.0, 0.1)
    ):

        def of(f, t=target, w=weight, s=smoothing):
            def loss(z):
                return f(
                    z,
                    t.to(z) if t.is_floating_point() else t,
                    w and z.new_tensor(w),
                    label_smoothing=s,
                    reduction="none",
                )

            return loss

        with kernels.use(backend):
            ours = with_gradients(of(kernels.cross_entropy), [logits])
        torchs, exact = (
            functools.partial(with_gradients, of(F.cross_entropy), tensors)
            for tensors in ([logits], double([logits]))
        )
        assert_as_accurate(ours, torchs(), exact, f"{target.tolist()}, {weight}, {smoothing}")
