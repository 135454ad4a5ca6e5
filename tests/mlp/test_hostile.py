"""Hostile files and kills: a few rounds of `tests.hostile` and of `tests.kills`."""

import os
import subprocess
import sys

from tests import ROOT, hostile


def test_hostile_files():
    """No internal exception reaches a user, and a refused file is named in one line."""
    tried, faults = hostile.check(30, quick=True)
    assert (tried, faults) == (30, [])


def test_kills():
    """Two trainings, killed and resumed: the losses are those of one that nobody killed. In a
    process of its own, which has no other thread and can fork.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.kills", "2"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and '"rounds": 2' in done.stdout, done.stderr[-3000:]
