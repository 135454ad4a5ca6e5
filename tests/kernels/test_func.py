"""torch.func and forward-mode derivatives run through the reference, never through a kernel."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vjp, vmap

import kernels
import mlp
from kernels import launch
from tests.pairs import PAIRS, cases, leaves, of_tensors

# torch scripts the forward-mode rules of some operators and warns that scripting is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script.*")

EACH_OPERATION = pytest.mark.parametrize("name", PAIRS)
NETWORKS = {
    "mlp": lambda device: mlp.MLP((64, 9, 5), "gelu", device=device),
    "convnet": lambda device: mlp.ConvNet((1, 8, 8), (2, 3), 3, 1, (6,), 5, device=device),
}
TRANSFORMS = {
    "grad": lambda of, given: grad(of, argnums=tuple(range(len(given))))(*given),
    "vjp": lambda of, given: vjp(of, *given)[1](torch.ones_like(of(*given))),
    "jvp": lambda of, given: jvp(of, given, given),
    "jacrev": lambda of, given: jacrev(of)(*given),
    "hessian": lambda of, given: hessian(lambda last: of(*given[:-1], last))(given[-1]),
    "grad of grad": lambda of, given: grad(lambda x: grad(of)(x, *given[1:]).square().sum())(
        given[0]
    ),
}


@pytest.fixture(autouse=True)
def no_kernel_runs():
    """Fails the test if a kernel runs while a transform is active."""

    def refuse(kernel, grid, args, options):
        assert not launch.watched(), f"{kernel} ran within a transform"

    with launch.observe(refuse):
        yield


def pair(name, args):
    """(sum of our output, sum of torch's, tensors). Both sums are functions of the tensors, which
    are the arguments with gradients.
    """
    ours, torchs, _ = PAIRS[name]
    wanted = lambda t: t.requires_grad  # noqa: E731
    args = leaves(name, args)
    (f, tensors), (g, _) = of_tensors(ours, args, wanted), of_tensors(torchs, args, wanted)
    return lambda *a: f(*a).sum(), lambda *a: g(*a).sum(), tuple(t.detach() for t in tensors)


@EACH_OPERATION
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform, name, device):
    """Every case of the table equals torch's function under the same transform. It runs in float64,
    because a second derivative in float32 is mostly rounding.
    """
    for args in cases(name, device, torch.float64, (3, 4, 5)):
        ours, torchs, given = pair(name, args)
        torch.testing.assert_close(
            TRANSFORMS[transform](ours, given), TRANSFORMS[transform](torchs, given)
        )


@EACH_OPERATION
def test_vmap(name, device):
    """vmap over a new first or last dimension of every tensor, labels too, equals single calls."""
    for place in (0, -1):
        for args in cases(name, device):
            call, tensors = of_tensors(PAIRS[name][0], args)
            stacks = [torch.stack([t, t.flip(0)], place) for t in tensors]
            one_by_one = torch.stack([call(*tensors), call(*(t.flip(0) for t in tensors))])
            torch.testing.assert_close(vmap(call, in_dims=place)(*stacks), one_by_one)


@EACH_OPERATION
def test_dual_numbers(name, device):
    """Forward-mode derivatives without torch.func are torch's."""
    for args in cases(name, device):
        ours, torchs, given = pair(name, args)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t.cos()) for t in given]
            torch.testing.assert_close(
                *(tuple(forward_ad.unpack_dual(f(*duals))) for f in (ours, torchs))
            )


@pytest.mark.parametrize("network", NETWORKS)
def test_gradients_of_each_sample(network, device):
    """vmap of grad through functional_call gives the gradients of single backward passes. Their
    mean is the whole batch's gradient.
    """
    torch.manual_seed(0)
    net = NETWORKS[network](device)
    x, target = torch.randn(4, 64, device=device), torch.tensor([0, 4, 2, 2], device=device)
    parameters = {name: p.detach() for name, p in net.named_parameters()}

    def loss(parameters, x, target):
        return kernels.cross_entropy(functional_call(net, parameters, (x,)), target)

    def by_hand(x, target):
        return torch.autograd.grad(kernels.cross_entropy(net(x), target), list(net.parameters()))

    each = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x[:, None], target[:, None])
    one_by_one = [by_hand(x[i : i + 1], target[i : i + 1]) for i in range(4)]
    for samples, gradients, whole in zip(each.values(), zip(*one_by_one), by_hand(x, target)):
        torch.testing.assert_close(samples, torch.stack(gradients))
        torch.testing.assert_close(samples.mean(0), whole)


@pytest.mark.parametrize(
    "transform", [grad, lambda f: vmap(grad(f), in_dims=(None, 0))], ids=["grad", "vmap of grad"]
)
def test_compiled(transform, device):
    """torch.compile of a transformed function traces the reference and gives the same numbers."""
    torch._dynamo.reset()

    def loss(w, x):
        return kernels.mse_loss(kernels.linear(x, w, None, "tanh"), x[..., :3])

    run, (w, x) = (
        transform(loss),
        (torch.randn(3, 5, device=device), torch.randn(4, 5, device=device)),
    )
    torch.testing.assert_close(
        torch.compile(run, fullgraph=True, backend="aot_eager")(w, x), run(w, x)
    )


def test_errors_are_ours():
    with pytest.raises(ValueError, match=r"linear: input has 3 features .* \(4, 5\) takes 5"):
        vmap(kernels.linear, in_dims=(0, None))(torch.randn(2, 3), torch.randn(4, 5))


def test_a_tensor_that_outlived_its_transform(device):
    """It counts as the tensor that it held, as in torch's own functions."""
    kept = []
    x, w = torch.randn(2, 3, device=device), torch.randn(4, 3, device=device, requires_grad=True)
    grad(lambda inside: (kept.append(inside), inside.sum())[1])(x)
    gradients = []
    for given in (kept[0], x):
        with kernels.use("torch"):
            y = kernels.linear(given, w, None, "relu")
        gradients.append((y.detach(), *torch.autograd.grad(y, w, torch.ones_like(y))))
    torch.testing.assert_close(*gradients)
