"""`handgrad`, or `python -m mlp`: the command line, and what it says when its packages are
missing.
"""

import sys


def main(argv=None) -> int:
    """Run the command line; its exit status: 0, or 2 with one line on stderr."""
    try:
        import typer  # noqa: F401
    except ImportError:
        print(
            "handgrad: the command line needs typer: install the extra, pip install "
            "'handgrad[train]'",
            file=sys.stderr,
        )
        return 2
    from .cli import run

    return run(sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
