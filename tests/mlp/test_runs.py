"""Run folders: one writer, whole files, checkpoints that show damage, and which runs may start
again.
"""

import errno
import json
import os
import stat
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import mlp
from mlp import MLP, runs
from mlp.recipes import RECIPES
from mlp.runs import RunFolder, Settings, report
from mlp.runs.disk import LOCK, WRITER, BusyError, CheckpointError, locked, replacing
from tests import ROOT
from tests.checks import assert_equal

SIZES = (6, 5, 3)
SETTINGS = Settings("digits", RECIPES["default"], "default", seed=1)
FILES = {LOCK, "config.json", "metrics.jsonl", "model.safetensors", "last.ckpt", "previous.ckpt"}


def values(model):
    return list(mlp.engines.parameters_of(model).values())


@pytest.fixture
def every_epoch(monkeypatch):
    """Writes a checkpoint after every epoch. By default epochs within a second share one write."""
    monkeypatch.setattr(runs, "_EVERY", 0.0)


def trained(folder, epochs=3, optimizer=mlp.Adam):
    """A run of a tiny network, and its trainer."""
    trainer = mlp.Trainer(MLP(SIZES), optimizer=optimizer, engine="manual", verbose=False)
    x, y = torch.randn(9, 6), torch.arange(9) % 3
    with RunFolder.writing(folder) as run:
        run.begin(SETTINGS)
        trainer.fit((x, y), epochs, 4, on_epoch=lambda row: run.record(trainer, epochs))
        run.flush()
    return run, trainer


def fresh():
    return mlp.Trainer(MLP(SIZES), optimizer=mlp.Adam, engine="manual", verbose=False)


def test_a_run(tmp_path, every_epoch):
    """After an epoch all files are there. A second run needs `force`, which removes all files of
    the first run and no others.
    """
    run, trainer = trained(tmp_path / "a" / "b")
    assert set(os.listdir(run.path)) == FILES
    assert run.settings == SETTINGS and run.history == trainer.history
    assert_equal(values(mlp.load(run.path)), values(trainer.model))
    with (
        pytest.raises(
            FileExistsError,
            match="already holds a run; choose another --out, --resume it, or --force",
        ),
        RunFolder.writing(run.path) as again,
    ):
        again.begin(SETTINGS)
    assert set(os.listdir(run.path)) == FILES
    for name in ("notes.txt", *report.PICTURES):
        (run.path / name).write_text("mine")
    with RunFolder.writing(run.path) as again:
        again.begin(SETTINGS, force=True)
    assert set(os.listdir(run.path)) == {LOCK, "notes.txt", "config.json"}


def test_a_run_without_an_epoch_may_begin_again(tmp_path):
    for seed in (1, 2):
        with RunFolder.writing(tmp_path) as run:
            run.begin(Settings("digits", RECIPES["default"], "default", seed=seed))
        assert run.settings.seed == seed and not run.trained
    with pytest.raises(CheckpointError, match="no such checkpoint; the run finished no epoch"):
        mlp.load(tmp_path)
    (tmp_path / "config.json").write_text('{"compilerOptions": {}}')
    with (
        pytest.raises(FileExistsError, match=r"holds a config.json that is not a run's"),
        RunFolder.writing(tmp_path) as run,
    ):
        run.begin(SETTINGS)
    assert json.loads((tmp_path / "config.json").read_text()) == {"compilerOptions": {}}


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(PermissionError, match=r"cannot write the run folder .*/file/run"),
        RunFolder.writing(tmp_path / "file" / "run"),
    ):
        pass
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="permission denied"), RunFolder.writing(tmp_path):
        pass


def test_one_writer(tmp_path):
    """The error names the process that writes. Its lock is free as soon as it is killed."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mlp.runs.disk import locked\n"
        "with locked(Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    sys.stdin.read()\n"  # until it is killed
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout.readline() == "locked\n"
        message = f"{tmp_path}: process {holder.pid} on .* is writing this run"
        with pytest.raises(BusyError, match=message), RunFolder.writing(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
        holder.stdin.close()
        holder.stdout.close()
    assert set(os.listdir(tmp_path)) == {LOCK, WRITER}, "a killed process leaves its name"
    busy = pytest.raises(BusyError, match=f"process {os.getpid()} on")
    with locked(tmp_path), busy, locked(tmp_path):
        pass
    assert os.listdir(tmp_path) == [LOCK]


def test_a_disk_without_locks(tmp_path, monkeypatch):
    """It is no other process's lock. A lock file without a lock names no process either."""

    def flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        with pytest.raises(OSError, match=r"cannot be locked \(.*No locks.*choose another --out"):
            locked(tmp_path).__enter__()
    with locked(tmp_path):
        (tmp_path / WRITER).unlink()
        with pytest.raises(BusyError, match="another process is writing"), locked(tmp_path):
            pass


def test_a_shared_folder_is_locked_by_all_who_may_write_to_it(tmp_path):
    """The lock file stays, so its owner's umask must not keep others out."""
    for mode, expected in ((0o777, 0o666), (0o770, 0o660), (0o700, 0o600)):
        folder = tmp_path / oct(mode)
        folder.mkdir()
        folder.chmod(mode)
        with locked(folder):
            pass
        assert stat.S_IMODE((folder / LOCK).stat().st_mode) == expected


def test_leftovers_of_killed_writes_go(tmp_path):
    part = tmp_path / ".model.safetensors.4000000.part"
    part.write_text("half")
    (tmp_path / ".mine.part").write_text("no process wrote it")
    with RunFolder.writing(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [LOCK, ".mine.part", WRITER]
    part.write_text("half")
    mlp.save(MLP(SIZES), tmp_path / "model.safetensors")
    assert sorted(os.listdir(tmp_path)) == [LOCK, ".mine.part", "model.safetensors"]


def test_files_are_on_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    """The order is fsync of the file, rename, fsync of the folder."""
    calls = []
    paths = {}
    opened, fsync, rename = os.open, os.fsync, os.replace

    def record_open(path, *rest):
        descriptor = opened(path, *rest)
        paths[descriptor] = os.path.basename(path)
        return descriptor

    monkeypatch.setattr(os, "open", record_open)
    monkeypatch.setattr(os, "fsync", lambda d: (calls.append(paths[d]), fsync(d)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("rename"), rename(a, b)))
    with replacing(tmp_path / "x") as part:
        part.write_text("content")
    assert calls == [part.name, "rename", tmp_path.name]


def test_quick_epochs_share_a_write(tmp_path, monkeypatch):
    """Epochs within a second share a write. The first and the last epoch are always written."""
    clock = iter((10.0, 10.0, 10.3, 10.6, 11.1, 11.1, 12.0, 12.0))
    monkeypatch.setattr(runs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    written, save = [], torch.save

    def noted(state, part):
        written.append(len(state["trainer"]["history"]))
        save(state, part)

    monkeypatch.setattr(torch, "save", noted)
    run, _ = trained(tmp_path, epochs=5)
    assert written == [1, 4, 5]  # a second after the first, and at the end
    assert set(os.listdir(tmp_path)) == FILES and len(run.history) == 5
    state, _, note = run._state()
    assert len(state.trainer["history"]) == 5 and note is None and run._pending is None


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place // 8 % len(content)] ^= 1 << place % 8
    path.write_bytes(content)


def test_resume(tmp_path, every_epoch):
    run, trainer = trained(tmp_path)
    again = fresh()
    assert run.resume(again) == (3, None)
    assert_equal(values(again.model), values(trainer.model))
    assert again.history == trainer.history == run.history
    for state in again.optimizer.state.values():
        assert float(state["step"]) == 9


def test_every_flipped_bit_is_noticed(tmp_path, every_epoch):
    """Any flipped bit in last.ckpt is noticed. A note names the file, and previous.ckpt is used.
    200 random bits are tried.
    """
    run, _ = trained(tmp_path)
    path = tmp_path / "last.ckpt"
    content, generator = path.read_bytes(), torch.Generator().manual_seed(0)
    for place in torch.randint(len(content) * 8, (200,), generator=generator).tolist():
        path.write_bytes(content)
        flip(path, place)
        state, source, note = run._state()
        assert len(state.trainer["history"]) == 2 and source == tmp_path / "previous.ckpt"
        assert note == (
            f"{path}: damaged, its content does not match its checksum; going on after epoch 2, "
            f"from {source}"
        )
    again = fresh()
    assert run.resume(again) == (3, note) and len(again.history) == len(run.history) == 2
    flip(tmp_path / "previous.ckpt", 12345)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match=r"last.ckpt: damaged.*previous.ckpt: damaged"):
        run.resume(fresh())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_damaged_weights_are_taken_from_the_checkpoint(tmp_path, every_epoch):
    _, trainer = trained(tmp_path)
    for damage in (lambda p: flip(p, 20000), lambda p: p.write_bytes(b""), lambda p: p.unlink()):
        damage(tmp_path / "model.safetensors")
        message = r"model.safetensors: .*; the weights are those of epoch 3 in .*last.ckpt"
        with pytest.warns(UserWarning, match=message):
            model = mlp.load(tmp_path)
        assert_equal(values(model), values(trainer.model))
    flip(tmp_path / "last.ckpt", 20000)
    flip(tmp_path / "previous.ckpt", 20000)
    with pytest.raises(CheckpointError, match=r"no such checkpoint; .*last.ckpt: damaged"):
        mlp.load(tmp_path)


def test_torch_reads_a_sealed_checkpoint(tmp_path):
    """The checksum is in the archive's comment, where zip allows any text. So torch can still read
    the file.
    """
    trained(tmp_path)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert len(state["trainer"]["history"]) == 3


def test_steps_of_adam_stay_on_the_cpu(tmp_path):
    """Adam's counts of steps stay on the CPU, as torch keeps them. Moments go to the parameters'
    device.
    """
    run, trainer = trained(tmp_path)
    state = run._state()[0].trainer["optimizer"]
    tensors = [t for s in state["state"].values() for t in s.values()]
    assert {t.device.type for t in tensors} == {"cpu"} and len(tensors) == 12
    parameters = [torch.empty(p.shape, device="meta") for p in values(trainer.model)]
    for kind in (mlp.Adam, mlp.AdamW, torch.optim.Adam):
        optimizer = kind(parameters)
        optimizer.load_state_dict(state)
        for s in optimizer.state.values():
            assert s["step"].device.type == "cpu" and s["exp_avg"].device.type == "meta"


HISTORIES = ("abc", {}, None, [None], [{}], [{"epoch": "1", "train_loss": 1.0}], [{"epoch": 2}])


@pytest.mark.parametrize("history", HISTORIES)
def test_states_of_the_wrong_kind(history, tmp_path, every_epoch):
    """A wrong state is refused with the file's name. Trainer and folder stay unchanged."""
    run, trainer = trained(tmp_path, epochs=1)
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state["trainer"]["history"] = history
    sealed(state, tmp_path / "last.ckpt")
    again = fresh()
    before = [p.detach().clone() for p in values(again.model)]
    with pytest.raises(CheckpointError, match=r"last.ckpt: history"):
        run.resume(again)
    assert_equal([p.detach() for p in values(again.model)], before)
    assert run.history == trainer.history


def sealed(state, path):
    torch.save(state, path)
    mlp.runs.disk.seal_zip(path)


def test_states_of_another_network(tmp_path):
    run, _ = trained(tmp_path, epochs=1)
    other = mlp.Trainer(MLP((6, 4, 3)), optimizer=mlp.Adam, verbose=False)
    with pytest.raises(CheckpointError, match=r"last.ckpt: not the state of this run: .*\(5, 6\)"):
        run.resume(other)
    (tmp_path / "last.ckpt").unlink()
    with pytest.raises(CheckpointError, match=r"cannot be resumed: it has no last.ckpt"):
        run.resume(fresh())


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not JSON"),
        ("[]", "must be an object with named fields"),
        ("{}", "lacks the field dataset"),
        ('{"dataset": "x", "extra": 1}', "unknown field 'extra'"),
        ("[" * 10**5, "not JSON"),
        ("\x00\xff", "not JSON"),
    ],
)
def test_configs_of_the_wrong_kind(text, message, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=rf"config.json.*{message}"):
        _ = RunFolder(tmp_path).settings


def test_fields_of_a_config_are_checked(tmp_path):
    """A field of a wrong type is refused. The error names file and field."""
    with RunFolder.writing(tmp_path) as run:
        run.begin(SETTINGS)
    good = json.loads((tmp_path / "config.json").read_text())
    recipe = good["recipe"]
    for name, wrong in (
        *(("seed", w) for w in ("1", 1.5, None, [], -1, 10**30, True)),
        *(("recipe", {**recipe, **w}) for w in ({"hidden": "100"}, {"hidden": [1.5]})),
        *(("recipe", {**recipe, **w}) for w in ({"epochs": None}, {"normalize": [1.0]})),
        *(("recipe", {**recipe, **w}) for w in ({"bias": 1}, {"about": 1}, {"more": 1})),
        ("recipe", None),
        ("versions", {"torch": 2}),
        ("data", {"classes": "ab"}),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**good, name: wrong}))
        with pytest.raises(CheckpointError, match=rf"config.json.*{name}"):
            _ = run.settings
