"""What the primitives of one convolution share."""

from __future__ import annotations

from caffelite.backends.contract import Array, Ints
from caffelite.backends.onednn.dnnl import CONVOLUTION_DIRECT, F32, RELU_POST_OP, TRAINING, Descriptor, Dnnl, PrimitiveDescriptor
from caffelite.backends.onednn.plan import compute_type, element_strides


class Geometry:
    """What the three primitives of one convolution share: descriptors, padding, and the forward one as a hint."""

    def __init__(self, dnnl: Dnnl, x: Array, w: Array, y: Array, stride: Ints, pad: Ints, dilation: Ints, group: int) -> None:
        self.dnnl, self.group, self.type = dnnl, group, compute_type(x, y)
        self.w_shape, self.w_strides = w.shape, element_strides(w)
        if group > 1:
            o, i = w.shape[0] // group, w.shape[1]
            self.w_shape = (group, o, i, *w.shape[2:])
            self.w_strides = (self.w_strides[0] * o, *self.w_strides)
        spans = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], dilation)]
        # What the last window needs beyond the image; negative where the stride leaves cells unread.
        after = tuple((p_out - 1) * s + span - size - p for p_out, s, span, size, p in zip(y.shape[2:], stride, spans, x.shape[2:], pad))
        self.steps = (tuple(stride), tuple(d - 1 for d in dilation), tuple(pad), after)
        self.x_shape, self.y_shape = x.shape, y.shape
        self.pointwise = group == 1 and all(k == s == 1 and p == 0 for k, s, p in zip(w.shape[2:], stride, pad))

    def activation(self, x: Array, dtype: int | None = None) -> Descriptor:
        """x's layout with the compute type."""
        return self.dnnl.strided(x.shape, element_strides(x), dtype or self.type)

    def weights(self, dtype: int) -> Descriptor:
        """w as it lies."""
        return self.dnnl.strided(self.w_shape, self.w_strides, dtype)

    def bias(self, dtype: int = F32) -> Descriptor:
        return self.dnnl.strided((self.y_shape[1],), (1,), dtype)

    def forward(self, x: Descriptor, y: Descriptor, *, bias: bool, relu: bool = False, weights: Descriptor | None = None) -> PrimitiveDescriptor:
        """weights: how they lie; without, the primitive chooses."""
        dnnl = self.dnnl
        attributes = dnnl.attributes(RELU_POST_OP) if relu else dnnl.plain
        w = weights or dnnl.any(self.w_shape, self.type)
        b = self.bias() if bias else None
        return dnnl.primitive_descriptor("convolution_forward", TRAINING, CONVOLUTION_DIRECT, x, w, b, y, *self.steps, attributes)
