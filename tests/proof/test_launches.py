"""Triton's own launcher, on a stub of the CUDA driver, accepts all our launches."""

import functools
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import PATIENCE, run_command

# An H100's 32-bit registers and bytes of shared memory of a multiprocessor, and their number.
REGISTERS, SHARED, PROCESSORS = 65_536, 232_448, 132


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler: apt install gcc"
)


@pytest.fixture
def said(tmp_path):
    """A function that runs a module of this folder and returns its output. The stub is the device.

    The machine has another driver, as one with a GPU has. It is an empty library, so that a process
    that takes it fails.
    """
    compiler, library = os.environ.get("CC", "cc"), str(tmp_path / "libcuda.so.1")
    (tmp_path / "nothing.c").touch()
    options = ["-shared", "-Wl,-soname,libcuda.so.1", "-o", library, str(tmp_path / "nothing.c")]
    subprocess.run([compiler, *options], check=True)
    return functools.partial(_said, str(tmp_path))


def _said(drivers, module, *options):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    found = [drivers, *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    environment |= {"CUDA_VISIBLE_DEVICES": "", "LD_LIBRARY_PATH": os.pathsep.join(found)}
    command = [sys.executable, "-m", f"tests.proof.{module}", *options]
    done = run_command(command, 4 * PATIENCE if "--full" in options else PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "options",
    [
        pytest.param((), marks=pytest.mark.long(15)),
        pytest.param(("--full",), marks=[pytest.mark.full, pytest.mark.long(90)]),
    ],
    ids=["one case each", "every case"],
)
def test_no_launch_is_refused(options, said):
    seen = json.loads(said("worker", *options))
    assert seen["refused"] == []
    assert seen["launches"] == sum(seen["kernels"].values()) - len(seen["host tensor"])
    assert seen["launches"] >= (300 if options else 25)
    assert seen["encoded"] == seen["descriptors"] > 0
    # Programs that wait for each other must all be resident, at most one a multiprocessor.
    assert {row["kernel"] for row in seen["together"]} == {"exchange_kernel"}
    for row in seen["together"]:
        assert row["registers"] * row["threads"] <= REGISTERS and row["programs"] <= PROCESSORS, row
        assert row["shared"] <= SHARED, row
    # The stub can refuse: it does so for a number in the host's memory.
    assert seen["refused by the driver"] == len(seen["host tensor"])


@pytest.mark.full
@NEEDS_COMPILER
def test_what_a_launch_costs_is_printed(said):
    _, *lines = said("timing").splitlines()
    costs = {line[:24].strip(): float(line[24:31]) for line in lines}
    assert list(costs)[:3] == ["kernels.linear_fwd", "its launch.run", "Triton's part"]
    assert all(cost > 0 for cost in costs.values())
