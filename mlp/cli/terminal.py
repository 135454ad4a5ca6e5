"""Output of the command line to the terminal. All of it goes through `say`.

Names, paths and messages come from files and arguments that others made. A control character in
them could clear the screen or forge a line, so it is escaped.
"""

import io
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TextIO


def shown(text: object) -> str:
    """Text as one line for a terminal.

    Characters that are not printable, such as line ends, are written as escapes such as \\x1b.
    """
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text)
    )


def accept_all_characters() -> None:
    """Let stdout and stderr write escapes for the characters that their encodings lack.

    A pipe on Windows often has the encoding cp1252. Otherwise one such character ends a command.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(line: object = "", file: TextIO | None = None) -> None:
    """Print one line at once and in one piece, because several threads may print."""
    print(f"{shown(line)}\n", end="", file=file or sys.stdout, flush=True)


def complain(message: object) -> None:
    """Print one line on stderr, with the program's name before it."""
    say(f"handgrad: {' '.join(str(message).split())}", sys.stderr)


def check_file(path: Path, kept: Iterable[Path] = ()) -> None:
    """ValueError if no file can be written at this path, before the work for it is done.

    kept: files that must not be written over, such as the input.
    """
    if path.exists() and any(one.exists() and path.samefile(one) for one in kept):
        raise ValueError(f"{path}: would be written over, but it is needed; name another file")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}; make it first")


def check_folder(path: Path, option: str = "") -> None:
    """ValueError unless this is a folder. option: what its name stands after, such as "--out "."""
    if not path.is_dir():
        found = "is a file, not a folder" if path.exists() else "there is no such folder"
        raise ValueError(f"{option}{path}: {found}")
