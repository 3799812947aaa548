"""Regroup: the base of layers that give the same values another shape."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob
from caffelite.layer import Layer


class Regroup(Layer):
    """One bottom, one top with the same values in Caffe's order, and of the same dtype; dx is dy in the bottom's shape."""

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0]]

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.copy(bottoms[0].data, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            ops.copy(tops[0].diff, bottoms[0].diff)
