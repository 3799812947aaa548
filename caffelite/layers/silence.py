"""Silence: takes blobs that nobody else uses."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import Layer, register


@register("Silence")
class Silence(Layer):
    """No tops: its bottoms do not become outputs of the net. dx = 0."""

    bottom_range = (1, None)
    top_range = (0, 0)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        return []

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return []

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        """Nothing."""

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        for bottom, wanted in zip(bottoms, propagate_down):
            if wanted:
                ops.fill(bottom.diff, 0.0)
