"""Scale: multiplies by a learned or given factor, and may add a learned bias."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Array, Blob, Param, Shape
from caffelite.layer import BOTTOM, BufferSpec, ParamSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.layers.shapes import broadcast_view, operand_run
from caffelite.schema import SourceMap, pb


@register("Scale")
class Scale(Elementwise):
    """y = x s (+ b). s has the shape of bottom 0's axes axis..axis+num_axes-1 and broadcasts over the others; b has s's shape.

    One bottom: s is learned (filled with 1 unless told otherwise). Two: s is bottom 1, and only b is a parameter.
    dx = dy s; ds and db are sums of dy x and of dy over the broadcast axes. In place it keeps copies of x and of bottom 1.
    """

    bottom_range = (1, 2)
    param_fields = ("scale_param",)
    in_place = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.scale_param
        self.axis, self.num_axes, self.bias_term, self.bias_filler = options.axis, options.num_axes, options.bias_term, options.bias_filler
        self.filler = options.filler if options.HasField("filler") else pb.FillerParameter(type="constant", value=1)
        self.learned = len(param.bottom) == 1

    def _run(self, bottoms: Sequence[Shape]) -> tuple[int, Shape]:
        return operand_run(self, bottoms, self.axis, self.num_axes, "scale_param")

    def has_own_channels(self, bottom: Shape) -> bool:
        """Whether it is a learned factor and bias for each channel (axis 1)."""
        return self.learned and self.bias_term and self._run([bottom]) == (1, (bottom[1],))

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        self._run(bottoms)
        return super().infer_shapes(bottoms)

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        _, shape = self._run(bottoms)
        factor = [ParamSpec(shape, self.filler, path=("scale_param", "filler"))] if self.learned else []
        return factor + ([ParamSpec(shape, self.bias_filler, path=("scale_param", "bias_filler"))] if self.bias_term else [])

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        specs = {"x": BufferSpec(bottoms[0], dtypes[0])} if self.in_place_here and self.keeps else {}
        if not self.learned:
            specs["ds"] = BufferSpec(bottoms[1], "float32", kept=False)  # gradients of factors are float32
            if self.in_place_here and self.keeps:
                specs["s"] = BufferSpec(bottoms[1], dtypes[1])
        return specs

    def backward_reads(self) -> frozenset[str]:
        return frozenset() if self.in_place_here else frozenset((BOTTOM,))

    def _bias(self) -> Param | None:
        return self.params[-1] if self.bias_term else None

    def _spread(self, operand: Array, bottoms: Sequence[Blob]) -> Array:
        first, _ = self._run([blob.shape for blob in bottoms])
        return broadcast_view(operand, first, len(bottoms[0].shape))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        if self.in_place_here and self.keeps:
            for name, blob in zip(("x", "s"), bottoms):
                ops.copy(blob.data, self.buffers[name])
        factor, bias = self.params[0] if self.learned else bottoms[1], self._bias()
        b = self._spread(bias.data, bottoms) if bias else None
        ops.scale_forward(bottoms[0].data, self._spread(factor.data, bottoms), b, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        x, dy, bias = self.buffers["x"] if self.in_place_here else bottoms[0].data, tops[0].diff, self._bias()
        if bias and bias.learn:
            ops.bias_backward(dy, self._spread(bias.diff, bottoms), accumulate=bias.accumulate)
        if self.learned:
            s = self.params[0].data
            if self.params[0].learn:
                ops.scale_backward_factor(x, dy, self._spread(self.params[0].diff, bottoms), accumulate=self.params[0].accumulate)
        else:
            s = self.buffers["s"] if self.in_place_here else bottoms[1].data
            if propagate_down[1]:
                ops.scale_backward_factor(x, dy, self._spread(self.buffers["ds"], bottoms), accumulate=False)
                ops.copy(self.buffers["ds"], bottoms[1].diff)
        if propagate_down[0]:  # last: in place, dx overwrites dy
            ops.scale_backward_data(dy, self._spread(s, bottoms), bottoms[0].diff)
