"""torch.compile, torch.export and tracing: whole graphs, equal to eager mode, compiled once for all sizes of a batch."""

import copy
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import kernels
import mlp
from kernels import launch
from tests.checks import assert_equal
from tests.pairs import PAIRS, cases, gradients, leaves, of_tensors

NETWORKS = {
    "mlp": lambda: mlp.MLP((64, 9, 5), "gelu"),
    "convnet": lambda: mlp.ConvNet((1, 8, 8), (2, 3), 3, 1, (6,), 5),
}
EACH_NETWORK = pytest.mark.parametrize("network", NETWORKS)
EACH_OPERATION = pytest.mark.parametrize("name", PAIRS)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)


def compiled(function, backend="aot_eager"):
    return torch.compile(function, fullgraph=True, backend=backend)


def batches(device, sizes=(8, 12, 3, 20, 8)):
    for n in sizes:
        yield torch.randn(n, 64, device=device), torch.randint(0, 5, (n,), device=device)


@EACH_OPERATION
@pytest.mark.parametrize("path", ["torch", "triton"])
def test_as_eager(name, path, device):
    """Every case of the table, bit for bit, through the reference and through the kernels."""
    every = lambda *arguments: [PAIRS[name][0](*args) for args in arguments]  # noqa: E731
    arguments = [leaves(name, args) for args in cases(name, device, shape=(4, 6, 5))]
    with kernels.use(path):
        expected = gradients(every(*arguments), arguments)
        assert_equal(gradients(compiled(every)(*arguments), arguments), expected, name)


class Calls(TorchDispatchMode):
    """The calls of our operators."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "handgrad":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


@EACH_OPERATION
def test_opcheck(name):
    """torch.library's own check of each operator and of its backward: schema, aliases, fake results, dynamic shapes."""
    with Calls() as calls:
        for args in cases(name)[::3]:
            args = leaves(name, args)
            gradients([launch.operators[{"mse": "mse_loss"}.get(name, name)](*args)[0]], args)
    assert {str(func).endswith("_bwd.default") for func, _ in calls.made} == {False, True}
    for func, args in calls.made:
        backward = str(func).endswith("_bwd.default")
        fresh = lambda t: t.detach().requires_grad_(not backward and t.is_floating_point())  # noqa: B023, E731
        opcheck(func, tree_map(lambda v: fresh(v) if isinstance(v, torch.Tensor) else v, args))  # noqa: B023


@EACH_NETWORK
@pytest.mark.parametrize("optimizer", [
    lambda p: mlp.SGD(p, 0.1, momentum=0.9, nesterov=True), lambda p: mlp.AdamW(p, 0.1, capturable=True),
], ids=["SGD", "AdamW"])  # fmt: skip
def test_training(network, optimizer, device):
    """Forward and loss in one graph, its backward, the update in another: weights as eager, and no graph after the second."""
    networks = NETWORKS[network]().to(device), NETWORKS[network]().to(device)
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [optimizer(net.parameters()) for net in networks]
    loss = mlp.CrossEntropyLoss(label_smoothing=0.1)
    losses = [lambda x, t, net=net: loss(net(x), t) for net in networks]
    losses[1] = compiled(losses[1])
    steps = [optimizers[0].step, compiled(optimizers[1].step)]
    graphs = []
    with kernels.use("torch"):
        for x, t in batches(device):
            for net, of, step in zip(networks, losses, steps):
                net.zero_grad(set_to_none=False)
                of(x, t).backward()
                step()
            graphs.append(counters["stats"]["unique_graphs"])
    assert_equal(*(list(net.parameters()) for net in networks))
    assert graphs[2:] == [graphs[1]] * 3 and not counters["graph_break"]


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="this torch traces no .backward()")
def test_whole_step_is_one_graph(device):
    networks = [NETWORKS["mlp"]().to(device)]
    networks.append(copy.deepcopy(networks[0]))
    loss = mlp.CrossEntropyLoss()

    def step(net, optimizer, x, t):
        value = loss(net(x), t)
        value.backward()
        optimizer.step()
        for p in net.parameters():
            p.grad = None
        return value.detach()

    optimizers = [mlp.SGD(net.parameters(), 0.1) for net in networks]
    with kernels.use("torch"), torch._dynamo.config.patch(trace_autograd_ops=True):
        run = compiled(step)
        for x, t in batches(device):
            assert_equal(step(networks[0], optimizers[0], x, t), run(networks[1], optimizers[1], x, t))
    assert_equal(*(list(net.parameters()) for net in networks))
    assert counters["stats"]["unique_graphs"] == 2  # the first size of a batch, and every other


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler on the CPU")
def test_inductor(device):
    net = NETWORKS["mlp"]().to(device)
    (x, t), (x2, t2) = batches(device, (8, 4))
    of = lambda x, t: kernels.cross_entropy(net(2 * x), t)  # noqa: E731
    with kernels.use("torch"):
        run = compiled(of, "inductor")
        for arguments in ((x, t), (x2, t2)):
            assert_equal(gradients([run(*arguments)], list(net.parameters())),
                         gradients([of(*arguments)], list(net.parameters())))  # fmt: skip


def test_errors_while_tracing():
    """The compiler wraps our errors; they still name both values. Labels are read when the graph runs, on a CPU."""
    x, w = torch.randn(3, 4), torch.randn(5, 6)
    for call, message in {
        lambda: compiled(kernels.linear)(x, w): r"weight must be \(out, in\) with in = 4 .*got \(5, 6\)",
        lambda: compiled(kernels.linear)(x, x, None, "swish"): "unknown activation 'swish'; known: identity",
        lambda: compiled(kernels.cross_entropy)(x, torch.tensor([1, 2])): r"target must be labels \(3,\) .*got \(2,\)",
        lambda: compiled(kernels.mse_loss)(x, w): "target must be",
        lambda: compiled(kernels.cross_entropy)(x, torch.tensor([1, 7, 2])): r"target\[1\] is 7, but there are 4 classes",
    }.items():
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, IndexError), match=message):
            call()


@EACH_NETWORK
def test_export(network):
    """A trained network exports as torch's own operators, for every size of a batch: it runs without this library."""
    net = NETWORKS[network]()
    optimizer = mlp.SGD(net.parameters(), 0.1)
    with kernels.use("torch"):
        for x, t in batches("cpu"):
            optimizer.zero_grad()
            kernels.cross_entropy(net(x), t).backward()
            optimizer.step()
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
        torch.testing.assert_close(exported.module()(x[:5]), net(x[:5]))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert called and not any("handgrad" in target for target in called)


@EACH_OPERATION
def test_nothing_is_read_while_traced(name):
    """make_fx sees the operations as torch's, on fake tensors. The trace serves other numbers and other labels too."""
    for args in cases(name):
        call, tensors = of_tensors(PAIRS[name][0], args)
        others = [t.flip(0) for t in tensors]
        torch.testing.assert_close(make_fx(call, tracing_mode="symbolic")(*tensors)(*others), call(*others))
