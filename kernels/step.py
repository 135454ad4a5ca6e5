"""A training step in two launches that a CUDA graph can replay: formulas in `network`.

    input pass   programs own rows of w_1: they apply the update of the step before, from its dz_1,
                 and compute this
                 step's y_1, in one reading of w_1
    head         one program: layers 2 … L, loss, backward, their updates; leaves dz_1 for the next
                 pass

The update of w_1 is thus one step behind the rest until `flush`. Everything that changes from step
to step is in device memory: which batch is next, whether an update is pending and on which rows of
the data, the learning rate, Adam's count. So the same two launches serve every step. Past the end
of the permutation a step takes no batch and only applies what is pending: a captured sequence may
overrun the epoch, and one step more than there are batches completes it.
"""

import dataclasses

import torch
import triton
import triton.language as tl

from . import launch
from .layers import backward_layer, batch_rows, first_tile, top
from .network import Spec, check_training, inputs_ref, plan, step_ref
from .optim import Parameters, numbers_at


@triton.jit
def step_input_kernel(
    y_ptr,
    dz_ptr,
    net,
    x_ptr,
    i_ptr,
    pending_ptr,
    position_ptr,
    hyper_ptr,
    count_ptr,
    n,
    batch,
    scale,
    shift,
    ACT: tl.constexpr,
    OUT: tl.constexpr,
    NET: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program g: rows g·ROWS … of w_1. position = (next batch, rows of the batch whose update is
    pending, 0 for none).
    """
    offs_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows, mask_m = batch_rows(i_ptr, tl.load(position_ptr), n, batch, NET)
    offs_m = tl.arange(0, NET.block_m)
    pending = tl.load(position_ptr + 1)
    rows_before = tl.load(pending_ptr + offs_m, mask=offs_m < pending, other=0)
    numbers = numbers_at(hyper_ptr, tl.load(count_ptr).to(tl.float32), NET)
    first_tile(
        y_ptr,
        dz_ptr,
        net,
        tl.full((), 0, tl.int64),
        x_ptr,
        rows,
        mask_m,
        rows_before,
        offs_m < pending,
        pending > 0,
        offs_n,
        numbers,
        scale,
        shift,
        ACT,
        OUT,
        NET,
    )


@triton.jit
def step_head_kernel(
    loss_ptr,
    correct_ptr,
    y_ptr,
    dz_ptr,
    net,
    t_ptr,
    i_ptr,
    pending_ptr,
    position_ptr,
    hyper_ptr,
    count_ptr,
    n,
    batch,
    ACT: tl.constexpr,
    ACT_BWD: tl.constexpr,
    OUT: tl.constexpr,
    OUT_BWD: tl.constexpr,
    NET: tl.constexpr,
):
    """The rest of the step, by one program, which also moves on to the next batch, if this one had
    any rows.
    """
    L: tl.constexpr = len(NET.sizes) - 1
    r = tl.full((), 0, tl.int64)
    t = tl.load(position_ptr)
    count = tl.load(count_ptr).to(tl.float32)
    rows, mask_m = batch_rows(i_ptr, t, n, batch, NET)
    taken = tl.sum(mask_m.to(tl.int32), axis=0)
    if taken > 0:
        numbers = numbers_at(hyper_ptr, count + 1.0, NET)
        top(
            y_ptr,
            dz_ptr,
            loss_ptr + t,
            correct_ptr + t,
            net,
            r,
            t_ptr,
            rows,
            mask_m,
            numbers,
            True,
            ACT,
            OUT,
            OUT_BWD,
            NET,
        )
        for j in tl.static_range(L - 1):
            backward_layer(y_ptr, dz_ptr, net, r, numbers, L - j, True, ACT_BWD, NET)
        tl.store(pending_ptr + tl.arange(0, NET.block_m), rows)
        tl.store(position_ptr, t + 1)
        tl.store(count_ptr, count + 1.0)
    tl.store(position_ptr + 1, taken)


@dataclasses.dataclass
class StepState:
    """What the two launches of a step read and write, in memory that stays where it is. Arguments
    as in `train_epoch`.

    losses, correct: (steps,) for the batches of `indices`. To go on with another epoch: `flush`,
    write the new permutation into `indices`, and `position.zero_()`. `hyper` and `count` may be
    written at any time.
    """

    spec: Spec
    parameters: list
    states: list
    data: torch.Tensor
    targets: torch.Tensor
    indices: torch.Tensor
    batch: int
    hyper: torch.Tensor
    count: torch.Tensor
    losses: torch.Tensor
    correct: torch.Tensor
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        check_training(
            "graph", self.spec, self.parameters, self.states, self.data, self.targets, self.batch
        )
        steps = -(-len(self.indices) // self.batch)
        for name in ("losses", "correct"):
            if len(getattr(self, name)) < steps:
                raise ValueError(
                    f"graph: {name} must hold {steps} steps, got {len(getattr(self, name))}"
                )
        layers, device = len(self.spec.sizes) - 1, self.data.device
        self.made, self.rows, self.input_options = plan(
            self.spec, self.batch, self.targets, "step_input"
        )
        _, _, self.head_options = plan(self.spec, self.batch, self.targets, "step_head")
        self.y, self.dz = torch.empty(
            (2, layers, self.made.block_m, self.made.pitch), device=device
        )
        self.pending = torch.zeros(self.made.block_m, dtype=torch.int64, device=device)
        self.position = torch.zeros(2, dtype=torch.int32, device=device)


def train_step_ref(state: StepState, n: int) -> None:
    """The reference of `train_step`: nothing is left pending."""
    t = int(state.position[0])
    rows = state.indices[:n][t * state.batch : (t + 1) * state.batch].long()
    if len(rows):
        x = inputs_ref(state.data, rows, state.scale, state.shift, state.parameters[0].dtype)
        state.count += 1
        state.losses[t], state.correct[t] = step_ref(
            state.spec,
            state.parameters,
            state.states,
            x,
            state.targets[rows],
            state.hyper.tolist(),
            int(state.count),
        )
        state.position[0] += 1


def train_step(state: StepState, *, n: int | None = None) -> None:
    """One step in two launches: the next batch's forward, loss, backward and updates, w_1's update
    being the pending one.

    Writes losses[t], correct[t] and moves on; past the end it only applies the pending update. No
    host synchronisation.
    """
    n = len(state.indices) if n is None else n
    if launch.backend(*state.parameters) == "torch":
        return train_step_ref(state, n)
    net = Parameters(tuple(state.parameters), tuple(map(tuple, state.states)))
    where = (state.indices, state.pending, state.position, state.hyper, state.count, n, state.batch)
    options = {k: v for k, v in state.input_options.items() if not k.endswith("_BWD")}
    launch.run(
        step_input_kernel,
        (triton.cdiv(state.spec.sizes[1], state.rows),),
        state.y,
        state.dz,
        net,
        state.data,
        *where,
        float(state.scale),
        float(state.shift),
        ROWS=state.rows,
        **options,
    )
    launch.run(
        step_head_kernel,
        (1,),
        state.losses,
        state.correct,
        state.y,
        state.dz,
        net,
        state.targets,
        *where,
        **state.head_options,
    )


def flush(state: StepState) -> None:
    """Apply the pending update of w_1, if there is one: before weights are read, saved or
    evaluated. May be repeated.
    """
    train_step(state, n=0)
