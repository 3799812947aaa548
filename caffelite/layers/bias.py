"""Bias: adds a learned or given blob."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Array, Blob, Shape
from caffelite.layer import BufferSpec, ParamSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.layers.shapes import broadcast_view, operand_run
from caffelite.schema import SourceMap, pb


@register("Bias")
class Bias(Elementwise):
    """y = x + b; b has the shape of bottom 0's axes axis..axis+num_axes-1 and broadcasts over the others.

    One bottom: b is learned (filled with 0 unless told otherwise). Two: b is bottom 1. dx = dy; db = dy summed over the
    broadcast axes. In place allowed.
    """

    bottom_range = (1, 2)
    param_fields = ("bias_param",)
    in_place = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.axis, self.num_axes, self.filler = param.bias_param.axis, param.bias_param.num_axes, param.bias_param.filler
        self.learned = len(param.bottom) == 1

    def _run(self, bottoms: Sequence[Shape]) -> tuple[int, Shape]:
        return operand_run(self, bottoms, self.axis, self.num_axes, "bias_param")

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        self._run(bottoms)
        return super().infer_shapes(bottoms)

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        return [ParamSpec(self._run(bottoms)[1], self.filler, path=("bias_param", "filler"))] if self.learned else []

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        return {} if self.learned else {"db": BufferSpec(bottoms[1], "float32", kept=False)}  # gradients of biases are float32

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def _spread(self, operand: Array, bottoms: Sequence[Blob]) -> Array:
        first, _ = self._run([blob.shape for blob in bottoms])
        return broadcast_view(operand, first, len(bottoms[0].shape))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        operand = self.params[0] if self.learned else bottoms[1]
        ops.bias_forward(bottoms[0].data, self._spread(operand.data, bottoms), tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        dy = tops[0].diff
        if self.learned:
            if self.params[0].learn:
                ops.bias_backward(dy, self._spread(self.params[0].diff, bottoms), accumulate=self.params[0].accumulate)
        elif propagate_down[1]:
            ops.bias_backward(dy, self._spread(self.buffers["db"], bottoms), accumulate=False)
            ops.copy(self.buffers["db"], bottoms[1].diff)
        if propagate_down[0] and not self.in_place_here:
            ops.copy(dy, bottoms[0].diff)
