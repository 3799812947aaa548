"""Where compiled kernels are kept: CAFFELITE_CACHE, or caffelite/ in the user's cache folder.

A kept file ends with the SHA-256 of all before it, which what reads it (a loader, a linker) passes over: one that a crash or a full disk
has cut short is known by it and made again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from caffelite import environment
from caffelite.errors import BackendError
from caffelite.files import is_alive

LEFT_OVER = 600  # seconds: a folder may be shared with another machine, whose processes are not seen here


def folder(kind: str) -> Path:
    """The folder for compiled programs of a kind, made at need. BackendError when it cannot be made."""
    given = environment.text(environment.CACHE)
    root = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "caffelite"
    try:
        (root / kind).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BackendError(
            f"cannot make the folder for compiled kernels {root / kind}: {error.strerror}", hint="name another one in CAFFELITE_CACHE"
        ) from error
    if not os.access(root / kind, os.W_OK):
        raise BackendError(f"the folder for compiled kernels {root / kind} cannot be written to", hint="name another one in CAFFELITE_CACHE")
    return root / kind


def content(target: Path) -> bytes | None:
    """What was kept under that name, without its checksum; None where there is nothing, or nothing whole."""
    try:
        held = target.read_bytes()
    except OSError:
        return None
    found, checksum = held[:-32], held[-32:]
    return found if hashlib.sha256(found).digest() == checksum else None


def once(target: Path, make: Callable[[Path], object], tell: Callable[[], object] = lambda: None) -> None:
    """Makes a file beside its place with make(path) and renames it, unless it is there already and whole. tell: called before it is made."""
    if content(target) is not None:
        return
    tell()
    made = target.with_name(f"{os.getpid()}-{target.name}")
    try:
        _sweep(target.parent)
        make(made)
        with made.open("rb+") as file:
            checksum = hashlib.sha256(file.read()).digest()
            file.write(checksum)
            file.flush()
            os.fsync(file.fileno())
        made.replace(target)
    except OSError as error:
        raise BackendError(f"cannot write the compiled kernels {target}: {error.strerror}", hint="name another folder in CAFFELITE_CACHE") from error
    finally:
        made.unlink(missing_ok=True)


def _sweep(place: Path) -> None:
    """Removes what processes that were killed have left: files named after them."""
    for path in place.iterdir():
        owner = re.match(r"(\d+)-", path.name)
        if owner and not is_alive(int(owner[1])):
            with suppress(FileNotFoundError):  # another process sweeps too
                if time.time() - path.stat().st_mtime > LEFT_OVER:
                    path.unlink()
