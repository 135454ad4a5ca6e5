"""The benchmarks of trainings compare the same training. They name what they cannot run."""

import pytest
import torch

from bench import bench_memory, rivals, training


@pytest.fixture
def small(monkeypatch):
    """Makes every training two steps long."""
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (2 * rivals.BATCH, 784), dtype=torch.uint8, generator=g)
    labels = torch.randint(0, 10, (len(pixels),), generator=g)
    samples = training.mlp.Dataset(pixels, labels, scale=1 / 255)
    monkeypatch.setattr(training, "mnist", lambda on: samples.to(on))
    monkeypatch.setattr(training, "STEPS", {"cpu": 2, "cuda": 2})
    monkeypatch.setattr(training, "ROUNDS", {"cpu": 1, "cuda": 1})


@pytest.mark.parametrize("name", ["train", "adam"])
def test_trainings_agree_or_say_why_not(name, small, monkeypatch):
    """Every engine that runs here has a time, and the note names those that need a GPU. To be
    quick, the test skips compiled modes.
    """
    module = __import__(f"bench.bench_{name}", fromlist=["run"])
    monkeypatch.setattr(module, "MODES", (), raising=False)
    table = module.run()
    rows = {row["engine"]: row for row in table.rows}
    assert (
        not table.failed
        and rows["autograd"]["µs a step"]
        and rows["manual"]["µs a step"]
        and table.headline
    )
    assert not any("why not" in row for row in table.rows)
    if not torch.cuda.is_available():
        assert "CUDA graph (needs a GPU)" in table.note and "graph (needs a CUDA GPU)" in table.note


def test_a_training_that_is_wrong_gets_no_time(small):
    """A training with another learning rate gets no time, because its losses differ. An engine that
    raises has a row with its error.
    """
    sgd = lambda lr: lambda parameters: torch.optim.SGD(parameters, lr=lr)  # noqa: E731

    def raises(start, data):
        raise RuntimeError("cannot be built")

    constructors = {
        "eager": lambda **given: rivals.Eager(optimizer=sgd(0.1), **given),
        "other": lambda **given: rivals.Eager(optimizer=sgd(0.2), **given),
        "manual": raises,
    }
    table = training.table("T", "python -m bench t", constructors, 1e-4, "")
    eager, other, manual = table.rows
    assert (
        eager["µs a step"]
        and other["µs a step"] is None
        and "losses differ from those of eager" in other["why not"]
    )
    assert manual["why not"] == "RuntimeError: cannot be built" and table.failed.startswith(
        "engine manual"
    )


def test_memory_of_a_step(monkeypatch):
    """All three networks agree in a small size. The GPU's figures of memory are made up."""
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: 1 << 30)
    on = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {
        name: bench_memory.measured(make, (16, 24, 8), 4, on)
        for name, make in bench_memory.PROVIDERS.items()
    }
    for result in found.values():
        assert (
            result["losses"] == pytest.approx(found["eager"]["losses"], rel=1e-2)
            and result["seconds"] > 0
        )


@pytest.mark.parametrize("name", ["autograd", "manual"])
def test_enqueue_is_the_same_training(name, small):
    """`enqueue`, which measures the host's time, trains the same weights as `epoch`."""
    data = training.mnist(torch.device("cpu"))
    order = torch.arange(len(data))
    losses = []
    for method in ("epoch", "enqueue"):
        sgd = lambda parameters: training.mlp.SGD(parameters, lr=0.1)  # noqa: E731
        provider = training.Ours(rivals.weights("cpu"), sgd, data, name)
        getattr(provider, method)(data, order)
        losses.append(provider.losses(data, order))
    assert losses[0] == losses[1]
