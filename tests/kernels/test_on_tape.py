"""On a CPU without the interpreter, torch's tape differentiates linear layers and their stacks,
cross-entropy, squared error and Huber's loss. The Function and the manual API give the same
numbers, bit for bit; for cross-entropies that are not of plain labels, to rounding.
"""

import contextlib
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

import kernels
import mlp
from kernels import launch, tape
from kernels.activations import ACTIVATIONS
from kernels.losses import LOSSES
from kernels.ops.cross_entropy import CrossEntropySaved, is_late
from tests.checks import assert_equal
from tests.pairs import PAIRS, cases, gradients, leaves

IGNORED = {"none": (), "some": (0, 3), "all": (0, 1, 2, 3, 4)}
EACH_REDUCTION = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
EACH_IGNORED = pytest.mark.parametrize("ignored", IGNORED)


@pytest.fixture(autouse=True)
def no_kernels(monkeypatch):
    """Users on a CPU have no interpreter."""
    monkeypatch.setattr(launch, "INTERPRETED", False)


def drawn(dtype=torch.float32, ignored="none"):
    torch.manual_seed(0)
    target = torch.randint(0, 7, (5,))
    target[list(IGNORED[ignored])] = -100
    return 3 * torch.randn(5, 7, dtype=dtype), target


def gradient(function, logits, target, dy=None, **options):
    """Loss and gradient. The default dy is no power of two, so a product with it rounds."""
    logits = logits.clone().requires_grad_()
    value = function(logits, target, **options)
    dy = torch.full_like(value, 0.7) if dy is None else dy
    return value.detach(), torch.autograd.grad(value, logits, dy)[0]


@EACH_REDUCTION
@EACH_IGNORED
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits(dtype, ignored, reduction):
    """torch's tape, our Function and the manual API give the same bits. In float32 and float64
    torch itself does too.
    """
    logits, target = drawn(dtype, ignored)
    on_tape = gradient(kernels.cross_entropy, logits, target, reduction=reduction)
    with kernels.use("torch"):
        by_function = gradient(kernels.cross_entropy, logits, target, reduction=reduction)
    value, saved = kernels.cross_entropy_fwd(logits, target, reduction=reduction)
    by_hand = value, kernels.cross_entropy_bwd(torch.full_like(value, 0.7), *saved)[0]
    assert CrossEntropySaved(*saved).late
    assert_equal(by_function, on_tape)
    assert_equal(by_hand, on_tape)
    if dtype != torch.bfloat16:
        assert_equal(gradient(F.cross_entropy, logits, target, reduction=reduction), on_tape)


ELEMENTS = {
    "mse": (kernels.mse_loss, F.mse_loss, {}),
    "huber": (kernels.huber_loss, F.huber_loss, {"delta": 0.75}),
}


@EACH_REDUCTION
@pytest.mark.parametrize("loss", ELEMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_same_bits_of_elements(loss, dtype, reduction):
    """Also for the target, at the kinks, and for NaN. The formulas of the row agree."""
    ours, theirs, options = ELEMENTS[loss]
    torch.manual_seed(0)
    x, t = (2 * torch.randn(2, 7, 3).to(dtype)).unbind()
    x.view(-1)[:4] = t.view(-1)[:4] + torch.tensor([0.75, -0.75, 0.0, math.nan]).to(dtype)
    dy = torch.rand(7, 3).to(dtype) if reduction == "none" else torch.tensor(0.7).to(dtype)

    def gradients(function):
        tensors = [v.clone().requires_grad_() for v in (x, t)]
        value = function(*tensors, reduction=reduction, **options)
        return [value.detach(), *torch.autograd.grad(value, tensors, dy)]

    on_tape = gradients(ours)
    with kernels.use("torch"):
        by_function = gradients(ours)
    args = x, t, loss, options.get("delta"), None, reduction
    value, saved = kernels.elementwise_loss_fwd(*args)
    by_hand = [value, *kernels.elementwise_loss_bwd(dy, *saved)]
    for other in (by_function, by_hand, *([gradients(theirs)] if dtype != torch.bfloat16 else [])):
        torch.testing.assert_close(other, on_tape, rtol=0, atol=0, equal_nan=True)
    row = LOSSES[loss]
    terms = [f(x, t, options.get("delta")) for f in (row.value_ref, row.gradient_ref)]
    if reduction == "none":
        expected = [terms[0], terms[1] * dy]
        torch.testing.assert_close(on_tape[:2], expected, equal_nan=True)


def test_torchs_node_serves_plain_elements_only():
    """Weights, half precision and the other losses have our node. Errors are ours."""
    x, t = torch.randn(4, 3, requires_grad=True), torch.rand(4, 3)
    ours = tape.Function._backward_cls
    assert not isinstance(kernels.mse_loss(x, t).grad_fn, ours)
    assert not isinstance(kernels.huber_loss(x, t, delta=2.0).grad_fn, ours)
    assert isinstance(kernels.huber_loss(x, t, weight=torch.ones(3)).grad_fn, ours)
    assert isinstance(kernels.mse_loss(x.bfloat16(), t.bfloat16()).grad_fn, ours)
    assert isinstance(kernels.pinball_loss(x, t).grad_fn, ours)
    wrong = (
        ("mse_loss: target must be (4, 3) as input is, got (3,)", t[0]),
        ("mse_loss: target must be torch.float32 as input is, got torch.float64", t.double()),
        ("mse_loss: target must be dense", t.to_sparse()),
    )
    for message, target in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.mse_loss(x, target)
    with pytest.raises(RuntimeError, match="huber_loss: delta must be positive, got 0"):
        kernels.huber_loss(x, t, delta=0.0)
    with pytest.raises(ValueError, match="unknown reduction 'max'"):
        kernels.mse_loss(x, t, reduction="max")


def test_torchs_node_serves_a_cross_entropy():
    """The node is torch's in float32 and float64. It is ours in half precision, and where
    `use("torch")` forces it.
    """
    logits, target = drawn()
    logits.requires_grad_()
    ours = tape.Function._backward_cls
    weights, probabilities = torch.ones(7), logits.detach().softmax(1)
    for reduction in ("mean", "sum", "none"):
        loss = kernels.cross_entropy(logits, target, reduction=reduction)
        assert not isinstance(loss.grad_fn, ours)
    for options in ({"weight": weights}, {"label_smoothing": 0.1}):
        loss = kernels.cross_entropy(logits, target, **options)
        assert not isinstance(loss.grad_fn, ours)
    for x, t in ((logits, probabilities), (logits[0], target[0])):
        assert not isinstance(kernels.cross_entropy(x, t).grad_fn, ours)
    with kernels.use("torch"):
        assert isinstance(kernels.cross_entropy(logits, target).grad_fn, ours)
    assert isinstance(kernels.cross_entropy(logits.bfloat16(), target).grad_fn, ours)
    assert not is_late(logits, target, weights) and not is_late(logits, target, None, 0.1)


@EACH_REDUCTION
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["labels", "labels of (N, C, d)", "probabilities"])
def test_other_cross_entropies(kind, weighted, smoothing, reduction):
    """Class weights, smoothing, more dimensions, probabilities: torch's bits on the tape. The
    Function gives them to rounding.
    """
    logits, target = drawn(torch.float64, "some")
    if kind == "probabilities":
        target = torch.rand(5, 7, dtype=torch.float64)
    if kind == "labels of (N, C, d)":
        logits, target = logits.unsqueeze(-1).expand(5, 7, 2), torch.stack([target, target], 1)
    options = {"reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        options["weight"] = torch.rand(7, dtype=torch.float64)
    on_tape = gradient(kernels.cross_entropy, logits, target, **options)
    assert_equal(gradient(F.cross_entropy, logits, target, **options), on_tape)
    with kernels.use("torch"):
        by_function = gradient(kernels.cross_entropy, logits, target, **options)
    torch.testing.assert_close(by_function, on_tape, rtol=1e-12, atol=1e-14)


def test_class_weights_get_no_gradient():
    logits, target = drawn()
    weight = torch.rand(7).requires_grad_()
    for t in (target, logits.softmax(1)):
        loss = kernels.cross_entropy(logits.clone().requires_grad_(), t, weight)
        loss.backward()
        assert weight.grad is None
        assert not kernels.cross_entropy(logits, t, weight).requires_grad


@EACH_REDUCTION
@pytest.mark.parametrize("forced", [False, True])
def test_derivatives(forced, reduction):
    """First and second derivatives are right, on the tape and in the Function."""
    logits, target = drawn(torch.float64, "some")
    with kernels.use("torch") if forced else contextlib.nullcontext():
        of = lambda z: kernels.cross_entropy(z, target, reduction=reduction)  # noqa: E731
        assert gradcheck(of, [logits.requires_grad_()])
        assert gradgradcheck(of, [logits])


@EACH_REDUCTION
def test_many_gradients_at_once(reduction):
    """is_grads_batched=True passes a dy without plain memory. The gradients are still right."""
    logits, target = drawn()
    with kernels.use("torch"):
        value = kernels.cross_entropy(logits.requires_grad_(), target, reduction=reduction)
    dys = torch.randn(3, *value.shape)
    (batched,) = torch.autograd.grad(value, logits, dys, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(value, logits, dy, retain_graph=True)[0] for dy in dys]
    torch.testing.assert_close(batched, torch.stack(each))


def test_labels_of_every_type():
    logits, target = drawn()
    expected = gradient(kernels.cross_entropy, logits, target)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert_equal(gradient(kernels.cross_entropy, logits, target.to(dtype)), expected)


def test_errors_are_ours():
    logits, target = drawn()
    wrong = {
        "target[2] is 7, but there are 7 classes": (IndexError, torch.tensor([0, 1, 7, 2, 3])),
        "target must be class probabilities": (ValueError, torch.rand(5, 6)),
        "target must be labels (5,) for logits (5, 7)": (ValueError, target[:4]),
        "integer labels or floating-point probabilities": (ValueError, target > 2),
        "target must be torch.float32 as input is": (ValueError, torch.rand(5, 7).double()),
    }
    for message, (kind, bad) in wrong.items():
        for context in (contextlib.nullcontext(), kernels.use("torch")):
            with context, pytest.raises(kind, match=re.escape(message)):
                kernels.cross_entropy(logits, bad)


def test_a_network_and_its_twin_by_hand():
    """Steps of a module and of its Net agree bit for bit. The batch is no power of two, so the mean
    rounds.
    """
    torch.manual_seed(0)
    module, net = mlp.MLP([6, 5, 4], "sigmoid"), mlp.Net([6, 5, 4], "sigmoid")
    net.load_state_dict(module.state_dict())
    x, target = torch.randn(7, 6), torch.randint(0, 4, (7,))
    optimizers = mlp.SGD(module.parameters(), lr=0.3), mlp.SGD(net.parameters.values(), lr=0.3)
    loss = mlp.SoftmaxCrossEntropy()
    for _ in range(3):
        optimizers[0].zero_grad()
        value = kernels.cross_entropy(module(x), target)
        value.backward()
        ours = loss.forward(net.forward(x), target)
        net.backward(loss.backward())
        assert_equal([ours, *net.grads.values()], [value, *(p.grad for p in module.parameters())])
        optimizers[0].step()
        optimizers[1].step(grads=net.grads)
    assert_equal(list(net.parameters.values()), [p.detach() for p in module.parameters()])


def layers(name, dtype, lead=(5,)):
    """(a layer, a stack, their tensors), with this activation."""
    torch.manual_seed(0)
    shapes = (*lead, 7), (6, 7), (6,), (3, 6), (3,)
    x, w, b, v, c = ((2 * torch.randn(shape)).to(dtype) for shape in shapes)
    tensors = [t.requires_grad_() for t in (x, w, b, v, c)]
    layer = lambda x, w, b, v, c: kernels.linear(x, w, b, name)  # noqa: E731
    stack = lambda x, w, b, v, c: kernels.mlp(x, (w, v), (b, c), name, name)  # noqa: E731
    return layer, stack, tensors


def gradients_of(function, tensors):
    y = function(*tensors)
    dy = torch.linspace(0.3, 1.7, y.numel()).view_as(y).to(y)
    return y.detach(), *torch.autograd.grad(y, tensors, dy, allow_unused=True)


@pytest.mark.parametrize("lead", [(5,), (), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_same_bits_of_layers(name, dtype, lead):
    """Of a layer and of a stack, on the tape, by the Function and by hand."""
    layer, stack, tensors = layers(name, dtype, lead)
    ours = tape.Function._backward_cls
    for function in (layer, stack):
        assert not isinstance(function(*tensors).grad_fn, ours)
        on_tape = gradients_of(function, tensors)
        with kernels.use("torch"):
            assert isinstance(function(*tensors).grad_fn, ours)
            by_function = gradients_of(function, tensors)
        torch.testing.assert_close(on_tape, by_function, rtol=0, atol=0)
    x, w, b = (t.detach() for t in tensors[:3])
    y, saved = kernels.linear_fwd(x, w, b, name)
    dy = torch.linspace(0.3, 1.7, y.numel()).view_as(y).to(y)
    by_hand = y, *kernels.linear_bwd(dy, *saved)
    assert_equal(by_hand, gradients_of(layer, tensors)[:4])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_of_layers(name):
    """First and second derivatives are right, also many at once, for an activation with a torch
    operator and for one with a node of ours.
    """
    for function in layers(name, torch.float64)[:2]:
        tensors = layers(name, torch.float64, (2,))[2]
        assert gradcheck(function, tensors)
        assert gradgradcheck(function, tensors)
        y = function(*tensors)
        used = tensors if y.shape[-1] == 3 else tensors[:3]
        dys = torch.randn(3, *y.shape, dtype=y.dtype)
        options = {"retain_graph": True}
        batched = torch.autograd.grad(y, used, dys, is_grads_batched=True, **options)
        each = [torch.autograd.grad(y, used, dy, **options) for dy in dys]
        torch.testing.assert_close(batched, tuple(map(torch.stack, zip(*each))))


def test_torchs_node_serves_contiguous_layers_only():
    """torch's tape looks at the strides and multiplies in another order, so others have our node.
    Errors are ours.
    """
    _, _, (x, w, b, v, _) = layers("relu", torch.float32)
    ours = tape.Function._backward_cls
    one = torch.ones(1, 1, requires_grad=True)
    by_function = (
        kernels.linear(torch.randn(7, 5).t(), w, b),
        kernels.linear(x, torch.randn(7, 6, requires_grad=True).t(), b),
        kernels.linear(x, torch.randn(1, 14, requires_grad=True)[:, ::2]),
        kernels.linear(one, torch.ones(4, 1)),
        kernels.mlp(x, (w, torch.randn(6, 3, requires_grad=True).t())),
    )
    for y in by_function:
        assert isinstance(y.grad_fn, ours)
    wrong = (
        ("input has 7 features", (x, v, None)),
        ("bias must be (6,)", (x, w, b[:1])),
        ("bias must be torch.float32 as input is, got torch.float64", (x, w, b.double())),
        ("weight must be dense", (x, w.to_sparse(), b)),
        ("input must be floating point", (x.long(), w.long(), b.long())),
    )
    for message, arguments in wrong:
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.linear(*arguments)
        with pytest.raises(ValueError, match=re.escape(message)):
            kernels.mlp(arguments[0], arguments[1:2], arguments[2:], "relu")


def test_a_layer_in_place():
    """As in torch, a layer's output may be overwritten unless the backward needs it."""
    x = torch.randn(2, 3, requires_grad=True)
    kernels.linear(x, torch.eye(3), None, "identity").mul_(2).sum().backward()
    assert_equal(x.grad, torch.full((2, 3), 2.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kernels.linear(x, torch.eye(3), None, "tanh").mul_(2).sum().backward()


@pytest.mark.parametrize("name", PAIRS)
def test_compiled(name):
    """torch.compile runs the reference, with eager's values and gradients."""
    torch._dynamo.reset()
    args, found = cases(name, "cpu")[0], []
    for function in (PAIRS[name][0], torch.compile(PAIRS[name][0], backend="aot_eager")):
        given = leaves(name, args)
        y = function(*given)
        found.append([y, *gradients([y], given)])
    assert_equal(*found)


def test_backward_within_autocast_is_torchs():
    x, w, b = (torch.randn(shape) for shape in ((16, 12), (5, 12), (5,)))
    found = []
    for linear in (kernels.linear, F.linear):
        given = [t.clone().requires_grad_() for t in (x, w, b)]
        y = linear(*given)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y.backward(torch.full_like(y, 0.7))
        found.append([t.grad for t in given])
    assert_equal(*found)
