"""Short trainings, for the tests of step, epoch, exchange and replicas."""

import torch

import kernels
from kernels import Spec, hyperparameters
from kernels.operations import flatten
from tests.checks import assert_as_accurate, assert_equal, double

ADAM = {"lr": 0.01, "betas": (0.9, 0.999)}
# name -> (spec, keywords of hyperparameters()). The name says what the row adds.
CASES = {
    "three layers": (Spec((17, 9, 5, 3), "sigmoid"), {}),
    "wider than a tile, momentum": (
        Spec((20, 70, 4), "tanh", rule="momentum"),
        {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01},
    ),
    "single layer, no bias, Nesterov": (
        Spec((12, 3), bias=False, rule="nesterov"),
        {"momentum": 0.9},
    ),
    "five layers, summed half squares": (
        Spec(
            (12, 7, 6, 5, 8, 3),
            "relu",
            "sigmoid",
            loss="mse",
            loss_scale=0.5,
            loss_mean=False,
        ),
        {},
    ),
    "Adam": (Spec((12, 7, 3), "leaky_relu", rule="adam"), {**ADAM, "weight_decay": 0.1}),
    "AdamW, loss over classes too": (
        Spec((12, 7, 3), "sigmoid", bias=False, loss_scale=1 / 3, rule="adamw"),
        {**ADAM, "weight_decay": 0.1},
    ),
    "float targets": (Spec((12, 7, 3), "sigmoid", "tanh", loss="mse"), {}),
    "probabilities": (Spec((12, 7, 3), "relu"), {}),
    "several labels, weights": (
        Spec((12, 7, 3), "relu", loss="bce", loss_parameter=(0.5, 1.0, 3.0)),
        {},
    ),
    "Huber of labels": (
        Spec((12, 7, 3), "tanh", loss="huber", loss_parameter=0.3, loss_scale=0.5, loss_mean=False),
        {},
    ),
    "quantiles": (Spec((12, 7, 3), "tanh", loss="pinball", loss_parameter=(0.1, 0.5, 0.9)), {}),
}
# Derivatives that need z: kernels keep z of hidden layers, of outputs, or of both.
CASES |= {
    "z kept, wide": (Spec((20, 70, 5, 4), "gelu", "silu", rule="momentum"), {"momentum": 0.9}),
    "z of a single layer": (Spec((12, 20), output_activation="gelu_tanh", loss="mse"), {}),
    "z of squares": (Spec((12, 9, 8, 3), "relu_squared", rule="adam"), ADAM),
}
CASES |= {
    "Lion": (Spec((12, 7, 3), "tanh", rule="lion"), {"lr": 0.01, "weight_decay": 0.1}),
    "RMSprop": (Spec((12, 7, 3), "tanh", bias=False, rule="rmsprop"), {"lr": 0.01}),
    "RMSprop, momentum": (
        Spec((12, 7, 3), "tanh", rule="rmsprop_momentum"),
        {"lr": 0.01, "alpha": 0.9, "momentum": 0.5, "weight_decay": 0.1},
    ),
    "Adagrad": (Spec((12, 7, 3), "tanh", rule="adagrad"), {"lr_decay": 0.1, "weight_decay": 0.1}),
}
SOFT = ("float targets", "probabilities", "several labels, weights", "quantiles")


class Training:
    """All arguments of a training, seeded, on one device.

    By default there are 23 rows in batches of 5, so the last batch has 3.
    """

    def __init__(
        self, spec, device, *, uint8=False, soft=False, replicas=None, n=23, batch=5, **hyper
    ):
        g = torch.Generator().manual_seed(0)
        lead = () if replicas is None else (replicas,)
        self.spec, self.batch = spec, batch
        self.parameters = [
            (torch.randn(*lead, *s, generator=g) / s[-1] ** 0.5).to(device) for s in spec.shapes
        ]
        self.states = [[torch.zeros_like(p) for p in self.parameters] for _ in spec.rule.states]
        features, classes = spec.sizes[0], spec.sizes[-1]
        pixels = torch.randint(0, 256, (n, features), generator=g, dtype=torch.uint8)
        self.data = (pixels if uint8 else pixels / 100 - 1.3).to(device)
        labels = torch.randint(0, classes, (n,), generator=g)
        self.targets = (torch.rand(n, classes, generator=g).softmax(1) if soft else labels).to(
            device
        )
        order = torch.stack([torch.randperm(n, generator=g) for _ in range(replicas or 1)]).to(
            device
        )
        self.order = order if replicas else order[0]
        numbers = {"lr": 0.1, **hyper}
        self.hyper = hyperparameters(spec.rule, **numbers, replicas=replicas, device=device)
        self.count = torch.zeros(1, device=device)
        self.options = {"scale": 1 / 64, "shift": -2.0} if uint8 else {}

    def run(self, n=None) -> kernels.Run:
        """A kernels.Run with copies of all tensors that it changes. n: only the order's first n."""
        parameters, *states = ([t.clone() for t in ts] for ts in (self.parameters, *self.states))
        samples = self.data, self.targets, self.order[..., :n], self.batch
        numbers = self.hyper.clone(), self.count.clone()
        return kernels.Run(self.spec, parameters, states, *samples, *numbers, **self.options)

    def train(self, implementation, dtype=torch.float32, lrs=(None,)):
        """(parameters, losses), correct predictions, after one epoch for each learning rate.

        None keeps the rate. Every call starts from the same weights.
        """
        keep = double if dtype == torch.float64 else lambda x: x
        parameters, *states = (
            [t.clone() for t in keep(ts)] for ts in (self.parameters, *self.states)
        )
        hyper, count, outcomes = self.hyper.clone(), self.count.clone(), []
        for lr in lrs:
            if lr is not None:
                hyper[..., 0] = lr
            run = kernels.Run(
                self.spec,
                parameters,
                states,
                keep(self.data),
                keep(self.targets),
                self.order,
                self.batch,
                hyper,
                count,
                **self.options,
            )
            outcomes.append(implementation(run))
        assert count.item() == sum(losses.shape[-1] for losses, _ in outcomes)
        return (parameters, [losses for losses, _ in outcomes]), [
            correct for _, correct in outcomes
        ]


def assert_agrees(run, ours, reference, **options):
    """`assert_near` of a training by `ours`."""
    assert_near(run.train(ours, **options), run, reference, **options)


def assert_near(ours, run, reference, **options):
    """`ours`, results of `run.train`, equals the reference: predictions exactly, weights and losses
    to 1e-6 of their norm, or to 1e-5 where the project's tolerance allows it.
    """
    (results, correct), (exact, right) = ours, run.train(reference, torch.float64, **options)
    theirs, _ = run.train(reference, **options)
    assert_equal([c.long() for c in correct], [r.long() for r in right])
    for i, (a, b, c) in enumerate(zip(*map(flatten, (results, theirs, exact)))):
        if (a - c).norm() > 1e-6 * c.norm():

            def again(i=i):
                return flatten(run.train(reference, torch.float64, **options)[0])[i]

            assert_as_accurate(a, b, again)
        assert (a - c).norm() <= 1e-5 * c.norm()
