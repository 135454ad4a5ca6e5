"""What people pass to fit, predict and the constructors is taken as they mean it."""

import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, WeightedRandomSampler

import mlp
from mlp import MLP, ConvNet, Net, Trainer, recipes

pd = pytest.importorskip("pandas")


def tensors(rows=70):
    x = torch.randn(rows, 6, generator=torch.Generator().manual_seed(0))
    return x, x[:, :3].argmax(1)


class Pairs(Dataset):
    """A map-style data set."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i], int(self.y[i])


X, Y = tensors()
WORDS = np.array(["ant", "bee", "cat"])[Y.numpy()]
GIVEN = {
    "tensors": (X, Y),
    "arrays": (X.numpy(), Y.numpy()),
    "a list of two": [X.numpy(), Y.numpy()],
    "wide arrays": (X.double().numpy(), Y.numpy().astype(np.int32)),
    "big endian": (X.numpy().astype(">f4"), Y.numpy().astype(">i8")),
    "frames": (pd.DataFrame(X.numpy()), pd.Series(Y.numpy())),
    "a column of labels": (X, Y[:, None]),
    "words": (X.numpy(), WORDS),
    "a series of words": (pd.DataFrame(X.numpy()), pd.Series(WORDS)),
    "nested lists": (X.tolist(), Y.tolist()),
    "TensorDataset": TensorDataset(X, Y),
    "a torch data set": Pairs(X, Y),
    "DataLoader": DataLoader(TensorDataset(X, Y), batch_size=16, shuffle=True),
    "mlp.Dataset": mlp.Dataset(X, Y),
}


def trainer(**options):
    torch.manual_seed(0)
    return Trainer(MLP((6, 8, 3)), verbose=False, **options)


@pytest.mark.parametrize("name", GIVEN)
def test_same_run(name):
    """The same numbers in any container give the same run."""
    expected = trainer().fit((X, Y), 2, 16, evaluate=(X, Y))
    rows = trainer().fit(GIVEN[name], 2, 16, evaluate=GIVEN[name])
    for key in ("train_loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert [row[key] for row in rows] == [row[key] for row in expected]


def test_a_loaders_batches(capsys):
    """A loader's batch size and drop_last are used, unless `fit` gets others. One line says what is
    used.
    """
    plain, steps = TensorDataset(X, Y), []
    count = lambda n=1: steps.append(n)  # noqa: E731
    for loader, options, expected in (
        (DataLoader(plain, batch_size=20), {}, 4),
        (DataLoader(plain, batch_size=20, drop_last=True), {}, 3),
        (DataLoader(plain, batch_size=20, drop_last=True), {"drop_last": False}, 4),
        (DataLoader(plain, batch_size=20), {"batch_size": 7}, 10),
        (plain, {}, 3),
    ):
        steps.clear()
        trainer().fit(loader, 1, on_step=count, **options)
        assert len(steps) == expected
    talking = Trainer(MLP((6, 3)), engine="autograd")
    capsys.readouterr()
    talking.fit(DataLoader(plain, batch_size=20), 1)
    assert capsys.readouterr().out == (
        "the DataLoader's 70 samples are read once and batched in the trainer's own order, "
        "although the loader does not shuffle, 20 at a time\n"
    )


class Batches:
    def __len__(self):
        return 2

    def __iter__(self):
        return iter([[0, 1], [2, 3]])


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            DataLoader(TensorDataset(X, Y), sampler=WeightedRandomSampler([1.0] * 70, 70)),
            "the WeightedRandomSampler of this DataLoader cannot be used",
        ),
        (
            DataLoader(TensorDataset(X, Y), batch_sampler=Batches()),
            "the Batches of this DataLoader cannot be used",
        ),
        (DataLoader(Endless()), "no known end|_InfiniteConstantSampler"),
        (Endless(), "no known end"),
        ((X,), "needs a pair"),
        (X, "needs a pair"),
        ((X, Y, Y), "needs a pair"),
        ((np.array([["a"] * 6] * 70), Y), "must be arrays of numbers"),
        ((X, Y[:60]), "need as many labels|60"),
        ((X, nn.functional.one_hot(Y)), "give argmax"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message) as error:
        trainer().fit(given, 1)
    assert "\n" not in str(error.value)


def test_a_word_that_training_did_not_have():
    with pytest.raises(ValueError, match="'dog' of sample 69 is not one of"):
        trainer().fit((X, WORDS), 1, evaluate=(X, np.array([*WORDS[:69], "dog"])))


def test_names_classes_and_numpys_integers():
    """Losses and optimizers may be names, classes or functions. Sizes, epochs, batches and seeds
    may be numpy's.
    """
    model = MLP(tuple(np.array([6, 8, 3])))
    assert model.config()["sizes"] == [6, 8, 3] and type(model.sizes[0]) is int
    adam = Trainer(model, "cross_entropy", "adam", verbose=False)
    assert type(adam.optimizer) is mlp.Adam and type(adam.loss) is mlp.SoftmaxCrossEntropy
    assert len(adam.fit((X, Y), np.int64(2), np.int32(16), seed=np.int64(3))) == 2
    by_class = Trainer(model, mlp.MeanSquaredError, torch.optim.RMSprop, verbose=False)
    assert type(by_class.optimizer) is torch.optim.RMSprop
    assert type(by_class.loss) is mlp.MeanSquaredError
    assert type(Net(np.array([6, 3])).config()["sizes"][0]) is int
    arguments = {"image_shape": np.array([1, 8, 8]), "channels": np.array([2]), "hidden": ()}
    numbers = {"kernel_size": np.int64(3), "max_pool": np.int64(2), "classes": np.uint8(3)}
    config = ConvNet(**arguments, **numbers).config()
    assert config == ConvNet((1, 8, 8), (2,), 3, 2, (), 3).config()
    assert all(type(n) is int for n in (*config["channels"], config["classes"]))
    for bad in ((6, 2.5), (6, "3"), (6, 0), (6,), (6, None)):
        with pytest.raises(ValueError, match="at least two positive integers"):
            MLP(bad)
    for options, message in (
        ({"loss": "l2"}, "unknown loss 'l2'; known: cross_entropy, mse"),
        ({"optimizer": "rmspropp"}, "unknown optimizer 'rmspropp'; known: sgd, adam"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(model, **options)
    with pytest.raises(TypeError, match="the optimizer's function returned list"):
        Trainer(model, optimizer=list)


def test_images_and_sequences_keep_their_shape():
    """A foreign module gets samples in their given shape, in fit, evaluate and predict."""
    images = torch.randn(40, 2, 5, 4)
    labels = (images.mean((1, 2, 3)) > 0).long()
    seen = set()

    class Looks(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(40, 2)

        def forward(self, x):
            seen.add(tuple(x.shape[1:]))
            return self.layer(x.flatten(1))

    for given in (
        (images, labels),
        DataLoader(TensorDataset(images, labels)),
        Pairs(images, labels),
    ):
        looks = Trainer(Looks(), verbose=False)
        looks.fit(given, 1, 16, evaluate=given)
        assert looks.predict(images).shape == (40,)
        assert seen == {(2, 5, 4)}
    row = Trainer(ConvNet((2, 5, 4), (2,), 3, 1, (), 2), verbose=False).fit((images, labels), 1)[0]
    assert row["train_loss"] > 0


@pytest.mark.parametrize("kind", [MLP, Net])
def test_predict(kind):
    """`predict` gives labels as training had them: arrays for arrays, tensors for tensors.
    `predict_proba` gives probabilities.
    """
    torch.manual_seed(0)
    made = Trainer(kind((6, 8, 3)), engine="manual", verbose=False)
    made.fit((X, Y), 30, 16)
    forward = made.model.predict if kind is Net else made.model
    with torch.no_grad():
        logits = forward(X)
    assert torch.equal(made.predict(X), logits.argmax(1))
    assert torch.allclose(made.predict_proba(X), logits.softmax(1))
    for x in (X.numpy(), pd.DataFrame(X.numpy()), X.tolist(), mlp.Dataset(X, Y)):
        found = made.predict(x)
        assert isinstance(found, np.ndarray) and (found == logits.argmax(1).numpy()).all()
    assert np.allclose(made.predict_proba(X.numpy()).sum(1), 1)
    made = Trainer(made.model, engine="manual", verbose=False)
    made.fit((X, WORDS), 10, 16)
    assert (made.predict(X.numpy()) == WORDS).mean() > 0.8
    assert made.predict(X.numpy()).dtype.kind == "U"


def test_later_data_are_read_as_the_first():
    """A second `fit`, also of a resumed trainer, keeps the classes, columns and units."""
    rows = Y > 0
    chunk, label = (X[rows], WORDS[rows.numpy()]), pd.Series(WORDS)
    frame = pd.DataFrame(X.numpy(), columns=list("abcdef"))
    first, second = trainer(engine="manual"), trainer(engine="manual")
    first.fit((frame, label), 3, 16)
    second.load_state_dict(first.state_dict())
    other = np.where(np.arange(70) == 3, "dog", WORDS)
    own = mlp.Dataset.of(*chunk)
    for made in (first, second):
        before = made.evaluate(chunk)["test_loss"]
        assert made.fit(chunk, 4, 16)[-1]["train_loss"] <= before + 0.05
        for given, message in (
            ((X, other), "label 'dog' of sample 3 is not one of"),
            ((frame[list("bacdef")], label), "column 0 is 'b', but the network was trained on 'a'"),
            (
                own,
                "classes of data are bee, cat, but the network was trained on the classes ant, b",
            ),
        ):
            with pytest.raises(ValueError, match=message):
                made.fit(given, 5, 16)
        with pytest.raises(ValueError, match="the classes of data are bee, cat, but"):
            made.evaluate(own)
        assert len(made.history) == 4 and made.predict(X.numpy())[0] in WORDS
        assert made.fit((X, Y), 5, 16) and made.predict(X.numpy()).dtype.kind == "U"
    numbered = trainer()
    numbered.fit((X[~rows], Y[~rows]), 1)
    assert numbered.fit((X, Y), 2)[-1]["train_loss"] > 0  # more classes, up to the outputs
    with pytest.raises(ValueError, match="on the classes 0, 1, 2; number them alike"):
        numbered.fit((X, WORDS), 3)


def test_later_data_in_other_units_are_refused():
    data, pixels, labels = bytes_of_pixels()
    fractions = pixels / 255
    for first, second in ((pixels, fractions), (fractions, pixels)):
        made = Trainer(MLP([64, 3]), engine="manual", verbose=False)
        made.fit((first, labels), 1, 50)
        message = r"training inputs are .* up to .*; store both"
        with pytest.raises(ValueError, match=message):
            made.fit((second, labels), 2)
        with pytest.raises(ValueError, match=message):
            made.predict(second)
    made = Trainer(MLP([64, 3]), engine="manual", verbose=False)
    made.fit(data.standardized(), 1, 50)
    with pytest.raises(ValueError, match="data is read with another mean than the earlier"):
        made.fit(data.take(90).standardized(), 2, 50)
    for alone in (data.take(90), data.take(90).standardized()):  # the training's mean is needed
        with pytest.raises(ValueError, match="test data: data is read with another mean than the"):
            made.evaluate(alone)
    made.evaluate(data.take(90).standardized(data.standardized()))
    made.fit((pixels, labels), 2, 50)
    numbers = Trainer(MLP([6, 1]), "mse", engine="manual", verbose=False)
    numbers.fit((X, X[:, 0]), 1, 50)
    with pytest.raises(ValueError, match="targets of data are labels, but the network was trained"):
        numbers.fit((X, Y), 2, 50)
    images = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(6, 3))
    made = Trainer(images, engine="autograd", verbose=False)
    made.fit((X.view(-1, 2, 3), Y), 1)
    with pytest.raises(
        ValueError, match=r"samples of data are \(3, 2\), but those of the training"
    ):
        made.fit((X.view(-1, 3, 2), Y), 2)


def test_a_sweep_keeps_the_classes():
    sweep = mlp.Sweep([6, 3], 2, lr=0.1)
    sweep.fit((X, WORDS), 1)
    rows = Y > 0
    before = sweep.test_losses((X[rows], WORDS[rows.numpy()]))
    sweep.fit((X[rows], WORDS[rows.numpy()]), 1)
    assert sweep.test_losses((X[rows], WORDS[rows.numpy()])) < before
    with pytest.raises(ValueError, match=r"label 'dog' of sample . is not one of"):
        sweep.fit((X, np.where(Y == 0, "dog", WORDS)), 1)


def test_more_outputs_than_words():
    """A network of ours is refused. Another one answers with known words."""
    pair = (X, WORDS == "ant")
    with pytest.raises(ValueError, match="has 5 outputs, but the labels of data are 3 words; make"):
        Trainer(MLP([6, 5]), verbose=False).fit((X, WORDS), 1)
    module = torch.nn.Linear(6, 5)
    torch.nn.init.constant_(module.bias[3:], 9.0)
    for labels, kind in ((WORDS, "U"), (WORDS.astype("S"), "S"), (pair[1], "b")):
        made = Trainer(torch.nn.Sequential(module), engine="autograd", verbose=False)
        made.fit((X, labels), 1)
        assert made.predict(X.numpy()).dtype.kind == kind
        assert set(made.predict(X.numpy())) <= set(labels)


@pytest.mark.parametrize("kind", [np.float32, bool])
def test_predict_several_labels(kind):
    """Binary cross-entropy: `predict` gives 0 or 1 as the targets did, `predict_proba` shares."""
    truths = np.stack([X[:, 0] > 0, X[:, 1] > X[:, 2]], 1)
    for targets in (truths.astype(kind), truths.astype(np.float32)[:, 0]):
        made = Trainer(MLP((6, targets.size // 70)), "bce", verbose=False)
        made.fit((X, targets), 20, 10)
        found, shares = made.predict(X.numpy()), made.predict_proba(X.numpy())
        assert found.dtype == targets.dtype and found.shape == targets.shape
        assert shares.shape == (70, targets.size // 70) and 0 <= shares.min() < shares.max() <= 1
        assert (found == (shares > 0.5).reshape(targets.shape)).all()
        assert (found == targets).mean() > 0.9
    labels = Trainer(MLP((6, 2)), verbose=False)
    labels.fit((X, torch.from_numpy(truths[:, 0])), 20, 10)
    assert labels.predict(X).dtype == torch.bool and labels.predict(X.numpy()).dtype == bool


def test_predict_numbers():
    y = torch.stack([X[:, 0] - X[:, 1], X[:, 2]], 1)
    made = Trainer(MLP((6, 2)), "mse", verbose=False)
    made.fit((X.numpy(), y.double().numpy()), 60, 10)
    assert made.predict(X).shape == (70, 2)
    assert torch.allclose(made.predict(X), y, atol=0.3)
    with pytest.raises(ValueError, match="was trained on numbers, which have no probabilities"):
        made.predict_proba(X)


def test_predict_reads_as_training_did():
    """`predict` scales pixels and standardises columns as training did. Inputs that cannot be meant
    are refused.
    """
    pixels = torch.randint(0, 256, (70, 6), dtype=torch.uint8)
    data = mlp.Dataset(pixels, Y, scale=1 / 255, shift=-0.5)
    made = trainer()
    made.fit(data, 1, 16)
    with torch.no_grad():
        expected = made.model(pixels / 255 - 0.5).argmax(1)
    assert torch.equal(made.predict(pixels), expected)
    assert (made.predict(pixels.numpy()) == expected.numpy()).all()
    assert (made.predict(data) == expected.numpy()).all()
    with pytest.raises(ValueError, match="trained on uint8 inputs, which its data set scales, got"):
        made.predict(pixels / 255)
    table = X * torch.tensor([1.0, 10, 100, 1, 1, 1]) + 3
    made = trainer()
    made.fit(mlp.Dataset(table, Y).standardized(), 1, 16)
    with torch.no_grad():
        expected = made.model((table - table.mean(0)) / table.std(0, unbiased=False)).argmax(1)
    assert torch.equal(made.predict(table), expected)


def bytes_of_pixels():
    """(a Dataset that reads bytes as 0 to 1, its bytes (200, 64), its labels)."""
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randint(0, 256, (200, 64), generator=generator, dtype=torch.uint8)
    labels = torch.arange(200) % 3
    levels = (0.0, 255.0)
    return mlp.Dataset(pixels, labels, scale=1 / 255, levels=levels), pixels, labels


def test_tensors_beside_a_data_set_are_read_as_it_is():
    data, pixels, labels = bytes_of_pixels()
    trainer = Trainer(MLP([64, 8, 3]), engine="manual", verbose=False)
    row = trainer.fit(data, epochs=1, batch_size=50, evaluate=(pixels, labels))[-1]
    own = trainer.evaluate(data)
    assert row["test_loss"] == own["test_loss"]
    for given in (pixels, pixels.long(), pixels.numpy()):
        assert trainer.evaluate((given, labels)) == own
    standard = Trainer(MLP([64, 8, 3]), engine="manual", verbose=False)
    standard.fit(data.standardized(), epochs=1, batch_size=50)
    expected = standard.evaluate(data.standardized())["test_loss"]
    assert standard.evaluate((pixels, labels))["test_loss"] == pytest.approx(expected, rel=1e-6)


def test_pixels_in_other_units_are_refused():
    data, pixels, labels = bytes_of_pixels()
    fractions, mask = pixels / 255, (pixels > 99).to(torch.uint8)
    trainer = Trainer(MLP([64, 8, 3]), engine="manual", verbose=False)
    trainer.fit(data, epochs=1, batch_size=50)
    with pytest.raises(ValueError, match="trained on uint8 inputs, which its data set scales, got"):
        trainer.evaluate((fractions, labels))
    with pytest.raises(ValueError, match="its pixels are 0 to 1, but black and white of the"):
        trainer.predict(mask)
    plain = Trainer(MLP([64, 8, 3]), engine="manual", verbose=False)
    with pytest.raises(ValueError, match="are uint8 up to 255, those of data are float32 up to 1;"):
        plain.fit((pixels, labels), epochs=1, batch_size=50, evaluate=(fractions, labels))
    unscaled = mlp.Dataset(pixels.float(), labels)
    with pytest.raises(ValueError, match="are uint8 up to 1, those of data are float32 up to 255;"):
        plain.fit(data, epochs=1, batch_size=50, evaluate=unscaled)


def test_labels_with_gaps_make_no_outputs_in_silence():
    """Labels number the classes, as in torch. We choose no width in which most have no sample."""
    x, labels = torch.randn(30, 4), torch.arange(30) % 3 * 10 + 10
    message = r"labels 10, 20, 30 number the classes from 0, so 28 of 31 classes have no sample; "
    network = mlp.Settings(hidden=(3,), lr=0.1)
    with pytest.raises(ValueError, match=message):
        mlp.Sweep([network]).fit((x, labels), 1, 10)
    with pytest.raises(ValueError, match=message):
        recipes.get("default").network(mlp.Dataset.of(x, labels))
    with pytest.raises(ValueError, match="3 outputs, but data has 31 classes; " + message):
        Trainer(MLP([4, 3, 3]), verbose=False).fit((x, labels), 1, 10)
    wide = Trainer(MLP([4, 3, 31]), engine="manual", verbose=False)
    assert wide.fit((x, labels), 1, 10)[-1]["train_loss"] > 0  # as torch
    words = mlp.Dataset.of(x, [str(label) for label in labels.tolist()])
    assert words.outputs == 3 and words.classes == ("10", "20", "30")
    assert mlp.Dataset.of(x, labels // 20 * 2).outputs == 3  # 0 and 2: few gaps


def test_a_loaded_trainer_predicts_the_same():
    """The state holds how training read its inputs and which words its labels were."""
    pixels = torch.randint(0, 256, (70, 6), dtype=torch.uint8)
    table = X * 50 + 3
    numbers = X[:, 0] - X[:, 1]
    for given, x, loss, outputs in (
        (mlp.Dataset(pixels, Y, scale=1 / 255, shift=-0.5), pixels.numpy(), None, 3),
        (mlp.Dataset(table, Y).standardized(), table.numpy(), None, 3),
        ((X, WORDS), X.numpy(), None, 3),
        ((X, numbers), X.numpy(), "mse", 1),
    ):
        first, second = (Trainer(MLP((6, 8, outputs)), loss, verbose=False) for _ in range(2))
        first.fit(given, 2, 16)
        torch.save(first.state_dict(), buffer := io.BytesIO())
        buffer.seek(0)
        second.load_state_dict(torch.load(buffer, weights_only=True))
        assert (second.predict(x) == first.predict(x)).all()
        assert second.predict(x).shape == (70,)
    with pytest.raises(ValueError, match="the state of seen must hold column, is_labels"):
        second.load_state_dict({**first.state_dict(), "seen": {"reading": 1}})


class Noisy(Pairs):
    """A data set that changes its samples at random, as augmentation does."""

    def __getitem__(self, i):
        return self.x[i] + torch.rand(()), int(self.y[i])


@pytest.mark.parametrize("loads", [False, True])
def test_random_samples_are_refused(loads):
    """They are read once, so every epoch would train on the same draw."""
    noisy = Noisy(X, Y)
    with pytest.raises(ValueError, match="two readings of sample 0 differ"):
        trainer().fit(DataLoader(noisy, batch_size=16) if loads else noisy, epochs=1)


@pytest.mark.parametrize("name", ["tensors", "arrays", "TensorDataset", "DataLoader"])
def test_predict_takes_inputs_alone(name):
    """What `fit` takes has targets too: one line says what to give."""
    trained = trainer()
    trained.fit((X, Y), epochs=1)
    with pytest.raises(ValueError, match=r"predict: x: .*give (its inputs|the rows) alone"):
        trained.predict(GIVEN[name])


def test_a_loss_of_several_numbers():
    squares = lambda output, target: (output - target) ** 2  # noqa: E731
    with pytest.raises(ValueError, match=r"the loss must be one number, got \(32, 3\)"):
        trainer(loss=squares).fit((X, X[:, :3]), epochs=1)


@pytest.mark.parametrize("engine", ["autograd", "manual", "epoch"])
def test_the_default_device_changes_no_network_elsewhere(engine):
    """All that a network on the CPU needs stays there. The device meta holds no numbers."""
    images = np.arange(8 * 36, dtype=np.uint8).reshape(8, 6, 6)
    words = np.array(["a", "b"] * 4)

    def trained():
        model = mlp.MLP([36, 4, 2], device="cpu")
        model.load_state_dict(mlp.Net([36, 4, 2], device="cpu", seed=1).state_dict())
        refusal = mlp.ENGINES[engine].refuses(model, loss, mlp.Adam(model.parameters()), 8)
        if refusal is not None:
            pytest.skip(f"by design: {refusal}")
        trainer = mlp.Trainer(model, loss, "adam", engine, verbose=False)
        rows = trainer.fit((images, words), 2, evaluate=(images, words), augment=1)
        return [row["test_loss"] for row in rows], trainer.predict(images).tolist()

    loss = mlp.SoftmaxCrossEntropy()
    expected = trained()
    torch.set_default_device("meta")
    try:
        assert trained() == expected
    finally:
        torch.set_default_device(None)


def test_an_engine_knows_the_steps_of_the_whole_training():
    """It decides by them whether compiling pays. The engine may be one from before this fit."""
    trainer = Trainer(MLP([3, 2]), engine="manual", verbose=False)
    for epochs in (2, 5):
        trainer.fit((torch.randn(10, 3), torch.zeros(10).long()), epochs, batch_size=4)
        assert trainer.engine.planned == {2: 6, 5: 9}[epochs]  # 3 steps an epoch, 2 epochs are done
