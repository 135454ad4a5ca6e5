"""Benchmarks: `python -m bench NAME … [--out DIR]` for single tables, `python -m bench all --out
DIR` for everything.

NAME … makes those tables, one after another, in this process.

`all` runs compilation, `handgrad info`, the tests, compute-sanitizer, the exchange, the soak, then
every other table. Each part has a process of its own and a time limit. After each part `all`
rewrites DIR/summary.md and DIR/summary.json. On a GPU it stops after nine minutes, and --resume
goes on from there. --only runs the named parts. On a CPU, parts that need a GPU are listed as not
run. The exit status is 1 if a part failed, but the other parts still run.

It needs torch, triton, numpy and pytest. Images are MNIST's if $HANDGRAD_DATA and torchvision are
there, else random pixels.
"""

import argparse
import importlib
import signal
import sys
from pathlib import Path

import torch

from mlp.data import MissingPackage

from . import parts, suite
from .table import Table

NAMES = {
    "linear": "a linear layer with activation, forward and backward",
    "losses": "losses, forward and backward",
    "train": "a training step with SGD: every engine, eager, compiled, captured",
    "cpu": "a training step on a CPU: ours, eager, compiled, JAX, scikit-learn, numpy; minutes",
    "adam": "a training step with Adam: every engine, torch's variants",
    "sweep": "many networks at once",
    "search": "a search for settings by cross-validation, beside scikit-learn's; minutes on a CPU",
    "accuracy": "the estimators beside scikit-learn's on five data sets",
    "memory": "peak memory of a step of wide layers; without a GPU, counted from tensors",
    "trainer": "the time of an epoch of the trainer by part: steps, test rows, the rest",
    "mnist": "seconds to 97%, 98% and 98.4% on MNIST: ours, eager torch, scikit-learn",
    "recipes": "the reference recipes against the usual loop with a DataLoader",
    "launches": "kernel launches and memory traffic a step, counted",
    "exchange": "the epoch kernel's exchange alone (GPU)",
    "soak": "thousands of epochs twice, bitwise equal, no hang (GPU)",
}


def _parser() -> argparse.ArgumentParser:
    listed = "\n".join(f"  {name:<14} {what}" for name, what in NAMES.items())
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        epilog=f"tables:\n{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="tables, see below; or all, alone")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for NAME.md and NAME.json, with all for the summary too",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="epochs of soak, by default 10,000 on a GPU, fewer in all",
    )
    parser.add_argument(
        "--skip",
        default="",
        metavar="PARTS",
        help="with all: leave out these parts, separated by commas, such as tests-mlp,soak",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="PARTS",
        help="with all: run only these parts, separated by commas; with mnist: only these rows",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", help="with mnist: networks a row, by default 3 to 10"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="with all: leave out the parts that passed before on this commit and machine",
    )
    return parser


def main() -> int:
    """Makes the named tables, or runs all parts. Returns the exit status."""
    parser = _parser()
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES and name != "all"]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(NAMES)}; all")
    if "all" in arguments.names:
        return _all(parser, arguments)
    if reason := _misplaced(arguments):
        parser.error(reason)
    options: dict[str, dict] = {
        "soak": {"epochs": arguments.epochs},
        "mnist": {"seeds": arguments.seeds, "only": _names(arguments.only)},
    }
    tables = []
    for name in arguments.names:
        try:
            tables.append(make(name, options.get(name, {})))
        except ValueError as wrong:
            parser.error(str(wrong))
        print(tables[-1].markdown(), end="\n\n", flush=True)
        if arguments.out:
            tables[-1].write(arguments.out)
    return int(any(table.failed for table in tables))


def _misplaced(arguments: argparse.Namespace) -> str:
    """The fault in the options for single tables, or ""."""
    names = arguments.names
    if arguments.skip or arguments.resume:
        return "--skip and --resume are options of all"
    if arguments.epochs is not None and ("soak" not in names or arguments.epochs < 1):
        return "--epochs, at least 1, is an option of soak"
    if arguments.seeds is not None and ("mnist" not in names or arguments.seeds < 1):
        return "--seeds, at least 1, is an option of mnist"
    if arguments.only and "mnist" not in names:
        return "--only is an option of all and of mnist"
    return ""


def _names(text: str) -> list[str]:
    """The names in a text that separates them by commas."""
    return [name for name in text.split(",") if name]


def make(name: str, options: dict) -> Table:
    """The table `name`. It has no rows, but a reason, where a package is not installed."""
    try:
        return importlib.import_module(f"bench.bench_{name}").run(**options)
    except ModuleNotFoundError as missing:
        reason = f"needs the package {missing.name}"
    except MissingPackage as missing:  # which a function of mlp needs
        reason = str(missing)
    return Table(NAMES[name].capitalize(), f"python -m bench {name}", not_run=reason)


def _all(parser, arguments) -> int:
    if arguments.names != ["all"] or arguments.out is None or arguments.epochs is not None:
        parser.error(
            "all runs every table: give it --out DIR, a folder for its summary, but no other NAME "
            "and no --epochs"
        )
    out = arguments.out.resolve()
    todo = parts.parts(out)
    known = [part.name for part in todo]
    skip, only = _names(arguments.skip), _names(arguments.only)
    for option, names in (("--skip", skip), ("--only", only)):
        if unknown := [name for name in names if name not in known]:
            parser.error(f"{option}: unknown part {unknown[0]!r}; known: {', '.join(known)}")
    skip += [name for name in known if only and name not in only]
    # sys.exit raises an exception, which also ends the part that runs
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    limit = suite.GPU_SECONDS if torch.cuda.is_available() else None
    status = suite.run(todo, out, skip, limit, arguments.resume)
    print(f"summary: {out / 'summary.md'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
