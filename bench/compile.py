"""Compiles the kernels of the self-check for this machine's GPU, in a process for each core.

python -m bench.compile

It prints a line for each share that is done. The exit status is 1 if one failed. A kernel takes
half a second, one for 64 tensors many. Triton's cache keeps the kernels, so that
`handgrad info --check`, the tests and the tables find them.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch

from kernels import launch
from kernels.operations import OPERATIONS, Make

_SHAPE = (33, 17, 7)  # as in the self-check


def shares() -> list[tuple[str, torch.dtype]]:
    """The shares of work. Each is an operation in a precision."""
    return [(name, dtype) for name in OPERATIONS for dtype in launch.KERNEL_DTYPES]


def compile_share(name: str, dtype: torch.dtype, arch: str, processors: int) -> int:
    """Compiles forward and backward of an operation's cases, as a launch on that GPU would.

    Nothing runs. Returns the number of launches.
    """
    count = 0

    def warm(kernel, grid, args, options):
        nonlocal count
        kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)
        count += 1

    with launch.dry_run(arch, processors), launch.observe(warm):
        for _, arguments in OPERATIONS[name].cases(Make("cpu", dtype), *_SHAPE):
            OPERATIONS[name].results(arguments)
    return count


def _child(index: int) -> int:
    device = torch.device("cuda")
    name, dtype = shares()[index]
    compile_share(name, dtype, launch.arch(device), launch.sm_count(device))
    return 0


def _run(index: int) -> tuple[int, str]:
    command = [sys.executable, "-m", "bench.compile", str(index)]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, (done.stderr.strip().splitlines() or [""])[-1]


def main() -> int:
    """Compiles all shares, on all cores. Returns 1 if one did not compile."""
    every, failed = shares(), 0
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        running = {pool.submit(_run, i): every[i] for i in range(len(every))}
        for done, future in enumerate(as_completed(running), 1):
            (name, dtype), (status, said) = running[future], future.result()
            failed += status != 0
            verdict = "ok" if status == 0 else f"FAIL {said}"
            print(f"{done} of {len(every)}: {name} {dtype} {verdict}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(_child(int(sys.argv[1])) if sys.argv[1:] else main())
