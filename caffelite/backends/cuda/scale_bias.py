"""Multiplying by and adding a broadcast operand; kernels/scale_bias.cu."""

from __future__ import annotations

from math import prod

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.broadcast import as_struct, reduce, runs_of, sums
from caffelite.backends.cuda.common import THREADS, Base, blocks, cname
from caffelite.backends.cuda.elementwise import vectors
from caffelite.backends.cuda.launch import Module, typed

SCALE_BIAS = Module("scale_bias", [*typed("scale_bias", arguments=3), *typed("spread"), *dict.fromkeys(sums("SumTerm") + sums("ProductTerm"))])


class ScaleBias(Base):
    def scale_forward(self, x: Array, s: Array, b: Array | None, y: Array) -> None:
        _apply(self, x, s, b, y)

    def scale_backward_data(self, dy: Array, s: Array, dx: Array) -> None:
        _apply(self, dy, s, None, dx)

    def scale_backward_factor(self, x: Array, dy: Array, ds: Array, *, accumulate: bool) -> None:
        reduce(self, SCALE_BIAS, "ProductTerm", x, dy, ds, runs_of(dy.shape, ds.shape), accumulate)

    def bias_forward(self, x: Array, b: Array, y: Array) -> None:
        _apply(self, x, None, b, y)

    def bias_backward(self, dy: Array, db: Array, *, accumulate: bool) -> None:
        reduce(self, SCALE_BIAS, "SumTerm", None, dy, db, runs_of(dy.shape, db.shape), accumulate)


def _apply(ops: Base, x: Array, s: Array | None, b: Array | None, y: Array) -> None:
    """y = x s + b, without s or b where they are None. s and b that broadcast along different axes are spread out first."""
    given = [runs_of(x.shape, operand.shape) for operand in (s, b) if operand is not None]
    most = 4 if given[0] == given[-1] else 0
    found: list[Array | None] = []
    runs: Ints = ()
    for operand in (s, b):
        if operand is not None:
            operand, runs = _spread(ops, operand, runs_of(x.shape, operand.shape), most)
        found.append(operand)
    names = [cname(x), *("float" if operand is None else cname(operand) for operand in found)]
    name = f"scale_bias<{', '.join(names)}>"
    ops.launch(SCALE_BIAS, name, blocks(vectors(x)), THREADS, x, *found, y, as_struct(runs), np.int64(x.size))


def _spread(ops: Base, operand: Array, runs: Ints, most: int) -> tuple[Array, Ints]:
    """The operand and its runs, spread along its inner runs until at most `most` are left; 0: along all."""
    while len(runs) > max(most, 4):
        *outer, rows, between, columns = runs
        operand = _spread_once(ops, operand, (1, operand.size // columns, between, columns))
        runs = (*outer, rows * between * columns)
    if most == 0:
        operand, runs = _spread_once(ops, operand, runs), (1, 1, 1, prod(runs))
    return operand, runs


def _spread_once(ops: Base, operand: Array, runs: Ints) -> Array:
    count = prod(runs)
    wide = ops.new((count,), operand.dtype)
    ops.launch(SCALE_BIAS, f"spread<{cname(operand)}>", blocks(count), THREADS, operand, wide, as_struct(runs), np.int64(count))
    return wide
