"""Programs that share one network and wait for each other.

The interpreter runs the programs of a grid one by one, so the first would wait for ever. Here every
program is an operating-system process, and the tensors lie in shared memory.
"""

import functools
import os
import sys

import pytest
import torch

from kernels import Spec, launch, train_epoch, train_epoch_ref
from kernels.training import exchange as module
from kernels.training.plan import plan
from tests import interpreter, run_command
from tests.checks import assert_equal
from tests.kernels.trainings import CASES, Training, assert_agrees, assert_near
from tests.programs import as_processes

SPECS = {
    "momentum, 5 programs": CASES["wider than a tile, momentum"],
    "single layer, 2 programs": (Spec((12, 20)), {}),
    "four layers, Adam, 3 programs": (
        Spec((12, 37, 26, 8, 3), "tanh", rule="adam"),
        {"lr": 0.01, "betas": (0.9, 0.999)},
    ),
    "z kept, 2 programs": (Spec((12, 20, 3), "gelu"), {}),
    "z of a single layer, 2 programs": CASES["z of a single layer"],
}


# It is trained with the tiles of an H100. "z of a single layer" has the usual tiles.
H100 = "single layer, 2 programs"


def by_processes(kind):
    """`train_epoch`, with one process for each program of `module.exchange_kernel`."""

    def train(run):
        run.losses.fill_(float("nan"))
        planned, rows, options = plan(run, "exchange")
        programs = -(-run.spec.sizes[1] // rows)
        args, copied = module.prepare(run, planned, programs, kind)
        options |= {"ROWS": rows, "PROGRAMS": programs, "WORDS": kind == "words"}
        as_processes(module.exchange_kernel, programs, args, options, first=0.15)
        for tensor, copies in copied:
            assert_equal(list(copies), [copies[0]] * programs, "copies of the programs")
            tensor.copy_(copies[0])
        run.count += run.steps
        return run.losses, run.correct

    return train


def check(name):
    """Compares both exchanges in one case, with each other and with the reference."""
    spec, hyper = SPECS[name]
    run = Training(spec, "cpu", n=13, **hyper)  # 3 steps: the third reuses the first one's buffer
    results = {kind: run.train(by_processes(kind)) for kind in module.EXCHANGES}
    assert_equal(results["counter"], results["words"], "counter and words")
    assert_near(results["words"], run, train_epoch_ref)


def test_programs_agree_with_reference():
    """The check runs in a process of its own, because a process with threads cannot fork safely."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = run_command([sys.executable, "-m", "tests.kernels.test_exchange"], env=environment)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.skipif(
    launch.INTERPRETED, reason="a grid whose programs wait for each other needs a GPU"
)
@pytest.mark.parametrize("kind", module.EXCHANGES)
@pytest.mark.parametrize("name", SPECS)
def test_programs_on_a_gpu(name, kind):
    spec, hyper = SPECS[name]
    run = Training(spec, "cuda", **hyper)
    together = functools.partial(train_epoch, exchange=kind)
    assert_agrees(run, together, train_epoch_ref)
    first = run.train(together)
    for _ in range(100):
        assert_equal(run.train(together), first)


if __name__ == "__main__":
    torch.set_num_threads(1)
    interpreter.improve()
    for case in SPECS:
        if case != H100:
            check(case)
    launch.arch = lambda device: "sm_90"
    assert plan(Training(*SPECS[H100][:1], "cpu").run(), "exchange")[1] == 8
    check(H100)
