"""Where the project lies, and what a program started from here finds around it. Imports nothing that may have to be installed first."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def environment(*places: Path, **values: str) -> dict[str, str]:
    """This process's environment with this project, whatever PYTHONPATH names and then `places` to import from, and with `values`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]), *map(str, places)])
    return {**os.environ, "PYTHONPATH": path, **values}


def gpu_driver() -> str:
    """What CAFFELITE_CUDA_DRIVER is to be: what it is, or a GPU."""
    return os.environ.get("CAFFELITE_CUDA_DRIVER") or "cupy"
