"""Runs the numerical tests as other processors would, to see if they depend on this one's rounding.

    python -m tests.machines [WORD …] [--triton FOLDER] [--jobs N]

BLAS libraries and torch choose their code by the processor, and each code adds in its own order.
Environment variables make them choose otherwise. Each row of `settings` that this processor can run
is one run of the tests, with other random numbers. In the settings "numba …", numba compiles for
another processor, whose vectors and registers the tiles of the compiled epoch then suit. These
settings run the tests of compiled code. WORD: only settings with this in their name.
--triton: one more run with another version of Triton, from a folder that
`pip install --target FOLDER --no-deps triton==3.6.0` fills.

It is started by hand and in CI, never by pytest. It prints a table of failures and exits with 1 if
there are any.
"""

import argparse
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = [
    *(
        f"tests/kernels/test_{name}.py"
        for name in (
            "smoke",
            "linear",
            "layer_norm",
            "linear_memory",
            "activations",
            "elementwise_loss",
            "cross_entropy_kernel",
            "linear_cross_entropy",
            "conv_memory",
            "mlp_update",
            "optim",
            "properties",
            "determinism",
            "autocast",
            "rounding",
        )
    ),
    *(
        f"tests/mlp/test_{name}.py"
        for name in (
            "engines",
            "loss",
            "means",
            "modules",
            "net",
            "optim",
            "packs",
            "precision",
            "replay",
            "schedule",
            "stepwise",
            "sweep",
            "trainer",
        )
    ),
]
# The tests of code that numba compiles.
COMPILED = [
    "tests/kernels/test_numba.py",
    *(
        f"tests/mlp/test_{name}.py"
        for name in ("cpu_epoch", "cpu_conv", "several_epochs", "every_rule")
    ),
]
# Left out: tests in float64, where rounding decides nothing, tests that compare a computation with
# itself, and tests that start processes, which draw other numbers.
SKIPPED = "not gradcheck and not split_work and not in_kernels and not in_another_process"
# test_digits is left out because another seed splits the digits in another way.
SKIPPED += " and not test_digits"
# name of a code -> the flag of /proc/cpuinfo that it needs
CORES = {
    "Nehalem": "sse4_2",
    "Sandybridge": "avx",
    "Haswell": "avx2",
    "Zen": "avx2",
    "SkylakeX": "avx512f",
}
TORCH = {"default": "sse4_2", "avx2": "avx2", "avx512": "avx512f"}
# numba's name of a processor -> the flag that it needs, and what its name does not say to the tiles
NUMBA = {
    "nehalem": ("sse4_2", ""),
    "haswell": ("avx2", ""),
    "skylake-avx512": ("avx512f", "+avx512f"),
}
MKL = {"SSE4_2": "sse4_2", "AVX2": "avx2", "AVX512": "avx512f"}


def settings() -> dict[str, tuple[str, dict[str, str]]]:
    """{name: (the flag that the processor needs, environment)}. Each has its own seed."""
    found = {f"seed {seed}": ("sse4_2", {}) for seed in range(3)}
    for core, flag in CORES.items():
        found[f"BLAS {core}"] = flag, {"OPENBLAS_CORETYPE": core}
    for capability, flag in TORCH.items():
        found[f"torch {capability}"] = flag, {"ATEN_CPU_CAPABILITY": capability}
    for instructions, flag in MKL.items():
        found[f"MKL {instructions}"] = flag, {"MKL_ENABLE_INSTRUCTIONS": instructions}
    threads = {"HANDGRAD_TEST_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    # Threads without work sleep, because other settings need the processors.
    found["two threads"] = "sse4_2", threads | {"OMP_WAIT_POLICY": "passive"}
    plainest = {"OPENBLAS_CORETYPE": "Nehalem", "ATEN_CPU_CAPABILITY": "default"}
    found["plainest"] = "sse4_2", plainest | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
    for processor, (flag, features) in NUMBA.items():
        compiles = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
        found[f"numba {processor}"] = flag, compiles
    return {
        name: (flag, {"HANDGRAD_TEST_SEED": str(seed)} | environment)
        for seed, (name, (flag, environment)) in enumerate(found.items())
    }


def flags() -> set[str]:
    """The processor's flags, by Linux's names."""
    text = Path("/proc/cpuinfo").read_text()
    return set(re.search(r"^flags\s*:(.*)$", text, re.M)[1].split()) if "flags" in text else set()


def run(environment: dict[str, str]) -> tuple[str, list[str]]:
    """(pytest's last line, the tests that failed)."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-q", "--tb=line", "--durations=0", "--durations-min=60"]
    command += COMPILED if "NUMBA_CPU_NAME" in environment else ["-k", SKIPPED, *FILES]
    one = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if "HANDGRAD_TEST_THREADS" in environment:
        one["OMP_NUM_THREADS"] = environment["HANDGRAD_TEST_THREADS"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **one, **environment}, capture_output=True, text=True
    )
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", done.stdout, re.M)
    if done.returncode and not failed:
        failed = [f"pytest ended with {done.returncode}: {(done.stderr or done.stdout)[-300:]}"]
    return (done.stdout.strip() or "nothing").splitlines()[-1].strip("= "), failed


def main(arguments=None) -> int:
    rows, can = settings(), flags()
    parser = argparse.ArgumentParser(
        prog="python -m tests.machines",
        description="Runs the numerical tests as other processors would.",
        epilog=f"Settings: {', '.join(rows)}; with --triton also: another Triton.",
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="WORD",
        help="run only settings with this in their name (default: all that this processor can run)",
    )
    parser.add_argument(
        "--triton", metavar="FOLDER", help="one more run, with the Triton in this folder"
    )
    parser.add_argument(
        "--jobs",
        metavar="N",
        type=int,
        default=os.cpu_count(),
        help="settings that run at the same time (default: one for each processor)",
    )
    given = parser.parse_args(arguments)
    if given.triton:
        path = os.pathsep.join(filter(None, (given.triton, os.environ.get("PYTHONPATH"))))
        rows["another Triton"] = "sse4_2", {"PYTHONPATH": path}
    chosen = {n: row for n, row in rows.items() if any(w in n for w in given.words or [n])}
    if not chosen:
        parser.error(f"no setting has {' or '.join(given.words)}; known: {', '.join(rows)}")
    bad = 0
    print("| setting | environment | result |\n|---|---|---|", flush=True)
    with ThreadPoolExecutor(given.jobs) as pool:
        runs = {n: pool.submit(run, e) for n, (flag, e) in chosen.items() if flag in can}
        for name, (flag, environment) in chosen.items():
            text = " ".join(f"{k}={v}" for k, v in environment.items())
            last, failed = runs[name].result() if name in runs else (f"no {flag} here", [])
            print(f"| {name} | {text} | {last} |", flush=True)
            print(*(f"|  |  | {test} |" for test in failed), sep="\n", end="\n" if failed else "")
            bad += bool(failed)
    print(f"\n{bad} of {len(runs)} settings have failures")
    return bad > 0


if __name__ == "__main__":
    sys.exit(main())
