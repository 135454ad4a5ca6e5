"""Kills a training at random moments and resumes it: `python -m tests.kills [COUNT]`.

Each round starts `handgrad train` in a process of its own, sends it SIGKILL after a random time,
checks the run folder, and goes on with --resume in this process. A round passes if every file is
readable, last.ckpt holds every epoch of metrics.jsonl, and the finished training has the losses of
one that ran through.
"""

import contextlib
import io
import json
import multiprocessing
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from mlp import runs
from mlp.__main__ import main
from mlp.runs import RunFolder, load
from mlp.runs.disk import LOCK

EPOCHS = 30
ARGUMENTS = (
    *("digits", "--hidden", "8", "--device", "cpu", "--engine", "manual", "--batch-size", "256"),
    *("--optimizer", "adam", "--epochs", str(EPOCHS)),
)


def train(*arguments: str) -> None:
    """Runs `handgrad train` in this process, without output."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        status = main(["train", *arguments])
    assert status == 0, err.getvalue()


def losses(run: Path) -> list[float]:
    """The training loss of every epoch."""
    return [row["train_loss"] for row in RunFolder(run).history]


def _child(run: Path) -> None:
    """Trains, with a checkpoint after every epoch."""
    runs._EVERY = 0.0
    train(*ARGUMENTS, "--out", str(run))


def killed(run: Path, after: float) -> bool:
    """Trains into `run` and kills the process `after` seconds from its first write.

    Returns True if it still ran. The process is forked, so that it need not import everything
    again.
    """
    process = multiprocessing.get_context("fork").Process(target=_child, args=(run,))
    process.start()
    while process.is_alive() and not run.exists():
        time.sleep(0.001)
    time.sleep(after)
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def inspect(run: Path) -> int:
    """Checks the run folder after a kill. Returns the number of epochs in the checkpoint."""
    folder = RunFolder(run)
    if not folder.trained:
        return 0
    _ = folder.settings
    state, path, note = folder._state()
    assert note is None, note
    rows, kept = folder.history, state.trainer["history"]
    assert rows == kept[: len(rows)], f"{path} does not hold the epochs of {runs.METRICS}"
    assert len(kept) - len(rows) <= 1
    load(run)
    return len(kept)


def survive(count: int, seed: int = 0) -> tuple[int, list[int]]:
    """(number of rounds killed while they trained, finished epochs of each round).

    Raises AssertionError with what was lost.
    """
    generator, survived, epochs = random.Random(seed), 0, []
    with tempfile.TemporaryDirectory() as folder:
        straight = Path(folder, "straight")
        _child(straight)
        started = time.perf_counter()
        _child(Path(folder, "again"))
        seconds = time.perf_counter() - started
        for number in range(count):
            run = Path(folder, str(number))
            was_running = killed(run, generator.uniform(0, seconds))
            epochs.append(inspect(run))
            if (run / runs.CONFIG).exists():
                train("--out", str(run), "--resume")
            else:  # it was killed before it wrote its settings, so it starts again
                train(*ARGUMENTS, "--out", str(run))
            assert losses(run) == losses(straight), f"round {number}: other losses"
            left = [path.name for path in run.iterdir() if path.name.startswith(".")]
            assert left == [LOCK], f"round {number} left {left}"
            survived += was_running
        print(
            json.dumps({"killed": survived, "rounds": count, "epochs": epochs})
            + f" in {time.perf_counter() - started:.0f} s"
        )
    return survived, epochs


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process with several threads cannot be forked safely
    survive(int(sys.argv[1]) if sys.argv[1:] else 50)
