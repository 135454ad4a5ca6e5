"""All engines take the same batches in the same order, and their losses agree to rounding.
`auto` says why it takes an engine.
"""

import pytest
import torch
import torch.nn.functional as F

import mlp
from kernels.activations import ACTIVATIONS
from mlp import ENGINES, MLP, ConvNet, Dataset, Net, Trainer
from mlp.engines import choose
from mlp.loss import LOSSES
from mlp.optim import OPTIMIZERS

EACH = pytest.mark.parametrize("engine", [e for e in ENGINES if e != "autograd"])
OPTIONS = {
    **{name: (kind, {"lr": 0.02}) for name, kind in OPTIMIZERS.items()},
    "momentum": (mlp.SGD, {"lr": 0.02, "momentum": 0.9}),
    "dampening": (mlp.SGD, {"lr": 0.02, "momentum": 0.9, "dampening": 0.3}),
    "nesterov": (mlp.SGD, {"lr": 0.02, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "maximize": (mlp.SGD, {"lr": 0.001, "maximize": True}),
    "decay": (mlp.AdamW, {"lr": 0.02, "weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-5}),
    "rate in a tensor": (mlp.SGD, {"lr": torch.tensor(0.02), "momentum": 0.9}),
    "torch's": (torch.optim.RMSprop, {"lr": 0.001}),
}


def problem(kind="labels", count=75):
    """Pixels and targets that a small network learns. In batches of 16 the last one has 11."""
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (count, 12), dtype=torch.uint8)
    sums = pixels.float() @ torch.randn(12, 4)
    return Dataset(
        pixels,
        sums.argmax(1) if kind == "labels" else (sums / 500).tanh(),
        scale=1 / 255,
        shift=-0.5,
    )


def train(
    engine,
    device,
    data=None,
    loss="cross_entropy",
    optimizer=(mlp.SGD, {"lr": 0.1}),
    epochs=3,
    model=None,
    **options,
):
    """([(loss, accuracy) of each epoch], weights) of a run from a fixed seed. Skips the test, with
    the reason, where the engine refuses.
    """
    torch.manual_seed(1)
    model = (model or (lambda: MLP((12, 10, 8, 4), **{"activation": "tanh", **options})))().to(
        device
    )
    loss = LOSSES[loss]() if isinstance(loss, str) else loss
    make = lambda params: optimizer[0](params, **optimizer[1])  # noqa: E731
    refusal = ENGINES[engine].refuses(model, loss, make(list(model.parameters())), 16)
    if refusal is not None:
        pytest.skip(f"by design: {refusal}")
    trainer = Trainer(model, loss, make, engine)
    rows = trainer.fit(data or problem(), epochs, 16, seed=3)
    return [(row["train_loss"], row["train_accuracy"]) for row in rows], [
        p.detach() for p in model.parameters()
    ]


def assert_same_run(ours, reference, tolerance=1e-5):
    """Checks that accuracies are equal, and losses and weights to `tolerance` of the largest.

    1e-5 is 84 ulps of float32. Engines add in different orders, and a dozen steps carry that on.
    """
    for (loss, accuracy), (expected, expected_accuracy) in zip(ours[0], reference[0], strict=True):
        assert loss == pytest.approx(expected, rel=tolerance)
        assert accuracy == expected_accuracy
    for p, q in zip(ours[1], reference[1], strict=True):
        assert (p - q).abs().max() <= tolerance * q.abs().max()


@EACH
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_same_run_with_every_activation(activation, engine, device):
    assert_same_run(*(train(e, device, activation=activation) for e in (engine, "autograd")))


@EACH
@pytest.mark.parametrize("optimizer", OPTIONS.values(), ids=OPTIONS)
def test_same_run_with_every_optimizer(optimizer, engine, device):
    """This includes an optimizer of torch. Some divide by small moments, which magnifies rounding,
    so the tolerance is ten times as large.
    """
    assert_same_run(
        *(train(e, device, optimizer=optimizer) for e in (engine, "autograd")), tolerance=1e-4
    )


@EACH
@pytest.mark.parametrize("kind", ["labels", "numbers"])
@pytest.mark.parametrize(
    "loss",
    [
        *LOSSES.values(),
        lambda: mlp.SoftmaxCrossEntropy(reduction="sum", scale=0.1),
        lambda: mlp.MeanSquaredError("sum", 0.5),
        lambda: mlp.SoftmaxCrossEntropy(label_smoothing=0.1),
        lambda: mlp.SoftmaxCrossEntropy(ignore_index=2),
    ],
    ids=[*LOSSES, "sum of cross_entropy", "half sum of squares", "smoothing", "ignored class"],
)
def test_same_run_with_every_loss(loss, kind, engine, device):
    if kind == "numbers" and getattr(loss(), "options", ())[1:2] == (2,):
        pytest.skip("by design: numbers have no class to ignore")
    options = {"data": problem(kind), "optimizer": (mlp.SGD, {"lr": 0.02})}
    assert_same_run(*(train(e, device, loss=loss(), **options) for e in (engine, "autograd")))


@EACH
@pytest.mark.parametrize("options", [{"bias": False}, {"output_activation": "sigmoid"}], ids=str)
def test_same_run_with_every_network(options, engine, device):
    assert_same_run(*(train(e, device, **options) for e in (engine, "autograd")))


@EACH
def test_same_run_of_a_convnet(engine, device):
    pixels = torch.randint(
        0, 256, (40, 1, 10, 10), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    data = Dataset(
        pixels,
        pixels.flatten(1).float().mean(1).gt(127).long(),
        image_shape=(1, 10, 10),
        scale=1 / 255,
    )
    model = lambda: ConvNet((1, 10, 10), (3, 4), 3, 1, (6,), 2)  # noqa: E731
    assert_same_run(*(train(e, device, data, model=model) for e in (engine, "autograd")))


def test_auto_says_why(device, capsys):
    """`auto` takes the last engine of the table that serves. The note names it, and says for each
    later one why not.
    """
    model = MLP((12, 6, 4)).to(device)
    trainer = Trainer(model)
    trainer.fit(problem(), 1, 16)
    arguments = model, trainer.loss, trainer.optimizer, 16
    serving = [
        e
        for e in ENGINES
        if ENGINES[e].refuses(*arguments) is None and ENGINES[e].costs(*arguments, 5) is None
    ]
    assert trainer.engine.name == serving[-1]
    assert capsys.readouterr().out == f"{trainer.engine_note}\n"
    assert trainer.engine_note.startswith(f"engine {serving[-1]}")
    later = list(ENGINES)[list(ENGINES).index(serving[-1]) + 1 :]
    assert all(f"{name}: " in trainer.engine_note for name in later)
    Trainer(model, verbose=False).fit(problem(), 1, 16)
    assert capsys.readouterr().out == ""


def test_refusals():
    sequential, net = torch.nn.Sequential(torch.nn.Linear(12, 4)), Net((12, 4))
    frozen = MLP((12, 4))
    frozen[0].bias.requires_grad_(False)
    for engine, model, loss, message in (
        ("fast", net, None, f"unknown engine 'fast'; known: auto, {', '.join(ENGINES)}"),
        ("autograd", net, None, "autograd: needs an nn.Module, got Net"),
        ("manual", sequential, None, "manual: has no backward for Sequential"),
        (
            "manual",
            frozen,
            None,
            "manual: trains every parameter, but 0.bias does not require a gradient",
        ),
        (
            "manual",
            net,
            F.cross_entropy,
            f"manual: needs one of the losses {', '.join(LOSSES)}, got function",
        ),
        ("auto", net, F.cross_entropy, "autograd: needs an nn.Module"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model, loss, engine=engine)
    assert (
        choose("auto", sequential, F.cross_entropy, mlp.SGD(sequential.parameters()))[0].name
        == "autograd"
    )
