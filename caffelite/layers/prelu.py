"""PReLU: a ReLU whose negative slope is learned."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, BufferSpec, ParamSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.schema import SourceMap, pb


@register("PReLU")
class PReLU(Elementwise):
    """y = max(x,0) + a_c min(x,0), x (N,C,...), a (C), or without axes when channel_shared.

    dx = dy where x > 0, else a_c dy; da_c = sum of dy x over x <= 0. In place it keeps a copy of x.
    """

    param_fields = ("prelu_param",)
    in_place = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.prelu_param
        self.shared = options.channel_shared
        self.filler = options.filler if options.HasField("filler") else pb.FillerParameter(type="constant", value=0.25)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        if len(bottoms[0]) < 2:
            raise self.fail(f"PReLU needs a bottom with at least 2 axes (N,C,...), found shape {bottoms[0]}", "bottom")
        return super().infer_shapes(bottoms)

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        return [ParamSpec(() if self.shared else (bottoms[0][1],), self.filler, path=("prelu_param", "filler"))]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        return {"x": BufferSpec(bottoms[0], dtypes[0])} if self.in_place_here and self.keeps else {}

    def backward_reads(self) -> frozenset[str]:
        return frozenset() if self.in_place_here else frozenset((BOTTOM,))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        if self.in_place_here and self.keeps:
            ops.copy(bottoms[0].data, self.buffers["x"])
        ops.prelu_forward(bottoms[0].data, self.params[0].data, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        x, dy, slope = self.buffers["x"] if self.in_place_here else bottoms[0].data, tops[0].diff, self.params[0]
        if slope.learn:  # first: in place, dx overwrites dy
            ops.prelu_backward_slope(x, dy, slope.diff, accumulate=slope.accumulate)
        if propagate_down[0]:
            ops.prelu_backward_data(x, slope.data, dy, bottoms[0].diff)
