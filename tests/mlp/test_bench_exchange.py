"""The benchmark of the exchange alone passes on the right numbers and compiles for GPUs.

python -m tests.mlp.test_bench_exchange                # in the interpreter, a process a program
python -m tests.mlp.test_bench_exchange compile sm_90  # a line of JSON for each kernel compiled
"""

import json
import os
import sys

import pytest
import torch

from bench import bench_exchange as bench
from kernels.training import exchange
from tests import interpreter, run_command
from tests.checks import assert_equal

PROGRAMS, STEPS = 3, 5


def check(kind):
    """Checks that every program received, in the last step, what the others published."""
    from tests.programs import as_processes

    args, options = bench.prepare(kind, PROGRAMS, STEPS, "cpu", rows=4, batch=16)
    as_processes(bench.exchange_alone_kernel, PROGRAMS, args, options, first=0.1)
    width = PROGRAMS * 4
    assert_equal(args[0][:, :, :width], bench.expected(args[0], width, STEPS), kind)


def described(arch):
    """`tests.compile.worker`'s description of each exchange, compiled for 13 programs."""
    from tests.compile import worker

    for kind in exchange.EXCHANGES:
        args, options = bench.prepare(kind, 13, STEPS, "meta")
        source, compiled = worker.as_source(
            bench.exchange_alone_kernel, (*args, 0), {**options, "num_warps": 8}
        )
        yield worker.compile_and_describe(arch, f"{kind}, 13 programs", "ieee", source, compiled)


def run(environment, *arguments):
    command = [sys.executable, "-W", "ignore", "-m", "tests.mlp.test_bench_exchange", *arguments]
    return run_command(command, env=environment)


def test_programs_receive_what_the_others_published():
    """The check runs in a process of its own, because a process with threads cannot fork safely."""
    done = run({**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.full), "sm_90"])
def test_compiles_without_spills(arch):
    done = run({k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, "compile", arch)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(exchange.EXCHANGES)
    for row in rows:
        assert "error" not in row and row["stack"] == 0, row


if __name__ == "__main__":
    if sys.argv[1:]:
        for row in described(sys.argv[2]):
            print(json.dumps(row, default=str), flush=True)
    else:
        torch.set_num_threads(1)
        interpreter.improve()
        for each in exchange.EXCHANGES:
            check(each)
