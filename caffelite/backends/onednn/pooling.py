"""Pooling on oneDNN where its rules are Caffe's; NumPy where they differ (see each plan)."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints, is_usual
from caffelite.backends.onednn.activations import ActivationOps
from caffelite.backends.onednn.dnnl import (
    BFLOAT16,
    DIFF_DST,
    DIFF_SRC,
    DST,
    F32,
    INFERENCE,
    POOL_AVE_EXCLUDE,
    POOL_AVE_INCLUDE,
    POOL_MAX,
    SRC,
    TRAINING,
    WORKSPACE,
    Descriptor,
    Dnnl,
    Primitive,
    PrimitiveDescriptor,
    Unsupported,
)
from caffelite.backends.onednn.plan import Drain, Feed, Run, describe, element_strides, signature, type_of

WIDE_BYTES = 1 << 24  # float32 copy of a piece: stays in the last-level cache, and few pieces mean few waits for other threads
LOWEST = np.float32(np.finfo(np.float32).min)
LOWEST_BFLOAT16_BITS = np.int16(-0x80)  # -infinity, which is what -FLT_MAX rounds to


def steps(image: Ints, pooled: Ints, kernel: Ints, stride: Ints, pad: Ints) -> tuple[Ints, ...]:
    """stride, kernel, dilation, pad before and after. Unsupported: a window without a cell, which oneDNN has no rule for."""
    after = tuple((p - 1) * s + k - size - b for p, s, k, size, b in zip(pooled, stride, kernel, image, pad))
    if any(b >= k or a >= k for a, b, k in zip(after, pad, kernel)):
        raise Unsupported("a window lies outside the image")
    return tuple(stride), tuple(kernel), (0, 0), tuple(pad), after


def usual(dnnl: Dnnl, x: Array) -> Descriptor:
    """x as it lies. Unsupported unless that is the contract's usual way: oneDNN's pooling writes into the gaps of other arrays."""
    if not is_usual(x):
        raise Unsupported("not channels last without gaps")
    return describe(dnnl, x)


def wide(dnnl: Dnnl, x: Array) -> Descriptor:
    """As usual(), in float32."""
    usual(dnnl, x)
    return dnnl.strided(x.shape, element_strides(x), F32)


def pool_descriptor(dnnl: Dnnl, kind: int, algorithm: int, x: Descriptor, y: Descriptor, numbers: tuple[Ints, ...]) -> PrimitiveDescriptor:
    return dnnl.primitive_descriptor("pooling_forward", kind, algorithm, x, y, *numbers, dnnl.plain)


def fits_mask(dnnl: Dnnl, forward: PrimitiveDescriptor, x: Array, mask: Array) -> None:
    """oneDNN's workspace is the contract's mask: the winner's place in its unclipped window, one byte or one int per output."""
    if not dnnl.equal(dnnl.argument(forward, WORKSPACE), dnnl.strided(mask.shape, element_strides(mask), type_of(mask))):
        raise Unsupported("the workspace is not the mask")
    if x.dtype == BFLOAT16 and mask.dtype == np.int32:
        raise Unsupported("oneDNN 3.2 fills one byte of each int in the last channels")


def plan_max_forward(dnnl: Dnnl, x: Array, y: Array, mask: Array | None, kernel: Ints, stride: Ints, pad: Ints) -> Run:
    numbers = steps(x.shape[2:], y.shape[2:], kernel, stride, pad)
    descriptor = pool_descriptor(dnnl, INFERENCE if mask is None else TRAINING, POOL_MAX, usual(dnnl, x), usual(dnnl, y), numbers)
    if mask is None:
        return Primitive(dnnl, descriptor, (SRC, DST))
    fits_mask(dnnl, descriptor, x, mask)
    return Primitive(dnnl, descriptor, (SRC, DST, WORKSPACE))


class Pieces:
    """Backward over a few images at a time, where overlapping windows add up in bfloat16: oneDNN would round after every window,
    so it works on a float32 copy that stays in the cache. Everything else goes through as it is, all images at once."""

    def __init__(self, dnnl: Dnnl, dy: Array, dx: Array, kernel: Ints, stride: Ints) -> None:
        widened = dx.dtype == BFLOAT16 and any(k > s for k, s in zip(kernel, stride))
        self.images = len(dx)
        if widened:
            fitting = max(1, WIDE_BYTES // (4 * dx[0].size))
            self.images = max(n for n in range(1, len(dx) + 1) if len(dx) % n == 0 and n <= fitting)
        self.rounds = len(dx) // self.images
        parts = [usual(dnnl, z[: self.images]) for z in (dy, dx)]
        self.given, self.made = [wide(dnnl, z[: self.images]) for z in (dy, dx)] if widened else parts
        self._steps = dy.strides[0] * self.images, dx.strides[0] * self.images
        self._feed, self._drain = Feed(dnnl, parts[0], self.given, "input"), Drain(dnnl, self.made, parts[1], "output")

    def __call__(self, run: Primitive, dy: int, dx: int, *others: tuple[int, int]) -> None:
        """Runs on (dy, dx, others...) piece by piece; others are (address, bytes from one piece to the next)."""
        for i in range(self.rounds):
            given, made = dy + i * self._steps[0], dx + i * self._steps[1]
            run(self._feed(given), self._drain.target(made), *(address + i * step for address, step in others))
            self._drain.finish(made)


def plan_max_backward(dnnl: Dnnl, dy: Array, mask: Array, dx: Array, kernel: Ints, stride: Ints, pad: Ints) -> Run:
    numbers = steps(dx.shape[2:], dy.shape[2:], kernel, stride, pad)
    pieces = Pieces(dnnl, dy, dx, kernel, stride)
    hint = pool_descriptor(dnnl, TRAINING, POOL_MAX, pieces.made, pieces.given, numbers)
    fits_mask(dnnl, hint, dx, mask[: pieces.images])
    descriptor = dnnl.primitive_descriptor("pooling_backward", POOL_MAX, pieces.made, pieces.given, *numbers, hint, dnnl.plain)
    run = Primitive(dnnl, descriptor, (DIFF_DST, DIFF_SRC, WORKSPACE))
    step = mask.strides[0] * pieces.images
    return lambda dy, mask, dx: pieces(run, dy, dx, (mask, step))


def average_rule(image: Ints, pooled: Ints, kernel: Ints, stride: Ints, pad: Ints) -> int:
    """oneDNN's rule that divides as Caffe does. Caffe's area counts the padding but not what lies beyond it.

    Without padding that is the cells inside the image; with no window reaching beyond the padding, the whole kernel.
    Unsupported: both at once (ceil mode with padding)."""
    beyond = any((p - 1) * s + k > size + 2 * b for p, s, k, size, b in zip(pooled, stride, kernel, image, pad))
    if not any(pad):
        return POOL_AVE_EXCLUDE
    if beyond:
        raise Unsupported("a window reaches beyond the padding")
    return POOL_AVE_INCLUDE


def plan_average_forward(dnnl: Dnnl, x: Array, y: Array, kernel: Ints, stride: Ints, pad: Ints) -> Run:
    spatial = (x.shape[2:], y.shape[2:], kernel, stride, pad)
    descriptor = pool_descriptor(dnnl, INFERENCE, average_rule(*spatial), usual(dnnl, x), usual(dnnl, y), steps(*spatial))
    return Primitive(dnnl, descriptor, (SRC, DST))


def plan_average_backward(dnnl: Dnnl, dy: Array, dx: Array, kernel: Ints, stride: Ints, pad: Ints) -> Run:
    spatial = (dx.shape[2:], dy.shape[2:], kernel, stride, pad)
    rule, numbers = average_rule(*spatial), steps(*spatial)
    pieces = Pieces(dnnl, dy, dx, kernel, stride)
    hint = pool_descriptor(dnnl, TRAINING, rule, pieces.made, pieces.given, numbers)
    descriptor = dnnl.primitive_descriptor("pooling_backward", rule, pieces.made, pieces.given, *numbers, hint, dnnl.plain)
    run = Primitive(dnnl, descriptor, (DIFF_DST, DIFF_SRC))
    return lambda dy, dx: pieces(run, dy, dx)


def has_winnerless(y: Array) -> bool:
    """Some window may hold nothing above -FLT_MAX; oneDNN then names a wrong winner."""
    if y.dtype == BFLOAT16:
        bits = y.view(np.int16)
        return bool((bits == LOWEST_BFLOAT16_BITS).any())
    return bool(y.min() <= LOWEST)


class PoolingOps(ActivationOps):
    """Max and average pooling."""

    def max_pool_forward(self, x: Array, y: Array, mask: Array | None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        key = ("max pool forward", signature(x), signature(y), None if mask is None else signature(mask), kernel, stride, pad)
        plan = self.plan(key, lambda: plan_max_forward(self.dnnl, x, y, mask, kernel, stride, pad))
        if plan is not None:
            masks = () if mask is None else (mask.ctypes.data,)
            plan(x.ctypes.data, y.ctypes.data, *masks)
        if plan is None or has_winnerless(y):
            super().max_pool_forward(x, y, mask, kernel=kernel, stride=stride, pad=pad)

    def max_pool_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        key = ("max pool backward", signature(dy), signature(mask), signature(dx), kernel, stride, pad)
        plan = self.plan(key, lambda: plan_max_backward(self.dnnl, dy, mask, dx, kernel, stride, pad))
        if plan is None:
            super().max_pool_backward(dy, mask, dx, positive, kernel=kernel, stride=stride, pad=pad)
        else:
            if positive is not None:  # dy has fewer elements than dx
                dy = self._rectified(dy, positive)
            plan(dy.ctypes.data, mask.ctypes.data, dx.ctypes.data)

    def ave_pool_forward(self, x: Array, y: Array, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        key = ("ave pool forward", signature(x), signature(y), kernel, stride, pad)
        plan = self.plan(key, lambda: plan_average_forward(self.dnnl, x, y, kernel, stride, pad))
        if plan is None:
            super().ave_pool_forward(x, y, kernel=kernel, stride=stride, pad=pad)
        else:
            plan(x.ctypes.data, y.ctypes.data)

    def ave_pool_backward(self, dy: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        key = ("ave pool backward", signature(dy), signature(dx), kernel, stride, pad)
        plan = self.plan(key, lambda: plan_average_backward(self.dnnl, dy, dx, kernel, stride, pad))
        if plan is None:
            super().ave_pool_backward(dy, dx, positive, kernel=kernel, stride=stride, pad=pad)
        else:
            plan(dy.ctypes.data, dx.ctypes.data)
            self._rectify(dx, positive)
