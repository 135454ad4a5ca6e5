"""Every kernel compiles for GPUs that are not here, fits their memory, does not spill and uses
their tensor cores.

tests/compile/worker.py, in a process of its own, finds the kernels and compiles them.
"""

import json
import sys

import pytest

from kernels import configs
from tests import PATIENCE, run_command
from tests.compile import worker

# KiB of shared memory for a program
SHARED = {
    "sm_75": 64,
    "sm_80": 163,
    "sm_86": 99,
    "sm_89": 99,
    "sm_90": 227,
    "sm_100": 227,
    "sm_120": 99,
    "gfx942": 64,
    "gfx1100": 64,
}
# A single spill fails on these. Other architectures are not tuned.
NO_SPILLS = ("sm_80", "sm_90")
# These are compiled in every run of the suite, the others with --full, as in CI.
USUAL = ("sm_90",)
PARTS = 3
# Only some shapes reach these kernels.
NEEDED = {
    "linear_fwd_kernel",
    "linear_bwd_reduce_kernel",
    "linear_cross_entropy_fwd_kernel",
    "optimizer_kernel",
}
BY_TMA = ["linear_bwd_dw_kernel", "linear_bwd_dx_kernel", "linear_fwd_kernel"]
WARPGROUP = "wgmma.mma_async"  # HGMMA
FIFTH_GENERATION = "tcgen05.mma"


def expected_products(arch, row):
    """The instructions for the kernel's products: those of tensor cores where the precision
    allows.
    """
    if arch == "gfx942":
        return {"v_mfma"}  # also multiplies float32
    if row["precision"] == "ieee" or arch == "sm_75":
        # float32 runs on the FMA units. So does everything on Turing, also bfloat16, because Triton
        # no longer uses its tensor cores. configs.py gives it the tiles of float32.
        return set()
    if arch == "gfx1100":
        return {"v_wmma"}
    # A warpgroup of four warps multiplies 64 rows at a time. Smaller tiles use single warps.
    if row["BLOCK_M"] >= 64 and row["num_warps"] >= 4 and arch in ("sm_90", "sm_100"):
        return {WARPGROUP if arch == "sm_90" else FIFTH_GENERATION}
    return {"mma.sync"}


def problems(arch, row):
    """The faults of one compiled kernel, as text."""
    if "error" in row:
        yield row["error"]
        return
    if row["shared"] > SHARED[arch] * 1024:
        yield f"{row['shared']} bytes of shared memory, at most {SHARED[arch]} KiB"
    if arch in NO_SPILLS and (row["spills"] or row["local"]):
        yield (
            f"{row['spills']} spills, {row['stack']} bytes of stack, at {row['registers']} "
            "registers"
        )
    if (row["bulk"] > 0) != (row["described"] > 0):
        yield f"{row['bulk']} bulk copies for {row['described']} descriptors"
    if row.get("uneven"):
        yield f"{row['uneven']} sums whose lanes hold different results: see worker.uneven_sums"
    if row["dots"] and (used := set(row["products"])) != (expected := expected_products(arch, row)):
        yield f"multiplies by {sorted(used)}, expected {sorted(expected)}"


def cases():
    """Every architecture in PARTS parts, so that the machine's processors share the work. Each part
    needs seconds to find all launches.
    """
    for arch in worker.SMS:
        marks = [pytest.mark.long(20)] + ([] if arch in USUAL else [pytest.mark.full])
        for part in range(1, PARTS + 1):
            yield pytest.param(arch, f"{part}/{PARTS}", marks=marks, id=f"{arch}-{part}")


@pytest.mark.parametrize(("arch", "part"), list(cases()))
def test_every_kernel(arch, part, request, environment):
    command = [sys.executable, "-m", "tests.compile.worker", arch, part]
    full = request.config.getoption("full")
    done = run_command(command + full * ["full"], (1 + 3 * full) * PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout)
    rows, names, described = (said[key] for key in ("rows", "kernels", "described"))
    found = [f"{row['label']}: {problem}" for row in rows for problem in problems(arch, row)]
    assert not found, "\n".join([f"{len(found)} of {len(rows)} kernels:", *found])
    assert described == (BY_TMA if configs.has_tma(arch) else [])
    missing = NEEDED - set(names)
    assert rows and not missing, f"no shape reaches {missing}"
