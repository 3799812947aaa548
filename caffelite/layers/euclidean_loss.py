"""EuclideanLoss: half the mean squared distance of two blobs."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from caffelite.backends.contract import Array, Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, BufferSpec, Layer, register
from caffelite.layers.shapes import loaded, stored, target, viewable


@register("EuclideanLoss")
class EuclideanLoss(Layer):
    """loss = sum (a-b)^2 / (2N), N = a's first axis; da = loss_weight (a-b) / N, db = -da.

    Bottoms of equal first axis and count; their other axes may differ, values are paired in Caffe's order.
    """

    bottom_range = (2, 2)
    is_loss = True

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        a, b = bottoms
        if not a or not b or a[0] != b[0] or prod(a) != prod(b):
            raise self.fail(f"bottoms have shapes {a} and {b}", "bottom", 1, hint="give two of the same first axis and the same number of values")
        return [()]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return ["float32"]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        return (
            {}
            if viewable(bottoms[1], bottoms[0])
            else {"b": BufferSpec(bottoms[0], dtypes[1], kept=False), "db": BufferSpec(bottoms[0], dtypes[1], kept=False)}
        )

    def backward_reads(self) -> frozenset[str]:
        return frozenset((BOTTOM,))

    def _second(self, ops: Backend, bottoms: Sequence[Blob]) -> Array:
        return loaded(ops, bottoms[1].data, bottoms[0].shape, self.buffers.get("b"))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.euclidean_loss_forward(bottoms[0].data, self._second(ops, bottoms), tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        a, b, dloss = bottoms[0].data, self._second(ops, bottoms), tops[0].diff
        if propagate_down[0]:
            ops.euclidean_loss_backward(a, b, dloss, bottoms[0].diff, sign=1)
        if propagate_down[1]:
            buffer = self.buffers.get("db")
            ops.euclidean_loss_backward(a, b, dloss, target(bottoms[1].diff, bottoms[0].shape, buffer), sign=-1)
            stored(ops, bottoms[1].diff, buffer)
