"""`evaluate`, `report` and `predict`: what a finished run is good for."""

from pathlib import Path

import torch

from .. import checkpoint, data, metrics, recipes
from .. import report as pictures
from ..checkpoint import RunFolder
from ..trainer import Trainer
from .options import Values
from .setup import pick_device, pick_precision, prepare
from .terminal import say


def _open(values: Values):
    """(settings, recipe, test data, model on its device) of a run folder."""
    settings = {**RunFolder(values["run"]).config, "device": values["device"]}
    settings["data_dir"] = str(values["data_dir"] or settings["data_dir"] or "") or None
    recipe, _, test_set, on, _ = prepare(settings)
    return settings, recipe, test_set, checkpoint.load(values["run"], on)


def evaluate(values: Values) -> None:
    """Loss and accuracy of a trained network on its test data: top-1, top-k and by class."""
    _, recipe, test_set, model = _open(values)
    trainer = Trainer(model, recipe.make_loss(), recipe.make_optimizer, "autograd", verbose=False)
    result = trainer.evaluate(test_set)
    say(f"{test_set.name}: {len(test_set):,} samples, loss {result['test_loss']:.4f}")
    if test_set.is_classification:
        top = values["top"] or min(5, len(test_set.classes))
        scores = metrics.probabilities(model, trainer.loss, test_set)
        measured = metrics.classification(scores, test_set, top)
        say(f"accuracy {measured['accuracy']:.2%}, top-{measured['k']} {measured['top_k']:.2%}")
        for name, share in measured["per_class"].items():
            say(f"  {name:<20} {'no samples' if share is None else f'{share:.2%}'}")


def report(values: Values) -> None:
    """Draw a run: curves, test images with predictions, confusion matrix, first-layer weights."""
    _, recipe, test_set, model = _open(values)
    for path in draw(RunFolder(values["run"]), recipe, test_set, model):
        say(path)


def draw(run: RunFolder, recipe: recipes.Recipe, test_set: data.Dataset, model) -> list[Path]:
    """Every picture that fits a run; the paths written."""
    scores = measured = None
    if test_set.is_classification:
        scores = metrics.probabilities(model, recipe.make_loss(), test_set)
        measured = metrics.classification(scores, test_set, 1)
    return pictures.write_all(run.history, model, scores, measured, test_set, run.path)


def predict(values: Values) -> None:
    """The class of each image, and its probability. Images of another size are resized, with a
    note.
    """
    run, images = values["run"], values["images"]
    settings = RunFolder(run).config
    facts, recipe = settings["data"], recipes.Recipe(**settings["recipe"])
    if facts["image_shape"] is None:
        raise ValueError(
            f"{run} was trained on rows of numbers, not on images: it cannot read {images[0]}"
        )
    model = checkpoint.load(run, pick_device(values["device"]))
    dtype = pick_precision(settings["precision"])
    pixels, notes = zip(*(data.open_image(path, tuple(facts["image_shape"])) for path in images))
    batch = data.Dataset(
        torch.stack(pixels),
        torch.zeros(len(pixels), dtype=torch.int64),
        tuple(facts["classes"]),
        scale=facts["scale"],
        shift=facts["shift"],
    )
    with torch.no_grad():
        x = batch.read(batch.inputs, dtype).to(next(model.parameters()).device)
        scores = recipe.make_loss().probabilities(model(x)).float().cpu()
    for path, note, score in zip(images, notes, scores):
        best = int(score.argmax())
        say(f"{path}: {facts['classes'][best]} ({score[best]:.1%})" + (f", {note}" if note else ""))
