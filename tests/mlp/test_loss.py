"""The manual losses have the values and gradients of the same losses under autograd."""

import functools

import pytest
import torch
import torch.nn.functional as F

import kernels
import mlp
from mlp import BinaryCrossEntropy, Huber, MeanSquaredError, Net, Pinball, SoftmaxCrossEntropy
from mlp.loss import LOSSES, one_hot, per_sample
from mlp.modules import loss_of
from tests.checks import assert_as_accurate, assert_equal, stacked

REDUCTIONS = ["mean", "sum"]


def targets(output, kind):
    """Labels, or a probability for each output."""
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
    """`forward` and `backward` equal autograd bit for bit. Both are `scale` times torch's loss."""
    loss = LOSSES[name](reduction=reduction, scale=scale)
    row, draws = loss.row, []
    for seed in range(4):
        output = torch.randn(17, 10, generator=torch.Generator().manual_seed(seed)).to(device)
        target = targets(output, kind)
        ours = manual(loss, output, target)
        assert_equal(ours, on_tape(loss, output, target))
        target = one_hot(target, output) if row.per_element else target

        def theirs(x, t):
            t = t.to(x) if t.is_floating_point() else t
            return row.torch(x, t, row.default, reduction) * scale

        exact = functools.partial(on_tape, theirs, output.double(), target)
        draws.append((ours, on_tape(theirs, output, target), exact))
    ours, torchs, exact = zip(*draws)
    assert_as_accurate(stacked(ours), stacked(torchs), lambda: stacked(e() for e in exact), name)


@pytest.mark.parametrize("name", LOSSES)
def test_one_object_serves_all_shapes(name, device):
    """A loss object may take batches of different size, dtype and kind of target in turn."""
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
    """labels_valid=True, which skips the checks, gives the same numbers and leaves the outputs
    unchanged.
    """
    output = torch.randn(9, 4, device=device)
    before, target = output.clone(), targets(output, "labels")
    loss = LOSSES[name]()
    assert_equal(manual(loss, output, target, labels_valid=True), manual(loss, output, target))
    assert_equal(output, before)


def test_cross_entropy_options(device):
    """Class weights, the ignored label and smoothing reach the operation."""
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
    """A label counts as its one-hot row. So ½ Σ (output - one-hot)² has the difference as its
    gradient.
    """
    output, target = torch.tensor([[0.5, 1.0], [0.0, -1.0]]), torch.tensor([1, 0])
    loss = MeanSquaredError(reduction="sum", scale=0.5)
    value, gradient = manual(loss, output, target)
    assert value == 0.5 * (0.25 + 0 + 1 + 1)
    assert_equal(gradient, torch.tensor([[0.5, 0.0], [-1.0, -1.0]]))
    assert_equal(one_hot(target, output), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_binary_cross_entropy_of_several_labels(device):
    """pos_weight is used for each output, on the output's device and in its precision."""
    output = torch.randn(9, 3, dtype=torch.float64, device=device)
    target = (torch.randn(9, 3, device=device) > 0).double()
    pos_weight = torch.tensor([1.0, 2.0, 0.5])
    for given in (pos_weight, pos_weight.tolist()):
        loss = BinaryCrossEntropy(pos_weight=given)
        expected = F.binary_cross_entropy_with_logits(
            output, target, pos_weight=pos_weight.to(output)
        )
        torch.testing.assert_close(loss.forward(output, target), expected, rtol=1e-14, atol=0)
    assert_equal(loss.predict(output), torch.sigmoid(output))


def test_quantiles_of_one_column(device):
    """Each quantile has an output. One column of targets serves all of them."""
    output = torch.tensor([[0.0, 0.0], [4.0, 4.0]], device=device)
    loss = Pinball([0.25, 0.5], reduction="sum")
    for target in (torch.tensor([2.0, 2.0], device=device), torch.full((2, 1), 2.0, device=device)):
        value, gradient = manual(loss, output, target)
        assert value == (0.25 * 2 + 0.5 * 2) + (0.75 * 2 + 0.5 * 2)
        assert gradient.tolist() == [[-0.25, -0.5], [0.75, 0.5]]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_targets_without_columns(loss, device):
    """Targets (N,) with outputs (N, 1) are a column, where torch would broadcast to (N, N).
    Cross-entropy refuses them, because one output has nothing to learn.
    """
    output, target = torch.randn(5, 1, device=device), torch.rand(5, device=device)
    if not loss.row.per_element:
        for attempt in (loss().forward, loss()):
            with pytest.raises(ValueError, match="use MeanSquaredError"):
                attempt(output, target.unsqueeze(1))
        return
    assert_equal(
        manual(loss(), output, target), manual(loss(), output, target.unsqueeze(1).contiguous())
    )
    assert loss()(output, target).isfinite()


@pytest.mark.parametrize("loss", [MeanSquaredError, BinaryCrossEntropy, Huber, Pinball])
def test_labels_that_are_no_class(loss):
    output = torch.randn(3, 4)
    for target, message in (
        (torch.tensor([0, 4, 1]), "is 4"),
        (torch.tensor([0, -100, 1]), "-100"),
    ):
        with pytest.raises(IndexError, match=message):
            loss().forward(output, target)
    with pytest.raises(ValueError, match=r"labels \(3,\) .*convert numbers with \.float\(\)"):
        loss().forward(output, torch.ones(3, 4, dtype=torch.int64))


def test_names_and_modules_become_losses():
    """Names and modules, ours and torch's, become losses that every engine knows. A subclass, a
    module with hooks or with unknown options stays as it is.
    """
    weight = torch.rand(3)
    for given, kind, options in (
        (None, SoftmaxCrossEntropy, {}),
        ("mse", MeanSquaredError, {}),
        (mlp.CrossEntropyLoss(weight, ignore_index=1), SoftmaxCrossEntropy, {}),
        (torch.nn.CrossEntropyLoss(label_smoothing=0.1), SoftmaxCrossEntropy, {}),
        (mlp.MSELoss(reduction="sum"), MeanSquaredError, {"reduction": "sum"}),
        (torch.nn.MSELoss(), MeanSquaredError, {"reduction": "mean"}),
        (mlp.HuberLoss(delta=2.0), Huber, {"parameter": 2.0}),
        (torch.nn.HuberLoss("sum", 3.0), Huber, {"parameter": 3.0, "reduction": "sum"}),
        (mlp.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0])), BinaryCrossEntropy, {}),
        (torch.nn.BCEWithLogitsLoss(), BinaryCrossEntropy, {"parameter": 1.0}),
        (mlp.PinballLoss([0.1, 0.9]), Pinball, {"parameter": (0.1, 0.9)}),
    ):
        found = loss_of(given)
        assert type(found) is kind
        assert {name: getattr(found, name) for name in options} == options
    assert loss_of(mlp.CrossEntropyLoss(weight, ignore_index=1)).options == (weight, 1, "mean", 0.0)
    assert loss_of(mlp.BCEWithLogitsLoss(pos_weight=torch.ones(2) * 2)).parameter == (2.0, 2.0)

    class Own(mlp.MSELoss):
        pass

    hooked = mlp.MSELoss()
    hooked.register_forward_hook(lambda *_: None)
    for other in (Own(), hooked, torch.nn.BCEWithLogitsLoss(torch.rand(3)), F.mse_loss):
        assert loss_of(other) is other
    with pytest.raises(ValueError, match="unknown loss 'mae'; known: cross_entropy, mse, bce"):
        loss_of("mae")


def test_modules_compute_the_same(device):
    """Each module computes torch's loss and its own manual loss."""
    output, target = torch.randn(5, 2, device=device), torch.rand(5, 2, device=device)
    pos_weight = torch.tensor([0.5, 2.0], device=device)
    for module, expected in (
        (
            mlp.BCEWithLogitsLoss(pos_weight=pos_weight),
            torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight),
        ),
        (mlp.HuberLoss(delta=0.3), torch.nn.HuberLoss(delta=0.3)),
        (mlp.PinballLoss((0.2, 0.8)), None),
    ):
        value = module(output, target)
        torch.testing.assert_close(value, loss_of(module).forward(output, target))
        if expected is not None:
            torch.testing.assert_close(value, expected(output, target))
    assert repr(module) == "PinballLoss(quantile=(0.2, 0.8), reduction='mean')"
    vector = mlp.PinballLoss(0.3)(output[:, 0], target[:, 0])  # without an axis of outputs
    torch.testing.assert_close(vector, mlp.PinballLoss(0.3)(output[:, :1], target[:, 0]))
    assert kernels.LOSSES.keys() == LOSSES.keys()


def test_quantiles_follow_the_input():
    """They were given as numbers, so nobody need move them to the outputs' device."""
    found = mlp.PinballLoss((0.2, 0.8))(*torch.empty(2, 5, 2, device="meta"))
    assert found.device.type == "meta" and found.shape == ()


@pytest.mark.parametrize(
    ("loss", "torchs"),
    [
        (mlp.Pinball((0.1, 0.7)), None),
        (mlp.PinballLoss((0.1, 0.7)), None),
        (
            mlp.BinaryCrossEntropy(pos_weight=(0.1, 0.7)),
            lambda w: torch.nn.BCEWithLogitsLoss(pos_weight=w),
        ),
        (mlp.SoftmaxCrossEntropy((0.1, 0.7)), lambda w: torch.nn.CrossEntropyLoss(w)),
    ],
    ids=["Pinball", "PinballLoss", "BinaryCrossEntropy", "SoftmaxCrossEntropy"],
)
def test_numbers_of_a_list_follow_the_dtype(loss, torchs):
    """They have all digits for float64 outputs, and serve other outputs before and after it.

    It does not matter if the first call was in inference mode.
    """
    torch.manual_seed(0)
    start, target = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 2, dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.float32):
        x, t = start.to(dtype, copy=True).requires_grad_(), target.to(dtype)
        with torch.inference_mode():
            loss(x.detach(), t)
        w = torch.tensor([0.1, 0.7], dtype=dtype)
        d = t - x
        expected = torchs(w)(x, t) if torchs else torch.maximum(w * d, (w - 1) * d).mean()
        (slope,) = torch.autograd.grad(expected, x)
        loss(x, t).backward()
        torch.testing.assert_close(loss(x, t), expected)
        torch.testing.assert_close(x.grad, slope)
        if dtype == torch.float64:
            assert (loss(x, t) - expected).abs() < 1e-14


def test_per_sample():
    """A sum is divided by its rows, a mean is not. Any other function counts as a mean."""
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
    with pytest.raises(
        RuntimeError, match="backward was called before forward; call forward first"
    ):
        loss().backward()


def test_a_net_checks_order_and_shape():
    net = Net([6, 5, 3])
    with pytest.raises(RuntimeError, match="Net: backward was called before forward"):
        net.backward(torch.zeros(4, 3))
    net.forward(torch.zeros(4, 6))
    with pytest.raises(
        ValueError, match=r"the gradient must be \(4, 3\), as the latest outputs were, got \(5, 3\)"
    ):
        net.backward(torch.zeros(5, 3))


def test_predictions_are_in_the_targets_units():
    """For several yes-or-no targets `predict` gives 0 or 1, and `predict_proba` a probability of
    each. For numbers it gives the outputs.
    """
    x, y = torch.randn(20, 4), (torch.randn(20, 2) > 0).float()
    for name in ("bce", "huber"):
        model = mlp.MLP((4, 2))
        trainer = mlp.Trainer(model, name, verbose=False)
        trainer.fit((x, y), 1, 8)
        expected = LOSSES[name]().predict(model(x))
        if name == "bce":
            torch.testing.assert_close(trainer.predict_proba(x), expected, rtol=1e-6, atol=1e-6)
            expected = (expected > 0.5).float()
        torch.testing.assert_close(trainer.predict(x), expected, rtol=1e-6, atol=1e-6)
    assert LOSSES["bce"]().predict(torch.zeros(1, 2)).tolist() == [[0.5, 0.5]]
