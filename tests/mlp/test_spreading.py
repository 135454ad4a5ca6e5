"""Networks spread over several devices give the rows and numbers of one device."""

import dataclasses
import json

import pytest
import torch

import mlp
from mlp import spreading
from mlp.__main__ import main
from mlp.cli import setup

NETWORKS = [
    {"hidden": (6,), "lr": 0.5, "seed": 1},
    {"hidden": 5, "optimizer": "adam", "activation": "tanh", "seed": 2},
    {"hidden": (6,), "lr": 0.01, "momentum": 0.9, "schedule": "cosine", "seed": 3},
    {"hidden": (6,), "lr": 1e38, "momentum": 0.9, "seed": 4},
    {"hidden": (4, 4), "lr": 0.3, "batch_size": 20},
]


def data(seed=0, rows=60):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 7, generator=generator)
    return mlp.Dataset(x, (x[:, 0] * x[:, 1] > 0).long(), ("no", "yes"))


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        a, b = dataclasses.asdict(a), dataclasses.asdict(b)
        for key, value in a.items():
            is_number = isinstance(value, float)
            assert value == (pytest.approx(b[key], rel=1e-5, nan_ok=True) if is_number else b[key])


def weights(sweep):
    networks = [sweep.network(i) for i in range(sweep.replicas)]
    return [p for network in networks for p in network.parameters()]


@pytest.mark.parametrize("devices", [1, 2, 9])
def test_settings_on_several_devices(devices):
    train, test = data(), data(1)
    one, several = (
        mlp.Sweep(NETWORKS, **where)
        for where in ({"device": "cpu"}, {"devices": ["cpu"] * devices})
    )
    told: list[int] = []
    options = {"evaluate": test, "early_stopping": 2}
    rows = several.fit(train, 6, on_progress=told.append, **options)
    same(rows, one.fit(train, 6, **options))
    assert len(several.shares) == min(devices, len(NETWORKS)) and sum(told) == 6 * len(NETWORKS)
    assert rows[-1].replica == 3 and rows[-1].diverged
    for ours, theirs in zip(weights(several), weights(one), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    assert several.ensemble_accuracy(test) == one.ensemble_accuracy(test)


def test_replicas_on_several_devices():
    train, lists = data(), {"lr": [0.1, 0.2, 0.3, 0.4, 0.5], "momentum": [0.0, 0.9, 0, 0.9, 0]}
    losses = {}
    for name, where in (("one", {"device": "cpu"}), ("two", {"devices": ["cpu", "cpu"]})):
        told = losses[name] = []
        sweep = mlp.Sweep([7, 6, 2], 5, **lists, activation="tanh", **where)
        rows = sweep.fit(train, 2, 16, on_epoch=lambda e, values, to=told: to.append((e, values)))
        losses[f"{name} rows"], losses[f"{name} weights"] = rows, weights(sweep)
    same(losses["two rows"], losses["one rows"])
    assert [row.seed for row in losses["two rows"]] == [row.replica for row in losses["two rows"]]
    for (epoch, ours), (other, theirs) in zip(losses["two"], losses["one"], strict=True):
        assert epoch == other
        torch.testing.assert_close(ours, theirs)
    for ours, theirs in zip(losses["two weights"], losses["one weights"], strict=True):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match="lr must be one number, or one for each of 3 replicas"):
        mlp.Sweep([7, 2], 3, lr=[0.1, 0.2], devices=["cpu", "cpu"])


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_search_takes_devices_in_turn(monkeypatch):
    """Each fit takes the next device, with the scores of one device. A named device stays."""
    pytest.importorskip("sklearn")
    x, y = data().inputs.numpy(), data().targets.numpy()
    taken, next_device = [], spreading.next_device
    monkeypatch.setattr(spreading, "next_device", lambda: taken.append(next_device()) or taken[-1])
    grid, options = {"learning_rate_init": [0.001, 0.1]}, {"cv": 2, "n_jobs": 2}
    network = mlp.MLPClassifier((3,), max_iter=3, random_state=0, engine="manual")
    several = mlp.SearchCV(network, grid, devices=["cpu", "cpu:0"], **options).fit(x, y)
    assert sorted(taken) == ["cpu", "cpu", "cpu", "cpu:0", "cpu:0"]  # 2 · 2 fits, and the best
    one = mlp.SearchCV(network.set_params(device="cpu"), grid, **options).fit(x, y)
    assert len(taken) == 5 and spreading.next_device() is None
    assert several.best_params_ == one.best_params_
    assert list(several.cv_results_["mean_test_score"]) == list(one.cv_results_["mean_test_score"])


def test_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ["sweep", "digits", "--hidden", "8", "--replicas", "3", "--epochs", "2"]
    rows = {}
    for name, more in (("one", []), ("two", ["--devices", "2"])):
        assert main([*words, "--device", "cpu", *more, "--out", name]) == 0
        with open(f"{name}/sweep.jsonl") as file:
            rows[name] = [json.loads(line) for line in file]
        assert ("; 2 devices\n" in capsys.readouterr().out) == (name == "two")
    assert [row["lr"] for row in rows["two"]] == [row["lr"] for row in rows["one"]]
    for two, one in zip(rows["two"], rows["one"], strict=True):
        assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert len(list((tmp_path / "two").glob("*.safetensors"))) == 3


def test_devices_that_are_not_there(monkeypatch):
    assert setup.pick_devices("cpu", None) is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert setup.pick_devices("auto", 2) == ["cuda:0", "cuda:1"]
    for name, count, said in (
        ("auto", 3, "--devices 3: this machine has 2 CUDA devices"),
        ("cuda:1", 2, "--device cuda:1 is one device; give one of the two"),
    ):
        with pytest.raises(ValueError, match=said):
            setup.pick_devices(name, count)
