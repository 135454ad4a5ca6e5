"""Files that are complete or absent, that show damage, and that one process writes at a time.

A file is written under another name, flushed to the disk, and renamed. So a kill or a full disk at
any moment leaves the earlier file. Checksums are SHA-256. They are inside the file:

    .safetensors   in the header's metadata, over the file with zeros as the checksum's digits
    .ckpt          in the comment at the end of torch's zip archive, over all bytes before it
"""

import glob
import hashlib
import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..schema import CheckpointError

CHECKSUM = "handgrad.sha256"  # the checksum's key in the metadata of a .safetensors file
SEALED = "handgrad.network"  # a key in the metadata of every file with a checksum
BLANK = "0" * 64  # the value before the checksum is known
LOCK = ".lock"  # stays in the folder. A process that removes it may take away another's lock.
WRITER = ".writer"  # names the process that holds the lock
_WINDOWS = os.name == "nt"
_PATIENCE, _PAUSE = 3.0, 0.05  # seconds in which a rename is tried again on Windows, and between
_DIGITS = re.compile(rb'"handgrad.sha256":"([0-9a-f]{64})"')
_PART = re.compile(r"\..+\.(\d+)\.part")
_ZIP_MARK = b"handgrad sha256 "
_ZIP_COMMENT = len(_ZIP_MARK) + 64
_PIECE = 1 << 20  # bytes that are read at once


class BusyError(OSError):
    """Another process writes to the folder. The message is one line."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to. At the end its file replaces `path`.

    If writing fails, `path` is not changed.
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    _remove_dead_parts(path)
    try:
        yield part
        mask = os.umask(0)
        os.umask(mask)
        part.chmod(0o666 & ~mask)  # safetensors makes files that only their owner can read
        _flush(part, os.O_RDWR)  # Windows flushes only what may be written
        move(part, path)
        if not _WINDOWS:  # it cannot open a folder
            _flush(path.parent, os.O_RDONLY)
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path, mode: int) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, mode)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def move(source: Path, target: Path) -> None:
    """Rename a file, and replace the target if there is one.

    Windows refuses this while a program has one of the two open. A virus scanner ends soon, so it
    is tried again for some seconds. PermissionError, in one line, if it stays open.
    """
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if not _WINDOWS:
                raise
            if time.monotonic() > deadline:
                raise PermissionError(
                    f"{target}: cannot be replaced, because another program has it open; close it "
                    "there"
                ) from None
        time.sleep(_PAUSE)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content by UTF-8 text. Its line ends are written as they are."""
    with replacing(path) as part:
        part.write_bytes(text.encode())


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of `replacing` from a folder that this process has locked."""
    for part in folder.glob(".*.part"):
        if _PART.fullmatch(part.name):
            part.unlink(missing_ok=True)


def _remove_dead_parts(path: Path) -> None:
    """Remove temporary files of `replacing` for one file, left by processes that were killed."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        match = _PART.fullmatch(part.name)
        if match and not _lives(int(match[1])):
            part.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """True if the process may still run. It is not asked on Windows, where os.kill would end it."""
    if _WINDOWS:
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """A context in which only this process writes to a folder.

    BusyError if another process does. It names that process. The lock is one of the operating
    system, which frees it when the process ends for any reason. OSError if the folder cannot be
    locked, as on some network disks.
    """
    from filelock import FileLock, Timeout  # torch needs it too

    writer = folder / WRITER
    try:
        # Who may write to the folder may lock it later, because the file stays.
        mode = 0o600 | folder.stat().st_mode & 0o066
        lock = FileLock(folder / LOCK, timeout=0, mode=mode)
        lock.acquire()
    except Timeout:
        raise BusyError(
            f"{folder}: {_holder(writer)} is writing this run; wait until it has ended, or choose "
            "another --out"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise OSError(f"{folder}: cannot be locked ({error}); choose another --out") from None
    try:
        writer.unlink(missing_ok=True)  # of a process that was killed, perhaps another user's
        writer.write_text(f"process {os.getpid()} on {socket.gethostname()}", encoding="utf-8")
        yield
    finally:
        with suppress(OSError):  # on Windows, while another process reads it
            writer.unlink(missing_ok=True)
        lock.release()


def _holder(writer: Path) -> str:
    """The process that holds the lock, as it names itself in this file."""
    try:
        return writer.read_text(encoding="utf-8", errors="replace").strip() or "another process"
    except OSError:  # it has not written its name yet, or has just ended
        return "another process"


def seal_safetensors(path: Path) -> None:
    """Write the checksum into a file whose metadata holds BLANK in its place."""
    with path.open("r+b") as file:
        header = _header(file, path)
        at = _DIGITS.search(header)
        if at is None:
            raise ValueError(f"{path}: its metadata holds no place for a checksum")
        digest = _digest(file, header)
        file.seek(at.start(1))
        file.write(digest.encode())


def check_safetensors(path: Path) -> bool:
    """True if a .safetensors file has a checksum. CheckpointError if the checksum is wrong."""
    with path.open("rb") as file:
        header = _header(file, path)
        at = _DIGITS.search(header)
        if at is None:
            if f'"{SEALED}"'.encode() in header:
                raise CheckpointError(f"{path}: damaged, its checksum is gone")
            return False
        blank = header[: at.start(1)] + BLANK.encode() + header[at.end(1) :]
        if _digest(file, blank) != at[1].decode():
            raise CheckpointError(f"{path}: damaged, its content does not match its checksum")
    return True


def _header(file, path: Path) -> bytes:
    """The length and the JSON that begin a .safetensors file. Both are read from `file`."""
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > os.fstat(file.fileno()).st_size - 8:
        raise CheckpointError(f"{path}: not a readable safetensors file (its header is cut)")
    return start + file.read(length)


def _digest(file, first: bytes = b"") -> str:
    """The SHA-256 of `first` and the rest of the file."""
    digest = hashlib.sha256(first)
    while piece := file.read(_PIECE):
        digest.update(piece)
    return digest.hexdigest()


def seal_zip(path: Path) -> None:
    """Write the checksum of a zip archive into its comment. torch.load still reads the file."""
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)  # the comment's length, so far 0
        file.write(_ZIP_COMMENT.to_bytes(2, "little"))
        file.seek(0)
        digest = _digest(file)
        file.write(_ZIP_MARK + digest.encode())


def read_zip(path: Path) -> bytes:
    """The content of a file that `seal_zip` sealed. CheckpointError if it is damaged."""
    content = path.read_bytes()
    body, comment = content[:-_ZIP_COMMENT], content[-_ZIP_COMMENT:]
    if comment != _ZIP_MARK + hashlib.sha256(body).hexdigest().encode():
        raise CheckpointError(f"{path}: damaged, its content does not match its checksum")
    return content
