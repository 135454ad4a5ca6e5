"""What a training kernel knows at compile time, made from a run and the device's tiles."""

import dataclasses
import functools
from typing import Any

from .. import activations, configs, launch, losses, rules
from ..configs import padded
from .network import refusal
from .run import Run


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a training kernel knows at compile time, as one hashable constexpr.

    It holds the facts of a Spec, its functions, and the tiles.
    """

    sizes: tuple[int, ...]
    tiles: tuple[int, ...]  # columns of a layer that are computed at once
    bias: int  # 1 if the layers have biases, else 0
    act: Any  # jit scalars of the hidden layers' activation, see `activations`
    act_bwd: Any
    out: Any  # jit scalars of the last layer's activation
    out_bwd: Any
    keeps_z: bool  # True if act_bwd needs z
    out_needs_z: bool  # True if out_bwd needs z
    columns: tuple[str, ...]  # of a row of hyperparameters
    scheduled: bool  # True if there is such a row for each step
    at: Any  # the rule's jit functions, see `rules`
    update: Any
    loss: losses.Loss
    loss_numbers: tuple[float, ...]
    loss_scale: float
    loss_mean: bool
    soft: bool  # targets are (n, classes) numbers, not labels
    precision: str
    block_m: int  # batch rows, padded
    block_k: int  # input features that are read at once
    block_r: int  # terms that are added at once in a sum over a hidden layer's units
    pitch: int  # row length of the scratch that holds y_l and dz_l
    threads: int  # of a program; if a tile has fewer elements, several threads hold each

    @functools.cached_property
    def cache_key(self) -> str:
        """The key of this constexpr in Triton's cache on disk. It covers the functions' source."""
        return rules.key_of(*(getattr(self, field.name) for field in dataclasses.fields(self)))


def plan(run: Run, kernel: str) -> tuple[Plan, int, dict]:
    """(Plan, rows of w_1 of each program, launch options) of `kernel` on the run's device."""
    spec, block_m = run.spec, padded(run.batch)
    precision, arch = launch.dot_precision(), launch.arch(run.device)
    hidden, output = activations.get(spec.activation), activations.get(spec.output_activation)
    states = len(spec.rule.states)
    config = configs.training(kernel, arch, precision, states, spec.sizes, block_m)
    sides = [padded(size) for size in spec.sizes]
    planned = Plan(
        sizes=tuple(spec.sizes),
        tiles=(*(min(side, config.columns) for side in sides[:-1]), sides[-1]),
        bias=int(spec.bias),
        act=hidden.forward,
        act_bwd=hidden.backward,
        out=output.forward,
        out_bwd=output.backward,
        keeps_z=hidden.needs_z and len(spec.sizes) > 2,
        out_needs_z=output.needs_z,
        columns=spec.rule.columns,
        scheduled=run.scheduled,
        at=spec.rule.at,
        update=spec.rule.update,
        loss=spec.loss,
        loss_numbers=spec.loss_numbers,
        loss_scale=float(spec.loss_scale),
        loss_mean=spec.loss_mean,
        soft=run.targets.is_floating_point(),
        precision=precision,
        block_m=block_m,
        block_k=config.block_k,
        block_r=config.block_r,
        pitch=max(sides[1:]),
        threads=config.num_warps * launch.lanes(arch),
    )
    options = dict(NET=planned, num_warps=config.num_warps, num_stages=config.num_stages)
    if arch.startswith("sm_"):
        # Without it, ptxas may stop at 128 registers, so that a second block fits, and spill.
        options["maxnreg"] = min(255, 2048 // config.num_warps)
    return planned, min(config.rows, sides[1]), options


def refuse(run: Run, engine: str) -> None:
    """Raises a ValueError if `refusal` gives a reason."""
    if reason := refusal(run.spec, run.batch, engine):
        raise ValueError(reason)
