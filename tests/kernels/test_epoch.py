"""One-program epochs and replicas: whole short trainings against the references in float64."""

import pytest
import torch

from kernels import hyperparameters, launch, refusal, train_epoch, train_epoch_ref, train_replicas, train_replicas_ref
from kernels.network import RULES, Spec
from tests.checks import assert_as_accurate, assert_equal, double, snapshot

ADAM = {"lr": 0.01, "betas": (0.9, 0.999)}
# Each row is there for what it adds: the settings of hyperparameters() last.
CASES = {
    "three layers": (Spec((17, 9, 5, 3), "sigmoid"), {}),
    "wider than a tile, momentum": (Spec((20, 70, 4), "tanh", rule="momentum"),
                                    {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}),
    "single layer, no bias, Nesterov": (Spec((12, 3), bias=False, rule="nesterov"), {"momentum": 0.9}),
    "five layers, summed half squares": (Spec((12, 7, 6, 5, 8, 3), "relu", "sigmoid", loss="squared_error", loss_scale=0.5,
                                              loss_mean=False), {}),
    "Adam": (Spec((12, 7, 3), "leaky_relu", rule="adam"), {**ADAM, "weight_decay": 0.1}),
    "AdamW, loss over classes too": (Spec((12, 7, 3), "sigmoid", bias=False, loss_scale=1 / 3, rule="adamw"),
                                     {**ADAM, "weight_decay": 0.1}),
    "float targets": (Spec((12, 7, 3), "sigmoid", "tanh", loss="squared_error"), {}),
    "probabilities": (Spec((12, 7, 3), "relu"), {}),
}  # fmt: skip
SOFT = ("float targets", "probabilities")


class Run:
    """Everything a training takes, seeded, on one device: n rows of data in batches of 5, the last of 3."""

    def __init__(self, spec, device, *, uint8=False, soft=False, replicas=None, n=23, batch=5, **hyper):
        g = torch.Generator().manual_seed(0)
        lead = () if replicas is None else (replicas,)
        self.spec, self.batch = spec, batch
        self.parameters = [(torch.randn(*lead, *s, generator=g) / s[-1] ** 0.5).to(device) for s in spec.shapes]
        self.states = [[torch.zeros_like(p) for p in self.parameters] for _ in range(RULES[spec.rule])]
        features, classes = spec.sizes[0], spec.sizes[-1]
        pixels = torch.randint(0, 256, (n, features), generator=g, dtype=torch.uint8)
        self.data = (pixels if uint8 else pixels / 100 - 1.3).to(device)
        labels = torch.randint(0, classes, (n,), generator=g)
        self.targets = (torch.rand(n, classes, generator=g).softmax(1) if soft else labels).to(device)
        order = torch.stack([torch.randperm(n, generator=g) for _ in range(replicas or 1)]).to(device)
        self.indices = order if replicas else order[0]
        self.hyper = hyperparameters(**{"lr": 0.1, **hyper}, replicas=replicas, device=device)
        self.count = torch.zeros(1, device=device)
        self.options = {"scale": 1 / 64, "shift": -2.0} if uint8 else {}

    def train(self, implementation, dtype=torch.float32, lrs=(None,)):
        """(parameters, losses) and correct predictions after an epoch at each learning rate, from the same start."""
        keep = double if dtype == torch.float64 else lambda x: x
        parameters, *states = ([t.clone() for t in keep(ts)] for ts in (self.parameters, *self.states))
        hyper, count, outcomes = self.hyper.clone(), self.count.clone(), []
        for lr in lrs:
            if lr is not None:
                hyper[..., 0] = lr
            outcomes.append(implementation(self.spec, parameters, states, keep(self.data), keep(self.targets), self.indices,
                                           self.batch, hyper, count, **self.options))  # fmt: skip
        assert count.item() == sum(losses.shape[-1] for losses, _ in outcomes)
        return (parameters, [losses for losses, _ in outcomes]), [correct for _, correct in outcomes]


def assert_agrees(run, ours, reference, **options):
    """Weights and losses by the project's tolerance or to 1e-6 of the tensor's norm, predictions exactly."""
    assert_near(run.train(ours, **options), run, reference, **options)


def assert_near(ours, run, reference, **options):
    (results, correct), (exact, right) = ours, run.train(reference, torch.float64, **options)
    theirs, _ = run.train(reference, **options)
    assert_equal([c.long() for c in correct], [r.long() for r in right])
    for a, b, c in zip(*([*parameters, *losses] for parameters, losses in (results, theirs, exact))):
        if (a - c).norm() > 1e-6 * c.norm():
            assert_as_accurate(a, b, c)
        assert (a - c).norm() <= 1e-5 * c.norm()


@pytest.mark.parametrize("name", CASES)
def test_epoch_agrees_with_reference(name, device):
    spec, hyper = CASES[name]
    assert_agrees(Run(spec, device, soft=name in SOFT, **hyper), train_epoch, train_epoch_ref, lrs=(None, 0.02))


def test_uint8_pixels_int32_indices_and_full_batches(device):
    run = Run(Spec((18, 5, 3), "sigmoid"), device, uint8=True, n=32, batch=16)
    run.indices = run.indices.int()
    assert_agrees(run, train_epoch, train_epoch_ref)


@pytest.mark.parametrize("name", ["three layers", "wider than a tile, momentum", "AdamW, loss over classes too"])
def test_replicas_agree_with_reference_and_with_single_trainings(name, device):
    spec, hyper = CASES[name]
    varied = {"lr": [0.02, 0.01, 0.1]} | ({"momentum": [0.9, 0.0, 0.5]} if "momentum" in hyper else {})
    run = Run(spec, device, replicas=3, **{**hyper, **varied})
    assert_agrees(run, train_replicas, train_replicas_ref)
    (parameters, (losses,)), _ = run.train(train_replicas)
    for r in range(3):
        single = Run(spec, device, **hyper)
        single.parameters, single.states = [p[r] for p in run.parameters], [[s[r] for s in ss] for ss in run.states]
        single.data, single.targets, single.indices, single.hyper = run.data, run.targets, run.indices[r], run.hyper[r]
        (alone, (values,)), _ = single.train(lambda *a, **k: train_epoch(*a, **k, programs=1))
        assert_equal([[p[r] for p in parameters], losses[r]], [alone, values], f"network {r}")


def test_repeats_are_bitwise_equal_and_leave_inputs_alone(device):
    run = Run(CASES["three layers"][0], device)
    given = [run.data, run.targets, run.indices, run.hyper]
    before = snapshot(given)
    assert_equal(run.train(train_epoch), run.train(train_epoch))
    assert_equal(given, before)


@pytest.mark.parametrize("mean", [True, False])
def test_label_that_is_no_class_shows_in_the_loss(mean, device):
    run = Run(Spec((6, 5, 3), loss_mean=mean), device)
    run.targets[run.indices[7]] = 3
    (_, (losses,)), _ = run.train(train_epoch)
    assert losses.isnan().tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("change, batch, expected", [
    ({"sizes": (784, 512, 10)}, 32, "epoch: hidden width 512 exceeds 256; use engine 'graph' or 'manual'"),
    ({"sizes": (784, 100, 100)}, 32, "epoch: classes 100 exceeds 64; use engine 'graph' or 'manual'"),
    ({}, 129, "epoch: batch 129 exceeds 128; use engine 'graph' or 'manual'"),
    ({"activation": "gelu"}, 32, "epoch: the derivative of 'gelu' needs the pre-activation, which these kernels do not keep"),
    ({"rule": "rprop"}, 32, "epoch: rule must be one of sgd, momentum, nesterov, adam, adamw"),
])  # fmt: skip
def test_refusals_name_the_limit_and_what_to_do(change, batch, expected):
    assert refusal(Spec((784, 256, 64)), 128) is None
    assert refusal(Spec(**{"sizes": (784, 100, 10), **change}), batch).startswith(expected)


@pytest.mark.parametrize("wrong, message", [
    (lambda r: setattr(r, "data", r.data[:, 1:]), r"data must be contiguous \(n, 17\), got \(23, 16\)"),
    (lambda r: setattr(r, "states", [r.parameters]), "rule 'sgd' needs 0 lists of states, got 1"),
    (lambda r: r.parameters.pop(), "parameters must have shapes"),
    (lambda r: r.options.update(programs=7), "rows of w_1 a program make . programs, or 1; got 7"),
    (lambda r: r.options.update(programs=2, exchange="mail"), "exchange must be one of words, counter, got 'mail'"),
    (lambda r: r.options.update(losses=torch.empty(4)), r"losses must be contiguous \(5,\), one for each step, got \(4,\)"),
])  # fmt: skip
def test_bad_arguments(wrong, message, device):
    run = Run(CASES["three layers"][0], device)
    wrong(run)
    with pytest.raises(ValueError, match=message):
        run.train(train_epoch)


def test_more_programs_than_processors_are_refused_before_the_launch():
    run = Run(Spec((20, 70, 4)), "meta")
    arguments = run.spec, run.parameters, run.states, run.data, run.targets, run.indices, run.batch, run.hyper, run.count
    launched = []
    with launch.dry_run("sm_90", 8), launch.observe(lambda kernel, grid, *_: launched.append((kernel.__name__, grid))):
        with pytest.raises(ValueError, match="9 programs must run at once, but meta runs 8; pass programs=1"):
            train_epoch(*arguments, programs=9)
        train_epoch(*arguments)
    assert launched == [("epoch_kernel", (1,))]
    with launch.dry_run("gfx942", 304), pytest.raises(ValueError, match="would wait for ever on AMD; pass programs=1"):
        train_epoch(*arguments, programs=5)
