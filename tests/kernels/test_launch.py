"""How the backend is chosen, what a dry run lists, and which checks a launch plan saves."""

import contextlib
import math
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils._pytree import tree_leaves

import kernels
from kernels import configs, launch, tape
from kernels.launch import KERNEL_DTYPES
from kernels.operations import OPERATIONS, Make, flatten


def recorded(function):
    """Names of the kernels launched while the function ran."""
    names = []
    with launch.observe(lambda kernel, grid, args, options: names.append(kernel.fn.__name__)):
        function()
    return names


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_kernels_take_their_precisions(dtype, device):
    x = torch.ones(2, 2, dtype=dtype, device=device)
    assert kernels.backend(x) == "triton"
    assert kernels.backend(x, torch.zeros(2, dtype=torch.int64, device=device), None) == "triton"
    assert recorded(lambda: kernels.linear(x, x)) == ["linear_fwd_kernel"]


def test_float64_takes_the_reference(device):
    x = torch.ones(2, 2, dtype=torch.float64, device=device)
    assert kernels.backend(x) == kernels.backend(torch.ones(2, device=device), x) == "torch"
    assert recorded(lambda: kernels.linear(x, x)) == []


@pytest.mark.parametrize("interpreted", [True, False])
def test_cpu_needs_the_interpreter(interpreted, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", interpreted)
    x = torch.ones(2, 2)
    assert (
        kernels.backend(x)
        == kernels.backend(x, None, torch.ones(2))
        == ("triton" if interpreted else "torch")
    )
    kernels.sgd([], [], [], 0.1)  # without tensors there is nothing to choose by or to do


def test_use_forces_and_ends(device):
    x = torch.ones(2, 2, device=device)
    with kernels.use("torch"):
        assert kernels.backend(x) == "torch"
        with kernels.use("triton"):
            assert kernels.backend(x) == "triton"
        assert kernels.backend(x) == "torch"
        seen = []
        thread = threading.Thread(target=lambda: seen.append(kernels.backend(x)))
        thread.start()
        thread.join()
        assert seen == ["torch"], "autograd's threads must use the same backend"
    with pytest.raises(KeyError), kernels.use("torch"):
        raise KeyError
    assert kernels.backend(x) == "triton"


def test_threads_leave_use_in_any_order():
    x, opened, left = torch.ones(2, 2), threading.Event(), threading.Event()
    seen = []

    def first():
        with kernels.use("torch", products="library"):
            opened.set()
            left.wait(30)

    thread = threading.Thread(target=first)
    thread.start()
    opened.wait(30)
    with kernels.use("torch"):
        left.set()
        thread.join()  # the first block has ended, this one has not
        seen += [kernels.backend(x), launch.products()]
        with kernels.use(products="fused"):
            seen += [kernels.backend(x), launch.products()]
    assert seen == ["torch", None, "torch", "fused"]
    assert (launch.is_forced(), launch.products(), launch.tma()) == (False, None, None)


def test_use_within_a_compiled_function():
    def doubled(x):
        with kernels.use("torch"):
            return kernels.linear(x, x) * 2

    x = torch.rand(3, 3)
    compiled = torch.compile(doubled, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), 2 * x @ x.t())
    assert not launch.is_forced()


def test_use_triton_refuses_what_no_kernel_takes(device, monkeypatch):
    double = torch.ones(2, 2, dtype=torch.float64, device=device)
    with (
        kernels.use("triton"),
        pytest.raises(
            ValueError, match=rf"no kernel takes .*torch\.float64 on {device}.*kernels take float32"
        ),
    ):
        kernels.linear(double, double)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with (
        kernels.use("triton"),
        pytest.raises(ValueError, match=r"torch\.float32 on cpu; .*TRITON_INTERPRET=1"),
    ):
        kernels.backend(torch.ones(2))
    with pytest.raises(ValueError, match='must be "torch", "triton" or "numba", got \'cuda\''):
        kernels.use("cuda")


def test_backward_may_use_another_backend_than_forward(device):
    """Both backends save the same tensors, so a graph recorded on one can run on the other."""
    x = torch.ones(2, 3, device=device, requires_grad=True)
    for forward, backward in (("torch", "triton"), ("triton", "torch")):
        for function in (
            lambda: kernels.linear(x, x, None, "gelu").sum(),
            lambda: kernels.cross_entropy(x, torch.tensor([0, 2], device=device)),
            lambda: kernels.mse_loss(x, 2 * x),
        ):
            with kernels.use(forward):
                value = function()
            with kernels.use(backward):
                crossed = torch.autograd.grad(value, x)[0]
            torch.testing.assert_close(crossed, torch.autograd.grad(function(), x)[0])


class Elsewhere(torch.Tensor):
    """Poses as a tensor on the second device of its kind. Its memory is a CPU's."""

    kind, is_cpu = "cuda", False

    @property
    def device(self):
        return torch.device(self.kind, 1)

    def get_device(self):
        return 1


@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("kind", launch._ACCELERATORS)
def test_a_launch_is_made_on_the_tensors_device(kind, current, monkeypatch):
    """Triton launches on the current device. Afterwards the device before is current again."""
    devices, seen, given = [current], [], torch.ones(2).as_subclass(Elsewhere)
    monkeypatch.setattr(Elsewhere, "kind", kind)

    @contextlib.contextmanager
    def entered(device):
        devices.append(device.index)
        yield
        devices.pop()

    module = SimpleNamespace(current_device=lambda: devices[-1], device=entered)
    asked = {torch.device(kind, 1): module}
    monkeypatch.setattr(torch, "get_device_module", lambda device: asked[device])
    kernel = {(3,): lambda *args, **options: seen.append((devices[-1], args, options))}
    launch.run(kernel, (3,), 5, (given,), BLOCK=8)
    ((device, args, options),) = seen
    assert device == 1 and devices == [current]
    assert args == (5, (given,)) and options == {"BLOCK": 8, "enable_fp_fusion": True}


def update_inside_the_backward(parameters, states):
    y, saved = kernels.mlp_fwd(parameters[0].new_ones(6, 4), parameters[::2], parameters[1::2])
    row = kernels.hyperparameters("momentum")
    kernels.mlp_update(torch.ones_like(y), saved, parameters, states, row, 1, "momentum")


def trained_by(train, replicas=False):
    """A function that trains these parameters by `train`, a function of a Run."""

    def update(parameters, states):
        lists = [parameters, *states]
        if replicas:
            lists = [[t.unsqueeze(0) for t in ts] for ts in lists]
        like, lead = parameters[0], (1,) if replicas else ()
        spec = kernels.Spec((4, 20, 3), rule="momentum")
        order, labels = like.new_zeros((*lead, 6)).long(), like.new_zeros(6).long()
        row = kernels.hyperparameters("momentum", replicas=1 if replicas else None).to(like.device)
        samples = like.new_ones(6, 4), labels, order, 2, row, like.new_zeros(1)
        train(kernels.Run(spec, lists[0], lists[1:], *samples))

    return update


UPDATES = {
    "apply_rule": lambda ps, states: kernels.apply_rule("momentum", ps, ps, states, (0.1,) * 4),
    "sgd": lambda ps, states: kernels.sgd(ps, ps, states[0], 0.1, 0.9),
    "adam": lambda ps, states: kernels.adam(ps, ps, states[0], list(map(torch.clone, ps)), 1, 0.1),
    "mlp_update": update_inside_the_backward,
    "train_epoch": trained_by(lambda run: kernels.train_epoch(run, programs=1)),
    "train_epoch, shared": trained_by(kernels.train_epoch),
    "train_step": trained_by(lambda run: kernels.train_step(kernels.StepState(run))),
    "train_replicas": trained_by(kernels.train_replicas, replicas=True),
}


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("name", UPDATES)
def test_autograd_knows_what_updates_change(name, backend, device):
    """A parameter or state that changed has a new version. So a graph that was made before and
    needs the old one is refused.
    """
    lists = [[torch.ones(s, device=device) for s in ((20, 4), 20, (3, 20), 3)] for _ in range(2)]
    before, launched = [t._version for ts in lists for t in ts], []
    note = lambda kernel, *_: launched.append(kernel.fn.__name__)  # noqa: E731
    with launch.dry_run("sm_90", 132), launch.observe(note), kernels.use(backend):
        UPDATES[name](lists[0], lists[1:])
    assert bool(launched) == (backend == "triton")
    assert ("exchange_kernel" in launched) == ("shared" in name and backend == "triton")
    assert all(t._version > old for t, old in zip(flatten(lists), before, strict=True))


def sides_of_millions(make):
    """Forward and backward of each operation that tiles a side of its result, where it is long."""
    for features, outputs in ((2**23 + 1, 4), (4, 2**23 + 1)):
        x, w = make(4, features), make(outputs, features)
        y, saved = kernels.linear_fwd(x, w, None, "relu")
        kernels.linear_bwd(y, *saved)
        update = kernels.mlp_fwd(x, [w], [None])
        kernels.mlp_update(*update, [w], [], torch.ones(2), 1, "sgd")
    images, w = make(1, 1, 6000, 6000), make(2, 1, 3, 3)
    y, saved = kernels.conv2d_fwd(images, w, activation="relu")
    kernels.conv2d_bwd(y, *saved)
    x, w = make(4, 2**23 + 1), make(2**23 + 1)
    y, saved = kernels.layer_norm_fwd(x, w, w, w.shape)
    kernels.layer_norm_bwd(y, *saved)
    loss, saved = kernels.cross_entropy_fwd(x, make(4).long())
    kernels.cross_entropy_bwd(loss, *saved)


@pytest.mark.interpreter
@pytest.mark.parametrize("products", launch.PRODUCTS)
def test_only_the_first_axis_of_a_grid_is_long(products):
    """CUDA takes at most 65,535 programs along the other axes. It refuses a launch with more."""
    launched = []
    with (
        launch.dry_run("sm_90", 132),
        launch.use(products=products),
        launch.observe(lambda kernel, grid, *_: launched.append((kernel.fn.__name__, grid))),
    ):
        sides_of_millions(lambda *shape: torch.empty(shape, dtype=torch.bfloat16, device="meta"))
    assert max(math.prod(grid) for _, grid in launched) > 65_535
    assert [(name, grid) for name, grid in launched if max(grid[1:], default=0) > 65_535] == []


def test_empty_grid_launches_nothing():
    """An empty grid asks for no kernel and no device."""
    assert recorded(lambda: launch.run("no kernel", (3, 0))) == []


@pytest.mark.interpreter
def test_observers_end_with_their_context(device):
    x, seen = torch.ones(2, 2, device=device), []
    with pytest.raises(KeyError), launch.observe(lambda *launched: seen.append(launched)):
        kernels.linear(x, x)
        raise KeyError
    kernels.linear(x, x)
    ((_, grid, args, options),) = seen
    assert grid == (1,) and args[2].ptr.data_ptr() == x.data_ptr() and "num_warps" in options


@pytest.mark.parametrize("name", OPERATIONS)
def test_dry_run_writes_nothing(name, device):
    """A dry run on meta tensors lists an architecture's launches. None of them runs."""
    op, listed = OPERATIONS[name], []
    with launch.dry_run("sm_90", 132), launch.observe(lambda *launched: listed.append(launched)):
        for _, args in op.cases(Make("meta", torch.bfloat16), 33, 17, 16):
            assert all(t.device.type == "meta" for t in op.results(args))
        assert launch.arch("cuda") == "sm_90" and launch.sm_count("cuda") == 132
    assert listed
    assert launch.arch(torch.device("cpu")) == "cpu" and launch.sm_count(torch.device("cpu")) == 1


@pytest.mark.parametrize(
    ("setting", "precision"), [("highest", "ieee"), ("high", "tf32x3"), ("medium", "tf32")]
)
def test_precision_of_float32_products(setting, precision, monkeypatch):
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    for arch in ("sm_90", "gfx942"):
        with launch.dry_run(arch, 100):
            assert launch.dot_precision() == ("ieee" if arch == "gfx942" else precision)
            product = configs.product("linear_fwd", torch.empty(1, device="meta"), 64, 64)
            assert product.options["PRECISION"] == launch.dot_precision()


@pytest.mark.parametrize(("setting", "precision"), [("tf32", "tf32"), ("ieee", "ieee")])
def test_torchs_newer_precision_setting(setting, precision):
    """We read the newer setting first, because torch raises when the older one is read and the two
    disagree.
    """
    backends = torch.backends
    before = backends.fp32_precision, backends.cuda.matmul.fp32_precision
    # PyTorch's own test helpers, which other tests import, lock these settings.
    with getattr(backends, "__allow_nonbracketed_mutation")():
        try:
            backends.fp32_precision = "tf32" if setting == "ieee" else "ieee"
            backends.cuda.matmul.fp32_precision = setting
            with launch.dry_run("sm_90", 132):
                assert launch.dot_precision() == precision
        finally:
            backends.fp32_precision, backends.cuda.matmul.fp32_precision = before
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(
    ("m", "n", "sms", "size"),
    [
        (32, 4096, 132, "tiny"),
        (4096, 1, 132, "tiny"),
        (33, 4096, 132, "small"),
        (1024, 1024, 132, "small"),
        (1024, 1024, 108, "large"),
        (8192, 1024, 132, "large"),
        (64, 64, 1, "small"),
    ],
)
def test_buckets(m, n, sms, size):
    assert configs.bucket(m, n, sms) == size


def test_pinned_configurations_win(monkeypatch):
    pinned = configs.Config(16, 16, 16, 1, 1)
    monkeypatch.setitem(configs.PINNED, ("linear_fwd", "sm_90", "half", "tiny"), pinned)
    assert configs.lookup("linear_fwd", "sm_90", "half", "tiny") is pinned
    assert configs.lookup("linear_bwd_dx", "sm_90", "half", "tiny") != pinned
    # sm_75 has no asynchronous copies
    assert configs.lookup("linear_fwd", "sm_75", "half", "large").num_stages == 2


class Subclass(torch.Tensor):
    """A tensor with its own __torch_dispatch__, so its memory may not be read directly."""

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def kinds(device):
    """(what differs, a pair of tensors), each pair of a kind that needs a plan of its own."""
    x, w = torch.ones(4, 6, device=device), torch.ones(6, 6, device=device)
    yield "first", (x, w)
    yield "shape", (x[:3], w)
    yield "strides", (x, w.t())
    yield "expanded", (x[:1].expand(4, 6), w)
    yield "dtype", (x.half(), w.half())
    yield "one dtype", (x, w.half())
    yield "none", (x, None)
    yield "meta", (x.to("meta"), w.to("meta"))


@pytest.mark.interpreter
def test_a_plan_is_made_once_for_each_kind(device):
    asked = []

    def make(x, w, option):
        asked.append(None)
        return len(asked)

    plan = lambda tensors, option="a": launch.planned(make, tensors, option)  # noqa: E731
    made = {name: plan(tensors) for name, tensors in kinds(device)}
    assert sorted(made.values()) == list(range(1, 1 + len(made)))
    # Other tensors of the same kinds use the same plans, also parameters.
    for name, tensors in kinds(device):
        assert plan(tensors) == made[name], name
    x, w = next(kinds(device))[1]
    assert plan((torch.nn.Parameter(x), w.clone().requires_grad_())) == made["first"]
    # Each setting in force has a plan of its own. Afterwards the first plan serves again.
    others = [plan((x, w), "b")]
    for context in (
        kernels.use("triton"),
        kernels.use(products="library"),
        launch.dry_run("sm_90", 8),
    ):
        with context:
            others.append(plan((x, w)))
    torch.set_float32_matmul_precision("high")
    others.append(plan((x, w)))
    torch.set_float32_matmul_precision("highest")
    assert len({*others, *made.values()}) == len(others) + len(made)
    assert plan((x, w)) == made["first"]


def test_tensors_without_plain_memory_are_planned_each_time(device):
    asked, x = [], torch.ones(4, 6, device=device)
    make = lambda *tensors: asked.append(None)  # noqa: E731
    for tensors in (
        (x, x.as_subclass(Subclass)),
        (x, x.to_sparse()),
    ):
        before = len(asked)
        launch.planned(make, tensors)
        launch.planned(make, tensors)
        assert len(asked) == before + 2
    before = len(asked)
    torch.func.vmap(lambda row: launch.planned(make, (row, x)) or row)(x)
    torch.func.vmap(lambda row: launch.planned(make, (row, x)) or row)(x)
    assert len(asked) == before + 2


def test_errors_are_raised_each_time(device):
    """Errors are raised again, also between calls with correct arguments."""
    x, w = torch.ones(4, 6, device=device), torch.ones(3, 6, device=device)
    for _ in range(2):
        assert kernels.linear(x, w, None, "relu").shape == (4, 3)
        with pytest.raises(ValueError, match=r"input has 6 features .* weight \(6, 3\) takes 3"):
            kernels.linear(x, w.t())
        with pytest.raises(ValueError, match=r"weight must be torch\.float32 as input is"):
            kernels.linear(x, w.half())
        with pytest.raises(ValueError, match=r"linear: bias must be \(3,\)"):
            kernels.linear(x, w, torch.ones(4, device=device))
        with pytest.raises(ValueError, match="unknown activation 'swoosh'"):
            kernels.linear(x, w, None, "swoosh")


@pytest.mark.interpreter
def test_plans_are_forgotten_when_there_are_many(monkeypatch, device):
    monkeypatch.setattr(launch, "_MOST_PLANS", 3)
    asked = []
    make = lambda x: asked.append(len(x))  # noqa: E731
    for size in (1, 2, 3, 1, 4, 1, 4):
        launch.planned(make, (torch.ones(size, device=device),))
    assert asked == [1, 2, 3, 4, 1]


@pytest.mark.parametrize("count", [2, 3])
def test_the_tape_gives_back_all_that_a_forward_saved(count):
    """In any mixture of tensors, tuples of them, None and numbers. The last argument, a default,
    may not have been given.
    """
    x, w, a, b, c, d, option = (torch.full((2,), float(i)) for i in range(7))
    args = (x, (w, None), (option, 5), 7)[: 1 + count]
    saved = a, (w, None), (b, None), 3, (c, (7, d)), (x, b), (option, 5), 7
    got = []
    operation = Saving(got, saved)
    ctx = SimpleNamespace()
    ctx.save_for_backward = lambda *tensors: setattr(ctx, "saved_tensors", tensors)
    tape.remember(ctx, operation, args, (None, 2), (x, w, None), saved)
    kinds = {torch.Tensor, type(None)}
    assert kinds.issuperset(map(type, ctx.saved_tensors))
    with torch.no_grad():
        tape.differentiate(ctx, a, (True,) * 3)
    with torch.enable_grad():
        tape.differentiate(ctx, a, (True,) * 3)
    expected = [saved, args, saved]
    assert str(got) == str(expected)  # the same nesting
    for one, other in zip(tree_leaves(got), tree_leaves(expected), strict=True):
        assert one is other


class Saving:
    """An operation that notes what it is given."""

    inputs = 2
    sources = None, 1, None, None, None, None, 2, 3

    def __init__(self, got, saved):
        self.got, self.saved = got, saved

    def fwd_ref(self, *args):
        self.got.append(args)
        return None, self.saved

    def bwd(self, dy, *saved, needs):
        self.got.append(saved)
        return dy, [dy, None]

    bwd_ref = bwd
