"""The steps that the graph engine captures, repeated without CUDA graphs, train as the manual
engine does.

These tests cannot see values that a capture freezes. All that changes from step to step must be
read from memory.
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
    "chain": lambda: mlp.MLP([36, 7, 3], activation="gelu"),
    "convolution": lambda: mlp.ConvNet((1, 6, 6), (2,), 3, 2, (7,), 3, activation="tanh"),
}
CHAINED = ("chain", "convolution")


@pytest.fixture
def repeated(monkeypatch, request):
    """Replaces a CUDA graph by as many calls of the function that would be captured.

    The model "chain" takes the manual step, as a network would that is too wide for step kernels.
    """
    if request.node.callspec.params["kind"] == "chain":
        monkeypatch.setattr(graphs, "_served", lambda *_: False)

    def repeat(step, times, device):
        step()
        return lambda: [step() for _ in range(times)]

    monkeypatch.setattr(graphs, "_captured", repeat)
    monkeypatch.setattr(graphs, "_CAPTURED", 3)


def in_turn(engine, model, data, kind, options, loss=mlp.SoftmaxCrossEntropy):
    """(engine, results of two epochs, weights). The second epoch has another learning rate."""
    optimizer = kind(model.parameters(), **options)
    trained, results = engine(model, loss(), optimizer), []
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = options["lr"] / (1 + epoch)
        order = mlp.data.permutation(len(data), 0, epoch, data.inputs.device)
        results.append(trained.epoch(data, order, 5))
    return trained, results, [p.detach() for p in model.parameters()]


# Every model meets every optimizer, and each of them both kinds of last batch. The code of the last
# batch depends on neither, so not all three are combined.
OPTIMIZERS = [name for name in OPTIONS if name not in ("dampening", "torch's")]
COUNTS = {"smaller last batch": 17, "whole batches": 20}
CASES = [
    (kind, optimizer, list(COUNTS)[(i + j) % 2])
    for i, kind in enumerate(MODELS)
    for j, optimizer in enumerate(OPTIMIZERS)
]


def drawn(count, device):
    """Pixels (count, 36), the same on every device."""
    torch.manual_seed(0)
    return torch.randint(0, 256, (count, 36), dtype=torch.uint8).to(device)


@pytest.mark.parametrize(("kind", "optimizer", "last"), CASES)
def test_trains_as_manual(kind, optimizer, last, repeated, device):
    pixels = drawn(COUNTS[last], device)
    data = mlp.Dataset(pixels, pixels.float()[:, :3].argmax(1), scale=1 / 255, shift=-0.5)
    assert_as_manual(kind, data, OPTIONS[optimizer])


@pytest.mark.parametrize(
    ("kind", "loss"),
    [*(("two launches", loss) for loss in LOSSES.values()), ("chain", LOSSES["bce"])],
)
def test_every_loss_trains_as_manual(kind, loss, repeated, device):
    """The targets are numbers here. The other tests have labels."""
    pixels = drawn(8, device)
    data = mlp.Dataset(pixels, pixels.float()[:, :3].softmax(1), scale=1 / 255, shift=-0.5)
    assert_as_manual(kind, data, (mlp.SGD, {"lr": 0.1}), loss)


def assert_as_manual(kind, data, optimizer, loss=mlp.SoftmaxCrossEntropy):
    """Checks that accuracies equal the manual engine's, losses to 1e-5, weights to 1e-4.

    The two add in different orders, and optimizers that divide by small moments magnify that.
    """
    model = MODELS[kind]().to(data.inputs.device)
    other = copy.deepcopy(model)
    _, theirs, expected = in_turn(engines.Manual, other, data, *optimizer, loss)
    graph, ours, weights = in_turn(graphs.Graph, model, data, *optimizer, loss)
    chained = kind in CHAINED or "maximize" in optimizer[1]  # no step kernel maximises
    assert isinstance(graph._steps, graphs._Chain) == chained
    for a, b in zip(ours, theirs):
        assert (a.accuracy, a.samples) == (b.accuracy, b.samples)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    for a, b in zip(weights, expected):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()
