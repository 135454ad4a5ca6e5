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


class FromSize(NamedTuple):
    """The smallest products of a linear layer that are torch's own, cuBLAS's; both must be reached.

    terms: of a sum. in_turn: multiply-adds of one processor, were it the fused kernel.
    """

    terms: int
    in_turn: int


class Config(NamedTuple):
    """Tile sizes of a product, how it is launched, and from which size on the library does it.

    The product is [BLOCK_M, BLOCK_N] += [BLOCK_M, BLOCK_K] · [BLOCK_K, BLOCK_N].
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    library: FromSize | None = None  # from where on it is torch's own product; None: nowhere


# (kernel name, architecture, "half" | "ieee" | "tf32x3" | "tf32", bucket) -> Config.
# Empty: nothing has been measured on a GPU yet.
PINNED: dict[tuple[str, str, str, str], Config] = {}

# From where on torch's own product, in two launches, beats one launch of the fused kernel.
# REASONED, NOT MEASURED: `python -m bench linear` measures both. What an H100 is assumed to do:
#
# float32 at "highest": Triton has only the FMA units and no tile of registers as deep as cuBLAS's:
# about a third of their 2.2e11 multiply-adds a second and processor, where cuBLAS reaches two
# thirds or more, and splits long sums over processors besides. Another launch costs 3 to 4 µs. At
# 7e10, half a million multiply-adds take 7 µs, of which cuBLAS saves more than half. Below, as in
# the reference network's layers (32 × 784 × 100: 0.4 million), the time is that of launches. And z
# is written and read once more, 2.7 ps an element at 3 TB/s, which 32 terms of a sum save.
_FMA = FromSize(32, 2**19)
# Half precision, large results: both use tensor cores, and cuBLAS is up to twice as fast. Another
# reading and writing of z takes 1.3 ps an element, the product K / 3e14 s: as much at K = 400.
_TENSOR_CORES = FromSize(512, 0)
# tf32 and tf32x3: never. Torch's own product takes tf32 for both, and no library has tf32x3.

# Heuristic by element type and bucket. ieee products run on the FMA units, which unroll K: K tiles
# stay at 16.
_HEURISTIC = {
    ("half", "large"): Config(128, 128, 64, 8, 3, _TENSOR_CORES),
    ("half", "small"): Config(64, 64, 64, 8, 3),
    ("half", "tiny"): Config(16, 32, 64, 4, 3),
    ("ieee", "large"): Config(64, 64, 16, 8, 2, _FMA),
    ("ieee", "small"): Config(32, 64, 16, 4, 2, _FMA),
    ("ieee", "tiny"): Config(16, 32, 16, 4, 2, _FMA),
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
    if not arch.startswith("sm_"):
        # AMD's matrix cores take float32, and the interpreter is there to run the kernels.
        config = config._replace(library=None)
    # Turing has 64 KiB and no asynchronous copies, AMD 64 KiB: deeper pipelines would not fit.
    return config._replace(num_stages=2) if arch == "sm_75" or arch.startswith("gfx") else config


class Product(NamedTuple):
    """How an m × n product is computed on a device: `product` makes it."""

    config: Config
    precision: str  # of float32 products
    processors: int

    @property
    def options(self) -> dict:
        """Keyword arguments of a kernel that multiplies: tiles, precision, how it is launched."""
        tiles = self.config._asdict()
        del tiles["library"]
        return dict(tiles, PRECISION=self.precision)

    def over(self, *terms: int) -> dict:
        """`options`, and whether sums of so many terms take whole tiles only."""
        whole = all([k % self.config.BLOCK_K == 0 for k in terms])
        return dict(self.options, WHOLE=whole)

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """Tiles of an m × n result."""
        return triton.cdiv(m, self.config.BLOCK_M), triton.cdiv(n, self.config.BLOCK_N)

    def by_library(self, m: int, n: int, k: int) -> bool:
        """Whether torch's own product serves, for sums of k terms, rather than the fused kernel."""
        forced = launch.products()
        if forced is not None:
            return forced == "library"
        config, smallest = self.config, self.config.library
        if smallest is None or k < smallest.terms:
            return False
        rows, columns = self.grid(m, n)
        in_turn = triton.cdiv(rows * columns, self.processors)
        return in_turn * config.BLOCK_M * config.BLOCK_N * k >= smallest.in_turn


def product(kernel: str, like: torch.Tensor, m: int, n: int, heavy: bool = False) -> Product:
    """How a product kernel computes an m × n result, for device and dtype of `like`.

    heavy: its epilogue takes so many registers (act' of z, Adam) that a thread's share of 128 × 128
    would spill.
    """
    precision, arch = launch.dot_precision(), launch.arch(like.device)
    processors = launch.sm_count(like.device)
    kind = precision if like.dtype == torch.float32 else "half"
    config = lookup(kernel, arch, kind, bucket(m, n, processors))
    if heavy and config.BLOCK_N == 128:
        config = config._replace(BLOCK_N=64)
    return Product(config, precision, processors)


def convolution(kernel: str, like: torch.Tensor, m: int, n: int) -> dict:
    """As `product`, for a convolution, with small tiles.

    Each element of a patch needs an address and a mask, which take registers.

    Rows, the many, are cut until every processor has a tile; columns, often few, are padded to 16.
    """
    precision, sms = launch.dot_precision(), launch.sm_count(like.device)
    kind = precision if like.dtype == torch.float32 else "half"
    key = kernel, launch.arch(like.device), kind, bucket(m, n, sms)
    if key in PINNED:
        return Product(PINNED[key], precision, sms).options
    block_m, block_n = (max(16, triton.next_power_of_2(size)) for size in (m, n))
    block_m, block_n, block_k = (
        min(64, block_m),
        min(64 if kind == "half" else 32, block_n),
        32 if kind == "half" else 16,
    )
    while block_m > 16 and triton.cdiv(m, block_m) * triton.cdiv(n, block_n) < sms:
        block_m //= 2
    config = Config(block_m, block_n, block_k, 8 if block_m * block_n >= 1024 else 4, 2)
    return Product(config, precision, sms).options | all_registers(like.device)


def all_registers(device) -> dict:
    """The launch option that lets ptxas use all registers.

    Without it, ptxas stops where one more block fits, at 80 or 128 registers, and spills.
    """
    return {"maxnreg": 255} if launch.arch(device).startswith("sm_") else {}


# Multiply-adds of a step in layers 2 … L, forward and backward, beyond which a chain of products
# is taken: each program of the training kernels would repeat them. Reasoned, not yet measured.
MOST_REPEATED = 2_000_000


# What a training kernel holds in registers at most, so that nothing spills: rows of a batch, by
# precision, and rows times outputs, both padded to powers of two. tests/compile compiles these
# limits: at twice as many outputs, 2 to 40 local accesses in ieee, and in tf32 on sm_80.
MOST_ROWS = {"ieee": 128, "tf32": 128, "tf32x3": 64}
MOST_OUTPUTS = {"ieee": 128 * 32, "tf32": 128 * 16, "tf32x3": 64 * 64}


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
    # tf32x3 holds every operand twice, as a large and a small part.
    columns = max(16, min(64, (1024 if precision == "tf32x3" else 2048) // block_m))
    block_k, rows = (
        (64 if states == 0 else 32, 8)
        if kernel == "exchange"
        else (16 if precision == "ieee" else 32, 16)
    )
    if precision == "ieee" and block_m > 64:
        block_k = 16  # FMA: a thread holds what it multiplies, over all the batch
    if not arch.startswith(
        "sm_"
    ):  # a lane of AMD's has twice the registers; its products want 16 rows
        return Training(columns, 16, 16, 16, num_warps=4, num_stages=1)
    small = precision == "tf32x3" and states > 1 and block_m > 32 and older(arch)
    if small and kernel != "exchange":
        return Training(columns, 16, 16, rows, num_warps=8, num_stages=1)
    return Training(columns, block_k, 16, rows, num_warps=8, num_stages=3)


def older(arch: str) -> bool:
    """Whether it is an NVIDIA GPU before Hopper: operands of its products lie in registers."""
    return arch.startswith("sm_") and int(arch[3:]) < 90


def spills_shared(arch: str, precision: str, block_m: int) -> bool:
    """Whether programs that share a network would spill, where one alone does not."""
    return precision == "ieee" and block_m > 64 and older(arch)
