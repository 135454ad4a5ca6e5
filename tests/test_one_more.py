"""Adds an activation, a rule, an engine, a recipe, a schedule, an option, a data set, and a
format of files and of tables as CONTRIBUTING.md says, and trains with them.

tests/kernels/test_one_more_operation.py and test_one_more_loss.py do the same for an operation and
a loss.
"""

import gzip
import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer

import kernels
import mlp
from kernels import rules
from kernels.activations import ACTIVATIONS, Activation
from kernels.language import tl, triton
from kernels.rules import RULES, Rule
from mlp import data, loss, optim, public, recipes, scoring
from mlp.__main__ import main
from mlp.cli import options, training
from mlp.data import Dataset, files, frames, tables
from mlp.engines import ENGINES, Engine
from mlp.recipes import RECIPES, Recipe
from mlp.runs import RunFolder
from mlp.schedule import SCHEDULES, Named
from tests.checks import operations


@triton.jit
def softplus(z):
    """log(1 + eᶻ), without overflow."""
    return tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z)))


@triton.jit
def softplus_bwd(dy, y):
    """Forward was y = log(1 + eᶻ), so dy/dz = σ(z) = 1 - e⁻ʸ."""
    return dy * (1.0 - tl.exp(-y))


def softplus_ref(z, out=None):
    return torch.add(z.clamp_min(0), torch.log1p(torch.exp(-z.abs())), out=out)


def softplus_bwd_ref(dy, y, out=None):
    return torch.mul(dy, -torch.expm1(-y), out=out)


SOFTPLUS = Activation(
    softplus,
    softplus_bwd,
    softplus_ref,
    softplus_bwd_ref,
    F.softplus,
    "y",
    (),
    torch.nn.Softplus,
)


@triton.jit
def sign_update(p, g, states, numbers):
    """p ← p - lr (sign g + decay p)."""
    lr, decay = numbers
    sign = tl.where(g > 0, 1.0, 0.0) - tl.where(g < 0, 1.0, 0.0)
    return p - lr * (sign + decay * p), states


def sign_tensor(p, g, states, numbers):
    lr, decay = numbers
    p.sub_(lr * (g.sign() + decay * p))


SIGN = Rule(
    "sign",
    (("lr", 0.01), ("weight_decay", 0.0)),
    (),
    ("lr", "weight_decay"),
    rules.RULES["sgd"].row,
    rules.plain_at,
    sign_update,
    rules.RULES["sgd"].at_ref,
    sign_tensor,
    None,
)


class Sign(optim._Ruled, torch.optim.Optimizer):
    """Steps of size lr against the sign of the gradient."""

    counted = False

    def __init__(self, params, lr=0.01, weight_decay=0.0):
        options = {"lr": lr, "weight_decay": weight_decay, "maximize": False}
        super().__init__(params, options)

    def row(self, group):
        return RULES["sign"]


class Plain(Engine):
    """An engine that takes one step by autograd at a time."""

    name = "plain"

    @classmethod
    def refuses(cls, model, loss, optimizer, batch_size=1):
        return None if isinstance(model, torch.nn.Module) else "plain: needs an nn.Module"

    def step(self, x, y):
        output = self.model(x)
        value = self.loss(output, y)
        self.optimizer.zero_grad()
        value.backward()
        self.optimizer.step()
        return output.detach(), value.detach()


def batch(device="cpu"):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 6, generator=generator)
    return Dataset(x.to(device), x[:, :3].argmax(1).to(device))


def trained(engine, activation, optimizer, device):
    """The parameters after two epochs, or None where the engine needs another machine."""
    model = mlp.MLP((6, 5, 3), activation, device=device)
    mlp.initialise(dict(model.named_parameters()), None, 4)
    made = optimizer(model.parameters())
    if ENGINES[engine].refuses(model, mlp.SoftmaxCrossEntropy(), made, 8):
        return None
    mlp.Trainer(model, optimizer=made, engine=engine, verbose=False).fit(
        batch(device), 2, 8, seed=4
    )
    return [p.detach().clone() for p in model.parameters()]


def every_engine(activation, optimizer, device) -> list[str]:
    """Checks that each engine trains as autograd on the reference does. Returns the names of those
    that serve here.
    """
    with kernels.use("torch"):
        expected = trained("autograd", activation, optimizer, device)
    served = []
    for engine in ENGINES:
        found = trained(engine, activation, optimizer, device)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            served.append(engine)
    return served


def test_activation(monkeypatch, device):
    """An activation needs only a row of `kernels.ACTIVATIONS`."""
    monkeypatch.setitem(ACTIVATIONS, "softplus", SOFTPLUS)
    z = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(softplus_ref(z), F.softplus(z))
    (gradient,) = torch.autograd.grad(F.softplus(z).sum(), z)
    torch.testing.assert_close(softplus_bwd_ref(torch.ones_like(z), softplus_ref(z)), gradient)
    served = every_engine("softplus", lambda p: mlp.SGD(p, lr=0.1), device)
    assert {"autograd", "manual"} <= set(served)
    fused = mlp.fuse(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Softplus()))
    assert operations(lambda: fused(torch.ones(1, 6))) == ["softplus"]


def test_rule(monkeypatch, device):
    """A rule needs a row of `kernels.RULES` and a class in mlp/optim.py."""
    monkeypatch.setitem(RULES, "sign", SIGN)
    monkeypatch.setitem(optim.OPTIMIZERS, "sign", Sign)
    model = mlp.MLP((6, 3))
    before = [p.detach().clone() for p in model.parameters()]
    mlp.SoftmaxCrossEntropy()(model(batch().inputs), batch().targets).backward()
    Sign(model.parameters(), lr=0.5).step()
    for p, was in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), was - 0.5 * p.grad.sign())
    served = every_engine("tanh", lambda p: Sign(p, lr=0.01, weight_decay=0.1), device)
    assert {"autograd", "manual"} <= set(served)


def optimizers_rows():
    """The names of the rules that the optimizers take, with and without momentum."""
    changes = {}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}
    for kind in optim.OPTIMIZERS.values():
        made = kind([torch.zeros(1)])
        yield from {made.row({**made.defaults, **change}).name for change in changes}


def classes_of(module, base):
    """The classes of a module that derive from `base` and name a row."""
    found = [kind for kind in vars(module).values() if isinstance(kind, type)]
    return {kind for kind in found if issubclass(kind, base) and "row" in vars(kind)} - {base}


def test_every_row_has_a_public_class():
    """A class that is left out of a table, or of mlp/public.py, would be missed by nobody else."""
    assert set(optimizers_rows()) == set(RULES)
    assert classes_of(optim, optim._Ruled) == set(optim.OPTIMIZERS.values())
    assert set(loss.LOSSES) == set(kernels.LOSSES)
    assert classes_of(loss, loss.Criterion) == set(loss.LOSSES.values())
    kinds = *optim.OPTIMIZERS.values(), *loss.LOSSES.values()
    assert [kind.__name__ for kind in kinds if getattr(mlp, kind.__name__, None) is not kind] == []
    assert {kind.__name__ for kind in kinds} <= set(public.__all__)


def test_engine(monkeypatch):
    """An engine needs a class and its place in `mlp.engines.ENGINES`. "auto" takes the last that
    serves.
    """
    monkeypatch.setitem(ENGINES, "plain", Plain)
    optimizer = lambda p: torch.optim.SGD(p, lr=0.1)  # noqa: E731
    found = trained("plain", "tanh", optimizer, "cpu")
    torch.testing.assert_close(found, trained("autograd", "tanh", optimizer, "cpu"))
    model = mlp.MLP((6, 5, 3))
    assert mlp.Trainer(model, verbose=False).fit(batch(), 1, 8)[-1]["epoch"] == 1
    made = mlp.Trainer(model, verbose=False)
    made.fit(batch(), 1, 8)
    assert made.engine.name == "plain"
    with pytest.raises(
        ValueError, match="known: auto, lean, autograd, manual, graph, epoch, plain"
    ):
        mlp.Trainer(model, engine="fast")


def test_recipe(monkeypatch):
    """A recipe needs only a row of `mlp.recipes.RECIPES`."""
    row = Recipe("6-4-3 tanh, Adam", hidden=(4,), activation="tanh", optimizer="adam", epochs=2)
    monkeypatch.setitem(RECIPES, "small", row)
    recipe = recipes.get("small")
    model = recipe.model(batch(), seed=0)
    assert model.sizes == (6, 4, 3)
    trainer = mlp.Trainer(
        model, recipe.make_loss(), recipe.make_optimizer(model.parameters()), verbose=False
    )
    history = trainer.fit(batch(), recipe.epochs, recipe.batch_size)
    assert isinstance(trainer.optimizer, mlp.Adam) and len(history) == 2
    with pytest.raises(ValueError, match="small"):
        recipes.get("smaller")


def test_schedule(monkeypatch):
    """A schedule needs only a row of `mlp.schedule.SCHEDULES`."""
    halved = lambda plan: lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5)  # noqa: E731
    monkeypatch.setitem(SCHEDULES, "halved", Named("half the rate after each epoch", halved))
    recipe = recipes.changed(recipes.PLAIN, hidden=(4,), lr=0.8, schedule="halved")
    trainer = mlp.Trainer(recipe.model(batch()), None, recipe.make_optimizer, verbose=False)
    trainer.fit(batch(), 2, scheduler=recipe.scheduler(20))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.2
    assert "; schedule halved" in recipe.describe(recipe.network(batch()))
    assert "without a schedule" in recipe.beyond_pack()


def test_measure(monkeypatch):
    """A measure needs only a row of a table of mlp/scoring.py."""
    pytest.importorskip("sklearn")
    worst = scoring.Measure("worst", ".1f", lambda metrics, said, true: abs(said - true).max())
    monkeypatch.setitem(scoring.OF_NUMBERS, "worst", worst)
    said, true = np.array([[1.0], [2.0]]), np.array([[1.5], [4.0]])
    found = scoring.numbers(said, true)
    assert found["worst"] == 2.0 and "worst" in scoring.brief(found)
    assert scoring.line({"test_worst": 2.0}) == "  test worst 2.0"
    assert np.isnan(scoring.numbers(said * np.inf, true)["worst"])


def test_option(monkeypatch, tmp_path, capsys):
    """An option of an optimizer needs only a row of its group."""
    row = options.Option("dampening", float, "Share of a gradient that momentum leaves out.")
    monkeypatch.setattr(options, "OPTIMIZER", (*options.OPTIMIZER, row))
    app = typer.Typer(rich_markup_mode=None)
    app.callback()(lambda: None)
    options.command(app, "train", *options.TRAIN, row)(training.train)
    argv = "train digits --epochs 1 --engine manual --device cpu --momentum 0.5 --dampening 0.25"
    with kernels.use("torch"):  # an epoch of digits in the interpreter takes a minute
        app([*argv.split(), "--out", str(tmp_path / "run")], standalone_mode=False)
    found = RunFolder(tmp_path / "run").settings.recipe.optimizer_options
    assert found == {"lr": 0.05, "momentum": 0.5, "dampening": 0.25}
    assert "dampening 0.25" in capsys.readouterr().out


def test_data_set(monkeypatch, tmp_path):
    """A data set needs its name and torchvision's class in `mlp.data.TORCHVISION`."""
    datasets = pytest.importorskip("torchvision.datasets")

    def squares(root, train, **download):
        count = 20 if train else 5
        pixels = torch.arange(count * 36, dtype=torch.uint8).view(count, 6, 6)
        targets = torch.arange(count) % 2
        return SimpleNamespace(data=pixels, targets=targets, classes=["even", "odd"])

    squares.__name__ = "Squares"
    monkeypatch.setattr(datasets, "Squares", squares, raising=False)
    monkeypatch.setitem(data.TORCHVISION, "squares", "Squares")
    monkeypatch.setattr(data, "NAMES", ("digits", *data.TORCHVISION))
    train, test = data.load("squares", tmp_path, verbose=False)
    assert (len(train), len(test), train.image_shape) == (20, 5, (1, 6, 6))
    assert train.classes == ("even", "odd")
    np.testing.assert_allclose(float(train.batch(torch.tensor([0]))[0].max()), 35 / 255)
    model = mlp.MLP((36, 4, 2))
    history = mlp.Trainer(model, verbose=False).fit(train, 2, 8, evaluate=test)
    assert len(history) == 2


def test_format_of_files(monkeypatch, tmp_path):
    """A format of files needs a reader in `mlp.data.files.READERS`."""
    path = tmp_path / "points.rows"
    np.savetxt(path, np.column_stack([np.arange(40) % 5, np.arange(40) % 2]))

    def rows(path):
        table = np.loadtxt(path)
        return {"x_train": table[:, :1], "y_train": table[:, 1].astype(int)}

    monkeypatch.setitem(files.READERS, ".rows", rows)
    train, test = data.load(str(path), tmp_path, verbose=False)
    assert train.classes == ("0", "1") and len(train) + len(test) == 40


def test_format_of_tables(monkeypatch, tmp_path):
    """A format of tables needs a row of `mlp.data.frames.FORMATS`. It may be packed, too."""
    pandas = pytest.importorskip("pandas")
    lines = "".join(f'{{"a": {i % 7}, "b": "{i}", "y": {i % 2}}}\n' for i in range(40))
    (tmp_path / "points.jsonl.gz").write_bytes(gzip.compress(lines.encode()))

    def rows(path, contents, how):
        return pandas.read_json(io.BytesIO(contents), lines=True)

    monkeypatch.setitem(frames.FORMATS, ".jsonl", frames.Format(rows, is_text=False))
    choice = tables.Choice(("y",), drop=("b",))
    parts = tables.load(tmp_path / "points.jsonl.gz", choice)
    assert parts.table.features == ["a"] and len(parts.train) == 32
    monkeypatch.chdir(tmp_path)
    chosen = ["--target", "y", "--drop", "b", "--epochs", "1"]
    assert main(["train", "points.jsonl.gz", *chosen, "--out", "run"]) == 0
    assert main(["predict", "run", "points.jsonl.gz"]) == 0
