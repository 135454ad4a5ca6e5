"""scikit-learn's MLPClassifier and MLPRegressor, trained by handgrad's engines.

Parameters and attributes are scikit-learn's. With the same `random_state`, the initial weights and
the order of samples are too. So the trained network is the same, up to rounding.

Six things differ. Training computes in float32, except for small tables and with `precision`
"fp64". `epsilon` is torch's: Adam adds it after the bias correction, scikit-learn before. With the
default this changes only weights whose gradients are tiny. scikit-learn reports a probability below
2e-16 as 2e-16 in its loss, ours is exact. Sparse input is made dense. A changed `activation` counts
from the next `fit` on, but scikit-learn's `predict` takes it at once. The solver "lbfgs" and the
Poisson loss are not served.
"""

import contextlib
import inspect
import math
import warnings
from collections.abc import Iterator
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy
import torch
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import accuracy_score, r2_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import check_random_state, column_or_1d
from sklearn.utils._param_validation import Interval, Options, StrOptions
from sklearn.utils.multiclass import (
    _check_partial_fit_first_call,
    check_classification_targets,
    type_of_target,
    unique_labels,
)
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

import kernels

from . import engines, spreading
from .data import Dataset
from .fitting import (
    ADAPTIVE_DIVISOR,
    ADAPTIVE_LEAST,
    COMPILED_DRAWS,
    SCHEDULES,
    SOLVERS,
    Training,
    set_rate,
)
from .loss import BinaryCrossEntropy, MeanSquaredError, SoftmaxCrossEntropy
from .modules import MLP, blank

# {scikit-learn's name of an activation: our name}
ACTIVATIONS = {"identity": "identity", "logistic": "sigmoid", "tanh": "tanh", "relu": "relu"}
_GLOROT = {"logistic": 2.0}  # scikit-learn's factor for initial weights. Else it is 6.
_PRECISIONS = {"fp32": torch.float32, "fp64": torch.float64}
# scikit-learn computes in the dtype of X. But float64 takes about twice as long on a CPU, and no
# kernel of a GPU serves it. So by default, only tables of at most so many rows are trained in
# float64. They take little time, and weights of samples then have the effect of repeated rows to
# many digits.
_FEW_ROWS = 100
_DTYPES = (numpy.float64, numpy.float32)  # X keeps one of these. Other numbers become the first.
_TEXTS = "SU"  # numpy's kinds of dtypes for bytes and texts
_AUTO_BATCH = 200


class _Arrays(list):
    """The arrays of all layers, which are the network's own memory on a CPU.

    So a change inside of an array changes the network. An array that is assigned to a place is
    copied into the network. On other devices, the arrays are copies that cannot be written to. A
    pickle or a copy of the list is a plain list.
    """

    def __init__(self, name: str, parameters: list[torch.Tensor]) -> None:
        self._name, self._parameters = name, parameters
        super().__init__(_array(p) for p in parameters)

    def __setitem__(self, index: Any, value: Any) -> None:
        places: Any = range(len(self))[index]
        if isinstance(places, int):
            places, value = [places], [value]
        values = list(value)
        if len(values) != len(places):
            raise ValueError(
                f"{self._name} must have {len(places)} arrays, one for each layer, got "
                f"{len(values)}; fit another estimator for other layers"
            )
        arrays = [self._checked(*one) for one in zip(places, values)]
        for i, array in zip(places, arrays):
            parameter = self._parameters[i].detach()
            parameter.copy_(torch.from_numpy(array.T))
            super().__setitem__(i, _array(parameter))

    def _checked(self, layer: int, value: Any) -> numpy.ndarray:
        array = numpy.array(value, dtype=numpy.float64)
        if array.shape != self[layer].shape:
            raise ValueError(
                f"{self._name}[{layer}] must be {self[layer].shape}, got {array.shape}; fit "
                "another estimator for other widths"
            )
        return array

    def __reduce__(self) -> Any:
        return list, (list(self),)


def _array(parameter: torch.Tensor) -> numpy.ndarray:
    """The numbers of a weight as (inputs, outputs), or of a bias (outputs,)."""
    array = parameter.detach().cpu().numpy().T
    array.flags.writeable = parameter.device.type == "cpu"
    return array


def _tensor(array: numpy.ndarray) -> torch.Tensor:
    """The array as a tensor, in the same memory if that is contiguous and can be written to.

    torch warns of other memory, such as a file that is mapped for reading.
    """
    return torch.from_numpy(numpy.require(array, requirements=("C", "W")))


class _Network(BaseEstimator):
    """The common base of classifier and regressor: checks, the training loop, attributes."""

    _parameter_constraints: ClassVar[dict] = {
        "hidden_layer_sizes": ["array-like", Interval(Integral, 1, None, closed="left")],
        "activation": [StrOptions(set(ACTIVATIONS))],
        "solver": [StrOptions({"lbfgs", *SOLVERS})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "batch_size": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
        "learning_rate": [StrOptions(set(SCHEDULES))],
        "learning_rate_init": [Interval(Real, 0, None, closed="neither")],
        "power_t": [Interval(Real, 0, None, closed="left")],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "shuffle": ["boolean"],
        "random_state": ["random_state"],
        "tol": [Interval(Real, 0, None, closed="left")],
        "verbose": ["verbose"],
        "warm_start": ["boolean"],
        "momentum": [Interval(Real, 0, 1, closed="both")],
        "nesterovs_momentum": ["boolean"],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="left")],
        "beta_1": [Interval(Real, 0, 1, closed="left")],
        "beta_2": [Interval(Real, 0, 1, closed="left")],
        "epsilon": [Interval(Real, 0, None, closed="neither")],
        "n_iter_no_change": [
            Interval(Integral, 1, None, closed="left"),
            Options(Real, {numpy.inf}),
        ],
        "max_fun": [Interval(Integral, 1, None, closed="left")],
        "device": [str, None],
        "engine": [StrOptions({"auto", *engines.ENGINES})],
        "precision": [StrOptions({"auto", *_PRECISIONS})],
    }

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str | None = None,
        engine: str = "auto",
        precision: str = "auto",
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.alpha = alpha
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.learning_rate_init = learning_rate_init
        self.power_t = power_t
        self.max_iter = max_iter
        self.shuffle = shuffle
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.warm_start = warm_start
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.beta_1 = beta_1
        self.beta_2 = beta_2
        self.epsilon = epsilon
        self.n_iter_no_change = n_iter_no_change
        self.max_fun = max_fun
        self.device = device
        self.engine = engine
        self.precision = precision

    _scaled: ClassVar[str] = "X"  # the numbers that may be too large

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> "_Network":
        """Train on X (samples, features) and y (samples,) or (samples, outputs). Returns self.

        X is read as float64, unless it is float32. sample_weight: (samples,) factors of the
        samples' losses. None weighs all the same. A ConvergenceWarning says that training used all
        `max_iter` epochs. For ValueErrors, see the class.
        """
        return self._fit(X, y, sample_weight, incremental=False)

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> "_Network":
        """Train one more epoch, on these samples. Returns self. Arguments are as for `fit`."""
        return self._fit(X, y, sample_weight, incremental=True)

    @property
    def coefs_(self) -> list[numpy.ndarray]:
        """The weights of each layer, (inputs, outputs), in the network's dtype.

        A change of an array, of the list, or of the attribute changes the network. On another
        device than a CPU, the arrays cannot be written to, so assign new ones.
        """
        return _Arrays("coefs_", [layer.weight for layer in self._layers()])

    @coefs_.setter
    def coefs_(self, values: Any) -> None:
        self.coefs_[:] = values

    @property
    def intercepts_(self) -> list[numpy.ndarray]:
        """The biases of each layer, (outputs,), in the network's dtype. See `coefs_`."""
        return _Arrays("intercepts_", [layer.bias for layer in self._layers()])

    @intercepts_.setter
    def intercepts_(self, values: Any) -> None:
        self.intercepts_[:] = values

    def _layers(self) -> list[Any]:
        model = self.__dict__.get("_model")
        if model is None:
            raise AttributeError(f"this {type(self).__name__} is not fitted yet: call fit")
        return list(model.children())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _fit(self, X, y, sample_weight, incremental):
        self._validate_params()
        if self.solver not in SOLVERS:
            raise ValueError(
                f"{type(self).__name__}: solver {self.solver!r} is not served; use "
                f"sklearn.neural_network.{type(self).__name__}, or solver 'adam' or 'sgd'"
            )
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        first = "_model" not in self.__dict__ or not (self.warm_start or incremental)
        X, targets = self._validate_input(X, y, incremental, first)
        weights = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        self._random, self._read = self._generator(), X.dtype
        if first:
            self._start([X.shape[1], *self._hidden(), self.n_outputs_], X)
        else:
            self._go_on()
        X, targets, weights, held = self._hold_out(X, targets, weights)
        training = self._training(X, targets, weights, held, incremental)
        epochs = 1 if incremental else self.max_iter
        try:
            ran_out = self._run(training, held, epochs)
        except KeyboardInterrupt:  # as in scikit-learn, what was trained so far is kept
            training.finish()
            warnings.warn("Training interrupted by user.", stacklevel=3)
            ran_out = False
        if ran_out and not incremental:
            warnings.warn(
                f"Stochastic Optimizer: Maximum iterations ({self.max_iter}) reached and the "
                "optimization hasn't converged yet.",
                ConvergenceWarning,
                stacklevel=3,
            )
        if self.early_stopping:
            self._model.load_state_dict(self._best)
        if not all(numpy.isfinite(a).all() for a in [*self.coefs_, *self.intercepts_]):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large "
                "values and need to be preprocessed."
            )
        return self

    def _generator(self) -> numpy.random.RandomState:
        return check_random_state(self.random_state)

    def _hidden(self) -> list[int]:
        sizes = self.hidden_layer_sizes
        sizes = list(sizes) if hasattr(sizes, "__iter__") else [sizes]
        if any(int(n) != n for n in sizes):
            raise ValueError(f"hidden_layer_sizes must be whole numbers, got {sizes}.")
        sizes = [int(n) for n in sizes]
        if any(n <= 0 for n in sizes):
            raise ValueError(f"hidden_layer_sizes must be > 0, got {sizes}.")
        return sizes

    def _start(self, sizes: list[int], X: Any) -> None:
        """Make a network with new weights, drawn as in scikit-learn, and reset the attributes.

        sizes: widths from input to output. X: (samples, features).
        """
        found = "cuda" if torch.cuda.is_available() else "cpu"
        device = spreading.existing(self.device or spreading.next_device() or found)
        is_double = X.dtype == numpy.float64 and X.shape[0] <= _FEW_ROWS
        auto = torch.float64 if is_double and device.type == "cpu" else torch.float32
        dtype = _PRECISIONS.get(self.precision, auto)
        spreading.check_dtype(device, dtype)
        with blank():
            self._model = MLP(sizes, ACTIVATIONS[self.activation], device=device, dtype=dtype)
        with torch.no_grad():
            for layer in self._layers():
                fan = layer.in_features + layer.out_features
                bound = math.sqrt(_GLOROT.get(self.activation, 6.0) / fan)
                shape = (layer.in_features, layer.out_features)
                weight = self._random.uniform(-bound, bound, shape)
                layer.weight.copy_(torch.from_numpy(weight.T))
                bias = self._random.uniform(-bound, bound, layer.out_features)
                layer.bias.copy_(torch.from_numpy(bias))
        self.n_layers_, self.n_iter_, self.t_ = len(sizes), 0, 0
        self._no_improvement = 0
        self.loss_curve_: list[float] = []
        self._optimizer: Any = None
        self._forget_best()

    def _forget_best(self) -> None:
        """Reset what early stopping, or the training loss, is compared with."""
        self.best_loss_: Any = None if self.early_stopping else math.inf
        self.validation_scores_: Any = [] if self.early_stopping else None
        self.best_validation_score_: Any = -math.inf if self.early_stopping else None
        self._best = self._weights() if self.early_stopping else {}

    def _go_on(self) -> None:
        """Give the trained network the parameters of this call, as scikit-learn does.

        Without a device or with precision "auto", it stays where and as it is.
        """
        if self.early_stopping != (self.best_loss_ is None):
            self._forget_best()
        hidden = ACTIVATIONS[self.activation]
        self._model.activation = hidden
        for layer in self._layers()[:-1]:
            layer.activation = hidden
        first = next(self._model.parameters())
        device = first.device if self.device is None else spreading.existing(self.device)
        dtype = _PRECISIONS.get(self.precision, first.dtype)
        if (device, dtype) == (first.device, first.dtype):
            return
        self._model.to(device, dtype)
        if self._optimizer is not None:  # its states follow the parameters
            self._optimizer.load_state_dict(self._optimizer.state_dict())

    def _weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self._model.state_dict().items()}

    def _hold_out(self, X, targets, weights):
        """(inputs, targets, weights, held): the samples to train on, and the held-out ones.

        held: (inputs, targets, weights) that score each epoch, or None without early stopping.
        """
        if not self.early_stopping:
            return X, targets, weights, None
        arrays = [X, targets] if weights is None else [X, targets, weights]
        parts = train_test_split(
            *arrays,
            random_state=self._random,
            test_size=self.validation_fraction,
            stratify=targets if self._stratifies() else None,
        )
        if parts[1].shape[0] < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of "
                "your dataset."
            )
        held = (parts[1], parts[3], None if weights is None else parts[5])
        return parts[0], parts[2], None if weights is None else parts[4], held

    def _stratifies(self) -> bool:
        return False

    def _dataset(self, X, targets) -> Dataset:
        """The data set of these arrays, on the network's device and in its dtype."""
        dense = X.toarray() if hasattr(X, "toarray") else X
        first = next(self._model.parameters())
        inputs = self._narrowed(dense, "X", first.dtype)
        numbers = targets.dtype.kind == "f"
        targets = self._narrowed(targets, "y", first.dtype) if numbers else _tensor(targets)
        return Dataset(inputs, targets, self._class_names()).to(first.device)

    def _narrowed(self, array: numpy.ndarray, name: str, dtype: torch.dtype) -> torch.Tensor:
        """The array (samples, …) in the network's dtype. ValueError if that cannot hold it."""
        tensor = _tensor(array).to(dtype)
        # The array is finite, it was checked. A finite sum has no other terms, and is faster.
        if not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all()):
            row, column = tensor.isfinite().logical_not().nonzero()[0].tolist()
            raise ValueError(
                f"{type(self).__name__}: {name} has {array[row, column]:g} in row {row}, column "
                f"{column}, which float32 cannot hold; scale {name}, or use precision='fp64'"
            )
        return tensor

    def _training(self, X, targets, weights, held, incremental) -> "Training":
        """Prepare data, loss and optimizer of one call. partial_fit keeps its last optimizer."""
        data = self._dataset(X, targets)
        count = len(data)
        batch: Any = min(_AUTO_BATCH, count) if self.batch_size == "auto" else self.batch_size
        if batch > count:
            warnings.warn(
                "Got `batch_size` less than 1 or larger than sample size. It is going to be "
                "clipped",
                stacklevel=4,
            )
            batch = count
        if self._optimizer is None or not incremental:
            self._optimizer = SOLVERS[self.solver](self, self._groups())
        else:  # another alpha may need other groups
            settings = self._optimizer.param_groups[0]
            self._optimizer.param_groups[:] = [{**settings, **new} for new in self._groups()]
        weights = self._weighed(weights)
        judges = None if held is None else (self._dataset(*held[:2]), self._weighed(held[2]))
        epochs = 1 if incremental else self.max_iter
        return Training(self, data, judges, weights, int(batch), epochs)

    def _weighed(self, weights) -> torch.Tensor | None:
        """Weights of samples on the network's device and in its dtype, or None."""
        first = next(self._model.parameters())
        return None if weights is None else _tensor(weights).to(first.device, first.dtype)

    def _groups(self) -> list[dict]:
        """The optimizer's parameter groups.

        Only weights have a penalty, so weights and biases are two groups. Without a penalty, all
        parameters are one group.
        """
        if not self.alpha:
            return [{"params": list(self._model.parameters()), "decays": False}]
        layers = self._layers()
        return [
            {"params": [layer.weight for layer in layers], "decays": True},
            {"params": [layer.bias for layer in layers], "decays": False},
        ]

    def _run(self, training: "Training", held, epochs: int) -> bool:
        """Train until nothing improves, at most `epochs`. Returns True if it used all epochs."""
        order = numpy.arange(len(training.data))
        self.n_iter_ = 0
        if training.session is not None:
            return self._run_compiled(training, order, epochs)
        for _ in range(epochs):
            order = self._next_order(order)
            self._note_epochs([training.epoch(order)], len(order))
            self._note_improvement(held)
            if self.solver == "sgd":
                SCHEDULES[self.learning_rate](self, self._optimizer)
            if self._no_improvement > self.n_iter_no_change and self._stops():
                return False
        return True

    def _run_compiled(self, training: "Training", order: numpy.ndarray, epochs: int) -> bool:
        """Do the work of `_run` with many epochs in a call. The compiled code decides the stop."""
        watch = self._watch()
        while self.n_iter_ < epochs:
            with self._draws(order, training.ahead(epochs - self.n_iter_)) as (orders, draws):
                found = training.epochs(orders, watch, draws)
            failed = orders[min(len(found.losses), len(orders) - 1)]
            order = orders[min(len(found.losses), len(orders)) - 1]
            self._note_epochs(found.losses, len(order), found.values)
            self._no_improvement = watch.waited
            if self.early_stopping:
                self.best_validation_score_ = watch.best
            else:
                self.best_loss_ = -watch.best
            if found.failed is not None:
                raise training.failure(failed, found.failed)
            with training.optimizer_at_hand():
                if self.solver == "sgd":
                    SCHEDULES[self.learning_rate](self, self._optimizer)
                if found.stopped and self._stops():
                    break
                watch.waited = self._no_improvement
        else:
            training.finish()
            return True
        training.finish()
        return False

    @contextlib.contextmanager
    def _draws(self, order: numpy.ndarray, epochs: int) -> Iterator[tuple[numpy.ndarray, Any]]:
        """A context with the orders of so many epochs, and `cpu.session.Draws` or None.

        order: (samples,), the order of the epoch before. With Draws, the orders are a copy of it,
        and the compiled code draws all of them there. It advances the random state, which the
        estimator takes back at the end. Without shuffle, and for other generators, the orders are
        made here.
        """
        kind, key, place, *rest = self._random.get_state()
        if not self.shuffle or kind != COMPILED_DRAWS:
            orders = numpy.empty((epochs, len(order)), numpy.int64)
            for i in range(epochs):
                orders[i] = order = self._next_order(order)
            yield orders, None
            return
        from kernels.cpu.session import Draws

        draws = Draws(numpy.append(key, numpy.uint32(place)), epochs)
        yield order[None].copy(), draws
        self._random.set_state((kind, draws.state[:-1], int(draws.state[-1]), *rest))

    def _watch(self) -> Any:
        """The rule by which the compiled epochs end, see `cpu.session.Watch`."""
        from kernels.cpu.session import TRAINING_LOSS, Watch

        if not self.early_stopping:
            kind, best = TRAINING_LOSS, -self.best_loss_
        else:
            kind, best = self._judged_by(), self.best_validation_score_
        return Watch(
            *(kind, float(self.n_iter_no_change), self.tol, False),
            *(self.early_stopping, best, self._no_improvement),
        )

    def _next_order(self, order: numpy.ndarray) -> numpy.ndarray:
        """The next epoch's order: the same as from sklearn.utils.shuffle.

        That function is not used, because it takes longer than a short epoch.
        """
        if not self.shuffle:
            return order
        places = numpy.arange(len(order))
        self._random.shuffle(places)
        return order[places]

    def _note_epochs(self, losses: list[float], samples: int, scores: Any = None) -> None:
        """Record the losses of trained epochs, and their scores if they are known."""
        scores = scores if self.early_stopping else None
        for i, loss in enumerate(losses):
            self.loss_ = loss
            self.n_iter_ += 1
            self.t_ += samples
            self.loss_curve_.append(loss)
            if self.verbose:
                print(f"Iteration {self.n_iter_}, loss = {loss:.8f}")
            if scores is not None:
                self._note_score(scores[i])

    def _note_score(self, score: float) -> None:
        self.validation_scores_.append(score)
        if self.verbose:
            print(f"Validation score: {score:f}")

    def _diverged(self, reason: Any) -> ValueError:
        return ValueError(
            f"{type(self).__name__}: {reason}: Solver produced non-finite parameter weights; scale "
            f"{self._scaled}, or take a smaller learning_rate_init"
        )

    def _note_improvement(self, held) -> None:
        if held is None:
            better = self.loss_ <= self.best_loss_ - self.tol
            self.best_loss_ = min(self.best_loss_, self.loss_)
        else:
            score = self._held_out_score(*held)
            self._note_score(score)
            better = score >= self.best_validation_score_ + self.tol
            if score > self.best_validation_score_:
                self.best_validation_score_ = score
                self._best = self._weights()
        self._no_improvement = 0 if better else self._no_improvement + 1

    def _stops(self) -> bool:
        """True if training ends here.

        An adaptive learning rate is divided instead, until it is at most `ADAPTIVE_LEAST`.
        """
        rate = self._optimizer.param_groups[0]["lr"]
        if self.learning_rate != "adaptive" or self.solver != "sgd" or rate <= ADAPTIVE_LEAST:
            return True
        set_rate(self._optimizer, rate / ADAPTIVE_DIVISOR)
        self._no_improvement = 0
        return False

    def _outputs(self, X, check: bool = True) -> torch.Tensor:
        """The network's outputs, (samples, outputs), on the CPU.

        check: validate X. The outputs are then float32 if X is now and was in `fit`, else float64,
        as in scikit-learn.
        """
        if check:
            check_is_fitted(self)
            X = validate_data(self, X, accept_sparse=("csr", "csc"), dtype=_DTYPES, reset=False)
        dense = X.toarray() if hasattr(X, "toarray") else X
        device = next(self._model.parameters()).device
        # In float64, the outputs of a row are the same in any batch, as in scikit-learn. float64 is
        # cheap on a CPU only.
        dtype = torch.float64 if device.type == "cpu" else torch.float32
        x = _tensor(dense).to(device, dtype)
        weights, biases = (
            [getattr(layer, name).detach().to(dtype) for layer in self._layers()]
            for name in ("weight", "bias")
        )
        with torch.no_grad():
            # Without a tape: to prepare one takes longer than the products of a small network.
            outputs, _ = kernels.mlp_fwd(x, weights, biases, self._model.activation)
        outputs = outputs.cpu().double()
        is_single = check and numpy.result_type(dense, self._read) == numpy.float32
        return outputs.float() if is_single else outputs


class MLPClassifier(ClassifierMixin, _Network):
    """`sklearn.neural_network.MLPClassifier`, trained by handgrad's engines.

    Parameters, their defaults and attributes are scikit-learn's, with three more parameters. X is
    (samples, features). y is (samples,) classes, or (samples, labels) of 0 and 1 for several
    labels. Two classes and several labels have logistic outputs. More classes have a softmax.

    device: a torch device, such as "cpu" or "cuda". None (the default) takes the GPU if there is
    one, else the CPU. In a search with `devices`, it takes the next of these.
    engine: a name in `mlp.ENGINES`, or "auto" (the default), as for `mlp.Trainer`.
    precision: "fp32" or "fp64", the dtype of the network. "auto" (the default) is "fp32", but
    "fp64" on a CPU for X of float64 and at most 100 rows. In "fp64", a CPU trains the same network
    as scikit-learn with solver "sgd", to many digits. It takes about twice as long as in "fp32".
    epsilon: as in torch.optim.Adam, added after the bias correction. scikit-learn adds it before.
    So weights whose gradients are tiny differ, in the third digit or so.

    ValueError for parameters out of range, the solver "lbfgs", and partial_fit with early_stopping.
    ValueError for data that do not fit: wrong shapes, classes that differ from the first call's, or
    a validation set of fewer than 2 samples. ValueError if a loss or the final weights are not
    finite. max_fun has no effect, because only "lbfgs" reads it.
    """

    def partial_fit(
        self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None
    ) -> "MLPClassifier":
        """Train one more epoch, on these samples. Returns self.

        classes: all classes of all calls. The first call needs them, later calls may omit them.
        """
        if _check_partial_fit_first_call(self, classes):
            self._binarizer = LabelBinarizer()
            multilabel = type_of_target(y).startswith("multilabel")
            self._binarizer.fit(y if multilabel else classes)
        return self._fit(X, y, sample_weight, incremental=True)

    def _validate_input(self, X, y, incremental, reset):
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse=("csr", "csc"),
            multi_output=True,
            dtype=_DTYPES,
            reset=reset,
        )
        check_classification_targets(y)
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        if not hasattr(self, "classes_") or not (self.warm_start or incremental):
            self._binarizer = LabelBinarizer().fit(y)
            self.classes_ = self._binarizer.classes_
        else:
            self._check_classes(unique_labels(y))
        self.out_activation_ = "softmax" if self._is_softmax() else "logistic"
        if y.ndim > 1 or self._binarizer.y_type_.startswith("multilabel"):
            targets = self._binarizer.transform(y)
        else:  # the binarizer takes as long as a step of a small network
            targets = numpy.searchsorted(self.classes_, y)
        if self._is_softmax():
            self.n_outputs_ = len(self.classes_)
        else:
            targets = targets.reshape(X.shape[0], -1).astype(numpy.float64)
            self.n_outputs_ = targets.shape[1]
        return X, targets

    def _is_softmax(self) -> bool:
        return self._binarizer.y_type_ == "multiclass"

    def _check_classes(self, found) -> None:
        if self.warm_start and set(found) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous "
                f"call to fit. Previously got {self.classes_}, `y` has {found}"
            )
        if len(numpy.setdiff1d(found, self.classes_, assume_unique=True)):
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. "
                f"'y' has {found}."
            )

    def _class_names(self) -> tuple[str, ...]:
        return tuple(map(str, self.classes_)) if self._is_softmax() else ()

    def _make_loss(self, reduction: str):
        if self._is_softmax():
            return SoftmaxCrossEntropy(reduction=reduction), 1.0
        scale = 1.0 if reduction == "none" else float(self.n_outputs_)  # sum over outputs, not mean
        return BinaryCrossEntropy(reduction=reduction, scale=scale), 1.0

    def _stratifies(self) -> bool:
        return self.n_outputs_ == 1

    def _judged_by(self) -> Any:
        from kernels.cpu.session import LABELS, SIGNS

        return LABELS if self._is_softmax() else SIGNS

    def _held_out_score(self, X, targets, weights) -> float:
        predicted = self._answers(self._outputs(X, check=False))
        expected = targets if self._is_softmax() else self._binarizer.inverse_transform(targets)
        if self._is_softmax():
            expected = self.classes_[targets]
        return float(accuracy_score(expected, predicted, sample_weight=weights))

    def _answers(self, outputs: torch.Tensor) -> numpy.ndarray:
        """The classes (samples,), or rows of 0 and 1 (samples, labels) for several labels."""
        if self._is_softmax():
            return self.classes_[outputs.argmax(1).numpy()]
        scores = torch.sigmoid(outputs).numpy()
        return self._binarizer.inverse_transform(scores.ravel() if self.n_outputs_ == 1 else scores)

    def predict(self, X: Any) -> numpy.ndarray:
        """The class of each sample (samples,), or 0 and 1 (samples, labels) for several labels."""
        return self._answers(self._outputs(X))

    def predict_proba(self, X: Any) -> numpy.ndarray:
        """The probability of each class, (samples, classes), in the order of `classes_`.

        It is float32 if X is now and was in `fit`, else float64.
        """
        outputs = self._outputs(X)
        if self._is_softmax():
            return torch.softmax(outputs, 1).numpy()
        scores = torch.sigmoid(outputs).numpy()
        if self.n_outputs_ == 1:
            return numpy.hstack([1 - scores, scores])
        return scores

    def predict_log_proba(self, X: Any) -> numpy.ndarray:
        """The logarithm of `predict_proba`, (samples, classes), in its dtype."""
        probabilities = self.predict_proba(X)
        return numpy.log(probabilities, out=probabilities)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


class MLPRegressor(RegressorMixin, _Network):
    """`sklearn.neural_network.MLPRegressor`, trained by handgrad's engines.

    Parameters, their defaults and attributes are scikit-learn's, with three more parameters. X is
    (samples, features). y is (samples,), or (samples, outputs) for several targets.

    loss: "squared_error" (the default). scikit-learn's "poisson" is not served.
    device, engine, precision: as for `MLPClassifier`.

    ValueError as for `MLPClassifier`, except for classes, and for the loss "poisson".
    """

    _parameter_constraints: ClassVar[dict] = {
        **_Network._parameter_constraints,
        "loss": [StrOptions({"squared_error"})],
    }
    _scaled = "X and y"

    def __init__(
        self,
        loss: str = "squared_error",
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: int | str = "auto",
        learning_rate: str = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: float = 10,
        max_fun: int = 15000,
        device: str | None = None,
        engine: str = "auto",
        precision: str = "auto",
    ) -> None:
        # scikit-learn and editors read the parameters from this signature. `locals` has all their
        # values, which are passed on by name.
        given = locals()
        names = list(inspect.signature(_Network.__init__).parameters)[1:]
        super().__init__(**{name: given[name] for name in names})
        self.loss = loss

    def _validate_input(self, X, y, incremental, reset):
        if issparse(y):
            raise ValueError("MLPRegressor: y must be dense, got a sparse matrix; use y.toarray()")
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse=("csr", "csc"),
            multi_output=True,
            y_numeric=True,
            dtype=_DTYPES,
            reset=reset,
        )
        if y.dtype.kind in _TEXTS:
            raise ValueError(
                f"MLPRegressor: y must be numbers, got the text {str(y.flat[0])!r}; convert y with "
                "y.astype(float), or use MLPClassifier for classes"
            )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        y = y.reshape(len(y), -1).astype(numpy.float64)
        if not reset and y.shape[1] != self.n_outputs_:
            raise ValueError(
                f"MLPRegressor: y has {y.shape[1]} targets, but the network that goes on training "
                f"has {self.n_outputs_} outputs; use warm_start=False for a new one"
            )
        self.n_outputs_, self.out_activation_ = y.shape[1], "identity"
        return X, y

    def _class_names(self) -> tuple[str, ...]:
        return ()

    def _make_loss(self, reduction: str):
        # Training minimises half the sum of squares over the outputs. The reported loss is half
        # their mean.
        outputs = float(self.n_outputs_)
        scale = 0.5 if reduction == "none" else 0.5 * outputs
        return MeanSquaredError(reduction=reduction, scale=scale), 1.0 / outputs

    def _held_out_score(self, X, targets, weights) -> float:
        predicted = self._outputs(X, check=False).numpy()
        if not numpy.isfinite(predicted).all():
            return math.nan
        return float(r2_score(targets, predicted, sample_weight=weights))

    def _judged_by(self) -> Any:
        from kernels.cpu.session import R2

        return R2

    def predict(self, X: Any) -> numpy.ndarray:
        """Predictions (samples,), or (samples, outputs) for several targets.

        They are float32 if X is now and was in `fit`, else float64.
        """
        outputs = self._outputs(X).numpy()
        return outputs.ravel() if outputs.shape[1] == 1 else outputs
