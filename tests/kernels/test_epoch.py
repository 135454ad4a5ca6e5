"""Epochs and replicas by one program each: short trainings against the references in float64."""

import functools

import pytest
import torch

from kernels import (
    Spec,
    configs,
    launch,
    outgrown,
    refusal,
    train_epoch,
    train_epoch_ref,
    train_replicas,
    train_replicas_ref,
)
from kernels.training.epoch import shareable
from kernels.training.plan import plan
from tests.checks import assert_equal, snapshot
from tests.kernels.test_step import by_steps
from tests.kernels.trainings import CASES, SOFT, Training, assert_agrees


@pytest.mark.parametrize("name", CASES)
def test_epoch_agrees_with_reference(name, device):
    spec, hyper = CASES[name]
    assert_agrees(
        Training(spec, device, soft=name in SOFT, **hyper),
        train_epoch,
        train_epoch_ref,
        lrs=(None, 0.02),
    )


@pytest.mark.parametrize("name", ["wider than a tile, momentum", "z kept, wide"])
def test_with_the_tiles_of_an_h100(name, device, monkeypatch):
    """The interpreter has tiles of its own, so this tests an H100's, for epochs and for steps.
    test_exchange.py tests several programs.
    """
    if device == "cpu":
        monkeypatch.setattr(launch, "arch", lambda device: "sm_90")
    spec, hyper = CASES[name]
    run = Training(spec, device, n=9, **hyper)
    planned, _, options = plan(run.run(), "epoch")
    assert (planned.block_k, options["num_warps"]) == (16, 8)
    assert_agrees(run, functools.partial(train_epoch, programs=1), train_epoch_ref)
    assert_agrees(run, by_steps, train_epoch_ref)


def test_uint8_pixels_int32_indices_and_full_batches(device):
    run = Training(Spec((18, 5, 3), "sigmoid"), device, uint8=True, n=32, batch=16)
    run.order = run.order.int()
    assert_agrees(run, train_epoch, train_epoch_ref)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "name", ["three layers", "wider than a tile, momentum", "AdamW, loss over classes too"]
)
def test_replicas_agree_with_reference_and_with_single_trainings(name, device):
    spec, hyper = CASES[name]
    varied = {"lr": [0.02, 0.01, 0.1]} | (
        {"momentum": [0.9, 0.0, 0.5]} if "momentum" in hyper else {}
    )
    run = Training(spec, device, replicas=3, **{**hyper, **varied})
    assert_agrees(run, train_replicas, train_replicas_ref, lrs=(None, 0.02))
    (parameters, (losses,)), _ = run.train(train_replicas)
    for r in range(3):
        single = Training(spec, device, **hyper)
        single.parameters, single.states = (
            [p[r] for p in run.parameters],
            [[s[r] for s in ss] for ss in run.states],
        )
        single.data, single.targets, single.order, single.hyper = (
            run.data,
            run.targets,
            run.order[r],
            run.hyper[r],
        )
        (alone, (values,)), _ = single.train(lambda run: train_epoch(run, programs=1))
        assert_equal([[p[r] for p in parameters], losses[r]], [alone, values], f"network {r}")


def test_repeats_are_bitwise_equal_and_leave_inputs_alone(device):
    run = Training(CASES["three layers"][0], device)
    given = [run.data, run.targets, run.order, run.hyper]
    before = snapshot(given)
    assert_equal(run.train(train_epoch), run.train(train_epoch))
    assert_equal(given, before)


@pytest.mark.interpreter
@pytest.mark.parametrize("mean", [True, False])
def test_label_that_is_no_class_shows_in_the_loss(mean, device):
    run = Training(Spec((6, 5, 3), loss_mean=mean), device)
    run.targets[run.order[7]] = 3
    (_, (losses,)), _ = run.train(train_epoch)
    assert losses.isnan().tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("mean", [True, False])
def test_ignored_labels(mean, whole_batch, device):
    """Ignored labels count in no mean. A batch with only such labels has no gradient, and its mean
    loss is NaN, as in torch.
    """
    spec = Spec((6, 5, 3), "tanh", loss_mean=mean)
    for replicas, ours, reference in (
        (None, train_epoch, train_epoch_ref),
        (3, train_replicas, train_replicas_ref),
    ):
        run = Training(spec, device, replicas=replicas)
        ignored = run.order[..., 5 if whole_batch else 6 : 10]  # rows 5 to 9 are the second batch
        run.targets[ignored] = -100
        (parameters, (losses,)), (correct,) = run.train(ours)
        (weights, (values,)), (right,) = run.train(reference, torch.float64)
        torch.testing.assert_close(
            [*parameters, losses], [t.float() for t in (*weights, values)], equal_nan=True
        )
        assert torch.equal(correct.long(), right.long())
        assert all(p.isfinite().all() for p in parameters)
        assert replicas or losses.isnan().tolist() == [
            False,
            mean and whole_batch,
            False,
            False,
            False,
        ]


@pytest.mark.parametrize(
    "change, batch, expected",
    [
        (
            {"sizes": (784, 512, 10)},
            32,
            "epoch: hidden width 512 exceeds 256; use engine 'graph' or 'manual'",
        ),
        (
            {"sizes": (784, 100, 100)},
            32,
            "epoch: classes 100 exceeds 64; use engine 'graph' or 'manual'",
        ),
        (
            {"loss": "pinball", "loss_parameter": (0.1, 0.9)},
            32,
            "epoch: quantile must be one number or one for each of 10 outputs, got 2",
        ),
        ({}, 129, "epoch: batch 129 exceeds 128; use engine 'graph' or 'manual'"),
    ],
)
def test_refusals_name_the_limit_and_what_to_do(change, batch, expected):
    assert refusal(Spec((784, 256, 32)), 128) is None
    assert refusal(Spec((784, 256, 64)), 64) is None
    assert refusal(Spec(**{"sizes": (784, 100, 10), **change}), batch).startswith(expected)


@pytest.mark.parametrize(
    ("setting", "batch", "classes", "reason"),
    [
        ("highest", 128, 33, "at float32 precision ieee, batch times classes, both padded"),
        ("medium", 65, 17, "at float32 precision tf32, batch times classes, both padded"),
        ("medium", 64, 64, "at float32 precision tf32, batch times classes, both padded"),
        ("high", 65, 10, "at float32 precision tf32x3, batch 65 exceeds 64"),
        ("high", 64, 33, "at float32 precision tf32x3, batch times classes, both padded"),
        ("high", 64, 32, None),
        ("high", 32, 64, None),
        ("highest", 128, 32, None),
        ("medium", 128, 16, None),
    ],
)
def test_what_would_spill_is_refused(setting, batch, classes, reason, monkeypatch):
    """Registers hold a batch and its outputs. The room for them depends on the precision."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    said = refusal(Spec((784, 256, classes)), batch)
    if reason is None:
        assert said is None
    else:
        assert said.startswith(f"epoch: {reason}")
        assert said.endswith("use engine 'graph' or 'manual'")


@pytest.mark.parametrize(
    ("arch", "old_triton", "setting", "batch", "spills"),
    [
        ("sm_80", False, "highest", 65, True),
        ("sm_80", False, "highest", 64, False),
        ("sm_80", False, "medium", 65, False),
        ("sm_90", False, "highest", 128, False),
        ("sm_90", True, "highest", 65, True),
        ("sm_90", True, "highest", 64, False),
        ("sm_90", True, "medium", 128, False),
        ("sm_80", True, "medium", 33, True),
        ("sm_80", True, "medium", 32, False),
    ],
)
def test_programs_do_not_share_where_they_would_spill(
    arch, old_triton, setting, batch, spills, monkeypatch
):
    monkeypatch.setattr(configs, "OLD_TRITON", old_triton)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    run = Training(Spec((12, 70, 3), rule="adam"), "cpu", batch=batch).run()
    with launch.dry_run(arch, 108):
        assert shareable(run) is not spills
        if spills:
            with pytest.raises(ValueError, match=rf"at a batch of {batch}, .*programs=1"):
                train_epoch(run, programs=9)


@pytest.mark.parametrize("old_triton", [False, True])
@pytest.mark.parametrize(("precision", "batch", "classes"), [("ieee", 64, 64), ("tf32", 128, 16)])
def test_an_older_triton_gets_smaller_tiles_at_the_limits(
    precision, batch, classes, old_triton, monkeypatch
):
    monkeypatch.setattr(configs, "OLD_TRITON", old_triton)
    assert configs.MOST_OUTPUTS[precision] == batch * classes
    for rows, small in ((batch, old_triton), (batch // 2, False)):
        tiles = configs.training("exchange", "sm_90", precision, 2, (784, 256, classes), rows)
        assert tiles.num_stages == (1 if small else 3)
        narrow = small or (precision, rows) == ("ieee", batch)
        assert tiles.columns == (16 if narrow else 2048 // rows)


def test_large_layers_above_the_first_are_left_to_products():
    """Each program repeats the layers above the first, so they must be small. Programs share the
    first layer's rows, so it may have any size.
    """
    assert outgrown(Spec((784, 100, 50, 10)), 32) is None
    assert outgrown(Spec((100_000, 256, 10)), 128) is None
    assert outgrown(Spec((784, 256, 256, 10)), 128, "graph") == (
        "graph: 26,148,864 multiply-adds a step above the first layer exceed 2,000,000, so "
        "separate products are faster"
    )


def test_an_unknown_rule_lists_the_known():
    with pytest.raises(ValueError, match="Spec: unknown rule 'rprop'; known: sgd, momentum, nest"):
        Spec((784, 10), rule="rprop")


def test_an_unknown_loss_lists_the_known():
    with pytest.raises(ValueError, match="unknown loss 'mae'; known: cross_entropy, mse, bce, hub"):
        Spec((784, 10), loss="mae")


def test_cross_entropy_of_one_output_is_refused(device):
    """This loss would be 0 whatever the network computes."""
    run = Training(Spec((12, 7, 1), "relu"), device, soft=True)
    with pytest.raises(ValueError, match="use MeanSquaredError"):
        run.train(train_epoch)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (
            lambda r: setattr(r, "data", r.data[:, 1:]),
            r"data must be contiguous \(n, 17\), got \(23, 16\)",
        ),
        (
            lambda r: setattr(r, "states", [r.parameters]),
            "rule 'sgd' needs 0 lists of states, got 1",
        ),
        (lambda r: r.parameters.pop(), "parameters must have shapes"),
        (
            lambda r: r.options.update(losses=torch.empty(4)),
            r"losses must be contiguous \(5,\), one for each step, got \(4,\)",
        ),
    ],
)
def test_bad_arguments(wrong, message, device):
    run = Training(CASES["three layers"][0], device)
    wrong(run)
    with pytest.raises(ValueError, match=message):
        run.train(train_epoch)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "options, message",
    [
        ({"programs": 7}, r"programs must be . \(.* rows of w_1 for each\) or 1, got 7"),
        (
            {"programs": 2, "exchange": "mail"},
            "exchange must be one of words, counter, got 'mail'",
        ),
    ],
)
def test_wrong_programs_and_exchanges(options, message, device):
    run = Training(CASES["three layers"][0], device)
    with pytest.raises(ValueError, match=message):
        run.train(functools.partial(train_epoch, **options))


def test_more_programs_than_processors_are_refused_before_the_launch():
    run = Training(Spec((20, 70, 4)), "meta").run()
    launched = []
    with (
        launch.dry_run("sm_90", 8),
        launch.observe(lambda kernel, grid, *_: launched.append((kernel.__name__, grid))),
    ):
        with pytest.raises(
            ValueError, match="9 programs must run at once, but meta runs 8; pass programs=1"
        ):
            train_epoch(run, programs=9)
        train_epoch(run)
    assert launched == [("epoch_kernel", (1,))]
    with (
        launch.dry_run("gfx942", 304),
        pytest.raises(ValueError, match="would wait for ever on AMD; pass programs=1"),
    ):
        train_epoch(run, programs=5)
