"""The commands as a user meets them, on digits: what they print, what they write into the run
folder, what --force may do.
"""

import ast
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels.activations import ACTIVATIONS
from mlp import cli
from mlp.cli.versions import version
from mlp.recipes import LOSSES, OPTIMIZERS, RECIPES
from mlp.runs import checkpoint, disk, load

METRICS = [
    "epoch",
    "train_loss",
    "train_accuracy",
    "test_loss",
    "test_accuracy",
    "seconds",
    "samples_per_second",
]
FILES = {
    disk.LOCK,  # stays on Linux
    "config.json",
    "metrics.jsonl",
    "model.safetensors",
    "last.ckpt",
    "previous.ckpt",  # of the epoch before
    "curves.png",
    "times.json",
}
QUICK = ("train", "digits", "--hidden", "16", "--device", "cpu", "--engine", "manual")


@pytest.fixture(autouse=True)
def a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    precision = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(precision)


def contents():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def read_json(path):
    return json.loads(Path(path).read_text())


def test_logs_go_on_with_the_run(handgrad):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = ("--out", "run", "--log", "csv,tensorboard")
    assert handgrad(*QUICK, "--epochs", "2", *logged)[0] == 0
    assert handgrad("train", *logged, "--resume", "--epochs", "3")[0] == 0
    table = np.genfromtxt("run/metrics.csv", delimiter=",", names=True)
    assert table["epoch"].tolist() == [1, 2, 3] and table["lr"].tolist() == [0.05] * 3
    losses = [row["train_loss"] for row in rows("run")]
    assert table["train_loss"].tolist() == losses
    events = EventAccumulator("run/tensorboard")
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert found == [(i, pytest.approx(loss)) for i, loss in enumerate(losses, 1)]
    status, _, err = handgrad(*QUICK, "--log", "wandb")
    assert status == 2 and "unknown log 'wandb'; known: csv, tensorboard" in err


def test_schedules_are_stored_and_refused_past_their_end(handgrad):
    rules = (
        "--schedule",
        "cosine",
        "--warmup",
        "1",
        "--clip-norm",
        "0.5",
        "--weight-decay",
        "0.01",
    )
    whole = (*QUICK, *rules, "--label-smoothing", "0.1", "--early-stopping", "2", "--epochs", "4")
    status, out, err = handgrad(*whole, "--out", "whole")
    assert (status, err) == (0, "") and "cosine after 1 epochs of warm-up" in out
    assert re.search(r"^best test loss [\d.]+ at epoch \d: its weights are kept$", out, re.M)
    recipe = read_json("whole/config.json")["recipe"]
    assert (recipe["schedule"], recipe["warmup"], recipe["clip_norm"]) == ("cosine", 1, 0.5)
    assert recipe["loss_options"] == {"label_smoothing": 0.1}
    assert recipe["optimizer_options"]["weight_decay"] == 0.01
    status, out, err = handgrad("train", "--out", "whole", "--resume", "--epochs", "6")
    assert status == 2 and "schedule cosine of this run ends at epoch 4, got --epochs 6" in err
    status, out, err = handgrad("train", "--out", "whole", "--resume", "--clip-norm", "1")
    assert status == 2 and "--clip-norm cannot be changed by --resume" in err
    status, out, err = handgrad(*QUICK, "--loss", "mse", "--label-smoothing", "0.1")
    assert status == 2 and "--label-smoothing belongs to the loss cross_entropy" in err


def weights(run):
    return list(checkpoint.read_weights(f"{run}/model.safetensors").values())


def rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def test_train_and_evaluate(handgrad, tmp_path):
    """`train` writes every file of the run folder and prints a line for each epoch. `evaluate`
    prints the last epoch's figures.
    """
    status, out, err = handgrad(*QUICK, "--epochs", "3", "--lr", "0.02", "--seed", "5")
    assert (status, err) == (0, "")
    assert set(os.listdir("runs/digits")) == FILES
    assert [list(row) for row in rows("runs/digits")] == [METRICS] * 3
    assert re.findall(r"^epoch +(\d+) ", out, re.M) == ["1", "2", "3"]
    assert re.search(
        r"^digits .*10 classes.*\n.*engine manual.*cpu$", out, re.M
    ) and out.rstrip().endswith("run folder runs/digits")
    config = read_json("runs/digits/config.json")
    assert (config["dataset"], config["seed"], config["recipe"]["hidden"]) == ("digits", 5, [16])
    assert config["recipe"]["optimizer_options"] == {
        **RECIPES["default"].optimizer_options,
        "lr": 0.02,
    }
    assert "torch" in config["versions"]
    last = rows("runs/digits")[-1]
    status, out, err = handgrad("evaluate", "runs/digits")
    assert (status, err) == (0, "")
    assert f"loss {last['test_loss']:.4f}" in out and f"accuracy {last['test_accuracy']:.2%}" in out
    model = load(tmp_path / "runs" / "digits")
    assert model.config()["sizes"] == [64, 16, 10]


def test_default_folders_are_numbered(handgrad):
    for _ in range(3):
        assert handgrad(*QUICK, "--epochs", "1")[0] == 0
    assert sorted(os.listdir("runs")) == ["digits", "digits-2", "digits-3"]
    assert weights("runs/digits")[0].equal(weights("runs/digits-3")[0]), (
        "equal seeds must give equal runs"
    )


def test_never_overwrites_without_force(handgrad):
    assert handgrad(*QUICK, "--epochs", "2", "--out", "mine")[0] == 0
    before = contents()
    status, _, err = handgrad(*QUICK, "--epochs", "1", "--out", "mine")
    assert (
        status == 2
        and "mine already holds a run; choose another --out, --resume it, or --force" in err
    )
    for bad in (
        ["--batch-size", "0"],
        ["--engine", "fast"],
        ["--recipe", "convnet", "--engine", "epoch"],
        ["--lr", "-1"],
    ):
        assert handgrad(*QUICK, "--out", "mine", "--force", *bad)[0] == 2
    assert contents() == before, "--force must not clear a run that nothing will replace"
    assert handgrad(*QUICK, "--epochs", "1", "--out", "mine", "--force", "--seed", "1")[0] == 0
    assert len(rows("mine")) == 1 and set(os.listdir("mine")) == FILES - {"previous.ckpt"}


def test_resume_is_as_if_never_stopped(handgrad):
    assert handgrad(*QUICK, "--epochs", "4", "--out", "straight")[0] == 0
    assert handgrad(*QUICK, "--epochs", "2", "--out", "stopped")[0] == 0
    status, out, _ = handgrad("train", "--resume", "--out", "stopped", "--epochs", "4")
    assert status == 0 and re.findall(r"^epoch +(\d+) ", out, re.M) == ["3", "4"]
    assert all(a.equal(b) for a, b in zip(weights("straight"), weights("stopped"), strict=True))
    assert [row["train_loss"] for row in rows("stopped")] == [
        row["train_loss"] for row in rows("straight")
    ]
    assert read_json("stopped/config.json")["recipe"]["epochs"] == 2, (
        "config.json must keep the first call"
    )
    status, out, _ = handgrad("train", "--resume", "--out", "stopped")
    assert status == 0 and "nothing to do: stopped has 4 epochs" in out


def halve(path):
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "file, argv, message",
    [
        ("last.ckpt", "train --resume --out run --epochs 5", "run/last.ckpt: damaged"),
        ("config.json", "evaluate run", "run/config.json: not JSON"),
        ("config.json", "train --resume --out run --epochs 5", "run/config.json: not JSON"),
    ],
)
def test_a_damaged_run_is_left_alone(file, argv, message, handgrad):
    assert handgrad(*QUICK, "--epochs", "1", "--out", "run")[0] == 0
    halve(f"run/{file}")
    before = contents()
    status, out, err = handgrad(*argv.split())
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1
    assert contents() == before


def test_the_checkpoint_before_a_damaged_one_is_used(handgrad):
    """A note names the damaged file and the one that is used in its place."""
    assert handgrad(*QUICK, "--epochs", "2", "--out", "run")[0] == 0
    _, out, _ = handgrad("evaluate", "run")
    halve("run/model.safetensors")
    status, again, err = handgrad("evaluate", "run")
    assert (status, again) == (0, out) and re.fullmatch(
        r"handgrad: note: run/model.safetensors: damaged, .*; the weights are those of epoch 2 in "
        r"run/last.ckpt\n",
        err,
    )
    halve("run/last.ckpt")
    status, out, err = handgrad("train", "--resume", "--out", "run")
    assert status == 0 and re.findall(r"^epoch +(\d+) ", out, re.M) == ["2"]
    assert re.search("last.ckpt: damaged, .*; going on after epoch 1, from run/previous.ckpt", err)


def test_diverged_keeps_the_last_good_weights(handgrad):
    """A diverged training ends with one line that has epoch, step and learning rate. The files
    written before stay.
    """
    assert handgrad(*QUICK, "--epochs", "1", "--out", "run")[0] == 0
    state = torch.load("run/last.ckpt", weights_only=True)
    state["trainer"]["optimizer"]["param_groups"][0]["lr"] = 1e30
    torch.save(state, "run/last.ckpt")
    disk.seal_zip(Path("run/last.ckpt"))
    before = contents()
    status, _, err = handgrad("train", "--resume", "--out", "run", "--epochs", "3")
    assert status == 2 and err.count("\n") == 1
    assert re.search(
        r"the loss is (nan|inf) at step \d+ of epoch 2 with learning rate 1e\+30; "
        r".* end of epoch 1",
        err,
    )
    assert contents() == before


@pytest.mark.parametrize("precision", ["fp64", "tf32"])
def test_precision(precision, handgrad):
    status, _, err = handgrad(*QUICK, "--epochs", "2", "--precision", precision)
    assert (status, err) == (0, "") and rows("runs/digits")[-1]["test_accuracy"] > 0.5
    stored = {"fp64": torch.float64}.get(precision, torch.float32)
    assert {t.dtype for t in weights("runs/digits")} == {stored}
    assert handgrad("evaluate", "runs/digits")[0] == 0


def test_half_precision_keeps_float32_weights(handgrad):
    """Half precision trains as float32 does, to 5%. With bfloat16 weights these small steps would
    vanish, so this shows that weights stay float32.
    """
    argv = ("train", "digits", "--lr", "0.001", "--device", "cpu", "--epochs")
    found = {}
    for precision, optimizer, epochs in (
        ("fp32", "sgd", 20),
        ("bf16", "sgd", 20),
        ("fp32", "adam", 5),
        ("fp16", "adam", 5),
    ):
        options = (
            "--precision",
            precision,
            "--optimizer",
            optimizer,
            "--out",
            f"{precision}{optimizer}",
        )
        momentum = ("--momentum", "0.9") if optimizer == "sgd" else ()
        status, _, err = handgrad(*argv, epochs, *options, *momentum)
        assert (status, err) == (0, "")
        run = f"{precision}{optimizer}"
        assert {t.dtype for t in weights(run)} == {torch.float32}
        found[run] = rows(run)[-1]
    for half, full in (("bf16sgd", "fp32sgd"), ("fp16adam", "fp32adam")):
        assert found[half]["test_accuracy"] == pytest.approx(found[full]["test_accuracy"], abs=0.05)
        assert found[half]["train_loss"] == pytest.approx(found[full]["train_loss"], rel=0.05)
    assert handgrad("evaluate", "bf16sgd")[0] == 0


def test_recipes_are_listed(handgrad):
    """`recipes` lists each recipe with all its settings, and every name that an option takes."""
    status, out, _ = handgrad("recipes")
    assert status == 0 and re.findall(r"^([a-z][a-z-]*): ", out, re.M) == list(RECIPES)
    block = out[out.index("classifier: ") : out.index("sigmoid: ")]
    assert "optimizer_options lr 0.001, momentum 0.9" in block and "batch_size 4\n" in block
    assert f"--activation: {', '.join(ACTIVATIONS)}\n" in out
    assert "DATASET: digits, mnist, " in out and "arrays, .npz, .npy, .mat; or a folder" in out
    assert f"--loss: {', '.join(LOSSES)}\n--optimizer: {', '.join(OPTIMIZERS)}\n" in out


@pytest.mark.parametrize("argv", [(), ("--help",)])
def test_help_is_printed(argv, handgrad):
    status, out, err = handgrad(*argv)
    assert (status, err) == (0, "") and re.search(r"^  train  +Train a network", out, re.M)


def test_version(handgrad):
    assert handgrad("--version") == (0, f"handgrad {version('handgrad')}\n", "")


def test_the_first_line_describes_what_is_trained(handgrad):
    """It shows the settings in use, not the recipe's description."""
    argv = "train digits --activation tanh --optimizer adam --hidden 7,5 --batch-size 64 --epochs 1"
    status, out, _ = handgrad(*argv.split(), "--device", "cpu", "--engine", "manual")
    assert status == 0 and out.splitlines()[1] == (
        "64-7-5-10 tanh; cross_entropy by adam (lr 0.001); batches of 64; 555 parameters; "
        "engine manual; cpu"
    )


def test_resume_takes_the_same_options(handgrad):
    """--resume takes every option of the first call with the same value, and refuses others."""
    argv = ("--lr", "0.02", "--seed", str(2**63), "--recipe", "default", "--batch-size", "64")
    assert handgrad(*QUICK, *argv, "--epochs", "1", "--out", "run")[0] == 0
    config = read_json("run/config.json")
    assert config["seed"] == 2**63
    status, _, err = handgrad(*QUICK, *argv, "--epochs", "2", "--out", "run", "--resume")
    assert (status, err) == (0, "") and len(rows("run")) == 2
    assert read_json("run/config.json") == config
    status, _, err = handgrad(*QUICK, "--hidden", "17", "--out", "run", "--resume")
    assert status == 2 and "--hidden cannot be changed by --resume" in err and "(16,)" in err
    status, _, err = handgrad("train", "--out", "run", "--resume", "--force")
    assert status == 2 and "give one of the two" in err


def arrays(path, seed=0, shift=0):
    generator = np.random.default_rng(seed)
    x = generator.integers(0, 256, (60, 4), dtype=np.uint8)
    np.savez(path, x_train=x + np.uint8(shift), y_train=np.arange(60) % 3)


def test_data_are_found_from_another_folder_and_recognised(handgrad, tmp_path, monkeypatch):
    arrays("mine.npz")
    argv = ("--hidden", "4", "--device", "cpu", "--engine", "manual")
    assert handgrad("train", "mine.npz", *argv, "--epochs", "1", "--out", "run")[0] == 0
    assert read_json("run/config.json")["dataset"] == str(tmp_path / "mine.npz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    status, _, err = handgrad("train", "--out", "../run", "--resume", "--epochs", "2")
    assert (status, err) == (0, "") and handgrad("evaluate", "../run")[0] == 0
    os.rename("../mine.npz", "moved.npz")
    again = ("train", "moved.npz", "--out", "../run", "--resume", "--epochs", "3")
    assert handgrad(*again)[0] == 0
    for change in ({"seed": 1}, {"shift": 1}):
        arrays("moved.npz", **change)
        before = contents()
        status, out, err = handgrad(*again[:-1], "4")
        assert (status, out) == (2, "") and "data have changed since the run began" in err
        assert contents() == before


def test_a_run_that_diverged_at_once_can_be_started_again(handgrad):
    """It starts again in the same folder, with other options, or by --resume with its own."""
    assert handgrad(*QUICK, "--epochs", "1", "--lr", "1e30", "--out", "run")[0] == 2
    assert set(os.listdir("run")) == {disk.LOCK, "config.json"}
    status, _, err = handgrad("train", "--out", "run", "--resume")
    assert status == 2 and "epoch 1 with learning rate 1e+30" in err
    assert handgrad(*QUICK, "--epochs", "1", "--lr", "0.1", "--out", "run")[0] == 0
    assert len(rows("run")) == 1


def test_control_characters_are_shown_escaped(handgrad):
    """No control character in a file's name, a class's name or an argument reaches the terminal."""
    evil = "a\x1b[2J\rb"
    arrays(f"{evil}.npz")
    argv = ("--hidden", "4", "--device", "cpu", "--engine", "manual", "--epochs", "1")
    status, out, err = handgrad("train", f"{evil}.npz", *argv, "--out", evil)
    assert status == 0
    config = read_json(f"{evil}/config.json")
    config["data"]["classes"][0] = evil
    Path(f"{evil}/config.json").write_text(json.dumps(config))
    said = [out, err]
    for argv in (
        ("evaluate", evil),
        ("train", evil),
        ("train", "--activation", evil),
        ("train", "--recipe", evil, "--device", evil),
        ("train", f"--{evil}"),
        ("report", evil),
        (evil,),
        ("predict", evil, evil),
    ):
        said += handgrad(*argv)[1:]
    assert "\\x1b[2J\\rb" in "".join(said)
    assert not [c for c in "".join(said) if not c.isprintable() and c != "\n"]


def test_all_printing_goes_through_one_function():
    """All commands print by `say`, which escapes. Only the help is printed directly, because it is
    our own text.
    """
    for path in Path(cli.__file__).parent.glob("*.py"):
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printed = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "print"]
        assert path.name == "terminal.py" or set(printed) <= {"print(context.get_help())"}, path


def test_convnet_says_which_images_it_takes(handgrad):
    status, out, err = handgrad("train", "digits", "--recipe", "convnet")
    assert (status, out) == (2, "") and re.search(
        "at least 16 × 16 pixels, but those of digits .* have 8 × 8; train on mnist", err
    )


def test_numbers_are_no_classes(handgrad):
    """Float targets train by squared error. The printed loss is its mean over the test data."""
    generator = np.random.default_rng(0)
    x = generator.normal(size=(200, 3)).astype(np.float32)
    y = (x @ np.array([1.0, -2.0, 0.5]) + 3).astype(np.float32)
    np.savez("line.npz", x_train=x[:150], y_train=y[:150], x_test=x[150:], y_test=y[150:])
    argv = ("line.npz", "--hidden", "8", "--device", "cpu", "--engine", "manual")
    status, out, err = handgrad("train", *argv, "--epochs", "3", "--out", "run")
    assert status == 0 and "a regression with 1 output" in err
    assert "3-8-1 relu; mse by sgd" in out and "accuracy" not in out
    model = load("run")
    with torch.no_grad():
        expected = float(
            (model(torch.from_numpy(x[150:]))[:, 0] - torch.from_numpy(y[150:])).square().mean()
        )
    assert rows("run")[-1]["test_loss"] == pytest.approx(expected, rel=1e-5)
    assert f"loss {expected:.4f}" in handgrad("evaluate", "run")[1]
    status, out, err = handgrad("train", *argv, "--loss", "cross_entropy")
    assert (status, out) == (2, "") and "choose the loss mse for numbers" in err
    status, out, _ = handgrad("sweep", *argv[:-2], "--replicas", "2", "--epochs", "1")
    assert status == 0 and re.search("mse by sgd", out) and "test loss" in out
