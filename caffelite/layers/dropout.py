"""Dropout: zeroes a random part of its input while training."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend, Drop, DropoutKey
from caffelite.blob import Blob, Shape
from caffelite.layer import SIGN, BufferSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.schema import SourceMap, pb


@register("Dropout")
class Dropout(Elementwise):
    """TRAIN: y = x m / (1-r), m in {0,1} drawn anew in each forward, P(m=1) = 1-r. TEST: y = x.

    The mask is a function of the run's seed, the layer's name and the number of the forward pass. In place allowed.
    """

    param_fields = ("dropout_param",)
    in_place = True
    keeps_sign = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.ratio = param.dropout_param.dropout_ratio
        if not 0 <= self.ratio < 1:
            raise self.fail(f"dropout_ratio is {self.ratio:g}", "dropout_param", "dropout_ratio", hint="give the part to drop: at least 0 and below 1")

    @property
    def key(self) -> DropoutKey:
        """Names the mask of the forward pass under way."""
        return DropoutKey(self.context.seed, self.stream, self.context.pass_number)

    @property
    def drop(self) -> Drop:
        """The same with the ratio, for an op that drops on its way."""
        return Drop(self.ratio, self.key)

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        return {"mask": BufferSpec(bottoms[0], "uint8")} if self.training else {}

    def backward_reads(self) -> frozenset[str]:
        return frozenset((SIGN,)) if self.relu_bottoms else frozenset()  # the top is above 0 where the bottom is and the mask is 1

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        return self.training

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        if self.training:
            ops.dropout_forward(bottoms[0].data, tops[0].data, self.buffers["mask"], ratio=self.ratio, key=self.key)
        elif not self.in_place_here:
            ops.copy(bottoms[0].data, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if not propagate_down[0]:
            return
        if self.training:
            positive = tops[0].data if self.relu_bottoms else None
            ops.dropout_backward(tops[0].diff, self.buffers["mask"], bottoms[0].diff, positive, ratio=self.ratio)
        elif not self.in_place_here:
            ops.copy(tops[0].diff, bottoms[0].diff)
