"""`kernels.use("numba")`: linear layers on a CPU by compiled loops, against torch."""

import pytest
import torch
import torch.nn.functional as F

import kernels
import mlp
from kernels import launch
from kernels.activations import ACTIVATIONS
from kernels.ops import linear as linear_ops
from tests.checks import assert_as_accurate, assert_equal, double

pytest.importorskip("numba", reason="needs numba: pip install 'handgrad[cpu]'")
EACH_DTYPE = pytest.mark.parametrize("dtype", launch.LOOP_DTYPES, ids=str)
KINKLESS = 1e-5  # how far a pre-activation must be from a kink
# Sizes (M, K, N): of no and one row, of rows and columns that fill no tile, of sums that are cut,
# and of enough work for several threads.
SHAPES = [
    (0, 4, 3),
    (5, 0, 3),
    (5, 4, 0),
    (1, 1, 1),
    (1, 5, 3),
    (4, 8, 4),
    (7, 33, 21),
    (9, 130, 50),
    (600, 20, 6),
    (13, 9, 530),
    (33, 157, 101),
]


@pytest.fixture(autouse=True)
def numba(monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with kernels.use("numba"):
        yield


def draw(activation, m, k, n, dtype=torch.float32):
    """x, w, b and dy such that rounding cannot move a pre-activation across a kink."""
    while True:
        x, w, b = torch.randn(m, k), torch.randn(n, k) * max(k, 1) ** -0.5, torch.randn(n)
        z = F.linear(*double((x, w, b)))
        if all(((z - kink).abs() > KINKLESS).all() for kink in ACTIVATIONS[activation].kinks):
            return [t.to(dtype) for t in (x, w, b, torch.randn(m, n))]


def by_torch(x, w, b, activation):
    return ACTIVATIONS[activation].torch(F.linear(x, w, b))


def assert_served(tensors, activation):
    """y and all gradients are as accurate as torch's. In float64, nothing more exact is at hand."""

    def results(function, tensors):
        leaves = [t.detach().requires_grad_() for t in tensors[:-1]]
        y = function(*leaves, activation)
        return y, *torch.autograd.grad(y, leaves, tensors[-1])

    torchs = results(by_torch, tensors)
    ours = results(kernels.linear, tensors)
    if ours[0].dtype == torch.float64:
        torch.testing.assert_close(ours, torchs, rtol=1e-13, atol=1e-12)
    else:
        assert_as_accurate(ours, torchs, lambda: results(by_torch, double(tensors)), activation)


@EACH_DTYPE
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, dtype):
    assert_served(draw(activation, 17, 33, 7, dtype), activation)


@EACH_DTYPE
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(shape, dtype):
    assert_served(draw("tanh", *shape, dtype), "tanh")


def called(monkeypatch):
    """A list that gets the work of each call of a compiled loop."""
    loops, calls = linear_ops.loops(), []
    run = loops._run
    monkeypatch.setattr(loops, "_run", lambda *args: calls.append(args) or run(*args))
    return calls


def test_every_layout(monkeypatch):
    """Rows that lie far apart are read in place. Of other layouts a copy is made."""
    calls, (x, w, b, dy) = called(monkeypatch), draw("sigmoid", 6, 10, 5)
    whole = torch.randn(12, 30)
    misaligned = torch.frombuffer(bytearray(4 * 60 + 1), dtype=torch.float32, offset=1)
    layouts = [
        (whole[::2, 7:17], w, b, dy),
        (x, torch.randn(5, 22)[:, 1:11], torch.randn(10)[::2], dy),
        (torch.randn(10, 6).t(), torch.randn(10, 5).t(), b, torch.randn(5, 6).t()),
        (x[:1].expand(6, 10), w, b[:1].expand(5), torch.ones(()).expand(6, 5)),
        (torch.complex(x, x).conj().imag, torch.complex(w, w).conj().imag, b, dy),
        (x, w, torch.complex(b, b).conj().imag, torch.complex(dy, dy).conj().imag),
        (torch.randn(3, 2, 10), w, b, torch.randn(3, 2, 5)),
        (misaligned.copy_(torch.randn(60)).view(6, 10), w, b, dy),
    ]
    for tensors in layouts:
        assert_served(tensors, "sigmoid")
    assert len(calls) >= 3 * (len(layouts) - 1), "the reference served them"


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_a_stack_by_hand_and_by_autograd(bias):
    """A Net's gradients are those of autograd, bit for bit, and as accurate as torch's."""
    net = mlp.Net([20, 15, 9, 4], "gelu", "tanh", bias=bias)
    module = mlp.MLP([20, 15, 9, 4], "gelu", "tanh", bias=bias)
    for p, value in zip(module.parameters(), net.parameters.values()):
        p.data.copy_(value)
    x, dy = torch.randn(11, 20), torch.randn(11, 4)
    y = net.forward(x)
    net.backward(dy)
    output = module(x)
    output.backward(dy)
    assert_equal([y, *net.grads.values()], [output, *(p.grad for p in module.parameters())])

    def exact(x, dy, *parameters):
        y, step = x, 2 if bias else 1
        for i in range(0, len(parameters), step):
            z = F.linear(y, parameters[i], parameters[i + 1] if bias else None)
            y = F.gelu(z) if i < 2 * step else torch.tanh(z)
        return y, *torch.autograd.grad(y, parameters, dy)

    tensors = x, dy, *(p.detach().requires_grad_() for p in net.parameters.values())
    doubles = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    assert_as_accurate(
        [y, *net.grads.values()],
        exact(*tensors),
        lambda: exact(*[t.detach().to(d.dtype).requires_grad_() for t, d in zip(doubles, doubles)]),
    )


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu_squared"])
def test_dz_over_what_it_reads(activation):
    """The gradient may take the place of dy or of s."""
    dy, s = torch.randn(5, 7), torch.randn(5, 7)
    expected = kernels.linear_bwd_dz(dy, s, activation)
    mine = dy.clone()
    torch.testing.assert_close(kernels.linear_bwd_dz(mine, s, activation, out=mine), expected)
    torch.testing.assert_close(kernels.linear_bwd_dz(dy, s, activation, out=s), expected)


def test_buffers_are_filled_and_others_refused():
    """`out` is written in place. One that the loops cannot fill goes to torch, which says why."""
    x, w, b, dz = draw("gelu", 6, 10, 5)
    y, z = torch.full((6, 5), torch.nan), torch.full((6, 5), torch.nan)
    found, saved = kernels.linear_fwd(x, w, b, "gelu", out=(y, z))
    assert found is y and saved.s is z
    torch.testing.assert_close(y, by_torch(x, w, b, "gelu"))
    torch.testing.assert_close(z, F.linear(x, w, b))
    dw, db, dx = torch.empty(5, 10), torch.empty(5), torch.empty(6, 10)
    assert kernels.linear_bwd_dw(dz, x, out=(dw, db))[0] is dw
    assert kernels.linear_bwd_dx(dz, w, out=dx) is dx
    torch.testing.assert_close([dw, db, dx], [dz.t() @ x, dz.sum(0), dz @ w])
    apart = torch.empty(10, 6).t()
    assert kernels.linear_bwd_dx(dz, w, out=apart) is apart
    torch.testing.assert_close(apart, dz @ w)
    with pytest.raises(RuntimeError, match="shape"):
        kernels.linear_bwd_dx(dz, w[:3])
    with pytest.raises(RuntimeError, match="shape"):
        kernels.linear_bwd_dw(dz, x[:3])
    with pytest.raises(RuntimeError, match="dtype"):
        kernels.linear_bwd_dw(dz.double(), x)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_the_gradients_that_are_needed(needs):
    x, w, b, dy = draw("sigmoid", 6, 10, 5)
    _, saved = kernels.linear_fwd(x, w, b, "sigmoid")
    every = kernels.linear_bwd(dy, *saved)
    some = kernels.linear_bwd(dy, *saved, needs=needs)
    assert [g is not None for g in some] == list(needs)
    assert_equal([g for g in some if g is not None], [g for g, n in zip(every, needs) if n])


def test_any_number_of_threads_gives_the_same_bits():
    x, w, b, dy = draw("sigmoid", 45, 157, 101)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, saved = kernels.linear_fwd(x, w, b, "sigmoid")
            found.append([y, *kernels.linear_bwd(dy, *saved)])
    finally:
        torch.set_num_threads(before)
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


def test_infinities_and_nan_are_where_torch_has_them():
    for place, value in (("x", torch.inf), ("w", torch.nan), ("dy", -torch.inf)):
        tensors = dict(zip(("x", "w", "b", "dy"), draw("sigmoid", 6, 10, 5)))
        tensors["x"][:, 3] = 0.0
        tensors[place][2, 3] = value
        leaves = [tensors[name].requires_grad_() for name in ("x", "w", "b")]
        for name, function in (("ours", kernels.linear), ("torch's", by_torch)):
            y = function(*leaves, "sigmoid")
            results = y, *torch.autograd.grad(y, leaves, tensors["dy"])
            tensors[name] = [torch.nan_to_num(t, 7.0, 8.0, 9.0) for t in results]
        torch.testing.assert_close(tensors["ours"], tensors["torch's"])


def test_derivatives_of_every_order():
    x, w, b, _ = (t.requires_grad_() for t in draw("elu", 4, 3, 5, torch.float64))
    assert torch.autograd.gradcheck(kernels.linear, (x, w, b, "elu"))
    assert torch.autograd.gradgradcheck(kernels.linear, (x, w, b, "elu"))


def test_what_follows_torchs_operations_gets_the_reference(monkeypatch):
    calls, (x, w, b, _) = called(monkeypatch), draw("tanh", 6, 10, 5)
    loss = lambda w: kernels.linear(x, w, b, "tanh").square().sum()  # noqa: E731
    ours = torch.func.grad(loss)(w), torch.func.vmap(lambda x: kernels.linear(x, w, b))(x)
    assert not calls
    with kernels.use("torch"):
        assert_equal(ours[0], torch.func.grad(loss)(w))
        torch.testing.assert_close(ours[1], kernels.linear(x, w, b))
    compiled = torch.compile(lambda x: kernels.linear(x, w, b, "tanh"), backend="eager")
    assert_equal(compiled(x), kernels.linear(x, w, b, "tanh"))


def test_large_weights_are_multiplied_by_torch(monkeypatch):
    """Beyond what a cache holds, results have torch's bits."""
    monkeypatch.setattr(linear_ops.loops(), "_PACKED", 4 * 49)
    calls, (x, w, b, dy) = called(monkeypatch), draw("sigmoid", 6, 10, 5)
    y, saved = kernels.linear_fwd(x, w, b, "sigmoid")
    ours = [y, *kernels.linear_bwd(dy, *saved)]
    assert not calls
    with kernels.use("torch"):
        y, saved = kernels.linear_fwd(x, w, b, "sigmoid")
        assert_equal(ours, [y, *kernels.linear_bwd(dy, *saved)])


@EACH_DTYPE
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "relu_squared"])
def test_activations_without_an_operator_of_torch(monkeypatch, activation, dtype):
    """Their loops also run after torch's product, and on dy in place, on several threads."""
    monkeypatch.setattr(linear_ops.loops(), "_PACKED", 4 * 49)
    monkeypatch.setattr(linear_ops.loops(), "_SHARED", 1)
    calls, tensors = called(monkeypatch), draw(activation, 30, 10, 9, dtype)
    assert_served(tensors, activation)
    assert len(calls) == 2  # act and act'
    dy, s = tensors[-1], torch.randn(30, 9, dtype=dtype)
    expected = kernels.linear_bwd_dz(dy, s, activation)
    assert_equal(kernels.linear_bwd_dz(dy.t().contiguous().t(), s, activation), expected)
    assert kernels.linear_bwd_dz(dy, s, activation, out=dy) is dy
    assert_equal(dy, expected)


def test_the_backend_and_what_it_refuses(monkeypatch):
    x = torch.ones(2, 2)
    assert kernels.backend(x) == kernels.backend(x.double(), None) == "numba"
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match=rf"no compiled loop takes {dtype} on cpu; they take"):
            kernels.linear(x.to(dtype), x.to(dtype))
        half = x.to(dtype)  # operations without loops run in the reference
        assert kernels.backend(half) == "torch"
        assert kernels.mse_loss(half, half) == 0 and kernels.layer_norm(half, (2,)).dtype is dtype
    with pytest.raises(ValueError, match=r"no compiled loop takes torch\.float32 on meta"):
        kernels.linear(x.to("meta"), x.to("meta"))
    with pytest.raises(ValueError, match=r"input has 2 features .* weight \(3, 3\) takes 3"):
        kernels.linear(x, torch.ones(3, 3))
    y = kernels.layer_norm(x, (2,))  # no loop: the reference
    with kernels.use("torch"):
        assert kernels.backend(x) == "torch"
        assert_equal(y, kernels.layer_norm(x, (2,)))
    monkeypatch.setattr(launch, "has_numba", lambda: False)
    with pytest.raises(ValueError, match="needs numba: pip install"):
        kernels.use("numba")


def test_tensors_without_memory_are_torchs():
    x, w, b, _ = draw("tanh", 6, 10, 5)
    zeros = torch._efficientzerotensor((6, 10), dtype=x.dtype)
    y, _ = kernels.linear_fwd(zeros, w, b, "tanh")
    assert_equal(y, b.tanh().expand(6, 5))
    dz = torch._efficientzerotensor((6, 5), dtype=x.dtype)
    assert not kernels.linear_bwd_dx(dz, w).any() and not kernels.linear_bwd_dw(dz, x)[0].any()
    _, kept = kernels.cross_entropy_fwd(x, torch.arange(6))
    dlogits, _ = kernels.cross_entropy_bwd(torch._efficientzerotensor((), dtype=x.dtype), *kept)
    assert not dlogits.any()
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="not allocated"):
        kernels.linear(x, w, b)


def test_a_changed_row_of_the_table_is_compiled_again(monkeypatch):
    x, w, b, _ = draw("tanh", 6, 10, 5)
    kernels.linear(x, w, b, "tanh")
    monkeypatch.setitem(ACTIVATIONS, "tanh", ACTIVATIONS["sigmoid"])
    torch.testing.assert_close(kernels.linear(x, w, b, "tanh"), torch.sigmoid(F.linear(x, w, b)))


@EACH_DTYPE
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(reduction, dtype):
    """Loss and gradient of labels, some of them ignored, are as accurate as torch's."""
    for rows, classes in ((1, 1), (32, 10), (7, 33)):
        z, labels = 3 * torch.randn(rows, classes, dtype=dtype), torch.randint(classes, (rows,))
        labels[3::5] = -100
        loss, saved = kernels.cross_entropy_fwd(z, labels, reduction=reduction)
        ours = loss, kernels.cross_entropy_bwd(torch.full_like(loss, 1.7), *saved)[0]

        def exact(z, labels=labels):
            z = z.detach().requires_grad_()
            loss = F.cross_entropy(z, labels, reduction=reduction)
            return loss, *torch.autograd.grad(loss, z, torch.full_like(loss, 1.7))

        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact(z), rtol=1e-13, atol=1e-13)
        else:
            assert_as_accurate(ours, exact(z), lambda z=z: exact(double(z)))


def test_cross_entropy_of_odd_logits_and_labels():
    """Infinities, NaN, labels that are all ignored, and one that is no class: as in torch."""
    z, labels = torch.randn(5, 4), torch.tensor([0, 3, -100, 1, 2])
    for row, value in ((0, torch.inf), (1, -torch.inf), (2, torch.nan), (4, 1e30)):
        odd, nothing = z.clone(), torch.full((5,), -100)
        odd[row, 2] = value
        for target in (labels, nothing):
            found, saved = kernels.cross_entropy_fwd(odd, target)
            leaf = odd.clone().requires_grad_()
            loss = F.cross_entropy(leaf, target)
            dz = torch.autograd.grad(loss, leaf)[0]
            ours = found, kernels.cross_entropy_bwd(torch.ones(()), *saved)[0]
            torch.testing.assert_close(ours, (loss.detach(), dz), equal_nan=True)
    with pytest.raises(IndexError, match=r"target\[1\] is 4, but there are 4 classes"):
        kernels.cross_entropy_fwd(z, torch.tensor([0, 4, 0, 0, 0]))


def test_the_loop_by_hand(monkeypatch):
    """README's loop calls compiled code for its products and its loss, and learns as in torch."""
    from kernels.cpu import blocks

    calls, run = [], blocks.run
    monkeypatch.setattr(blocks, "run", lambda *args: calls.append(args) or run(*args))
    x, labels, results = torch.rand(8, 20), torch.randint(4, (8,)), []
    for backend in ("numba", "torch"):
        net = mlp.Net([20, 15, 9, 4], activation="sigmoid", seed=0)
        loss, optimizer = mlp.SoftmaxCrossEntropy(), mlp.SGD(net.parameters.values(), lr=0.5)
        with kernels.use(backend):
            for _ in range(3):
                value = loss.forward(net.forward(x), labels)
                net.backward(loss.backward())
                optimizer.step(grads=net.grads)
        results.append([value, *net.parameters.values()])
    assert len(calls) == 3 * (3 + 1 + 1 + 2 + 3)
    torch.testing.assert_close(*results)


def with_zeros(m, k, n, dtype):
    """x, w, b and dz. In most rows of x most numbers are 0, in neighbouring columns."""
    x = torch.rand(m, k, dtype=dtype) + 1
    x[:, k // 5 :] = 0
    x[1::4, k // 2 :] = -1
    return x, *(torch.randn(shape, dtype=dtype) for shape in ((n, k), (n,), (m, n)))


@EACH_DTYPE
@pytest.mark.parametrize("shape", [(4, 70, 1), (33, 157, 101), (300, 41, 13), (5, 64, 24)], ids=str)
def test_zeros_are_left_out_with_the_same_bits(monkeypatch, shape, dtype):
    """So a weight or gradient that is not finite still meets the zeros, as 0 · inf is NaN."""
    calls, loops = called(monkeypatch), linear_ops.loops()
    x, w, b, dz = with_zeros(*shape, dtype)
    infinite, nan = w.clone(), dz.clone()
    infinite[-1, -1], nan[-1, -1] = torch.inf, torch.nan
    for w_, dz_ in ((w, dz), (infinite, nan)):
        found = []
        for least in (0, 1 << 40):  # multiply-adds from which it is looked for zeros
            monkeypatch.setattr(loops, "_SHARED", least)
            y, _ = kernels.linear_fwd(x, w_, b, "tanh")
            dw, db = kernels.linear_bwd_dw(dz_, x)
            found.append([t.nan_to_num(7.0, 8.0, 9.0) for t in (y, dw, db)])
        assert_equal(*found)
        torch.testing.assert_close(dw, dz_.t() @ x, equal_nan=True)
    assert [call.zeros is not None for call, *_ in calls] == [True, True, False, False] * 2


def trained(backend, change=lambda step, net: None):
    """Outputs and gradients of steps by hand. change: is called before each step."""
    torch.manual_seed(0)
    net = mlp.Net([20, 15, 9, 4], activation="gelu", output_activation="tanh", seed=0)
    results = []
    with kernels.use(backend):
        for step in range(5):
            change(step, net)
            x, dy = torch.randn(8, 20), torch.randn(8, 4)
            x = x.t().contiguous().t() if step == 2 else x
            results += [net.forward(x).clone()]
            net.backward(dy[:1].expand(8, 4) if step == 3 else dy)
            results += [g.clone() for g in net.grads.values()]
            for p, g in zip(net.parameters.values(), net.grads.values()):
                p.sub_(g, alpha=0.1)
    return results


def test_a_stack_repeats_its_calls(monkeypatch):
    """The calls of the first step serve the next ones, unless something has moved."""
    from kernels.cpu import stack

    calls, repeat = [], stack._Noted.repeat
    counted = lambda *args: calls.append(args) or repeat(*args)  # noqa: E731
    monkeypatch.setattr(stack._Noted, "repeat", counted)
    torch.testing.assert_close(trained("numba"), trained("torch"))
    assert len(calls) == 2 * 5 - 2 - 2 - 1, "x and dy of two steps had to be copied"

    def change(step, net):
        if step == 1:
            net.parameters["1.weight"].data = net.parameters["1.weight"].clone()
        elif step == 3:
            net.parameters["0.bias"].data = net.parameters["0.bias"].double().float()
        elif step == 4:
            net.grads["2.weight"].data = torch.zeros(4, 9)

    torch.testing.assert_close(trained("numba", change), trained("torch", change))


def test_a_stack_notices_another_activation(monkeypatch):
    net, x, dy = mlp.Net([5, 4, 3], "tanh"), torch.randn(6, 5), torch.randn(6, 3)
    net.forward(x)
    net.backward(dy)
    monkeypatch.setitem(ACTIVATIONS, "tanh", ACTIVATIONS["sigmoid"])
    y = net.forward(x)
    net.backward(dy)
    again = mlp.Net([5, 4, 3], "sigmoid")
    assert_equal(y, again.forward(x))
    again.backward(dy)
    assert_equal([*net.grads.values()], [*again.grads.values()])


def test_outputs_that_become_the_input_are_noticed():
    """The second forward overwrites its own input, which the backward needs."""
    net = mlp.Net([4, 6, 4], "tanh")
    for _ in range(3):
        y = net.forward(torch.randn(2, 4))
        net.forward(y)
        with pytest.raises(RuntimeError, match="input was changed in place"):
            net.backward(torch.ones(2, 4))


def test_autograd_notices_buffers_that_were_filled():
    x, w, b, dz = draw("sigmoid", 6, 10, 5)
    for fill, buffer in (
        (lambda y: kernels.linear_fwd(x, w, b, "sigmoid", out=(y, None)), torch.ones(6, 5)),
        (lambda dx: kernels.linear_bwd_dx(dz, w, out=dx), torch.ones(6, 10)),
        (lambda dw: kernels.linear_bwd_dw(dz, x, out=(dw, torch.empty(5))), torch.ones(5, 10)),
    ):
        leaf = torch.ones(buffer.shape, requires_grad=True)
        product = (leaf * buffer).sum()
        fill(buffer)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_labels_that_changed_since_the_forward_are_refused():
    z, labels = torch.randn(5, 4), torch.tensor([0, 3, 2, 1, 2])
    _, saved = kernels.cross_entropy_fwd(z, labels)
    labels[1] = 7
    with pytest.raises(IndexError):
        kernels.cross_entropy_bwd(torch.ones(()), *saved)


def test_the_gradient_does_not_rest_on_the_backend_of_the_forward():
    z, labels = torch.randn(5, 4), torch.tensor([0, 3, -100, 1, 2])
    _, saved = kernels.cross_entropy_fwd(z, labels)
    found = [kernels.cross_entropy_bwd(torch.ones(()), *saved)[0]]
    with kernels.use("torch"):
        found.append(kernels.cross_entropy_bwd(torch.ones(()), *saved)[0])
    torch.testing.assert_close(*found)
