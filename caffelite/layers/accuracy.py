"""Accuracy: the part of positions whose true class is among the top_k scores."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import Layer, register
from caffelite.layers.shapes import axis_index, check_labels
from caffelite.schema import SourceMap, pb


@register("Accuracy")
class Accuracy(Layer):
    """Bottoms: scores, and one class number for each position outside accuracy_param.axis. Top 0 has no axes; top 1, if there, (C).

    A position is correct when fewer than top_k other classes score at least as much as the true one: ties count against it.
    top 0 = correct / positions not ignored (0 if there are none); top 1 = the same for each class. No gradient.
    A label outside 0..classes-1 is a DataError.
    """

    bottom_range = (2, 2)
    top_range = (1, 2)
    param_fields = ("accuracy_param",)
    differentiable = ()

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.accuracy_param
        self.top_k = options.top_k
        self.ignore_label = options.ignore_label if options.HasField("ignore_label") else None
        if self.top_k < 1:
            raise self.fail("top_k is 0", "accuracy_param", "top_k", hint="give 1 or more")

    def _axis(self, shape: Shape) -> int:
        return axis_index(self, self.param.accuracy_param.axis, len(shape), "accuracy_param", "axis")

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        axis = self._axis(bottoms[0])
        check_labels(self, bottoms[0], bottoms[1], axis)
        classes = bottoms[0][axis]
        if self.top_k > classes:
            raise self.fail(f"top_k is {self.top_k}, but there are {classes} classes", "accuracy_param", "top_k", hint=f"give at most {classes}")
        return [(), (classes,)][: len(self.param.top)]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return ["float32"] * len(self.param.top)

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.accuracy(
            bottoms[0].data,
            bottoms[1].data,
            tops[0].data,
            tops[1].data if len(tops) > 1 else None,
            top_k=self.top_k,
            axis=self._axis(bottoms[0].shape),
            ignore_label=self.ignore_label,
        )

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        """Nothing: a count has no gradient, and the graph refuses to ask for one."""
