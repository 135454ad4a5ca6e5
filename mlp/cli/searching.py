"""`search`: settings by cross-validation on the training rows; the winner becomes a run.

Settings are ranked by folds of the training rows. The test rows have no part in the choice. At the
end they measure the ensemble and the winner's run.
"""

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy

from .. import recipes
from ..data.dataset import Dataset, needs_extra, require
from ..runs import TRIALS, RunFolder, report
from ..runs.disk import write_text
from . import setup, training
from .options import Values
from .terminal import complain, say

_PICTURE = "search.png"
_BEST = 10  # the ensemble is chosen from so many best settings
_WIDTHS = (16, 32, 64, 128)


def _space() -> dict[str, Any]:
    """The space of the search: lists, and distributions of scipy."""
    from scipy.stats import loguniform

    return {
        "hidden_layer_sizes": [(n,) for n in _WIDTHS]
        + [(n, m) for n in _WIDTHS for m in _WIDTHS if m <= n],
        "activation": ["relu", "tanh"],
        "learning_rate_init": loguniform(3e-4, 3e-2),
        "alpha": loguniform(1e-6, 1.0),
        "batch_size": [16, 32, 64, 128],
    }


def search(values: Values) -> None:
    """Try settings, print a table and the ensemble's score, and train the winner."""
    try:
        from ..search import SearchCV
    except ModuleNotFoundError as missing:
        raise needs_extra("scikit-learn", f"a search ({missing.name})") from None
    require("matplotlib", "matplotlib", f"drawing {_PICTURE}")
    if values["out"] is not None:
        RunFolder(values["out"]).refuse_if_taken(values["force"])
    settings = setup.settings_of(values, recipes.PLAIN)
    found = setup.suited(settings, setup.load_run(settings), loss_chosen=False)
    setup.say_notes(found.train)
    say(found.said)
    x, y = _arrays(found.train)
    job = SearchCV(
        _estimator(found.train, values),
        _space(),
        cv=values["folds"],
        trials=values["trials"],
        scoring=values["scoring"],
        halving=values["halving"],
        random_state=values["seed"] % 2**32,
        verbose=int(sys.stderr.isatty()),
        devices=setup.pick_devices("auto", values["devices"]),
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        job.fit(x, y)
        _check_scores(job, [str(one.message) for one in said])
        _print(job, values["top"])
        _ensemble(job, found, values)
    settings.recipe, settings.recipe_name = _recipe(job, settings.recipe), "search"
    settings.seed = values["seed"]
    folder = training.begin(settings, {**values, "plots": False, "log": None}, loss_chosen=True)
    _write(job, folder)


def _arrays(data: Dataset) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(inputs float32, targets in the form for scikit-learn)."""
    x, y = data.read(data.inputs).cpu().numpy(), data.targets.cpu().numpy()
    return x, y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y


def _estimator(train: Dataset, values: Values) -> Any:
    """The estimator of the search: a classifier for labels and for rows of 0 and 1."""
    from .. import estimators

    labels = train.is_classification or bool(((train.targets == 0) | (train.targets == 1)).all())
    kind = estimators.MLPClassifier if labels else estimators.MLPRegressor
    return kind(max_iter=values["epochs"], random_state=values["seed"] % 2**32, precision="fp32")


def _check_scores(job: Any, said: list[str]) -> None:
    """ValueError if no trial has a score. If some have none, their count is printed.

    said: the warnings of the search. Those of epochs that ran out, and of batches larger than a
    fold, are not shown.
    """
    from ..search import reason_of

    missing = numpy.isnan(job.cv_results_["mean_test_score"])
    if not missing.any():
        return
    reason = next(filter(None, map(reason_of, said)), "no warning says why")
    if missing.all():
        raise ValueError(
            f"no trial has a score: {reason}; choose another --scoring, or look at the data"
        )
    complain(f"note: {missing.sum()} of {len(missing)} trials have no score: {reason}")


def _print(job: Any, top: int) -> None:
    """Print the best settings, by the mean score of their folds."""
    found, ranked = job.cv_results_, _ranked(job)
    rungs = [str(epochs) for epochs in dict.fromkeys(found.get("param_max_iter", []))]
    order = "; best first"
    if rungs:
        order = f", in rungs of {', '.join(rungs)} epochs; best first, the last rung at the top"
    say(f"{len(ranked)} trials of {job.n_splits_} folds{order}")
    for i in ranked[:top]:
        score, spread = found["mean_test_score"][i], found["std_test_score"][i]
        said = ", ".join(f"{name} {_shown(value)}" for name, value in found["params"][i].items())
        say(f"  {score:.4f} ± {spread:.4f}  {said}")


def _ranked(job: Any) -> list[int]:
    """Numbers of trials, best first.

    With halving, trials of the last rung come first, and a setting is listed only once.
    """
    found = job.cv_results_
    rungs = numpy.asarray(found.get("iter", [0] * len(found["params"])))
    scores = numpy.nan_to_num(found["mean_test_score"], nan=-numpy.inf)
    best: dict[str, int] = {}
    for i in numpy.lexsort((-scores, -rungs)):
        setting = {k: v for k, v in found["params"][i].items() if k != "max_iter"}
        best.setdefault(repr(setting), int(i))
    return list(best.values())


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _ensemble(job: Any, found: setup.Data, values: Values) -> None:
    """Choose an average of the best models by out-of-fold predictions, and print its scores.

    These are the scores out of fold and on the test rows, with the winner's for comparison.
    """
    from sklearn.base import clone
    from sklearn.model_selection import cross_val_predict

    from ..search import ensemble

    (x, y), (test_x, test_y) = _arrays(found.train), _arrays(found.test)
    chances = hasattr(job.estimator, "predict_proba")
    method = "predict_proba" if chances else "predict"
    models = [
        clone(job.estimator).set_params(**job.cv_results_["params"][i])
        for i in _ranked(job)[:_BEST]
    ]
    outputs = [cross_val_predict(m, x, y, cv=values["folds"], method=method) for m in models]
    chosen, inside = ensemble(outputs, lambda mean: _score(mean, y, chances))
    members = {i: getattr(models[i].fit(x, y), method)(test_x) for i in set(chosen)}
    mean = sum(members[i] for i in chosen) / len(chosen)
    name = "accuracy" if chances else "R²"
    winner = _score(getattr(job.best_estimator_, method)(test_x), test_y, chances)
    count = f"{len(chosen)} model{'s' * (len(chosen) > 1)}"
    different = f" ({len(members)} different)" if len(members) < len(chosen) else ""
    say(
        f"ensemble of {count}{different}: {name} {inside:.4f} out of fold, "
        f"{_score(mean, test_y, chances):.4f} on the test rows; the best alone {winner:.4f}"
    )


def _score(outputs: numpy.ndarray, y: numpy.ndarray, chances: bool) -> float:
    """The accuracy of probabilities, or R² of values. A row of several labels must be all right."""
    from sklearn.metrics import r2_score

    if not chances:
        return float(r2_score(y, outputs)) if numpy.isfinite(outputs).all() else -math.inf
    said = outputs.argmax(1) if y.ndim == 1 else outputs > 0.5
    right = said == y
    return float((right if y.ndim == 1 else right.all(1)).mean())


def _recipe(job: Any, base: recipes.Recipe) -> recipes.Recipe:
    """The winner's settings as a recipe.

    The estimator's penalty is alpha divided by the samples of a batch. It becomes a weight decay.
    """
    best = job.best_estimator_
    return recipes.changed(
        base,
        hidden=tuple(best.hidden_layer_sizes),
        activation=best.activation,
        optimizer="adam",
        lr=float(best.learning_rate_init),
        weight_decay=float(best.alpha) / best.batch_size,
        batch_size=int(best.batch_size),
        epochs=int(best.n_iter_),
    )


def _write(job: Any, folder: Path) -> None:
    """Write search.jsonl with one line for each trial, and draw the score over each parameter."""
    found = job.cv_results_
    halved = "iter" in found
    rows = [
        {
            **params,
            "score": float(found["mean_test_score"][i]),
            "std": float(found["std_test_score"][i]),
            **({"rung": int(found["iter"][i])} if halved else {}),
        }
        for i, params in enumerate(found["params"])
    ]
    write_text(folder / TRIALS, "".join(json.dumps(row, default=float) + "\n" for row in rows))
    names = list(_space())
    report.scores_over(
        {name: [row[name] for row in rows] for name in names},
        [row["score"] for row in rows],
        folder / _PICTURE,
        job.scoring or ("accuracy" if hasattr(job.estimator, "predict_proba") else "R²"),
        [f"{row['max_iter']} epochs" for row in rows] if halved else None,
    )
    say(f"all trials in {folder / TRIALS} and {folder / _PICTURE}")
