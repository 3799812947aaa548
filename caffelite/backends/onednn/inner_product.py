"""InnerProduct as matrix products: float32 weights are never copied, nor are their gradients."""

from __future__ import annotations

from caffelite.backends.contract import Array, Drop
from caffelite.backends.onednn.dnnl import BF16, F32, Descriptor, Dnnl, Unsupported
from caffelite.backends.onednn.dropout import DropoutOps
from caffelite.backends.onednn.matmul import column_sums, prepared, product
from caffelite.backends.onednn.plan import Drain, Feed, Run, address, compute_type, element_strides, signature, type_of


def matrix(dnnl: Dnnl, x: Array, dtype: int | None = None, *, transpose: bool = False) -> Descriptor:
    """A 2-D array or its transpose as it lies, with its own type or another."""
    strides = element_strides(x)
    shape, steps = (x.shape[::-1], strides[::-1]) if transpose else (x.shape, strides)
    return dnnl.strided(shape, steps, type_of(x) if dtype is None else dtype)


def packed(dnnl: Dnnl, x: Array, dtype: int, *, transpose: bool = False) -> Descriptor:
    """The same matrix in C order of x with another type: what x is cast to when its type does not fit."""
    rows, columns = x.shape
    return dnnl.strided((columns, rows), (1, columns), dtype) if transpose else dnnl.strided((rows, columns), (columns, 1), dtype)


def operand(dnnl: Dnnl, x: Array, dtype: int, purpose: str, *, transpose: bool = False) -> tuple[Feed, Descriptor]:
    """How to get x, or its transpose, as an operand of type dtype; and how it then lies."""
    have = matrix(dnnl, x, transpose=transpose)
    want = have if type_of(x) == dtype else packed(dnnl, x, dtype, transpose=transpose)
    return Feed(dnnl, have, want, purpose), want


def plan_forward(dnnl: Dnnl, x: Array, w: Array, b: Array | None, y: Array, transpose: bool, relu: bool) -> Run:
    dtype = compute_type(x, y)
    feed_x, left = operand(dnnl, x, dtype, "input")
    feed_w, right = operand(dnnl, w, dtype, "weights", transpose=not transpose)
    row = None if b is None else dnnl.strided((1, b.size), (b.size, 1), F32)
    feed_b = None if b is None or row is None else Feed(dnnl, dnnl.strided((1, b.size), (b.size, 1), type_of(b)), row, "bias")
    multiply = product(dnnl, left, right, row, matrix(dnnl, y), relu=relu)

    def forward(x: int, w: int, b: int, y: int) -> None:
        bias = () if feed_b is None else (feed_b(b),)
        multiply(feed_x(x), feed_w(w), *bias, y)

    return forward


def plan_backward_data(dnnl: Dnnl, dy: Array, w: Array, dx: Array, transpose: bool) -> Run:
    dtype = compute_type(dy, dx)
    feed_dy, left = operand(dnnl, dy, dtype, "input")
    feed_w, right = operand(dnnl, w, dtype, "weights", transpose=transpose)
    multiply = product(dnnl, left, right, None, matrix(dnnl, dx))
    return lambda dy, w, dx: multiply(feed_dy(dy), feed_w(w), dx)


def plan_backward_weights(dnnl: Dnnl, x: Array, dy: Array, dw: Array, transpose: bool, add: bool) -> Run:
    """dw = dy^T x, or x^T dy with transpose. The operands are small beside dw, so they are brought into the order that is quickest to multiply."""
    dtype = compute_type(x, dy)
    first, second = (x, dy) if transpose else (dy, x)
    rows, target = len(x), matrix(dnnl, dw)
    left = dnnl.strided((dw.shape[0], rows), (rows, 1), dtype)
    made = dnnl.strided(dw.shape, (dw.shape[1], 1), F32)
    # Adding inside the product needs a target of the product's own layout.
    inside = add and dnnl.equal(made, target)
    multiply, right = prepared(dnnl, left, dnnl.any((rows, dw.shape[1]), dtype), None, made, add=inside)
    feed_first = Feed(dnnl, matrix(dnnl, first, transpose=True), left, "input")
    feed_second = Feed(dnnl, matrix(dnnl, second), right, "second input")
    drain = Drain(dnnl, made, target, "output", add=add and not inside)

    def backward_weights(x: int, dy: int, dw: int) -> None:
        first, second = (x, dy) if transpose else (dy, x)
        multiply(feed_first(first), feed_second(second), drain.target(dw))
        drain.finish(dw)

    return backward_weights


def plan_backward_bias(dnnl: Dnnl, dy: Array, db: Array, add: bool) -> Run:
    if type_of(dy) not in (F32, BF16) or not dy.flags.c_contiguous or not db.flags.c_contiguous:
        raise Unsupported("not contiguous")
    rows, columns = dy.shape
    return column_sums(dnnl, rows, columns, type_of(dy), add=add)


class InnerProductOps(DropoutOps):
    """InnerProduct forward and backward."""

    def inner_product_forward(
        self, x: Array, w: Array, b: Array | None, y: Array, *, transpose: bool, relu: bool = False, drop: Drop | None = None, tf32: bool = False
    ) -> None:
        key = ("inner product forward", signature(x), signature(w), None if b is None else signature(b), signature(y), transpose, relu)

        def build() -> Run:
            self.leave_small(x.shape[0] * w.size, x, w, y)
            return plan_forward(self.dnnl, x, w, b, y, transpose, relu)

        plan = self.plan(key, build)
        if plan is None:
            super().inner_product_forward(x, w, b, y, transpose=transpose, relu=relu)
        else:
            plan(x.ctypes.data, w.ctypes.data, address(b), y.ctypes.data)
        self._drop(y, drop)

    def inner_product_backward_data(
        self, dy: Array, w: Array, dx: Array, positive: Array | None = None, *, transpose: bool, ratio: float | None = None, tf32: bool = False
    ) -> None:
        key = ("inner product backward data", signature(dy), signature(w), signature(dx), transpose)

        def build() -> Run:
            self.leave_small(dy.shape[0] * w.size, dy, w, dx)
            return plan_backward_data(self.dnnl, dy, w, dx, transpose)

        plan = self.plan(key, build)
        if plan is None:
            super().inner_product_backward_data(dy, w, dx, positive, transpose=transpose, ratio=ratio)
        else:
            plan(dy.ctypes.data, w.ctypes.data, dx.ctypes.data)
            self._take_on(dx, positive, ratio)

    def inner_product_backward_weights(
        self, x: Array, dy: Array, dw: Array | None, db: Array | None, *, transpose: bool, accumulate_w: bool, accumulate_b: bool, tf32: bool = False
    ) -> None:
        if dw is not None:
            self._inner_product_weights(x, dy, dw, transpose, accumulate_w)
        if db is not None:
            self._inner_product_bias(x, dy, db, transpose, accumulate_b)

    def _inner_product_weights(self, x: Array, dy: Array, dw: Array, transpose: bool, add: bool) -> None:
        key = ("inner product backward weights", signature(x), signature(dy), signature(dw), transpose, add)

        def build() -> Run:
            self.leave_small(x.shape[0] * dw.size, x, dy)
            return plan_backward_weights(self.dnnl, x, dy, dw, transpose, add)

        plan = self.plan(key, build)
        if plan is None:
            super().inner_product_backward_weights(x, dy, dw, None, transpose=transpose, accumulate_w=add, accumulate_b=False)
        else:
            plan(x.ctypes.data, dy.ctypes.data, dw.ctypes.data)

    def _inner_product_bias(self, x: Array, dy: Array, db: Array, transpose: bool, add: bool) -> None:
        plan = self.plan(("inner product backward bias", signature(dy), signature(db), add), lambda: plan_backward_bias(self.dnnl, dy, db, add))
        if plan is None:
            super().inner_product_backward_weights(x, dy, None, db, transpose=transpose, accumulate_w=False, accumulate_b=add)
        else:
            plan(dy.ctypes.data, db.ctypes.data)
