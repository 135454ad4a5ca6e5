"""`Sequential` runs neighbours as one operation. Whatever else looks at the children, or changes
them, finds torch's values.
"""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import kernels
import mlp
from kernels.activations import ACTIVATIONS
from mlp import fuse, sequential
from tests.checks import operations


def layers():
    return nn.Sequential(
        nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 5), nn.Identity(), nn.LeakyReLU(), nn.Linear(5, 3)
    )


def built(make=layers):
    """(torch's model, the same one fused), in double precision."""
    torch.manual_seed(0)
    model = make().double()
    return model, fuse(copy.deepcopy(model))


def rows(*shape):
    return torch.randn(*(shape or (4, 6)), dtype=torch.float64, requires_grad=True)


def hooked(register, place):
    def run(model, x):
        seen = []
        handle = getattr(model[place], register)(
            lambda module, *tensors: seen.extend(t.clone() for pair in tensors for t in pair)
        )
        y = model(x)
        torch.autograd.grad(y.sum(), x, retain_graph=True)
        handle.remove()
        return y, seen

    return run


def doubling_hook(model, x):
    """A hook that changes what it sees."""
    model[0].register_forward_hook(lambda module, inputs, output: 2 * output)
    model[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model(x)


def hook_on_all_modules(model, x):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: seen.append(output)
    )
    try:
        model(x)
    finally:
        handle.remove()
    return seen


def hook_from_a_hook(model, x):
    """An earlier child registers the hook during the call."""
    seen = []
    see = lambda module, inputs, output: seen.append(output)  # noqa: E731
    model[0].register_forward_hook(lambda *_: model[2].register_forward_hook(see) and None)
    return model(x), seen


def replaced(kind, method):
    def run(model, x):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, method, lambda self, x: 3 * x)
            return model(x)

    return run


def own_forward(model, x):
    model[1].forward = lambda x: x + 1
    return model(x)


def iterated(model, x):
    found = []
    for layer in model:
        x = layer(x)
        found.append(x)
    return found


def walked(model, x):
    named = dict(model.named_modules())
    return named["1"](named["0"](x)), next(m for m in model.modules() if isinstance(m, nn.Linear))(
        x
    )


def checkpointed(model, x):
    from torch.utils.checkpoint import checkpoint_sequential

    return checkpoint_sequential(model, 3, x, use_reentrant=False)


def called_with(model, x):
    values = {"0.weight": model[0].weight.cos(), "5.bias": model[5].bias.sin()}
    return torch.func.functional_call(model, values, x)


def with_other_weights(model, x):
    before = model(x)
    model[0].weight = nn.Parameter(torch.ones_like(model[0].weight))
    return before, model(x)


def parametrised(model, x):
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[2])
    model.eval()
    with_them = model(x)
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    return with_them, model(x)


def pruned(model, x):
    prune.l1_unstructured(model[0], "weight", 9)
    with_mask = model(x)
    prune.remove(model[0], "weight")
    return with_mask, model(x)


def edited(model, x):
    del model[1]
    model.append(nn.Tanh()).insert(0, nn.Identity())
    model.extend([nn.Linear(3, 4, dtype=torch.float64), nn.Sigmoid()])
    return model(x)


def exported(model, x):
    with torch.no_grad():
        made = torch.export.export(model, (x,), strict=False)
    return made.module()(x), torch.export.unflatten(made)(x)


class Doubled(torch.Tensor):
    """A weight that changes what torch's functions compute, as a quantised one does."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        double = lambda a: a.as_subclass(torch.Tensor) * 2 if type(a) is cls else a  # noqa: E731
        return function(*map(double, args), **{k: double(v) for k, v in (kwargs or {}).items()})


def foreign_weight(model, x):
    weight = model[2].weight.detach().as_subclass(Doubled)
    del model[2].weight
    model[2].weight = weight
    return model(x), model[2](x[:, :5])


def foreign_bias(model, x):
    bias = model[2].bias.detach().as_subclass(Doubled)
    del model[2].bias
    model[2].bias = bias
    return model(x), model[2](x[:, :5])


WAYS = {
    "called": lambda model, x: model(x),
    "indexed": lambda model, x: (model[0](x), model[1](x), model[-1](model[4](model[2](x[:, :5])))),
    "iterated": iterated,
    "walked": walked,
    "sliced": lambda model, x: (model[:1](x), model[:2](x), model[1:](x[:, :5])),
    "added": lambda model, x: ((model + nn.Sequential(nn.Tanh()))(x), (model[1:2] * 2)(x)),
    "edited": edited,
    **{f"forward hook {i}": hooked("register_forward_hook", i) for i in range(6)},
    **{f"backward hook {i}": hooked("register_full_backward_hook", i) for i in (0, 1, 4)},
    "hooks that change values": doubling_hook,
    "hook on all modules": hook_on_all_modules,
    "hook from a hook": hook_from_a_hook,
    "replaced ReLU.forward": replaced(nn.ReLU, "forward"),
    "replaced ReLU.__call__": replaced(nn.ReLU, "__call__"),
    "own forward": own_forward,
    "fx": lambda model, x: torch.fx.symbolic_trace(model)(x),
    "export": exported,
    "checkpoint": checkpointed,
    "functional_call": called_with,
    "vmap": lambda model, x: torch.vmap(model)(x),
    "jacobian": lambda model, x: torch.func.jacrev(model)(x[0]),
    "jvp": lambda model, x: torch.func.jvp(model, (x,), (x,)),
    "other weights": with_other_weights,
    "foreign weight": foreign_weight,
    "foreign bias": foreign_bias,
    "foreign input": lambda model, x: model(x.as_subclass(Doubled)),
    "parametrised": parametrised,
    "pruned": pruned,
}


# torch's own, for jvp; torch 2.11's own, for unflatten
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*", "ignore:.*treespec.*LeafSpec")
@pytest.mark.parametrize("way", WAYS)
def test_every_way(way):
    """The values of torch's model, and of its gradients."""
    found = []
    for model in built():
        torch.manual_seed(1)
        x = rows()
        values = torch.utils._pytree.tree_leaves(WAYS[way](model, x))
        total = sum(value.cos().sum() for value in values)
        found.append((values, torch.autograd.grad(total, x)))
    torch.testing.assert_close(found[1], found[0])


def test_what_one_operation_computes():
    model, x = built()[1], rows()
    assert operations(lambda: model(x)) == [["relu", "leaky_relu"], "identity"]
    handle = model[4].register_forward_hook(lambda *_: None)
    assert operations(lambda: model(x)) == [["relu", "identity"], "identity"]
    handle.remove()
    assert operations(lambda: model(x)) == [["relu", "leaky_relu"], "identity"]
    assert operations(lambda: model[0](x)) == ["identity"]
    assert operations(lambda: model[:2](x)) == ["relu"]
    assert operations(lambda: torch.func.vmap(model)(x))[0] == ["relu", "leaky_relu"]


def deep():
    """Five linear layers. The hidden activation changes after the third."""
    hidden = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(6, 6), nn.ReLU(), mlp.Linear(6, 3))


def with_gradients(model, x):
    y = model(x)
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    return y, *torch.autograd.grad(y.cos().sum(), wanted)


def test_what_one_stack_computes():
    """As many layers as have the same hidden activation. Every call looks at all of them anew."""
    (plain, model), x = built(deep), rows()
    whole = [["tanh", "tanh", "relu"], ["relu", "identity"]]

    def agrees(expected):
        assert operations(lambda: model(x)) == expected
        torch.testing.assert_close(with_gradients(model, x), with_gradients(plain, x))

    agrees(whole)
    handle = model[2].register_forward_hook(lambda *_: None)
    agrees(["tanh", "identity", ["relu", "relu", "identity"]])
    handle.remove()
    for each in (plain, model):
        each[3] = nn.Sigmoid()
    agrees([["tanh", "sigmoid"], ["relu", "relu", "identity"]])
    for each in (plain, model):
        each[3] = nn.Hardtanh()
    agrees([["tanh", "identity"], ["relu", "relu", "identity"]])
    for each in (plain, model):
        each[3] = nn.Tanh()
        each[0].requires_grad_(False)
    model[8].activation = "identity"
    agrees(whole)
    with pytest.raises(
        ValueError, match=r"mlp, layer 1: weight must be torch\.float64 as input is"
    ):
        model[2].float()
        model(x)


def test_a_layer_twice_in_a_stack():
    layer = nn.Linear(6, 6)
    models, x = built(lambda: nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), layer)), rows()
    torch.testing.assert_close(*(with_gradients(model, x) for model in models))
    assert operations(lambda: models[1](x)) == [["tanh", "tanh", "identity"]]


def conv(*after):
    return lambda: nn.Sequential(nn.Conv2d(2, 3, 3), *after)


def changed():
    """(class, a model with it behind a layer, name of a setting, another value)."""
    other = {"kernel_size": 3, "stride": 1, "padding": 1, "dilation": 2, "approximate": "tanh"}
    for kind, row in sequential._followers.items():
        make = functools.partial(kind, 2) if kind is nn.MaxPool2d else kind
        for name in sorted(set(vars(make())) - {"training", "inplace"}):
            if name[0] != "_" and name != "return_indices":  # it would give two outputs
                made = make()
                now = getattr(made, name)
                value = other.get(name, not now if isinstance(now, bool) else 0.3)
                yield pytest.param(row.reads, made, name, value, id=f"{kind.__name__} {name}")


@pytest.mark.parametrize("reads, follower, name, value", [*changed()])
def test_settings_that_change_later(reads, follower, name, value):
    """Every setting of a module is read at every call."""
    assert name in reads
    models, x = built(conv(follower, nn.Tanh())), rows(2, 2, 9, 9)
    torch.testing.assert_close(models[1](x), models[0](x))
    before = models[0](x)
    for model in models:
        setattr(model[1], name, value)
    assert before.shape != models[0](x).shape or not torch.equal(before, models[0](x))
    torch.testing.assert_close(models[1](x), models[0](x))


@pytest.mark.parametrize("place", [0, 3])
def test_foreign_weights_of_other_layers(place):
    """A convolution and a layer norm."""
    made = lambda: conv(nn.ReLU(), nn.MaxPool2d(2), nn.LayerNorm(3))()  # noqa: E731
    models, x = built(made), rows(2, 2, 8, 8)
    for model in models:
        weight = model[place].weight.detach().as_subclass(Doubled)
        del model[place].weight
        model[place].weight = weight
    torch.testing.assert_close(models[1](x), models[0](x))
    assert not torch.equal(models[0](x), built(made)[0](x))
    perceptron = mlp.MLP([6, 5, 3])
    before = perceptron(torch.ones(1, 6))
    weight = perceptron[1].weight.detach().as_subclass(Doubled)
    del perceptron[1].weight
    perceptron[1].weight = weight
    torch.testing.assert_close(perceptron(torch.ones(1, 6)), 2 * before - perceptron[1].bias)
    x = torch.randn(2, 6)
    given = mlp.MLP([6, 5, 3])
    torch.testing.assert_close(given(x.as_subclass(Doubled)), given(2 * x))


@pytest.mark.parametrize("place", [0, 3])
def test_foreign_inputs_of_other_layers(place):
    """A convolution and a layer norm, whose bias tells a doubled input from its half."""
    models = built(lambda: conv(nn.ReLU(), nn.MaxPool2d(2), nn.LayerNorm(3, eps=1.0))())
    x = rows(2, 2, 8, 8).detach() if place == 0 else torch.randn(2, 3, dtype=torch.float64)
    ours, plain = models[1][place], models[0][place]
    torch.testing.assert_close(ours(x.as_subclass(Doubled)), plain(2 * x))


@pytest.mark.parametrize(
    "kind", [nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss, nn.HuberLoss]
)
def test_foreign_inputs_of_losses(kind):
    plain, ours = kind(), fuse(nn.ModuleList([kind()]))[0]
    x, target = torch.randn(3, 4), torch.rand(3, 4)
    torch.testing.assert_close(ours(x.as_subclass(Doubled), target), plain(2 * x, target))
    torch.testing.assert_close(ours(x, target.as_subclass(Doubled)), plain(x, 2 * target))


@pytest.mark.parametrize("between", [(), (nn.Flatten(),), (nn.Dropout(0.0), nn.Identity())])
def test_in_place_after_an_activation(between):
    """torch's LeakyReLU keeps its input for the backward, so a module in place may follow. It may
    also follow modules that hand on the same memory.
    """
    children = nn.Linear(6, 5), nn.LeakyReLU(), *between, nn.ReLU6(True)
    models, x = built(lambda: nn.Sequential(*children)), rows()
    gradients = [torch.autograd.grad(model(x).sum(), x) for model in models]
    torch.testing.assert_close(*gradients)


def test_other_inputs():
    """What is no tensor goes from child to child."""

    class Pick(nn.Module):
        def forward(self, given):
            return given["x"]

    model = fuse(nn.Sequential(Pick(), nn.Linear(6, 5), nn.ReLU()))
    assert operations(lambda: model({"x": torch.ones(2, 6)})) == ["relu"]
    with pytest.raises(TypeError, match=r"linear: input must be a torch\.Tensor, got dict"):
        model[1:]({"x": torch.ones(2, 6)})


def test_compiled(device):
    """The fused operations are in the graph. A hook that comes later is seen wherever torch's own
    Sequential sees it.
    """
    targets, seen, torchs = [], [], []

    def backend(graph, inputs):
        targets.append([n.args[1] for n in graph.graph.nodes if "handgrad" in str(n.target)])
        return graph

    torch.manual_seed(0)
    model, x = layers().to(device), torch.randn(4, 6, device=device)
    expected, ours = model(x), fuse(copy.deepcopy(model))
    compiled = torch.compile(ours, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    names = [text.split("'")[1::2] for text in targets[0]]
    assert names == [["relu", "leaky_relu"], ["identity"]]
    plain = torch.compile(model, backend="eager", fullgraph=True)
    plain(x)
    for kind, found in ((ours, seen), (model, torchs)):
        kind[1].register_forward_hook(lambda m, i, output, found=found: found.append(output))
    torch.testing.assert_close(compiled(x), expected)
    plain(x)
    assert len(torchs) <= len(seen)
    torch.testing.assert_close(seen, [model[:2](x)][: len(seen)])


def test_autocast_and_double_backward(device):
    torch.manual_seed(0)
    model, x = fuse(layers()).to(device), torch.randn(4, 6, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model.double()
    x = x.double().requires_grad_()
    assert torch.autograd.gradgradcheck(model, x)


def test_saved_tensors(device):
    """One operation keeps its inputs and its output, and not what lies between its children."""

    def kept(model, x):
        sizes = {}
        note = lambda t: sizes.setdefault(t.data_ptr(), t.nbytes) and t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            y = model(x)  # noqa: F841  # it must stay, or its memory would be used again
        return sum(sizes.values())

    x = torch.randn(64, 6, device=device)
    apart = layers().to(device)
    whole = nn.ModuleList(
        mlp.Linear(*size, device=device, activation=name)
        for *size, name in ((6, 5, "relu"), (5, 5, "leaky_relu"), (5, 3, "identity"))
    )
    together = functools.partial(functools.reduce, lambda y, layer: layer(y), whole)
    ours, alone = kept(fuse(copy.deepcopy(apart)), x), kept(together, x)
    assert ours == alone <= kept(apart, x)


class Named(nn.Sequential):
    """A subclass with a method, without a forward of its own."""

    def hidden(self, x):
        return self[0](x)


@pytest.mark.parametrize("kind", [nn.Sequential, Named])
def test_classes(kind):
    model = kind(nn.Linear(6, 5), nn.ReLU())
    x, ours = torch.randn(3, 6), fuse(copy.deepcopy(model))
    twins = ours, fuse(ours), copy.deepcopy(ours), copy.copy(ours), pickle.loads(pickle.dumps(ours))
    for twin in twins:
        assert isinstance(twin, kind) and isinstance(twin, mlp.Sequential)
        assert type(twin) is type(ours) and type(twin).__name__ == kind.__name__
        assert operations(lambda: twin(x)) == ["relu"]  # noqa: B023
        torch.testing.assert_close(twin[0](x), model[0](x))
    assert type(ours[:1]) is type(ours)
    if kind is Named:
        torch.testing.assert_close(ours.hidden(x), model.hidden(x))


class Backwards(nn.Sequential):
    """A subclass whose forward is torch's, which asks it for the order."""

    def __iter__(self):
        return reversed(self._modules.values())


def test_another_order():
    model, lines = Backwards(nn.ReLU(), nn.Linear(6, 6)), []
    x = torch.randn(3, 6)
    expected = model(x)
    assert type(fuse(model, lines.append)) is Backwards and "an order of its own" in lines[0]
    torch.testing.assert_close(model(x), expected)
    made = type("Ours", (mlp.Sequential,), {"__iter__": Backwards.__iter__})(
        *model._modules.values()
    )
    torch.testing.assert_close(made(x), expected)


def test_made_by_hand():
    model = mlp.Sequential(mlp.Linear(6, 5), nn.SiLU(), mlp.Linear(5, 2, activation="tanh"))
    assert operations(lambda: model(torch.ones(1, 6))) == [["silu", "tanh"]]
    assert mlp.Sequential()(3) == 3


def test_one_row_more(monkeypatch):
    """A pair needs a row of FUSED and a method `fused`, another follower a row of FOLLOWERS."""

    class Scaled(nn.LayerNorm):
        activation = factor = None

        def fused(self, input, activation="identity", factor=1.0):
            calls.append((activation, factor))
            return factor * ACTIVATIONS[activation].torch(super().forward(input))

    class Times(nn.Module):
        def __init__(self, by):
            super().__init__()
            self.by = by

        def forward(self, input):
            return self.by * input

    calls, x = [], torch.randn(3, 6)
    for table, key, row in (
        (sequential.FUSED, Scaled, {"activation": "identity", "factor": 1.0}),
        (sequential.FOLLOWERS, Times, sequential.Follower("factor", ("by",), lambda s: s[0])),
    ):
        monkeypatch.setitem(table, key, row)
    for name in ("_followers", "_known", "_plans"):
        monkeypatch.setattr(sequential, name, dict(getattr(sequential, name)))
    sequential._fill_tables()
    layer = Scaled(6)
    layer.activation, layer.factor = "identity", 1.0
    model = mlp.Sequential(layer, nn.Tanh(), Times(3.0))
    torch.testing.assert_close(model(x), nn.Sequential.forward(model, x))
    assert calls == [("tanh", 3.0)]


def test_sharded_and_parallel(tmp_path):
    """DDP and FSDP2 around a fused model give the gradients of the model alone."""
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(4, 6)
    expected = layers()
    models = [fuse(copy.deepcopy(expected)) for _ in range(3)]
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        models[0] = nn.parallel.DistributedDataParallel(models[0])
        fully_shard(models[1], mesh=mesh)
        fully_shard(models[2][2], mesh=mesh)
        fully_shard(models[2], mesh=mesh)
        for model in (expected, *models):
            model(x).square().sum().backward()
        for model in models:
            for p, q in zip(model.parameters(), expected.parameters()):
                grad = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
                torch.testing.assert_close(grad, q.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_kernels_serve_it(device):
    """The same values by kernels and by the references."""
    torch.manual_seed(0)
    model, x = fuse(layers()).to(device), torch.randn(4, 6, device=device)
    with kernels.use("torch"):
        expected = model(x)
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("window", [2, (2,), [2, 2], np.int64(2), (np.int64(2), 2)], ids=repr)
def test_a_window_in_any_form(window):
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(window))
    x = torch.randn(2, 1, 8, 8)
    expected = model(x)
    found = []
    made = operations(lambda: found.append(fuse(model)(x)))
    torch.testing.assert_close(found[0], expected)
    assert made == [("relu", (2, 2))]
