"""Softmax: y = exp(x) / sum exp(x) along an axis."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import TOP, register
from caffelite.layers.elementwise import Elementwise
from caffelite.layers.shapes import axis_index


@register("Softmax")
class Softmax(Elementwise):
    """Any shape; the largest value along the axis is subtracted first. dx = y (dy - sum along axis of dy y). In place allowed."""

    param_fields = ("softmax_param",)
    in_place = True

    def _axis(self, shape: Shape) -> int:
        return axis_index(self, self.param.softmax_param.axis, len(shape), "softmax_param", "axis")

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        self._axis(bottoms[0])
        return super().infer_shapes(bottoms)

    def backward_reads(self) -> frozenset[str]:
        return frozenset((TOP,))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.softmax_forward(bottoms[0].data, tops[0].data, axis=self._axis(bottoms[0].shape))

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            ops.softmax_backward(tops[0].data, tops[0].diff, bottoms[0].diff, axis=self._axis(bottoms[0].shape))
