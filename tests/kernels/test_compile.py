"""torch.compile makes one graph of every operation, equal to eager bit for bit. Its operators pass
torch's opcheck.
"""

from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.library import opcheck
from torch.testing._internal.optests.generate_tests import DEFAULT_TEST_UTILS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import kernels
from kernels import compiled as compiled_operators
from kernels import tape
from tests.checks import assert_equal
from tests.pairs import PAIRS, cases, gradients, leaves, of_tensors

EACH_OPERATION = pytest.mark.parametrize("name", PAIRS)
# With the kernels only the returned tensors can differ from the reference's, so only their schema
# and the fake implementation's shapes are checked.
CHECKED = {"torch": list(DEFAULT_TEST_UTILS), "triton": ["test_schema", "test_faketensor"]}

# tests/kernels/test_one_more_operation.py registers these in the same process.
BY_TESTS = {"glu", "glu_bwd"}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, fullgraph=True, backend="aot_eager")


@EACH_OPERATION
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_as_eager(name, backend, device):
    """All cases of an operation in one graph equal eager, by the reference and by the kernels."""
    every = lambda *arguments: [PAIRS[name][0](*args) for args in arguments]  # noqa: E731
    arguments = [leaves(name, args) for args in cases(name, device, shape=(4, 6, 5))]
    with kernels.use(backend):
        expected = gradients(every(*arguments), arguments)
        assert_equal(gradients(compiled(every)(*arguments), arguments), expected, name)


class Recorder(TorchDispatchMode):
    """Collects every call of our operators in `calls`, as (operator, arguments)."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "handgrad":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def leaf(forward):
    """A function that detaches a recorded argument for opcheck. An argument of a forward then wants
    a gradient.
    """
    return lambda t: t.detach().requires_grad_(forward and t.is_floating_point())


@EACH_OPERATION
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # opcheck, of its own copies
def test_opcheck(name, backend, device, monkeypatch):
    """opcheck tests schema, fake implementation, gradient and dynamic shapes, for the forward
    operator and its backward, on every case.
    """

    def operator(operation, *args):
        tensors = []
        text = compiled_operators.written(args, tensors)
        return compiled_operators.operators[operation.name](tensors, text)[0]

    monkeypatch.setattr(tape, "call", operator)
    called = set()
    for args in cases(name, device, shape=(4, 6, 5)):
        args = leaves(name, args)
        with Recorder() as recorder:
            gradients([PAIRS[name][0](*args)], args)
        for op, given in recorder.calls:
            called.add(str(op).removeprefix("handgrad.").removesuffix(".default"))
            given = tree_map_only(torch.Tensor, leaf("_bwd" not in str(op)), given)
            with kernels.use(backend):
                opcheck(op, given, test_utils=CHECKED[backend])
    assert called == {name, f"{name}_bwd"}


class Saved(NamedTuple):
    x: torch.Tensor
    made: torch.Tensor
    again: torch.Tensor
    pair: tuple
    y: torch.Tensor


def test_a_tensor_that_was_saved_twice_is_returned_once():
    """An operator may not return a tensor twice, so a mark says which output it is."""
    operation = SimpleNamespace(saved=Saved, parameters=("x",), derived={})
    x, made, y = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 3.0)
    saved = Saved(x, made, made, (None, made), y)
    outputs = compiled_operators._outputs(operation, y, saved)
    assert sum(t.numel() > 0 for t in outputs) == 2, "y and made"
    assert_equal(tuple(compiled_operators._saved(operation, (x,), outputs)), tuple(saved))


def test_every_operator_is_checked():
    """The library registers two operators for each row with a gradient, three updates, and no
    others.
    """
    registered = {
        name.removeprefix("handgrad::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("handgrad::")
    } - BY_TESTS
    both = set(PAIRS)
    assert registered == both | {f"{name}_bwd" for name in both} | {"sgd", "adam", "apply_rule"}, (
        "an operation that is registered needs a row in kernels/operations.py"
    )


@pytest.mark.parametrize("update", ["sgd", "adam"])
def test_opcheck_updates(update):
    """The optimizers' operators mutate the arguments that their schema names, and nothing else."""
    tensors = lambda: [torch.rand(3, 4), torch.rand(5)]  # noqa: E731
    rate = torch.tensor(0.1)
    for args in {
        "sgd": [
            (tensors(), tensors(), tensors(), None, 0.1, 0.9, 0.0, 0.1, True, False, False),
            (tensors(), tensors(), [], rate, 0.0, 0.0, 0.0, 0.0, False, True, False),
        ],
        "adam": [
            (
                tensors(),
                tensors(),
                tensors(),
                tensors(),
                None,
                3.0,
                rate,
                0.0,
                [0.9, 0.99],
                1e-8,
                0.1,
                True,
                False,
            ),
            (
                tensors(),
                tensors(),
                tensors(),
                tensors(),
                rate,
                0.0,
                None,
                0.1,
                [0.9, 0.99],
                1e-8,
                0.1,
                False,
                True,
            ),
        ],
    }[update]:
        opcheck(getattr(torch.ops.handgrad, update).default, args)


@pytest.mark.parametrize("rule", kernels.RULES)
def test_opcheck_rules(rule):
    """The same for every rule. Rate and step are numbers once, tensors once."""
    tensors = lambda: [torch.rand(3, 4), torch.rand(5)]  # noqa: E731
    row, states = list(kernels.row_of(rule)), len(kernels.RULES[rule].states)
    one, three = torch.tensor(0.1), torch.tensor(3.0)
    for numbers, flags in (((None, row, None, 3.0), (True, False)), ((one, row, three, 0.0), ())):
        given = tensors(), tensors(), tensors() * states, rule, *numbers, *(flags or (False, True))
        opcheck(torch.ops.handgrad.apply_rule.default, given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x, w: kernels.linear(x, w),
            r"linear: input has 4 features .* weight \(5, 6\) takes 6",
        ),
        (lambda x, w: kernels.mlp(x, [x[:, :4], w]), r"weight 1 must be \(out, 3\)"),
        (
            lambda x, w: kernels.linear(x, x, None, "swish"),
            "unknown activation 'swish'; known: identity",
        ),
        (
            lambda x, w: kernels.cross_entropy(x, x.argmax(1)[:2]),
            r"target must be labels \(3,\) .*got \(2,\)",
        ),
        (
            lambda x, w: kernels.cross_entropy(x, x.argmax(1), reduction="average"),
            "unknown reduction 'average'",
        ),
        (lambda x, w: kernels.mse_loss(x, w), r"target must be \(3, 4\)"),
        (lambda x, w: kernels.conv2d(x[None], w[None, None]), "must fit in the padded image"),
    ],
)
def test_errors_while_tracing(call, message):
    """torch wraps an error that is raised while it traces. The message still names both values."""
    with pytest.raises(RuntimeError, match=message):
        compiled(call)(torch.randn(3, 4), torch.randn(5, 6))


def test_labels_are_checked_when_the_graph_runs():
    """On a CPU a compiled graph refuses a wrong label, as eager mode does."""
    run = compiled(kernels.cross_entropy)
    run(torch.randn(3, 4), torch.tensor([1, 3, 2]))
    with pytest.raises(IndexError, match=r"target\[1\] is 7, but there are 4 classes"):
        run(torch.randn(3, 4), torch.tensor([1, 7, 2]))


@EACH_OPERATION
def test_nothing_is_read_while_traced(name):
    """make_fx traces the operations on fake tensors. The trace also computes with other numbers and
    labels.
    """
    for args in cases(name):
        call, tensors = of_tensors(PAIRS[name][0], args)
        others = [t.flip(0) for t in tensors]
        torch.testing.assert_close(
            make_fx(call, tracing_mode="symbolic")(*tensors)(*others), call(*others)
        )
