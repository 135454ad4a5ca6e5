"""The tests and their shared helpers."""

import os
from pathlib import Path

ROOT = Path(__file__).parent.parent  # of the repository
# Seconds after which a test that waits for a thread or a process counts as hanging. It guards
# against hanging only: on a busy machine, every wait may take minutes.
PATIENCE = 900


def uninterpreted() -> dict[str, str]:
    """The environment of a process that trains. It leaves out what conftest.py sets for kernels on
    a CPU: in the interpreter, a training takes a hundred times as long.
    """
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
