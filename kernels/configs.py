"""Pinned tile configurations: by (kernel, architecture, dtype, shape bucket), with a heuristic where nothing is pinned.

No autotuner: tuning costs tens of seconds a shape, its winner changes the summation order from run to run, and several
configurations cannot run in the interpreter. `bench/tune.py` proposes entries for PINNED from a measurement.
"""

from typing import NamedTuple

import torch

from . import launch


class Config(NamedTuple):
    """Tile sizes of a product [BLOCK_M, BLOCK_N] += [BLOCK_M, BLOCK_K] · [BLOCK_K, BLOCK_N], and how it is launched."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (kernel name, architecture, "half" | "ieee" | "tf32x3" | "tf32", bucket) -> Config.
# Empty: nothing has been measured on a GPU yet.
PINNED: dict[tuple[str, str, str, str], Config] = {}

# Heuristic by element type and bucket. ieee products run on the FMA units, which unroll K: K tiles stay at 16.
_HEURISTIC = {
    ("half", "large"): Config(128, 128, 64, 8, 3),
    ("half", "small"): Config(64, 64, 64, 4, 3),
    ("half", "tiny"): Config(16, 32, 64, 4, 3),
    ("ieee", "large"): Config(64, 64, 16, 8, 2),
    ("ieee", "small"): Config(32, 64, 16, 4, 2),
    ("ieee", "tiny"): Config(16, 32, 16, 4, 2),
    ("tf32x3", "large"): Config(64, 64, 32, 8, 2),
    ("tf32x3", "small"): Config(32, 64, 32, 4, 2),
    ("tf32x3", "tiny"): Config(16, 32, 32, 4, 2),
    ("tf32", "large"): Config(128, 64, 32, 8, 3),
    ("tf32", "small"): Config(64, 64, 32, 4, 3),
    ("tf32", "tiny"): Config(16, 32, 32, 4, 3),
}
BUCKETS = ("large", "small", "tiny")


def bucket(m: int, n: int, sms: int) -> str:
    """`large` when 128 × 128 tiles of an m × n result keep half the device busy, `tiny` when a side is at most 32."""
    if min(m, n) <= 32:
        return "tiny"
    return "large" if -(-m // 128) * -(-n // 128) * 2 >= max(sms, 64) else "small"


def lookup(kernel: str, arch: str, precision: str, size: str) -> Config:
    """The pinned configuration, or the heuristic one cut to what the architecture can hold in shared memory."""
    if (kernel, arch, precision, size) in PINNED:
        return PINNED[kernel, arch, precision, size]
    config = _HEURISTIC[precision, size]
    # Turing has 64 KiB and no asynchronous copies, AMD 64 KiB: deeper pipelines would not fit.
    return config._replace(num_stages=2) if arch == "sm_75" or arch.startswith("gfx") else config


def product(kernel: str, like: torch.Tensor, m: int, n: int) -> dict:
    """Keyword arguments of a product kernel whose result is m × n, on the device and in the dtype of `like`."""
    precision = launch.dot_precision()
    size = bucket(m, n, launch.sm_count(like.device))
    config = lookup(kernel, launch.arch(like.device), precision if like.dtype == torch.float32 else "half", size)
    return dict(config._asdict(), PRECISION=precision)
