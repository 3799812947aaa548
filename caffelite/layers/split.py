"""Split: gives one blob to several layers; the graph inserts it."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, Layer, register


@register("Split")
class Split(Layer):
    """Every top is the bottom's own memory; dx = the sum of the tops' diffs, added in their order."""

    top_range = (1, None)
    shares_data = True

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        return [tuple(bottoms[0])] * len(self.param.top)

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0]] * len(self.param.top)

    def backward_reads(self) -> frozenset[str]:
        return frozenset((BOTTOM,)) if self.relu_bottoms else frozenset()

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        return True

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        """Nothing: the tops are the bottom."""

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            positive = bottoms[0].data if self.relu_bottoms else None
            ops.eltwise_sum([top.diff for top in tops], bottoms[0].diff, [1.0] * len(tops), positive)
