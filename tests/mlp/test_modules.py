"""Our modules replace torch's with the activation fused in: state_dict, copies, dtypes and DDP
work.
"""

import copy
import functools
import json
import pickle
import re

import pytest
import torch
from torch import nn

from kernels.activations import ACTIVATIONS
from mlp import MLP, Conv2d, ConvNet, CrossEntropyLoss, Linear, MSELoss, Net
from mlp.modules import build
from tests.checks import assert_equal, compare

SIZES = (17, 12, 5)
KINDS = {
    "Linear": functools.partial(Linear, 17, 5, activation="tanh"),
    "MLP": functools.partial(MLP, SIZES, "gelu", init="xavier_normal"),
    "ConvNet": functools.partial(ConvNet, (1, 8, 8), (2, 3), 3, 1, (6,), 5),
}
EACH_KIND = pytest.mark.parametrize("kind", KINDS)


def inputs_for(module, rows=4):
    like = next(module.parameters())
    features = 64 if isinstance(module, ConvNet) else 17
    return torch.randn(rows, features, device=like.device, dtype=like.dtype)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_is_nn_linear(activation, bias, device):
    """A seed gives nn.Linear's weights. Value and gradients are those of nn.Linear and the
    activation.
    """
    torch.manual_seed(0)
    ours = Linear(33, 16, bias, device, activation=activation)
    torch.manual_seed(0)
    theirs = nn.Linear(33, 16, bias, device=device)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert_equal(list(ours.parameters()), list(theirs.parameters()))
    theirs.load_state_dict(ours.state_dict())
    assert activation in repr(ours)

    def call(module, x, weight, bias=None, then=lambda y: y):
        parameters = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        return then(torch.func.functional_call(module, parameters, x))

    def draw():  # z at least 1e-3 from a kink, so that rounding cannot cross it
        x = torch.randn(17, 33, device=device)
        far = [(theirs(x) - kink).abs().min() > 1e-3 for kink in ACTIVATIONS[activation].kinks]
        return (x, *ours.parameters()) if all(far) else draw()

    reference = functools.partial(call, theirs, then=ACTIVATIONS[activation].torch)
    compare(functools.partial(call, ours), reference, *(draw() for _ in range(4)))


@EACH_KIND
def test_copies(kind, device):
    """deepcopy, pickle and a state_dict give networks with the same outputs and memory of their
    own.
    """
    module = KINDS[kind](device=device)
    x = inputs_for(module)
    loaded = KINDS[kind](device=device)
    loaded.load_state_dict(module.state_dict())
    expected = module(x)
    twins = copy.deepcopy(module), pickle.loads(pickle.dumps(module)), loaded
    for p in module.parameters():
        p.data.zero_()
    for twin in twins:
        assert_equal(twin(x), expected)
        assert [name for name, _ in twin.named_parameters()] == [
            name for name, _ in module.named_parameters()
        ]


@EACH_KIND
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_to_dtype(kind, dtype, device):
    module = KINDS[kind](device=device).to(dtype)
    y = module(inputs_for(module))
    y.sum().backward()
    assert y.dtype == dtype and all(p.grad.dtype == dtype for p in module.parameters())
    made = KINDS[kind](device=device, dtype=dtype)
    assert {p.dtype for p in made.parameters()} == {dtype}


@pytest.mark.parametrize("kind", ["MLP", "ConvNet"])
def test_config_builds_the_network_again(kind):
    module = KINDS[kind]()
    again = build(json.loads(json.dumps(module.config())), dtype=torch.float64)
    assert type(again) is type(module) and again.config() == module.config()
    again.load_state_dict(module.state_dict())
    with pytest.raises(ValueError, match="unknown kind of network 'rnn'; known: mlp"):
        build({"kind": "rnn"})


def test_mlp_is_its_layers(device):
    """Layer i is mlp[i]. The state_dict is that of an nn.Sequential of nn.Linear."""
    mlp = MLP((17, 12, 9, 5), "silu", "sigmoid", device=device)
    assert len(mlp) == 3 and [layer.activation for layer in mlp] == ["silu", "silu", "sigmoid"]
    assert MLP(SIZES, bias=False)[0].bias is None
    x = inputs_for(mlp)
    y = x
    for layer in mlp:
        y = layer(y)
    assert_equal(mlp(x), y)
    nn.Sequential(nn.Linear(17, 12), nn.Linear(12, 9), nn.Linear(9, 5)).load_state_dict(
        mlp.state_dict()
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "sum"},
        {"reduction": "none", "ignore_index": 2},
        {"weight": torch.tensor([1.0, 2.0, 0.5, 0.0, 1.5]), "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_cross_entropy_loss(options, device):
    target = torch.tensor([0, 2, 4, 2, 1, 3, 0], device=device)
    ours, theirs = (kind(**options).to(device) for kind in (CrossEntropyLoss, nn.CrossEntropyLoss))
    double = lambda module, x: copy.deepcopy(module).to(x.dtype)  # noqa: E731
    draws = [(torch.randn(7, 5, device=device),) for _ in range(4)]
    compare(lambda x: double(ours, x)(x, target), lambda x: double(theirs, x)(x, target), *draws)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss(reduction, device):
    draws = [(torch.randn(7, 5, device=device), torch.randn(7, 5, device=device)) for _ in range(4)]
    compare(MSELoss(reduction=reduction), nn.MSELoss(reduction=reduction), *draws)


def test_unknown_activation_lists_the_table():
    with pytest.raises(ValueError, match=f"Linear: .*'swish'.*{'.*'.join(ACTIVATIONS)}"):
        Linear(3, 4, activation="swish")


@pytest.mark.parametrize(
    ("network", "make"),
    [
        ("MLP", lambda: MLP([4, 3], activation="swish")),
        ("MLP", lambda: MLP([4, 3], output_activation="swish")),
        ("Net", lambda: Net([4, 3], activation="swish")),
        ("ConvNet", lambda: ConvNet((1, 8, 8), (2,), activation="swish")),
        ("Conv2d", lambda: Conv2d(1, 2, 3, activation="swish")),
    ],
)
def test_unknown_activation_that_no_layer_uses(network, make):
    with pytest.raises(ValueError, match=f"{network}: unknown activation 'swish'; known: "):
        make()


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ConvNet((1, 12, 12)),
            "convolution 1 needs images of at least 6 × 6, got 4 × 4 (image_shape (1, 12, 12))",
        ),
        (
            lambda: ConvNet(max_pool=(3, 2)),
            "max_pool must be one whole number for both sides, at least 1, got (3, 2)",
        ),
        (
            lambda: Conv2d(4, 4, 3, 1, 0, 1, 2),
            "takes groups=1 and padding_mode='zeros', got 2 and 'zeros'; use nn.Conv2d",
        ),
    ],
    ids=["small images", "max_pool", "groups"],
)
def test_convolutions_refuse(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


def test_distributed_data_parallel(tmp_path):
    """Gradients through DDP's buckets and hooks are those without DDP, with one gloo process."""
    module = MLP(SIZES, "sigmoid")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(module))
        x, target = inputs_for(module), torch.tensor([0, 1, 4, 2])
        for model in (module, parallel):
            CrossEntropyLoss()(model(x), target).backward()
        assert_equal([p.grad for p in parallel.parameters()], [p.grad for p in module.parameters()])
    finally:
        torch.distributed.destroy_process_group()


def test_rows_that_are_no_whole_images():
    """Two halves of an image would become one image."""
    network = ConvNet(hidden=(4,), classes=3)
    for shape in ((2, 1, 28, 28), (2, 784), (2, 28, 28), (2, 1, 784)):
        assert network(torch.rand(shape)).shape == (2, 3)
    for shape in ((2, 1, 14, 28), (2, 14, 28)):
        with pytest.raises(ValueError, match="ConvNet: input is"):
            network(torch.rand(shape))
    colours = ConvNet((3, 12, 16), (2,), 3, hidden=(4,), classes=3)
    x = torch.rand(2, 3, 12, 16)
    assert_equal(colours(x.flatten(2)), colours(x))
    message = "ConvNet: input is (2, 392), but images are (1, 28, 28), or rows of 784 numbers"
    with pytest.raises(ValueError, match=re.escape(message)):
        network(torch.rand(2, 392))
