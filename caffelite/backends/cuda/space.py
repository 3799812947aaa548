"""Space: scratch memory of one op in several parts."""

from __future__ import annotations

from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.common import Base

ALIGN = 256  # bytes


class Space:
    """Scratch memory with a part of so many bytes for each name; `use` as for Base.scratch."""

    def __init__(self, ops: Base, use: str = "", **sizes: int) -> None:
        self._ops, self._sizes, self._starts, end = ops, sizes, {}, 0
        for name, size in sizes.items():
            self._starts[name] = end
            end += -(-size // ALIGN) * ALIGN
        self._buffer = ops.scratch(end, use) if end else None

    def part(self, name: str, dtype: Any, shape: Ints | None = None) -> Array | None:
        """The part of that name as an array of NumPy type `dtype`, flat where no shape is given, and then None where it has no bytes."""
        if shape is None and not self._sizes[name]:
            return None
        kind = np.dtype(dtype)
        return self._ops.part(self._buffer, self._starts[name], shape or (self._sizes[name] // kind.itemsize,), kind)
