"""Elementwise: the base of layers whose top has the bottom's shape."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.blob import Shape
from caffelite.layer import Layer


class Elementwise(Layer):
    """One bottom, one top of the same shape; in place the top also keeps the bottom's dtype."""

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        return [tuple(bottoms[0])]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0] if self.in_place_here else compute]
