"""The suite starts where only torch, triton, numpy and pytest are installed."""

import sys

import pytest

from tests import PATIENCE, run_command


@pytest.mark.full
def test_every_file_is_collected_or_left_out():
    command = [sys.executable, "-m", "tests.bare", "--collect-only", "-q"]
    done = run_command(command, 4 * PATIENCE)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for package in ("hypothesis", "safetensors", "scikit-learn", "torchvision", "typer"):
        assert f"To run: pip install {package}" in done.stdout
