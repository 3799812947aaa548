"""Dropout: masks drawn by several threads from one counter-based stream, applied in one pass."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, DropoutKey, is_usual
from caffelite.backends.numpy.dropout import draw_mask
from caffelite.backends.onednn.activations import ActivationOps
from caffelite.backends.onednn.dnnl import ATTR_SCALES, BINARY_MUL, DST, SRC, SRC1, Dnnl, Primitive
from caffelite.backends.onednn.plan import Run, describe_flat, signature

WORDS = 1 << 14  # 64-bit words drawn at once; they stay in a core's own cache
LEAST_PIECE = 1 << 18  # elements drawn by one task: one task for each thread, unless they are few


def draw_piece(target: Array, start: int, stop: int, threshold: int, key: DropoutKey) -> None:
    """Mask elements start..stop of the stream that draw_mask draws from its beginning; start is a multiple of 16.

    One counter value gives four words of four elements each."""
    counter = np.array([start // 16, 0, int(key.iteration[0]), 0], np.uint64)
    words = np.random.Philox(key=np.array([key.seed, key.layer], np.uint64), counter=counter)
    for at in range(start, stop, 4 * WORDS):
        piece = target[at : min(at + 4 * WORDS, stop)]
        drawn = words.random_raw(-(-piece.size // 4)).astype("<u8", copy=False).view("<u2")
        np.greater_equal(drawn[: piece.size], threshold, out=piece.view(bool))


def plan_apply(dnnl: Dnnl, x: Array, mask: Array, y: Array, ratio: float) -> Run:
    """y = x mask / (1 - ratio)."""
    descriptors = describe_flat(dnnl, x, mask, y)
    attributes = dnnl.attributes(scales=(SRC,))
    descriptor = dnnl.primitive_descriptor("binary", BINARY_MUL, *descriptors, attributes)
    return Primitive(dnnl, descriptor, (SRC, SRC1, DST), {ATTR_SCALES | SRC: np.full(16, 1 / (1 - ratio), np.float32)})


class DropoutOps(ActivationOps):
    """Dropout forward and backward."""

    def dropout_forward(self, x: Array, y: Array, mask: Array, *, ratio: float, key: DropoutKey) -> None:
        threshold, size = round(ratio * 65536), mask.size
        if is_usual(mask):
            target = (np.moveaxis(mask, 1, -1) if mask.ndim == 4 else mask).reshape(-1)
            step = max(LEAST_PIECE, -(-size // self.threads // 16) * 16)
            pieces = [(start, min(start + step, size)) for start in range(0, size, step)]
            self._each(lambda piece: draw_piece(target, *piece, threshold, key), pieces, size)
        else:
            draw_mask(mask, ratio, key)
        self.dropout_backward(x, mask, y, ratio=ratio)

    def dropout_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float) -> None:
        key = ("dropout", signature(dy), signature(mask), signature(dx), ratio)
        plan = self.plan(key, lambda: plan_apply(self.dnnl, dy, mask, dx, ratio))
        if plan is None:
            super().dropout_backward(dy, mask, dx, positive, ratio=ratio)
        else:
            plan(dy.ctypes.data, mask.ctypes.data, dx.ctypes.data)
            self._rectify(dx, positive)

    def _take_on(self, dx: Array, positive: Array | None, ratio: float | None) -> None:
        """Takes dx on through the ReLU that put out `positive`, or through that and a dropout: no primitive that computes a gradient does it on the way."""
        if ratio is None:
            self._rectify(dx, positive)
        else:
            self.dropout_backward(dx, np.ones_like(dx, np.uint8), dx, positive, ratio=ratio)
