"""Convolution: learned filters slid over the spatial axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

from caffelite.backends.contract import Backend, Ints
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, BufferSpec, Layer, ParamSpec, register
from caffelite.layers.dropout import Dropout
from caffelite.layers.shapes import axis_index, loaded, stored, target, viewable
from caffelite.schema import SourceMap, pb

FIELD = "convolution_param"


class Geometry(NamedTuple):
    """A convolution worked out for one bottom shape: its blobs as (batch, channels, spatial...), at least one spatial axis."""

    bottom: Shape
    top: Shape
    kernel: Ints
    stride: Ints
    pad: Ints
    dilation: Ints


@register("Convolution")
class Convolution(Layer):
    """y[n,o,p] = b[o] + sum_{c in group(o), k} w[o,c,k] x_padded[n, c, p stride + k dilation - pad].

    x: axes before `axis` are batch, then C channels, then 0 or more spatial axes. w (num_output, C/group, kernel...),
    b (num_output). Out extent: floor((in + 2 pad - (dilation (kernel-1) + 1)) / stride) + 1. Several bottoms of one shape
    share the weights. `relu` and `dropout` are set by the graph when a ReLU, and a Dropout after it, that follow in place are computed here.
    """

    bottom_range = (1, None)
    top_range = (1, None)
    same_count = True
    param_fields = (FIELD,)
    takes_dropout = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.options = options = param.convolution_param
        self.num_output, self.group, self.bias_term = options.num_output, options.group, options.bias_term
        self.relu = False
        self.dropout: Dropout | None = None
        if self.num_output < 1:
            raise self.fail("num_output is missing or 0", FIELD, "num_output", hint="give the number of filters")
        if self.group < 1 or self.num_output % self.group:
            raise self.fail(
                f"group {self.group} does not divide num_output {self.num_output}", FIELD, "group", hint="each group makes the same number of outputs"
            )
        for field in ("kernel_size", "stride", "dilation"):
            for i, value in enumerate(getattr(options, field)):
                if value < 1:
                    raise self.fail(f"{field} is 0", FIELD, field, i, hint="give 1 or more")

    def _extents(self, field: str, pair: str, axes: int, default: int) -> Ints:
        """One value per spatial axis from `field` (none, one, or one each) or from `pair`_h and `pair`_w."""
        values, given = list(getattr(self.options, field)), [f"{pair}_{side}" for side in "hw" if pair and self.options.HasField(f"{pair}_{side}")]
        if not given:
            if len(values) not in (0, 1, axes):
                raise self.fail(f"{len(values)} values of {field} for {axes} spatial axes", FIELD, field, hint=f"give one, or {axes}")
            return tuple(values) if len(values) == axes else tuple(values or [default]) * axes
        if values:
            raise self.fail(f"both {field} and {given[0]} are given", FIELD, given[0], hint="keep one of the two forms")
        if axes != 2:
            raise self.fail(
                f"{given[0]} is given for {axes} spatial axes", FIELD, given[0], hint=f"{pair}_h and {pair}_w need exactly 2; write {field} instead"
            )
        extents = (int(getattr(self.options, f"{pair}_h")), int(getattr(self.options, f"{pair}_w")))
        if field != "pad" and 0 in extents:
            missing = f"{pair}_{'hw'[extents.index(0)]}"
            raise self.fail(f"{given[0]} is given, but {missing} is missing or 0", FIELD, given[0], hint=f"give both {pair}_h and {pair}_w, 1 or more")
        return extents

    def _geometry(self, shape: Shape) -> Geometry:
        axis = axis_index(self, self.options.axis, len(shape), FIELD, "axis")
        spatial = tuple(shape[axis + 1 :])
        axes = len(spatial)
        kernel = self._extents("kernel_size", "kernel", axes, 0)
        if 0 in kernel:
            raise self.fail("the kernel's size is missing", FIELD, hint="give kernel_size, or kernel_h and kernel_w")
        stride, pad = self._extents("stride", "stride", axes, 1), self._extents("pad", "pad", axes, 0)
        dilation = self._extents("dilation", "", axes, 1)
        if shape[axis] % self.group:
            raise self.fail(
                f"group {self.group} does not divide the bottom's {shape[axis]} channels", FIELD, "group", hint="each group reads the same number of channels"
            )
        out = []
        for i, size in enumerate(spatial):
            reach = dilation[i] * (kernel[i] - 1) + 1
            if size + 2 * pad[i] < reach:
                raise self.fail(
                    f"spatial axis {i}: the kernel reaches over {reach} cells, but the bottom has {size} with {pad[i]} of padding on either side",
                    FIELD,
                    hint="make the kernel smaller, pad more, or feed a larger bottom",
                )
            out.append((size + 2 * pad[i] - reach) // stride[i] + 1)
        head = prod(shape[:axis])
        if not axes:  # a product over channels: a convolution over one cell
            return Geometry((head, shape[axis], 1), (head, self.num_output, 1), (1,), (1,), (0,), (1,))
        return Geometry((head, shape[axis], *spatial), (head, self.num_output, *out), kernel, stride, pad, dilation)

    def _top_shape(self, shape: Shape) -> Shape:
        axis = axis_index(self, self.options.axis, len(shape), FIELD, "axis")
        spatial = self._geometry(shape).top[2:] if self._has_spatial(shape) else ()
        return (*shape[:axis], self.num_output, *spatial)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        for i, shape in enumerate(bottoms):
            if shape != bottoms[0]:
                raise self.fail(f"bottom {i} has shape {shape}, bottom 0 {bottoms[0]}", "bottom", i, hint="all bottoms of one Convolution have the same shape")
        return [self._top_shape(bottoms[0])] * len(bottoms)

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        geometry = self._geometry(bottoms[0])
        kernel = geometry.kernel if self._has_spatial(bottoms[0]) else ()
        specs = [ParamSpec((self.num_output, geometry.bottom[1] // self.group, *kernel), self.options.weight_filler, path=(FIELD, "weight_filler"))]
        return specs + ([ParamSpec((self.num_output,), self.options.bias_filler, path=(FIELD, "bias_filler"))] if self.bias_term else [])

    def _has_spatial(self, shape: Shape) -> bool:
        return axis_index(self, self.options.axis, len(shape), FIELD, "axis") + 1 < len(shape)

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        """Passing places for a 4-D blob whose batch is not its first axis alone; ordinary nets need none."""
        geometry, specs = self._geometry(bottoms[0]), {}
        if not viewable(bottoms[0], geometry.bottom):
            specs["bottom"] = BufferSpec(geometry.bottom, dtypes[0], kept=False)
        if not viewable(self._top_shape(bottoms[0]), geometry.top):
            specs["top"] = BufferSpec(geometry.top, dtypes[0], kept=False)
        return specs

    def backward_reads(self) -> frozenset[str]:
        return frozenset((BOTTOM,))

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        return viewable(bottoms[0], self._geometry(bottoms[0]).bottom)  # else the one buffer would have to hold x and dx

    def may_drop(self, bottoms: Sequence[Shape]) -> bool:
        """Whether the op's result lies as the top does, so that it can draw the mask of a dropout of it."""
        return viewable(self._top_shape(bottoms[0]), self._geometry(bottoms[0]).top)

    def multiply_adds(self, bottoms: Sequence[Shape]) -> int:
        geometry = self._geometry(bottoms[0])
        return len(bottoms) * prod(geometry.top) * (geometry.bottom[1] // self.group) * prod(geometry.kernel)

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        g, (bottom_buffer, top_buffer) = self._geometry(bottoms[0].shape), (self.buffers.get("bottom"), self.buffers.get("top"))
        w, b = self.params[0].data, self.params[1].data if self.bias_term else None
        w = w if w.ndim > 2 else w.reshape((*w.shape, 1))
        drop = self.dropout.drop if self.dropout else None
        for bottom, top in zip(bottoms, tops):
            x, y = loaded(ops, bottom.data, g.bottom, bottom_buffer), target(top.data, g.top, top_buffer)
            ops.convolution_forward(
                x,
                w,
                b,
                y,
                stride=g.stride,
                pad=g.pad,
                dilation=g.dilation,
                group=self.group,
                relu=self.relu,
                drop=drop,
                tf32=self.context.tf32,
            )
            stored(ops, top.data, top_buffer)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        g, (bottom_buffer, top_buffer) = self._geometry(bottoms[0].shape), (self.buffers.get("bottom"), self.buffers.get("top"))
        weight, bias = self.params[0], self.params[1] if self.bias_term else None
        shape = (*weight.shape, 1) if len(weight.shape) == 2 else weight.shape
        w, dw = loaded(ops, weight.data, shape, None), target(weight.diff, shape, None) if weight.learn else None
        db = bias.diff if bias and bias.learn else None
        for i, (bottom, top) in enumerate(zip(bottoms, tops)):
            dy = loaded(ops, top.diff, g.top, top_buffer)
            if dw is not None or db is not None:
                ops.convolution_backward_weights(
                    loaded(ops, bottom.data, g.bottom, bottom_buffer),
                    dy,
                    dw,
                    db,
                    stride=g.stride,
                    pad=g.pad,
                    dilation=g.dilation,
                    group=self.group,
                    accumulate_w=weight.accumulate or i > 0,
                    accumulate_b=bias is not None and (bias.accumulate or i > 0),
                    tf32=self.context.tf32,
                )
            if propagate_down[i]:
                dx = target(bottom.diff, g.bottom, bottom_buffer)
                positive = loaded(ops, bottom.data, g.bottom, None) if i in self.relu_bottoms else None
                ops.convolution_backward_data(
                    dy,
                    w,
                    dx,
                    positive,
                    stride=g.stride,
                    pad=g.pad,
                    dilation=g.dilation,
                    group=self.group,
                    ratio=self.drop_ratios.get(i),
                    tf32=self.context.tf32,
                )
                stored(ops, bottom.diff, bottom_buffer)
