"""The estimators of a search, which check data and parameters once and not in each fit.

A search fits hundreds of small networks on rows of the same data. scikit-learn's checks would take
as long as their training.
"""

import copy
import threading
from numbers import Integral
from typing import Any, ClassVar

import numpy
from sklearn.base import clone
from sklearn.metrics import r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d

from .estimators import MLPClassifier, MLPRegressor

_of_thread = threading.local()  # its `random` is a RandomState that each fit seeds anew


class _Trusted:
    """An estimator inside a search. It does not check data again that the search has checked.

    So a clone, a fit and a score take little time beside the training of a small network.
    """

    random_state: Any
    _names: tuple[str, ...] = ()  # names of the parameters
    _valid: ClassVar[set] = set()  # sets of their values that were checked

    def __sklearn_clone__(self) -> Any:
        made = object.__new__(type(self))
        # scikit-learn's clone copies too. A fit advances a `random_state` that is a generator.
        made.__dict__.update(copy.deepcopy(self._parameters))
        return made

    @property
    def _parameters(self) -> dict[str, Any]:
        return {name: self.__dict__[name] for name in self._names}

    def set_params(self, **params: Any) -> Any:
        """Set copies of parameters, without a check of their names. Returns self."""
        self.__dict__.update(copy.deepcopy(params))
        return self

    def _generator(self) -> numpy.random.RandomState:
        if not isinstance(self.random_state, Integral):
            return super()._generator()  # type: ignore[misc]
        # To make a RandomState takes 60 times as long as to seed one.
        if not hasattr(_of_thread, "random"):
            _of_thread.random = numpy.random.RandomState()
        _of_thread.random.seed(self.random_state)
        return _of_thread.random

    def _validate_params(self) -> None:
        key = tuple(map(repr, self._parameters.values()))
        if key not in self._valid:
            super()._validate_params()  # type: ignore[misc]
            self._valid.add(key)


class _TrustedClassifier(_Trusted, MLPClassifier):
    def _validate_input(self, X, y, incremental, reset):
        self.n_features_in_ = X.shape[1]
        self.classes_, labels = numpy.unique(y, return_inverse=True)
        self._binarizer = LabelBinarizer()
        self._binarizer.classes_, self._binarizer.sparse_input_ = self.classes_, False
        self._binarizer.y_type_ = "multiclass" if len(self.classes_) > 2 else "binary"
        self.n_outputs_ = len(self.classes_) if self._is_softmax() else 1
        self.out_activation_ = "softmax" if self._is_softmax() else "logistic"
        return X, labels if self._is_softmax() else labels.reshape(-1, 1).astype(numpy.float64)

    def score(self, X: Any, y: Any) -> float:
        """The accuracy: the share of samples whose class is predicted right."""
        outputs = self._outputs(X, check=False).numpy()
        if self._is_softmax():
            found = outputs.argmax(1)
        else:  # a fold may have one class only, which is then the answer
            found = (outputs[:, 0] > 0).astype(int) * (len(self.classes_) - 1)
        return float(numpy.mean(self.classes_[found] == y))


class _TrustedRegressor(_Trusted, MLPRegressor):
    def _validate_input(self, X, y, incremental, reset):
        self.n_features_in_, self.n_outputs_, self.out_activation_ = X.shape[1], 1, "identity"
        return X, y.reshape(-1, 1).astype(numpy.float64)

    def score(self, X: Any, y: Any) -> float:
        """R² of the predictions."""
        return float(r2_score(y, self._outputs(X, check=False).numpy()))


_TRUSTED: dict[type, type] = {
    MLPClassifier: _TrustedClassifier,
    MLPRegressor: _TrustedRegressor,
}


def trusted(estimator: Any, X: Any, y: Any) -> tuple[Any, numpy.ndarray, numpy.ndarray] | None:
    """(estimator, X, y), all checked once, for a search. Fits on rows of them check nothing again.

    X: (samples, features), contiguous. y: (samples,). None for a class other than `MLPClassifier`
    and `MLPRegressor`, for sparse X, and for several targets. ValueError, in one line, for data
    that no fit can train on.
    """
    if type(estimator) not in _TRUSTED or hasattr(X, "toarray"):
        return None
    checked, rows = clone(estimator)._validate_input(X, y, False, True)
    if rows.ndim == 2 and rows.shape[1] > 1:
        return None
    column = column_or_1d(y)
    made: Any = object.__new__(_TRUSTED[type(estimator)])
    parameters = estimator.get_params(deep=False)
    made.__dict__.update(parameters)
    # The name is that of the caller's class, because messages contain it.
    names = {"_names": tuple(parameters), "_valid": set()}
    made.__class__ = type(type(estimator).__name__, (type(made),), names)
    return made, numpy.ascontiguousarray(checked), column
