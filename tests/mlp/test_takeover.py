"""An engine computes what calling the network computes, or says why it does not."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune, weight_norm

import mlp
from mlp import MLP, ConvNet, Net, Trainer
from mlp.data import permutation
from mlp.engines import takeover

SIZES = (6, 8, 8, 3)


def tensors():
    torch.manual_seed(0)
    x = torch.randn(40, 6)
    return x, x[:, :3].argmax(1)


class Shifted(MLP):
    """A subclass whose forward changes the inputs."""

    def forward(self, input):
        return super().forward((input - 3) / 2)


class Normed(MLP):
    """A subclass with a submodule that is not a layer of the stack."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.norm = nn.LayerNorm(3)

    def forward(self, input):
        return self.norm(super().forward(input))


def own_forward(model):
    plain = model.forward
    model.forward = lambda input: plain(input * 2)


def own_forward_of_a_layer(model):
    layer = model[1]
    layer.forward = lambda input: torch.tanh(F.linear(input, layer.weight, layer.bias))


def tie(model):
    model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    model.register_module("2", mlp.Linear(8, 8))
    model[2].weight = model[1].weight
    model.add_module("3", mlp.Linear(8, 3))


def share_memory(model):
    model[0].bias.data = model[1].bias.data


def old_weight_norm(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weight_norm(model[1])


def replace(index, make):
    return lambda model: model._modules.__setitem__(str(index), make())


def halve(parameter):
    parameter.grad.mul_(0.5)


def half_frozen(model):
    model[0].bias.requires_grad_(False)


def mixed(model):
    model[0].weight.data = model[0].weight.data.t().contiguous().t()


CHANGES = {
    "own forward": (own_forward, "MLP has a forward of its own"),
    "own forward of a layer": (own_forward_of_a_layer, "1 has a forward of its own"),
    "forward hook": (
        lambda m: m.register_forward_hook(lambda module, inputs, output: output * 2),
        "MLP has a hook",
    ),
    "hook on a layer": (
        lambda m: m[0].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,)),
        "0 has a hook",
    ),
    "backward hook": (
        lambda m: m[1].register_full_backward_hook(lambda module, given, out: (given[0] * 2,)),
        "1 has a hook",
    ),
    "gradient hook": (lambda m: m[1].weight.register_hook(torch.neg), "1.weight has a gradient"),
    "hook after accumulation": (
        lambda m: m[0].bias.register_post_accumulate_grad_hook(halve),
        "0.bias has a gradient hook",
    ),
    "tied weights": (tie, "its layers are 0, 1, 2, 3, not 0 to 2|share memory"),
    "shared memory": (share_memory, "0.bias and 1.bias share memory"),
    "weight_norm": (old_weight_norm, "1 has the parameters .*weight_g"),
    "parametrized": (
        lambda m: parametrizations.weight_norm(m[1]),
        "1 is a ParametrizedLinear, not the Linear it was",
    ),
    "spectral_norm": (lambda m: parametrizations.spectral_norm(m[0]), "ParametrizedLinear"),
    "pruned": (lambda m: prune.l1_unstructured(m[1], "weight", 0.5), "1 has a buffer weight_mask"),
    "another activation": (
        replace(1, lambda: mlp.Linear(8, 8, activation="tanh")),
        "1 has activation tanh, not relu",
    ),
    "another layer": (
        replace(1, lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Tanh())),
        "1 is a Sequential",
    ),
    "a torch layer": (replace(0, lambda: nn.Linear(6, 8)), "0 is a Linear|not the Linear it was"),
    "an added layer": (lambda m: m.add_module("3", nn.Tanh()), "its layers are 0, 1, 2, 3, not"),
    "a submodule": (lambda m: m.add_module("drop", nn.Dropout()), "its layers are 0, 1, 2, drop"),
    "a buffer": (lambda m: m.register_buffer("steps", torch.zeros(1)), "MLP has a buffer steps"),
    "a parameter": (lambda m: m.register_parameter("t", nn.Parameter(torch.ones(1))), "'t': "),
    "no bias": (lambda m: setattr(m[1], "bias", None), "1 has the parameters .*'bias': None"),
    "frozen": (half_frozen, "trains every parameter, but 0.bias does not require a gradient"),
    "strides": (mixed, "0.weight is not contiguous"),
    "compiled": (lambda m: m.compile(backend="eager"), "MLP is compiled"),
}


def changed(change, seed=0):
    torch.manual_seed(seed)
    model = MLP(SIZES)
    change(model)
    return model


def loop(model, epochs=2):
    """The losses of a plain loop that trains `model`."""
    x, y = tensors()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
    for epoch in range(1, epochs + 1):
        total = 0.0
        for rows in permutation(40, 0, epoch).split(16):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(rows)
        losses.append(total / 40)
    return losses


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_network_is_called(name):
    """Under "auto" it trains as a loop that calls it. An engine asked for by name refuses it."""
    change, reason = CHANGES[name]
    model = changed(change)
    trainer = Trainer(model, verbose=False)
    assert trainer.engine.name == "autograd"
    rows = trainer.fit(tensors(), 2, 16)
    assert [row["train_loss"] for row in rows] == pytest.approx(loop(changed(change)), rel=1e-5)
    with pytest.raises(ValueError, match=f"manual: .*({reason})") as error:
        Trainer(changed(change), engine="manual")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [Shifted, Normed])
def test_a_subclass_is_called(kind):
    torch.manual_seed(1)
    trainer = Trainer(kind(SIZES), verbose=False)
    assert trainer.engine.name == "autograd"
    assert f"{kind.__name__} is a subclass of MLP and may compute something else" in (
        trainer.engine_note
    )
    torch.manual_seed(1)
    expected = loop(kind(SIZES))
    rows = trainer.fit(tensors(), 2, 16)
    assert [row["train_loss"] for row in rows] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match=r"manual: .* is a subclass of MLP"):
        Trainer(kind(SIZES), engine="manual")


def test_a_hook_registered_between_two_fits():
    trainer = Trainer(MLP(SIZES), verbose=False)
    trainer.fit(tensors(), 1, 16)
    seen = []
    trainer.model[1].register_forward_hook(lambda *arguments: seen.append(1))
    trainer.fit(tensors(), 2, 16)
    assert trainer.engine.name == "autograd" and len(seen) == 3


def test_a_hook_on_all_modules():
    handle = nn.modules.module.register_module_forward_hook(lambda *arguments: None)
    try:
        assert takeover.network(MLP(SIZES)) == "a hook on all modules is registered"
    finally:
        handle.remove()
    assert takeover.network(MLP(SIZES)) is None


def test_networks_with_harmless_changes_are_taken_over():
    """Permanent pruning, a removed weight_norm, a state_dict hook and an extra attribute change no
    computation.
    """
    model = MLP(SIZES)
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.remove(model[0], "weight")
    parametrizations.weight_norm(model[1])
    nn.utils.parametrize.remove_parametrizations(model[1], "weight")
    model.register_state_dict_post_hook(lambda *arguments: None)
    model.author = "me"
    assert takeover.network(model) is None


def test_tied_weights_learn_as_in_torch():
    """A tied weight gets the gradient of both places, although named_parameters lists it once."""
    torch.manual_seed(0)
    model = MLP((6, 6, 6, 3), "tanh")
    model[1].weight = model[0].weight
    twin = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    twin.load_state_dict({f"{2 * int(k[0])}{k[1:]}": v for k, v in model.state_dict().items()})
    twin[2].weight = twin[0].weight
    rows = Trainer(model, verbose=False).fit(tensors(), 2, 16)
    assert [row["train_loss"] for row in rows] == pytest.approx(loop(twin), rel=1e-5)
    assert torch.allclose(model[0].weight, twin[0].weight, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"0.weight and 1.weight share memory"):
        Trainer(model, engine="manual")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m.conv[0], "activation", "tanh"), "conv.0 has activation tanh"),
        (lambda m: setattr(m.conv[0], "padding", (1, 1)), "conv.0 has padding"),
        (lambda m: m.conv.append(nn.Identity()), "its layers are 0, 1, not 0 to 0"),
        (lambda m: setattr(m, "mlp", nn.Linear(18, 3)), "mlp is a Linear, not the MLP"),
        (lambda m: setattr(m, "extra", nn.Linear(18, 3)), "its submodules are conv, mlp, extra"),
        (lambda m: m.mlp[0].register_forward_hook(lambda *a: None), "mlp.0 has a hook"),
        (lambda m: prune.random_unstructured(m.conv[0], "weight", 0.5), "conv.0 has a buffer"),
    ],
)
def test_changed_convnets(change, reason):
    model = ConvNet((1, 8, 8), (2,), 3, 2, (4,), 3)
    assert takeover.network(model) is None
    change(model)
    assert reason in takeover.network(model)


def test_a_patched_class(monkeypatch):
    monkeypatch.setattr(mlp.Linear, "forward", lambda self, input: input)
    assert takeover.network(MLP(SIZES)) == "Linear.forward was replaced"


def test_changed_nets():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x) * 2

    assert "Twice is a subclass of Net" in takeover.network(Twice(SIZES))
    net = Net(SIZES)
    assert takeover.network(net) is None
    net.parameters["0.bias"] = torch.zeros(8)
    assert "parameters of this Net were replaced" in takeover.network(net)
    net = Net(SIZES)
    net.forward = lambda x: x
    assert takeover.network(net) == "this Net has a forward of its own"


def test_changed_losses_and_optimizers():
    """A subclass of a loss, a hook on steps, and an overridden step each have their effect."""

    class Doubled(mlp.SoftmaxCrossEntropy):
        def __call__(self, output, target):
            return 2 * super().__call__(output, target)

    trainer = Trainer(MLP(SIZES), Doubled(), verbose=False)
    assert trainer.engine.name == "autograd"
    assert "Doubled is a subclass of SoftmaxCrossEntropy" in trainer.engine_note
    for engine in ("autograd", "manual"):
        seen = []
        optimizer = mlp.SGD((model := MLP(SIZES)).parameters(), lr=0.1)
        optimizer.register_step_post_hook(lambda *arguments: seen.append(1))  # noqa: B023
        Trainer(model, optimizer=optimizer, engine=engine, verbose=False).fit(tensors(), 2, 16)
        assert len(seen) == 6

    class Halved(mlp.SGD):
        def step(self, closure=None, *, grads=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.grad *= 0.5
            super().step()

    found = []
    for engine in ("autograd", "manual"):
        torch.manual_seed(0)
        make = lambda p: Halved(p, lr=0.1)  # noqa: E731
        trainer = Trainer(MLP(SIZES), optimizer=make, engine=engine, verbose=False)
        found.append(trainer.fit(tensors(), 2, 16)[-1]["train_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] != pytest.approx(loop(MLP(SIZES))[-1], rel=1e-5)


def test_stack_of_changed_layers():
    """MLP.forward of a changed network computes what its layers compute one by one."""
    x, _ = tensors()
    for name in (
        "another activation",
        "another layer",
        "pruned",
        "parametrized",
        "hook on a layer",
    ):
        model = changed(CHANGES[name][0]).eval()
        y = x
        for layer in model:
            y = layer(y)
        assert torch.equal(model(x), y), name
    model = MLP(SIZES)
    del model._modules["1"]
    with pytest.raises(
        AttributeError, match="layer 1 is missing; the network was made with 3 layers"
    ):
        model(x)


def test_optimizers_with_a_closure_are_refused():
    class Searching(torch.optim.SGD):
        def step(self, closure):
            return closure()

    for kind in (torch.optim.LBFGS, Searching):
        with pytest.raises(ValueError, match=f"Trainer: {kind.__name__} computes the loss several"):
            Trainer(MLP(SIZES), optimizer=kind)


def test_optimizer_of_another_network():
    other = mlp.SGD(MLP(SIZES).parameters(), lr=0.1)
    with pytest.raises(ValueError, match="the optimizer has none of the network's parameters"):
        Trainer(MLP(SIZES), optimizer=other)
    trainer = Trainer(MLP(SIZES), verbose=False)
    for layer in trainer.model:
        layer.weight, layer.bias = (nn.Parameter(p.detach().clone()) for p in layer.parameters())
    with pytest.raises(ValueError, match="fit: the optimizer has none of the network's"):
        trainer.fit(tensors(), 1, 16)


def test_autocast_around_a_fit():
    """Under autocast, fit runs the autograd engine, so it computes in autocast's precision."""
    trainer = Trainer(MLP(SIZES), verbose=False)
    trainer.fit(tensors(), 1, 16)
    assert trainer.engine.name == "manual"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        trainer.fit(tensors(), 2, 16)
    assert trainer.engine.name == "autograd" and "autocast is on" in trainer.engine_note


@pytest.fixture
def group():
    """A process group of one gloo process."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


def test_wrapped_for_many_processes(group):
    """A network that DDP or FSDP wraps is called, never taken over."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    parallel = nn.parallel.DistributedDataParallel(MLP(SIZES))
    assert "DistributedDataParallel" in takeover.network(parallel)
    sharded = fully_shard(MLP(SIZES), mesh=init_device_mesh("cpu", (1,)))
    assert "FSDPMLP is a subclass of MLP" in takeover.network(sharded)
    x, y = tensors()
    trainer = Trainer(parallel)
    history = trainer.fit((x, y), epochs=1, batch_size=16, seed=0)
    assert trainer.engine.name == "autograd" and len(history) == 1


def test_a_layer_of_another_element_type():
    model = MLP(SIZES)
    model[1].to(torch.bfloat16)
    reason = "1.weight is torch.bfloat16 on cpu, but 0.weight torch.float32 on cpu"
    assert takeover.network(model) == reason
