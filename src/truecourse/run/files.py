"""Writing so that a kill at any instant leaves each file as it was or as it should be."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from truecourse.errors import RunError


def write_atomically(path: Path, data: bytes) -> None:
    """Write aside (`.NAME.tmp`), flush to the disk, rename: `path` holds its old content or all of the new.

    Raises `RunError` naming the path and the free space; nothing is left aside then.
    """
    aside = path.with_name(f".{path.name}.tmp")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, path)
        sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise RunError(disk_message("write", path, error)) from error


def append_line(path: Path, line: bytes) -> None:
    """Append `line` (with its newline) in one write and flush it to the disk; all of it or none of it.

    A last line that an earlier kill cut short is removed first, so that two records never run into one.
    Raises `RunError` naming the path and the free space.
    """
    assert line.endswith(b"\n") and line.count(b"\n") == 1, "one line"
    try:
        fd = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            size = os.fstat(fd).st_size
            if size and os.pread(fd, 1, size - 1) != b"\n":
                size = path.read_bytes().rfind(b"\n") + 1
                os.ftruncate(fd, size)
            try:
                while line:  # a disk that fills up takes a part first, then raises
                    line = line[os.write(fd, line) :]
                os.fsync(fd)
            except OSError:
                os.ftruncate(fd, size)
                raise
        finally:
            os.close(fd)
    except OSError as error:
        raise RunError(disk_message("append to", path, error)) from error


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def disk_message(verb: str, path: Path, error: BaseException) -> str:
    """What could not be done, why, how much room there is, and what to do about it."""
    where = path
    while not where.exists() and where != where.parent:
        where = where.parent
    try:
        room = f"; {shutil.disk_usage(where).free / 2**20:,.1f} MiB are free there"
    except OSError:
        room = ""
    return (
        f"could not {verb} {path}: {reason(error)}{room}. Make room, or make the folder writable, then go on with "
        "`truecourse resume`: everything written before is whole"
    )


def reason(error: BaseException) -> str:
    """The system's words for an error: "No space left on device"."""
    found = FROM_RUST.search(str(error))
    return getattr(error, "strerror", None) or (found[1] if found else str(error))


def is_disk_error(error: BaseException) -> bool:
    """Whether the file system refused something; safetensors and tokenizers say so in exceptions of their own."""
    return isinstance(error, OSError) or bool(FROM_RUST.search(str(error)))


FROM_RUST = re.compile(r"([A-Z][\w ]*) \(os error \d+\)")
