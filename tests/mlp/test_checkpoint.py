"""checkpoint: what is saved loads again, what cannot be loaded changes nothing, and writing is all
or nothing.
"""

import copy
import os

import pytest
import safetensors.torch
import torch
from torch import nn

import mlp
from mlp import MLP, ConvNet, Net
from mlp.checkpoint import CheckpointError, RunFolder
from tests.checks import assert_equal

SIZES = (6, 5, 3)
MODELS = {
    "MLP": lambda: MLP(SIZES, "gelu", "sigmoid", bias=False),
    "bfloat16": lambda: MLP(SIZES, dtype=torch.bfloat16),
    "ConvNet": lambda: ConvNet((1, 8, 8), (2, 3), 3, 1, (6,), 5),
    "Net": lambda: Net(SIZES, "silu"),
}


def values(model):
    return list(mlp.engines.parameters_of(model).values())


@pytest.mark.parametrize("kind", MODELS)
def test_round_trip(kind, tmp_path, device):
    """A module with the same description, weights and dtype, sharing nothing; safetensors reads the
    file as well.
    """
    model = MODELS[kind]()
    mlp.save(model, tmp_path / "w.safetensors")
    loaded = mlp.load(tmp_path / "w.safetensors", device)
    assert loaded.config() == model.config()
    assert_equal(
        [p.detach().cpu() for p in loaded.parameters()], [p.detach() for p in values(model)]
    )
    assert all(p.device.type == device for p in loaded.parameters())
    plain = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert list(plain) == sorted(mlp.engines.parameters_of(model))


def test_plain_state_dict(tmp_path):
    """Of an nn.Sequential of the same shapes, "0.weight" and "2.weight": by order; with the same
    names, by name.
    """
    sequential = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    torch.save(sequential.state_dict(), tmp_path / "sequential.pth")
    named = {name: p + 1 for name, p in reversed(MLP(SIZES).state_dict().items())}
    torch.save(named, tmp_path / "named.pth")
    safetensors.torch.save_file(named, tmp_path / "named.safetensors")
    for file in ("sequential.pth", "named.pth", "named.safetensors"):
        expected = (
            list(reversed(named.values()))
            if "named" in file
            else [p.detach() for p in sequential.parameters()]
        )
        for model in (MLP(SIZES), Net(SIZES)):
            assert mlp.load_weights(model, tmp_path / file) is model
            assert_equal([p.detach() for p in values(model)], expected)
    with pytest.raises(
        CheckpointError, match=r"no description of the network; use load_weights\(model, path\)"
    ):
        mlp.load(tmp_path / "named.safetensors")


def damaged(path, keep):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


def test_files_that_are_none(tmp_path):
    """Empty, cut, of another kind, of another network: one line that names the file, and the model
    as it was.
    """
    model = MLP(SIZES)
    before = copy.deepcopy(model.state_dict())
    files = {}
    for name in ("empty", "cut", "other", "nested", "pickled", "shapes", "count"):
        files[name] = tmp_path / f"{name}.pth"
        torch.save(MLP(SIZES).state_dict(), files[name])
    files["gone"] = tmp_path / "gone.pth"
    damaged(files["empty"], 0)
    damaged(files["cut"], 0.5)
    files["other"].write_text("not that at all " * 20)
    torch.save({"model": model.state_dict()}, files["nested"])
    torch.save(model, files["pickled"])
    torch.save(MLP((6, 5, 4)).state_dict(), files["shapes"])
    torch.save(MLP((6, 5, 3, 3)).state_dict(), files["count"])
    for name, keep in (("empty", 0), ("cut", 0.5)):
        files[f"{name} safetensors"] = tmp_path / f"{name}.safetensors"
        mlp.save(model, files[f"{name} safetensors"])
        damaged(files[f"{name} safetensors"], keep)
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            mlp.load(files[f"{name} safetensors"])
    other = r"another network: has .*needs .*\(3, 5\)"
    messages = {
        "gone": "no such checkpoint",
        "nested": "plain state_dict",
        "shapes": other,
        "count": other,
    }
    for name, path in files.items():
        with pytest.raises(
            CheckpointError, match=f"{path}: .*{messages.get(name, 'not readable as weights')}"
        ) as error:
            mlp.load_weights(model, path)
        assert "\n" not in str(error.value) and "\x1b" not in str(error.value), name
        assert_equal(list(model.state_dict().values()), list(before.values()))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        mlp.load(tmp_path / "gone")


def test_failed_writing_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    mlp.save(MLP(SIZES), path)
    content = path.read_bytes()

    def fail(tensors, part, metadata):
        part.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        mlp.save(MLP(SIZES), path)
    assert path.read_bytes() == content and os.listdir(tmp_path) == ["w.safetensors"]


def test_run_folder(tmp_path, monkeypatch):
    """Made once; a second run needs `force`, which clears the first; what is no run folder is said
    to be none.
    """
    run = RunFolder.create(tmp_path / "a" / "b")
    run.config = {"seed": 1}
    assert RunFolder(tmp_path / "a" / "b").config == {"seed": 1}
    with pytest.raises(
        FileExistsError, match="already holds a run; choose another --out, --resume it, or --force"
    ):
        RunFolder.create(tmp_path / "a" / "b")
    (run.path / "notes.txt").write_text("mine")
    RunFolder.create(tmp_path / "a" / "b", force=True)
    assert os.listdir(run.path) == ["notes.txt"], "only a run's own files may go"
    with pytest.raises(CheckpointError, match=r"b is not a run folder: it has no config.json"):
        _ = run.config
    (run.path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json: not JSON"):
        _ = run.config
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match=r"cannot write the run folder .*/file/run"):
        RunFolder.create(tmp_path / "file" / "run")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="permission denied"):
        RunFolder.create(tmp_path / "c")


def test_resume_needs_a_good_checkpoint(tmp_path):
    run, trainer = RunFolder.create(tmp_path), mlp.Trainer(MLP(SIZES), verbose=False)
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    trainer.fit((x, y), 1, 4, on_epoch=lambda row: run.record(trainer))
    again = mlp.Trainer(MLP(SIZES), verbose=False)
    run.resume(again)
    assert_equal(values(again.model), values(trainer.model))
    assert again.history == trainer.history == run.history
    lines = (tmp_path / "metrics.jsonl").read_text()
    for keep in (0.5, 0):
        damaged(tmp_path / "last.ckpt", keep)
        with pytest.raises(CheckpointError, match=r"last.ckpt: not readable"):
            run.resume(again)
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be resumed: it has no last.ckpt"):
        run.resume(again)
    assert (tmp_path / "metrics.jsonl").read_text() == lines
