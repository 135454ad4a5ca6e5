"""`step(grads=…)`: each gradient reaches its own parameter, or one line says why it cannot."""

import copy
import re

import pytest
import torch
from torch import nn

import mlp
from mlp.optim import OPTIMIZERS
from tests.checks import assert_equal

EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def named():
    """Parameters by name. Two weights and two biases have the same shape."""
    torch.manual_seed(0)
    return dict(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).named_parameters())


def gradients(parameters):
    return {name: p.detach().cos() * (i + 1) for i, (name, p) in enumerate(parameters.items())}


def reversed_order(grads):
    return dict(reversed(grads.items()))


def stepped(make, grads_of, steps=3):
    """The parameters after steps of an optimizer."""
    parameters = named()
    optimizer = make(parameters)
    for _ in range(steps):
        optimizer.step(grads=grads_of(gradients(parameters)))
    return {name: p.detach() for name, p in parameters.items()}


@EACH
def test_by_name(name):
    """Names decide, in whatever order gradients and groups come."""
    kind = OPTIMIZERS[name]
    expected = stepped(lambda p: kind(p.values(), lr=0.1), lambda grads: list(grads.values()))

    def in_groups(p):
        first, last = list(p.items())[:2], list(p.items())[2:]
        return kind([{"params": last, "lr": 0.1}, {"params": first}], lr=0.1)

    for make in (lambda p: kind(p.items(), lr=0.1), in_groups):
        for order in (dict, reversed_order):
            assert_equal(stepped(make, order), expected)


@EACH
def test_wrong_names(name):
    parameters = named()
    before = {key: p.detach().clone() for key, p in parameters.items()}
    optimizer, grads = OPTIMIZERS[name](parameters.items(), lr=0.1), gradients(parameters)
    title = type(optimizer).__name__
    short = {key: g for key, g in grads.items() if key != "1.bias"}
    wrong = {
        f"{title}: no gradient for 1.bias; None as a gradient leaves a parameter as it is": short,
        f"{title}: no parameter called 2.bias; ": {**grads, "2.bias": grads["1.bias"]},
        f"{title}: no gradient for 1.bias and no parameter called 1.bais; ": {
            **short,
            "1.bais": grads["1.bias"],
        },
    }
    for message, given in wrong.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            optimizer.step(grads=given)
    assert_equal(dict(parameters), before)
    optimizer.step(grads={**grads, "0.weight": None})
    changed = [key for key, p in parameters.items() if not torch.equal(p, before[key])]
    assert changed == ["0.bias", "1.weight", "1.bias"]


def test_one_name_twice():
    both = [{"params": named().items()}, {"params": named().items()}]
    optimizer = mlp.SGD(both, lr=0.1)
    with pytest.raises(ValueError, match=r"several parameters called 0\.bias, 0\.weight, 1\.bias"):
        optimizer.step(grads=gradients(named()))


@EACH
def test_without_names(name):
    """Only a mapping whose order the shapes prove is taken, or one that is handed in as a list."""
    parameters = named()
    optimizer, grads = OPTIMIZERS[name](parameters.values(), lr=0.1), gradients(parameters)
    title = type(optimizer).__name__
    message = (
        f"{title}: gradients 0.weight and 1.weight have the same shape, and this optimizer knows "
        f"no names; make it from named parameters, as in {title}(model.named_parameters(), …), or "
        "hand in a list in its order"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step(grads=grads)
    with pytest.raises(ValueError, match=f"{title}: 4 parameters but 3 gradients"):
        optimizer.step(grads={key: grads[key] for key in list(grads)[:3]})
    other = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    optimizer = OPTIMIZERS[name]([torch.zeros(2, 3), torch.zeros(2)], lr=0.1)
    optimizer.step(grads=other)
    with pytest.raises(
        ValueError, match=r"gradient bias is \(2,\), but the parameter in its place"
    ):
        optimizer.step(grads=reversed_order(other))


def backward(net):
    torch.manual_seed(0)
    net.backward(torch.randn_like(net.forward(torch.randn(7, 3))))
    return net


@EACH
@pytest.mark.parametrize("make", [mlp.Net, lambda sizes: mlp.Net.over(mlp.MLP(sizes))])
def test_gradients_of_a_net(name, make):
    """They know the parameters of their network, in whatever order the optimizer has these."""
    net = backward(make([3, 3, 3]))
    expected = copy.deepcopy(net)
    kind = OPTIMIZERS[name]
    kind(expected.parameters.values(), lr=0.1).step(grads=list(expected.grads.values()))
    orders = (
        lambda p: p.values(),
        lambda p: reversed(p.values()),
        lambda p: p.items(),
        lambda p: reversed(p.items()),
        lambda p: [nn.Parameter(t) for t in reversed(p.values())],  # they share the memory
    )
    for order in orders:
        twin = copy.deepcopy(net)
        kind(list(order(twin.parameters)), lr=0.1).step(grads=twin.grads)
        assert_equal(dict(twin.parameters), dict(expected.parameters))


@EACH
def test_a_step_of_a_net_without_its_gradients_is_refused(name):
    """A net's parameters never have a .grad, so such a step could only do nothing."""
    net = mlp.Net([3, 2], seed=1)
    before = net.flat.clone()
    for parameters in (net.parameters.values(), net.parameters.items()):
        optimizer = OPTIMIZERS[name](parameters, lr=0.1)
        with pytest.raises(RuntimeError, match=r"no gradients; call step\(grads=net\.grads\)"):
            optimizer.step()
        assert torch.equal(net.flat, before)
        optimizer.step(grads=[torch.ones_like(p) for p in net.parameters.values()])
        assert not torch.equal(net.flat, before)
        before = net.flat.clone()


@EACH
def test_a_step_without_gradients_of_modules_does_nothing(name):
    """As in torch: all parameters are frozen, or no backward has run."""
    model = torch.nn.Linear(3, 2)
    before = model.weight.clone()
    for needed in (True, False):
        OPTIMIZERS[name](model.requires_grad_(needed).parameters(), lr=0.1).step()
        assert torch.equal(model.weight, before)


def test_gradients_of_another_net():
    net, other = backward(mlp.Net([3, 3, 3])), mlp.Net([3, 3, 3])
    before = other.state_dict()
    message = "SGD: these are gradients of a network with other parameters than this optimizer's"
    with pytest.raises(ValueError, match=message):
        mlp.SGD(other.parameters.values(), lr=0.1).step(grads=net.grads)
    assert_equal(other.state_dict(), before)
    mlp.SGD(other.parameters.items(), lr=1.0).step(grads=net.grads)  # the names say what is meant
    for key, p in other.parameters.items():
        torch.testing.assert_close(p, before[key] - net.grads[key])


def test_a_module_and_its_net():
    """The module's parameters share the memory of the net's, so the net's gradients are theirs."""
    module = mlp.MLP([3, 3, 3])
    net = backward(mlp.Net.of(module))
    before = {key: p.detach().clone() for key, p in module.named_parameters()}
    mlp.SGD(reversed([*module.parameters()]), lr=1.0).step(grads=net.grads)
    for key, p in module.named_parameters():
        torch.testing.assert_close(p.detach(), before[key] - net.grads[key])


@EACH
def test_states_by_name(name):
    """A loaded state goes by position. Names that show another order are refused, and others do not
    replace the optimizer's own.
    """
    kind, parameters = OPTIMIZERS[name], named()
    optimizer = kind(parameters.items(), lr=0.1)
    optimizer.step(grads=gradients(parameters))
    twin = kind(named().items(), lr=0.1)
    prefixed = copy.deepcopy(optimizer.state_dict())
    prefixed["param_groups"][0]["param_names"] = [f"module.{key}" for key in parameters]
    twin.load_state_dict(prefixed)
    assert twin.param_groups[0]["param_names"] == [*parameters]
    other = kind(reversed_order(named()).items(), lr=0.1)
    with pytest.raises(ValueError, match=r"in another order, 0\.weight, .*, not 1\.bias, "):
        other.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("engine", ["autograd", "manual"])
def test_engines_train_named_parameters(engine):
    results = []
    for parameters in (mlp.MLP.parameters, mlp.MLP.named_parameters):
        torch.manual_seed(0)
        model = mlp.MLP([4, 5, 3])
        optimizer = mlp.Adam(parameters(model), lr=0.01)
        trainer = mlp.Trainer(model, optimizer=optimizer, engine=engine, verbose=False)
        trainer.fit((torch.randn(20, 4), torch.arange(20) % 3), epochs=2, batch_size=5)
        results.append([p.detach() for p in model.parameters()])
    assert_equal(*results)


def assert_seen(engine, name, device):
    """Checks that the backward of a graph made before a training raises, because weights that it
    needs have changed. GANs make such graphs. engine: None for a step by hand.
    """
    model, x = mlp.MLP([3, 4, 2], device=device), torch.randn(8, 3, device=device)
    optimizer = mlp.optim.OPTIMIZERS[name](model.parameters(), lr=0.01)
    if engine is None:
        model(x).sum().backward()
    else:
        kind, loss = mlp.ENGINES[engine], mlp.SoftmaxCrossEntropy()
        if kind.refuses(model, loss, optimizer, 8) is not None:
            pytest.skip("by design: this engine does not serve here")
        trainer = mlp.Trainer(model, loss, optimizer, engine, verbose=False)
    before = model(x).sum()
    if engine is None:
        optimizer.step()
    else:
        trainer.fit((x, torch.arange(8, device=device) % 2), epochs=1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        before.backward()


@pytest.mark.interpreter
@pytest.mark.parametrize("name", mlp.optim.OPTIMIZERS)
@pytest.mark.parametrize("engine", [None, *mlp.ENGINES])
def test_a_step_is_seen_by_a_graph_that_was_made_before(engine, name, device):
    assert_seen(engine, name, device)


def test_a_compiled_epoch_is_seen_too():
    pytest.importorskip("numba", reason="the compiled epoch needs numba")
    assert_seen("epoch", "adam", "cpu")


def test_steps_that_torch_takes_as_nothing():
    """An empty group, and tensors whose gradients came by hand and were then removed."""
    mlp.SGD([{"params": []}], lr=0.1).step()
    weight = torch.ones(3)
    weight.grad = torch.ones(3)
    optimizer = mlp.SGD([weight], lr=0.1)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    torch.testing.assert_close(weight, torch.full((3,), 0.9))
