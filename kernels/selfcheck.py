"""Compares every kernel with its float64 reference, on this machine.

Run it as `python -m kernels.selfcheck`. `handgrad info` runs it too.

On a machine without a GPU, the kernels run in Triton's interpreter, in separate processes.
"""

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from . import language, launch, rounding
from .operations import OPERATIONS, Make

_SHAPE = (33, 17, 7)  # batch, features in, features out; no tile size divides them


class Check(NamedTuple):
    """The worst result of an operation's cases in one dtype.

    Errors are relative to the largest number of the result.
    """

    operation: str
    dtype: str
    case: str
    error: float
    reference_error: float
    allowed: float

    @property
    def passed(self) -> bool:
        """True if the error is at most the allowed error.

        Allowed is twice the error of plain torch in the same dtype plus `rounding.floor`, or twice
        what simulated rounding gives, whichever is larger.
        """
        return self.error <= self.allowed


def doubled(value):
    """The value on the CPU, nested tuples and lists too. Floating-point tensors become float64."""
    if isinstance(value, torch.Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    return type(value)(map(doubled, value)) if isinstance(value, (tuple, list)) else value


def errors(operation, args, dtype) -> list[tuple[float, float, float]]:
    """(kernel error, reference error, allowed error) of each output of one case.

    All three are relative to the output's largest number.
    """
    compute = functools.partial(operation.results, doubled(args), reference=True)
    exact = compute()
    with launch.use("triton"):
        kernel = operation.results(args)
    # By default cuDNN rounds the factors of float32 convolutions to tf32.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        plain = operation.results(args, reference=True)
    simulated = functools.cache(lambda: rounding.worst_errors(compute, dtype))
    found = []
    for i, (k, p, e) in enumerate(zip(kernel, plain, exact)):
        scale = float(e.abs().max()) or 1.0
        ours, torchs = (float((t.cpu().double() - e).abs().max()) / scale for t in (k, p))
        allowed = 2 * torchs + rounding.floor(dtype, k.device)
        if ours > allowed:
            allowed = max(allowed, 2 * simulated()[i] / scale)
        found.append((ours, torchs, allowed))
    return found


def checks(device: str, names: Sequence[str] = ()) -> Iterator[Check]:
    """Yields one Check for each operation and dtype, as soon as it is known.

    The Check shows an output that fails, or else the output with the largest error. names: the
    operations to check; none means all.
    """
    for name in names or OPERATIONS:
        operation = OPERATIONS[name]
        for dtype in launch.KERNEL_DTYPES:
            cases = operation.cases(Make(device, dtype), *_SHAPE)
            kind = str(dtype).removeprefix("torch.")
            rows = [
                Check(name, kind, label, *each)
                for label, args in cases
                for each in errors(operation, args, dtype)
            ]
            yield max(rows, key=lambda row: (not row.passed, row.error))


HEADER = f"{'operation':<22}{'dtype':<10}{'error':>9}  {'plain torch':>11}  {'':4}  worst case"


def line(row: Check) -> str:
    """A check as one line of text."""
    return (
        f"{row.operation:<22}{row.dtype:<10}{row.error:>9.1e}  {row.reference_error:>11.1e}  "
        f"{'ok' if row.passed else 'FAIL':<4}  {row.case}"
    )


def run(say: Callable[[str], None] = print, names: Sequence[str] = ()) -> bool:
    """Runs the checks on the GPU if there is one, else in the interpreter. True if all passed.

    `say` gets each check's line when it is done. The interpreter runs in one process for each core.
    ValueError: Triton is not installed.
    """
    if not language.IS_INSTALLED:
        raise ValueError(f"self-check: no kernel can run, because {language.ADVICE}")
    on_gpu = torch.cuda.is_available()
    if not on_gpu and not launch.INTERPRETED:
        return _in_processes(say)
    passed = True
    for row in checks("cuda" if on_gpu else "cpu", names):
        say(line(row))
        passed &= row.passed
    return passed


def _in_processes(say: Callable[[str], None]) -> bool:
    """Runs all checks in as many processes as there are cores. True if all passed."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "1",
    }
    count = min(os.cpu_count() or 1, len(OPERATIONS))

    def work(names: list[str]) -> bool:
        command = [sys.executable, "-m", "kernels.selfcheck", *names]
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            for text in process.stdout or ():
                say(text.rstrip("\n"))
        return process.returncode == 0

    parts = [list(OPERATIONS)[i::count] for i in range(count)]
    with ThreadPoolExecutor(count) as pool:
        return all(list(pool.map(work, parts)))


if __name__ == "__main__":
    if not sys.argv[1:]:
        print(HEADER, flush=True)
    sys.exit(not run(lambda text: print(text, flush=True), sys.argv[1:]))
