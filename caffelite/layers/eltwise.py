"""Eltwise: the sum, product or maximum of blobs of one shape."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, TOP, BufferSpec, Layer, register
from caffelite.schema import SourceMap, pb

FIELD = "eltwise_param"


@register("Eltwise")
class Eltwise(Layer):
    """SUM: y = sum_i coeff_i x_i, dx_i = coeff_i dy (coeff 1 unless given). PROD: y = prod x_i, dx_i = (product of the others) dy,
    or y/x_i dy without stable_prod_grad. MAX: the gradient goes to the winner; bottom 0 wins only if greater than bottom 1.
    `relu` is set by the graph when a ReLU that follows a SUM in place is computed here."""

    bottom_range = (2, None)
    param_fields = (FIELD,)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.eltwise_param
        self.relu = False
        self.operation, self.stable, count = options.operation, options.stable_prod_grad, len(param.bottom)
        self.coeffs = list(options.coeff) or [1.0] * count
        if options.coeff and self.operation == pb.EltwiseParameter.PROD:
            raise self.fail("coeff is given for a product", FIELD, "coeff", hint="coefficients belong to operation: SUM")
        if len(self.coeffs) != count:
            raise self.fail(f"{len(self.coeffs)} coeff value(s) for {count} bottoms", FIELD, "coeff", hint="give one per bottom, or none")
        if self.operation == pb.EltwiseParameter.MAX and count > 256:
            raise self.fail(f"MAX of {count} bottoms", "bottom", 256, hint="take at most 256, or chain several layers")

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        for i, shape in enumerate(bottoms):
            if shape != bottoms[0]:
                raise self.fail(f"bottom {i} has shape {shape}, bottom 0 {bottoms[0]}", "bottom", i, hint="all bottoms have the same shape")
        return [tuple(bottoms[0])]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0] if len(set(bottoms)) == 1 else compute]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        return {"winner": BufferSpec(bottoms[0], "uint8")} if self.operation == pb.EltwiseParameter.MAX else {}

    @property
    def may_do_relu(self) -> bool:
        return self.operation == pb.EltwiseParameter.SUM

    def passes(self, index: int) -> bool:
        """Whether the gradient of a bottom is the top's as it is."""
        return self.operation == pb.EltwiseParameter.SUM and self.coeffs[index] == 1

    def backward_reads(self) -> frozenset[str]:
        if self.operation != pb.EltwiseParameter.PROD:
            return frozenset()
        return frozenset((BOTTOM,)) if self.stable else frozenset((BOTTOM, TOP))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        xs, y = [bottom.data for bottom in bottoms], tops[0].data
        if self.operation == pb.EltwiseParameter.SUM:
            ops.eltwise_sum(xs, y, self.coeffs, relu=self.relu)
        elif self.operation == pb.EltwiseParameter.PROD:
            ops.eltwise_product_forward(xs, y)
        else:
            ops.eltwise_max_forward(xs, y, self.buffers["winner"])

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        xs, y, dy = [bottom.data for bottom in bottoms], tops[0].data, tops[0].diff
        for i, bottom in enumerate(bottoms):
            if not propagate_down[i] or i in self.held_diffs:
                continue
            if self.operation == pb.EltwiseParameter.SUM:
                ops.eltwise_sum([dy], bottom.diff, [self.coeffs[i]])
            elif self.operation == pb.EltwiseParameter.PROD:
                ops.eltwise_product_backward(xs, y, dy, bottom.diff, index=i, stable=self.stable)
            else:
                ops.eltwise_max_backward(self.buffers["winner"], dy, bottom.diff, index=i)
