"""Sums, products and maxima of several arrays of one shape; kernels/eltwise.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.cuda.common import THREADS, Base, blocks, cname
from caffelite.backends.cuda.elementwise import vectors
from caffelite.backends.cuda.launch import TYPES, Module, typed

MOST = 4  # arrays that one pass takes
COUNTED = [f"eltwise_{kernel}<{kind}, {count}>" for kernel in ("sum", "product", "max") for kind in TYPES for count in range(1, MOST + 1)]
ELTWISE = Module("eltwise", [*COUNTED, *typed("eltwise_quotient", "eltwise_max_backward")])


class Eltwise(Base):
    def eltwise_sum(self, xs: Sequence[Array], y: Array, coeffs: Sequence[float], positive: Array | None = None, *, relu: bool = False) -> None:
        _fold(self, "eltwise_sum", xs, y, coeffs, (positive, np.bool_(relu)))

    def eltwise_product_forward(self, xs: Sequence[Array], y: Array) -> None:
        _fold(self, "eltwise_product", xs, y)

    def eltwise_product_backward(self, xs: Sequence[Array], y: Array, dy: Array, dx: Array, *, index: int, stable: bool) -> None:
        if stable:
            _fold(self, "eltwise_product", [*(x for i, x in enumerate(xs) if i != index), dy], dx)
        else:
            _pass(self, "eltwise_quotient", dx, None, xs[index], y, dy, dx)

    def eltwise_max_forward(self, xs: Sequence[Array], y: Array, winner: Array) -> None:
        for start in range(0, len(xs), MOST):
            inputs = xs[start : start + MOST]
            _pass(self, "eltwise_max", y, len(inputs), *_filled(inputs, None), y, winner, np.int32(start))

    def eltwise_max_backward(self, winner: Array, dy: Array, dx: Array, *, index: int) -> None:
        _pass(self, "eltwise_max_backward", dx, None, winner, dy, dx, np.int32(index))


def _fold(ops: Base, kernel: str, xs: Sequence[Array], y: Array, coeffs: Sequence[float] | None = None, last: Sequence[Any] = ()) -> None:
    """y = the sum or product of xs, MOST of them at a time. In between, totals wait in scratch memory, in float32. last: what the
    kernel has to know for the end of the sum."""
    before, partial = None, ops.scratch(4 * y.size) if len(xs) > MOST else None
    for start in range(0, len(xs), MOST):
        inputs, stop = xs[start : start + MOST], start + MOST
        numbers = () if coeffs is None else _filled([np.float32(c) for c in coeffs[start:stop]], np.float32(0))
        _pass(ops, kernel, y, len(inputs), *_filled(inputs, None), *numbers, before, partial if stop < len(xs) else None, *last, y)
        before = partial


def _pass(ops: Base, kernel: str, result: Array, count: int | None, *args: Any) -> None:
    """Runs a kernel for result's type and, if it has several forms, `count` inputs; its last parameter is the number of elements."""
    types = cname(result) if count is None else f"{cname(result)}, {count}"
    ops.launch(ELTWISE, f"{kernel}<{types}>", blocks(vectors(result)), THREADS, *args, np.int64(result.size))


def _filled(values: Sequence[Any], filler: Any) -> list[Any]:
    """The values and as many fillers as make MOST."""
    return [*values, *[filler] * (MOST - len(values))]
