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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..schema import CheckpointError

CHECKSUM = "handgrad.sha256"  # the checksum's key in the metadata of a .safetensors file
SEALED = "handgrad.network"  # a key in the metadata of every file with a checksum
BLANK = "0" * 64  # the value before the checksum is known
LOCK = ".lock"
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
        _flush(part)
        os.replace(part, path)
        _flush(path.parent)
    finally:
        part.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


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
    system, which frees it when the process ends for any reason.
    """
    import fcntl

    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise BusyError(
                f"{folder}: {holder} is writing this run; wait until it has ended, or choose "
                "another --out"
            ) from None
        # The earlier holder removed the file at its end. A lock on a removed file has no effect.
        if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):
            break
        os.close(descriptor)
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


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
