"""Softmax, the losses and accuracy."""

from __future__ import annotations

from math import prod

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.common import FLOAT_MIN, Base, class_numbers, store, widen


class Losses(Base):
    def softmax_forward(self, x: Array, y: Array, *, axis: int) -> None:
        store(y, _softmax(widen(x)[0], axis))

    def softmax_backward(self, y: Array, dy: Array, dx: Array, *, axis: int) -> None:
        output, gradient = widen(y, dy)
        store(dx, output * (gradient - (gradient * output).sum(axis=axis, keepdims=True)))

    def softmax_loss_forward(
        self, x: Array, label: Array, prob: Array, loss: Array, normalizer: Array, *, axis: int, ignore_label: int | None, normalization: str
    ) -> None:
        others = x.shape[:axis] + x.shape[axis + 1 :]
        numbers, counted = class_numbers(label, others, x.shape[axis], ignore_label)
        store(prob, _softmax(widen(x)[0], axis))
        chosen = np.take_along_axis(prob, np.expand_dims(numbers, axis), axis).astype(np.float64).reshape(others)
        positions = {"FULL": counted.size, "VALID": int(counted.sum()), "BATCH_SIZE": prod(x.shape[:axis]), "NONE": 1}
        divisor = max(1, positions[normalization])
        normalizer[...] = divisor
        loss[...] = -np.sum(np.log(np.maximum(chosen, FLOAT_MIN)), where=counted) / divisor

    def softmax_loss_backward(self, prob: Array, label: Array, dloss: Array, normalizer: Array, dx: Array, *, axis: int, ignore_label: int | None) -> None:
        others = prob.shape[:axis] + prob.shape[axis + 1 :]
        numbers, counted = (np.expand_dims(a, axis) for a in class_numbers(label, others, prob.shape[axis], ignore_label))
        difference = prob.copy(order="K")
        np.put_along_axis(difference, numbers, np.take_along_axis(prob, numbers, axis) - 1, axis)
        difference *= float(dloss) / float(normalizer)
        store(dx, np.where(counted, difference, difference.dtype.type(0)))

    def euclidean_loss_forward(self, a: Array, b: Array, loss: Array) -> None:
        left, right = widen(a, b)
        difference = (left - right).astype(np.float64, copy=False)
        loss[...] = np.sum(difference * difference) / (2 * a.shape[0])

    def euclidean_loss_backward(self, a: Array, b: Array, dloss: Array, dx: Array, *, sign: int) -> None:
        left, right = widen(a, b)
        store(dx, (left - right) * (sign * float(dloss) / a.shape[0]))

    def accuracy(self, x: Array, label: Array, accuracy: Array, per_class: Array | None, *, top_k: int, axis: int, ignore_label: int | None) -> None:
        classes = x.shape[axis]
        numbers, counted = class_numbers(label, x.shape[:axis] + x.shape[axis + 1 :], classes, ignore_label)
        (scores,) = widen(x)
        true = np.take_along_axis(scores, np.expand_dims(numbers, axis), axis)
        # A number is >= itself and must not count; a NaN is not.
        rivals = (scores >= true).sum(axis=axis) - ~np.isnan(true).squeeze(axis)
        correct = counted & (rivals < top_k)
        accuracy[...] = correct.sum() / max(1, counted.sum())
        if per_class is not None:
            total = np.bincount(numbers[counted], minlength=classes)
            per_class[...] = np.bincount(numbers[correct], minlength=classes) / np.maximum(total, 1)


def _softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    powers /= powers.sum(axis=axis, keepdims=True)
    return powers
