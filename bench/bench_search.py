"""The time of a search by cross-validation, with `mlp.SearchCV` and scikit-learn's GridSearchCV.

GridSearchCV runs twice: with scikit-learn's MLPClassifier and with ours.
"""

import time
import warnings
from typing import Any

import numpy
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import GridSearchCV
from sklearn.neural_network import MLPClassifier
from sklearn.preprocessing import StandardScaler

import mlp

from .harness import available_cores
from .table import Table

FOLDS, EPOCHS = 5, 200
GRID = {
    "hidden_layer_sizes": [(16,), (32,), (100,), (32, 32)],
    "alpha": [1e-5, 1e-4, 1e-3, 1e-2],
    "learning_rate_init": [0.001, 0.003, 0.01, 0.03],
}
_WITHIN = 0.01  # the best accuracy may be lower by this, because rounding differs


def _searches(jobs: int) -> dict[str, Any]:
    """{name: search}. All are compared with the first. jobs: threads or processes."""
    common = {"max_iter": EPOCHS, "random_state": 0}
    ours = mlp.MLPClassifier(**common, device="cpu")
    options = {"cv": FOLDS, "refit": False}
    return {
        "GridSearchCV, scikit-learn's MLPClassifier": GridSearchCV(
            MLPClassifier(**common), GRID, n_jobs=jobs, **options
        ),
        "GridSearchCV, ours": GridSearchCV(ours, GRID, n_jobs=jobs, **options),
        "SearchCV, ours": mlp.SearchCV(ours, GRID, n_jobs=jobs, **options),
        "SearchCV, ours, halving": mlp.SearchCV(ours, GRID, n_jobs=jobs, halving=True, **options),
    }


def run() -> Table:
    """Seconds of each search: 64 settings × 5 folds on breast cancer, on all cores.

    This process has loaded its compiled code before.
    """
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)
    jobs = len(available_cores())
    settings = numpy.prod([len(values) for values in GRID.values()])
    title = f"A search over {settings} settings × {FOLDS} folds, breast cancer, {jobs} cores"
    table = Table(title, "python -m bench search")
    warm = mlp.MLPClassifier(max_iter=2, engine="epoch", device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warm.fit(x, y)
        for name, search in _searches(jobs).items():
            started = time.perf_counter()
            search.fit(x, y)
            seconds = time.perf_counter() - started
            first = table.rows[0]["seconds"] if table.rows else seconds
            best = float(search.best_score_)
            table.rows.append(
                {
                    "search": name,
                    "seconds": seconds,
                    "times as fast as the first": first / seconds,
                    "best mean accuracy": best,
                }
            )
            if best < table.rows[0]["best mean accuracy"] - _WITHIN:
                table.failed = f"{name}: the best accuracy is {best:.4f}"
    ours = next(row for row in table.rows if row["search"] == "SearchCV, ours")
    over_ours = table.rows[1]["seconds"] / ours["seconds"]
    table.headline = (
        f"SearchCV takes {ours['seconds']:.1f} s, {ours['times as fast as the first']:.1f} times "
        f"as fast as scikit-learn's network, {over_ours:.1f} times as GridSearchCV over ours"
    )
    return table
