"""The flat tensors behind a Net, and the one step of plain SGD on them."""

import copy
import pickle
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch

import mlp
from mlp import optim
from mlp.views import Views
from tests.checks import assert_equal


def trained_once(net):
    torch.manual_seed(0)
    net.backward(torch.randn_like(net.forward(torch.randn(7, 6))))
    return net


def stepped(monkeypatch, net, make, grads=None):
    """How many tensors each update took."""
    taken = []
    apply = optim.apply_checked

    def counted(rule, params, *lists, **options):
        taken.append(len(params))
        apply(rule, params, *lists, **options)

    monkeypatch.setattr(optim, "apply_checked", counted)
    make(net).step(grads=net.grads if grads is None else grads(net))
    return taken


def sgd(net, **options):
    return mlp.SGD(net.parameters.values(), lr=0.3, **options)


def other_view(net):
    """A parameter whose memory was replaced."""
    parameter = net.parameters["1.bias"]
    parameter.data = parameter.data.clone()


def other_gradient(net):
    net.grads["0.bias"] = torch.ones(5)


def transposed(net):
    """A parameter that has its place still, but other strides."""
    parameter = net.parameters["1.weight"]
    parameter.data = parameter.data.t()
    net.grads["1.weight"].data = net.grads["1.weight"].data.t()


CASES = {
    "plain": (sgd, None, 1),
    "decay": (lambda net: sgd(net, weight_decay=0.1, maximize=True), None, 1),
    "momentum": (lambda net: sgd(net, momentum=0.9), None, 4),
    "Adam": (lambda net: mlp.Adam(net.parameters.values()), None, 4),
    "other memory": (sgd, other_view, 4),
    "another gradient": (sgd, other_gradient, 4),
    "other strides": (sgd, transposed, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_on_the_flat_tensors(case, monkeypatch):
    """It is taken where it is a step of every parameter. The numbers are those of single steps."""
    make, change, expected = CASES[case]
    nets = [trained_once(mlp.Net([6, 5, 5], "tanh", seed=1)) for _ in range(2)]
    for net in nets:
        if change is not None:
            change(net)
    assert stepped(monkeypatch, nets[0], make) == [expected]
    assert stepped(monkeypatch, nets[1], make, lambda net: list(net.grads.values())) == [4]
    torch.testing.assert_close(*(list(net.parameters.values()) for net in nets))


def test_a_frozen_parameter_stays(monkeypatch):
    """An optimizer of some parameters does not change the others, which are in the flat tensor."""
    net = trained_once(mlp.Net([6, 5, 4], seed=1))
    before = net.state_dict()
    some = [net.parameters[name] for name in ("0.weight", "1.bias")]
    optimizer = mlp.SGD(some, lr=0.3)
    with pytest.raises(ValueError, match="2 parameters but 4 gradients"):
        optimizer.step(grads=net.grads)
    optimizer.step(grads=[net.grads[name] for name in ("0.weight", "1.bias")])
    changed = {n for n, p in net.parameters.items() if not torch.equal(p, before[n])}
    assert changed == {"0.weight", "1.bias"}


@pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_has_its_own_flat_tensors(how):
    net = trained_once(mlp.Net([6, 5, 4], seed=1))
    copied = how(net)
    assert isinstance(copied.grads, Views) and type(copy.copy(net.grads)) is dict
    assert copied.grads.are_of(copied.parameters.values())
    assert not copied.grads.are_of(net.parameters.values())
    before = net.state_dict()
    sgd(copied).step(grads=copied.grads)
    assert_equal(net.state_dict(), before)


def test_a_shallow_copy_shares_the_flat_tensors():
    net = trained_once(mlp.Net([6, 5, 4], seed=1))
    copied = copy.copy(net)
    for one in (net, copied):
        one.flat.fill_(1)
        assert net.parameters.are_whole() and all(p.eq(1).all() for p in net.parameters.values())
        assert copied.grads.are_of(copied.parameters.values())
        one.flat.zero_()


def test_processes_share_parameters_and_no_gradients():
    """As a module that is sent to another process. The pickle is that of torch.multiprocessing."""
    net = trained_once(mlp.Net([6, 5, 4], seed=1))
    kept = net.flat_grad.clone()
    received = pickle.loads(ForkingPickler.dumps(net))
    received.flat.fill_(2)
    assert all(p.eq(2).all() for p in net.parameters.values())
    torch.testing.assert_close(received.flat_grad, kept, rtol=0, atol=0)
    received.flat_grad.zero_()
    assert torch.equal(net.flat_grad, kept)


@pytest.mark.parametrize(
    "call",
    [
        lambda net, array: net.forward(array),
        lambda net, array: net.predict(array),
        lambda net, array: (net.forward(torch.ones(3, 6)), net.backward(array)),
        lambda net, array: sgd(net).step(grads=[array, torch.ones(4)]),
        lambda net, array: mlp.SoftmaxCrossEntropy().forward(torch.ones(3, 4), array),
        lambda net, array: mlp.MeanSquaredError().forward(array, torch.ones(3, 4)),
    ],
)
def test_arrays_are_refused(call):
    with pytest.raises(TypeError, match=r"must be a torch\.Tensor, got ndarray; convert it with"):
        call(mlp.Net([6, 4]), np.ones((3, 4)))
