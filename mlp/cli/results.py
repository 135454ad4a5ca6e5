"""`evaluate`, `report` and `predict`: uses of a finished run."""

import math
from pathlib import Path
from typing import Any

import torch

from .. import data, metrics, recipes
from ..modules import ends
from ..runs import CONFIG, RunFolder, Settings, page
from ..runs import report as pictures
from ..runs.checkpoint import config_of
from ..runs.disk import CheckpointError
from ..trainer import Trainer
from . import comparing, setup, tables
from .options import Values
from .terminal import complain, say


def _open(values: Values) -> tuple[Settings, data.Dataset, torch.nn.Module]:
    """(settings, test data, network on its device) of a run folder."""
    run = RunFolder(values["run"])
    settings = setup.moved(run.settings, values)
    on = setup.pick_device(values["device"])
    with setup.settings_from(run.path / CONFIG):
        setup.pick_precision(settings.precision)
        found = setup.suited(settings, setup.load_run(settings), loss_chosen=True)
        settings.recipe.make_loss()
    change = setup.change_of_data(settings, found.facts)
    if change and settings.data is not None:
        complain(f"note: {change}")
        settings.data.reading.check_same(found.facts.reading, settings.dataset)
    return settings, found.test, _network(run, on)


def _network(run: RunFolder, device: torch.device) -> torch.nn.Module:
    model, note = run.network(device)
    if note:
        complain(f"note: {note}")
    return model


def evaluate(values: Values) -> None:
    """Print loss and accuracy of a trained network on its test data: top-1, top-k, by class."""
    settings, test_set, model = _open(values)
    _check_top(values["top"], test_set)
    trainer = Trainer(model, settings.recipe.make_loss(), engine="autograd", verbose=False)
    result = trainer.evaluate(test_set)
    say(f"{test_set.name}: {len(test_set):,} samples, loss {result['test_loss']:.4f}")
    if test_set.is_classification:
        top = values["top"] or min(5, len(test_set.classes))
        scores = metrics.probabilities(model, trainer.loss, test_set)
        measured = metrics.classification(scores, test_set, top)
        say(f"accuracy {measured['accuracy']:.2%}, top-{measured['k']} {measured['top_k']:.2%}")
        for name, share in measured["per_class"].items():
            say(f"  {name:<20} {'no samples' if share is None else f'{share:.2%}'}")
    for line in tables.quality_lines(settings, trainer, test_set):
        say(line)


def _check_top(top: int | None, test_set: data.Dataset) -> None:
    """ValueError if the data have no classes, or fewer."""
    if top is None:
        return
    if not test_set.is_classification:
        raise ValueError(
            f"--top {top} is for classes, but {test_set.name} has numbers; leave it out"
        )
    if top > len(test_set.classes):
        count = len(test_set.classes)
        raise ValueError(f"--top must be at most {count}, the number of classes, got {top}")


def report(values: Values) -> None:
    """Draw a run: curves, test images with predictions, confusion matrix, first-layer weights.

    For several runs, print one table and draw one figure.
    """
    path, *more = values["runs"]
    if more:
        if values["html"]:
            raise ValueError("--html writes the page of one run, got several")
        comparing.compare(values["runs"], values["out"])
        return
    if values["out"] is not None:
        raise ValueError("--out is for the figure of several runs; those of one lie in its folder")
    settings, test_set, model = _open({**values, "run": path})
    run = RunFolder(path)
    if values["html"]:
        say(_page(run, settings, test_set, model))
        return
    for picture in draw(run, settings.recipe, test_set, model):
        say(picture)


def draw(run: RunFolder, recipe: recipes.Recipe, test_set: data.Dataset, model: Any) -> list[Path]:
    """Draw every picture that suits a run, and return the paths."""
    paths = _pictures(run, recipe, test_set, model, run.path, ".png")
    return paths + tables.draw(run, recipe, test_set, model)


def _pictures(run, recipe, test_set: data.Dataset, model, folder: Path, suffix: str) -> list[Path]:
    scores = measured = None
    if test_set.is_classification:
        scores = metrics.probabilities(model, recipe.make_loss(), test_set)
        measured = metrics.classification(scores, test_set, 1)
    return pictures.write_all(run.history, model, scores, measured, test_set, folder, suffix)


def _page(run: RunFolder, settings: Settings, test_set: data.Dataset, model) -> Path:
    """Write report.html."""
    recipe = settings.recipe
    said = {
        "data": settings.dataset,
        "network and training": recipe.describe(config_of(model) or {}),
        "seed": settings.seed,
        "engine": settings.engine,
        "device": settings.device,
        "precision": settings.precision,
        "command": settings.command,
        "git": settings.git or "none",
        "versions": settings.versions,
    }
    return page.write(
        run.path,
        said,
        run.history,
        lambda folder: _pictures(run, recipe, test_set, model, folder, ".svg"),
    )


def predict(values: Values) -> None:
    """Print the class of each image, and its probability.

    Images of another size are resized, with a note. For a run on rows of numbers, see
    `tables.predict`.
    """
    run, images = RunFolder(values["run"]), values["files"]
    settings, facts = run.settings, run.settings.data
    if facts is None:
        raise ValueError(f"{run.path / CONFIG} does not tell how inputs are read: train again")
    if facts.reading.image_shape is None:
        tables.predict(values)
        return
    if values["out"] is not None:
        raise ValueError(f"--out is for the predictions of a table; {run.path} reads images")
    dtype = setup.pick_precision(settings.precision).weights
    model = _network(run, setup.pick_device(values["device"]))
    features, outputs = ends(config_of(model) or {})
    shape = facts.reading.image_shape
    if (features, outputs) != (math.prod(shape), len(facts.classes)):
        raise CheckpointError(
            f"{run.path / CONFIG}: images of {shape} in {len(facts.classes)} classes "
            f"do not fit the network, which takes {features} numbers and has {outputs} outputs"
        )
    rows, notes = zip(*(data.open_image(path, facts.reading) for path in images))
    with torch.no_grad():
        x = facts.reading.numbers(torch.stack(rows), dtype)
        x = x.to(next(model.parameters()).device)
        scores = settings.recipe.make_loss().probabilities(model(x)).float().cpu()
    for path, note, score in zip(images, notes, scores):
        best = int(score.argmax())
        say(f"{path}: {facts.classes[best]} ({score[best]:.1%})" + (f", {note}" if note else ""))
