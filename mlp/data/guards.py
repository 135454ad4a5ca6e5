"""Checks of a file before it is read: what it is, and whether its contents fit into memory."""

import os
import stat
import sys
from pathlib import Path

from .dataset import DataError

# A file may grow to this many bytes, or to _GROWTH times its own size, whichever is more.
_HARMLESS = 2**28
_GROWTH = 100


def check_regular(path: Path) -> None:
    """DataError if the path is no regular file. Opening a pipe or a device might never return."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not stat.S_ISREG(mode):
        kinds = (
            (stat.S_ISFIFO, "a pipe"),
            (stat.S_ISCHR, "a device"),
            (stat.S_ISBLK, "a device"),
            (stat.S_ISSOCK, "a socket"),
            (stat.S_ISDIR, "a folder"),
        )
        kind = next((said for is_kind, said in kinds if is_kind(mode)), "no regular file")
        raise DataError(f"{path}: is {kind}, not a file; save the data to a file first")


def memory() -> int:
    """Bytes of this machine's memory. A data set may take at most half of it."""
    if sys.platform == "win32":
        import ctypes

        # A MEMORYSTATUSEX: its size in bytes, and a percentage, in the first number. The second
        # number is the memory.
        status = (ctypes.c_uint64 * 8)(64)
        if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):
            return status[1]
    elif {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= getattr(os, "sysconf_names", {}).keys():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return 2**34  # the system does not tell it


def check_size(size: int, packed: int | None, what: str) -> None:
    """DataError if `size` bytes are more than half the memory, or suspiciously many for a file.

    packed: the bytes in the file, or None if they are not compressed. `what` starts the message.
    """
    if packed is not None and size > max(_HARMLESS, _GROWTH * packed):
        raise DataError(
            f"{what}: {packed:,} bytes would grow to {size:,} when unpacked; save them "
            "unpacked if that is intended"
        )
    if size > memory() // 2:
        raise DataError(
            f"{what}: takes {size / 2**30:,.1f} GiB, more than half of the "
            f"{memory() / 2**30:,.1f} GiB of memory here; store fewer samples or a smaller dtype"
        )
