"""SearchCV gives scikit-learn's results. Also halving, and searches that are refused."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from sklearn.datasets import load_iris
from sklearn.dummy import DummyClassifier
from sklearn.model_selection import GridSearchCV, KFold, RandomizedSearchCV, ShuffleSplit
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import mlp
from kernels import cpu
from mlp.__main__ import main
from mlp.data import tables
from mlp.search import ensemble

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
GRID = {"hidden_layer_sizes": [(3,), (5,)], "learning_rate_init": [0.001, 0.1]}


@pytest.fixture(scope="module")
def iris():
    return load_iris(return_X_y=True)


def network(**changes):
    return mlp.MLPClassifier(**{"max_iter": 9, "random_state": 0, "device": "cpu", **changes})


def test_results_are_those_of_gridsearchcv(iris):
    ours = mlp.SearchCV(network(), GRID, cv=3, n_jobs=2).fit(*iris)
    theirs = GridSearchCV(network(), GRID, cv=3).fit(*iris)
    assert ours.best_params_ == theirs.best_params_ and ours.best_index_ == theirs.best_index_
    assert ours.cv_results_["params"] == theirs.cv_results_["params"]
    for key in ("mean_test_score", "std_test_score", "rank_test_score", "split2_test_score"):
        np.testing.assert_allclose(ours.cv_results_[key], theirs.cv_results_[key])
    assert ours.score(*iris) == theirs.score(*iris)
    assert ours.verbose == 0 and ours.n_splits_ == 3


PUBLIC = (
    "best_params_",
    "best_index_",
    "best_score_",
    "n_splits_",
    "multimetric_",
    "n_features_in_",
)
INTERFACE = {
    "train score": {"return_train_score": True},
    "train score, scoring": {"return_train_score": True, "scoring": "f1_macro"},
    "several metrics": {"scoring": ["accuracy", "f1_macro"], "refit": "f1_macro"},
    "no refit": {"scoring": ["accuracy", "f1_macro"], "refit": False},
    "refit by a function": {"refit": lambda found: int(found["mean_test_score"].argmin())},
    "dispatched in pairs": {"pre_dispatch": 2, "scoring": "accuracy"},
    "a score of errors": {"error_score": 0.25, "grid": {"alpha": [-1.0, 0.1]}},
    "an own splitter": {"cv": ShuffleSplit(2, random_state=0)},
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning")
@pytest.mark.parametrize("options", INTERFACE.values(), ids=INTERFACE)
def test_the_interface_is_gridsearchcvs(options, iris):
    """The same attributes, and the same columns of the table in the same order."""
    options = {"cv": 2, **options}
    grid = options.pop("grid", {"alpha": [0.1, 1.0]})
    ours, theirs = (
        kind(network(max_iter=3), grid, **options).fit(*iris)
        for kind in (mlp.SearchCV, GridSearchCV)
    )
    assert list(ours.cv_results_) == list(theirs.cv_results_)
    for name, values in theirs.cv_results_.items():
        if name.startswith(("mean_t", "std_t", "split", "rank")):
            np.testing.assert_allclose(ours.cv_results_[name], values, err_msg=name)
    public = [{n for n in vars(one) if n.endswith("_")} for one in (ours, theirs)]
    assert public[0] == public[1]
    for name in PUBLIC:
        assert getattr(ours, name, None) == getattr(theirs, name, None), name
    assert str(ours.scorer_) == str(theirs.scorer_)
    assert hasattr(ours, "classes_") == hasattr(theirs, "classes_")


def test_threads_are_counted_as_in_joblib():
    cores, one = (mlp.SearchCV(network(), GRID, n_jobs=n)._threads for n in (-1, -1000))
    assert cores == mlp.SearchCV(network(), GRID)._threads and one == 1


def test_an_error_is_raised_if_asked_for(iris):
    search = mlp.SearchCV(network(), {"alpha": [-1.0]}, cv=2, error_score="raise")
    with pytest.raises(ValueError, match="'alpha' parameter of MLPClassifier must be a float"):
        search.fit(*iris)


def test_draws_are_those_of_randomizedsearchcv(iris):
    pipeline = make_pipeline(StandardScaler(), network())
    grid = {f"mlpclassifier__{name}": values for name, values in GRID.items()}
    ours = mlp.SearchCV(pipeline, grid, cv=2, trials=3, random_state=1, refit=False).fit(*iris)
    theirs = RandomizedSearchCV(pipeline, grid, cv=2, n_iter=3, random_state=1, refit=False)
    assert ours.cv_results_["params"] == theirs.fit(*iris).cv_results_["params"]
    assert not hasattr(ours, "best_estimator_")


def test_halving_gives_the_best_all_epochs(iris):
    grid = {"learning_rate_init": np.logspace(-4, -1, 9).tolist()}
    search = mlp.SearchCV(network(), grid, cv=2, halving=True, n_jobs=2).fit(*iris)
    found = search.cv_results_
    assert list(found["iter"]) == [0] * 9 + [1] * 3 + [2]
    assert list(found["param_max_iter"]) == [1] * 9 + [3] * 3 + [9]
    first, second = found["mean_test_score"][:9], found["mean_test_score"][9:12]
    kept = sorted(np.argsort(-first, kind="stable")[:3])
    rates = found["param_learning_rate_init"]
    assert list(rates[9:12]) == [grid["learning_rate_init"][i] for i in kept]
    assert rates[12] == rates[9 + int(second.argmax())]
    assert search.best_index_ == 12 and search.best_estimator_.n_iter_ == 9


def test_folds_are_drawn_once(iris):
    """All settings use the same folds. Otherwise scores from different rows would be compared."""
    grid = {"strategy": ["most_frequent"], "constant": list(range(6))}
    cv = ShuffleSplit(2, test_size=0.1)
    search = mlp.SearchCV(DummyClassifier(), grid, cv=cv, n_jobs=1).fit(*iris)
    assert len(set(search.cv_results_["mean_test_score"])) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"depth": [1]}}, "MLPClassifier has no parameter 'depth'"),
        ({"trials": 0}, "trials must be at least 1, got 0"),
        ({"cv": 51}, "51 folds need as many rows, but the largest class has 50; take at most"),
        ({"scoring": "nope"}, "unknown scoring 'nope'; sklearn.metrics.get_scorer_names"),
        ({"parameters": {"alpha": [-1.0]}}, "All the 5 fits failed: InvalidParameterError: The"),
        ({"n_jobs": 0}, "n_jobs must be at least 1, or None for all cores, got 0"),
        ({"devices": ["cuda:99"]}, r"device cuda:99 was asked for, .* use device cpu$"),
        ({"estimator": network().set_params(device="gpu")}, "unknown device 'gpu'; known: cpu,"),
        (
            {"estimator": DummyClassifier(), "parameters": {"constant": [1]}, "halving": True},
            "halving gives more max_iter, which DummyClassifier does not have",
        ),
    ],
)
def test_searches_that_are_refused(changes, message, iris):
    search = mlp.SearchCV(**{"estimator": network(), "parameters": GRID, **changes})
    with pytest.raises(ValueError, match=message) as caught:
        search.fit(*iris)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y: (x, np.where(y == 2, np.nan, y)), "Input y contains NaN"),
        (lambda x, y: (np.where(x > 7, np.nan, x), y), "Input X contains NaN"),
        (lambda x, y: (x, y[:-1]), "inconsistent numbers of samples"),
        (lambda x, y: (x, x[:, 0]), "Unknown label type: continuous"),
        (lambda x, y: (x, 0 * y), "SearchCV: y is 0 in every row: nothing to learn"),
    ],
)
def test_data_that_no_fit_can_train_on_are_one_message(change, message, iris):
    with pytest.raises(ValueError, match=message) as caught:
        mlp.SearchCV(network(), GRID).fit(*change(*iris))
    assert "fits failed" not in str(caught.value) and "\n" not in str(caught.value)


def test_gaps_in_a_pipeline_are_one_line(iris):
    x = np.where(iris[0] > 7, np.nan, iris[0])
    pipeline = make_pipeline(StandardScaler(), network())
    message = "^SearchCV: All the 2 fits failed: ValueError: Input X contains NaN.$"
    with pytest.raises(ValueError, match=message):
        mlp.SearchCV(pipeline, {"mlpclassifier__alpha": [0.1]}, cv=2).fit(x, iris[1])


def test_a_fold_of_one_class_is_scored_as_by_gridsearchcv(iris):
    x, y = iris[0][:100], iris[1][:100]  # 50 rows of each of two classes
    options = {"cv": KFold(2), "refit": False}
    ours = mlp.SearchCV(network(), {"alpha": [0.01]}, **options).fit(x, y)
    theirs = GridSearchCV(network(), {"alpha": [0.01]}, **options).fit(x, y)
    scores = [s.cv_results_["mean_test_score"].tolist() for s in (ours, theirs)]
    assert scores[0] == scores[1] == [0.0]


def test_a_generator_as_random_state_is_copied_for_each_fit(iris):
    """Otherwise fits side by side would draw from one generator, which is the caller's too."""
    drawn = np.random.RandomState(0)
    generators = {"random_state": [np.random.RandomState(1), np.random.RandomState(2)]}
    for estimator, grid in (
        (network(random_state=drawn), {"alpha": [0.1, 0.2]}),
        (network(), generators),
    ):
        ours = mlp.SearchCV(estimator, grid, cv=3, n_jobs=2).fit(*iris)
        theirs = GridSearchCV(estimator, grid, cv=3).fit(*iris)
        for split in range(3):
            name = f"split{split}_test_score"
            np.testing.assert_allclose(ours.cv_results_[name], theirs.cv_results_[name])
    for seed, used in enumerate([drawn, *generators["random_state"]]):
        assert used.randint(1 << 30) == np.random.RandomState(seed).randint(1 << 30)


def test_an_ensemble_adds_what_helps():
    target = np.array([0.0, 1.0, 0.0])
    outputs = [target + 0.5, target - 0.5, target + 3]
    chosen, score = ensemble(outputs, lambda mean: -float(np.square(mean - target).mean()))
    assert (sorted(chosen), score) == ([0, 1], 0.0)


def test_a_module_that_another_thread_imports_is_not_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "kernels.cpu.epoch", types.ModuleType("kernels.cpu.epoch"))
    assert not cpu.is_loaded(torch.float32)


def test_the_command_ranks_without_the_test_rows(tmp_path, monkeypatch, capsys):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("scipy")
    monkeypatch.chdir(tmp_path)
    x, y = load_iris(return_X_y=True)
    frame = pandas.DataFrame(x, columns=list("abcd")).assign(kind=[f"k{i}" for i in y])
    test = tables.split_rows(150, 0.0, frame.kind.to_numpy(), "")[1]
    argv = ["search", "t.csv", "--target", "kind", "--trials", "3", "--folds", "2"]
    argv += ["--epochs", "3", "--top", "2"]
    scores = []
    for run in ("one", "two"):
        frame.to_csv("t.csv", index=False)
        assert main([*argv, "--out", run]) == 0
        out = capsys.readouterr().out
        assert "3 trials of 2 folds" in out and "out of fold" in out
        lines = Path(run, "search.jsonl").read_text().splitlines()
        scores.append([json.loads(line)["score"] for line in lines])
        # A change in the test rows only must not change the ranking.
        frame.loc[test, list("abcd")] = 0.0
    assert scores[0] == scores[1] and len(scores[0]) == 3
    assert Path("one", "search.png").exists()
    recipe = json.loads(Path("one", "config.json").read_text())["recipe"]
    assert recipe["optimizer"] == "adam" and recipe["epochs"] <= 3
    assert main(["evaluate", "one"]) == 0
    capsys.readouterr()
    assert main([*argv, "--folds", "101", "--out", "three"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not Path("three").exists()
    assert main([*argv, "--scoring", "roc_auc", "--out", "three"]) == 2  # it is for two classes
    said = capsys.readouterr().err.splitlines()[-1]
    assert "no trial has a score: ValueError: multi_class must be in" in said
    assert not Path("three").exists()
    assert main([*argv, "--halving", "--out", "four"]) == 0
    assert (
        "3 trials of 2 folds, in rungs of 1, 3 epochs; best first, the" in capsys.readouterr().out
    )
