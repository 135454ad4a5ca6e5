"""Tensors that users bring: with a pending minus sign, fake, distributed, nested. Every operation
computes with them or says in one line what to do.
"""

import io

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map

import kernels
import mlp
from tests.pairs import PAIRS, cases, gradients, leaves, of_tensors

EACH_OPERATION = pytest.mark.parametrize("name", PAIRS)


def negated(t):
    """The same values with a pending minus sign, as `z.conj().imag` gives them."""
    if not (isinstance(t, torch.Tensor) and t.dtype == torch.float32):
        return t
    view = torch.complex(torch.zeros_like(t), -t).conj().imag
    assert view.is_neg()
    return view


def wanting(args, name):
    """The tensors of `args` that want gradients."""
    found = tree_leaves(args[: PAIRS[name][2]])
    return [t for t in found if isinstance(t, torch.Tensor) and t.requires_grad]


@EACH_OPERATION
def test_pending_minus_sign(name, device):
    """Inputs and incoming gradients may have one."""
    for args in cases(name, device, shape=(4, 6, 5)):
        given = leaves(name, args)
        expected = gradients([PAIRS[name][0](*given)], given)
        views = tree_map(negated, args)
        tensors = [t for t in tree_leaves(views[: PAIRS[name][2]]) if isinstance(t, torch.Tensor)]
        tensors = [t.requires_grad_() for t in tensors if t.is_floating_point()]
        y = PAIRS[name][0](*views)
        results = [y, *torch.autograd.grad(y.float().sum(), tensors)]
        torch.testing.assert_close(results, expected)
        y, dy = PAIRS[name][0](*given), torch.randn(y.shape, device=device)
        by = [torch.autograd.grad(y, wanting(given, name), d, True) for d in (dy, negated(dy))]
        torch.testing.assert_close(*by)


@EACH_OPERATION
def test_batched_gradients(name, device):
    """is_grads_batched=True gives the gradients that single calls give."""
    for args in cases(name, device, shape=(4, 6, 5)):
        given = leaves(name, args)
        y, tensors = PAIRS[name][0](*given), wanting(given, name)
        dys = torch.randn(3, *y.shape, device=device)
        batched = torch.autograd.grad(y, tensors, dys, retain_graph=True, is_grads_batched=True)
        singles = [torch.autograd.grad(y, tensors, dy, retain_graph=True) for dy in dys]
        torch.testing.assert_close(batched, tuple(torch.stack(g) for g in zip(*singles)))


@EACH_OPERATION
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated", "ignore::torch.jit.TracerWarning")
def test_traced_for_torchscript(name, device):
    """The trace computes with other numbers than it was made from, and it can be saved."""
    for args in cases(name, device, shape=(4, 6, 5)):
        call, tensors = of_tensors(PAIRS[name][0], args)
        others = [t.flip(0) for t in tensors]
        traced = torch.jit.trace(call, tensors)
        torch.testing.assert_close(traced(*others), call(*others))
        torch.jit.save(traced, io.BytesIO())


@EACH_OPERATION
def test_fake_tensors(name):
    """Fake tensors give shapes without numbers, so no operation may read a value."""
    with FakeTensorMode():
        for args in cases(name, "cpu", shape=(4, 6, 5)):
            given = leaves(name, args)
            y = PAIRS[name][0](*given)
            assert y.shape == PAIRS[name][1](*given).shape
            grads = torch.autograd.grad(y.sum(), wanting(given, name))
            assert [g.shape for g in grads] == [t.shape for t in wanting(given, name)]


@pytest.mark.parametrize("optimizer", [mlp.SGD, mlp.Adam, mlp.AdamW])
def test_optimizers_of_other_tensors(optimizer, device):
    """Fake parameters can take a step. A pending minus sign of a gradient counts."""
    with FakeTensorMode():
        p = nn.Parameter(torch.randn(3, 4))
        p.grad = torch.randn(3, 4)
        optimizer([p], lr=0.1).step()
    results = []
    for change in (torch.Tensor.clone, negated):
        p = nn.Parameter(torch.ones(3, 4, device=device))
        p.grad = change(torch.linspace(-1, 1, 12, device=device).view(3, 4))
        optimizer([p], lr=0.1).step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_parameters_with_a_pending_minus_sign_are_refused(device):
    """Parameters and states are written in place. A kernel would write to a copy instead."""
    p, g, v = (torch.ones(6, device=device) for _ in range(3))
    row = 0.1, 0.0, 0.9, 0.0
    for params, states, what in (
        ([p, negated(p)], [v, v], "parameter 1"),
        ([p, p], [v, torch._neg_view(v)], "state of parameter 1"),
    ):
        message = rf"momentum: {what} is a view with a minus sign.*\.resolve_neg\(\)"
        with pytest.raises(ValueError, match=message):
            kernels.apply_rule("momentum", params, [g, g], [states], row, 2)
    with pytest.raises(ValueError, match="SGD: parameter 0 is a view with a minus sign"):
        mlp.SGD([negated(p).detach()], lr=0.1).step(grads=[g])


@pytest.fixture
def mesh():
    """A device mesh of one process."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh

    init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
    yield init_device_mesh("cpu", (1,))
    destroy_process_group()


def test_distributed_tensors(mesh):
    """Every operation and optimizer takes a DTensor. elementwise_loss is left out, because torch
    cannot shard all of its losses.
    """
    from torch.distributed.tensor import DTensor, Replicate, distribute_tensor

    def spread(t):
        tensor = isinstance(t, torch.Tensor)
        return distribute_tensor(t, mesh, [Replicate()]) if tensor else t

    def convolves(given):
        """False if torch itself refuses: 2.11 does so for most paddings."""
        try:
            return bool(PAIRS["conv2d"][1](*given).numel())
        except RuntimeError:
            return False

    for name in set(PAIRS) - {"elementwise_loss"}:
        for args in cases(name, "cpu", shape=(4, 6, 5)):
            given, local = leaves(name, tree_map(spread, args)), leaves(name, args)
            if name == "conv2d" and not convolves(given):
                continue
            results = gradients([PAIRS[name][0](*given)], given)
            assert all(isinstance(r, DTensor) for r in results)
            expected = gradients([PAIRS[name][0](*local)], local)
            torch.testing.assert_close([r.full_tensor() for r in results], expected)
    for optimizer in (mlp.SGD, mlp.Adam, mlp.AdamW):
        values = []
        for make in (spread, torch.clone):
            p = nn.Parameter(make(torch.ones(3, 4)))
            p.grad = make(torch.linspace(-1, 1, 12).view(3, 4))
            optimizer([p], lr=0.1).step()
            values.append(p.full_tensor() if isinstance(p, DTensor) else p)
        torch.testing.assert_close(*values)


@pytest.mark.filterwarnings("ignore:.*nested tensors is in prototype stage")
def test_nested_tensors_are_refused():
    rows = [torch.randn(2, 4), torch.randn(3, 4)]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        for call in (
            lambda x: kernels.linear(x, torch.randn(5, 4)),
            lambda x: kernels.layer_norm(x, 4),
        ):
            with pytest.raises(ValueError, match=r"to_padded_tensor\(input, 0\.0\)"):
                call(nested)
            padded = torch.nested.to_padded_tensor(nested, 0.0)  # the advice works
            assert call(padded).shape[:2] == (2, 3)
