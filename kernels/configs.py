"""Tile configurations, pinned by (kernel, architecture, dtype, shape bucket).

A heuristic serves where nothing is pinned.

There is no autotuner, for three reasons. Tuning costs tens of seconds a shape. Its winner changes
the order of summation from run to run. The interpreter cannot run several configurations. An entry
for PINNED comes from a table of `python -m bench` on that GPU.
"""

from typing import NamedTuple

import torch

from . import launch
from .language import VERSION, triton


class FromSize(NamedTuple):
    """The size from which on torch (cuBLAS) computes a product. Both numbers must be reached.

    terms: how many terms each sum of the product has. in_turn: how many multiply-adds one processor
    would do, one after the other, in the fused kernel.
    """

    terms: int
    in_turn: int


class Config(NamedTuple):
    """Tile sizes of a product, its launch options, and the size from which on the library serves.

    The product of tiles is [BLOCK_M, BLOCK_N] += [BLOCK_M, BLOCK_K] · [BLOCK_K, BLOCK_N].
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    library: FromSize | None = None  # from this size on it is torch's own product; None: never
    tma: bool = False  # True: the tensor memory accelerator loads tiles, where the GPU has one


# (kernel name, architecture, "half" | "ieee" | "tf32x3" | "tf32", bucket) -> Config.
# It is empty because nothing has been measured on a GPU yet.
PINNED: dict[tuple[str, str, str, str], Config] = {}

# The size from which on torch's own product, in two launches, beats one launch of the fused kernel.
# THE SIZES ARE REASONED, NOT MEASURED. `python -m bench linear` measures both. The assumptions are
# for an H100:
#
# float32 at "highest": the FMA units do 2.2e11 multiply-adds a second and processor. Triton reaches
# about a third of that, because its tiles in registers are smaller than cuBLAS's. cuBLAS reaches
# two thirds or more, and also splits long sums over processors. One more launch costs 3 to 4 µs. At
# 7e10 a second, half a million multiply-adds take 7 µs, and cuBLAS saves more than half of it. For
# smaller products, as in the reference network (32 × 784 × 100: 0.4 million), the launches decide.
# Writing and reading z once more takes 2.7 ps an element at 3 TB/s. cuBLAS saves as much in a sum
# of 32 terms.
_FMA = FromSize(32, 2**19)
# Half precision, large results: both use tensor cores, and cuBLAS is up to twice as fast. Writing
# and reading z once more takes 1.3 ps an element. The product takes K / 3e14 s an element, which is
# as much at K = 400.
_TENSOR_CORES = FromSize(512, 0)
# tf32 and tf32x3: never. Torch's own product takes tf32 for both, and no library has tf32x3.

# TMA: THE CHOICE IS REASONED, NOT MEASURED. `python -m bench linear` measures both. One thread asks
# for a tile. Without TMA, all threads compute addresses of its elements and copy them. The host
# encodes a descriptor for each factor, which takes some microseconds a launch. So only large
# products use TMA.

# Heuristic by element type and bucket. ieee products run on the FMA units, whose code unrolls K, so
# K tiles stay at 16.
_HEURISTIC = {
    ("half", "large"): Config(128, 128, 64, 8, 3, _TENSOR_CORES, tma=True),
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

    `tiny`: one side is at most 32. `large`: its tiles of 128 × 128 keep half the device busy, and
    there are at least 32 of them. `small`: all others.
    """
    if min(m, n) <= 32:
        return "tiny"
    return "large" if -(-m // 128) * -(-n // 128) * 2 >= max(sms, 64) else "small"


def lookup(kernel: str, arch: str, precision: str, size: str) -> Config:
    """The pinned configuration, or the heuristic one.

    The heuristic is reduced to what fits in the architecture's shared memory.
    """
    if (kernel, arch, precision, size) in PINNED:
        return PINNED[kernel, arch, precision, size]
    # Triton does not use the tensor cores of Turing. Every product runs on the FMA units there, and
    # wider tiles spill.
    config = _HEURISTIC["ieee" if arch == "sm_75" else precision, size]
    if not arch.startswith("sm_"):
        # AMD's matrix cores take float32. The interpreter must run the kernels to check them.
        config = config._replace(library=None)
    # Turing and AMD have 64 KiB of shared memory, and Turing cannot copy asynchronously. Deeper
    # pipelines would not fit there.
    return config._replace(num_stages=2) if arch == "sm_75" or arch.startswith("gfx") else config


class Product(NamedTuple):
    """How an m × n product is computed on a device. `product` makes it."""

    config: Config
    precision: str  # of float32 products
    processors: int
    has_tma: bool = False

    @property
    def options(self) -> dict:
        """Keyword arguments of a product kernel: tiles, precision and launch options."""
        tiles = self.config._asdict()
        del tiles["library"], tiles["tma"]
        return dict(tiles, PRECISION=self.precision)

    def over(self, *terms: int) -> dict:
        """`options` and WHOLE: True if sums of so many terms consist of whole tiles only."""
        whole = all([k % self.config.BLOCK_K == 0 for k in terms])
        return dict(self.options, WHOLE=whole)

    def grid(self, m: int, n: int) -> tuple[int, int]:
        """(rows, columns) of tiles of an m × n result."""
        return triton.cdiv(m, self.config.BLOCK_M), triton.cdiv(n, self.config.BLOCK_N)

    def by_tma(self, *factors: torch.Tensor) -> bool:
        """True if kernels read these factors, (rows, columns), by descriptors.

        The GPU must have a tensor memory accelerator, from Hopper on. It takes half-precision rows
        of consecutive elements that begin at multiples of 16 bytes.
        """
        forced = launch.tma()
        if not (self.config.tma if forced is None else forced) or not self.has_tma:
            return False
        return all(
            t.dtype.itemsize == 2
            and t.numel() > 0
            and t.stride(1) == 1
            and t.stride(0) % 8 == 0
            and t.stride(0) >= t.shape[1]
            for t in factors
        )

    def by_library(self, m: int, n: int, k: int) -> bool:
        """True if torch's own product serves instead of the fused kernel, for sums of k terms."""
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

    heavy: the epilogue needs many registers (act' of z, Adam), so BLOCK_N is halved from 128 to
    avoid spilling.
    """
    precision, arch = launch.dot_precision(), launch.arch(like.device)
    processors = launch.sm_count(like.device)
    kind = precision if like.dtype == torch.float32 else "half"
    config = lookup(kernel, arch, kind, bucket(m, n, processors))
    if heavy and config.BLOCK_N == 128:
        config = config._replace(BLOCK_N=64)
    return Product(config, precision, processors, has_tma(arch))


def convolution(kernel: str, like: torch.Tensor, m: int, n: int) -> dict:
    """Launch options of a convolution with an m × n result, for device and dtype of `like`.

    Tiles are small because each element of a patch needs an address and a mask in registers. A tile
    has at most 64 rows. The rows are halved, down to 16, until every processor has a tile. Columns
    are often few, and are padded to 16.
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

    Without it, ptxas may stop at 80 or 128 registers, so that one more block fits, and spill.
    """
    return {"maxnreg": 255} if launch.arch(device).startswith("sm_") else {}


# The most multiply-adds of a step in layers 2 … L, forward and backward, for training kernels. Each
# of their programs repeats these. Above the limit, separate products serve. The number is reasoned,
# not measured.
MOST_REPEATED = 2_000_000


# The most that a training kernel holds in registers without spilling, by precision: rows of a
# batch, and rows times outputs, all padded to powers of two. tests/compile compiles these limits.
# With twice as many outputs there are 2 to 40 local accesses in ieee, and on sm_80 in the others.
MOST_ROWS = {"ieee": 128, "tf32": 128, "tf32x3": 64}
MOST_OUTPUTS = {"ieee": 128 * 32, "tf32": 128 * 16, "tf32x3": 64 * 32}
# Triton 3.6 needs more registers for the same kernels. At these limits it gets smaller tiles, and
# it loads less ahead. So does 3.7, which was not compiled.
OLD_TRITON = VERSION < (3, 8)


def padded(size: int) -> int:
    """The side of a tile for so many elements: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(size))


class Training(NamedTuple):
    """Tiles of the kernels that hold a whole training step, see `training.layers`.

    They bound the registers for networks of every size.
    """

    columns: int  # columns of a layer that are computed at once
    block_k: int  # input features that are read at once
    block_r: int  # terms that are added at once in a sum over hidden units
    rows: int  # outputs of layer 1 that one program owns, if several share a network
    num_warps: int
    num_stages: int


# (kernel name, architecture, precision, states of a parameter, sizes, padded batch) -> Training.
# It is empty because nothing has been measured on a GPU yet.
PINNED_TRAINING: dict[tuple[str, str, str, int, tuple[int, ...], int], Training] = {}


def training(
    kernel: str, arch: str, precision: str, states: int, sizes: tuple[int, ...], block_m: int
) -> Training:
    """The pinned configuration, or tiles that fit the registers.

    tests/compile checks that these tiles do not spill. Their speed has not been measured.
    """
    pinned = PINNED_TRAINING.get((kernel, arch, precision, states, tuple(sizes), block_m))
    if pinned:
        return pinned
    largest = block_m * padded(sizes[-1]) >= MOST_OUTPUTS[precision]
    # tf32x3 holds every operand twice, as a large and a small part. In ieee, updates that divide by
    # a root spill at the limit of outputs.
    narrow = precision == "tf32x3" or (precision == "ieee" and largest)
    columns = max(16, min(64, (1024 if narrow else 2048) // block_m))
    block_k, rows = (
        (64 if states == 0 else 32, 8)
        if kernel == "exchange"
        else (16 if precision == "ieee" else 32, 16)
    )
    if precision == "ieee" and (block_m > 64 or largest):
        block_k = 16  # FMA: a thread holds its factors for the whole batch in registers
    # On AMD a lane has twice the registers, and products need 16 rows.
    if not arch.startswith("sm_"):
        return Training(columns, 16, 16, 16, num_warps=4, num_stages=1)
    small = precision == "tf32x3" and states > 0 and (block_m > 32 or largest) and older(arch)
    if small and kernel != "exchange":
        return Training(16, 16, 16, rows, num_warps=8, num_stages=1)
    if OLD_TRITON and largest and block_m > 32:
        stages = {"exchange": 1, "epoch": 2}.get(kernel, 3) if precision != "tf32x3" else 1
        return Training(16, 16, 16, rows, num_warps=8, num_stages=stages)
    return Training(columns, block_k, 16, rows, num_warps=8, num_stages=3)


def has_tma(arch: str) -> bool:
    """True for NVIDIA GPUs from Hopper on, which have a tensor memory accelerator."""
    return arch.startswith("sm_") and not older(arch)


def older(arch: str) -> bool:
    """True for NVIDIA GPUs before Hopper, whose products take their operands from registers."""
    return arch.startswith("sm_") and int(arch[3:]) < 90


def most_shared(arch: str, precision: str) -> int:
    """The most rows of a batch that programs which share a network take without spilling."""
    causes = (precision == "ieee", older(arch), OLD_TRITON)
    if not arch.startswith("sm_") or sum(causes) < 2:
        return MOST_ROWS[precision]
    return 32 if older(arch) and OLD_TRITON else 64
