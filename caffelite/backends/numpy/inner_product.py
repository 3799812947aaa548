"""InnerProduct: plain matrix products."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Drop
from caffelite.backends.numpy.common import column_sums, multiplied, store, store_gradient, taken_on, widen
from caffelite.backends.numpy.dropout import Dropout


class InnerProduct(Dropout):  # which a product does after it where asked to
    def inner_product_forward(
        self, x: Array, w: Array, b: Array | None, y: Array, *, transpose: bool, relu: bool = False, drop: Drop | None = None, tf32: bool = False
    ) -> None:
        left, right = widen(x, w)
        values = multiplied(left, right if transpose else right.T)
        if b is not None:
            values += b.astype(values.dtype, copy=False)
        if relu:
            np.maximum(values, 0, out=values)
        store(y, values)
        self._drop(y, drop)

    def inner_product_backward_data(
        self, dy: Array, w: Array, dx: Array, positive: Array | None = None, *, transpose: bool, ratio: float | None = None, tf32: bool = False
    ) -> None:
        left, right = widen(dy, w)
        store(dx, taken_on(multiplied(left, right.T if transpose else right), positive, ratio, dx.dtype))

    def inner_product_backward_weights(
        self, x: Array, dy: Array, dw: Array | None, db: Array | None, *, transpose: bool, accumulate_w: bool, accumulate_b: bool, tf32: bool = False
    ) -> None:
        data, gradient = widen(x, dy)
        if dw is not None:
            store_gradient(dw, multiplied(data.T, gradient) if transpose else multiplied(gradient.T, data), accumulate_w)
        if db is not None:
            store_gradient(db, column_sums(gradient), accumulate_b)
