"""InnerProduct: y = x w^T + b."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, BufferSpec, Layer, ParamSpec, register
from caffelite.layers.dropout import Dropout
from caffelite.layers.shapes import axis_index, loaded, stored, target, viewable
from caffelite.schema import SourceMap, pb

FIELD = "inner_product_param"


@register("InnerProduct")
class InnerProduct(Layer):
    """x seen as (M,K): M the count of the axes before `axis`, K of the others; y has the axes before, then num_output.

    w (num_output, K), or (K, num_output) with transpose; b (num_output). dw = dy^T x, db = sum of dy's rows, dx = dy w.
    K runs in Caffe's order (C,H,W), so a spatial bottom, which lies channels last, goes through a copy that backward reads
    again. `relu` and `dropout` are set by the graph when a ReLU, and a Dropout after it, that follow in place are computed here.
    """

    param_fields = (FIELD,)
    takes_dropout = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.options = options = param.inner_product_param
        self.num_output, self.bias_term, self.transpose = options.num_output, options.bias_term, options.transpose
        self.relu = False
        self.dropout: Dropout | None = None
        self._copies = False  # the bottom's rows have a buffer of their own; known once the bottom's shape is
        if self.num_output < 1:
            raise self.fail("num_output is missing or 0", FIELD, "num_output", hint="give the number of outputs")

    def _rows(self, shape: Shape) -> tuple[Shape, Shape]:
        """The bottom and the top as matrices: (M,K), (M,N)."""
        axis = axis_index(self, self.options.axis, len(shape), FIELD, "axis")
        count = prod(shape[:axis])
        return (count, prod(shape[axis:])), (count, self.num_output)

    def _top_shape(self, shape: Shape) -> Shape:
        return (*shape[: axis_index(self, self.options.axis, len(shape), FIELD, "axis")], self.num_output)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        self._copies = not viewable(bottoms[0], self._rows(bottoms[0])[0])
        return [self._top_shape(bottoms[0])]

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        columns = self._rows(bottoms[0])[0][1]
        shape = (columns, self.num_output) if self.transpose else (self.num_output, columns)
        weight = ParamSpec(shape, self.options.weight_filler, path=(FIELD, "weight_filler"))
        bias = ParamSpec((self.num_output,), self.options.bias_filler, path=(FIELD, "bias_filler"))
        return [weight, bias] if self.bias_term else [weight]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        x, y = self._rows(bottoms[0])
        specs: dict[str, BufferSpec] = {}
        if self._copies:
            specs |= {"x": BufferSpec(x, dtypes[0]), "dx": BufferSpec(x, dtypes[0], kept=False)}
        if not viewable(self._top_shape(bottoms[0]), y):
            specs["y"] = BufferSpec(y, dtypes[0], kept=False)
        return specs

    def backward_reads(self) -> frozenset[str]:
        return frozenset() if self._copies else frozenset((BOTTOM,))

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        return True

    def may_drop(self, bottoms: Sequence[Shape]) -> bool:
        """Whether the op's result lies as the top does, so that it can draw the mask of a dropout of it."""
        return viewable(self._top_shape(bottoms[0]), self._rows(bottoms[0])[1])

    def multiply_adds(self, bottoms: Sequence[Shape]) -> int:
        return prod(self._rows(bottoms[0])[0]) * self.num_output

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        rows, out = self._rows(bottoms[0].shape)
        x, y = loaded(ops, bottoms[0].data, rows, self.buffers.get("x")), target(tops[0].data, out, self.buffers.get("y"))
        b = self.params[1].data if self.bias_term else None
        drop = self.dropout.drop if self.dropout else None
        ops.inner_product_forward(x, self.params[0].data, b, y, transpose=self.transpose, relu=self.relu, drop=drop, tf32=self.context.tf32)
        stored(ops, tops[0].data, self.buffers.get("y"))

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        rows, out = self._rows(bottoms[0].shape)
        weight, bias = self.params[0], self.params[1] if self.bias_term else None
        dy = loaded(ops, tops[0].diff, out, self.buffers.get("y"))
        x = self.buffers["x"] if self._copies else target(bottoms[0].data, rows, None)
        if weight.learn or (bias and bias.learn):
            ops.inner_product_backward_weights(
                x,
                dy,
                weight.diff if weight.learn else None,
                bias.diff if bias and bias.learn else None,
                transpose=self.transpose,
                accumulate_w=weight.accumulate,
                accumulate_b=bias is not None and bias.accumulate,
                tf32=self.context.tf32,
            )
        if propagate_down[0]:
            dx = target(bottoms[0].diff, rows, self.buffers.get("dx"))
            positive, ratio = x if self.relu_bottoms else None, self.drop_ratios.get(0)
            ops.inner_product_backward_data(dy, weight.data, dx, positive, transpose=self.transpose, ratio=ratio, tf32=self.context.tf32)
            stored(ops, bottoms[0].diff, self.buffers.get("dx"))
