"""Where compiled kernels are kept: CAFFELITE_CACHE, or caffelite/ in the user's cache folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from caffelite.errors import BackendError


def folder(kind: str) -> Path:
    """The folder for compiled programs of a kind, made at need. BackendError when it cannot be made."""
    given = os.environ.get("CAFFELITE_CACHE")
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


def once(target: Path, make: Callable[[Path], object]) -> None:
    """Makes a file beside its place with make(path) and renames it, unless it is there already."""
    if target.exists():
        return
    made = target.with_name(f"{os.getpid()}-{target.name}")
    try:
        make(made)
        with made.open("rb") as file:
            os.fsync(file.fileno())
        made.replace(target)
    except OSError as error:
        raise BackendError(f"cannot write the compiled kernels {target}: {error.strerror}", hint="name another folder in CAFFELITE_CACHE") from error
    finally:
        made.unlink(missing_ok=True)
