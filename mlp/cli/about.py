"""`recipes` and `info`: the known names, and the machine and packages in use."""

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

import kernels

from .. import data
from ..data import files, frames, tables
from ..engines import ENGINES
from ..recipes import LOSSES, OPTIMIZERS, RECIPES, Recipe
from ..runs import logs
from ..schedule import SCHEDULES
from .exporting import FORMATS
from .options import Values
from .setup import PRECISIONS, pick_device
from .terminal import say
from .versions import versions


def recipes() -> None:
    """Print every recipe with all its settings, then the names that options take."""
    for name, recipe in RECIPES.items():
        say(f"{name}: {recipe.about}")
        for setting in settings_of(recipe):
            say(f"    {setting}")
    say(
        f"DATASET: {', '.join(data.NAMES)}; a table, {frames.known()}; arrays, "
        f"{', '.join(files.READERS)}; or a folder of images"
    )
    known: dict[str, Iterable[str]] = {
        "activation": kernels.ACTIVATIONS,
        "loss": LOSSES,
        "optimizer": OPTIMIZERS,
        "schedule": SCHEDULES,
        "engine": ["auto", *ENGINES],
        "precision": PRECISIONS,
        "task": tables.TASKS,
        "log": logs.LOGS,
        "format": FORMATS,
    }
    for option, names in known.items():
        say(f"--{option}: {', '.join(names)}")


def settings_of(recipe: Recipe) -> list[str]:
    """The fields of a recipe, each with its value, as text."""
    return [
        f"{field.name} {_value(getattr(recipe, field.name))}"
        for field in dataclasses.fields(recipe)
        if field.name != "about"
    ]


def _value(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {number}" for key, number in value.items()) or "none"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not set" if value is None else str(value)


def info(values: Values) -> None:
    """Print versions, device and backends. With --check, compare every kernel with float64."""
    say("  ".join(f"{name} {version}" for name, version in versions().items()))
    if Path(kernels.__file__).parent.parent != Path(__file__).parents[2]:
        say(f"warning: `kernels` is imported from {kernels.__file__}, which is not handgrad's")
    device = pick_device("auto")
    cpu = f"cpu, {torch.get_num_threads()} threads"
    say(f"device {torch.cuda.get_device_name(device) if device.type == 'cuda' else cpu}")
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        backend = kernels.backend(torch.empty(0, device=device, dtype=dtype))
        say(
            f"{dtype}: {', '.join(kernels.OPERATIONS)} by "
            f"{'Triton kernels' if backend == 'triton' else 'the torch reference'}"
        )
    if values["check"]:
        _check(device)
    else:
        say("`handgrad info --check` tries every kernel against its float64 reference")


def _check(device: torch.device) -> None:
    from kernels import selfcheck

    say(
        "self-check: kernels "
        + ("on the GPU" if device.type == "cuda" else "in Triton's interpreter")
        + " against float64"
    )
    say(selfcheck.HEADER)
    if not selfcheck.run(say):
        raise ValueError(
            "self-check failed: a kernel errs more than twice as much as plain torch; see the table"
        )
