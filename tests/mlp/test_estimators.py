"""The estimators replace scikit-learn's: they pass its own checks and train the same network."""

import itertools
import pickle
import sys
import warnings

import numpy
import pytest
import torch
from sklearn import datasets, neural_network
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import estimator_checks

import kernels
import mlp
from kernels import cpu
from tests import run_command

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
NAMES = ("MLPClassifier", "MLPRegressor")


def pair(name, **options):
    """Our estimator in float64 and scikit-learn's, with the same parameters."""
    # torch adds Adam's epsilon after the bias correction, scikit-learn before. With a tiny epsilon
    # both give the same.
    options = {"random_state": 0, "max_iter": 8, "epsilon": 1e-30, **options}
    options = {"hidden_layer_sizes": (7, 5), **options}
    ours = getattr(mlp, name)(device="cpu", precision="fp64", **options)
    return ours, getattr(neural_network, name)(**options)


@pytest.fixture(scope="module")
def wine():
    x, y = datasets.load_wine(return_X_y=True)
    return StandardScaler().fit_transform(x), y


@pytest.fixture(scope="module")
def diabetes():
    x, y = datasets.load_diabetes(return_X_y=True)
    return x[:150] * 20, numpy.stack([y, -y], 1)[:150] / 100


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_scikit_learns(name):
    ours, theirs = (e().get_params() for e in (getattr(mlp, name), getattr(neural_network, name)))
    assert {key: ours[key] for key in theirs} == theirs
    assert set(ours) - set(theirs) == {"device", "engine", "precision"}
    given = {key: object() for key in ours}
    assert getattr(mlp, name)(**given).get_params(deep=False) == given


# scikit-learn's whole list takes long, so it runs with --full only.
@pytest.mark.parametrize("name", NAMES)
def test_scikit_learns_own_checks(name, request):
    estimator = getattr(mlp, name)(device="cpu", max_iter=100)
    if request.config.getoption("--full"):
        rows = estimator_checks.check_estimator(estimator, on_fail=None, on_skip=None)
        failed = {r["check_name"]: r["exception"] for r in rows if r["status"] == "failed"}
        assert failed == {} and len(rows) > 50
        return
    for check in (
        estimator_checks.check_no_attributes_set_in_init,
        estimator_checks.check_fit2d_1feature,
        estimator_checks.check_estimators_pickle,
        estimator_checks.check_estimator_sparse_tag,
        estimator_checks.check_n_features_in,
        estimator_checks.check_sample_weight_equivalence_on_dense_data,
    ):
        check(name, estimator)


OPTIONS = {
    "adam": {},
    "sgd": {"solver": "sgd", "learning_rate_init": 0.01},
    "sgd, no momentum": {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.1},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "nesterovs_momentum": False},
    "adaptive": {
        "solver": "sgd",
        "learning_rate": "adaptive",
        "learning_rate_init": 0.1,
        "tol": 0.3,
        "n_iter_no_change": 1,
    },
    "early stopping": {"early_stopping": True, "n_iter_no_change": 2, "max_iter": 20},
    "logistic, small batches, penalty": {"activation": "logistic", "batch_size": 32, "alpha": 1.0},
    "tanh, no penalty, in order": {"activation": "tanh", "alpha": 0.0, "shuffle": False},
}


def assert_same(ours, theirs, x):
    """Losses, weights and predictions in float64 equal scikit-learn's to 1e-9, as only the order of
    sums differs.
    """
    assert ours.n_iter_ == theirs.n_iter_ and ours.t_ == theirs.t_
    numpy.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=1e-9)
    for a, b in zip([*ours.coefs_, *ours.intercepts_], [*theirs.coefs_, *theirs.intercepts_]):
        numpy.testing.assert_allclose(a, b, rtol=0, atol=1e-9)
    assert ours.out_activation_ == theirs.out_activation_
    if theirs.validation_scores_ is not None:
        numpy.testing.assert_allclose(ours.validation_scores_, theirs.validation_scores_, atol=1e-9)
        assert ours.best_loss_ is None
    answers = [e.predict(x) for e in (ours, theirs)]
    if answers[0].dtype.kind == "f":
        numpy.testing.assert_allclose(*answers, atol=1e-9)
    else:
        assert (answers[0] == answers[1]).all() and answers[0].dtype == answers[1].dtype


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_classifier_is_the_same(options, wine):
    ours, theirs = (e.fit(*wine) for e in pair("MLPClassifier", **options))
    assert_same(ours, theirs, wine[0])
    numpy.testing.assert_allclose(
        ours.predict_proba(wine[0]), theirs.predict_proba(wine[0]), atol=1e-9
    )


@pytest.mark.parametrize("options", [OPTIONS["adam"], OPTIONS["early stopping"]])
def test_regressor_is_the_same(options, diabetes):
    ours, theirs = (e.fit(*diabetes) for e in pair("MLPRegressor", **options))
    assert_same(ours, theirs, diabetes[0])


@pytest.mark.parametrize(
    "kind", ["binary texts", "several labels", "weights", "heavy weights", "sparse"]
)
def test_targets_and_inputs_of_all_kinds(kind, wine):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    x, y = wine
    weights, options = None, {}
    if kind == "binary texts":
        y = numpy.where(y == 0, "no", "yes")
    elif kind == "several labels":
        y = numpy.stack([y == 0, y > 0, y == 1], 1).astype(int)
    elif kind == "weights":
        weights = numpy.linspace(0, 2, len(x))
    elif kind == "heavy weights":  # the penalty of the loss is divided by them too
        weights, options = numpy.linspace(50, 200, len(x)), {"alpha": 1.0, "batch_size": 32}
    elif kind == "sparse":
        x = scipy_sparse.csr_matrix(x)
    ours, theirs = (e.fit(x, y, sample_weight=weights) for e in pair("MLPClassifier", **options))
    assert_same(ours, theirs, x)


@pytest.mark.parametrize("engine", ["epoch", "manual"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_sample_weights_have_scikit_learns_effect(options, engine, wine):
    """In compiled epochs, and in steps by autograd. Held-out rows count by their weights too."""
    random = numpy.random.RandomState(0)
    weights = random.uniform(0, 3, len(wine[0])) * (random.rand(len(wine[0])) > 0.2)
    ours, theirs = pair("MLPClassifier", **options)
    ours.set_params(engine=engine)
    assert_same(ours.fit(*wine, weights), theirs.fit(*wine, weights), wine[0])


@pytest.mark.parametrize("options", [OPTIONS["adam"], OPTIONS["early stopping"]], ids=str)
def test_sample_weights_of_numbers_and_of_several_labels(options, wine, diabetes):
    weights = numpy.random.RandomState(0).uniform(0, 3, 178)
    y = numpy.stack([wine[1] == 0, wine[1] > 0, wine[1] == 1], 1).astype(int)
    for name, data in (("MLPRegressor", diabetes), ("MLPClassifier", (wine[0], y))):
        ours, theirs = pair(name, **options)
        ours.set_params(engine="epoch")
        for estimator in (ours, theirs):
            estimator.fit(*data, weights[: len(data[0])])
        assert_same(ours, theirs, data[0])


@pytest.mark.parametrize(
    "names",
    [["b", "a", "longer"], [20, -1, 7], ["yes", "no", "yes"], [True, False, True]],
    ids=str,
)
@pytest.mark.parametrize("dtype", [None, object])
def test_partial_fits_of_a_stream_with_classes_of_all_kinds(names, dtype, wine):
    """A chunk may have some classes only, and classes may have any order."""
    x, y = wine[0], numpy.array(names, dtype)[wine[1]]
    if dtype is object and not isinstance(names[0], str):
        y = y.astype(type(names[0]))
    ours, theirs = pair("MLPClassifier")
    for estimator in (ours, theirs):
        for rows in (slice(100, 120), slice(0, 32), slice(None, None, 3)):
            estimator.partial_fit(x[rows], y[rows], classes=numpy.unique(y))
    assert_same(ours, theirs, x)


def test_partial_fit_and_warm_start(wine):
    x, y = wine
    ours, theirs = pair("MLPClassifier", warm_start=True)
    for estimator in (ours, theirs):
        estimator.partial_fit(x[::2], y[::2], classes=[0, 1, 2])
        estimator.partial_fit(x, y)
        estimator.fit(x, y)
    assert_same(ours, theirs, x)


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": "tanh"},
        {"activation": "identity", "solver": "sgd", "momentum": 0.5},
        {"alpha": 1.0, "batch_size": 40},
    ],
    ids=str,
)
def test_parameters_may_change_before_a_warm_start(changes, wine):
    for before in ({}, {"alpha": 0.0, "activation": "logistic"}):
        ours, theirs = pair("MLPClassifier", warm_start=True, max_iter=6)
        for estimator in (ours, theirs):
            estimator.set_params(**before).fit(*wine)
            estimator.set_params(**changes).fit(*wine)
        assert_same(ours, theirs, wine[0])


@pytest.mark.parametrize("at_first", [True, False])
def test_early_stopping_may_change_before_a_warm_start(at_first, wine):
    ours = pair("MLPClassifier", warm_start=True, early_stopping=at_first, max_iter=3)[0].fit(*wine)
    ours.set_params(early_stopping=not at_first).fit(*wine)
    assert len(ours.loss_curve_) == 6 and ours.n_iter_ == 3
    assert (ours.validation_scores_ is None) == at_first
    assert at_first or len(ours.validation_scores_) == 3


@pytest.mark.parametrize("engine", ["epoch", "manual"])
@pytest.mark.parametrize(
    "changes", [{"solver": "adam"}, {"solver": "sgd"}, {"alpha": 0.0}], ids=str
)
def test_partial_fits_go_on_after_a_fit(changes, engine, wine):
    """The optimizer knows how many steps it has taken, also in compiled epochs."""
    pytest.importorskip("numba")
    ours, theirs = pair("MLPClassifier", max_iter=8, **changes)
    ours.set_params(engine=engine)
    for estimator in (ours, theirs):
        estimator.fit(*wine)
        for _ in range(3):
            estimator.partial_fit(*wine)
    assert_same(ours, theirs, wine[0])


@pytest.mark.parametrize("alphas", [(0.0, 1.0), (1.0, 0.0)])
def test_alpha_may_change_between_partial_fits(alphas, wine):
    ours, theirs = pair("MLPClassifier")
    for estimator in (ours, theirs):
        for alpha in alphas:
            estimator.set_params(alpha=alpha)
            for _ in range(3):
                estimator.partial_fit(*wine, classes=[0, 1, 2])
    assert_same(ours, theirs, wine[0])


def test_the_precision_may_change_between_partial_fits(wine):
    ours = mlp.MLPClassifier((7,), device="cpu", precision="fp32", random_state=0)
    ours.partial_fit(*wine, classes=[0, 1, 2])
    ours.set_params(precision="fp64").partial_fit(*wine)
    assert ours.coefs_[0].dtype == numpy.float64
    ours.set_params(precision="auto").partial_fit(*wine)
    assert ours.coefs_[0].dtype == numpy.float64


@pytest.mark.parametrize("read", ["float32", "float64"])
@pytest.mark.parametrize("asked", ["float32", "float64", "int64"])
def test_predictions_have_scikit_learns_dtype(read, asked, wine):
    x, asked = wine[0].astype(read), wine[0].astype(asked)
    ours, theirs = (e.fit(x, wine[1]) for e in pair("MLPClassifier", max_iter=2))
    for name in ("predict_proba", "predict_log_proba"):
        assert getattr(ours, name)(asked).dtype == getattr(theirs, name)(asked).dtype
    ours, theirs = (e.fit(x, x[:, 0]) for e in pair("MLPRegressor", max_iter=2))
    assert ours.predict(asked).dtype == theirs.predict(asked).dtype


@pytest.mark.parametrize("dtype", [">f8", ">f4", "longdouble", "float16", "int32", ">i2"])
def test_numbers_of_any_dtype(dtype, wine, diabetes):
    x = numpy.round(wine[0]).astype(dtype)
    ours, theirs = pair("MLPClassifier", max_iter=3)
    for estimator in (ours, theirs):
        estimator.fit(x, wine[1].astype(">i4"), numpy.ones(len(x), ">f8"))
        estimator.partial_fit(x, wine[1])
    numpy.testing.assert_allclose(ours.predict_proba(x), theirs.predict_proba(x), atol=1e-4)
    model = mlp.MLPRegressor(hidden_layer_sizes=(4,), max_iter=2, device="cpu").fit(x, x[:, :2])
    assert model.predict(x).shape == (len(x), 2) and numpy.isfinite(model.score(x, x[:, :2]))


def test_data_that_do_not_fit_are_one_line(wine):
    scipy_sparse = pytest.importorskip("scipy.sparse")
    x, y = wine
    numbers = numpy.stack([y, y], 1).astype(float)
    with pytest.raises(ValueError, match="which float32 cannot hold; scale X, or use precision='f"):
        mlp.MLPClassifier(device="cpu").fit(x * 1e300, y)
    large = mlp.MLPRegressor(solver="sgd", device="cpu")
    assert not hasattr(large, "out_activation_")  # before a fit, as in scikit-learn
    with pytest.raises(ValueError, match=r"y has 1e.300 in row 59, column 0, which float32 cann"):
        large.fit(x, y * 1e300)
    with pytest.raises(
        ValueError, match="non-finite parameter weights; scale X and y, or take a s"
    ):
        large.fit(x, y * 1e30)
    assert large.out_activation_ == "identity"
    with pytest.raises(ValueError, match=r"y must be dense, got a sparse matrix; use y.toarray\("):
        mlp.MLPRegressor(device="cpu").fit(x, scipy_sparse.csr_matrix(numbers))
    warm = mlp.MLPRegressor(hidden_layer_sizes=(3,), warm_start=True, max_iter=2, device="cpu").fit(
        x, y
    )
    with pytest.raises(ValueError, match="y has 2 targets, but the network that goes on training "):
        warm.fit(x, numbers)
    halves = numpy.arange(len(x)) // 89
    with pytest.raises(ZeroDivisionError, match="the sample weights of a batch of 89 sum to zero"):
        mlp.MLPClassifier(device="cpu", batch_size=89, shuffle=False).fit(x, y, halves)


@pytest.mark.parametrize(
    ("rows", "read", "precision", "dtype"),
    [
        (178, "float64", "auto", "float32"),  # more rows than train in float64 by default
        (100, "float64", "auto", "float64"),
        (100, "float32", "auto", "float32"),
        (178, "float32", "fp64", "float64"),
        (100, "float64", "fp32", "float32"),
    ],
)
def test_the_precision_is_by_rows_and_dtype(rows, read, precision, dtype, wine):
    ours = mlp.MLPClassifier((7,), max_iter=2, device="cpu", precision=precision)
    ours.fit(wine[0][:rows].astype(read), wine[1][:rows])
    assert {str(w.dtype) for w in [*ours.coefs_, *ours.intercepts_]} == {dtype}
    assert ours.predict_proba(wine[0]).dtype == numpy.float64


def test_fits_of_a_process_use_the_same_code(wine, monkeypatch):
    """Code on disk is loaded by the first fit. Code that must be compiled first waits until all
    fits together would save enough time.
    """
    session = pytest.importorskip("kernels.cpu.session")
    if kernels.backend(torch.empty(0)) != "torch":
        pytest.skip("the compiled epoch needs a machine without a GPU")
    ours = mlp.MLPClassifier((7,), max_iter=100, random_state=0, device="cpu")
    monkeypatch.setattr(cpu, "is_loaded", lambda *_: False)
    monkeypatch.setattr(cpu, "_passed", 0.0)

    def is_compiled(kept):
        monkeypatch.setattr(session, "is_compiled", lambda kind: kept)
        with monkeypatch.context() as inside:
            used = []
            make = session.Session.__init__
            inside.setattr(
                session.Session, "__init__", lambda *a, **k: (used.append(1), make(*a, **k))[1]
            )
            ours.fit(*wine)
        return bool(used)

    assert is_compiled(True) and cpu._passed == 0.0
    assert not is_compiled(False) and cpu._passed > 0
    monkeypatch.setattr(cpu, "_passed", cpu.MANY_EPOCHS.compiles)
    assert is_compiled(False)


def test_search_pipeline_and_pickle(wine):
    pipeline = make_pipeline(StandardScaler(), pair("MLPClassifier", max_iter=3)[0])
    search = GridSearchCV(pipeline, {"mlpclassifier__alpha": [1e-4, 1.0]}, cv=2).fit(*wine)
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert (again.predict(wine[0]) == search.predict(wine[0])).all()
    again[-1].partial_fit(*wine)


def test_assigned_weights_are_the_networks(wine):
    """Weights are changed in place, in the list, or as a whole, as in scikit-learn."""
    x, y = wine
    ours, theirs = pair("MLPClassifier")
    weights = numpy.random.default_rng(0)
    new = [weights.normal(size=w.shape) for w in (numpy.empty((13, 7)), numpy.empty((7, 5)))]
    for one in (ours, theirs):
        one.fit(x, y)
        one.coefs_[0][:] = new[0]
        one.coefs_[1] = new[1]
        one.intercepts_ = [b + 1 for b in one.intercepts_]
        one.coefs_[-1][2, 1] = 4.0
    assert numpy.allclose(ours.predict_proba(x), theirs.predict_proba(x), rtol=1e-9, atol=1e-12)
    assert type(pickle.loads(pickle.dumps(ours.coefs_))) is list
    again = pickle.loads(pickle.dumps(ours))
    again.coefs_[0] = new[0] * 2
    assert (ours.coefs_[0] == new[0]).all() and (again.coefs_[0] == new[0] * 2).all()
    with pytest.raises(ValueError, match=r"coefs_\[0\] must be \(13, 7\), got \(7, 13\); fit"):
        ours.coefs_[0] = new[0].T
    with pytest.raises(
        ValueError, match=r"intercepts_ must have 3 arrays, one for each layer, got"
    ):
        ours.intercepts_ = ours.intercepts_[:2]
    for one in (ours, theirs):  # a refused assignment has changed nothing, and training goes on
        one.partial_fit(x, y)
    assert numpy.allclose(ours.coefs_[0], theirs.coefs_[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_lbfgs_is_left_to_scikit_learn(name, wine):
    estimator = getattr(mlp, name)(solver="lbfgs")
    with pytest.raises(ValueError, match=f"use sklearn.neural_network.{name}"):
        estimator.fit(*wine)


@pytest.mark.parametrize("kind", ["U", "S"])
def test_texts_are_no_numbers(kind, wine):
    with pytest.raises(ValueError, match="y must be numbers, got the text"):
        mlp.MLPRegressor(device="cpu").fit(wine[0], wine[1].astype(kind))


def test_diverging_is_one_line(wine):
    estimator = mlp.MLPRegressor(solver="sgd", learning_rate_init=1e6, device="cpu")
    with pytest.raises(ValueError, match="take a smaller learning_rate_init"):
        estimator.fit(*wine)


def test_it_warns_where_epochs_ran_out(wine):
    with warnings.catch_warnings(), pytest.raises(ConvergenceWarning, match=r"\(8\) reached"):
        warnings.simplefilter("error")
        pair("MLPClassifier")[0].fit(*wine)


def test_without_scikit_learn_the_extra_is_named():
    code = (
        "import sys; sys.modules['sklearn'] = None\nimport mlp\n"
        "try: mlp.MLPClassifier\nexcept ValueError as e: print(e)"
    )
    done = run_command([sys.executable, "-c", code])
    assert "pip install 'handgrad[train]'" in done.stdout, done.stderr


COMPILED = [
    ("MLPClassifier", {"alpha": 1.0, "batch_size": 40}),
    ("MLPClassifier", {"tol": 0.02, "n_iter_no_change": 2, "max_iter": 80}),
    ("MLPClassifier", {"early_stopping": True, "n_iter_no_change": 3, "max_iter": 120}),
    ("MLPClassifier", {"solver": "sgd", "learning_rate": "invscaling", "alpha": 0.01}),
    ("MLPRegressor", {"early_stopping": True, "n_iter_no_change": 3, "max_iter": 120}),
    ("MLPRegressor", {"shuffle": False, "activation": "tanh", "max_iter": 70}),
]


def steady_seed(estimator, x, y):
    """A seed for which the training does not rest on rounding.

    Inputs that differ by 1e-4 lead to the same last epoch and to the same best score's epoch. A
    loss or a score close to its limit would not.
    """

    def decided(seed, factor):
        estimator.set_params(random_state=numpy.random.RandomState(seed)).fit(x * factor, y)
        scores = estimator.validation_scores_ if estimator.early_stopping else [0]
        return estimator.n_iter_, numpy.argmax(scores)

    return next(
        seed
        for seed in itertools.count(3)
        if len({decided(seed, factor) for factor in (1 - 1e-4, 1, 1 + 1e-4)}) == 1
    )


@pytest.mark.parametrize(("name", "changes"), COMPILED)
@pytest.mark.parametrize("rows", [150, 90])  # the first 90 rows have only two classes
def test_many_compiled_epochs_are_scikit_learns(name, changes, rows):
    """Many epochs in one compiled call give scikit-learn's losses with their penalty, last epoch,
    best weights and random state.

    Ours compute in float32, scikit-learn in float64, and a hundred epochs carry the difference on.
    So losses agree to 2e-4 and weights to 2e-3.
    """
    pytest.importorskip("numba")
    if kernels.backend(torch.empty(0)) != "torch":
        pytest.skip("the compiled epoch needs a machine without a GPU")
    x, y = datasets.load_iris(return_X_y=True)
    x, y = x[:rows], y[:rows] if name == "MLPClassifier" else x[:rows, ::2]
    ours, theirs = pair(name, **{"learning_rate_init": 0.01, **changes})
    ours.set_params(precision="fp32", engine="epoch")
    seed = steady_seed(theirs, x, y)
    for estimator in (ours, theirs):
        estimator.set_params(random_state=numpy.random.RandomState(seed)).fit(x, y)
    assert ours.n_iter_ == theirs.n_iter_
    numpy.testing.assert_allclose(ours.loss_curve_, theirs.loss_curve_, rtol=2e-4)
    if theirs.early_stopping:
        numpy.testing.assert_allclose(ours.validation_scores_, theirs.validation_scores_, atol=1e-3)
        assert ours.best_validation_score_ == max(ours.validation_scores_)
    for one, other in zip(ours.coefs_ + ours.intercepts_, theirs.coefs_ + theirs.intercepts_):
        numpy.testing.assert_allclose(one, other, rtol=2e-3, atol=2e-4)
    states = [estimator.random_state.random(3).tolist() for estimator in (ours, theirs)]
    assert states[0] == states[1]


@pytest.mark.parametrize(
    "changes",
    [
        {"alpha": 0.1, "batch_size": 40},
        {"solver": "sgd", "learning_rate": "invscaling", "alpha": 0.01},
        {"solver": "sgd", "learning_rate": "adaptive", "tol": 0.1, "n_iter_no_change": 1},
        {"early_stopping": True, "alpha": 0.0},
    ],
)
def test_compiled_epochs_are_the_manual_ones(changes):
    """The compiled epoch equals the manual engine, also where weight decay applies to weights only,
    differs in the last batch, or rates change.

    Both compute in float32 with sums in different orders, so losses of eight epochs agree to 1e-4.
    """
    pytest.importorskip("numba")
    if kernels.backend(torch.empty(0)) != "torch":
        pytest.skip("the compiled epoch needs a machine without a GPU")
    x, y = datasets.load_iris(return_X_y=True)
    common = {"max_iter": 8, "random_state": 0, "precision": "fp32", "device": "cpu", **changes}
    common["hidden_layer_sizes"] = (5, 4)
    manual = mlp.MLPClassifier(engine="manual", **common).fit(x, y)
    compiled = mlp.MLPClassifier(engine="epoch", **common).fit(x, y)
    assert compiled.n_iter_ == manual.n_iter_
    numpy.testing.assert_allclose(compiled.loss_curve_, manual.loss_curve_, rtol=1e-4)
    for one, other in zip(
        compiled.coefs_ + compiled.intercepts_, manual.coefs_ + manual.intercepts_
    ):
        numpy.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("engine", ["epoch", "manual"])
@pytest.mark.parametrize("early_stopping", [False, True])
def test_an_interrupt_keeps_what_was_trained(engine, early_stopping, wine, monkeypatch):
    """As in scikit-learn: a warning, and an estimator that predicts."""
    pytest.importorskip("numba")
    from mlp import fitting

    options = {"early_stopping": early_stopping, "tol": 0.0, "n_iter_no_change": 10**6}
    ours = mlp.MLPClassifier((7,), max_iter=10**6, engine=engine, device="cpu", **options)
    name, calls = ("epochs", 2) if engine == "epoch" else ("epoch", 9)
    train, left = getattr(fitting.Training, name), [calls]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return train(*arguments)

    monkeypatch.setattr(fitting.Training, name, interrupted)
    start = mlp.MLPClassifier((7,), max_iter=1, engine=engine, device="cpu", random_state=0)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        ours.set_params(random_state=0).fit(*wine)
    assert len(ours.loss_curve_) == ours.n_iter_ > 0
    assert ours.loss_curve_[-1] < ours.loss_curve_[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        monkeypatch.undo()
        start.fit(*wine)
    assert not numpy.allclose(ours.coefs_[0], start.coefs_[0], atol=1e-3)


@pytest.mark.parametrize("engine", ["epoch", "autograd"])
def test_held_out_rows_without_weight(engine, monkeypatch):
    """A batch of them counts for nothing. If all weigh 0, the error is scikit-learn's."""
    random = numpy.random.RandomState(0)
    x, weights, held = random.randn(200, 5).astype("f4"), numpy.arange(1.0, 201), []
    y = (x[:, 0] > 0).astype(int) + (x[:, 1] > 1)
    hold_out = mlp.MLPClassifier._hold_out

    def seen(self, *arguments):
        parts = hold_out(self, *arguments)
        held.append(parts[3])
        return parts

    def fit():
        options = {"early_stopping": True, "batch_size": 10, "learning_rate_init": 0.01}
        network = mlp.MLPClassifier((8,), max_iter=30, random_state=0, engine=engine, **options)
        return network.fit(x, y, sample_weight=weights)

    with monkeypatch.context() as patch:
        patch.setattr(mlp.MLPClassifier, "_hold_out", seen)
        fit()
    rows = numpy.asarray(held[0][2]).astype(int) - 1
    weights[rows[:10]] = 0
    scores = fit().validation_scores_
    assert numpy.isfinite(scores).all() and scores[-1] > 0.6
    weights[rows] = 0
    with pytest.raises(ValueError, match="at least one non-zero"):
        fit()
