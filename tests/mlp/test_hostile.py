"""A few rounds of `tests.hostile` (hostile files) and of `tests.kills` (killed trainings)."""

import sys

from tests import hostile, run_command, uninterpreted


def test_hostile_files():
    """No internal exception reaches a user. One line names the file that is refused."""
    tried, faults = hostile.check(30, quick=True)
    assert (tried, faults) == (30, [])


def test_kills():
    """Two trainings are killed and resumed. Their losses equal those of one that ran through.

    They run in a process of their own, because a process with threads cannot fork safely.
    """
    environment = {**uninterpreted(), "OMP_NUM_THREADS": "1"}
    done = run_command([sys.executable, "-m", "tests.kills", "2"], env=environment)
    assert done.returncode == 0 and '"rounds": 2' in done.stdout, done.stderr[-3000:]
