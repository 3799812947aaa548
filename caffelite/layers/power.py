"""Power: y = (shift + scale x)^power."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob
from caffelite.layer import BOTTOM, TOP, register
from caffelite.layers.elementwise import Elementwise
from caffelite.schema import SourceMap, pb


@register("Power")
class Power(Elementwise):
    """Any shape. dx = dy power scale (shift + scale x)^(power-1); NaN where that divides 0 by 0, as in Caffe."""

    param_fields = ("power_param",)
    in_place_forward = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.power, self.scale, self.shift = param.power_param.power, param.power_param.scale, param.power_param.shift

    def backward_reads(self) -> frozenset[str]:
        return frozenset((BOTTOM, TOP))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.power_forward(bottoms[0].data, tops[0].data, power=self.power, scale=self.scale, shift=self.shift)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            x, y, dy, dx = bottoms[0].data, tops[0].data, tops[0].diff, bottoms[0].diff
            ops.power_backward(x, y, dy, dx, power=self.power, scale=self.scale, shift=self.shift)
