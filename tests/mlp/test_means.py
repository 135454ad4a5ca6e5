"""An epoch's loss is the loss of all its samples as one batch, also with class weights or ignored
labels.
"""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mlp
from mlp import (
    MLP,
    BinaryCrossEntropy,
    Dataset,
    MeanSquaredError,
    Net,
    SoftmaxCrossEntropy,
    Trainer,
)
from mlp.data import permutation
from mlp.engines import means

WEIGHT = torch.tensor([1.0, 10.0, 100.0])


def sorted_by_class(rows=5000):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    return x, (torch.arange(rows) * 3 // rows)


LOSSES = {
    "class weights": (lambda: SoftmaxCrossEntropy(weight=WEIGHT), {"weight": WEIGHT}),
    "an ignored class": (lambda: SoftmaxCrossEntropy(ignore_index=1), {"ignore_index": 1}),
    "both, smoothed": (
        lambda: SoftmaxCrossEntropy(WEIGHT, 0, label_smoothing=0.1),
        {"weight": WEIGHT, "ignore_index": 0, "label_smoothing": 0.1},
    ),
    "torch's": (lambda: nn.CrossEntropyLoss(WEIGHT), {"weight": WEIGHT}),
    "mlp's module": (lambda: mlp.CrossEntropyLoss(WEIGHT), {"weight": WEIGHT}),
    "a partial": (
        lambda: functools.partial(F.cross_entropy, weight=WEIGHT, ignore_index=2),
        {"weight": WEIGHT, "ignore_index": 2},
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_evaluate(name):
    """The rows are sorted by class, so the pieces have different weights. The plain mean of pieces
    would be a third too low.
    """
    make, options = LOSSES[name]
    x, y = sorted_by_class()
    torch.manual_seed(0)
    model = MLP((6, 8, 3))
    with torch.no_grad():
        logits = model(x)
    result = Trainer(model, make(), verbose=False).evaluate((x, y))
    assert result["test_loss"] == pytest.approx(
        float(F.cross_entropy(logits.double(), y, **cast(options))), rel=1e-5
    )
    counts = y != options.get("ignore_index", -100)
    assert result["test_accuracy"] == float((logits.argmax(1) == y)[counts].double().mean())


def cast(options):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


@pytest.mark.parametrize("engine", ["autograd", "manual"])
@pytest.mark.parametrize("name", LOSSES)
def test_history(name, engine):
    """At a learning rate of 0, an epoch's loss and accuracy are those of all samples at once."""
    make, options = LOSSES[name]
    x, y = sorted_by_class(90)
    torch.manual_seed(0)
    model, loss = MLP((6, 8, 3)), make()
    optimizer = mlp.SGD(model.parameters(), lr=0.0)
    if mlp.ENGINES[engine].refuses(model, loss, optimizer):
        assert engine == "manual" and not isinstance(loss, SoftmaxCrossEntropy)
        return
    row = Trainer(model, loss, optimizer, engine, verbose=False).fit((x, y), 1, 16)[0]
    logits = model(x).detach()
    assert row["train_loss"] == pytest.approx(
        float(F.cross_entropy(logits.double(), y, **cast(options))), rel=1e-5
    )
    counts = y != options.get("ignore_index", -100)
    assert row["train_accuracy"] == float((logits.argmax(1) == y)[counts].double().mean())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_labels_that_are_ignored(engine, reduction):
    """Labels of -100 count in neither loss nor accuracy. A batch of them alone is no divergence.
    Weights become those of torch's loop.
    """
    x, y = sorted_by_class(80)
    y = y.clone()
    order = permutation(80, 0, 1)
    y[order[:20]] = -100  # the whole first batch, and some of the second
    results = []
    for trained in (True, False):
        torch.manual_seed(0)
        model = MLP((6, 8, 3))
        loss = SoftmaxCrossEntropy(reduction=reduction, scale=0.5)
        if trained:
            trainer = Trainer(
                model, loss, lambda p: mlp.SGD(p, lr=0.05, momentum=0.9), engine, verbose=False
            )
            row = trainer.fit((x, y), 1, 16)[0]
            tested = trainer.evaluate((x, y))
        else:
            optimizer, total = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), 0.0
            for rows in order.split(16):
                value = 0.5 * F.cross_entropy(model(x[rows]), y[rows], reduction=reduction)
                optimizer.zero_grad()
                value.backward()
                optimizer.step()
                counted = int((y[rows] >= 0).sum())
                share = 1 if reduction == "sum" else counted
                total += value.item() * share if counted else 0.0
            assert row["train_loss"] == pytest.approx(total / 60, rel=1e-5)
            logits, counts = model(x).detach(), y >= 0
            assert tested["test_loss"] == pytest.approx(
                0.5 * float(F.cross_entropy(logits, y)), rel=1e-5
            )
            assert tested["test_accuracy"] == float((logits.argmax(1) == y)[counts].double().mean())
        results.append([p.detach() for p in model.parameters()])
    assert all(torch.allclose(p, q, rtol=1e-4, atol=1e-6) for p, q in zip(*results))


def test_a_piece_of_ignored_labels_alone():
    """5,000 rows are measured in two pieces. The first has only ignored labels."""
    x, y = sorted_by_class()
    y = y.clone()
    y[:4500] = -100
    model = MLP((6, 8, 3))
    result = Trainer(model, verbose=False).evaluate((x, y))
    expected = F.cross_entropy(model(x[4500:]), y[4500:]).detach()
    assert result["test_loss"] == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="every label is -100, which the loss ignores"):
        Trainer(model, verbose=False).fit((x, torch.full_like(y, -100)), 1)


def test_other_losses_do_not_know_ignored_labels():
    x, y = sorted_by_class(80)
    y = y.clone()
    y[3] = -100
    with pytest.raises(ValueError, match="label -100 of sample 3 is not one of the 3 classes"):
        Trainer(MLP((6, 8, 3)), MeanSquaredError(), verbose=False).fit((x, y), 1)


def test_class_weights_that_are_all_zero():
    """With class weights of 0 torch's mean is NaN, so the training ends as diverged."""
    loss = SoftmaxCrossEntropy(weight=torch.zeros(3))
    assert math.isnan(F.cross_entropy(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(3)))
    with pytest.raises(mlp.Diverged, match="the loss is nan at step 1"):
        Trainer(MLP((6, 8, 3)), loss, verbose=False).fit(sorted_by_class(80), 1)


@pytest.mark.parametrize(
    "loss", [SoftmaxCrossEntropy, nn.CrossEntropyLoss, lambda: F.cross_entropy]
)
def test_softmax_of_numbers(loss):
    """Cross-entropy of one output would be 0 whatever the target, so it is refused."""
    x, _ = sorted_by_class(80)
    for targets in (torch.randn(80, 1), torch.randn(80)):
        with pytest.raises(ValueError, match=r"numbers \(80.*; use MeanSquaredError for them"):
            Trainer(MLP((6, 8, 1)), loss(), verbose=False).fit((x, targets), 1)
    shares = torch.randn(80, 3).softmax(1)
    row = Trainer(MLP((6, 8, 3)), loss(), verbose=False).fit((x, shares), 1)[0]
    assert row["train_accuracy"] is None and row["train_loss"] > 0


@pytest.mark.parametrize(
    ("kind", "engine"), [(MLP, "autograd"), (MLP, "manual"), (Net, "manual")], ids=str
)
def test_regression_on_numbers_without_columns(kind, engine):
    """Targets (N,) with outputs (N, 1) are compared row by row, not each with all."""
    x, _ = sorted_by_class(80)
    y = x[:, 0] - 2 * x[:, 1]
    torch.manual_seed(0)
    trainer = Trainer(kind((6, 1)), "mse", lambda p: mlp.SGD(p, lr=0.1), engine, verbose=False)
    rows = trainer.fit((x, y), 40, 16, evaluate=(x, y))
    assert rows[-1]["train_loss"] < 1e-3 and rows[-1]["test_loss"] < 1e-3
    assert rows[-1]["train_accuracy"] is None
    assert trainer.predict(x).shape == y.shape
    assert torch.allclose(trainer.predict(x), y, atol=0.2)


@pytest.mark.parametrize("loss", [nn.MSELoss, nn.L1Loss, nn.HuberLoss])
def test_regression_of_any_module(loss):
    x, _ = sorted_by_class(80)
    y = (x[:, 0] - 2 * x[:, 1]).double()
    model = nn.Sequential(nn.Linear(6, 1))
    trainer = Trainer(model, loss(), lambda p: mlp.Adam(p, lr=0.05), verbose=False)
    rows = trainer.fit((x, y), 60, 16, evaluate=(x, y))
    assert rows[-1]["test_loss"] < 0.05
    assert trainer.predict(x).shape == y.shape


def test_fused_losses_use_the_same_means(monkeypatch):
    """Engines of whole epochs compute the epoch's loss from the losses of its steps."""
    from mlp.engines.epochwise import Epoch

    data = Dataset(*sorted_by_class(10))
    for reduction, expected in (("mean", (4 * 1.0 + 4 * 2.0 + 2 * 4.0) / 10), ("sum", 0.7)):
        model = MLP((6, 3))
        engine = Epoch(model, SoftmaxCrossEntropy(reduction=reduction), mlp.SGD(model.parameters()))
        values, correct = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1, 2, 2])
        result = engine.measured(values, correct, data, torch.arange(10), 4, None)
        assert result == (pytest.approx(expected), 0.5, 10)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 2"):
        engine.measured(torch.tensor([1, math.nan, 4]), correct, data, torch.arange(10), 4, None)


def test_class_weights_of_probabilities():
    """With probabilities the mean is over rows, whatever the class weights, as in torch."""
    x, _ = sorted_by_class(80)
    shares = torch.randn(80, 3).softmax(1)
    model = MLP((6, 8, 3))
    found = Trainer(model, SoftmaxCrossEntropy(WEIGHT), verbose=False).evaluate((x, shares))
    expected = F.cross_entropy(model(x).detach(), shares, WEIGHT)
    assert found == {"test_loss": pytest.approx(float(expected), rel=1e-5), "test_accuracy": None}


def test_weights():
    """The weights add up to the mean's divisor: the sum of class weights of counted labels, or the
    number of rows.
    """
    labels, numbers = torch.tensor([0, 2, 2, -100], dtype=torch.int8), torch.rand(4, 3)
    weight = torch.tensor([1.0, 10.0, 100.0])
    for loss, target, expected in (
        (SoftmaxCrossEntropy(), labels, 3),
        (SoftmaxCrossEntropy(weight), labels, 201),
        (SoftmaxCrossEntropy(weight, ignore_index=2), labels[:3], 1),
        (SoftmaxCrossEntropy(ignore_index=156), torch.tensor([156, 0], dtype=torch.uint8), 1),
        (SoftmaxCrossEntropy(torch.zeros(3)), labels, 0),
        (SoftmaxCrossEntropy(weight), numbers, 4),
        (SoftmaxCrossEntropy(weight, reduction="sum"), labels, 3),
        (MeanSquaredError(), numbers, 4),
        (BinaryCrossEntropy("sum"), numbers, 4),
    ):
        assert means.weights(loss, target).sum().item() == expected
    output = torch.randn(3, 3)  # the operation itself uses this divisor
    whole = SoftmaxCrossEntropy(weight)
    total = SoftmaxCrossEntropy(weight, reduction="sum").forward(output, labels[:3].long())
    mean = whole.forward(output, labels[:3].long()) * means.weights(whole, labels[:3]).sum().float()
    torch.testing.assert_close(mean, total)
