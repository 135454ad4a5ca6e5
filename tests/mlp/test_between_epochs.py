"""What a callback changes between two epochs, engine `epoch` must see as engine `manual` does.

The compiled epoch of a CPU keeps memory and tables for the next one. Nothing of them may be old.
"""

import pytest
import torch

import mlp
from kernels import cpu
from mlp.engines import takeover

pytest.importorskip("numba")

EPOCHS = 5


class Fitted:
    """A trainer, its data, and what `change` does after epoch 2."""

    def __init__(self, engine, change, optimizer="adam"):
        torch.manual_seed(7)
        self.x, self.y = torch.rand(70, 6, dtype=torch.float64), torch.randint(0, 3, (70,))
        self.model = mlp.MLP([6, 5, 3], "tanh", dtype=torch.float64)
        self.trainer = mlp.Trainer(self.model, optimizer=optimizer, engine=engine, verbose=False)
        self.optimizer, self.loss = self.trainer.optimizer, self.trainer.loss
        self.group = self.optimizer.param_groups[0]
        self.engines = []

        def on_epoch(row):
            self.engines.append(self.trainer.engine.name)
            if row["epoch"] == 2:
                change(self)

        with cpu.many():
            self.trainer.fit((self.x, self.y), EPOCHS, batch_size=16, on_epoch=on_epoch)


def set_number(name, value):
    def change(fitted):
        fitted.group[name] = value

    return change


def weights_in_place(fitted):
    with torch.no_grad():
        fitted.model[0].weight.mul_(-0.5)


def weights_through_numpy(fitted):
    fitted.model[1].bias.detach().numpy()[:] = 0.25


def weights_in_other_memory(fitted):
    fitted.model[0].weight.data = torch.full((5, 6), 0.1, dtype=torch.float64)


def another_parameter(fitted):
    new = torch.nn.Parameter(fitted.model[0].weight.detach().flip(0))
    fitted.model[0].weight = new
    fitted.optimizer.state.pop(fitted.group["params"][0])
    fitted.group["params"][0] = new
    for p in fitted.group["params"][1:]:
        fitted.optimizer.state.pop(p)


def inputs_in_place(fitted):
    fitted.x.sub_(0.5)


def inputs_that_are_zero(fitted):
    fitted.x.mul_(torch.rand(fitted.x.shape, generator=torch.Generator().manual_seed(1)) < 0.2)


def inputs_through_numpy(fitted):
    fitted.x.numpy()[::2] *= -1


def labels_in_place(fitted):
    fitted.y.copy_((fitted.y + 1) % 3)


def states_in_place(fitted):
    for state in fitted.optimizer.state.values():
        state["exp_avg"].zero_()
        state["step"].fill_(40)


def states_that_are_gone(fitted):
    fitted.optimizer.state.clear()


def another_loss(fitted):
    fitted.loss.scale = 3.0


def another_number_of_threads(fitted):
    torch.set_num_threads(3 - min(torch.get_num_threads(), 2))


CHANGES = {
    "the learning rate": set_number("lr", 0.05),
    "a decay": set_number("weight_decay", 0.1),
    "the averages": set_number("betas", (0.5, 0.7)),
    "weights in place": weights_in_place,
    "weights through numpy": weights_through_numpy,
    "weights in other memory": weights_in_other_memory,
    "another parameter": another_parameter,
    "inputs in place": inputs_in_place,
    "inputs that are 0": inputs_that_are_zero,
    "inputs through numpy": inputs_through_numpy,
    "labels in place": labels_in_place,
    "states in place": states_in_place,
    "no states": states_that_are_gone,
    "another loss": another_loss,
    "another number of threads": another_number_of_threads,
}


def assert_same(ours, other):
    for row, reference in zip(ours.trainer.history, other.trainer.history, strict=True):
        assert row["train_loss"] == pytest.approx(reference["train_loss"], rel=1e-10)
        assert row["train_accuracy"] == reference["train_accuracy"]
    for p, q in zip(ours.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", CHANGES)
def test_the_next_epoch_sees(name):
    threads = torch.get_num_threads()
    try:
        ours = Fitted("epoch", CHANGES[name])
        torch.set_num_threads(threads)
        other = Fitted("manual", CHANGES[name])
    finally:
        torch.set_num_threads(threads)
    assert ours.engines == ["epoch"] * EPOCHS
    assert_same(ours, other)
    changed = name != "another number of threads"
    still = Fitted("epoch", lambda fitted: None)
    assert (still.trainer.history[-1]["train_loss"] != ours.trainer.history[-1]["train_loss"]) == (
        changed
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9], ids=["to momentum", "from momentum"])
def test_the_next_epoch_sees_another_rule(momentum):
    def optimizer(parameters):
        return mlp.SGD(parameters, lr=0.1, momentum=momentum)

    change = set_number("momentum", 0.9 - momentum)
    ours, other = (Fitted(engine, change, optimizer) for engine in ("epoch", "manual"))
    assert ours.engines == ["epoch"] * EPOCHS
    assert_same(ours, other)


def frozen(fitted):
    fitted.model[0].weight.requires_grad_(False)


def hooked(fitted):
    fitted.model[1].register_forward_hook(lambda module, inputs, output: output * 2)


def gradient_hooked(fitted):
    fitted.model[1].weight.register_hook(lambda gradient: gradient * 2)


def method_replaced(fitted):
    layer = fitted.model[1]
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight) + 1


def layer_replaced(fitted):
    layer = fitted.model[1]
    new = torch.nn.Linear(5, 3, dtype=torch.float64)
    new.weight, new.bias = layer.weight, layer.bias
    fitted.model.add_module("1", new)


def activation_replaced(fitted):
    fitted.model[0].activation = "relu"


def transposed(fitted):
    fitted.model[0].weight.data = torch.rand(6, 5, dtype=torch.float64).T


@pytest.mark.parametrize(
    "change",
    [
        frozen,
        hooked,
        gradient_hooked,
        method_replaced,
        layer_replaced,
        activation_replaced,
        transposed,
    ],
)
def test_a_network_that_the_engine_may_no_longer_replace(change):
    checked = takeover.Checked.of(mlp.MLP([6, 5, 3], "tanh"))
    assert checked is not None
    ours = Fitted("auto", change)
    assert ours.engines[:3] == ["epoch", "epoch", "autograd"]
    assert_same(ours, Fitted("autograd", change))


def eval_mode(fitted):
    fitted.model.eval()


def narrowed(fitted):
    fitted.model.float()


def halved(fitted):
    fitted.model.half()


def another_group(fitted):
    kept = fitted.group["params"]
    fitted.group["params"] = kept[:2]
    fitted.optimizer.add_param_group({"params": kept[2:], "lr": 0.05})


def without_values(fitted):
    fitted.model.to("meta")


# change -> {engine: what its refusal says}, with None for engines that are not named
OF_ALL: dict = {
    eval_mode: {},
    narrowed: {"epoch": "make a new optimizer", None: "dtype"},
    halved: {"epoch": "trains float32 and float64 networks", None: "dtype"},
    another_group: {"epoch": "trains with one parameter group"},
    without_values: {None: "the network is on the device meta"},
}


@pytest.mark.parametrize("engine", ["epoch", "manual", "auto"])
@pytest.mark.parametrize("change", OF_ALL)
def test_a_change_of_the_whole_network(engine, change):
    """The next epoch is as under autograd, or refused in one line. No old memory is trained."""
    refusals = OF_ALL[change]
    message = refusals.get(engine, refusals.get(None))
    if message is None:
        assert_same(Fitted(engine, change), Fitted("autograd", change))
        return
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        Fitted(engine, change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("engine", ["manual", "auto"])
@pytest.mark.parametrize("change", [narrowed, halved])
def test_a_network_of_another_dtype_without_states(engine, change):
    """SGD keeps nothing of the old dtype, so the training goes on in the new one."""
    ours, other = (
        Fitted(kind, change, lambda parameters: mlp.SGD(parameters, lr=0.1))
        for kind in (engine, "autograd")
    )
    assert ours.model[0].weight.dtype is other.model[0].weight.dtype is not torch.float64
    for row, reference in zip(ours.trainer.history, other.trainer.history, strict=True):
        assert row["train_loss"] == pytest.approx(reference["train_loss"], rel=2e-3)


def test_memory_that_is_lent_again_is_as_new(monkeypatch):
    from kernels.cpu import epoch

    def fit():
        return Fitted("epoch", lambda fitted: None)

    monkeypatch.setattr(epoch, "_idle", [])
    first = fit()
    assert epoch._idle
    for memory in epoch._idle:
        memory.w.fill(float("nan"))
    again = fit()
    for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_an_interrupt_of_a_short_epoch_leaves_all_of_it(monkeypatch):
    from kernels.cpu import epoch

    def made():
        torch.manual_seed(7)
        data = torch.rand(70, 6), torch.randint(0, 3, (70,))
        trainer = mlp.Trainer(mlp.MLP([6, 5, 3]), optimizer="adam", engine="epoch", verbose=False)
        return trainer, lambda: trainer.fit(data, 1, batch_size=16, on_epoch=lambda row: None)

    copied, presses = epoch.write, iter([True, False])

    def write(pairs):
        copied(pairs[:2])
        if next(presses):
            raise KeyboardInterrupt
        copied(pairs)

    monkeypatch.setattr(epoch._Choice, "is_short", lambda choice, left: True)
    whole, fit = made()
    fit()
    monkeypatch.setattr(epoch, "write", write)
    torn, fit = made()
    with pytest.raises(KeyboardInterrupt):
        fit()
    assert [int(state["step"]) for state in torn.optimizer.state.values()] == [5] * 4
    for p, q in zip(torn.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)
