"""`python -m bench [NAME …] [--out DIR]`: run benchmarks, print their tables, and write them as Markdown and JSON."""

import argparse
import importlib
import sys
from pathlib import Path

NAMES = ("linear", "cross_entropy", "train", "recipes", "launches")


def main() -> int:
    """Run the benchmarks that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all if none is given")
    parser.add_argument("--out", type=Path, help="folder for NAME.md and NAME.json")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(NAMES)}")
    for name in arguments.names or NAMES:
        table = importlib.import_module(f"bench.bench_{name}").run()
        print(table.markdown(), end="\n\n", flush=True)
        if arguments.out:
            table.write(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
