"""The rest of the interface of torch's optimizers: closures, schedulers, rates in tensors, hooks,
refusals.
"""

import inspect
import warnings

import pytest
import torch

import mlp
from kernels import launch
from mlp.engines.updates import whole
from mlp.optim import OPTIMIZERS, SGD, Adam
from tests.checks import assert_equal
from tests.lion import oracle

EACH = pytest.mark.parametrize("name", OPTIMIZERS)


def torchs(name):
    return oracle(OPTIMIZERS[name])


def parameter(device="cpu"):
    return torch.linspace(-1, 1, 5, device=device).requires_grad_()


@EACH
def test_closure(name, device):
    """The closure is called once, before the update, with gradients enabled. `step` returns its
    loss.
    """
    values = []
    for kind in (OPTIMIZERS[name], torchs(name)):
        p = parameter(device)
        optimizer = kind([p], lr=0.1)

        def closure(p=p, optimizer=optimizer):
            optimizer.zero_grad()
            loss = p.sin().sum()
            loss.backward()
            return loss

        with torch.no_grad():
            values.append([optimizer.step(closure).detach(), p.detach()])
    torch.testing.assert_close(*values)
    assert OPTIMIZERS[name]([parameter()]).step() is None


@EACH
def test_learning_rate_as_a_tensor(name, device):
    """A rate in a tensor that changes in place, as a captured graph needs it, gives the numbers'
    steps.
    """
    known = inspect.signature(torchs(name).__init__).parameters
    options = {"capturable": device != "cpu"} if "capturable" in known else {}
    results = []
    for lr in (torch.tensor(0.1, device=device), 0.1):
        p = parameter(device)
        optimizer = OPTIMIZERS[name]([p], lr=lr, **options)
        for _ in range(3):
            optimizer.step(grads=[torch.ones_like(p)])
            if isinstance(lr, torch.Tensor):
                lr.mul_(0.5)
            else:
                optimizer.param_groups[0]["lr"] *= 0.5
        results.append(p.detach())
    torch.testing.assert_close(*results)


@EACH
def test_scheduler(name, device):
    """StepLR changes the rate of our updates, also without `step`, and gives no warning."""
    results = []
    for kind in (OPTIMIZERS[name], torchs(name)):
        p = parameter(device)
        optimizer = kind([p], lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(5):
                p.grad = p.detach().cos()
                optimizer.step() if kind is torchs(name) else optimizer.update([p.grad])
                scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
        results.append(p.detach())
    torch.testing.assert_close(*results)


@EACH
def test_step_hooks(name):
    p, seen = parameter(), []
    optimizer = OPTIMIZERS[name]([p])
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(grads=[torch.ones_like(p)])
    assert seen == ["before", "after"]


@EACH
@pytest.mark.filterwarnings("ignore:.*Profiler clears events at the end of each cycle")
def test_hooks_and_profiler_see_a_step_once(name):
    """Hooks and the profiler do not make the update run twice."""
    results = []
    for followed in (False, True):
        p, seen = parameter(), []
        optimizer = OPTIMIZERS[name]([p], lr=0.1)
        if followed:
            optimizer.register_step_post_hook(lambda *_, seen=seen: seen.append("step"))
            with torch.profiler.profile(
                activities=[torch.profiler.ProfilerActivity.CPU]
            ) as profile:
                optimizer.step(grads=[torch.ones_like(p)])
            steps = [e for e in profile.events() if e.name.startswith("Optimizer.step")]
            assert (seen, len(steps)) == (["step"], 1)
        else:
            optimizer.step(grads=[torch.ones_like(p)])
        results.append(p.detach())
    assert torch.equal(*results)


@EACH
def test_a_group_that_is_edited_between_steps(name):
    """Every step reads the group's numbers again, as in torch: lr, weight_decay, and a momentum
    that changes the rule.
    """
    changes: list[dict] = [{"lr": 0.02}, {"weight_decay": 0.3}, {"lr": 0.5, "weight_decay": 0.0}]
    if name == "sgd":
        changes.insert(1, {"momentum": 0.5})
    results = []
    for kind in (OPTIMIZERS[name], torchs(name)):
        p = parameter()
        optimizer = kind([p], lr=0.1)
        for step, change in enumerate([{}, *changes, {}]):
            optimizer.param_groups[0].update(change)
            p.grad = torch.linspace(1, -1, 5) * (step + 1)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@EACH
@pytest.mark.parametrize("case", ["strided", "float64", "tensor lr", "gradient of other strides"])
def test_where_torchs_fused_update_does_not_serve(case, name, monkeypatch):
    """Where torch's fused update cannot be called on a CPU, ours gives torch's numbers."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    dtype = torch.float64 if case == "float64" else torch.float32
    results = []
    for kind in (OPTIMIZERS[name], torchs(name)):
        p = torch.linspace(-1, 1, 12, dtype=dtype).view(3, 4)
        p = (p.t() if case == "strided" else p).requires_grad_()
        optimizer = kind([p], lr=torch.tensor(0.1) if case == "tensor lr" else 0.1)
        for step in range(3):
            g = (torch.arange(12, dtype=dtype) - 3 * step).view(p.shape) / 5
            p.grad = g.t().contiguous().t() if case == "gradient of other strides" else g
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


def test_zero_grad():
    """Gradients become None, or zeros in the same memory, as in torch."""
    p, q = parameter(), parameter()
    optimizer = OPTIMIZERS["sgd"]([{"params": [p]}, {"params": [q]}], lr=0.1)
    for to_none in (True, False):
        p.grad = kept = torch.ones_like(p)
        optimizer.zero_grad(set_to_none=to_none)
        assert (p.grad is None, q.grad) == (to_none, None)
        assert torch.equal(kept, torch.full_like(p, float(to_none)))


@EACH
def test_gradients_are_only_read(name, device):
    for options in (
        {},
        {"weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9, "nesterov": True},
    ):
        if not options.keys() <= inspect.signature(OPTIMIZERS[name].__mro__[2]).parameters.keys():
            continue
        p, grad = parameter(device), torch.ones(5, device=device)
        optimizer = OPTIMIZERS[name]([p], lr=0.1, **options)
        for _ in range(2):
            optimizer.step(grads=[grad])
        assert_equal(grad, torch.ones(5, device=device))


@EACH
def test_refusals(name):
    kind = OPTIMIZERS[name]
    known = inspect.signature(torchs(name).__init__).parameters
    for option in known.keys() & {"differentiable", "amsgrad", "centered"}:
        with pytest.raises(
            ValueError,
            match=f"{kind.__name__}: {option}=True is not supported; use "
            f"torch.optim.{kind.__name__}",
        ):
            kind([parameter()], **{option: True})
    with pytest.raises(ValueError, match="learning rate"):
        kind([parameter()], lr=-1.0)
    with pytest.raises(
        ValueError, match=r"gradient 0 must be \(5,\) as its parameter is, got \(3,\)"
    ):
        kind([parameter()]).step(grads=[torch.ones(3)])


def test_loaded_amsgrad_is_refused():
    """A state saved with amsgrad needs its maxima, so loading it into plain Adam is refused."""
    p = parameter()
    theirs = torch.optim.Adam([p], amsgrad=True)
    p.grad = torch.ones_like(p)
    theirs.step()
    ours = Adam([p])
    with pytest.raises(ValueError, match="amsgrad"):
        ours.load_state_dict(theirs.state_dict())
        ours.step()


def test_momentum_switched_on_later(device):
    """Where a group gets momentum after plain steps, its buffers start then, as in torch."""
    results = []
    for kind in (SGD, torch.optim.SGD):
        p = parameter(device)
        optimizer = kind([p], lr=0.1)
        for momentum in (0.0, 0.9, 0.9):
            optimizer.param_groups[0]["momentum"] = momentum
            p.grad = p.detach().cos()
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results)


@EACH
def test_infinite_gradients_under_a_scaler_are_skipped(name):
    """With infinite gradients a step is skipped. Under fused=True torch's step itself skips; here
    GradScaler does.
    """
    known = inspect.signature(torchs(name).__init__).parameters
    for options in ({}, {"fused": True}) if "fused" in known else ({},):
        p, plain = parameter(), parameter()
        optimizer, other = (OPTIMIZERS[name]([q], lr=0.1, **options) for q in (p, plain))
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
        scaler.scale(p.sin().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        other.step(grads=[plain.detach().cos()])
        torch.testing.assert_close(p.detach(), plain.detach())
        before = p.detach().clone()
        p.grad = torch.full_like(p, float("inf"))
        scaler.scale(p.sum())
        scaler.step(optimizer)
        assert torch.equal(p, before)


@EACH
def test_numbers_as_tensors_on_the_cpu(name):
    """Numbers in groups may be tensors on the CPU, as in torch. The host reads them."""
    runs = []
    for wrap in (lambda value: value, torch.tensor):
        p = parameter()
        optimizer = OPTIMIZERS[name]([p], lr=wrap(0.1))
        group = optimizer.param_groups[0]
        for key, value in group.items():
            if isinstance(value, float) and key != "lr":
                group[key] = wrap(value)
            elif isinstance(value, tuple):
                group[key] = tuple(map(wrap, value))
        for _ in range(2):
            optimizer.step(grads=[p.detach().cos()])
        assert whole(optimizer, [p]) is not None
        runs.append(p.detach())
    torch.testing.assert_close(*runs)


def test_a_momentum_buffer_that_is_none_begins():
    """Older torch saved None as the momentum buffer of a parameter without one. It starts then."""
    runs = []
    for kind in (SGD, torch.optim.SGD):
        p = parameter()
        optimizer = kind([p], lr=0.1, momentum=0.9)
        optimizer.state[p]["momentum_buffer"] = None
        for _ in range(3):
            p.grad = p.detach().cos()
            optimizer.step()
        runs.append(p.detach())
    torch.testing.assert_close(*runs)


@pytest.mark.parametrize("name", [name for name, kind in OPTIMIZERS.items() if kind.counted])
def test_loaded_step_counts_are_on_the_cpu(name):
    """Step counts of a checkpoint from another device move to the CPU, because each reading would
    wait for that device.
    """
    p = parameter()
    optimizer = OPTIMIZERS[name]([p])
    optimizer.step(grads=[torch.ones_like(p)])
    state = optimizer.state_dict()
    for entry in state["state"].values():
        if "step" in entry:
            entry["step"] = entry["step"].to("meta")
    moved = []
    kept = torch.Tensor.cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", lambda t: moved.append(t) or kept(torch.zeros(())))
        OPTIMIZERS[name]([p]).load_state_dict(state)
    assert [t.device.type for t in moved] == ["meta"]


def test_what_was_refused_is_refused_again():
    """A parameter counts as checked only after its check has passed."""
    signed = torch.complex(torch.zeros(3), torch.ones(3)).conj().imag
    optimizer = SGD([signed], lr=0.1)
    for _ in range(2):
        with pytest.raises(ValueError, match="minus sign"):
            optimizer.step(grads=[torch.ones(3)])


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_gradient_of_a_net_may_be_none(name):
    net = mlp.Net([3, 4, 2])
    optimizer = OPTIMIZERS[name](net.parameters.values(), lr=0.1)
    net.forward(torch.rand(2, 3))
    net.backward(torch.ones(2, 2))
    before = {key: p.clone() for key, p in net.parameters.items()}
    net.grads["0.weight"] = None
    optimizer.step(grads=net.grads)
    same = [torch.equal(p, before[key]) for key, p in net.parameters.items()]
    assert same == [True, *(not bool(g.any()) for g in [*net.grads.values()][1:])]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_on_another_device_is_refused(name):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = OPTIMIZERS[name]([p], lr=0.1)
    for _ in range(2):
        before = p.detach().clone()
        with pytest.raises(ValueError, match="gradient 0 is on meta, but its parameter is on cpu"):
            optimizer.step(grads=[torch.ones(3, device="meta")])
        assert torch.equal(p, before)
        optimizer.step(grads=[torch.ones(3)])
