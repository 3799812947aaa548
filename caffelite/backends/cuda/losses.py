"""Softmax along any axis, the losses and accuracy."""

from __future__ import annotations

from math import prod

import numpy as np

from caffelite.backends.contract import Array, Ints, c_order
from caffelite.backends.cuda.common import MOST_PARTIALS, THREADS, WARP, Base, blocks, cname, partial_blocks
from caffelite.backends.cuda.launch import Module, typed
from caffelite.backends.numpy.common import class_numbers

LOSSES = Module(
    "losses",
    [
        *typed("softmax_forward", "softmax_backward", "euclidean_loss_forward", arguments=2),
        *typed("softmax_loss_forward", "softmax_loss_backward", "accuracy_count"),
        *typed("euclidean_loss_backward", arguments=3),
        "softmax_loss_result",
        "clear",
        "accuracy_result",
        "accuracy_per_class",
        "euclidean_loss_result",
    ],
)
PARTIALS, WORD = 3 * 8 * MOST_PARTIALS, 64  # bytes of scratch for the partial sums of up to three kinds, and for one int after them


class Losses(Base):
    def softmax_forward(self, x: Array, y: Array, *, axis: int) -> None:
        lanes, shape = _rows(x.shape, axis % x.ndim, min(x.itemsize, y.itemsize))
        self.launch(LOSSES, f"softmax_forward<{cname(x)}, {cname(y)}>", blocks(lanes), THREADS, x, y, *shape)

    def softmax_backward(self, y: Array, dy: Array, dx: Array, *, axis: int) -> None:
        lanes, shape = _rows(y.shape, axis % y.ndim, min(y.itemsize, dx.itemsize))
        self.launch(LOSSES, f"softmax_backward<{cname(y)}, {cname(dx)}>", blocks(lanes), THREADS, y, dy, dx, *shape)

    def softmax_loss_forward(
        self, x: Array, label: Array, prob: Array, loss: Array, normalizer: Array, *, axis: int, ignore_label: int | None, normalization: str
    ) -> None:
        lanes, shape = _rows(x.shape, axis, x.itemsize)
        grid, scratch = partial_blocks(lanes), self.scratch(PARTIALS + WORD)
        bad = self.part(scratch, PARTIALS, (1,), "int32")
        ordered = self._ordered(label, x.shape, axis)
        self.launch(LOSSES, f"softmax_loss_forward<{cname(x)}>", grid, THREADS, x, ordered, prob, scratch, *shape, _ignored(ignore_label))
        divisor = {"FULL": x.size // x.shape[axis], "VALID": 0, "BATCH_SIZE": prod(x.shape[:axis]), "NONE": 1}[normalization]
        self.launch(LOSSES, "softmax_loss_result", 1, THREADS, scratch, np.int32(grid), np.float64(divisor), loss, normalizer, bad)
        self._raise_for_bad_labels(bad, label, x.shape[axis], ignore_label)

    def softmax_loss_backward(self, prob: Array, label: Array, dloss: Array, normalizer: Array, dx: Array, *, axis: int, ignore_label: int | None) -> None:
        """Labels were checked on the way forward; one out of range would be taken for a class that is not there."""
        lanes, shape = _rows(prob.shape, axis, dx.itemsize)
        ordered = self._ordered(label, prob.shape, axis)
        name = f"softmax_loss_backward<{cname(dx)}>"
        self.launch(LOSSES, name, blocks(lanes), THREADS, prob, ordered, dloss, normalizer, dx, *shape, _ignored(ignore_label))

    def euclidean_loss_forward(self, a: Array, b: Array, loss: Array) -> None:
        grid, scratch = partial_blocks(a.size // 4), self.scratch(PARTIALS)
        self.launch(LOSSES, f"euclidean_loss_forward<{cname(a)}, {cname(b)}>", grid, THREADS, a, b, scratch, np.int64(a.size))
        self.launch(LOSSES, "euclidean_loss_result", 1, THREADS, scratch, np.int32(grid), np.float64(2 * a.shape[0]), loss)

    def euclidean_loss_backward(self, a: Array, b: Array, dloss: Array, dx: Array, *, sign: int) -> None:
        name = f"euclidean_loss_backward<{cname(a)}, {cname(b)}, {cname(dx)}>"
        self.launch(LOSSES, name, blocks(a.size // 4), THREADS, a, b, dloss, dx, np.float32(sign * a.shape[0]), np.int64(a.size))

    def accuracy(self, x: Array, label: Array, accuracy: Array, per_class: Array | None, *, top_k: int, axis: int, ignore_label: int | None) -> None:
        classes = x.shape[axis]
        lanes, shape = _rows(x.shape, axis, 0)
        grid, scratch = partial_blocks(lanes), self.scratch(PARTIALS + WORD + 8 * classes)
        bad = self.part(scratch, PARTIALS, (1,), "int32")
        counts = None if per_class is None else self.part(scratch, PARTIALS + WORD, (2 * classes,), "int32")
        if counts is not None:
            self.launch(LOSSES, "clear", blocks(2 * classes), THREADS, counts, np.int32(2 * classes))
        ordered = self._ordered(label, x.shape, axis)
        name = f"accuracy_count<{cname(x)}>"
        self.launch(LOSSES, name, grid, THREADS, x, ordered, scratch, counts, *shape, np.int32(top_k), _ignored(ignore_label))
        self.launch(LOSSES, "accuracy_result", 1, THREADS, scratch, np.int32(grid), accuracy, bad)
        if counts is not None:
            self.launch(LOSSES, "accuracy_per_class", blocks(classes), THREADS, counts, per_class, np.int32(classes))
        self._raise_for_bad_labels(bad, label, classes, ignore_label)

    def _ordered(self, label: Array, shape: Ints, axis: int) -> Array:
        """The labels in the memory order of x's rows: themselves, but for 4 axes with classes elsewhere than along axis 1, and for labels that are 4-D maps."""
        others = (*shape[:axis], 1, *shape[axis + 1 :])
        if c_order(others) and c_order(label.shape):
            return label
        ordered = self.new(others, label.dtype)
        self._move(label, ordered)
        return ordered

    def _raise_for_bad_labels(self, bad: Array, label: Array, classes: int, ignore_label: int | None) -> None:
        """Waits for the kernels. DataError, with the words of the numpy backend, when they have met a label out of range; their result is a NaN
        then, which has to do while they are recorded."""
        if self.driver.capturing:
            return
        if self.driver.to_host(bad)[0]:
            held = self._dense_in_c_order(label)
            class_numbers(self.driver.to_host(held), held.shape, classes, ignore_label)

    def _dense_in_c_order(self, x: Array) -> Array:
        flat = self.new((x.size,), x.dtype)
        self._move(x, flat)
        return flat


def _rows(shape: Ints, axis: int, narrowest: int) -> tuple[int, tuple[np.int64, np.int32, np.int64, np.int32]]:
    """How many lanes the rows along `axis` take, and the kernels' arguments rows, classes, inner, width.

    narrowest: bytes of the narrowest element type where rows are read 16 bytes at a time, else 0.
    """
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    classes, inner = shape[axis], prod(shape[a] for a in order[order.index(axis) + 1 :])
    rows = prod(shape) // max(classes, 1)
    run = 16 // narrowest if narrowest and classes % (16 // narrowest) == 0 else 1
    width = 1
    while inner == 1 and width < WARP and width * run < classes:
        width *= 2
    return rows * width, (np.int64(rows), np.int32(classes), np.int64(inner), np.int32(width))


def _ignored(label: int | None) -> np.float64:
    return np.float64(np.nan if label is None else label)
