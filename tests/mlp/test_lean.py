"""The engine `lean` needs less memory and computes what `manual` computes."""

import copy

import pytest
import torch

import mlp
from bench import bench_memory
from mlp.engines import Demands, Lean


@pytest.mark.interpreter
def test_memory_of_a_step():
    """Bytes of the tensors in a step of 4 × 4096 at batch 8192 in bfloat16.

    Eager holds 8 units of 64 MiB in the backward of its loss: 2 of weights, three activations and
    three arrays of the loss.
    """
    sizes, batch = bench_memory.SIZES, bench_memory.BATCH
    bytes_of = {
        name: bench_memory.counted(make, sizes, batch)
        for name, make in bench_memory.PROVIDERS.items()
    }
    unit = batch * sizes[0] * 2
    assert bytes_of["eager"] == pytest.approx(8 * unit, rel=0.001)
    assert bytes_of["engine lean"] <= 0.6 * bytes_of["eager"]
    assert bytes_of["autograd"] <= bytes_of["eager"]
    assert bytes_of["engine manual"] <= bytes_of["manual"] - 2 * unit  # it stores no gradients


def test_all_providers_compute_the_same_losses():
    first, *others = (bench_memory.losses(make) for make in bench_memory.PROVIDERS.values())
    for found in others:
        assert found == pytest.approx(first, rel=bench_memory._TOLERANCE)


LOSSES = {
    "entropy": lambda: mlp.SoftmaxCrossEntropy(ignore_index=2, label_smoothing=0.1),
    "weighted": lambda: mlp.SoftmaxCrossEntropy([1.0, 2.0, 0.5]),
    "sum": lambda: mlp.SoftmaxCrossEntropy(reduction="sum", scale=0.01),
    "mse": lambda: mlp.MeanSquaredError(),
}


@pytest.mark.parametrize("loss", [*LOSSES])
@pytest.mark.parametrize(
    "optimizer",
    [lambda p: mlp.SGD(p, lr=0.3, momentum=0.9), lambda p: mlp.Adam(p, lr=0.01)],
    ids=["momentum", "adam"],
)
def test_pieces_are_the_whole_batch(loss, optimizer):
    """A batch computed in pieces gives the losses and weights of the whole batch. One piece has
    only ignored labels. In float64 the other order of sums changes no more than 1e-9.
    """
    g = torch.Generator().manual_seed(0)
    x = torch.randn(250, 6, generator=g, dtype=torch.float64)
    y = x[:, :3].argmax(1)  # labels that can be learned, so the loss falls whatever the draw
    y[mlp.data.permutation(250, 0, 1)[32:64]] = 2
    first = mlp.MLP([6, 12, 9, 7, 3], "tanh", dtype=torch.float64)
    trained = {}
    for engine in ("manual", "lean"):
        made = mlp.Trainer(copy.deepcopy(first), LOSSES[loss](), optimizer, engine, verbose=False)
        rows = made.fit((x, y), 3, 120)
        numbers = [(row["train_loss"], row["train_accuracy"]) for row in rows]
        trained[engine] = numbers, list(made.model.parameters())
    assert trained["lean"][0][2][0] < trained["lean"][0][0][0]
    for one, other in zip(trained["lean"][0], trained["manual"][0]):
        assert one == pytest.approx(other, rel=1e-10)
    for p, q in zip(trained["lean"][1], trained["manual"][1]):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_buffers_are_kept_for_the_next_step():
    """A step uses its predecessor's two buffers, also with fewer rows."""
    net = mlp.Net([6, 12, 3])
    engine = Lean(net, mlp.SoftmaxCrossEntropy(), mlp.SGD(net.parameters.values(), lr=0.1))
    with torch.no_grad():
        for rows in (50, 20, 50):
            engine.step(torch.randn(rows, 6), torch.zeros(rows, dtype=torch.int64))
    assert [t.numel() for t in engine._kept] == [50 * 12] * 2
    assert net._grads is None


@pytest.mark.parametrize(
    ("model", "optimizer", "message"),
    [
        (lambda: mlp.MLP([6, 8, 3], "silu"), None, "the gradient of silu needs its input"),
        (lambda: mlp.MLP([6, 8, 3]), torch.optim.SGD, "one parameter group of mlp's optimizers"),
        (lambda: mlp.ConvNet((1, 8, 8), (2,), 3, 2, (5,), 3), None, "multilayer perceptrons"),
    ],
)
def test_refusals(model, optimizer, message):
    with pytest.raises(ValueError, match=f"^lean: .*{message}"):
        mlp.Trainer(
            model(), optimizer=optimizer and (lambda p: optimizer(p, lr=0.1)), engine="lean"
        )
    assert "cannot clip" in str(Lean.cannot(Demands(clip_norm=1.0)))
