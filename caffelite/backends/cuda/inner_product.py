"""Inner product: a 1x1 convolution of M images of one pixel; kernels/gemm.cu."""

from __future__ import annotations

from caffelite.backends.contract import Array, Drop
from caffelite.backends.cuda.gemm import Finish, Geometry, Gradients, backward_data, backward_weights, forward
from caffelite.backends.cuda.scale_bias import ScaleBias


class InnerProduct(ScaleBias):  # whose sum is the bias gradient too
    def inner_product_forward(
        self, x: Array, w: Array, b: Array | None, y: Array, *, transpose: bool, relu: bool = False, drop: Drop | None = None, tf32: bool = False
    ) -> None:
        forward(self, _geometry(x, y), x, w, b, y, Finish(relu, drop), transposed=transpose, tf32=tf32)

    def inner_product_backward_data(
        self, dy: Array, w: Array, dx: Array, positive: Array | None = None, *, transpose: bool, ratio: float | None = None, tf32: bool = False
    ) -> None:
        backward_data(self, _geometry(dx, dy), dy, w, dx, Finish(positive=positive, ratio=ratio), packed=transpose, tf32=tf32)  # (K,N) lies packed

    def inner_product_backward_weights(
        self, x: Array, dy: Array, dw: Array | None, db: Array | None, *, transpose: bool, accumulate_w: bool, accumulate_b: bool, tf32: bool = False
    ) -> None:
        if dw is not None and transpose:  # dw^T = x^T dy is the other operand's
            backward_weights(self, _geometry(dy, x), dy, x, Gradients(dw, None, accumulate_w, False), tf32=tf32)
        elif dw is not None:
            backward_weights(self, _geometry(x, dy), x, dy, Gradients(dw, db, accumulate_w, accumulate_b), tf32=tf32)
            return
        if db is not None:
            self.bias_backward(dy, db.reshape((1, -1)), accumulate=accumulate_b)


def _geometry(x: Array, y: Array) -> Geometry:
    """x (M,K) and y (M,N) as images of one pixel."""
    return Geometry((*x.shape, 1, 1), (y.shape[1], x.shape[1], 1, 1), (*y.shape, 1, 1))
