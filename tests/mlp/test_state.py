"""A network's state after training, in copies, under other modes and in threads."""

import copy
import io
import pickle
import threading

import pytest
import torch
from torch import nn

import mlp
from mlp import MLP, ConvNet, Net, Trainer
from mlp.engines.threads import threads
from mlp.state import Snapshot, in_mode, load_state, state_of
from tests import PATIENCE

SIZES = (6, 8, 3)
OPTIMIZERS = {
    "sgd": lambda p: mlp.SGD(p, lr=0.1),
    "momentum": lambda p: mlp.SGD(p, lr=0.1, momentum=0.9),
    "adam": lambda p: mlp.Adam(p, lr=0.01),
}


def tensors(seed=0):
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(seed))
    return x, x[:, :3].argmax(1)


@pytest.mark.parametrize("engine", ["autograd", "manual"])
@pytest.mark.parametrize(
    "make", [lambda: MLP((6, 300, 3)), lambda: ConvNet((1, 2, 3), (2,), 1, 1, (4,), 3)]
)
def test_the_module_after_training(make, engine, tmp_path):
    """After training each parameter is in its old memory, shared with no other. So it is saved
    alone.
    """
    safetensors = pytest.importorskip("safetensors.torch")
    model = make()
    before = {name: p.data_ptr() for name, p in model.named_parameters()}
    Trainer(model, engine=engine, verbose=False).fit(tensors(), 2, 16)
    for name, p in model.named_parameters():
        assert p.data_ptr() == before[name], "training moved the parameter"
        assert p.untyped_storage().nbytes() == p.numel() * p.element_size()
    safetensors.save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(list(model.children())[-1].state_dict(), buffer := io.BytesIO())
    assert buffer.tell() < 10_000


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_moved_between_two_fits(engine, make):
    """A module that moves to float64 and back, and to other memory, trains on with its present
    weights.
    """
    torch.manual_seed(0)
    model = MLP(SIZES)
    trainer = Trainer(model, optimizer=make, engine=engine, verbose=False)
    twin = copy.deepcopy(model)
    expected = Trainer(twin, optimizer=make, engine=engine, verbose=False).fit(tensors(), 4, 16)
    trainer.fit(tensors(), 2, 16)
    model.double().float()
    for p in model.parameters():
        p.data = p.data.clone()
    rows = trainer.fit(tensors(), 4, 16)
    assert [row["train_loss"] for row in rows] == [row["train_loss"] for row in expected]
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_another_dtype_between_two_fits(engine):
    model = MLP(SIZES)
    trainer = Trainer(model, engine=engine, verbose=False)
    trainer.fit(tensors(), 1, 16)
    model.double()
    rows = trainer.fit(tensors(), 3, 16)
    assert rows[2]["train_loss"] < rows[0]["train_loss"]
    assert all(p.dtype == torch.float64 for p in model.parameters())


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", [MLP, Net])
def test_copied_trainers(kind, make):
    """A deepcopy and a pickled copy train on as the original does, without changing it."""
    torch.manual_seed(0)
    model = kind(SIZES)
    parameters = list(mlp.engines.parameters_of(model).values())
    trainer = Trainer(model, optimizer=make(parameters), engine="manual", verbose=False)
    trainer.fit(tensors(), 2, 16)
    copies = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
    before = [p.detach().clone() for p in parameters]
    losses = [c.fit(tensors(), 4, 16)[-1]["train_loss"] for c in copies]
    assert all(torch.equal(p, q) for p, q in zip(parameters, before))
    assert losses == [trainer.fit(tensors(), 4, 16)[-1]["train_loss"]] * 2


@pytest.mark.parametrize("through", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copied_nets(through):
    """In a copy too, parameters and gradients are views of the flat tensors. It shares nothing with
    the original.
    """
    net = Net((6, 8, 3), "gelu")
    other = through(net)
    for flat, views in ((other.flat, other.parameters), (other.flat_grad, other.grads)):
        assert {v.untyped_storage().data_ptr() for v in views.values()} == {
            flat.untyped_storage().data_ptr()
        }
    other.flat.fill_(0.5)
    assert all((p == 0.5).all() for p in other.parameters.values())
    filled = Net((6, 8, 3), "gelu")
    filled.flat.fill_(0.5)
    assert torch.equal(other.forward(torch.ones(2, 6)), filled.forward(torch.ones(2, 6)))
    assert not (net.flat == 0.5).all()
    with pytest.raises(
        RuntimeError, match="backward was called before forward; call forward first"
    ):
        through(net).backward(torch.zeros(2, 3))


def test_a_net_and_its_optimizer_in_one_pickle():
    """After copying both in one object, the optimizer still trains the net's tensors."""
    made = Net(SIZES)
    pair = made, mlp.SGD(made.parameters.values(), lr=1.0)
    for net, optimizer in (copy.deepcopy(pair), pickle.loads(pickle.dumps(pair))):
        before = net.flat.clone()
        net.forward(torch.ones(2, 6))
        net.backward(torch.ones(2, 3))
        optimizer.step(grads=net.grads)
        assert torch.equal(net.parameters["1.bias"], before[-32:-29] - 2)
        assert (net.flat != before).any()


def test_buffers_made_in_inference_mode_can_train():
    """Buffers that a forward makes in inference mode serve later trainings outside of it."""
    net, loss = Net(SIZES), mlp.SoftmaxCrossEntropy()
    x, y = tensors()
    optimizer = mlp.SGD(net.parameters.values(), lr=0.1)
    trainer = Trainer(MLP(SIZES), engine="manual", verbose=False)
    data = mlp.Dataset(x, y)
    with torch.inference_mode():
        inside = net.forward(x)
        loss.forward(inside, y)
        net.backward(loss.backward())
        data.batch(torch.arange(16))
        trainer.fit(data, 1, 16, evaluate=data)
    values = []
    for _ in range(3):
        values.append(float(loss.forward(net.forward(x), y)))
        net.backward(loss.backward())
        optimizer.step(grads=net.grads)
    assert values == sorted(values, reverse=True)
    assert len(trainer.fit(data, 3, 16)) == 3
    Trainer(MLP(SIZES), engine="autograd", verbose=False).fit(data, 1, 16)


def test_threads_are_as_before():
    """torch's number of threads comes back, also from blocks that overlap in two Python threads."""
    before = torch.get_num_threads()
    first_in, second_out = threading.Event(), threading.Event()

    def first():
        with threads(1):
            first_in.set()
            assert second_out.wait(PATIENCE)

    try:
        torch.set_num_threads(3)
        thread = threading.Thread(target=first)
        thread.start()
        assert first_in.wait(PATIENCE)
        with threads(1):
            second_out.set()
            thread.join()
        assert torch.get_num_threads() == 3
        trainers = [Trainer(MLP(SIZES), engine="manual", verbose=False) for _ in range(2)]
        both = [threading.Thread(target=t.fit, args=(tensors(), 5, 16)) for t in trainers]
        for thread in both:
            thread.start()
        for thread in both:
            thread.join()
        assert torch.get_num_threads() == 3
        found = []
        fresh = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        fresh.start()
        fresh.join()
        assert found == [3]
    finally:
        torch.set_num_threads(before)


class Scaled(nn.Module):
    """A network with BatchNorm, Dropout, a saved buffer and one that is not saved."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3)
        )
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self, x):
        if self.training:
            self.seen += len(x)
            self.passing += 1
        return self.body(x)


def test_modes():
    """fit runs in training mode, evaluate in evaluation mode. Afterwards each module has its own
    mode again.
    """
    model = Scaled()
    model.body[1].eval()
    modes = {name: m.training for name, m in model.named_modules()}
    trainer, seen = Trainer(model, verbose=False), []
    model.body[3].register_forward_hook(lambda m, *arguments: seen.append(m.training))
    for evaluate in (tensors(1), None):
        trainer.fit(tensors(), len(trainer.history) + 1, 16, evaluate)
        assert {name: m.training for name, m in model.named_modules()} == modes
    assert seen == [True] * 3 + [False] + [True] * 3
    state = copy.deepcopy(model.state_dict())
    first = trainer.evaluate(tensors(1))
    assert trainer.evaluate(tensors(1)) == first == trainer.evaluate(mlp.Dataset(*tensors(1)))
    assert torch.equal(trainer.predict(tensors(1)[0]), trainer.predict(tensors(1)[0]))
    data = mlp.Dataset(*tensors(1))
    scores = mlp.metrics.probabilities(model, trainer.loss, data)
    assert torch.equal(scores, mlp.metrics.probabilities(model, trainer.loss, data))
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert {name: m.training for name, m in model.named_modules()} == modes
    model.eval()
    with torch.no_grad():
        logits = model(tensors(1)[0])
    expected = nn.functional.cross_entropy(logits, tensors(1)[1])
    assert first["test_loss"] == pytest.approx(float(expected), rel=1e-6)


def test_modes_come_back_after_an_error():
    model = Scaled().eval()

    def stop(row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(model, verbose=False).fit(tensors(), 3, 16, on_epoch=stop)
    assert not any(m.training for m in model.modules())
    with pytest.raises(ZeroDivisionError), in_mode(model, True):
        assert all(m.training for m in model.modules())
        1 / 0  # noqa: B018
    assert not any(m.training for m in model.modules())


def test_buffers_belong_to_the_model():
    """Buffers are in the state and are loaded. After a divergence they have the last good epoch's
    values.
    """
    trainer = Trainer(Scaled(), verbose=False)
    trainer.fit(tensors(), 2, 16)
    state = copy.deepcopy(trainer.state_dict())
    assert state["model"].keys() == trainer.model.state_dict().keys()
    assert float(state["model"]["seen"]) == 80 and "passing" not in state["model"]
    other = Trainer(Scaled(), verbose=False)
    other.load_state_dict(state)
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, state["model"][name]), name
    x, y = tensors()
    x = x.clone()
    x[:] = 3e38
    with pytest.raises(mlp.Diverged):
        trainer.fit((x, y), 3, 16)
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, state["model"][name]), name
    assert float(trainer.model.passing) == 6
    with pytest.raises(ValueError, match="the state is of another network"):
        Trainer(MLP(SIZES), verbose=False).load_state_dict(state)


def test_state_of_shared_parameters():
    """A shared parameter has both names, as in torch's state_dict. It stays shared when loaded."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(state_of(model)) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    before, saved = Snapshot(model), {name: t.clone() for name, t in state_of(model).items()}
    with torch.no_grad():
        model[0].weight.zero_()
    before.restore()
    assert torch.equal(model[0].weight, saved["0.weight"])
    load_state(model, {name: t + 1 for name, t in saved.items()})
    assert torch.equal(model[1].weight, saved["0.weight"] + 1)
    assert model[1].weight is model[0].weight


def test_networks_without_parameters():
    with pytest.raises(ValueError, match="ReLU has no parameters to train"):
        Trainer(nn.ReLU())
    with pytest.raises(ValueError, match="no weights yet; run a batch through the model first"):
        Trainer(nn.LazyLinear(3))


class Tempered(nn.Module):
    """A loss with a parameter that is trained."""

    def __init__(self):
        super().__init__()
        self.heat = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        return nn.functional.cross_entropy(output * self.heat, target)


def test_a_loss_that_learns():
    """The loss's parameters are in the state, and a divergence restores them."""

    def make():
        loss, model = Tempered(), MLP(SIZES)
        optimizer = mlp.SGD([*model.parameters(), *loss.parameters()], lr=0.1)
        return Trainer(model, loss, optimizer, verbose=False)

    trainer, other = make(), make()
    trainer.fit(tensors(), 2, 16)
    heat = float(trainer.loss.heat.detach())
    assert heat != 1.0
    other.load_state_dict(copy.deepcopy(trainer.state_dict()))
    assert float(other.loss.heat.detach()) == heat
    with pytest.raises(mlp.Diverged):
        trainer.fit((torch.full((40, 6), 3e38), tensors()[1]), 3, 16)
    assert float(trainer.loss.heat.detach()) == heat


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_fit_within_another_mode(engine, mode):
    """fit turns gradients on for itself, and the mode around it has no later effect."""
    trainer = Trainer(MLP(SIZES), engine=engine, verbose=False)
    data = tensors()
    with mode():
        rows = trainer.fit(data, 2, 16, evaluate=data)
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert len(trainer.fit(data, 3, 16)) == 3
