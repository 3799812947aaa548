"""Elementwise: the base of layers whose top has the bottom's shape."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.blob import Shape
from caffelite.layer import Layer


class Elementwise(Layer):
    """A top of bottom 0's shape and dtype: class numbers (float32) shifted by a Power layer, say, stay exact in bfloat16."""

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        return [tuple(bottoms[0])]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0]]
