"""The epoch kernel's exchange alone. In each step programs publish their columns of y_1 and receive
all others'.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from kernels import launch
from kernels.training.exchange import EXCHANGES, Box, publish, receive

from . import harness
from .table import Table, device, one_line

# rows of a batch, columns of y_1 that a program owns, exchanges in a launch
BATCH, ROWS, STEPS = 32, 8, 10_000
PROGRAMS = (2, 4, 8, 13, 32, 64, 132)  # 13 programs share the reference network's 100 units
_WARPS = 8  # as in the epoch kernel


@triton.jit
def exchange_alone_kernel(
    y_ptr,
    box,  # Box
    steps,
    first,
    NET: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program g = first + program_id owns ROWS columns from g·ROWS on and publishes t + m + n.

    Copy g of y holds what it received.
    """
    g = tl.program_id(0) + first
    own = g * ROWS + tl.arange(0, ROWS)
    y_ptr += g.to(tl.int64) * (NET.block_m * NET.pitch)
    y = (tl.arange(0, NET.block_m)[:, None] + own[None, :]).to(tl.float32)
    for t in tl.range(0, steps, num_stages=1, disable_licm=True):  # as in the epoch kernel
        publish(box, y + t, own, t, NET, WORDS)
        receive(y_ptr, box, t, NET, PROGRAMS, WORDS)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The fields of a network's Plan that publish and receive use, for the layout of scratch."""

    sizes: tuple[int, ...]
    tiles: tuple[int, ...]
    block_m: int
    pitch: int


def layout(programs: int, rows: int, batch: int) -> Layout:
    """The layout for a network whose layer 1 has `rows` outputs for each program."""
    width = programs * rows
    pitch = max(16, triton.next_power_of_2(width))
    return Layout((1, width, 1), (16, min(64, pitch), 16), batch, pitch)


def prepare(
    exchange: str, programs: int, steps: int, on, rows: int = ROWS, batch: int = BATCH
) -> tuple[tuple, dict]:
    """(the kernel's arguments before `first`, its constants). y is (programs, batch, pitch)."""
    net = layout(programs, rows, batch)
    y = torch.full((programs, batch, net.pitch), float("nan"), device=on)
    box = torch.zeros(
        (2, batch, net.pitch),
        dtype=torch.int64 if exchange == "words" else torch.float32,
        device=on,
    )
    counter = torch.zeros(1, dtype=torch.int32, device=on)
    return (y, Box(box, counter), steps), {
        "NET": net,
        "ROWS": rows,
        "PROGRAMS": programs,
        "WORDS": exchange == "words",
    }


def expected(y: torch.Tensor, width: int, steps: int) -> torch.Tensor:
    """The right contents of every program's copy, in its `width` columns, after the last step."""
    programs, batch, _ = y.shape
    m, n = (torch.arange(size, device=y.device, dtype=y.dtype) for size in (batch, width))
    return (m[:, None] + n + (steps - 1)).expand(programs, batch, width)


def microseconds(exchange: str, programs: int, on) -> float:
    """µs of one exchange.

    Raises ArithmeticError if a program did not receive what the others published.
    """
    args, options = prepare(exchange, programs, STEPS, on)
    y, box, _ = args

    def provider():
        box.columns.zero_()
        box.counter.zero_()
        launch.run(
            exchange_alone_kernel,
            (programs,),
            *args,
            0,
            launch_cooperative_grid=True,
            num_warps=_WARPS,
            **options,
        )

    provider()
    width = programs * ROWS
    wrong = int((y[:, :, :width] != expected(y, width, STEPS)).sum())
    if wrong:
        raise ArithmeticError(
            f"{wrong} of {programs * BATCH * width} numbers are not what was published"
        )
    return harness.measure({"": provider}, rounds=5)[""] / STEPS * 1e6


def run() -> Table:
    """µs of one exchange, for each number of programs and each kind of exchange."""
    table, on = (
        Table(
            f"Exchange alone, batch {BATCH}, {ROWS} columns a program", "python -m bench exchange"
        ),
        device(),
    )
    if on.type != "cuda":
        table.not_run = "needs a GPU"
        return table
    arch, processors = launch.arch(on), launch.sm_count(on)
    for programs in (count for count in PROGRAMS if count <= processors):
        row = {"programs": programs, "kB published": programs * ROWS * BATCH * 4 / 1e3}
        table.rows.append(row)
        # kernels.training.exchange.check_programs says why AMD has no words
        for exchange in EXCHANGES if arch.startswith("sm_") else ("counter",):
            try:
                row[f"{exchange} µs"] = microseconds(exchange, programs, on)
            except Exception as error:  # the other rows are still timed
                row[f"{exchange} µs"], row["why not"] = None, one_line(error)
                table.failed = table.failed or f"{exchange}, {programs} programs: {row['why not']}"
    table.note = (
        f"{STEPS:,} exchanges in a launch. What every program received is checked. 13 programs "
        "share the reference network."
    )
    figures = {
        kind: row.get(f"{kind} µs")
        for row in table.rows
        if row["programs"] == 13
        for kind in EXCHANGES
    }
    table.headline = "13 programs: " + ", ".join(
        f"{kind} {value:.2f} µs" for kind, value in figures.items() if value
    )
    return table
