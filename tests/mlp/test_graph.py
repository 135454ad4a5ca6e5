"""The graph engine where there are no CUDA graphs: what it captures, repeated, trains as the manual
engine does.

Not seen here: values that a capture freezes. Everything that changes from step to step must come
out of memory.
"""

import copy

import pytest
import torch

import mlp
from mlp import engines
from mlp.engines import graphs
from mlp.loss import LOSSES
from tests.mlp.test_engines import OPTIONS

pytestmark = pytest.mark.interpreter
MODELS = {
    "two launches": lambda: mlp.MLP([36, 7, 3], activation="sigmoid"),
    "chain": lambda: mlp.MLP(
        [36, 7, 3], activation="gelu"
    ),  # its derivative needs what the step kernels do not keep
    "convolution": lambda: mlp.ConvNet((1, 6, 6), (2,), 3, 2, (7,), 3, activation="tanh"),
}


@pytest.fixture
def repeated(monkeypatch):
    """Instead of a CUDA graph: as many calls of what would be captured, after the one that
    compiles.
    """

    def repeat(step, times, device):
        step()
        return lambda: [step() for _ in range(times)]

    monkeypatch.setattr(graphs, "_captured", repeat)
    monkeypatch.setattr(graphs, "_CAPTURED", 3)


def in_turn(engine, model, data, kind, options, loss=mlp.SoftmaxCrossEntropy):
    """Results of two epochs, the second at another learning rate, and the weights after them."""
    optimizer = kind(model.parameters(), **options)
    trained, results = engine(model, loss(), optimizer), []
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = options["lr"] / (1 + epoch)
        results.append(trained.epoch(data, mlp.data.permutation(len(data), 0, epoch), 5))
    return results, [p.detach() for p in model.parameters()]


# Every model with every optimizer, and each of both with either last batch. What the last batch
# does depends on neither, so not every three meet.
OPTIMIZERS = [name for name in OPTIONS if name not in ("dampening", "torch's")]
COUNTS = {"smaller last batch": 17, "whole batches": 20}
CASES = [
    (kind, optimizer, list(COUNTS)[(i + j) % 2])
    for i, kind in enumerate(MODELS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


@pytest.mark.parametrize(("kind", "optimizer", "last"), CASES)
def test_trains_as_manual(kind, optimizer, last, repeated):
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (COUNTS[last], 36), dtype=torch.uint8)
    data = mlp.Dataset(pixels, pixels.float()[:, :3].argmax(1), scale=1 / 255, shift=-0.5)
    model = MODELS[kind]()
    assert_as_manual(model, data, OPTIONS[optimizer])


@pytest.mark.parametrize(
    ("kind", "loss"),
    [*(("two launches", loss) for loss in LOSSES.values()), ("chain", LOSSES["bce"])],
)
def test_every_loss_trains_as_manual(kind, loss, repeated):
    """On numbers; labels are what all the others here have."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (8, 36), dtype=torch.uint8)
    data = mlp.Dataset(pixels, pixels.float()[:, :3].softmax(1), scale=1 / 255, shift=-0.5)
    assert_as_manual(MODELS[kind](), data, (mlp.SGD, {"lr": 0.1}), loss)


def assert_as_manual(model, data, optimizer, loss=mlp.SoftmaxCrossEntropy):
    """Losses, accuracies and weights of a few epochs are the manual engine's."""
    other = copy.deepcopy(model)
    theirs, expected = in_turn(engines.Manual, other, data, *optimizer, loss)
    ours, weights = in_turn(graphs.Graph, model, data, *optimizer, loss)
    for a, b in zip(ours, theirs):
        assert (a.accuracy, a.samples) == (b.accuracy, b.samples)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for a, b in zip(weights, expected):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
