"""What has a seed leaves the global generators of torch and numpy as they were."""

import numpy as np
import pytest
import torch

import mlp
from mlp import data, export, recipes

X = np.random.RandomState(0).randn(120, 5).astype(np.float32)
Y = (X[:, 0] > 0).astype(int)
PAIR = torch.from_numpy(X), torch.from_numpy(Y)


@pytest.fixture
def unchanged():
    """A function that calls another one and compares the generators' states."""

    def state():
        kind, words, *place = np.random.get_state()
        return torch.get_rng_state().tolist(), kind, words.tolist(), place

    def call(run, *arguments, **named):
        before = state()
        result = run(*arguments, **named)
        assert state() == before
        return result

    return call


@pytest.mark.parametrize("engine", ["autograd", "manual", "lean", "auto"])
def test_a_trainer(engine, unchanged):
    trainer = mlp.Trainer(mlp.MLP([5, 8, 2]), engine=engine, verbose=False)
    unchanged(trainer.fit, PAIR, 3, seed=2, evaluate=PAIR)
    unchanged(trainer.fit, PAIR, 6, seed=2)
    unchanged(trainer.predict, PAIR[0])


@pytest.mark.filterwarnings("ignore:Stochastic Optimizer")
@pytest.mark.parametrize("engine", ["auto", "manual"])
def test_an_estimator(engine, unchanged):
    pytest.importorskip("sklearn")
    for options in ({}, {"early_stopping": True}):
        made = mlp.MLPClassifier((8,), max_iter=2, random_state=0, engine=engine, **options)
        unchanged(made.fit, X, Y)
    made = mlp.MLPClassifier((8,), random_state=0, engine=engine)
    unchanged(made.partial_fit, X, Y, classes=[0, 1])
    unchanged(made.fit, X, Y, sample_weight=np.ones(len(X)))
    search = mlp.SearchCV(made.set_params(max_iter=2), {"alpha": [0.1, 0.2]}, cv=2)
    unchanged(search.fit, X, Y)


def test_a_sweep(unchanged):
    sweep = unchanged(mlp.Sweep, [5, 4, 2], 2, lr=[0.1, 0.2], seeds=[3, 4])
    unchanged(sweep.fit, PAIR, 1)
    unchanged(sweep.network, 1)
    sweep = mlp.Sweep([{"hidden": 4}, {"hidden": (6,), "seed": 1}])
    unchanged(sweep.fit, PAIR, 1)
    unchanged(sweep.network, 1)


def test_networks_with_a_seed(unchanged, tmp_path):
    images = mlp.Dataset.of(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1]))
    for recipe in (recipes.get("default"), recipes.get("convnet")):
        model = unchanged(recipe.model, images, seed=3)
        assert all(p.isfinite().all() for p in model.parameters())
    unchanged(mlp.Net, [5, 8, 2], seed=3)
    unchanged(mlp.initialise, dict(mlp.MLP([5, 2]).named_parameters()), "normal", 3)
    mlp.save(model, tmp_path / "m.safetensors")
    again = unchanged(mlp.load, tmp_path / "m.safetensors")
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    plain = unchanged(export.plain, model)
    x = torch.rand(2, 784)
    torch.testing.assert_close(plain(x), model(x))
    unchanged(data.split, mlp.Dataset(*PAIR))


def test_networks_without_a_seed_draw_as_torchs_layers():
    torch.manual_seed(3)
    expected = [torch.nn.Linear(5, 8), torch.nn.Linear(8, 2)]
    torch.manual_seed(3)
    for ours, layer in zip(mlp.MLP([5, 8, 2]).children(), expected, strict=True):
        assert torch.equal(ours.weight, layer.weight) and torch.equal(ours.bias, layer.bias)
        ours.reset_parameters()
        assert not torch.equal(ours.weight, layer.weight)
