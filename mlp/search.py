"""Searches for settings by cross-validation, as scikit-learn's GridSearchCV does.

A pool of threads trains all trials and folds. scikit-learn's BaseSearchCV makes folds, scores,
ranks and refits. Only the training differs.

A compiled epoch holds no lock of Python, so threads of one process train side by side. Unlike
processes, they do not load torch again or copy the data. Successive halving gives a few epochs to
all settings, and more only to the best. As in RandomizedSearchCV, settings can be drawn at random.
"""

import collections
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from numbers import Integral
from typing import Any

import joblib
import numpy
import torch
from sklearn.base import clone, is_classifier
from sklearn.metrics import check_scoring, get_scorer_names
from sklearn.model_selection import ParameterGrid, ParameterSampler, StratifiedKFold, check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.model_selection._validation import _warn_or_raise_about_fit_failures
from sklearn.utils import indexable

from kernels import cpu

from . import progress, spreading
from .trusted import trusted

FACTOR = 3  # Each rung of a halving keeps a third and trains three times as long.
_CHUNKS = 20  # the most chunks of a rung. The bar moves after each chunk.
_RESOURCE = "max_iter"


class SearchCV(BaseSearchCV):
    """Cross-validated search over the parameters of an estimator.

    estimator: `MLPClassifier`, `MLPRegressor`, a pipeline with one, or any of scikit-learn's.
    parameters: {name: list of values}. With trials, a value may also be a distribution.
    cv, scoring, refit: as for GridSearchCV. 5, None (the estimator's score) and True by default.
    trials: the number of settings to draw, or None (the default) for the whole grid.
    halving: True for successive halving over `max_iter`. False by default.
    random_state: the seed of the draw. None by default.
    n_jobs: the number of threads. None (the default) and -1 are all cores.
    verbose: 1 shows progress with the time left. 0 by default.
    devices: devices that the fits take in turn, such as ["cuda:0", "cuda:1"]. An estimator with its
    own device keeps it. None by default.
    pre_dispatch, error_score, return_train_score: as for GridSearchCV.

    After `fit`, there are all attributes of GridSearchCV: cv_results_, best_params_, best_score_,
    best_index_, best_estimator_, n_splits_, scorer_, classes_ and others. With halving,
    cv_results_ has a column "iter" with the rung, and the best setting is one of the last rung.

    ValueError, in one line, for trials below 1, and for a parameter that the estimator does not
    have. The same for a constant y, for more folds than rows, for halving without `max_iter`, for
    an unknown scoring, for a device that this machine does not have, and if all fits failed.
    """

    def __init__(
        self,
        estimator: Any,
        parameters: Any,
        cv: Any = 5,
        trials: int | None = None,
        scoring: Any = None,
        refit: bool | str | Callable = True,
        halving: bool = False,
        random_state: Any = None,
        n_jobs: int | None = None,
        verbose: int = 0,
        devices: Sequence[str] | None = None,
        pre_dispatch: int | str = "2*n_jobs",
        error_score: float | str = numpy.nan,
        return_train_score: bool = False,
    ) -> None:
        self.estimator = estimator
        self.parameters = parameters
        self.cv = cv
        self.trials = trials
        self.scoring = scoring
        self.refit = refit
        self.halving = halving
        self.random_state = random_state
        self.n_jobs = n_jobs
        self.verbose = verbose
        self.devices = devices
        self.pre_dispatch = pre_dispatch
        self.error_score = error_score
        self.return_train_score = return_train_score

    @property
    def _threads(self) -> int:
        """The number of threads that train. Below 0, it counts down from all cores, as joblib."""
        affinity = getattr(os, "sched_getaffinity", None)
        cores = len(affinity(0)) if affinity else os.cpu_count() or 1
        if self.n_jobs is None:
            return cores
        return self.n_jobs if self.n_jobs > 0 else max(1, cores + 1 + self.n_jobs)

    def fit(self, X: Any, y: Any = None, **params: Any) -> "SearchCV":
        """Search on X (samples, features) and y (samples, …). Returns self.

        If `refit` is set, it then trains the best setting on all samples. params: fit parameters,
        as for GridSearchCV.
        """
        self._candidates = self._drawn()  # an error comes before any training
        _refuse_constant(y)
        self._bar, self.verbose, shown = bool(self.verbose), 0, self.verbose
        try:
            with (
                _in_one_line(),
                cpu.many(),
                spreading.over(self.devices),
                _one_thread_each(),
                joblib.parallel_config(backend="threading", n_jobs=self._threads),
            ):
                is_plain = not params and self.scoring is None
                quick = trusted(self.estimator, X, y) if is_plain else None
                if quick is None or callable(self.refit):
                    if not hasattr(BaseSearchCV, "_check_input_parameters"):
                        self._fold(X, y, params)
                    return super().fit(X, y, **params)
                self._fit_quickly(*quick)
                if self.refit:
                    self._train_best(X, y)
                return self
        finally:
            self.verbose = shown
            del self._candidates, self._bar
            self.__dict__.pop("_folds", None)

    def _fit_quickly(self, network: Any, X: numpy.ndarray, y: numpy.ndarray) -> None:
        """Do the work of BaseSearchCV.fit up to the training of the best setting.

        A fit takes little time in addition to its training, because `network` does not check data.
        network, X, y: the result of `trusted.trusted`.
        """
        self._validate_params()
        self.scorer_, self.multimetric_ = check_scoring(self.estimator), False
        self._checked_cv_orig = check_cv(self.cv, y, classifier=is_classifier(self.estimator))
        self._check_input_parameters(X, y, {})
        self.n_splits_ = len(self._folds.pairs)
        candidates: list[dict[str, Any]] = []
        rows: list[dict[str, Any]] = []
        more: dict[str, list] = collections.defaultdict(list)
        with ThreadPoolExecutor(self._threads) as pool:

            def one(task: tuple[dict[str, Any], Any, Any]) -> dict[str, Any]:
                return self._fitted(network, X, y, task)

            def evaluate(
                chunk: list[dict[str, Any]], folds: _Folds, more_results: Any = None
            ) -> dict[str, Any]:
                tasks = [(setting, *pair) for setting in chunk for pair in folds.pairs]
                found = list(pool.map(one, tasks))
                _warn_or_raise_about_fit_failures(found, self.error_score)
                candidates.extend(chunk)
                rows.extend(found)
                for name, values in (more_results or {}).items():
                    more[name] += values
                self.cv_results_ = self._format_results(candidates, self.n_splits_, rows, more)
                return self.cv_results_

            self._run_search(evaluate)
        self.best_index_ = self._select_best_index(self.refit, "score", self.cv_results_)
        self.best_score_ = self.cv_results_["mean_test_score"][self.best_index_]
        self.best_params_ = self.cv_results_["params"][self.best_index_]

    def _fitted(
        self,
        network: Any,
        X: numpy.ndarray,
        y: numpy.ndarray,
        task: tuple[dict[str, Any], Any, Any],
    ) -> dict[str, Any]:
        """The result of one setting on one fold, in the form for scikit-learn's table.

        task: (parameters, training rows, test rows).
        """
        parameters, train, test = task
        error, started = None, time.time()
        scores = {"test_scores": self.error_score}
        if self.return_train_score:
            scores["train_scores"] = self.error_score
        made = clone(network).set_params(**parameters)
        try:
            made.fit(X[train], y[train])
            ended = time.time()
            for name, rows in zip(scores, (test, train)):
                scores[name] = made.score(X[rows], y[rows])
        except Exception:  # the table shows it as a fit without a score
            if self.error_score == "raise":
                raise
            ended, error = time.time(), traceback.format_exc()
        times = {"fit_time": ended - started, "score_time": time.time() - ended}
        return {**scores, "fit_error": error, "n_test_samples": len(test), **times}

    def _train_best(self, X: Any, y: Any) -> None:
        """Do the last part of BaseSearchCV.fit: train the best setting on the data as given."""
        started = time.time()
        best = clone(self.estimator).set_params(**clone(self.best_params_, safe=False))
        self.best_estimator_ = best.fit(X, y)
        self.refit_time_ = time.time() - started
        if hasattr(best, "feature_names_in_"):
            self.feature_names_in_ = best.feature_names_in_

    def _drawn(self) -> list[dict[str, Any]]:
        """All settings to try. ValueError if the search is not possible, see the class."""
        if self.trials is None:
            candidates = list(ParameterGrid(self.parameters))
        elif self.trials < 1:
            raise ValueError(f"SearchCV: trials must be at least 1, got {self.trials}")
        else:
            drawn = ParameterSampler(self.parameters, self.trials, random_state=self.random_state)
            candidates = list(drawn)
        if self.n_jobs == 0:
            raise ValueError("SearchCV: n_jobs must be at least 1, or None for all cores, got 0")
        if isinstance(self.scoring, str) and self.scoring not in get_scorer_names():
            raise ValueError(
                f"SearchCV: unknown scoring {self.scoring!r}; sklearn.metrics.get_scorer_names() "
                "lists the known ones, such as accuracy, f1_macro, roc_auc_ovr and r2"
            )
        known = self.estimator.get_params()
        for name, value in known.items():
            if name.rpartition("__")[2] == "device" and isinstance(value, str):
                spreading.existing(value)
        unknown = sorted({name for one in candidates for name in one} - known.keys())
        if unknown:
            raise ValueError(
                f"SearchCV: {type(self.estimator).__name__} has no parameter {unknown[0]!r}"
            )
        if self.halving and self._resource() is None:
            raise ValueError(
                f"SearchCV: halving gives more {_RESOURCE}, which "
                f"{type(self.estimator).__name__} does not have"
            )
        return candidates

    def _resource(self) -> str | None:
        names = [
            name
            for name in self.estimator.get_params()
            if name == _RESOURCE or name.endswith(f"__{_RESOURCE}")
        ]
        return names[0] if names else None

    def _fold(self, X: Any, y: Any, params: dict[str, Any]) -> None:
        """Draw the folds. Before scikit-learn 1.9, its own `fit` has no place where to do so."""
        X, y = indexable(X, y)
        self._checked_cv_orig = check_cv(self.cv, y, classifier=is_classifier(self.estimator))
        split_params = self._get_routed_params_for_fit(params).splitter.split
        self._check_input_parameters(X, y, split_params)

    def _check_input_parameters(self, X: Any, y: Any, split_params: dict) -> None:
        self._refuse_too_many_folds(y)
        # All settings have the same folds, even if a splitter draws new ones at each call.
        self._folds = _Folds(list(self._checked_cv_orig.split(X, y, **split_params)))

    def _refuse_too_many_folds(self, y: Any) -> None:
        if not isinstance(self.cv, Integral):
            return
        folds, most, of = int(self.cv), len(y), "there are"
        if isinstance(self._checked_cv_orig, StratifiedKFold):
            most, of = int(numpy.unique(y, return_counts=True)[1].max()), "the largest class has"
        if folds > most:
            raise ValueError(
                f"SearchCV: {folds} folds need as many rows, but {of} {most}; take at most "
                f"{most} folds"
            )

    def _run_search(self, evaluate_candidates: Callable) -> None:
        plan = self._rungs() if self.halving else [(len(self._candidates), {})]
        alive, metric = self._candidates, None
        total = sum(count for count, _ in plan) * len(self._folds.pairs)
        with _progress(total, self._bar) as advance:
            for rung, (count, resources) in enumerate(plan):
                if metric is not None:
                    alive = self._best(alive, metric, count)
                metric = self._rung(evaluate_candidates, alive, resources, rung, advance)

    def _rung(
        self,
        evaluate: Callable,
        candidates: list[dict[str, Any]],
        resources: dict[str, int],
        rung: int,
        advance: Callable[[int], Any],
    ) -> numpy.ndarray:
        """Train and score these settings, and return their mean scores (settings,).

        evaluate: the function of BaseSearchCV that does so. resources: parameters that this rung
        sets. rung: its number, from 0. advance: called with a count of fits.
        """
        size = max(self._threads, -(-len(candidates) // _CHUNKS)) if self._bar else len(candidates)
        results: dict[str, Any] = {}
        for start in range(0, len(candidates), size):
            chunk = [{**one, **resources} for one in candidates[start : start + size]]
            more = {"iter": [rung] * len(chunk)} if self.halving else None
            results = evaluate(chunk, self._folds, more_results=more)
            advance(len(chunk) * len(self._folds.pairs))
        name = self.refit if isinstance(self.refit, str) else "score"
        if f"mean_test_{name}" not in results:
            name = next(key for key in results if key.startswith("mean_test_"))[10:]
        return results[f"mean_test_{name}"][-len(candidates) :]

    def _rungs(self) -> list[tuple[int, dict[str, int]]]:
        """[(number of settings, {"max_iter": epochs})] of each rung. The last has all epochs.

        In a pipeline, the key has the step's name before it.
        """
        resource = self._resource()
        assert resource is not None
        most, count = self.estimator.get_params()[resource], len(self._candidates)
        plan = [(count, most)]
        while plan[0][1] >= FACTOR and plan[-1][0] >= FACTOR:
            plan = [(count, max(1, most // FACTOR ** len(plan))), *_shrunk(plan)]
        return [(n, {resource: epochs}) for n, epochs in plan]

    @staticmethod
    def _best(
        candidates: list[dict[str, Any]], scores: numpy.ndarray, count: int
    ) -> list[dict[str, Any]]:
        """The `count` settings with the highest scores, in the given order. NaN is the lowest."""
        ranked = numpy.argsort(-numpy.nan_to_num(scores, nan=-numpy.inf), kind="stable")[:count]
        return [candidates[i] for i in sorted(ranked)]

    @staticmethod
    def _select_best_index(refit: Any, refit_metric: str, results: dict[str, Any]) -> int:
        if callable(refit) or "iter" not in results:
            return BaseSearchCV._select_best_index(refit, refit_metric, results)
        rungs = numpy.asarray(results["iter"])
        scores = numpy.nan_to_num(results[f"mean_test_{refit_metric}"], nan=-numpy.inf)
        return int(numpy.where(rungs == rungs.max(), scores, -numpy.inf).argmax())


def _refuse_constant(y: Any) -> None:
    """ValueError if all targets are the same. Every setting would then have the same score."""
    values = numpy.asarray(y)
    if values.ndim == 1 and len(values) and bool((values == values[0]).all()):
        raise ValueError(f"SearchCV: y is {values[0]} in every row: nothing to learn")


@contextmanager
def _in_one_line() -> Iterator[None]:
    """A context in which scikit-learn's ValueErrors of many lines become one line."""
    try:
        yield
    except ValueError as error:
        first, *more = str(error).strip().splitlines() or [""]
        if not more:
            raise
        # Below its first line is a traceback of a fit, or advice about other estimators.
        reason = reason_of(str(error))
        said = f"{first.rstrip('.')}: {reason}" if reason else first
        raise ValueError(f"SearchCV: {said}") from error


def reason_of(text: str) -> str:
    """The first error in a text with tracebacks, such as "ValueError: …", or ""."""
    found = re.search(r"^(?:\w+\.)*(\w+(?:Error|Exception): .*)", text, re.MULTILINE)
    return found.group(1) if found else ""


def _shrunk(plan: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rungs with a third of the settings in each."""
    return [(max(1, n // FACTOR), epochs) for n, epochs in plan]


class _Folds:
    """Folds that were drawn once, with the methods of a splitter of scikit-learn."""

    def __init__(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        self.pairs = pairs

    def split(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, Any]]:
        """The pairs of training and test rows."""
        return iter(self.pairs)

    def get_n_splits(self, *args: Any, **kwargs: Any) -> int:
        """The number of folds."""
        return len(self.pairs)


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """A context in which torch uses one thread for each trial, because trials run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _progress(total: int, shown: bool) -> Iterator[Callable[[int], Any]]:
    """A context with a function that counts fits. If `shown`, it moves a bar with the time left."""
    if not shown:
        yield lambda count: None
        return
    with progress.bar(total, "fit", shown) as bar:
        yield bar.update


def ensemble(
    outputs: Sequence[numpy.ndarray],
    score: Callable[[numpy.ndarray], float],
    most: int = 10,
) -> tuple[list[int], float]:
    """Greedy selection of models whose mean output has the best score.

    Returns (members, the score of their mean). Each step adds the member that raises the score of
    the mean most. The selection stops if none does. A member may be there twice.

    outputs: the outputs of each candidate, on rows on which it was not trained. score: a function
    of a mean output, larger is better. most: the largest number of members.
    """
    chosen: list[int] = []
    total, best = numpy.zeros_like(outputs[0]), -numpy.inf
    while len(chosen) < most:
        scores = [score((total + one) / (len(chosen) + 1)) for one in outputs]
        member = int(numpy.argmax(scores))
        if not scores[member] > best:
            break
        best = scores[member]
        total = total + outputs[member]
        chosen.append(member)
    return chosen, best
