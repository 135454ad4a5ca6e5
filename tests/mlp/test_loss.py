"""loss: values and gradients of the manual losses are those of the same losses on torch's tape."""

import functools

import pytest
import torch
import torch.nn.functional as F

from mlp import Net
from mlp.loss import LOSSES, MeanSquaredError, SoftmaxCrossEntropy, one_hot, per_sample
from tests.checks import assert_as_accurate, assert_equal, stacked

REDUCTIONS = ["mean", "sum"]
TORCHS = {"cross_entropy": F.cross_entropy, "mse": F.mse_loss}


def targets(output, kind):
    """Labels, or as many numbers as outputs: probabilities."""
    return output.flip(1).argmax(1) if kind == "labels" else output.flip(1).softmax(1)


def manual(loss, output, target, **options):
    with torch.no_grad():
        return [loss.forward(output, target, **options).clone(), loss.backward().clone()]


def on_tape(loss, output, target):
    output = output.detach().clone().requires_grad_()
    value = loss(output, target)
    value.backward()
    return [value.detach(), output.grad]


@pytest.mark.parametrize("scale", [1.0, 0.1])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["labels", "numbers"])
@pytest.mark.parametrize("name", LOSSES)
def test_manual_is_autograd_is_torch(name, kind, reduction, scale, device):
    """`forward` and `backward` equal the tape bit for bit; both are scale times torch's loss."""
    loss = LOSSES[name](reduction=reduction, scale=scale)
    draws = []
    for seed in range(4):
        output = torch.randn(17, 10, generator=torch.Generator().manual_seed(seed)).to(device)
        target = targets(output, kind)
        ours = manual(loss, output, target)
        assert_equal(ours, on_tape(loss, output, target))
        target = one_hot(target, output) if name == "mse" else target

        def theirs(x, t):
            return (
                TORCHS[name](x, t.to(x) if t.is_floating_point() else t, reduction=reduction)
                * scale
            )

        exact = functools.partial(on_tape, theirs, output.double(), target)
        draws.append((ours, on_tape(theirs, output, target), exact))
    ours, torchs, exact = zip(*draws)
    assert_as_accurate(stacked(ours), stacked(torchs), lambda: stacked(e() for e in exact), name)


@pytest.mark.parametrize("name", LOSSES)
def test_one_object_serves_all_shapes(name, device):
    """What a loss keeps from one batch is not left over for the next, of another size, dtype or
    kind of target.
    """
    kept = LOSSES[name](scale=0.5)
    for rows, dtype, kind in (
        (7, "float32", "labels"),
        (3, "float64", "numbers"),
        (7, "float32", "numbers"),
        (7, "bfloat16", "labels"),
    ):
        output = torch.randn(rows, 5, dtype=getattr(torch, dtype), device=device)
        target = targets(output, kind)
        assert_equal(manual(kept, output, target), manual(LOSSES[name](scale=0.5), output, target))


@pytest.mark.parametrize("name", LOSSES)
def test_labels_known_to_be_valid(name, device):
    """The engines' short way gives what the checked way gives, and leaves the outputs alone."""
    output = torch.randn(9, 4, device=device)
    before, target = output.clone(), targets(output, "labels")
    loss = LOSSES[name]()
    assert_equal(manual(loss, output, target, labels_valid=True), manual(loss, output, target))
    assert_equal(output, before)


def test_cross_entropy_options(device):
    """Class weights, the ignored label and smoothing arrive in the operation."""
    weight = torch.tensor([1.0, 2.0, 0.5, 1.5], device=device)
    output = torch.randn(9, 4, dtype=torch.float64, device=device)
    target = targets(output, "labels")
    loss = SoftmaxCrossEntropy(weight.double(), ignore_index=int(target[0]), label_smoothing=0.1)

    def expected(x, t):
        return F.cross_entropy(
            x, t, weight.double(), ignore_index=int(target[0]), label_smoothing=0.1
        )

    for ours, theirs in zip(manual(loss, output, target), on_tape(expected, output, target)):
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-15)


def test_squared_error_of_labels():
    """A label is its one-hot row: ½ Σ (output - one-hot)², and its gradient is the difference."""
    output, target = torch.tensor([[0.5, 1.0], [0.0, -1.0]]), torch.tensor([1, 0])
    loss = MeanSquaredError(reduction="sum", scale=0.5)
    value, gradient = manual(loss, output, target)
    assert value == 0.5 * (0.25 + 0 + 1 + 1)
    assert_equal(gradient, torch.tensor([[0.5, 0.0], [-1.0, -1.0]]))
    assert_equal(one_hot(target, output), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_per_sample():
    """Sums are divided by their rows, means are left; any other function counts as a mean."""
    assert per_sample(MeanSquaredError("sum"), 6.0, 3) == 2.0
    assert per_sample(SoftmaxCrossEntropy(), 6.0, 3) == 6.0
    assert per_sample(F.cross_entropy, 6.0, 3) == 6.0


def test_errors():
    output = torch.randn(3, 4)
    with pytest.raises(IndexError, match=r"target\[2\] is 4, but there are 4 classes"):
        SoftmaxCrossEntropy().forward(output, torch.tensor([0, 3, 4]))
    with pytest.raises(ValueError, match=r"target must be \(3, 4\) as input is, got \(3, 5\)"):
        MeanSquaredError().forward(output, torch.randn(3, 5))


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_backward_before_forward(loss):
    with pytest.raises(RuntimeError, match="forward comes before backward"):
        loss().backward()


def test_a_net_says_in_what_order_and_shape():
    net = Net([6, 5, 3])
    with pytest.raises(RuntimeError, match="Net: forward comes before backward"):
        net.backward(torch.zeros(4, 3))
    net.forward(torch.zeros(4, 6))
    with pytest.raises(
        ValueError, match=r"the gradient must be \(4, 3\) as the output was, got \(5, 3\)"
    ):
        net.backward(torch.zeros(5, 3))
