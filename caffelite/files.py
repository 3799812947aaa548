"""Files that are never half-written: beside, flushed to disk, renamed into place (design.md, decision 10)."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from caffelite.errors import SnapshotError


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Calls write(file) on a file of another name beside `path`, syncs it and renames it to `path`.

    Whatever goes wrong (a full disk, a kill), `path` holds either its old contents or all of the new ones.
    SnapshotError when the file cannot be written; the partial file is removed.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_directory(path.parent)
    except OSError as error:
        raise SnapshotError(f"cannot write {path}: {error.strerror or error}", hint=_advice(error)) from error
    finally:
        partial.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether there is a process of that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def sync_directory(path: Path) -> None:
    """Makes a rename in `path` last through a power cut; does nothing where directories cannot be opened."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def _advice(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk or quota is full: make room; files written before are whole"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder you can write to"
    return "the folder must exist and be writable; files written before are whole"
