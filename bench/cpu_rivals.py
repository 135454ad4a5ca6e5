"""One way to train the reference network on a CPU. `python -m bench.cpu_rivals NAME` trains an
epoch for each line that it reads, and prints the epoch's seconds.

It is a process of its own, because threads of one library that still spin slow the next one down.
Also, the number of threads is best set before a library is imported. The first line that it prints
says that it is ready, with the mean loss of its first epoch, or why it cannot run.
"""

import contextlib
import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch

import kernels
import mlp
from kernels import launch
from mlp import data as datasets

from . import rivals
from .rivals import BATCH, SIZES, NotHereError, weights
from .samples import mnist
from .table import one_line

# An epoch of MNIST has 1,875. In a short one, the work around the steps would count too much.
STEPS = 600
NETWORKS = 16
_LR, _ADAM_LR = 0.1, 1e-3


class Job:
    """The data and the order of an epoch, the same for all rivals."""

    def __init__(self):
        self.data = mnist(torch.device("cpu"))
        self.order = datasets.permutation(len(self.data), 0, 0, "cpu")[: STEPS * BATCH]

    def arrays(self):
        """(pixels, labels, order, weights and biases) as numpy arrays."""
        tensors = (self.data.inputs, self.data.targets, self.order, *weights("cpu"))
        pixels, labels, order, *start = (tensor.numpy() for tensor in tensors)
        return pixels, labels, order, [array.copy() for array in start]


def _provider(make, job: Job, **options) -> Callable:
    """An epoch by a provider of `rivals` or `training`. It reads the loss only if asked to."""
    provider = make(start=weights("cpu"), data=job.data, **options)

    def epoch(wants_loss=False):
        if wants_loss:
            losses = provider.losses(job.data, job.order)
            return sum(losses) / len(losses)
        return provider.epoch(job.data, job.order)

    return epoch


def _engine(name: str, optimizer, job: Job, threads: int | None = None) -> Callable:
    torch.set_num_threads(threads or torch.get_num_threads())
    model = mlp.MLP(SIZES, activation="sigmoid")
    with torch.no_grad():
        for p, value in zip(model.parameters(), weights("cpu")):
            p.copy_(value)
    made = optimizer(model.parameters())
    engine, _ = mlp.engines.choose(name, model, mlp.SoftmaxCrossEntropy(), made, BATCH)
    return lambda wants_loss=False: engine.epoch(job.data, job.order, BATCH).loss


def _manual_loop(job: Job, backend: str | None = None) -> Callable:
    """README's loop for the manual API. backend: a name that `kernels.use` takes, or None."""
    if backend == "numba" and not launch.has_numba():
        raise NotHereError("needs the package numba")
    net = mlp.Net(SIZES, activation="sigmoid", seed=0)
    for p, value in zip(net.parameters.values(), weights("cpu")):
        p.copy_(value)
    loss, optimizer = mlp.SoftmaxCrossEntropy(), mlp.SGD(net.parameters.values(), lr=_LR)

    def epoch(wants_loss=False):
        total = 0.0
        with kernels.use(backend) if backend else contextlib.nullcontext():
            for rows in job.order.split(BATCH):
                x, y = job.data.batch(rows)
                value = loss.forward(net.forward(x), y)
                net.backward(loss.backward())
                optimizer.step(grads=net.grads)
                total += float(value) if wants_loss else 0.0
        return total / STEPS

    return epoch


def _networks(job: Job) -> Callable:
    _engine("epoch", _SGD, job)()  # loads the compiled epoch, which few steps alone would not
    sweep = mlp.Sweep(SIZES, NETWORKS, _LR, activation="sigmoid")
    data = job.data.take(STEPS * BATCH)
    return lambda wants_loss=False: sweep.fit(data, 1, BATCH) and None


def _jax(job: Job) -> Callable:
    try:
        import jax
    except ModuleNotFoundError as missing:
        raise NotHereError(f"needs the package {missing.name}") from None
    pixels, labels, order, start = map(jax.tree.map, [jax.numpy.asarray] * 4, job.arrays())

    def loss_of(parameters, x, y):
        *hidden, last = zip(parameters[::2], parameters[1::2])
        for w, b in hidden:
            x = jax.nn.sigmoid(x @ w.T + b)
        logits = jax.nn.log_softmax(x @ last[0].T + last[1])
        return -jax.numpy.take_along_axis(logits, y[:, None], 1).mean()

    def step(parameters, rows):
        x = pixels[rows].astype(jax.numpy.float32) * job.data.scale
        loss, gradients = jax.value_and_grad(loss_of)(parameters, x, labels[rows])
        return [p - _LR * g for p, g in zip(parameters, gradients)], loss

    scan = jax.jit(lambda parameters, order: jax.lax.scan(step, parameters, order))
    state = [start]

    def epoch(wants_loss=False):
        state[0], losses = scan(state[0], order.reshape(STEPS, BATCH))
        return float(losses.mean())

    return epoch


def _numpy(job: Job) -> Callable:
    import numpy as np

    pixels, labels, order, parameters = job.arrays()

    def epoch(wants_loss=False):
        total = 0.0
        for rows in order.reshape(STEPS, BATCH):
            x, y = pixels[rows].astype(np.float32) * np.float32(job.data.scale), labels[rows]
            outputs = [x]
            for w, b in zip(parameters[:-2:2], parameters[1:-2:2]):
                outputs.append(1 / (1 + np.exp(-(outputs[-1] @ w.T + b))))
            z = outputs[-1] @ parameters[-2].T + parameters[-1]
            z -= z.max(1, keepdims=True)
            p = np.exp(z)
            p /= p.sum(1, keepdims=True)
            total -= float(np.log(p[np.arange(BATCH), y]).mean())
            p[np.arange(BATCH), y] -= 1
            d = p / BATCH
            for i in range(len(outputs) - 1, -1, -1):
                below = d @ parameters[2 * i] * outputs[i] * (1 - outputs[i]) if i else None
                parameters[2 * i] -= _LR * (d.T @ outputs[i])
                parameters[2 * i + 1] -= _LR * d.sum(0)
                d = below
        return total / STEPS

    return epoch


def _sklearn(job: Job) -> Callable:
    """scikit-learn's MLPClassifier. It draws its own weights, so its loss is not compared."""
    try:
        from sklearn.neural_network import MLPClassifier
    except ModuleNotFoundError as missing:
        raise NotHereError(f"needs the package {missing.name}") from None
    pixels, labels, order, _ = job.arrays()
    x, y = (pixels[order] * job.data.scale).astype("float32"), labels[order]
    options = {"activation": "logistic", "solver": "sgd", "alpha": 0.0, "momentum": 0.0}
    model = MLPClassifier(SIZES[1:-1], batch_size=BATCH, learning_rate_init=_LR, **options)
    model.set_params(max_iter=1, warm_start=True)

    def epoch(wants_loss=False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that one epoch does not converge
            model.fit(x, y)

    return epoch


_TORCH_SGD = partial(torch.optim.SGD, lr=_LR)
_TORCH_ADAM = partial(torch.optim.Adam, lr=_ADAM_LR, fused=True)
_SGD, _ADAM = partial(mlp.SGD, lr=_LR), partial(mlp.Adam, lr=_ADAM_LR)
# All rivals of a group do the same training. Their losses are compared with the first one's.
GROUPS: dict[str, dict[str, Callable[[Job], Callable]]] = {
    "SGD": {
        "eager": partial(_provider, rivals.Eager, optimizer=_TORCH_SGD),
        "torch.compile": partial(_provider, rivals.Compiled, optimizer=_TORCH_SGD, mode="default"),
        "JAX scan": _jax,
        "numpy": _numpy,
        "epoch": partial(_engine, "epoch", _SGD),
        "epoch, one thread": partial(_engine, "epoch", _SGD, threads=1),
        "manual": partial(_engine, "manual", _SGD),
        "autograd": partial(_engine, "autograd", _SGD),
        "manual loop": _manual_loop,
        "manual loop, numba": partial(_manual_loop, backend="numba"),
        "scikit-learn": _sklearn,
        f"{NETWORKS} networks": _networks,
    },
    "Adam": {
        "eager, fused Adam": partial(_provider, rivals.Eager, optimizer=_TORCH_ADAM),
        "epoch, Adam": partial(_engine, "epoch", _ADAM),
        "manual, Adam": partial(_engine, "manual", _ADAM),
    },
}


def main(name: str) -> None:
    """Serves one rival until the input ends."""
    made = next(group[name] for group in GROUPS.values() if name in group)
    answers, sys.stdout = sys.stdout, sys.stderr  # other prints must not look like answers
    try:
        # partial has set all other arguments by keyword.
        epoch = made(job=Job())
        first = epoch(wants_loss=True)
        epoch()
    except NotHereError as reason:
        print(json.dumps({"missing": str(reason)}), file=answers, flush=True)
        return
    except Exception as error:
        print(json.dumps({"wrong": one_line(error)}), file=answers, flush=True)
        return
    print(json.dumps({"loss": first}), file=answers, flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        for _ in sys.stdin:
            started = time.perf_counter()
            epoch()
            print(time.perf_counter() - started, file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
