"""Image files of every mode, folders as people have them, and new images that are read as the
training data were.
"""

import os

import numpy as np
import pytest
import torch

from mlp import data
from mlp.data import DataError, Reading, from_arrays, images, open_image
from mlp.data.images import decode

Image = pytest.importorskip("PIL.Image")

GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
RED = np.stack([GREY, 255 - GREY, GREY // 3], 2)


def write_images(folder, modes=("L",), sizes=((4, 4),), names=("ant", "bee", "cat"), count=4):
    """Writes a folder of images for each class. Image i of class c is grey 10 · c + i. Modes and
    sizes take turns.
    """
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            n = c * count + i
            mode, size = modes[n % len(modes)], sizes[n % len(sizes)]
            Image.fromarray(np.full(size[::-1], 10 * c + i, np.uint8)).convert(mode).save(
                folder / name / f"{i}.png"
            )
    return folder


def saved(image, path, **options):
    image.save(path, **options)
    return path


def palette(path):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8), "P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return saved(image, path)


def with_alpha(levels, alpha):
    """(an image of these levels with a constant alpha, its levels on white)."""
    plane = np.full((*levels.shape[:2], 1), alpha, np.uint8)
    stack = np.concatenate([levels.reshape(*levels.shape[:2], -1), plane], 2)
    return Image.fromarray(stack), 255 + (levels.astype(float) - 255) * alpha / 255


def transparent_palette(path):
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8), "P")
    image.putpalette([10, 10, 10, 20, 20, 20, 30, 30, 30])
    return saved(image, path, transparency=1)


def oriented(path):
    """A picture by a camera held on its side. It is shown turned by 90 degrees."""
    exif = Image.Exif()
    exif[0x0112] = 6
    return saved(Image.fromarray(GREY), path, exif=exif)


SHORT = (GREY.astype(np.uint16) * 257) - (GREY > 0) * np.uint16(3)
COLOURS = np.eye(3, dtype=np.uint8)[[[0, 1, 2], [2, 1, 0]]] * 255
# (how the file is written, its pixels, the value of white)
MODES = {
    "L": (lambda p: saved(Image.fromarray(GREY), p), GREY, 255),
    "1": (lambda p: saved(Image.fromarray(GREY > 127), p), (GREY > 127) * 255, 255),
    "RGB": (lambda p: saved(Image.fromarray(RED), p), RED, 255),
    "16 bits": (lambda p: saved(Image.fromarray(SHORT), p), SHORT, 65535),
    "16-bit TIFF": (
        lambda p: saved(Image.fromarray(SHORT), p.with_suffix(".tif")),
        SHORT,
        65535,
    ),
    "I": (
        lambda p: saved(Image.fromarray(SHORT.astype(np.int32)), p.with_suffix(".tif")),
        SHORT,
        65535,
    ),
    "float": (
        lambda p: saved(Image.fromarray(GREY / np.float32(255)), p.with_suffix(".tiff")),
        GREY / np.float32(255),
        None,
    ),
    "palette": (palette, COLOURS, 255),
    "grey palette": (lambda p: saved(Image.fromarray(GREY).convert("P"), p), GREY, 255),
    "transparent palette": (
        transparent_palette,
        np.array([[10, 255, 30], [30, 255, 10]]),
        255,
    ),
    "LA": (lambda p: saved(with_alpha(GREY, 51)[0], p), with_alpha(GREY, 51)[1], 255),
    "RGBA": (lambda p: saved(with_alpha(RED, 204)[0], p), with_alpha(RED, 204)[1], 255),
    "invisible": (lambda p: saved(with_alpha(RED, 0)[0], p), np.full_like(RED, 255), 255),
    "transparent grey": (
        lambda p: saved(Image.fromarray(GREY), p, transparency=51),
        np.where(GREY == 51, 255, GREY),
        255,
    ),
    "transparent 16 bits": (
        lambda p: saved(Image.fromarray(SHORT), p, transparency=int(SHORT[0, 1])),
        np.where(SHORT[0, 1] == SHORT, 65535, SHORT),
        65535,
    ),
    "CMYK": (
        lambda p: saved(Image.fromarray(COLOURS).convert("CMYK"), p.with_suffix(".tif")),
        COLOURS,
        255,
    ),
    "turned": (lambda p: oriented(p.with_suffix(".png")), np.rot90(GREY, -1), 255),
    "upper-case suffix": (lambda p: saved(Image.fromarray(GREY), p.with_suffix(".PNG")), GREY, 255),
}


@pytest.mark.parametrize("mode", MODES)
def test_an_image_keeps_its_levels(mode, tmp_path):
    write, pixels, white = MODES[mode]
    found = decode(write(tmp_path / "image.png"))
    assert found.white == white
    np.testing.assert_allclose(found.pixels, pixels, atol=1 if mode in ("LA", "RGBA") else 0)


@pytest.mark.parametrize("mode", MODES)
def test_a_folder_is_read_as_its_images_are(mode, tmp_path):
    """A network gets the same numbers from a folder's image and from a new image."""
    write, pixels, white = MODES[mode]
    for name in "ab":
        (tmp_path / name).mkdir()
        path = write(tmp_path / name / "image.png")
    train, _ = data.load(str(tmp_path))
    channels = np.moveaxis(pixels, 2, 0) if np.ndim(pixels) == 3 else np.asarray(pixels)[None]
    assert train.image_shape == channels.shape
    numbers = train.read(train.inputs)[0]
    np.testing.assert_allclose(
        numbers, channels.reshape(-1) / (white or 1), atol=0.004 if "A" in mode else 1e-6
    )
    row, note = open_image(path, train.reading)
    assert note is None
    torch.testing.assert_close(train.reading.numbers(row), numbers, rtol=1e-6, atol=1e-7)


# How training stored its pixels, which are shares of white.
HELD = {
    "uint8": lambda x: (x * 255).round().astype(np.uint8),
    "int64": lambda x: (x * 255).round().astype(np.int64),
    "float64 bytes": lambda x: (x * 255).round(),
    "uint16": lambda x: (x * 65535).round().astype(np.uint16),
    "float32 in [0, 1]": lambda x: x.astype(np.float32),
    "float16 in [0, 1]": lambda x: x.astype(np.float16),
    "[-1, 1]": lambda x: x * 2 - 1,
    "sixteenths": lambda x: (x * 16).round(),
    "int8": lambda x: ((x * 255).round() - 128).astype(np.int8),
}


@pytest.mark.parametrize("held", HELD)
@pytest.mark.parametrize("new", ["8 bits", "16 bits", "RGB"])
def test_new_images_are_read_as_the_training_data(new, held, tmp_path):
    """Grey 51 gives the number that training had for a fifth of white, in whatever type."""
    shares = np.linspace(0, 1, 20 * 16).reshape(20, 4, 4)
    train, _ = from_arrays(HELD[held](shares), np.arange(20) % 2, image="4x4")
    levels = {
        "8 bits": np.full((4, 4), 51, np.uint8),
        "16 bits": np.full((4, 4), 13107, np.uint16),
        "RGB": np.full((4, 4, 3), 51, np.uint8),
    }[new]
    row, note = open_image(saved(Image.fromarray(levels), tmp_path / "new.png"), train.reading)
    assert note is None and row.shape == (16,)
    step = 1 / 16 if held == "sixteenths" else 2e-3
    wanted = 2 * 0.2 - 1 if held == "[-1, 1]" else 0.2
    np.testing.assert_allclose(
        train.reading.numbers(row[None]), np.full((1, 16), wanted), atol=step
    )


def test_new_images_of_a_normalized_or_standardised_network(tmp_path):
    shares = np.linspace(0, 255, 20 * 16).round().astype(np.uint8).reshape(20, 4, 4)
    train, _ = from_arrays(shares, np.arange(20) % 2)
    first = Image.fromarray(train.inputs[0].view(4, 4).numpy())
    row, _ = open_image(saved(first, tmp_path / "new.png"), train.reading)
    for prepared in (train.normalized(0.5, 0.25), train.standardized()):
        numbers = prepared.reading.numbers(row[None])[0]
        expected = prepared.read(prepared.inputs)[0]
        torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-6)


def test_new_floating_point_images(tmp_path):
    path = saved(Image.fromarray(GREY / np.float32(255)), tmp_path / "unit.tif")
    bytes_ = saved(Image.fromarray(GREY.astype(np.float32)), tmp_path / "bytes.tif")
    floats = Reading(1.0, 0.0, (1, 2, 3), (0.0, 1.0), stored="float32")
    pixels = Reading(1 / 255, 0.0, (1, 2, 3), (0.0, 255.0), stored="uint8")
    wanted = torch.from_numpy(GREY.reshape(-1) / 255).float()
    for reading, file, note in (
        (floats, path, None),
        (pixels, path, None),
        (pixels, bytes_, "float32 0 to 255: white is taken for 255"),
    ):
        row, said = open_image(file, reading)
        assert said == note
        torch.testing.assert_close(reading.numbers(row), wanted)
    with pytest.raises(DataError, match=r"floats from 0 to 255, but .* was trained on 0 to 1"):
        open_image(bytes_, floats)


def test_new_images_are_resized(tmp_path):
    reading = Reading(1 / 255, 0.0, (1, 4, 6), (0.0, 255.0), stored="uint8")
    row, note = open_image(saved(Image.fromarray(GREY), tmp_path / "a.png"), reading)
    assert row.shape == (24,) and note == "resized from 3×2 to 6×4"
    assert 0 <= row.min() < 40 and 215 < row.max() <= 255
    row, _ = open_image(saved(Image.new("I;16", (9, 9), 65535), tmp_path / "b.png"), reading)
    assert row.unique().tolist() == [255]


@pytest.mark.parametrize(
    "reading, message",
    [
        (Reading(), "was trained on rows of numbers, not on images"),
        (Reading(image_shape=(1, 2, 3)), "of float32 whose values of black and white are not"),
        (Reading(image_shape=(4, 2, 3), levels=(0, 1)), "has 1 or 3 channels, but 4 are needed"),
    ],
)
def test_networks_that_take_no_images(reading, message, tmp_path):
    with pytest.raises(DataError, match=message):
        open_image(saved(Image.fromarray(GREY), tmp_path / "a.png"), reading)


@pytest.mark.parametrize("mode, shape", [("L", (1, 4, 5)), ("RGB", (3, 4, 5))])
def test_image_folder(mode, shape, tmp_path):
    write_images(tmp_path / "flat", [mode], [(5, 4)])
    write_images(tmp_path / "parts" / "train", [mode], [(5, 4)])
    write_images(tmp_path / "parts" / "test", [mode], [(5, 4)], count=1)
    train, test = data.load(str(tmp_path / "flat"))
    assert (len(train), len(test)) == (10, 2) and train.image_shape == shape
    train, test = data.load(str(tmp_path / "parts"))
    assert (len(train), len(test)) == (12, 3)
    assert train.classes == test.classes == ("ant", "bee", "cat")
    assert train.inputs.shape == (12, 20 * shape[0])
    assert train.inputs.dtype == torch.uint8 and train.scale == 1 / 255
    assert train.inputs[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]
    assert train.targets.tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_colour_channels_stay_apart(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        Image.new("RGB", (2, 2), (10, 20, 30)).save(tmp_path / name / "0.png")
    assert data.load(str(tmp_path))[0].inputs[0].tolist() == [10] * 4 + [20] * 4 + [30] * 4


def test_one_class(tmp_path):
    (tmp_path / "cat").mkdir()
    for i in range(3):
        Image.new("RGB", (2, 2), (i, i, i)).save(tmp_path / "cat" / f"{i}.png")
    with pytest.raises(DataError, match="the class is cat in every row: nothing to learn"):
        data.load(str(tmp_path))


def test_modes_that_are_mixed(tmp_path):
    """One colour image makes all RGB, and one of 16 bits makes all 16-bit. Floats do not mix with
    whole numbers.
    """
    write_images(tmp_path / "a", ["L", "RGB"])
    train, _ = data.load(str(tmp_path / "a"))
    assert train.image_shape == (3, 4, 4) and "6 of 12 images are grey" in train.notes[0]
    write_images(tmp_path / "b")
    Image.new("I;16", (4, 4), 1000).save(tmp_path / "b" / "ant" / "0.png")
    train, test = data.load(str(tmp_path / "b"))
    rows = torch.cat([train.inputs, test.inputs])[:, 0]
    assert sorted(rows.tolist()) == sorted(
        [1000, *(257 * g for g in (1, 2, 3, *range(10, 14), *range(20, 24)))]
    )
    assert train.levels == (0, 65535) and "8-bit and 16-bit images are mixed" in train.notes[0]
    Image.new("L", (4, 4), 0).save(tmp_path / "b" / "ant" / "0.png")
    Image.new("I;16", (4, 4), 1000).save(tmp_path / "b" / "cat" / "0.png")
    assert data.load(str(tmp_path / "b"))[0].stored == "uint16"  # not that of the first image
    write_images(tmp_path / "c")
    Image.new("F", (4, 4), 0.5).save(tmp_path / "c" / "cat" / "9.tif")
    with pytest.raises(DataError, match=r"9.tif: floating-point and whole pixels have no common"):
        data.load(str(tmp_path / "c"))


def test_images_are_resized_on_request(tmp_path):
    write_images(tmp_path / "d", sizes=[(4, 4), (5, 4)])
    with pytest.raises(DataError, match="images must all be 4×4, got 5×4; give a size, such as"):
        data.load(str(tmp_path / "d"))
    train, test = data.load(str(tmp_path / "d"), image="3x2")
    assert train.image_shape == (1, 3, 2) and "12 images are resized to 2×3" in train.notes[0]
    rows = torch.cat([train.inputs, test.inputs])
    assert sorted(rows[:, 0].tolist()) == [0, 1, 2, 3, 10, 11, 12, 13, 20, 21, 22, 23]


@pytest.mark.parametrize("train", ["train", "training", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "testing", "Test", "val", "valid", "validation"])
def test_splits_in_all_spellings(train, test, tmp_path):
    write_images(tmp_path / train)
    write_images(tmp_path / test, count=1)
    parts = data.load(str(tmp_path))
    assert [len(part) for part in parts] == [12, 3]
    assert parts[0].classes == ("ant", "bee", "cat")


def test_other_splits(tmp_path):
    """Training data alone are split. Next to test data, validation data are not used, and a note
    says so. Without a folder of training data, `test` may be a class.
    """
    write_images(tmp_path / "a" / "train")
    assert [len(part) for part in data.load(str(tmp_path / "a"))] == [10, 2]
    for name in ("train", "test", "val"):
        write_images(tmp_path / "b" / name)
    train, test = data.load(str(tmp_path / "b"))
    assert test.name.endswith("test")
    assert train.notes == (f"{tmp_path / 'b'}: val is not used, because test is there",)
    write_images(tmp_path / "c", names=("control", "test"))
    assert data.load(str(tmp_path / "c"))[0].classes == ("control", "test")


def make_run(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.jsonl").write_text("")
    Image.fromarray(GREY).save(folder / "curves.png")


def test_hidden_files_and_runs_are_no_data(tmp_path):
    """Hidden files and folders, and folders of runs, are neither classes nor images."""
    write_images(tmp_path)
    for hidden in (".ipynb_checkpoints", "__MACOSX", ".git", "@eaDir"):
        (tmp_path / hidden).mkdir()
        Image.fromarray(GREY).save(tmp_path / hidden / "a.png")
        (tmp_path / "ant" / hidden).mkdir()
        Image.fromarray(GREY).save(tmp_path / "ant" / hidden / "a.png")
    for junk in ("._0.png", ".DS_Store", "Thumbs.db"):
        (tmp_path / "bee" / junk).write_bytes(b"junk")
    make_run(tmp_path / "runs" / "one")
    make_run(tmp_path / "runs" / "two")
    make_run(tmp_path / "run")
    train, test = data.load(str(tmp_path))
    assert train.classes == ("ant", "bee", "cat") and len(train) + len(test) == 12
    assert train.notes == ()
    (tmp_path / "labels.csv").write_text("a")
    (tmp_path / "cat" / "about.txt").write_text("a")
    note = f"{tmp_path}: 2 files in it are not used, such as about.txt, labels.csv"
    assert data.load(str(tmp_path))[0].notes == (note,)


def test_links_are_followed_once(tmp_path):
    write_images(tmp_path / "far")
    (tmp_path / "near").mkdir()
    for name in ("ant", "bee"):
        (tmp_path / "near" / name).symlink_to(tmp_path / "far" / name)
    (tmp_path / "far" / "ant" / "loop").symlink_to(tmp_path / "far" / "ant")
    (tmp_path / "far" / "ant" / "up").symlink_to(tmp_path / "far")  # would add other classes
    train, test = data.load(str(tmp_path / "near"))
    assert len(train) + len(test) == 8


def spoiled(spoil, **options):
    def make(folder):
        write_images(folder, **options)
        spoil(folder)

    return make


def header_of_a_huge_png(path):
    """Writes a small PNG whose header, with a right checksum, says 40,000 × 40,000 pixels."""
    import struct
    import zlib

    Image.new("1", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40_000, 40_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)


BAD = {
    "damaged": (
        spoiled(lambda d: (d / "bee/1.png").write_text("")),
        "bee/1.png: not a readable image",
    ),
    "cut": (
        spoiled(lambda d: (d / "bee/1.png").write_bytes((d / "bee/2.png").read_bytes()[:45])),
        "bee/1.png: not a readable image",
    ),
    "class without images": (
        spoiled(lambda d: (d / "dog").mkdir()),
        "dog holds no images .*one folder for each class",
    ),
    "no classes": (lambda d: d.mkdir(), "Couldn't find any class folder.*one folder for each"),
    "one level too deep": (
        lambda d: write_images(d / "photos"),
        r"its folders \(photos\) hold only folders and no images; give one of them, such as .*os",
    ),
    "folds": (
        lambda d: (write_images(d / "fold1"), write_images(d / "fold2")),
        r"its folders \(fold1, fold2\) hold only folders",
    ),
    "splits and classes": (
        lambda d: (write_images(d / "train"), write_images(d / "test"), (d / "cat").mkdir()),
        r"has folders of splits \(test, train\) and others \(cat\)",
    ),
    "splits of images": (
        lambda d: write_images(d, names=("train", "test")),
        "test holds images directly; put them into one folder for each class",
    ),
    "two of a kind": (
        lambda d: (write_images(d / "train"), write_images(d / "Training")),
        "Training and train are both train data",
    ),
    "tests alone": (
        lambda d: (write_images(d / "test"), write_images(d / "val")),
        "has test, val, but no folder of training data",
    ),
    "other classes": (
        lambda d: (write_images(d / "train"), write_images(d / "test", names=("ant", "bee"))),
        r"must have the same classes, got \('ant', 'bee', 'cat'\) and \('ant', 'bee'\)",
    ),
    "32 bits": (
        spoiled(lambda d: Image.fromarray(GREY.astype(np.int32) * 10**6).save(d / "ant/9.tif")),
        "9.tif: has pixels from 0 to 255000000, so .* are not known; save 16 bits",
    ),
    "an animation": (
        spoiled(
            lambda d: Image.fromarray(GREY).save(
                d / "ant/9.gif", save_all=True, append_images=[Image.fromarray(255 - GREY)]
            )
        ),
        "9.gif: holds 2 pictures; save the one that is intended",
    ),
    "many pages": (
        spoiled(
            lambda d: Image.fromarray(GREY).save(
                d / "ant/9.tif", save_all=True, append_images=[Image.fromarray(GREY)]
            )
        ),
        "9.tif: holds 2 pictures",
    ),
    "not finite": (
        spoiled(lambda d: Image.fromarray(GREY * np.float32("nan")).save(d / "ant/9.tif")),
        "9.tif: has pixels that are not finite",
    ),
    "floats of no known range": (
        lambda d: [
            (folder := d / name).mkdir(parents=True)
            or Image.fromarray(GREY * np.float32(3.3)).save(folder / "a.tif")
            for name in "ab"
        ],
        "float32 0 to 841.5: which values are black and white is not known; save pixels from 0",
    ),
    "a huge image": (
        spoiled(lambda d: header_of_a_huge_png(d / "ant" / "9.png")),
        r"is too large .*(40000×40000|1600000000) pixels.*, an image may have 100,000,000",
    ),
    "a pipe": (spoiled(lambda d: os.mkfifo(d / "ant" / "9.png")), "9.png: is a pipe, not a file"),
    "a device": (
        spoiled(lambda d: (d / "ant" / "9.png").symlink_to("/dev/zero")),
        "9.png: is a device, not a file",
    ),
    "a link to nothing": (
        spoiled(lambda d: (d / "ant" / "9.png").symlink_to("/nowhere")),
        "9.png: no such file",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_one_clear_line(case, tmp_path):
    make, message = BAD[case]
    make(tmp_path / "d")
    with pytest.raises(DataError, match=message) as error:
        data.load(str(tmp_path / "d"))
    assert "\n" not in str(error.value)


def test_more_images_than_memory_holds(tmp_path, monkeypatch):
    write_images(tmp_path / "d")
    monkeypatch.setattr("mlp.data.guards.memory", lambda: 16 * 12)
    with pytest.raises(DataError, match=r"GiB, more than half of the .* store fewer samples"):
        data.load(str(tmp_path / "d"))


def test_every_suffix_is_read(tmp_path):
    for suffix in images.SUFFIXES:
        path = saved(Image.fromarray(RED), tmp_path / f"a{suffix}")
        assert decode(path).size == (2, 3)
