"""Compiled convolutions train as the references do.

This holds for every activation, geometry, batch size and number of threads.
"""

import itertools
import math

import pytest
import torch

import kernels
import mlp
from kernels import cpu
from kernels.activations import ACTIVATIONS
from mlp import engines

pytest.importorskip("numba", reason="optional: needs numba")
from kernels.cpu import conv, team
from kernels.cpu import images as pixels

# name -> fields of a network's description
NETWORKS = {
    "two layers": {"image_shape": (1, 12, 11), "channels": (3, 5), "kernel_size": 3, "max_pool": 2},
    "colours": {"image_shape": (3, 9, 14), "channels": (5,), "kernel_size": 5, "max_pool": 2},
    "a wide kernel": {"image_shape": (2, 19, 20), "channels": (2,), "kernel_size": 17},
    "one pixel": {"image_shape": (2, 11, 10), "channels": (3, 2), "kernel_size": 1, "max_pool": 3},
    "no pooling": {"image_shape": (2, 7, 6), "channels": (3, 4), "kernel_size": 2, "max_pool": 1},
    "three layers": {"image_shape": (1, 26, 26), "channels": (2, 3, 4), "kernel_size": 3},
}


@pytest.fixture(autouse=True)
def on_the_cpu():
    with kernels.use("torch"):
        yield


def network(name="two layers", activation="relu", dtype=None, seed=0):
    fields = {"max_pool": 2, **NETWORKS[name]}
    torch.manual_seed(seed)
    model = mlp.ConvNet(hidden=(7,), classes=5, activation=activation, **fields)
    return model if dtype is None else model.to(dtype)


def images(model, count, seed=1):
    torch.manual_seed(seed)
    return torch.rand(count, math.prod(model.arguments["image_shape"]))


def compiled_gradients(model, x, workers=1, batch=None):
    """(features, gradients by name) of the convolutions. The features' gradient is themselves."""
    net = mlp.Net.of(model)
    _ = net.grads
    with team.threads(workers) as pool:
        stage = conv.Convolutions(net.stages[:-1], batch or len(x), workers, pool)
        y = stage.forward(x).clone()
        stage.backward(y)
    return y, {n: g.clone() for n, g in net.grads.items() if n.startswith("conv")}


def check(name, activation, count=9, **options):
    """float32 by the compiled code against the references in float64."""
    model = network(name, activation)
    x = images(model, count)
    y, found = compiled_gradients(model, x, **options)
    exact = mlp.Net.of(network(name, activation).double())
    expected = x.double()
    for stage in exact.stages[:-1]:
        expected = stage.forward(expected)
    dy, _ = expected, exact.grads
    for i in reversed(range(len(exact.stages) - 1)):
        dy = exact.stages[i].backward(dy, input_grad=i > 0)
    for ours, true in [(y, expected), *((g, exact.grads[n]) for n, g in found.items())]:
        assert float((ours - true).abs().max()) <= 3e-6 * float(true.abs().max())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation):
    check("two layers", activation)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_geometry(name):
    check(name, "tanh")


@pytest.mark.parametrize("count", [0, 1, 2, 17, 40])
def test_every_batch_size(count):
    model = network()
    if count:
        check("two layers", "silu", count, batch=40)
    else:
        y, found = compiled_gradients(model, images(model, 0), batch=40)
        assert len(y) == 0
        assert not any(g.any() for g in found.values())


@pytest.mark.parametrize("batch", [19, 64])
def test_the_number_of_threads_changes_no_bit(batch):
    model = network()
    x = images(model, 19)
    results = [compiled_gradients(model, x, workers, batch) for workers in (1, 2, 3)]
    for (y, grads), (y2, grads2) in itertools.pairwise(results):
        assert torch.equal(y, y2)
        assert all(torch.equal(grads[name], grads2[name]) for name in grads)


def test_ties_and_nan_win_as_in_torch():
    """Among equal maxima the first has the gradient. Among NaNs it is the last, as in torch."""
    fields = {"image_shape": (1, 6, 6), "channels": (1,), "kernel_size": 1, "max_pool": 2}
    model = mlp.ConvNet(**fields, hidden=(3,), classes=2, activation="identity")
    with torch.no_grad():
        model.conv[0].weight.fill_(1.0)
        model.conv[0].bias.zero_()
    torch.manual_seed(0)
    x = torch.randint(-1, 2, (8, 36)).float()
    x[1], x[2, :8], x[3, 5] = float("-inf"), float("nan"), float("nan")
    net = mlp.Net.of(model)
    _ = net.grads
    stage = conv.Convolutions(net.stages[:-1], 8, 1, None)
    y = stage.forward(x)
    layer = stage.memory.run.layers[0]
    places = stage.memory.run.whole[layer[pixels.WINNER] :][:72].reshape(8, 1, 3, 3)
    expected, winner = torch.nn.functional.max_pool2d(x.view(8, 1, 6, 6), 2, return_indices=True)
    torch.testing.assert_close(y, expected.flatten(1), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.from_numpy(places).long(), winner)


def data(model, n=50, seed=2):
    torch.manual_seed(seed)
    shape = model.arguments["image_shape"]
    octets = torch.randint(0, 256, (n, math.prod(shape)), dtype=torch.uint8)
    targets = torch.randint(0, 5, (n,))
    return mlp.data.Dataset(octets, targets, scale=1 / 255, image_shape=shape)


def trained(compiles, monkeypatch, optimizer=mlp.SGD, batch=16, dtype=None, **demands):
    """(the results of two epochs, the parameters), with or without compiled convolutions."""
    model = network(dtype=dtype)
    monkeypatch.setattr(cpu, "convolves", lambda *_: compiles)
    engine, _ = engines.choose(
        "manual",
        model,
        mlp.SoftmaxCrossEntropy(),
        optimizer(model.parameters(), lr=0.05),
        batch,
        engines.Demands(**demands),
    )
    samples = data(model)
    order = torch.arange(len(samples))
    results = [engine.epoch(samples, order, batch) for _ in range(2)]
    return results, [p.detach().double() for p in model.parameters()]


@pytest.mark.parametrize("demands", [{}, {"clip_norm": 0.1}, {"per_step": True}], ids=str)
def test_the_engine_trains_as_without(demands, monkeypatch):
    """The last batch of an epoch has fewer images."""
    found, ours = trained(True, monkeypatch, **demands)
    expected, theirs = trained(False, monkeypatch, dtype=torch.float64, **demands)
    for result, wanted in zip(found, expected):
        assert result.loss == pytest.approx(wanted.loss, rel=1e-5)
        assert result.accuracy == wanted.accuracy
    for p, true in zip(ours, theirs):
        assert float((p - true).abs().max()) <= 1e-5 * float(true.abs().max())


def test_a_loss_that_is_not_finite_ends_the_epoch(monkeypatch):
    monkeypatch.setattr(cpu, "convolves", lambda *_: True)
    model = network()
    with torch.no_grad():
        model.conv[0].weight[0, 0, 0, 0] = float("nan")
    optimizer = mlp.SGD(model.parameters(), lr=0.1)
    engine, _ = engines.choose("manual", model, mlp.SoftmaxCrossEntropy(), optimizer)
    before = len(engine.net.stages)
    with pytest.raises(FloatingPointError, match="step 1"):
        engine.epoch(data(model), torch.arange(32), 16)
    assert len(engine.net.stages) == before


def pays(monkeypatch, steps=10_000_000, numba=True, **fields):
    monkeypatch.setattr("kernels.launch.has_numba", lambda: numba)
    monkeypatch.setattr(cpu, "is_loaded", lambda *_: False)
    return cpu.convolves(mlp.Net.of(network(**fields)).stages, 16, steps)


def test_it_serves_where_it_pays(monkeypatch):
    assert pays(monkeypatch)
    assert not pays(monkeypatch, steps=1)
    assert not pays(monkeypatch, numba=False)
    assert not pays(monkeypatch, name="no pooling")
    assert not pays(monkeypatch, dtype=torch.float64)
    monkeypatch.setattr(cpu, "_PRODUCTS", 1000)
    assert not pays(monkeypatch)


def test_an_mlp_has_no_convolutions():
    assert not cpu.convolves(mlp.Net([4, 3, 2]).stages, 16, 10_000_000)


def test_weights_that_are_not_contiguous():
    model = network()
    x = images(model, 5)
    y, _ = compiled_gradients(model, x)
    net = mlp.Net.over(network().to(memory_format=torch.channels_last))
    _ = net.grads
    stage = conv.Convolutions(net.stages[:-1], 5, 1, None)
    assert torch.equal(stage.forward(x), y)


def test_what_the_compiled_code_does_not_compute(monkeypatch):
    """Larger batches, the gradient of the images and predictions are computed by the references."""
    net, x = mlp.Net.of(network()), images(network(), 6)
    expected = mlp.Net.of(network())
    y = expected.forward(x)
    dx = expected.backward(y, input_grad=True)
    for batch in (3, 6):
        with cpu.convolving(net, batch):
            torch.testing.assert_close(net.predict(x), y)
            torch.testing.assert_close(net.forward(x), y)
            torch.testing.assert_close(net.backward(y, input_grad=True), dx)
            torch.testing.assert_close(dict(net.grads), dict(expected.grads))
            with pytest.raises(ValueError, match="weight must be"):
                net.forward(x.double())
    assert len(net.stages) == 3
