"""Module: one file of kernels/ and the kernels in it, each by its C++ name with its template arguments."""

from __future__ import annotations

import hashlib
import re
from itertools import product
from pathlib import Path

FOLDER = Path(__file__).parent / "kernels"
TYPES = ("float", "bf16")  # how activations are stored


class Module:
    """kernels/<stem>.cu with the name expressions of kernels in it, such as "relu_forward<bf16>".

    part: names one of several modules that share a file and divide its kernels, each compiled when one of its own is needed. only: the one
    architecture that it compiles for, such as "sm_90a"; else it compiles for all."""

    def __init__(self, stem: str, names: list[str], part: str = "", only: str = "") -> None:
        self.stem, self.names, self.only = stem, tuple(names), only
        self.name = f"{stem}-{part}" if part else stem

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.stem}.cu"

    def sources(self) -> list[Path]:
        """Its file and the headers in FOLDER that this one includes, directly or not: what decides what the module compiles to."""
        found = [self.path]
        for path in found:
            included = [FOLDER / name for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)]
            found += [header for header in included if header.exists() and header not in found]
        return found


def typed(*kernels: str, arguments: int = 1) -> list[str]:
    """Each kernel with every choice of `arguments` activation types: typed("k") gives k<float> and k<bf16>."""
    return [f"{kernel}<{', '.join(types)}>" for kernel in kernels for types in product(TYPES, repeat=arguments)]


def digest(*parts: object) -> str:
    """A name for the contents of files (paths) and the values of everything else."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part.read_bytes() if isinstance(part, Path) else repr(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:20]
