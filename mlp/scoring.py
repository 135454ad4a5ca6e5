"""Measures of predictions, by scikit-learn, and weights that make rare classes count.

The measures are R², MAE and RMSE of numbers, and F1, AUC and log loss of classes and labels.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy

from .data import Dataset, needs_extra

CLASS_WEIGHTS = ("balanced",)


def _sklearn() -> Any:
    try:
        from sklearn import metrics
    except ImportError:
        raise needs_extra("scikit-learn", "measuring predictions") from None
    return metrics


def numbers(predicted: numpy.ndarray, true: numpy.ndarray) -> dict[str, float]:
    """The measures of OF_NUMBERS of arrays (rows, targets), as means over the targets.

    R² is NaN for one row, and if a target is constant. All are NaN unless predictions are finite.
    """
    return _measured(OF_NUMBERS, predicted, true)


def classes(probabilities: numpy.ndarray, labels: numpy.ndarray) -> dict[str, float]:
    """The measures of OF_CLASSES of probabilities (rows, classes) and labels (rows,).

    F1 and AUC are means over the classes, each against all others. F1 leaves out classes that no
    row has and that are never predicted, as scikit-learn does. AUC is NaN if a class has no row.
    All are NaN unless all probabilities are finite.
    """
    # scikit-learn needs float64 rows that sum to 1. They sum to 0 if a network that was trained by
    # mse gives no positive output. Then it prefers no class.
    shares = probabilities.astype(numpy.float64)
    shares[shares.sum(1) == 0] = 1.0
    with numpy.errstate(invalid="ignore"):  # of probabilities that are not finite
        shares /= shares.sum(1, keepdims=True)
    return _measured(OF_CLASSES, shares, labels)


def several(probabilities: numpy.ndarray, truths: numpy.ndarray) -> dict[str, float]:
    """The measures of OF_LABELS of probabilities and truths (rows, labels), each truth 0 or 1.

    "exact" is the share of rows whose labels are all right. F1 and AUC are means over the labels.
    AUC is NaN if a label is constant. All are NaN unless all probabilities are finite.
    """
    return _measured(OF_LABELS, probabilities, truths.astype(int))


def one_label(probabilities: numpy.ndarray, truths: numpy.ndarray) -> dict[str, float]:
    """As `several` of one label, whose "exact" is "accuracy" here. Both arrays are (rows, 1)."""
    found = several(probabilities, truths)
    return {"accuracy": found.pop("exact"), **found}


def _measured(table: "dict[str, Measure]", predicted, true) -> dict[str, float]:
    """Each measure of a table. All are NaN unless all predictions are finite."""
    metrics = _sklearn()
    if not numpy.isfinite(predicted).all():
        return dict.fromkeys(table, math.nan)
    return {key: float(row.of(metrics, predicted, true)) for key, row in table.items()}


def _r2(metrics, predicted, true) -> float:
    varies = len(true) > 1 and bool((true.std(0) > 0).all())
    return metrics.r2_score(true, predicted) if varies else math.nan


def _mae(metrics, predicted, true) -> float:
    return metrics.mean_absolute_error(true, predicted)


def _rmse(metrics, predicted, true) -> float:
    return numpy.sqrt(((true - predicted) ** 2).mean(0)).mean()


def _f1_of_classes(metrics, shares, labels) -> float:
    return metrics.f1_score(labels, shares.argmax(1), average="macro", zero_division=0)


def _auc_of_classes(metrics, shares, labels) -> float:
    count = shares.shape[1]
    if count == 1 or len(set(labels.tolist())) < count:
        return math.nan
    scores = shares[:, 1] if count == 2 else shares
    return metrics.roc_auc_score(labels, scores, multi_class="ovr", labels=range(count))


def _log_loss(metrics, shares, labels) -> float:
    count = shares.shape[1]
    return metrics.log_loss(labels, shares, labels=range(count)) if count > 1 else 0.0


def _exact(metrics, probabilities, truths) -> float:
    return ((probabilities > 0.5) == truths).all(1).mean()


def _f1_of_labels(metrics, probabilities, truths) -> float:
    # One label alone would be taken for two classes, so each label is measured on its own.
    pairs = zip(truths.T, (probabilities > 0.5).astype(int).T)
    return numpy.mean([metrics.f1_score(t, said, zero_division=0) for t, said in pairs])


def _auc_of_labels(metrics, probabilities, truths) -> float:
    varies = bool((truths.min(0) != truths.max(0)).all())
    return metrics.roc_auc_score(truths, probabilities) if varies else math.nan


class Measure(NamedTuple):
    """A measure: its name for people, its format, and its value.

    of: (scikit-learn's metrics, predictions, what is true) -> a number. brief: True if the line of
    an epoch has it too. False if only `handgrad evaluate` prints it.
    """

    name: str
    form: str
    of: Callable[[Any, numpy.ndarray, numpy.ndarray], float]
    brief: bool = True


# To add a measure, write its function above and a row here. The key is its name in metrics.jsonl.
OF_NUMBERS = {
    "r2": Measure("R²", ".4f", _r2),
    "mae": Measure("MAE", ".5g", _mae, brief=False),
    "rmse": Measure("RMSE", ".5g", _rmse),
}
OF_CLASSES = {
    "f1": Measure("F1", ".4f", _f1_of_classes),
    "auc": Measure("AUC", ".4f", _auc_of_classes, brief=False),
    "log_loss": Measure("log loss", ".4f", _log_loss),
}
OF_LABELS = {
    "exact": Measure("all labels right", ".2%", _exact),
    "f1": Measure("F1", ".4f", _f1_of_labels),
    "auc": Measure("AUC", ".4f", _auc_of_labels, brief=False),
}
_OF_ONE_LABEL = {"accuracy": Measure("accuracy", ".2%", _exact)}
_TABLES = OF_NUMBERS, OF_CLASSES, OF_LABELS, _OF_ONE_LABEL


def _is_known(key: str) -> bool:
    return any(key in table for table in _TABLES)


def _row(key: str) -> Measure:
    return next(table[key] for table in _TABLES if key in table)


def brief(found: dict[str, float]) -> dict[str, float]:
    """Those of the measures that the line of an epoch has."""
    return {key: value for key, value in found.items() if _row(key).brief}


def line(found: dict[str, float]) -> str:
    """The measures as text, each after two spaces. One that is not finite is "not defined".

    A word before the key, such as validation in validation_r2, is kept.
    """
    said = []
    for key, value in found.items():
        part, short = ("", key) if _is_known(key) else key.split("_", 1)
        row = _row(short)
        text = f"{value:{row.form}}" if math.isfinite(value) else "not defined"
        said.append(f"  {part} {row.name} {text}" if part else f"  {row.name} {text}")
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
