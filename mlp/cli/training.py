"""`train`: from options to a run folder."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

from .. import recipes, report
from ..checkpoint import RunFolder
from ..trainer import Trainer, line
from . import options, results
from .options import Values, given
from .setup import prepare
from .terminal import say
from .versions import versions


def _free_folder(source: str) -> Path:
    """runs/NAME, or the first runs/NAME-2, -3, … that does not exist."""
    stem = Path("runs") / Path(source.split(",")[0]).stem
    return next(
        p
        for n in range(1, 10**6)
        if not (p := stem if n == 1 else stem.with_name(f"{stem.name}-{n}")).exists()
    )


def _new_settings(values: Values) -> dict[str, Any]:
    """The settings of a run that begins."""
    changes = {**given(options.RECIPE, values), **given(options.OPTIMIZER, values)}
    chosen = recipes.changed(recipes.get(values["recipe"] or "default"), **changes)
    data_dir = values["data_dir"]
    return {
        "dataset": values["dataset"] or "digits",
        "data_dir": str(data_dir) if data_dir else None,
        "seed": values["seed"] or 0,
        "device": values["device"] or "auto",
        "engine": values["engine"] or "auto",
        "precision": values["precision"] or "fp32",
        "recipe": dataclasses.asdict(chosen),
        "versions": versions(),
    }


def _resumed(values: Values, run: RunFolder) -> dict[str, Any]:
    """The settings of a run that goes on; a ValueError that names an option which it cannot take
    any more.
    """
    settings = run.config
    rows = (options.NAMED_RECIPE, *options.RECIPE, *options.OPTIMIZER, *options.RUN)
    free = {"epochs", "data_dir", "device", "engine"}
    fixed = given(rows, values).keys() - free
    dataset = values["dataset"] or settings["dataset"]
    if fixed or dataset != settings["dataset"]:
        what = f"--{min(fixed).replace('_', '-')}" if fixed else f"the data set {dataset}"
        raise ValueError(
            f"{what} cannot be changed by --resume, which goes on with the settings in "
            f"{run.path / 'config.json'}: "
            "leave it out, or train into another --out"
        )
    return settings | {
        name: str(values[name]) for name in ("device", "engine", "data_dir") if values[name]
    }


def train(values: Values) -> None:
    """Train a network; prints a line an epoch and writes a run folder."""
    resume = values["resume"]
    if resume:
        if values["out"] is None:
            raise ValueError("--resume needs --out, the run folder to go on with")
        run = RunFolder(values["out"])
        settings = _resumed(values, run)
        settings["recipe"]["epochs"] = values["epochs"] or settings["recipe"]["epochs"]
    else:
        settings = _new_settings(values)
    chosen, train_set, test_set, on, dtype = prepare(settings)
    model = chosen.model(train_set, settings["seed"], on, dtype)
    trainer = Trainer(
        model, chosen.make_loss(), chosen.make_optimizer, settings["engine"], verbose=False
    )
    trainer.check(train_set, chosen.epochs, chosen.batch_size, test_set, drop_last=chosen.drop_last)
    if resume:
        run.resume(trainer)
        if len(trainer.history) >= chosen.epochs:
            say(
                f"nothing to do: {run.path} has {len(trainer.history)} epochs; for more give "
                "--epochs"
            )
            return
    else:
        run = RunFolder.create(values["out"] or _free_folder(settings["dataset"]), values["force"])
    settings["data"] = {
        "classes": list(train_set.classes),
        "image_shape": train_set.image_shape,
        "scale": train_set.scale,
        "shift": train_set.shift,
    }
    run.config = settings
    count = sum(p.numel() for p in model.parameters())
    say(
        f"{train_set.name}: {len(train_set):,} samples; {chosen.about}; {count:,} parameters; "
        f"{trainer.engine_note}; {on}"
    )
    _fit(trainer, chosen, train_set, test_set, settings["seed"], run)
    if values["plots"]:
        results.draw(run, chosen, test_set, model)


def _fit(trainer, recipe, train_set, test_set, seed, run):
    """Train with a progress bar, record every epoch, and draw the curves."""
    from tqdm import tqdm

    steps = -(-len(train_set) // recipe.batch_size)
    remaining = max(recipe.epochs - len(trainer.history), 0)
    with tqdm(
        total=steps * remaining, unit="step", leave=False, disable=None, file=sys.stderr
    ) as bar:

        def on_epoch(row):
            run.record(trainer)
            bar.write(line(row), file=sys.stdout)

        trainer.fit(
            train_set,
            recipe.epochs,
            recipe.batch_size,
            test_set,
            seed,
            drop_last=recipe.drop_last,
            on_epoch=on_epoch,
            on_step=None if bar.disable else bar.update,
        )
    if trainer.history:
        report.curves(trainer.history, run.path / "curves.png")
    say(f"trained {sum(row['seconds'] for row in trainer.history):.1f} s; run folder {run.path}")
