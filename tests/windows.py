"""A Python that lacks what Windows lacks: `python -m tests.windows COMMAND OF HANDGRAD`.

It imitates the rules that end a program there, so far as Linux can:

- stdout and stderr are pipes with the encoding cp1252, and files without an encoding too;
- `os` has no functions of POSIX, and os.kill ends a process whatever the signal;
- a folder cannot be opened, only what may be written can be flushed, and an open file can be
  neither replaced nor removed;
- the names of files may not hold some characters.

Only the library's own code lacks functions, because other packages have builds of their own for
Windows. Several commands are separated by a word "then".
"""

import builtins
import io
import os
import pathlib
import stat
import sys
import types
from pathlib import Path

POSIX = (
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "getpgid", "setsid", "killpg", "nice"),
    *("sysconf", "sysconf_names", "register_at_fork", "sched_getaffinity", "sched_setaffinity"),
    *("sched_yield", "uname", "mkfifo", "chown", "fchmod", "fchown", "getloadavg", "statvfs"),
    *("O_DIRECTORY", "O_NONBLOCK", "O_NOFOLLOW", "O_CLOEXEC", "pread", "pwrite", "fdatasync"),
)
MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "posix")
RESERVED = set('<>:"|?*')
OURS = str(Path(__file__).parent.parent)
_REAL = types.SimpleNamespace(
    open=io.open, os_open=os.open, fsync=os.fsync, replace=os.replace, unlink=os.unlink
)


def _called_from(*places: str) -> bool:
    """True if a function replaced here was called from a file of these, or through pathlib."""
    frame = sys._getframe(2)
    while frame is not None and "pathlib" in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None and any(place in frame.f_code.co_filename for place in places)


def _open_files() -> set[str]:
    """The files that this process has open or mapped into memory."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{entry}"))
        except OSError:  # that of listdir
            continue
    maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    return found | {line.split(maxsplit=5)[5] for line in maps.splitlines() if line.count("/")}


def _refuse_open(*paths) -> None:
    busy = {os.path.realpath(path) for path in paths} & _open_files()
    if busy:
        raise PermissionError(13, f"used by another process: {busy}")


def _check_name(path) -> None:
    if isinstance(path, (str, os.PathLike)) and RESERVED & set(os.fspath(path)):
        raise OSError(22, f"Invalid argument: {path}")


def _importer(real):
    """`__import__`, with which the library's code finds an `os` without POSIX."""
    lacking = types.ModuleType("os")
    vars(lacking).update({name: v for name, v in vars(os).items() if name not in POSIX})

    def imported(name, globals=None, locals=None, fromlist=(), level=0):
        if not level and (globals or {}).get("__name__", "").startswith(("mlp", "kernels")):
            if name in MODULES:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name == "os":
                return lacking
        return real(name, globals, locals, fromlist, level)

    return imported


def _opened(file, mode="r", buffering=-1, encoding=None, errors=None, newline=None, *rest, **more):
    """`open`, with the encoding and the line ends of Windows."""
    if isinstance(file, int):
        return _REAL.open(file, mode, buffering, encoding, errors, newline, *rest, **more)
    if (
        "b" not in mode
        and encoding in (None, "locale")
        and _called_from(f"{OURS}/mlp", f"{OURS}/kernels")
    ):
        encoding = "cp1252"
    if any(letter in mode for letter in "wax+"):
        _check_name(file)
    if "w" in mode and "b" not in mode and newline is None:
        newline = "\r\n"
    return _REAL.open(file, mode, buffering, encoding, errors, newline, *rest, **more)


def _os_opened(path, flags, mode=0o777, **more):
    """`os.open`, which opens no folder."""
    if not _called_from("filelock", "shutil") and stat.S_ISDIR(
        os.stat(path).st_mode if os.path.exists(path) else 0
    ):
        raise PermissionError(13, f"Permission denied: {path}")
    return _REAL.os_open(path, flags, mode, **more)


def _flushed(descriptor):
    """`os.fsync` of what may be written."""
    flags = Path(f"/proc/self/fdinfo/{descriptor}").read_text(encoding="utf-8").split()
    if int(flags[flags.index("flags:") + 1], 8) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(9, "Bad file descriptor")
    _REAL.fsync(descriptor)


def _replaced(source, target, **more):
    """`os.replace` of files that are not open."""
    _check_name(target)
    _refuse_open(source, target)
    _REAL.replace(source, target, **more)


def _unlinked(path, **more):
    """`os.unlink` of a file that is not open."""
    if not _called_from("filelock"):  # it has another file for Windows
        _refuse_open(path)
    _REAL.unlink(path, **more)


def _killed(process, number):
    """`os.kill`."""
    raise AssertionError("os.kill would end the process")


def imitate() -> None:
    """Makes this process one of Windows."""
    builtins.open = io.open = _opened
    if hasattr(pathlib, "io"):
        pathlib.io.open = _opened
    os.open, os.fsync, os.replace, os.kill = _os_opened, _flushed, _replaced, _killed
    os.unlink = os.remove = _unlinked
    builtins.__import__ = _importer(builtins.__import__)


def main(words: list[str]) -> int:
    """Runs the commands, and returns the largest exit status."""
    imitate()
    for name in ("stdout", "stderr"):
        raw = getattr(sys, name).detach()
        setattr(sys, name, io.TextIOWrapper(raw, "cp1252", line_buffering=True))
    from mlp.runs import disk

    disk._WINDOWS = True
    from mlp.__main__ import main as handgrad

    worst, command = 0, []
    for word in [*words, "then"]:
        if word != "then":
            command.append(word)
            continue
        worst = max(worst, handgrad(command))
        command = []
    return worst


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
