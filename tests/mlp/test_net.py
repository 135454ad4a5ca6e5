"""The manual API gives what the module gives, bit for bit, from views of two flat tensors."""

import copy
import itertools

import pytest
import torch

from kernels.activations import ACTIVATIONS
from mlp import MLP, SGD, ConvNet, Net
from mlp.loss import LOSSES
from tests.checks import assert_equal

SIZES = (17, 12, 9, 5)
# a batch, a smaller one, more dimensions, a single sample, no samples
LEADS = [(16,), (5,), (2, 3), (), (0,)]


def twins(*arguments, device="cpu", dtype=None, **options):
    """A module and a Net with equal weights, each in its own memory."""
    module = MLP(*arguments, **options, device=device, dtype=dtype)
    net = Net(*arguments, **options, device=device, dtype=dtype)
    net.load_state_dict(module.state_dict())
    return module, net


def assert_twins(module, net, leads=LEADS):
    """Checks that outputs, losses and all gradients of the two are torch.equal.

    leads: the leading dimensions of the batches.
    """
    like = next(module.parameters())
    for lead, (name, loss) in itertools.product(leads, LOSSES.items()):
        x = torch.randn(*lead, SIZES[0], device=like.device, dtype=like.dtype, requires_grad=True)
        target = torch.randn(*lead, SIZES[-1], device=like.device, dtype=like.dtype)
        if name == "cross_entropy":  # labels fit only (N, C); probabilities fit any shape
            target = target.argmax(-1) if len(lead) == 1 else target.softmax(-1)
        module.zero_grad()
        output, loss = module(x), loss()
        value = loss(output, target)
        value.backward()
        with torch.no_grad():
            ours = net.forward(x)
            our_value = loss.forward(ours, target)
            dx = net.backward(loss.backward(), input_grad=True)
        assert_equal((ours, our_value, dx), (output, value, x.grad), f"{name} {lead}")
        assert_equal(
            list(net.grads.values()), [p.grad for p in module.parameters()], f"{name} {lead}"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_module(activation, bias, dtype, device):
    torch.manual_seed(0)
    assert_twins(*twins(SIZES, activation, "tanh", bias, device=device, dtype=dtype))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["sigmoid", "gelu"])  # sigmoid keeps y, gelu keeps z
def test_equals_module_in_kernels(activation, dtype, device):
    torch.manual_seed(0)
    assert_twins(*twins(SIZES, activation, device=device, dtype=dtype), leads=[(16,), (5,)])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_are_torchs(activation):
    """Gradients are those of nn.Sequential under autograd, in float64.

    The limit of 64 ulps of the largest number is above the rounding of sums of 33 terms.
    """
    torch.manual_seed(0)
    net = Net(SIZES, activation, dtype=torch.float64)
    layers = [torch.nn.Linear(k, n, dtype=torch.float64) for k, n in itertools.pairwise(SIZES)]
    torch.nn.Sequential(*layers).load_state_dict(net.state_dict())
    x = torch.randn(33, SIZES[0], dtype=torch.float64, requires_grad=True)
    dy = torch.randn(33, SIZES[-1], dtype=torch.float64)
    y = x
    for layer in layers:
        y = layer(y) if layer is layers[-1] else ACTIVATIONS[activation].torch(layer(y))
    y.backward(dy)
    ours = [net.forward(x.detach()), net.backward(dy, input_grad=True), *net.grads.values()]
    for a, b in zip(ours, [y, x.grad, *(p.grad for layer in layers for p in layer.parameters())]):
        assert (a - b).abs().max() <= 64 * torch.finfo(torch.float64).eps * b.abs().max()


def test_one_flat_tensor(device):
    """Every parameter is an aligned view of `flat`, and every gradient one of `flat_grad`. No two
    overlap.
    """
    net = Net(SIZES, device=device)
    for flat, views in ((net.flat, net.parameters), (net.flat_grad, net.grads)):
        flat.zero_()
        for i, view in enumerate(views.values(), 1):
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            assert view.data_ptr() % 128 == flat.data_ptr() % 128
            view.fill_(i)
        assert all((view == i).all() for i, view in enumerate(views.values(), 1))
    net.flat.fill_(0.5)
    assert torch.equal(
        net.forward(torch.zeros(1, 17, device=device)), torch.full((1, 5), 16.25, device=device)
    )


def test_of_shares_the_modules_memory(device):
    """Module and net share their weights. An optimizer made earlier over the module's parameters
    trains both.
    """
    module = MLP(SIZES, "tanh", device=device)
    before = copy.deepcopy(module.state_dict())
    optimizer = SGD(module.parameters(), lr=0.1)
    net = Net.of(module)
    assert_equal(list(net.parameters.values()), list(before.values()))
    assert_twins(module, net, leads=[(4,)])
    module.zero_grad()
    module(torch.ones(3, 17, device=device)).sum().backward()
    optimizer.step()
    expected = [before[name].add(p.grad, alpha=-0.1) for name, p in module.named_parameters()]
    assert_equal(list(net.parameters.values()), list(module.parameters()))
    # A kernel rounds lr · g and the difference together, or each.
    torch.testing.assert_close(list(net.parameters.values()), expected)
    assert_twins(module, net, leads=[(4,)])
    net.flat.zero_()
    assert all((p == 0).all() for p in module.parameters())


def test_state_dict_and_seed(device):
    net, other = Net(SIZES, device=device, seed=1), Net(SIZES, device=device, seed=2)
    assert_equal(
        list(net.state_dict().values()), list(Net(SIZES, device=device, seed=1).parameters.values())
    )
    assert not torch.equal(net.flat, other.flat)
    state = net.state_dict()
    other.load_state_dict(state)
    assert torch.equal(net.flat, other.flat)
    net.flat.zero_()
    assert state["0.weight"].any(), "state_dict must be a copy"
    for wrong in (MLP((17, 12, 9, 6)).state_dict(), MLP(SIZES, bias=False).state_dict(), {}):
        with pytest.raises(ValueError, match=r"Net: parameters must be .*\(5, 9\)"):
            net.load_state_dict(wrong)
    assert not net.flat.any(), "a refused state must change nothing"


def test_predict_keeps_nothing(device):
    """`predict` between forward and backward does not change the gradients. Its result is in new
    memory.
    """
    net = Net(SIZES, "gelu", device=device)
    x, dy = torch.randn(7, 17, device=device), torch.ones(7, 5, device=device)
    kept = net.forward(x)
    net.backward(dy)
    expected = net.flat_grad.clone()
    assert torch.equal(net.predict(x), net.forward(x))
    assert net.predict(x).data_ptr() != kept.data_ptr() == net.forward(x).data_ptr()
    net.predict(x + 1)
    assert net.backward(dy) is None
    assert torch.equal(net.flat_grad, expected)


def test_refusals():
    for arguments, message in (
        ([(3,)], r"at least two positive integers.*got \(3,\)"),
        ([(3, 0, 2)], r"got \(3, 0, 2\)"),
        ([SIZES, "swish"], f"'swish'.*{'.*'.join(ACTIVATIONS)}"),
        ([SIZES, "relu", "softmax"], "'softmax'"),
    ):
        for kind in (Net, MLP):
            with pytest.raises(ValueError, match=message):
                kind(*arguments)


@pytest.mark.parametrize("call", ["forward", "predict"])
def test_a_wrong_input_is_named(call):
    """The refusal names the input's width and the network's, and the network still works."""
    net = Net([5, 4, 3])
    run = getattr(net, call)
    with pytest.raises(ValueError, match=r"Net: input must be \(…, features\), got a tensor with"):
        run(torch.tensor(1.0))
    wide = r"mlp: input has 6 features \(its shape is \(2, 6\)\), but weight \(4, 5\) takes 5$"
    with pytest.raises(ValueError, match=wide):
        run(torch.ones(2, 6))
    with pytest.raises(ValueError, match="mlp: input has 0 features"):
        run(torch.ones(2, 3, 0))
    assert run(torch.ones(2, 7, 5)).shape == (2, 7, 3)


@pytest.mark.parametrize("features", [18, 40])
def test_half_an_image_is_no_image(features):
    """Two rows of half an image each would otherwise be one image."""
    net = Net.of(ConvNet((1, 6, 6), (2,), 3, 2, (4,), 3))
    wrong = rf"Net: input has {features} features, but images \(1, 6, 6\) have 36$"
    for run in (net.forward, net.predict):
        with pytest.raises(ValueError, match=wrong):
            run(torch.ones(2, features))
        assert run(torch.ones(2, 36)).shape == (2, 3)


def test_a_net_of_another_module_is_refused():
    with pytest.raises(ValueError, match=r"Net: needs an mlp\.MLP or mlp\.ConvNet, got Linear"):
        Net.of(torch.nn.Linear(3, 2))


def test_an_input_that_changed_is_refused():
    """As torch does. In inference mode, tensors count no changes."""
    for x in (torch.randn(4, 3), torch.randn(2, 2, 3), torch.randn(3)):
        net = Net((3, 2))
        y = net.forward(x)
        net.backward(torch.ones_like(y))
        x.mul_(2)
        with pytest.raises(
            RuntimeError, match=r"input was changed in place .*version 1, expected 0"
        ):
            net.backward(torch.ones_like(y))
        net.backward(torch.ones_like(net.forward(x)))
    with torch.inference_mode():
        y = net.forward(torch.ones(4, 3))
        net.backward(torch.ones_like(y))
        assert float(net.grads["0.bias"][0]) == 4


@pytest.mark.parametrize("activation", ["sigmoid", "relu", "gelu", "identity"])
def test_an_output_that_changed_is_refused_if_the_gradient_needs_it(activation):
    x, dy = torch.randn(4, 3), torch.ones(4, 2)
    net = Net((3, 2), output_activation=activation)
    net.forward(x)
    net.backward(dy)
    expected = net.flat_grad.clone()
    net.forward(x).mul_(3)
    if ACTIVATIONS[activation].needs == "y":
        with pytest.raises(RuntimeError, match="output was changed in place"):
            net.backward(dy)
        net.forward(x)
    net.backward(dy)
    assert_equal(net.flat_grad, expected)
