"""The tests and their shared helpers."""

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent  # of the repository
# Seconds after which a test that waits for a thread or a process counts as hanging. It guards
# against hanging only: on a busy machine, every wait may take minutes.
PATIENCE = 300.0


def uninterpreted() -> dict[str, str]:
    """The environment of a process that trains. It leaves out what conftest.py sets for kernels on
    a CPU: in the interpreter, a training takes a hundred times as long.
    """
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def run_command(
    command: Sequence[str], patience: float = PATIENCE, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command and returns its status and what it printed, as `subprocess.run` does.

    After `patience` seconds, the command and all that it started are killed. The test then fails
    with the stacks of their Python threads.
    options: of `subprocess.Popen`. Unless they say otherwise, the folder is the repository's root.
    """
    environment = {**options.pop("env", os.environ), "PYTHONFAULTHANDLER": "1"}
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    process = subprocess.Popen(
        command, text=True, env=environment, start_new_session=True, **options
    )
    with process:
        try:
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            end(process, signal.SIGABRT)  # Python prints the stacks of its threads
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=5)
            end(process)
            _, err = process.communicate()
            raise AssertionError(f"after {patience:.0f} s, {command} still ran:\n{err}") from None
        except BaseException:
            end(process)
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Sends a signal to a process and to all that it started. It has a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
