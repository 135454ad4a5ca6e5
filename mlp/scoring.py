"""Measures of predictions, by scikit-learn, and weights that make rare classes count.

The measures are R², MAE and RMSE of numbers, and F1, AUC and log loss of classes and labels.
"""

import math
from dataclasses import replace
from typing import Any

import numpy

from .data import Dataset, needs_extra

# Key of a measure -> its name for people, and its format.
NAMES = {
    "r2": ("R²", ".4f"),
    "mae": ("MAE", ".5g"),
    "rmse": ("RMSE", ".5g"),
    "f1": ("F1", ".4f"),
    "auc": ("AUC", ".4f"),
    "log_loss": ("log loss", ".4f"),
    "exact": ("all labels right", ".2%"),
    "accuracy": ("accuracy", ".2%"),
}
CLASS_WEIGHTS = ("balanced",)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise needs_extra("scikit-learn", "measuring predictions") from None
    return metrics


def numbers(predicted: numpy.ndarray, true: numpy.ndarray) -> dict[str, float]:
    """{"r2", "mae", "rmse"} of arrays (rows, targets), as means over the targets.

    R² is NaN for one row, and if a target is constant. All are NaN unless predictions are finite.
    """
    metrics = _sklearn()
    if not numpy.isfinite(predicted).all():
        return dict.fromkeys(("r2", "mae", "rmse"), math.nan)
    varies = len(true) > 1 and bool((true.std(0) > 0).all())
    return {
        "r2": float(metrics.r2_score(true, predicted)) if varies else math.nan,
        "mae": float(metrics.mean_absolute_error(true, predicted)),
        "rmse": float(numpy.sqrt(((true - predicted) ** 2).mean(0)).mean()),
    }


def classes(probabilities: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    """{"f1", "auc", "log_loss"} of probabilities (rows, classes) and labels (rows,).

    F1 and AUC are means over the classes, each against all others. F1 leaves out classes that no
    row has and that are never predicted, as scikit-learn does. AUC is NaN if a class has no row.
    All are NaN unless all probabilities are finite.
    """
    metrics, count = _sklearn(), probabilities.shape[1]
    if not numpy.isfinite(probabilities).all():
        return dict.fromkeys(("f1", "auc", "log_loss"), math.nan)
    # scikit-learn needs float64 rows that sum to 1. They sum to 0 if a network that was trained by
    # mse gives no positive output. Then it prefers no class.
    shares = probabilities.astype(numpy.float64)
    shares[shares.sum(1) == 0] = 1.0
    shares = shares / shares.sum(1, keepdims=True)
    known = range(count)
    f1 = metrics.f1_score(labels, shares.argmax(1), average="macro", zero_division=0)
    auc = math.nan
    if count > 1 and len(set(labels.tolist())) == count:
        scores = shares[:, 1] if count == 2 else shares
        auc = float(metrics.roc_auc_score(labels, scores, multi_class="ovr", labels=known))
    loss = metrics.log_loss(labels, shares, labels=known) if count > 1 else 0.0
    return {"f1": float(f1), "auc": auc, "log_loss": float(loss)}


def several(probabilities: numpy.ndarray, truths: numpy.ndarray) -> dict[str, float]:
    """{"exact", "f1", "auc"} of probabilities and truths (rows, labels), where a truth is 0 or 1.

    "exact" is the share of rows whose labels are all right. F1 and AUC are means over the labels.
    AUC is NaN if a label is constant. All are NaN unless all probabilities are finite.
    """
    metrics = _sklearn()
    if not numpy.isfinite(probabilities).all():
        return dict.fromkeys(("exact", "f1", "auc"), math.nan)
    said, truths = (probabilities > 0.5).astype(int), truths.astype(int)
    varies = bool((truths.min(0) != truths.max(0)).all())
    # One label alone would be taken for two classes, so each label is measured on its own.
    f1 = [metrics.f1_score(t, s, zero_division=0) for t, s in zip(truths.T, said.T)]
    return {
        "exact": float((said == truths).all(1).mean()),
        "f1": float(numpy.mean(f1)),
        "auc": float(metrics.roc_auc_score(truths, probabilities)) if varies else math.nan,
    }


def one_label(probabilities: numpy.ndarray, truths: numpy.ndarray) -> dict[str, float]:
    """{"accuracy", "f1", "auc"} of one label, as `several`. Both arrays are (rows, 1)."""
    found = several(probabilities, truths)
    return {"accuracy": found.pop("exact"), **found}


def line(found: dict[str, float]) -> str:
    """The measures as text, each after two spaces. One that is not finite is "not defined".

    A word before the key, such as validation in validation_r2, is kept.
    """
    said = []
    for key, value in found.items():
        part, _, short = key.partition("_")
        if key in NAMES:
            part, short = "", key
        name, form = NAMES.get(short, (short, ".4f"))
        text = f"{value:{form}}" if math.isfinite(value) else "not defined"
        said.append(f"  {part} {name} {text}" if part else f"  {name} {text}")
    return "".join(said)


def weighted(recipe: Any, train: Dataset, class_weight: str | None) -> Any:
    """The recipe with a loss that weighs classes, or the recipe itself if `class_weight` is None.

    ValueError for an unknown `class_weight`, for targets that are no classes, for a class without
    rows, and for a loss without class weights.
    """
    if class_weight is None or "weight" in recipe.loss_options:
        return recipe
    if class_weight not in CLASS_WEIGHTS:
        raise ValueError(
            f"unknown class weight {class_weight!r}; known: {', '.join(CLASS_WEIGHTS)}"
        )
    if not train.is_classification:
        raise ValueError(
            f"{train.name}: --class-weight needs classes, but its targets are numbers; leave it out"
        )
    counts = train.class_counts().double()
    if not bool(counts.all()):
        raise ValueError(
            f"{train.name}: class {train.classes[int(counts.argmin())]} has no training rows, so "
            "it has no balanced weight; leave --class-weight out"
        )
    weight = (len(train) / (len(counts) * counts)).tolist()
    made = replace(recipe, loss_options={**recipe.loss_options, "weight": weight})
    try:
        made.make_loss()
    except TypeError:
        raise ValueError(
            f"--class-weight is for the loss cross_entropy, not for {recipe.loss}; leave it out"
        ) from None
    return made
