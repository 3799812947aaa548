"""ReLU: y = max(x,0) + negative_slope min(x,0)."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, SIGN, BufferSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.schema import SourceMap, pb


@register("ReLU")
class ReLU(Elementwise):
    """Any shape. dx = dy where x > 0, else negative_slope dy.

    With a slope of 0 or more the sign of y tells that of x, so backward reads no more than that and in place is free.
    A negative slope loses the sign: backward then reads x, or in place a copy of it.
    """

    param_fields = ("relu_param",)
    in_place = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.slope = param.relu_param.negative_slope
        self.keeps_sign = self.slope >= 0  # type: ignore[misc]  # true for most, not for every ReLU

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        if self.slope >= 0:
            return {}
        slope = {"slope": BufferSpec((), "float32")}
        return slope | {"x": BufferSpec(bottoms[0], dtypes[0])} if self.in_place_here else slope

    def backward_reads(self) -> frozenset[str]:
        if self.slope >= 0:
            return frozenset((SIGN,))
        return frozenset() if self.in_place_here else frozenset((BOTTOM,))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        if self.slope >= 0:
            ops.relu_forward(bottoms[0].data, tops[0].data, slope=self.slope)
            return
        if self.in_place_here:
            ops.copy(bottoms[0].data, self.buffers["x"])
        ops.fill(self.buffers["slope"], self.slope)
        ops.prelu_forward(bottoms[0].data, self.buffers["slope"], tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if not propagate_down[0]:
            return
        if self.slope >= 0:
            ops.relu_backward(tops[0].data, tops[0].diff, bottoms[0].diff, slope=self.slope)
            return
        x = self.buffers["x"] if self.in_place_here else bottoms[0].data
        ops.prelu_backward_data(x, self.buffers["slope"], tops[0].diff, bottoms[0].diff)
