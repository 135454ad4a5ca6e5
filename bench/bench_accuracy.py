"""The accuracy of our estimators and of scikit-learn's, with equal settings and several seeds."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy
from sklearn import datasets, neural_network
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mlp

from .table import Table

SEEDS = 5
SETTINGS = {"hidden_layer_sizes": (64, 32), "max_iter": 60, "early_stopping": False}
_NOISE = 3.0  # the largest mean difference, in standard errors


def california(rows: int = 2000) -> tuple[numpy.ndarray, numpy.ndarray]:
    """(inputs (rows, 8), prices (rows,)): random data like those of California housing.

    The price is skewed, has noise, and is at most 5.
    """
    rng = numpy.random.default_rng(0)
    income, age, rooms, people = (
        rng.gamma(3, 1.3, rows),
        rng.uniform(1, 52, rows),
        *(rng.gamma(shape, 1, rows) for shape in (6, 3)),
    )
    place = rng.uniform(-1, 1, (rows, 2))
    more = rng.normal(size=(rows, 2))
    near = numpy.exp(-4 * (place**2).sum(1))
    price = 0.45 * income + 0.01 * age + 0.1 * numpy.sqrt(rooms) - 0.05 * people + 1.5 * near
    price = numpy.minimum(price * rng.lognormal(0, 0.15, rows), 5.0)
    return numpy.column_stack([income, age, rooms, people, place, more]), price


DATA: dict[str, tuple[str, Callable[[], tuple[Any, Any]]]] = {
    "breast cancer": ("MLPClassifier", lambda: datasets.load_breast_cancer(return_X_y=True)),
    "wine": ("MLPClassifier", lambda: datasets.load_wine(return_X_y=True)),
    "digits": ("MLPClassifier", lambda: datasets.load_digits(return_X_y=True)),
    "diabetes": ("MLPRegressor", lambda: datasets.load_diabetes(return_X_y=True)),
    "California-like": ("MLPRegressor", california),
}


def _scores(kind: type, x: Any, y: Any, options: dict[str, Any]) -> numpy.ndarray:
    """The accuracy, or R², on the test rows for each seed, (SEEDS,)."""
    found = []
    for seed in range(SEEDS):
        parts = train_test_split(x, y, test_size=0.25, random_state=seed)
        model = make_pipeline(StandardScaler(), kind(**SETTINGS, random_state=seed, **options))
        found.append(model.fit(parts[0], parts[2]).score(parts[1], parts[3]))
    return numpy.array(found)


def run() -> Table:
    """The mean and the standard deviation of accuracy, or of R², over the seeds.

    Our estimators and scikit-learn's have the same splits and settings.
    """
    table = Table(
        f"Accuracy, or R², of {SEEDS} seeds, ours and scikit-learn's", "python -m bench accuracy"
    )
    table.note = (
        "Ours runs the compiled epoch in float32. The table fails if means differ by more than "
        f"{_NOISE:g} standard errors of the difference and by more than 0.01."
    )
    fast = {"precision": "fp32", "device": "cpu"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (kind, load) in DATA.items():
            x, y = load()
            if kind == "MLPRegressor":
                y = (y - y.mean()) / y.std()
            ours = _scores(getattr(mlp, kind), x, y, fast)
            theirs = _scores(getattr(neural_network, kind), x, y, {})
            difference = ours - theirs
            error = float(difference.std(ddof=1) / numpy.sqrt(SEEDS))
            mean = float(difference.mean())
            table.rows.append(
                {
                    "data": name,
                    "ours": f"{ours.mean():.4f} ± {ours.std():.4f}",
                    "scikit-learn": f"{theirs.mean():.4f} ± {theirs.std():.4f}",
                    "difference": f"{mean:+.4f}",
                    "standard error": f"{error:.4f}",
                }
            )
            if abs(mean) > max(_NOISE * error, 0.01):
                table.failed = f"{name}: differs by {mean:.4f}"
    worst = max(abs(float(row["difference"])) for row in table.rows)
    table.headline = f"means differ by at most {worst:.4f}"
    return table
