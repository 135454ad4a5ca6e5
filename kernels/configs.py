"""Tile configurations, pinned by (kernel, architecture, dtype, shape bucket).

A heuristic serves where nothing is pinned.

No autotuner: tuning costs tens of seconds a shape, its winner changes the summation order from run
to run, and several configurations cannot run in the interpreter. An entry for PINNED comes from a
table of `python -m bench` on that GPU.
"""

from typing import NamedTuple

import torch
import triton

from . import launch


class Config(NamedTuple):
    """Tile sizes of a product, and how it is launched.

    The product is [BLOCK_M, BLOCK_N] += [BLOCK_M, BLOCK_K] · [BLOCK_K, BLOCK_N].
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int


# (kernel name, architecture, "half" | "ieee" | "tf32x3" | "tf32", bucket) -> Config.
# Empty: nothing has been measured on a GPU yet.
PINNED: dict[tuple[str, str, str, str], Config] = {}

# Heuristic by element type and bucket. ieee products run on the FMA units, which unroll K: K tiles
# stay at 16.
_HEURISTIC = {
    ("half", "large"): Config(128, 128, 64, 8, 3),
    ("half", "small"): Config(64, 64, 64, 8, 3),
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
    """The size of an m × n result: `large`, `tiny` or `small`.

    `large`: 128 × 128 tiles of it keep half the device busy. `tiny`: a side is at most 32. `small`:
    all others.

    `large`: 128 × 128 tiles of it keep half the device busy. `tiny`: a side is at most 32.
    """
    if min(m, n) <= 32:
        return "tiny"
    return "large" if -(-m // 128) * -(-n // 128) * 2 >= max(sms, 64) else "small"


def lookup(kernel: str, arch: str, precision: str, size: str) -> Config:
    """The pinned configuration, or the heuristic one.

    The heuristic is cut to what the architecture can hold in shared memory.
    """
    if (kernel, arch, precision, size) in PINNED:
        return PINNED[kernel, arch, precision, size]
    # Triton has no tensor cores on Turing: every product runs on the FMA units there, and wider
    # tiles spill.
    config = _HEURISTIC["ieee" if arch == "sm_75" else precision, size]
    # Turing has 64 KiB and no asynchronous copies, AMD 64 KiB: deeper pipelines would not fit.
    return config._replace(num_stages=2) if arch == "sm_75" or arch.startswith("gfx") else config


def product(kernel: str, like: torch.Tensor, m: int, n: int, heavy: bool = False) -> dict:
    """Keyword arguments of a product kernel with an m × n result, for device and dtype of `like`.

    heavy: its epilogue takes so many registers (act' of z, Adam) that a thread's share of 128 × 128
    would spill.
    """
    precision = launch.dot_precision()
    size = bucket(m, n, launch.sm_count(like.device))
    config = lookup(
        kernel, launch.arch(like.device), precision if like.dtype == torch.float32 else "half", size
    )
    if heavy and config.BLOCK_N == 128:
        config = config._replace(BLOCK_N=64)
    return dict(config._asdict(), PRECISION=precision)


def convolution(kernel: str, like: torch.Tensor, m: int, n: int) -> dict:
    """As `product`, for a convolution, with small tiles.

    Each element of a patch needs an address and a mask, which take registers.

    Rows, the many, are cut until every processor has a tile; columns, often few, are padded to 16.
    """
    precision, sms = launch.dot_precision(), launch.sm_count(like.device)
    kind = precision if like.dtype == torch.float32 else "half"
    key = kernel, launch.arch(like.device), kind, bucket(m, n, sms)
    if key in PINNED:
        return dict(PINNED[key]._asdict(), PRECISION=precision)
    block_m, block_n = (max(16, triton.next_power_of_2(size)) for size in (m, n))
    block_m, block_n, block_k = (
        min(64, block_m),
        min(64 if kind == "half" else 32, block_n),
        32 if kind == "half" else 16,
    )
    while block_m > 16 and triton.cdiv(m, block_m) * triton.cdiv(n, block_n) < sms:
        block_m //= 2
    config = Config(block_m, block_n, block_k, 8 if block_m * block_n >= 1024 else 4, 2)
    return dict(config._asdict(), PRECISION=precision, **all_registers(like.device))


def all_registers(device) -> dict:
    """The launch option that lets ptxas use all registers.

    Without it, ptxas stops at 80 registers, to fit a third block, and spills.
    """
    return {"maxnreg": 255} if launch.arch(device).startswith("sm_") else {}


# Multiply-adds of a step in layers 2 … L, forward and backward, beyond which a chain of products
# is taken: each program of the training kernels would repeat them. Reasoned, not yet measured.
MOST_REPEATED = 2_000_000


class Training(NamedTuple):
    """Tiles of the kernels that hold a whole training step, see `layers`.

    They bound the registers, whatever the network.
    """

    columns: int  # of a layer, computed at once
    block_k: int  # input features read at once
    block_r: int  # terms of a sum over hidden units taken at once
    rows: int  # outputs of layer 1 that one program owns, where several share a network
    num_warps: int
    num_stages: int


# (kernel name, architecture, precision, states of a parameter, sizes, padded batch) -> Training.
# Empty: nothing has been measured on a GPU yet.
PINNED_TRAINING: dict[tuple[str, str, str, int, tuple[int, ...], int], Training] = {}


def training(
    kernel: str, arch: str, precision: str, states: int, sizes: tuple[int, ...], block_m: int
) -> Training:
    """The pinned configuration, or tiles that fit the registers.

    Both were checked by compiling. Nothing of them is measured.
    """
    pinned = PINNED_TRAINING.get((kernel, arch, precision, states, tuple(sizes), block_m))
    if pinned:
        return pinned
    columns = max(16, min(64, 2048 // block_m))
    block_k, rows = (
        (64 if states == 0 else 32, 8)
        if kernel == "exchange"
        else (16 if precision == "ieee" else 32, 16)
    )
    if not arch.startswith(
        "sm_"
    ):  # a lane of AMD's has twice the registers; its products want 16 rows
        return Training(columns, 16, 16, 16, num_warps=4, num_stages=1)
    return Training(columns, block_k, 16, rows, num_warps=8, num_stages=3)
