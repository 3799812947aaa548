"""Regroup: the base of layers that give the same values another shape."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend, c_order
from caffelite.blob import Blob, Shape
from caffelite.layer import Layer


class Regroup(Layer):
    """One bottom, one top with the same values in Caffe's order, and of the same dtype; dx is dy in the bottom's shape."""

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0]]

    def runs(self, bottoms: Sequence[Shape]) -> list[int] | None:
        """[0] where the top's values lie in memory as the bottom's do, else None."""
        return [0] if c_order(bottoms[0]) and c_order(self.infer_shapes(bottoms)[0]) else None

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        if not self.held_data:
            ops.copy(bottoms[0].data, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0] and not self.held_diffs:
            ops.copy(tops[0].diff, bottoms[0].diff)
