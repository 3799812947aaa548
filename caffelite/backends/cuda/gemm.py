"""The products behind convolution and inner product; kernels/gemm.cu and gemm.cuh."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.common import FLOAT32, THREADS, Base, blocks, cname
from caffelite.backends.cuda.launch import Module, typed

GEMM = Module("gemm", [*typed("gemm_forward", "gemm_data", "gemm_weights", "gemm_finish"), "gemm_weights_finish<float>", *typed("gemm_pack", arguments=2)])
BM, BN = 128, 64  # a block's part of the product, as in gemm.cuh
DEPTH = {"float": 16, "bf16": 32}  # BK there
ENOUGH_BLOCKS = 264  # two for each multiprocessor of an H100; a constant, so that sums do not depend on the machine
LEAST_SLICES = 8  # of BK columns in a split
IMAGE_CHANNELS = 4  # at most so many channels are an image's, whose float32 products are added in Caffe's order
ALIGN = 256

_INTS = (
    "images height width channels group_channels out_height out_width outputs group_outputs kernel_h kernel_w stride_h stride_w "
    "pad_h pad_w dilation_h dilation_w groups splits"
)
GEOMETRY = np.dtype([*((name, np.int32) for name in _INTS.split()), ("per_split", np.int64)], align=True)


@dataclass(frozen=True)
class Geometry:
    """A convolution in two dimensions: x (N,C,H,W), w (O,C/group,kH,kW), y (N,O,P,Q)."""

    x: Ints
    w: Ints
    y: Ints
    stride: Ints = (1, 1)
    pad: Ints = (0, 0)
    dilation: Ints = (1, 1)
    group: int = 1

    @property
    def cells(self) -> int:
        return self.w[2] * self.w[3]

    @property
    def group_outputs(self) -> int:
        return self.w[0] // self.group

    def struct(self, splits: int, per_split: int) -> np.void:
        """The kernels' struct Geometry."""
        x, y, w = self.x, self.y, self.w
        sizes = (x[0], *x[2:], x[1], w[1], *y[2:], y[1], self.group_outputs)
        return np.void((*sizes, *w[2:], *self.stride, *self.pad, *self.dilation, self.group, splits, per_split), GEOMETRY)


def forward(ops: Base, g: Geometry, x: Array, w: Array, b: Array | None, y: Array, *, relu: bool, transposed: bool = False) -> None:
    """y = w * x + b. w lies as (O, kH, kW, C/group), whatever its shape says; transposed, for one cell and one group: as (C, O). b: (O) or None."""
    columns, kind = g.cells * g.w[1], cname(x)
    planar = x.dtype == FLOAT32 and g.cells > 1 and g.w[1] <= IMAGE_CHANNELS
    plan = _Plan(kind, rows=y.size // g.y[1], columns=g.group_outputs, depth=columns, groups=g.group, outputs=y.size, one_split=planar)
    repack = planar or transposed or w.dtype != x.dtype
    space = _Space(ops, packed=w.size * x.itemsize if repack else 0, bias=_float_bytes(b), partial=plan.partial_bytes)
    if repack:
        shape = (g.w[0], g.cells, 1, g.w[1]) if planar else (1, g.w[1], 1, g.w[0]) if transposed else (1, 1, 1, w.size)
        w = _packed(ops, w, space.packed(x, w.size), shape)
    bias, partial = space.floats(b), space.partial()
    aligned = np.bool_(_whole_vectors(g.w[1], x, w) and not planar)
    final = (None, np.bool_(False)) if partial is not None else (bias, np.bool_(relu))
    ops.launch(GEMM, f"gemm_forward<{kind}>", plan.grid, THREADS, x, w, final[0], y, partial, plan.struct(g), aligned, np.bool_(planar), final[1])
    if partial is not None:
        _finish(ops, partial, bias, y, plan, columns=g.y[1], relu=relu)


def backward_data(ops: Base, g: Geometry, dy: Array, w: Array, dx: Array, positive: Array | None, *, packed: bool = False) -> None:
    """dx = the transpose of w, applied to dy; positive as in the contract. packed: w lies as (group, C/group, kH, kW, O/group) already."""
    kind = cname(dx)
    plan = _Plan(kind, rows=dx.size // g.x[1], columns=g.w[1], depth=g.cells * g.group_outputs, groups=g.group, outputs=dx.size)
    ready = packed and w.dtype == dx.dtype
    space = _Space(ops, packed=0 if ready else w.size * dx.itemsize, bias=0, partial=plan.partial_bytes)
    if not ready:
        # Packing what is packed already is a copy with another type: one output, one cell.
        shape = (1, 1, 1, w.size) if packed else (g.group, g.group_outputs, g.cells, g.w[1])
        w = _packed(ops, w, space.packed(dx, w.size), shape)
    partial = space.partial()
    aligned = np.bool_(_whole_vectors(g.group_outputs, dy, w))
    ops.launch(GEMM, f"gemm_data<{kind}>", plan.grid, THREADS, dy, w, dx, positive, partial, plan.struct(g), aligned)
    if partial is not None:
        _finish(ops, partial, None, dx, plan, columns=g.x[1], positive=positive)


def backward_weights(ops: Base, g: Geometry, x: Array, dy: Array, dw: Array, db: Array | None, accumulate_w: bool, accumulate_b: bool) -> None:
    """dw (+)= the sum over all pixels of dy times what their windows hold of x; dw (float32) lies as (O, kH, kW, C/group).
    db (O), or None: (+)= the sum over all pixels of dy."""
    kind, columns = cname(x), g.cells * g.w[1]
    plan = _Plan(kind, rows=g.group_outputs, columns=columns, depth=dy.size // g.y[1], groups=g.group, outputs=dw.size + (0 if db is None else 2 * db.size))
    partial = _Space(ops, packed=0, bias=0, partial=plan.partial_bytes).partial()
    whole = [np.bool_(_whole_vectors(channels, operand)) for channels, operand in ((g.w[1], x), (g.group_outputs, dy))]
    adds = (np.bool_(accumulate_w), np.bool_(accumulate_b))
    ops.launch(GEMM, f"gemm_weights<{kind}>", plan.grid, THREADS, x, dy, dw, db, partial, plan.struct(g), *whole, *adds)
    if partial is not None:
        sizes = (np.int64(dw.size), np.int32(g.y[1]), np.int32(plan.splits))
        ops.launch(GEMM, "gemm_weights_finish<float>", blocks(dw.size), THREADS, partial, dw, db, *sizes, *adds)


class _Plan:
    """How a product of rows x columns over `depth`, for each of `groups`, is cut into blocks and splits; outputs: elements of the result."""

    def __init__(self, kind: str, *, rows: int, columns: int, depth: int, groups: int, outputs: int, one_split: bool = False) -> None:
        slices, tiles = -(-depth // DEPTH[kind]), -(-rows // BM) * -(-columns // BN) * groups
        wanted = 1 if one_split else max(1, min(ENOUGH_BLOCKS // max(tiles, 1), slices // LEAST_SLICES))
        self.per_split = max(1, -(-slices // wanted)) * DEPTH[kind]
        self.splits = max(1, -(-depth // self.per_split))  # a sum of no terms is written too
        self.grid = (-(-rows // BM), -(-columns // BN), self.splits * groups)
        self.partial_bytes = 4 * self.splits * outputs if self.splits > 1 else 0

    def struct(self, g: Geometry) -> np.void:
        return g.struct(self.splits, self.per_split)


class _Space:
    """The scratch memory of one product: weights in another order or type, the bias in float32, partial sums."""

    def __init__(self, ops: Base, *, packed: int, bias: int, partial: int) -> None:
        self._ops, self._sizes = ops, (packed, bias, partial)
        sizes = [-(-size // ALIGN) * ALIGN for size in self._sizes]
        self._starts = (0, sizes[0], sizes[0] + sizes[1])
        self._buffer = ops.scratch(sum(sizes)) if sum(sizes) else None

    def packed(self, like: Array, count: int) -> Array:
        """Room for `count` weights in the type of `like`."""
        return self._part(0, count, like.dtype)

    def floats(self, b: Array | None) -> Array | None:
        """b in float32."""
        if b is None or b.dtype == FLOAT32:
            return b
        return _packed(self._ops, b, self._part(1, b.size, "float32"), (1, 1, 1, b.size))

    def partial(self) -> Array | None:
        """Room for the partial sums; None where there is one split."""
        return self._part(2, self._sizes[2] // 4, "float32") if self._sizes[2] else None

    def _part(self, number: int, count: int, dtype: Any) -> Array:
        return self._ops.part(self._buffer, self._starts[number], (count,), dtype)


def _whole_vectors(channels: int, *operands: Array) -> bool:
    """Whether `channels` elements are whole vectors of 16 bytes, and all operands start where one may: views need not."""
    return all(channels * x.itemsize % 16 == 0 and x.address % 16 == 0 for x in operands)


def _float_bytes(b: Array | None) -> int:
    return 0 if b is None or b.dtype == FLOAT32 else 4 * int(b.size)


def _packed(ops: Base, w: Array, out: Array, shape: Ints) -> Array:
    """w of `shape` (group, outputs, cells, channels) as (group, channels, cells, outputs), in the type of `out`."""
    ops.launch(GEMM, f"gemm_pack<{cname(w)}, {cname(out)}>", blocks(prod(shape)), THREADS, w, out, *(np.int32(size) for size in shape))
    return out


def _finish(
    ops: Base,
    partial: Array,
    bias: Array | None,
    y: Array,
    plan: _Plan,
    *,
    columns: int,
    relu: bool = False,
    positive: Array | None = None,
) -> None:
    numbers = (np.int64(y.size), np.int32(columns), np.int32(plan.splits), np.bool_(relu))
    ops.launch(GEMM, f"gemm_finish<{cname(y)}>", blocks(y.size), THREADS, partial, bias, positive, y, *numbers)
