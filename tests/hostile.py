"""Hostile files for the command line: `python -m tests.hostile [COUNT]`.

Makes bad variants of every file of a run folder and of a data set: wrong types, missing and extra
fields, huge and negative numbers, cut files, flipped bits. The command line reads each one. It may
succeed, or refuse the file in one line that names it. An internal exception is a fault. A refusal
that changed a file is a fault, too.
"""

import contextlib
import copy
import io
import json
import os
import random
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mlp.__main__ import main
from mlp.runs import disk

WRONG: tuple[Any, ...] = (
    *("abc", "", {}, None, [], [None], {"a": 1}, -1, 0, 1.5, 10**30, -(10**30), 1e308, True),
    *([1, 2, 3], [[1]], "\x1b[2J", float("nan"), [10**15, 10**15], "0" * 5000, [-3, 4]),
)
OPTIONS = ("--device", "cpu", "--engine", "manual")
COMMANDS = {
    "evaluate": ("evaluate", "run", "--device", "cpu"),
    "report": ("report", "run", "--device", "cpu"),
    "predict": ("predict", "run", "image.png", "--device", "cpu"),
    "resume": ("train", "--resume", "--out", "run", "--epochs", "3", *OPTIONS),
}


class Case(NamedTuple):
    """A hostile file: what is wrong with it, the file that it replaces, a function that writes it,
    and the commands to try.
    """

    what: str
    path: str
    write: Callable[[Path], object]
    commands: tuple[str, ...] = tuple(COMMANDS)


def places(value: Any, at: tuple = ()) -> Iterator[tuple]:
    """The keys and indices that lead to each value inside a nested one."""
    yield at
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from places(inner, (*at, key))


def places_of(value: Any) -> list[tuple]:
    """The same without the whole value, and with at most two items of each list."""
    return [p for p in places(value) if p and not any(isinstance(k, int) and k > 1 for k in p)]


def put(value: Any, place: tuple, new: Any) -> Any:
    """A copy of `value` with `new` at a place."""
    if not place:
        return new
    made = copy.copy(value)
    made[place[0]] = put(value[place[0]], place[1:], new)
    return made


def variants(value: dict, generator: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """(what is wrong, a copy of `value` with one fault)."""
    yield from ((f"whole is {wrong!r:.30}", wrong) for wrong in WRONG[:6])
    yield "an extra field", {**value, "extra": 1}
    for name in value:
        yield f"without {name}", {key: v for key, v in value.items() if key != name}
    found = places_of(value)
    for _ in range(count):
        place, wrong = generator.choice(found), generator.choice(WRONG)
        yield f"{place} is {wrong!r:.30}", put(value, place, wrong)


def cut_and_flipped(path: str, content: bytes, generator: random.Random) -> Iterator[Case]:
    """The file cut, with a flipped bit, or replaced by a text or a folder."""
    for keep in (0, 1, 10, len(content) // 2, len(content) - 1):
        yield Case(f"cut to {keep}", path, lambda p, keep=keep: p.write_bytes(content[:keep]))
    for _ in range(10):
        changed = bytearray(content)
        changed[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
        yield Case("a flipped bit", path, lambda p, c=bytes(changed): p.write_bytes(c))
    yield Case("text", path, lambda p: p.write_text("not that at all\n" * 50))
    yield Case("a folder", path, lambda p: p.mkdir())


def json_cases(folder: Path, generator: random.Random) -> Iterator[Case]:
    """Bad variants of config.json and metrics.jsonl."""
    path = "run/config.json"
    content = (folder / path).read_bytes()
    for what, value in variants(json.loads(content), generator, 200):
        yield Case(what, path, lambda p, v=value: p.write_text(json.dumps(v)))
    yield Case("deep", path, lambda p: p.write_text("[" * 10**5))
    yield from cut_and_flipped(path, content, generator)
    path = "run/metrics.jsonl"
    content = (folder / path).read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    for what, value in variants(rows[0], generator, 40):
        lines = [json.dumps(value), json.dumps(rows[1])]
        yield Case(what, path, lambda p, lines=lines: p.write_text("\n".join(lines)))
    yield from cut_and_flipped(path, content, generator)


def weights_cases(folder: Path, generator: random.Random) -> Iterator[Case]:
    """Bad variants of model.safetensors: descriptions, tensors and bytes."""
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    path = "run/model.safetensors"
    state = load_file(folder / path)
    with safe_open(folder / path, "pt") as file:
        good = json.loads(file.metadata()[disk.SEALED])

    def write(file: Path, tensors: dict, description: str) -> None:
        save_file(tensors, file, {disk.CHECKSUM: disk.BLANK, disk.SEALED: description})
        disk.seal_safetensors(file)

    for what, value in variants(good, generator, 80):
        text = json.dumps(value)
        yield Case(what, path, lambda p, text=text: write(p, state, text))
    first = next(iter(state))
    for what, tensors in {
        "no tensor": {},
        "a tensor less": {n: t for n, t in state.items() if n != first},
        "another shape": {**state, first: torch.zeros(2, 2)},
        "no dimension": {**state, first: torch.tensor(1.0)},
        "whole numbers": {n: t.long() for n, t in state.items()},
        "not finite": {n: t * float("nan") for n, t in state.items()},
        "another name": {f"x{i}": t for i, t in enumerate(state.values())},
    }.items():
        text = json.dumps(good)
        yield Case(what, path, lambda p, tensors=tensors, text=text: write(p, tensors, text))
    yield from cut_and_flipped(path, (folder / path).read_bytes(), generator)


def state_cases(folder: Path, generator: random.Random) -> Iterator[Case]:
    """Bad variants of last.ckpt: wrong values under a right checksum, and bytes."""
    path = "run/last.ckpt"
    good = torch.load(folder / path, weights_only=True)

    def write(file: Path, value: Any) -> None:
        torch.save(value, file)
        disk.seal_zip(file)

    for what, value in (*variants(good, generator, 60), *_deeper(good, generator, 60)):
        yield Case(what, path, lambda p, v=value: write(p, v), ("resume",))
    for case in cut_and_flipped(path, (folder / path).read_bytes(), generator):
        yield case._replace(commands=("resume",))


def _deeper(good: dict, generator: random.Random, count: int) -> Iterator[tuple[str, Any]]:
    """Variants inside the trainer's state, where the top level is right."""
    for part in ("model", "optimizer", "history"):
        found = places_of({part: good["trainer"][part]})
        for _ in range(count // 3):
            place = ("trainer", *generator.choice(found))
            wrong = generator.choice((*WRONG, torch.zeros(2), torch.zeros(10**4)))
            yield f"{place} is {str(wrong)[:30]!r}", put(good, place, wrong)


def data_cases(folder: Path, generator: random.Random) -> Iterator[Case]:
    """Bad variants of the .npz that a run was trained on, or that a new one starts with."""
    path, content = "data.npz", (folder / "data.npz").read_bytes()
    x, y = np.zeros((12, 2, 2), np.uint8), np.arange(12) % 3
    for what, arrays in {
        "no labels": {"x_train": x},
        "fewer labels": {"x_train": x, "y_train": y[:5]},
        "words as inputs": {"x_train": np.full((12, 4), "a"), "y_train": y},
        "no dimension": {"x_train": np.float32(1), "y_train": y},
        "no sample": {"x_train": x[:0], "y_train": y[:0]},
        "no feature": {"x_train": np.zeros((12, 0), np.uint8), "y_train": y},
        "huge labels": {"x_train": x, "y_train": y * 10**9},
        "negative labels": {"x_train": x, "y_train": y - 5},
        "one class": {"x_train": x, "y_train": y * 0},
        "complex": {"x_train": x.astype(complex), "y_train": y},
        "dates": {"x_train": x.reshape(12, 4).astype("M8[s]"), "y_train": y},
        "not finite": {"x_train": np.full((12, 4), np.inf), "y_train": y},
        "five dimensions": {"x_train": np.zeros((12, 1, 1, 2, 2), np.uint8), "y_train": y},
        "objects": {"x_train": np.array([None] * 12, dtype=object), "y_train": y},
        "a structure": {"x_train": np.zeros(12, [("a", "f4"), ("b", "i4")]), "y_train": y},
        "truth values": {"x_train": x.astype(bool), "y_train": y.astype(bool)},
    }.items():
        yield Case(
            what,
            path,
            lambda p, arrays=arrays: np.savez(p, **arrays),
            ("evaluate", "resume", "new"),
        )

    def archive(file: Path, member: str, header: bytes) -> None:
        with zipfile.ZipFile(file, "w") as made:
            made.writestr(member, header)

    shape = b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000, 1000000), }"
    magic = b"\x93NUMPY\x01\x00" + len(shape).to_bytes(2, "little") + shape
    for what, member, header in (
        ("a huge shape", "x_train.npy", magic),
        ("no header", "x_train.npy", b""),
        ("a member of another name", "../x_train.npy", magic),
    ):
        yield Case(
            what,
            path,
            lambda p, m=member, h=header: archive(p, m, h),
            ("evaluate", "resume", "new"),
        )
    for case in cut_and_flipped(path, content, generator):
        yield case._replace(commands=("evaluate", "resume", "new"))


def run(arguments: tuple[str, ...]) -> tuple[int, str]:
    """(exit status, stderr) of a command."""
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
        status = main(list(arguments))
    return status, err.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file's bytes by its path."""
    return {str(p): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def faults_of(case: Case, folder: Path) -> Iterator[str]:
    """The faults of the commands with a hostile file, as text.

    `folder` holds the good files and is the current directory.
    """
    good = contents(folder)
    commands = {**COMMANDS, "new": ("train", "data.npz", "--epochs", "1", "--out", "new", *OPTIONS)}
    for name in case.commands:
        path = folder / case.path
        path.unlink()
        case.write(path)
        before = contents(folder)
        status, err = run(commands[name])
        said = [line for line in err.splitlines() if not line.startswith(("note:", "handgrad: n"))]
        where = f"{case.path}: {case.what}: {name}"
        if "HANDGRAD_DEBUG" in err or "Traceback" in err or status not in (0, 2):
            yield f"{where}: {err.strip()}"
        if status == 2 and len(said) != 1:
            yield f"{where}: {len(said)} lines: {err.strip()}"
        if any(not c.isprintable() and c != "\n" for c in err):
            yield f"{where}: control characters: {err!r}"
        if status == 2 and contents(folder) != before and name != "new":
            yield f"{where}: refused, but it changed a file"
        _restore(folder, good)


def _restore(folder: Path, good: dict[str, bytes]) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and path.name != "run":
            path.rmdir()
        elif path.is_file() and str(path) not in good:
            path.unlink()
    for name, content in good.items():
        Path(name).write_bytes(content)


def prepare(folder: Path) -> None:
    """Makes a good run in the current directory `folder`, with its data and an image."""
    from PIL import Image

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (30, 2, 2), dtype=np.uint8)
    np.savez(folder / "data.npz", x_train=pixels, y_train=np.arange(30) % 3)
    Image.fromarray(pixels[0]).save(folder / "image.png")
    options = ("--hidden", "3", "--optimizer", "adam", "--epochs", "2", "--out", "run", *OPTIONS)
    status, err = run(("train", "data.npz", *options))
    assert status == 0, err


def cases(folder: Path, seed: int = 0) -> list[Case]:
    """All variants in random order."""
    generator = random.Random(seed)
    found = [
        case
        for make in (json_cases, weights_cases, state_cases, data_cases)
        for case in make(folder, generator)
    ]
    generator.shuffle(found)
    return found


def check(count: int | None = None, seed: int = 0, quick: bool = False) -> tuple[int, list[str]]:
    """(number of hostile files tried, faults). quick: tries one command for each file, not all."""
    home = os.getcwd()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        os.chdir(folder)
        try:
            prepare(folder)
            chosen = cases(folder, seed)[:count]
            if quick:
                chosen = [
                    case._replace(commands=(case.commands[i % len(case.commands)],))
                    for i, case in enumerate(chosen)
                ]
            return len(chosen), [fault for case in chosen for fault in faults_of(case, folder)]
        finally:
            os.chdir(home)


if __name__ == "__main__":
    tried, faults = check(int(sys.argv[1]) if sys.argv[1:] else None)
    for fault in faults:
        print(fault)
    print(f"{tried} hostile files, {len(faults)} faults")
    sys.exit(bool(faults))
