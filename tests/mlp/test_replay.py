"""Replaying recorded calls gives the same bits as running the Python again."""

import pytest
import torch

from mlp import SGD, Net
from mlp.engines.replay import NotReplayable, Replay
from mlp.loss import LOSSES
from mlp.optim import OPTIMIZERS
from tests.checks import assert_equal, snapshot

OPTIONS = {
    "plain": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "dampening": 0.2},
    "nesterov": {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
}


class Step:
    """Forward, loss, backward and update of a small net on buffers x and y."""

    def __init__(self, loss, activation, rows=6, optimizer=SGD, **options):
        self.net, self.loss = Net((5, 7, 4), activation, "sigmoid", seed=1), LOSSES[loss]()
        self.optimizer = optimizer(self.net.parameters.values(), **options)
        self.x, self.y = torch.empty(rows, 5), torch.empty(rows, dtype=torch.int64)

    def load(self, i):
        generator = torch.Generator().manual_seed(i)
        self.x.copy_(torch.randn(self.x.shape, generator=generator))
        self.y.copy_(torch.randint(4, self.y.shape, generator=generator))

    def gradients(self):
        output = self.net.forward(self.x)
        value = self.loss.forward(output, self.y, labels_valid=True)
        self.net.backward(self.loss.backward())
        return output, value

    def __call__(self):
        result = self.gradients()
        self.optimizer.update(self.net.grads)
        return result


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ["relu", "gelu"])  # relu keeps y, gelu keeps z
def test_a_training_step(activation, loss, options):
    """Replays on changing buffers give the outputs, losses, gradients and weights of live steps."""
    live, recorded = (Step(loss, activation, **options) for _ in range(2))
    for step in (live, recorded):  # the first step is not recorded, because it makes the momentum
        step.load(0)
        step()
    recorded.load(1)
    with Replay() as replay:
        result = recorded()
    for i in range(1, 6):
        live.load(i)
        recorded.load(i)
        if i > 1:
            replay()
        assert_equal(result, snapshot(live()), f"step {i}")
        assert torch.equal(recorded.net.flat_grad, live.net.flat_grad), i
        assert torch.equal(recorded.net.flat, live.net.flat), i


def test_only_the_gradients():
    """An update outside the replay may use any optimizer and a changing rate."""
    live, recorded = (
        Step("cross_entropy", "tanh", optimizer=OPTIMIZERS["adam"], lr=0.1) for _ in range(2)
    )
    recorded.load(0)
    with Replay() as replay:
        result = recorded.gradients()
    for i in range(5):
        live.load(i)
        recorded.load(i)
        replay()
        expected = snapshot(live.gradients())
        assert_equal(result, expected, f"step {i}")
        for step in (live, recorded):
            step.optimizer.param_groups[0]["lr"] = 0.1 / (i + 1)
            step.optimizer.update(step.net.grads)
        assert torch.equal(recorded.net.flat, live.net.flat), i


def augmented(x, y):
    z = x * 1
    z += y
    z -= 2
    z *= y
    z /= 3
    z[0] = x[1]
    z[:, 1] += 1
    return z


CALLS = {
    "functions": lambda x, y: torch.relu(x @ y.T).sum(1),
    "methods": lambda x, y: x.mul(2).add(y, alpha=3).pow(2).mean(),
    "operators": lambda x, y: 1 - (2 - x) * 3 / (y.abs() + 1) ** 2 - (-x) + 5,
    "reversed operators": lambda x, y: 2 / (x.abs() + 1) + (3 + y) * 2 + 2**y,
    "views": lambda x, y: x[1:, ::2].T.reshape(-1) + y.flatten()[:4] * x.view(-1)[2],
    "out": lambda x, y: torch.add(x, y, out=torch.empty(3, 4)),
    "in place": lambda x, y: (x * 1).add_(y).clamp_(min=0).mul_(2),
    "augmented": augmented,
    "indices": lambda x, y: (
        x.gather(1, y.argmax(1, keepdim=True)) + x.index_select(1, y.argmin(1)[:1])
    ),
    "several results": lambda x, y: (
        torch.max(x, 1).values + x.sort(1).values[:, 0] + torch.aminmax(y).max
    ),
    "split": lambda x, y: x.chunk(2, 1)[1] * torch.stack(y.unbind(1)[:2], 1),
    "foreach": lambda x, y: torch._foreach_add(torch._foreach_mul([x, y], 2.0), [y, x], alpha=3)[1],
    "comparisons": lambda x, y: torch.where(x > y, x, y) * (x >= 0) + (x == y).float(),
    "types": lambda x, y: (x.double() * 2).to(torch.float32).long() + (y > 0).int(),
    "constants": lambda x, y: (
        torch.zeros_like(x).scatter(1, y.argmax(1, keepdim=True), 1.0) * torch.full((), 3.0)
    ),
    "softmax": lambda x, y: torch.log_softmax(x, 1).exp() - torch.nn.functional.gelu(y),
}


@pytest.mark.parametrize("name", CALLS)
def test_every_kind_of_call(name):
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with Replay() as replay:
        result = CALLS[name](x, y)
    assert_equal(result, CALLS[name](x, y))
    for _ in range(3):
        x.normal_()
        y.normal_()
        replay()
        assert_equal(result, CALLS[name](x, y), name)


def test_refuses_host_reads():
    for read in (
        torch.Tensor.tolist,
        torch.Tensor.numpy,
        torch.nonzero,
        torch.unique,
        lambda x: x[0].item(),
        lambda x: float(x[0]),
        lambda x: bool(x[0] > 0),
        lambda x: torch.equal(x, x + 1),
        lambda x: x[x > 0],
        lambda x: 1.0 in x,
    ):
        with pytest.raises(NotReplayable, match="on the host"), Replay():
            read(torch.randn(3))


@pytest.mark.parametrize(
    "change", [torch.Tensor.add_, torch.Tensor.__iadd__, lambda t, x: torch.add(t, x, out=t)]
)
def test_changed_constants_are_made_at_each_replay(change):
    """A constant that the calls change is made at each replay. Made once, it would keep the values
    that the last replay left.
    """
    x = torch.randn(3)
    for make in (lambda: torch.ones(3), lambda: torch.zeros_like(x), lambda: x.new_full((3,), 2.0)):
        with Replay() as replay:
            change(t := make(), x)
            result = t * 2
        for _ in range(3):
            x.normal_()
            replay()
            change(expected := make(), x)
            assert_equal(result, expected * 2)
