"""Every kernel against its float64 reference, on this machine: `python -m kernels.selfcheck`, and
part of `handgrad info`.

On a machine without a GPU the kernels run in Triton's interpreter, in a process of their own.
"""

import os
import subprocess
import sys
from typing import NamedTuple

import torch

from . import launch
from .operations import OPERATIONS, Make

_SHAPE = (33, 17, 7)  # batch, features in, features out: nothing divides anything
_ULP = {dtype: torch.finfo(dtype).eps for dtype in launch.KERNEL_DTYPES}


class Check(NamedTuple):
    """The worst result of an operation's cases in one dtype: errors relative to the result's
    scale.
    """

    operation: str
    dtype: str
    case: str
    error: float
    reference_error: float

    @property
    def passed(self) -> bool:
        """At most twice the error of plain torch in the same dtype, plus one ulp of the result's
        scale.
        """
        return self.error <= 2 * self.reference_error + _ULP[getattr(torch, self.dtype)]


def doubled(value):
    """Floating-point tensors, however nested, in float64 on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    return type(value)(map(doubled, value)) if isinstance(value, (tuple, list)) else value


def errors(operation, args) -> list[tuple[float, float]]:
    """(kernel error, reference error) of each output of one case, relative to the output's largest
    number.
    """
    exact = operation.results(doubled(args), reference=True)
    with launch.use("triton"):
        kernel = operation.results(args)
    plain = operation.results(args, reference=True)
    scales = [float(e.abs().max()) or 1.0 for e in exact]
    return [
        tuple(float((t.cpu().double() - e).abs().max()) / scale for t in (k, p))
        for k, p, e, scale in zip(kernel, plain, exact, scales)
    ]


def checks(device) -> list[Check]:
    """One Check for each operation and dtype: of the output that fails, else errs, most."""
    found = []
    for name, operation in OPERATIONS.items():
        for dtype in launch.KERNEL_DTYPES:
            cases = operation.cases(Make(device, dtype), *_SHAPE)
            kind = str(dtype).removeprefix("torch.")
            rows = [
                Check(name, kind, label, *pair)
                for label, args in cases
                for pair in errors(operation, args)
            ]
            found.append(max(rows, key=lambda row: (not row.passed, row.error)))
    return found


def table(rows: list[Check]) -> str:
    """The checks for people, a line each."""
    lines = [f"{'operation':<22}{'dtype':<10}{'error':>9}  {'plain torch':>11}  {'':4}  worst case"]
    for row in rows:
        verdict = "ok" if row.passed else "FAIL"
        lines.append(
            f"{row.operation:<22}{row.dtype:<10}{row.error:>9.1e}  {row.reference_error:>11.1e}  "
            f"{verdict:<4}  {row.case}"
        )
    return "\n".join(lines)


def run() -> tuple[bool, str]:
    """(whether all passed, the table), on the GPU if there is one, else in the interpreter."""
    if torch.cuda.is_available() or launch.INTERPRETED:
        rows = checks("cuda" if torch.cuda.is_available() else "cpu")
        return all(row.passed for row in rows), table(rows)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, "-m", "kernels.selfcheck"], env=environment, capture_output=True, text=True
    )
    return done.returncode == 0, (done.stdout or done.stderr).rstrip()


if __name__ == "__main__":
    passed, text = run()
    print(text)
    sys.exit(not passed)
