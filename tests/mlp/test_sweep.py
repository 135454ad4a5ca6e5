"""In a Sweep every network is the one that Trainer trains alone. Also table, ensemble, files."""

import copy
import functools
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

import kernels
import mlp
from mlp.loss import LOSSES
from mlp.sweep import Sweep, spread
from tests.checks import assert_equal

SIZES = (9, 8, 4)
NAMES = "abcdefghi"
OPTIMIZERS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw", "weight_decay": 0.1},
    "lion": {"optimizer": "lion", "weight_decay": 0.1},
    "rmsprop": {"optimizer": "rmsprop", "momentum": 0.5},
    "adagrad": {"optimizer": "adagrad", "initial_accumulator_value": 0.1},
}


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 9), dtype=torch.uint8, generator=generator)
    return mlp.Dataset(
        pixels,
        torch.randint(0, 4, (50,), generator=generator),
        tuple("abcd"),
        scale=1 / 256,  # pixels are exact in float32 and in float64
        shift=-0.5,
    )


@pytest.fixture
def in_float64(monkeypatch):
    """A function that makes sweeps in float64. Their rates and the like are float64 too.

    A rule that divides by small gradients carries the rounding of float32 as far as 1e-4. So in
    float32 no tolerance fits all processors and all seeds.
    """
    numbers = functools.partial(kernels.hyperparameters, dtype=torch.float64)
    monkeypatch.setattr(kernels, "hyperparameters", numbers)

    def made(*arguments, **options):
        sweep = Sweep(*arguments, device="cpu", **options)
        sweep.parameters = [p.double() for p in sweep.parameters]
        sweep.states = [[t.double() for t in state] for state in sweep.states]
        return sweep

    return made


def assert_as_alone(sweep, rows, data, optimizer="sgd", loss=None, **options):
    """Every network of the sweep is the one that Trainer trains with its settings."""
    for row in rows:
        model = mlp.MLP(SIZES, sweep.config["activation"])
        mlp.initialise(dict(model.named_parameters()), None, row.seed)
        made = mlp.optim.OPTIMIZERS[optimizer](model.double().parameters(), lr=row.lr, **options)
        trainer = mlp.Trainer(model, loss, made, "manual", verbose=False)
        trainer.fit(data, 3, 16, seed=row.seed)
        assert row.train_loss == pytest.approx(trainer.history[-1]["train_loss"], rel=1e-9)
        for ours, expected in zip(sweep.network(row.replica).parameters(), model.parameters()):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])  # sigmoid keeps y, gelu keeps z
@pytest.mark.parametrize("options", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_replicas_are_those_of_the_trainer(data, in_float64, options, activation):
    rates = {"lr": [0.02, 0.1, 0.2], "seeds": [5, 6, 7]}
    sweep = in_float64(SIZES, 3, activation=activation, **rates, **options)
    assert_as_alone(sweep, sweep.fit(data, 3, 16, data), data, **options)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, data, in_float64):
    """A replica is the network that Trainer trains with that loss."""
    sweep = in_float64(SIZES, 2, [0.05, 0.1], seeds=[1, 2], loss=name)
    assert_as_alone(sweep, sweep.fit(data, 3, 16), data, loss=name)


@pytest.mark.interpreter
def test_the_kernel_trains_as_the_batched_products(data, device):
    def trained():
        sweep = Sweep(SIZES, 2, [0.1, 0.3], activation="sigmoid", momentum=0.5, device=device)
        sweep.fit(data.take(20), 2, 8)
        return sweep.parameters

    with kernels.use("torch"):
        expected = trained()
    for ours, reference in zip(trained(), expected):
        torch.testing.assert_close(ours, reference, rtol=1e-5, atol=1e-6)


def test_rows_are_best_first_and_a_diverged_network_is_last(data):
    """A diverged network is last even if its accuracy is best. Here all labels are the class that
    NaN outputs predict.
    """
    data = replace(data, targets=torch.zeros_like(data.targets))
    sweep = Sweep(SIZES, 4, [1e-6, 1e30, 1e-5, 1e-4], seeds=[0] * 4, device="cpu")
    rows = sweep.fit(data, 2, 16, data)
    assert [row.replica for row in rows if row.diverged] == [1] == [rows[-1].replica]
    assert rows[-1].test_accuracy == 1.0 > rows[0].test_accuracy
    finite = [row.rank for row in rows[:-1]]
    assert finite == sorted(finite) and all(row.train_loss > 0 for row in rows[:-1])
    sound = Sweep(SIZES, 3, [1e-6, 1e-5, 1e-4], seeds=[0] * 3, device="cpu")
    sound.fit(data, 2, 16)
    assert sweep.ensemble_accuracy(data) == sound.ensemble_accuracy(data) < 1
    again = sweep.fit(data, 0, 16, data)
    assert again[-1].replica == 1 and again[-1].diverged, "weights that are not finite diverged"
    lost = Sweep(SIZES, 1, 1e30, device="cpu")
    lost.fit(data, 2, 16)
    assert math.isnan(lost.ensemble_accuracy(data))


def test_regression_is_ranked_by_test_loss(data):
    """With float targets the rank follows the mean squared error over the test samples."""
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(1))
    data = mlp.Dataset(x, x[:, :2] * 0.5)
    sweep = Sweep(
        (9, 8, 2), 2, [1e-4, 0.05], seeds=[0, 0], loss=mlp.MeanSquaredError(), device="cpu"
    )
    rows = sweep.fit(data, 5, 16, data)
    assert [row.replica for row in rows] == [1, 0] and rows[0].test_accuracy is None
    for row in rows:
        y = sweep.network(row.replica)(x).detach()
        assert row.test_loss == pytest.approx(float((y - data.targets).square().mean()), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"devices": ["cpu", "cpu"]}], ids=["alone", "dealt"])
@pytest.mark.parametrize("own", [False, True], ids=["replicas", "settings"])
def test_other_data_are_read_as_the_training_data(own, options):
    """Words have the training's numbers, and bytes beside a data set that scales are scaled."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (60, 9), dtype=torch.uint8, generator=generator)
    words = np.array(["ant", "bee", "cat"])[torch.arange(60) % 3]
    some = words != "ant"  # on their own, bee and cat would be 0 and 1
    many = mlp.Settings(hidden=(8,), lr=0.5, batch_size=20)

    def made():
        return Sweep([many, many], **options) if own else Sweep((9, 8, 3), 2, lr=0.5, **options)

    sweep = made()
    rows = sweep.fit((pixels / 255, words), 3, 20, (pixels[some] / 255, words[some]))
    data = mlp.Dataset(pixels, torch.arange(60) % 3, scale=1 / 255)
    expected = sweep.accuracies(data.rows(torch.from_numpy(some)))
    assert [row.test_accuracy for row in sorted(rows, key=lambda r: r.replica)] == expected
    sweep = made()
    sweep.fit(data, 1, 20)
    assert sweep.accuracies((pixels, data.targets)) == sweep.accuracies(data)
    with pytest.raises(ValueError, match="trained on uint8 inputs, which its data set scales, got"):
        sweep.fit(data, 1, 20, (pixels / 255, data.targets))
    pandas = pytest.importorskip("pandas")
    frames = [
        pandas.DataFrame(pixels.numpy() / 255.0, columns=list(n)) for n in (NAMES, NAMES[::-1])
    ]
    with pytest.raises(ValueError, match="column 0 is 'i', but the network was trained on 'a'"):
        made().fit((frames[0], data.targets), 1, 20, (frames[1], data.targets))


def test_every_network_can_be_saved_and_loaded(data, tmp_path):
    sweep = Sweep(SIZES, 2, device="cpu")
    sweep.fit(data, 1, 16)
    sweep.save(tmp_path)
    for replica in range(2):
        loaded = mlp.load(tmp_path / f"{replica:03d}.safetensors")
        assert_equal(list(loaded.parameters()), list(sweep.network(replica).parameters()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Sweep(SIZES, replicas=3, device="cpu"),
        lambda: Sweep([{"hidden": (8,)}, {"hidden": (5,)}], device="cpu"),
    ],
    ids=["replicas", "settings"],
)
def test_a_copy_trains_on_alike(make, data):
    """Also a pickled one."""
    sweep = make()
    sweep.fit(data, epochs=1, evaluate=data)
    copies = copy.deepcopy(sweep), pickle.loads(pickle.dumps(sweep))
    expected = [row.test_loss for row in sweep.fit(data, epochs=2, evaluate=data)]
    for made in copies:
        assert [row.test_loss for row in made.fit(data, epochs=2, evaluate=data)] == expected


@pytest.mark.parametrize(("loss", "outputs"), [("mse", 1), ("cross_entropy", 2)])
def test_targets_may_be_a_column_of_a_matrix(loss, outputs):
    x = torch.randn(50, 6)
    matrix = x if loss == "mse" else (x > 0).long()
    strided, packed = (
        Sweep((6, 4, outputs), replicas=2, loss=loss, device="cpu").fit((x, targets), epochs=1)
        for targets in (matrix[:, 0], matrix[:, 0].clone())
    )
    assert [row.train_loss for row in strided] == [row.train_loss for row in packed]


def test_an_ensemble_of_one_is_that_network(data):
    sweep = Sweep(SIZES, 1, device="cpu")
    sweep.fit(data, 1, 16)
    assert sweep.ensemble_accuracy(data) == pytest.approx(sweep.accuracies(data)[0])


def test_spread_has_equal_ratios():
    assert spread(0.01, 1.0, 3) == pytest.approx([0.01, 0.1, 1.0]) and spread(0.5, 0.5, 1) == [0.5]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicas": 0}, "at least 1, got 0"),
        ({"replicas": 3, "lr": [0.1, 0.2]}, "one for each of 3 replicas, got 2"),
        ({"replicas": 2, "lr": [0.1, -1.0]}, r"lr must be a finite number, at least 0, got -1\.0"),
        ({"replicas": 1, "momentum": float("inf")}, "momentum must be a finite number.*, got inf"),
        (
            {"replicas": 2, "loss": mlp.SoftmaxCrossEntropy(label_smoothing=0.1)},
            "without class weights, smoothing",
        ),
        ({"replicas": 2, "optimizer": "sgdm"}, "unknown optimizer 'sgdm'; known: sgd, adam"),
    ],
)
def test_bad_arguments_say_both_values(arguments, message):
    with pytest.raises(ValueError, match=message):
        Sweep(SIZES, **arguments)


@pytest.mark.parametrize("devices", [None, ["cpu", "cpu"]])
@pytest.mark.parametrize("name, value", [("lr", 0.5), ("seeds", [1, 2]), ("activation", "tanh")])
def test_own_settings_leave_nothing_to_the_sweep(name, value, devices):
    """It would be ignored in silence."""
    with pytest.raises(ValueError, match=f"{name} belongs into the settings of each network"):
        Sweep([{"hidden": (4,)}, {"hidden": (5,)}], devices=devices, **{name: value})


def test_a_bad_range_or_data_says_both_values(data):
    with pytest.raises(ValueError, match=r"0 < LOW <= HIGH, got 1:0\.1"):
        spread(1, 0.1, 4)
    with pytest.raises(ValueError, match="take 10 features, but data has 9"):
        Sweep((10, 4), 2, device="cpu").fit(data)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_targets_without_columns(reduction, device):
    """Targets (N,) are ranked by test loss, too. A Trainer alone has a replica's losses."""
    x = torch.randn(60, 6)
    y = x[:, 0] - x[:, 1]
    loss = mlp.MeanSquaredError(reduction)
    job = Sweep((6, 1), 3, lr=[1e-4, 0.01, 1e30], loss=loss, device=device)
    rows = job.fit((x, y.double()), 5, 16, evaluate=(x[:20], y[:20]))
    assert [row.replica for row in rows] == [1, 0, 2]
    assert rows[0].test_accuracy is None and rows[0].test_loss < rows[1].test_loss
    model = mlp.MLP((6, 1), device=device)
    mlp.initialise(dict(model.named_parameters()), seed=1)
    alone = mlp.Trainer(model, loss, lambda p: mlp.SGD(p, lr=0.01), verbose=False)
    last = alone.fit((x, y), 5, 16, evaluate=(x[:20], y[:20]), seed=1)[-1]
    assert rows[0].train_loss == pytest.approx(last["train_loss"], rel=1e-4)
    assert rows[0].test_loss == pytest.approx(last["test_loss"], rel=1e-4)
    for measure in (job.accuracies, job.ensemble_accuracy):
        with pytest.raises(ValueError, match="accuracy is of labels, but data has numbers"):
            measure((x, y))
