"""Triton's own launcher, on a stub of the CUDA driver, accepts all our launches."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests import ROOT

# An H100's 32-bit registers and bytes of shared memory of a multiprocessor, and their number.
REGISTERS, SHARED, PROCESSORS = 65_536, 232_448, 132


NEEDS_COMPILER = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="needs a C compiler: apt install gcc"
)


def said(module, *options):
    """Runs a module of this folder with the stub as the only device. Returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", f"tests.proof.{module}", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
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
def test_no_launch_is_refused(options):
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
def test_what_a_launch_costs_is_printed():
    _, *lines = said("timing").splitlines()
    costs = {line[:24].strip(): float(line[24:31]) for line in lines}
    assert list(costs)[:3] == ["kernels.linear_fwd", "its launch.run", "Triton's part"]
    assert all(cost > 0 for cost in costs.values())
