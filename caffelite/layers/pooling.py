"""Pooling: the largest or the mean value of each window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from caffelite.backends.contract import Backend, Ints, pool_mask_dtype
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, SIGN, BufferSpec, Layer, register
from caffelite.layers.dropout import Dropout
from caffelite.layers.lrn import LRN
from caffelite.schema import SourceMap, pb

FIELD = "pooling_param"


class Geometry(NamedTuple):
    """Pooling worked out for one bottom shape."""

    kernel: Ints
    stride: Ints
    pad: Ints
    top: Shape


@register("Pooling")
class Pooling(Layer):
    """x (N,C,H,W) -> y (N,C,H',W'), H' = round((H + 2 pad - kernel) / stride) + 1 by round_mode (CEIL by default).

    With any padding, an extent whose last window would start beyond the image and its leading padding loses that window.
    MAX: the first largest value of the window's part inside the image; a second top gives its index h*W + w. AVE: the sum
    over that part divided by the window's area up to the padded edge. global_pooling: one window over the whole plane.
    `lrn` is set by the graph: the layer across channels whose top MAX takes, which is then computed here, from that one's bottom;
    `dropout` the layer that follows in place, whose work is done here.
    """

    top_range = (1, 2)
    param_fields = (FIELD,)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.options = options = param.pooling_param
        if options.pool == pb.PoolingParameter.STOCHASTIC:
            raise self.fail("STOCHASTIC pooling is not available", FIELD, "pool", hint="use MAX or AVE; Caffe too has it on GPUs only")
        self.lrn: LRN | None = None
        self.dropout: Dropout | None = None
        self.is_max = options.pool == pb.PoolingParameter.MAX
        if len(param.top) > 1 and not self.is_max:
            raise self.fail("only MAX pooling has a second top", "top", 1, hint="remove it, or set pool: MAX")
        self.kernel = (0, 0) if options.global_pooling else self._pair("kernel_size", "kernel")
        self.stride, self.pad = self._pair("stride", "stride"), self._pair("pad", "pad")
        for values, field in ((self.stride, "stride"), (self.kernel, "kernel_size")):
            if 0 in values and not (options.global_pooling and values is self.kernel):
                raise self.fail(f"{field} is {values}", FIELD, self._written(field), hint="give 1 or more on both axes")
        if options.global_pooling:
            self._check_global()
        else:
            self._check_pad(self.kernel)

    def _written(self, field: str) -> str:
        """The form of `field` that the file uses: itself or FIELD_h."""
        stem = field.removesuffix("_size")
        return next((name for name in (f"{stem}_h", f"{stem}_w") if self.options.HasField(name)), field)

    def _pair(self, field: str, stem: str) -> Ints:
        """(h, w) from `field`, or from `stem`_h and `stem`_w."""
        sides = [name for name in (f"{stem}_h", f"{stem}_w") if self.options.HasField(name)]
        if not sides:
            if field == "kernel_size" and not self.options.HasField(field):
                raise self.fail("the kernel's size is missing", FIELD, hint="give kernel_size, or kernel_h and kernel_w, or global_pooling: true")
            value = int(getattr(self.options, field))
            return value, value
        if self.options.HasField(field):
            raise self.fail(f"both {field} and {sides[0]} are given", FIELD, sides[0], hint="keep one of the two forms")
        if len(sides) == 1:
            raise self.fail(f"{sides[0]} is given alone", FIELD, sides[0], hint=f"give both {stem}_h and {stem}_w, or {field} for both axes")
        return int(getattr(self.options, sides[0])), int(getattr(self.options, sides[1]))

    def _check_global(self) -> None:
        for name in ("kernel_size", "kernel_h", "kernel_w"):
            if self.options.HasField(name):
                raise self.fail(f"{name} is given with global_pooling", FIELD, name, hint="the window is the whole plane: remove it")
        for values, neutral, field in ((self.pad, (0, 0), "pad"), (self.stride, (1, 1), "stride")):
            if values != neutral:
                raise self.fail(f"{field} is {values} with global_pooling", FIELD, self._written(field), hint=f"it has to be {neutral[0]}: remove it")

    def _check_pad(self, kernel: Ints) -> None:
        if any(pad >= size for pad, size in zip(self.pad, kernel)) and any(self.pad):
            raise self.fail(f"pad {self.pad} is not smaller than the kernel {kernel}", FIELD, self._written("pad"), hint="each window has to reach the image")

    def geometry(self, shape: Shape) -> Geometry:
        """The windows over a bottom of this shape. SpecError where they do not fit."""
        if len(shape) != 4:
            raise self.fail(f"Pooling needs a bottom with 4 axes (N,C,H,W), found shape {shape}", "bottom")
        kernel = tuple(shape[2:]) if self.options.global_pooling else self.kernel
        floor = self.options.round_mode == pb.PoolingParameter.FLOOR
        pooled = []
        for i, size in enumerate(shape[2:]):
            room = size + 2 * self.pad[i] - kernel[i]
            extent = (room // self.stride[i] if floor else -(-room // self.stride[i])) + 1
            if any(self.pad) and (extent - 1) * self.stride[i] >= size + self.pad[i]:
                extent -= 1
            if extent < 1:
                raise self.fail(
                    f"the window {kernel} does not fit into a plane of {tuple(shape[2:])} with padding {self.pad}",
                    FIELD,
                    self._written("kernel_size"),
                    hint="make the kernel smaller, or feed a larger bottom",
                )
            pooled.append(extent)
        return Geometry(kernel, self.stride, self.pad, (shape[0], shape[1], *pooled))

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        return [self.geometry(bottoms[0]).top] * len(self.param.top)

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [compute, "float32"][: len(self.param.top)]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        geometry = self.geometry(bottoms[0])
        wanted = self.keeps and (self.is_max or self.dropout is not None)
        if not wanted and len(self.param.top) == 1:
            return {}
        return {"mask": BufferSpec(geometry.top, pool_mask_dtype(geometry.kernel) if self.is_max else "uint8")}

    def backward_reads(self) -> frozenset[str]:
        if self.lrn is not None:
            return frozenset((BOTTOM,))
        if not self.relu_bottoms:
            return frozenset()
        return frozenset((SIGN,)) if self.is_max else frozenset((BOTTOM,))  # a window's winner and its top have one value

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        return True

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        x, y, mask, g = bottoms[0].data, tops[0].data, self.buffers.get("mask"), self.geometry(bottoms[0].shape)
        window: dict[str, Any] = {"kernel": g.kernel, "stride": g.stride, "pad": g.pad}
        if self.dropout is not None:
            run = ops.max_pool_dropout_forward if self.is_max else ops.ave_pool_dropout_forward
            run(x, y, mask, ratio=self.dropout.ratio, key=self.dropout.key, **window)
        elif self.lrn is not None:
            ops.lrn_max_pool_forward(x, y, mask, **self.lrn.numbers, **window)
        elif self.is_max:
            ops.max_pool_forward(x, y, mask, **window)
        else:
            ops.ave_pool_forward(x, y, **window)
        if len(tops) > 1:
            ops.max_pool_indices(mask, tops[1].data, **window, width=bottoms[0].shape[3])

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if not propagate_down[0]:
            return
        dy, dx, mask, g = tops[0].diff, bottoms[0].diff, self.buffers.get("mask"), self.geometry(bottoms[0].shape)
        window: dict[str, Any] = {"kernel": g.kernel, "stride": g.stride, "pad": g.pad}
        positive = None if not self.relu_bottoms else tops[0].data if self.is_max else bottoms[0].data
        if self.dropout is not None:
            run = ops.max_pool_dropout_backward if self.is_max else ops.ave_pool_dropout_backward
            run(dy, mask, dx, positive, ratio=self.dropout.ratio, **window)
        elif self.lrn is not None:
            ops.lrn_max_pool_backward(bottoms[0].data, dy, mask, dx, **self.lrn.numbers, **window, relu=bool(self.relu_bottoms))
        elif self.is_max:
            ops.max_pool_backward(dy, mask, dx, positive, **window)
        else:
            ops.ave_pool_backward(dy, dx, positive, **window)
