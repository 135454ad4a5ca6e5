"""Two processes on the CPU share a training. Losses are those of one process, and the death of one
ends both cleanly.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlp import engines
from mlp.__main__ import main
from tests import PATIENCE, ROOT, end, run_command, uninterpreted

# The batch of 33 and the last one of 19 are odd, so the two processes' parts differ in size.
RULES = ("--hidden", "8", "--batch-size", "33", "--device", "cpu", "--clip-norm", "1")


def rows(run):
    return [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]


def rank_of(process):
    """The variable RANK in a process's environment, or "" if it has none."""
    words = Path(f"/proc/{process}/environ").read_bytes().decode().split("\0")
    return next((word.removeprefix("RANK=") for word in words if word.startswith("RANK=")), "")


@contextlib.contextmanager
def two_that_train():
    """`handgrad train --devices 2 --out two`, after its first epoch. Gives the process."""
    words = ["train", "digits", *RULES, "--devices", "2", "--epochs", "100000", "--out", "two"]
    environment = {**uninterpreted(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(
        [sys.executable, "-m", "mlp", *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE
    try:
        while not Path("two/metrics.jsonl").exists():
            assert parent.poll() is None, parent.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield parent
    finally:
        end(parent)
        parent.wait()


def test_two_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with two_that_train() as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
        (second,) = [int(child) for child in children if rank_of(child) == "1"]
        os.kill(second, signal.SIGKILL)
        _, err = parent.communicate(timeout=PATIENCE)
    assert parent.returncode == 2
    assert "process 1 of 2 ended with status -9, so the training ended" in err
    count = len(rows("two"))
    alone = ["--epochs", "2", "--engine", "autograd", "--out", "one"]
    assert main(["train", "digits", *RULES, *alone]) == 0
    for two, one in zip(rows("two"), rows("one")):
        for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)
    assert main(["train", "--out", "two", "--resume", "--epochs", str(count + 1)]) == 0
    assert len(rows("two")) == count + 1
    assert "epoch" in capsys.readouterr().out


def test_they_end_with_a_parent_that_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with two_that_train() as parent:
        parent.kill()
        # Both have the parent's stderr, which ends when they do.
        parent.communicate(timeout=PATIENCE)
    assert parent.returncode == -signal.SIGKILL


# If the group is alive after the context, its threads are, too, and may abort the process.
LEFT = """
import weakref, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from mlp.cli import devices

class Kept:
    def __init__(self):  # the cycle holds the model after an error, and without one
        self.model, self.itself = DistributedDataParallel(torch.nn.Linear(2, 2)), self

def train(fails):
    kept = Kept()
    dist.all_reduce(torch.ones(1))
    if fails:
        raise ValueError("failed")

for fails in (False, True):
    try:
        with devices.joined():
            group = weakref.ref(dist.group.WORLD)
            train(fails)
    except ValueError as error:
        assert fails and group() is None
    assert group() is None
print("no group is left")
"""


def test_the_group_ends_with_its_context():
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run_command([sys.executable, "-c", LEFT], env={**uninterpreted(), **alone})
    assert (done.returncode, done.stdout) == (0, "no group is left\n"), done.stderr[-3000:]


def torchrun(folder, *words):
    """Runs two processes on this machine and returns what they printed."""
    started = ["torch.distributed.run", "--nproc-per-node=2", "--standalone", *words]
    environment = {**uninterpreted(), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = run_command([sys.executable, "-m", *started], cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_torchrun_goes_on_with_a_run(tmp_path, monkeypatch):
    """An epoch on one device, then one on two by torchrun, equal two epochs on one device."""
    monkeypatch.chdir(tmp_path)
    words = ["train", "digits", *RULES, "--schedule", "step", "--early-stopping", "9"]
    for run in ("one", "two"):
        assert main([*words, "--epochs", "1", "--engine", "autograd", "--out", run]) == 0
    again = ["train", "--resume", "--epochs", "2", "--out"]
    said = torchrun(tmp_path, "-m", "mlp", *again, "two")
    assert said.count("epoch   2  loss") == 1 and "run folder two" in said  # one process speaks
    assert main([*again, "one"]) == 0
    for two, one in zip(rows("two"), rows("one"), strict=True):
        for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
            assert two[key] == pytest.approx(one[key], rel=1e-5)


# It ends by os._exit after a barrier. torch's sharding keeps the process group for ever, and the
# group's threads abort an interpreter that ends while they hold a tensor, once in some twenty runs
# ("terminate called without an active exception").
SHARDED = """
import copy, os, torch, torch.distributed as dist, mlp
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
rank, g = dist.get_rank(), torch.Generator().manual_seed(1)
for make in (lambda p: mlp.SGD(p, 0.1, momentum=0.9), lambda p: mlp.Adam(p, 0.01)):
    torch.manual_seed(0)
    model = mlp.MLP([6, 8, 8, 3])
    twin = copy.deepcopy(model)
    optimizers = make(fully_shard(model).parameters()), make(twin.parameters())
    for step in range(3):
        x = torch.randn(16, 6, generator=g)
        y = x[:, :3].argmax(1)
        for one, rows, optimizer in zip((model, twin), (x[rank::2], x), optimizers):
            optimizer.zero_grad()
            mlp.CrossEntropyLoss()(one(rows), y[rank::2] if one is model else y).backward()
            optimizer.step()
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p.full_tensor(), q)
dist.barrier()
print(f"rank {rank} agrees", flush=True)
os._exit(0)
"""


def test_fully_sharded(tmp_path):
    """FSDP2 of our modules, started by torchrun, trains as one process does."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    said = torchrun(tmp_path, "sharded.py")
    assert "rank 0 agrees" in said and "rank 1 agrees" in said


@pytest.mark.parametrize("name", [name for name in engines.ENGINES if name != "autograd"])
def test_other_engines_refuse(name):
    reason = engines.ENGINES[name].cannot(engines.Demands(world=2))
    assert reason == f"{name}: trains on one device, got 2; use engine 'autograd'"
    assert engines.ENGINES["autograd"].cannot(engines.Demands(world=2)) is None
    shared = engines.Demands(world=2, ignored=True)
    assert "the loss ignores some of them" in engines.ENGINES["autograd"].cannot(shared)


def test_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--devices", "2", "--seeds", "2"]) == 2
    assert "leave --devices out" in capsys.readouterr().err
