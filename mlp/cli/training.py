"""`train`: makes a run folder from options."""

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import progress, recipes, schedule, scoring, together
from ..data.dataset import require
from ..engines.epochwise import Epoch
from ..engines.stepwise import Diverged
from ..runs import CONFIG, TIMES, Facts, RunFolder, Settings, logs, report
from ..runs.disk import BusyError, write_text
from ..trainer import Trainer, line
from . import comparing, devices, options, results, setup, tables
from .options import Values, given
from .terminal import complain, say
from .versions import git_state, typed, versions


class Job(NamedTuple):
    """A training that is ready to start."""

    settings: Settings
    data: setup.Data
    trainer: Trainer
    epochs: int
    loading: float  # seconds until it was ready

    @property
    def recipe(self) -> recipes.Recipe:
        """The recipe: the network and the settings of its training."""
        return self.settings.recipe


def train(values: Values) -> None:
    """Train a network, print one line for each epoch, and write a run folder."""
    require("matplotlib", "matplotlib", "drawing curves.png")
    if values["plots"]:
        require("sklearn", "scikit-learn", "drawing with --plots")
    if devices.world() > 1:
        with devices.joined():
            _share(values)
    elif values["seeds"] is not None:
        _several(values)
    elif values["resume"]:
        _resume(values)
    else:
        _begin(values)


def _share(values: Values) -> None:
    """This process's part of a run on several devices. Only rank 0 prints and writes."""
    if values["seeds"] is not None:
        raise ValueError("--seeds trains on one device; leave torchrun out")
    if devices.rank() == 0:
        (_resume if values["resume"] else _begin)(values)
        return
    job: Job | None
    if values["resume"]:
        job = _continued(_stored_job(values), RunFolder(values["out"]), values, writes=False)
    else:
        job = _job(_new_settings(values), _loss_chosen(values))
    if job is not None:
        _train(job)


def _train(job: Job, **told: Any) -> None:
    """Train. told: functions that `Trainer.fit` calls, by its names."""
    recipe, data = job.recipe, job.data
    job.trainer.fit(
        data.train,
        job.epochs,
        recipe.batch_size,
        data.test,
        job.settings.seed,
        drop_last=recipe.drop_last,
        scheduler=recipe.scheduler(len(data.train)),
        early_stopping=recipe.early_stopping,
        augment=recipe.augment,
        validation=data.validation,
        **told,
    )


def _loss_chosen(values: Values) -> bool:
    return values["loss"] is not None or bool(given(options.LOSS, values))


def _several(values: Values) -> None:
    """Train one run for each seed, in one folder each, and print the mean of their scores."""
    if values["resume"]:
        raise ValueError("--seeds starts runs, but --resume goes on with one; give one of the two")
    logs.known(values["log"] or "")
    first = values["seed"] or 0
    name = Path((values["dataset"] or "digits").split(",")[0]).stem
    base = values["out"] or Path("runs") / f"{name}-seeds"
    paths = {seed: base / f"seed-{seed}" for seed in range(first, first + values["seeds"])}
    for path in paths.values():
        RunFolder(path).refuse_if_taken(values["force"])
    one = _job(_new_settings({**values, "seed": first}), _loss_chosen(values))
    reason = _not_together(one, len(paths))
    if reason is None:
        _together(values, paths, one.data)
    else:
        if len(paths) > 1:
            say(f"one seed after another: {reason}")
        for seed, path in paths.items():
            _begin({**values, "seed": seed, "out": path})
    say(comparing.spread([*paths.values()]))


def _not_together(job: Job, seeds: int) -> str | None:
    """The reason why so many networks like this one are not trained together, or None."""
    if seeds == 1:
        return "there is one seed"
    if job.recipe.augment:
        return "--augment moves the images of each seed in another way"
    left = job.epochs * -(-len(job.data.train) // job.recipe.batch_size)
    return together.refusal(job.trainer, job.recipe.batch_size, seeds * left)


def _together(values: Values, paths: dict[int, Path], found: setup.Data) -> None:
    """Train one run for each seed. An epoch of all is one launch, or on a CPU one call."""
    pack = together.Together()
    with contextlib.ExitStack() as stack:
        jobs, runs = [], []
        for seed, path in paths.items():
            settings = _new_settings({**values, "seed": seed})
            jobs.append(_job(settings, _loss_chosen(values), found, pack))
            runs.append(stack.enter_context(RunFolder.writing(path)))
            runs[-1].begin(setup.located(settings), values["force"])
        _say(jobs[0], f"; seeds {min(paths)} to {max(paths)} together")
        bar = stack.enter_context(progress.bar(sum(map(_steps, jobs)), "step"))
        started = time.perf_counter()
        pack.call(
            [
                partial(_run, job, run, values, bar, f"seed {seed}: ")
                for seed, job, run in zip(paths, jobs, runs, strict=True)
            ]
        )
    say(f"trained {len(jobs)} networks in {time.perf_counter() - started:.1f} s")


def _begin(values: Values) -> None:
    """Start a run. Everything is checked before anything is written."""
    logs.known(values["log"] or "")
    begin(_new_settings(values), values, _loss_chosen(values))


def begin(settings: Settings, values: Values, loss_chosen: bool) -> Path:
    """Train with these settings into a new run folder, and return its path.

    values: holds out, force, plots and log.
    """
    if values["out"] is not None:
        RunFolder(values["out"]).refuse_if_taken(values["force"])
    job = _job(settings, loss_chosen)
    with _new_folder(values["out"], settings.dataset) as run:
        run.begin(setup.located(settings), values["force"])
        _alone(job, run, values)
        return run.path


def _resume(values: Values) -> None:
    """Go on with a run, with its stored settings."""
    job = _stored_job(values)
    with RunFolder.writing(values["out"]) as run:
        going = _continued(job, run, values, writes=True)
        if going is not None:
            _alone(going, run, values)
            return
        say(
            f"nothing to do: {run.path} has {len(job.trainer.history)} epochs; for more give "
            "--epochs"
        )


def _stored_job(values: Values) -> Job:
    """The training of a run folder, before its first epoch."""
    if values["out"] is None:
        raise ValueError("--resume needs --out, the run folder to go on with")
    if values["force"]:
        raise ValueError(
            "--resume goes on with a run, but --force replaces it; give one of the two"
        )
    settings = RunFolder(values["out"]).settings
    _refuse_changes(values, settings, values["out"] / CONFIG)
    for name in ("device", "engine"):
        if values[name] is not None:
            setattr(settings, name, values[name])
    with setup.settings_from(values["out"] / CONFIG):
        job = _job(setup.moved(settings, values), loss_chosen=True)
    _refuse_other_data(settings, job.data.facts)
    return job


def _continued(job: Job, run: RunFolder, values: Values, writes: bool) -> Job | None:
    """The training in the run's latest state, or None if it has all its epochs.

    writes: True if this process may print, and write to the folder.
    """
    epochs = job.recipe.epochs
    if run.trained:
        asked, note = (run.resume if writes else run.restore)(job.trainer)
        epochs = max(epochs, asked)
        if note and writes:
            complain(f"note: {note}")
    job = job._replace(epochs=values["epochs"] or epochs)
    _refuse_longer(job)
    return job if len(job.trainer.history) < job.epochs else None


def _refuse_longer(job: Job) -> None:
    """ValueError if the run would go on after the end of its schedule."""
    recipe = job.recipe
    if job.epochs > recipe.epochs and schedule.known(recipe.schedule).ends:
        raise ValueError(
            f"schedule {recipe.schedule} of this run ends at epoch {recipe.epochs}, got --epochs "
            f"{job.epochs}; train into another --out"
        )


def _new_settings(values: Values) -> Settings:
    """The settings of a new run."""
    name = values["recipe"] or "default"
    rows = (*options.RECIPE, *options.LOSS, *options.OPTIMIZER)
    changes = given(rows, values)
    stored = given(options.RUN, values)
    if "data_dir" in stored:
        stored["data_dir"] = str(stored["data_dir"])
    return Settings(
        values["dataset"] or "digits",
        recipes.changed(recipes.get(name), **changes),
        name,
        versions=versions(),
        command=list(typed),
        git=git_state(),
        **stored,
    )


def _refuse_changes(values: Values, settings: Settings, path: Path) -> None:
    """ValueError if an option differs from the stored settings of the run. It names the option.

    Device, engine, the place of the data, and the number of epochs may differ.
    """
    recipe = settings.recipe
    stored = {
        "recipe": settings.recipe_name,
        **{row.name: getattr(recipe, row.name) for row in options.RECIPE},
        **{row.name: recipe.loss_options.get(row.name) for row in options.LOSS},
        **{row.name: recipe.optimizer_options.get(row.name) for row in options.OPTIMIZER},
        **{row.name: getattr(settings, row.name) for row in options.RUN},
    }
    rows = (
        options.NAMED_RECIPE,
        *options.RECIPE,
        *options.LOSS,
        *options.OPTIMIZER,
        *options.RUN,
    )
    for row in rows:
        value = values[row.name]
        if value is not None and value != stored[row.name] and not row.may_change:
            raise ValueError(
                f"{row.flag} cannot be changed by --resume, which goes on with the settings in "
                f"{path} ({row.name} {stored[row.name]}); leave it out, or train into another --out"
            )


def _refuse_other_data(settings: Settings, found: Facts) -> None:
    """ValueError if these are not the data on which the run was trained."""
    change = setup.change_of_data(settings, found)
    if change:
        raise ValueError(f"{change}; train into another --out")


def _job(
    settings: Settings,
    loss_chosen: bool,
    found: setup.Data | None = None,
    pack: together.Together | None = None,
) -> Job:
    """A training, with everything checked.

    loss_chosen: the user chose the loss. Otherwise a loss that fits the targets is taken. found:
    the data, if they were read before for another seed. pack: trains it along with others.
    """
    started = time.perf_counter()
    on = setup.pick_device(settings.device)
    arithmetic = setup.pick_precision(settings.precision)
    found = setup.suited(settings, found or setup.load_run(settings), loss_chosen)
    if not found.test.is_classification:
        require("sklearn", "scikit-learn", "measuring a regression")
    recipe = settings.recipe
    model = setup.build(settings, found.train, on)
    trainer = Trainer(
        model,
        recipe.make_loss(),
        recipe.make_optimizer,
        settings.engine if pack is None else Epoch.name,
        verbose=False,
        precision=arithmetic.training,
        clip_norm=recipe.clip_norm,
    )
    trainer.together = None if pack is None else pack.train
    recipe.scheduler(len(found.train))  # raises now what `fit` would raise
    trainer.check(
        found.train,
        recipe.epochs,
        recipe.batch_size,
        found.test,
        drop_last=recipe.drop_last,
        augment=recipe.augment,
        validation=found.validation,
    )
    settings.data = settings.data or found.facts
    return Job(settings, found, trainer, recipe.epochs, time.perf_counter() - started)


@contextlib.contextmanager
def _new_folder(out: Path | None, dataset: str) -> Iterator[RunFolder]:
    """`out`, or runs/NAME, or the first runs/NAME-2, -3, … that is free."""
    if out is not None:
        with RunFolder.writing(out) as run:
            yield run
        return
    stem = Path("runs") / Path(dataset.split(",")[0]).stem
    number = 1
    while True:
        path = stem if number == 1 else stem.with_name(f"{stem.name}-{number}")
        number += 1
        if path.exists():
            continue
        with contextlib.ExitStack() as stack:
            try:
                run = stack.enter_context(RunFolder.writing(path))
            except BusyError:  # another process has just taken the name
                continue
            yield run
            return


def _say(job: Job, more: str = "") -> None:
    """Print two lines about the data and the network."""
    trainer, model = job.trainer, job.trainer.model
    count = sum(p.numel() for p in model.parameters())
    setup.say_notes(job.data.train)
    say(job.data.said)
    say(
        f"{job.recipe.describe(model.config())}; {count:,} parameters; {trainer.engine_note}; "
        f"{trainer.device}{more}"
    )


def _steps(job: Job) -> int:
    """The count of steps in the epochs that are left."""
    remaining = job.epochs - len(job.trainer.history)
    return remaining * -(-len(job.data.train) // job.recipe.batch_size)


def _alone(job: Job, run: RunFolder, values: Values) -> None:
    """Describe the training, train, and draw."""
    _say(job)
    with progress.bar(_steps(job), "step") as bar:
        _run(job, run, values, bar)


def _run(job: Job, run: RunFolder, values: Values, bar: Any, name: str = "") -> None:
    """Train and draw. name: the beginning of each line."""
    trainer = job.trainer
    started = time.perf_counter()
    watch = _Watch(job, run, bar, name)
    writing = _fit(job, run, watch, logs.known(values["log"] or ""))
    trained = time.perf_counter()
    if trainer.history:
        report.curves(trainer.history, run.path / "curves.png")
    phases = {"load": job.loading, **trainer.times, "write": writing}
    phases["rest of the training"] = trained - started - sum([*phases.values()][1:])
    phases["draw"] = time.perf_counter() - trained
    write_text(run.path / TIMES, json.dumps(phases) + "\n")
    seconds = sum(row["seconds"] for row in trainer.history)
    watch.say(f"trained {seconds:.1f} s; run folder {run.path}")
    if values["plots"]:
        results.draw(run, job.recipe, job.data.test, trainer.model)


class _Watch:
    """Records, logs and prints each epoch. seconds: the time that this took."""

    def __init__(self, job: Job, run: RunFolder, bar: Any, name: str):
        self.job, self.run, self.bar, self.name = job, run, bar, name
        self.log: list[Any] = []
        self.seconds = 0.0

    def __call__(self, row: dict[str, Any]) -> None:
        trainer, started = self.job.trainer, time.perf_counter()
        quality = tables.epoch_quality(trainer, self.job.data)
        row.update(quality)
        self.run.record(trainer, self.job.epochs)
        for one in self.log:
            one.write(trainer.history, float(trainer.optimizer.param_groups[0]["lr"]))
        self.bar.set_postfix_str(f"loss {row['train_loss']:.4f}", refresh=False)
        self.say(line(row) + scoring.line(quality))
        self.seconds += time.perf_counter() - started

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        with self.bar.external_write_mode(file=sys.stdout):
            say(self.name + text)


def _fit(job: Job, run: RunFolder, watch: _Watch, log: list[str]) -> float:
    """Train, and record every epoch. Returns the seconds for writing and printing them."""
    trainer, bar = job.trainer, watch.bar
    with contextlib.ExitStack() as stack:
        watch.log = [
            stack.enter_context(contextlib.closing(logs.LOGS[name](run.path, trainer.history)))
            for name in log
        ]
        try:
            _train(job, on_epoch=watch, on_step=None if bar.disable else bar.update)
        except Diverged:  # the trainer has restored the state after the epoch before
            run.flush()
            raise
    if trainer.stopping is not None:
        run.record(trainer, job.epochs)  # with the best weights
        best, epoch = trainer.stopping.best, trainer.stopping.epoch
        part = trainer.stopping.part
        watch.say(f"best {part} loss {best:.4f} at epoch {epoch}: its weights are kept")
    flushed = time.perf_counter()
    run.flush()
    return watch.seconds + time.perf_counter() - flushed
