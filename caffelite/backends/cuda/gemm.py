"""The products behind convolution and inner product; kernels/gemm.cu (float32 that is exact), gemm_mma.cu (bfloat16 and tf32), and
gemm_wgmma.cu and gemm_tma.cu (bfloat16 on Hopper)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import gcd, prod
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Drop, Ints
from caffelite.backends.cuda.array import Boxes
from caffelite.backends.cuda.common import FLOAT32, THREADS, Base, blocks, cname
from caffelite.backends.cuda.dropout import DRAWN, DROP, as_struct, factor
from caffelite.backends.cuda.gemm_plan import EXACT, ITEM, Cut, candidates, exact, kernel, module_of
from caffelite.backends.cuda.launch import Module, typed
from caffelite.backends.cuda.space import Space

GEMM = Module(
    "gemm",
    [
        "gemm_forward",
        "gemm_data",
        "gemm_weights",
        "gemm_weights_finish",
        *typed("gemm_finish", "gemm_finish_dropout"),
        *typed("gemm_pack", "gemm_pad", arguments=2),
    ],
)
NO_DROP = np.void((0, 0, 0, 0), DROP)
IMAGE_CHANNELS = 4  # at most so many channels are an image's, whose float32 products are added in Caffe's order
BOX_PIXELS = 64  # rows of a box of the weight gradient: columns k of a slice
VECTOR = 16  # bytes of a piece that tensor cores' operands are copied by

_INTS = (
    "images height width channels group_channels out_height out_width outputs group_outputs kernel_h kernel_w stride_h stride_w "
    "pad_h pad_w dilation_h dilation_w groups splits kept_channels kept_outputs tiles_m tiles_n"
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

    @property
    def plain(self) -> bool:
        """Whether pixels of y are those of x, and their windows these pixels."""
        return self.cells == prod(self.stride) == 1 and not any(self.pad)

    @property
    def class_rows(self) -> int:
        """Pixels of x in the largest class of those that meet the same cells: see kernels/gemm.cuh."""
        return self.x[0] * -(-self.x[2] // self.stride[0]) * -(-self.x[3] // self.stride[1])

    @property
    def class_cells(self) -> int:
        """Kernel cells that a pixel of x meets at most."""
        return prod(-(-kernel // (stride // gcd(stride, dilation))) for kernel, stride, dilation in zip(self.w[2:], self.stride, self.dilation))

    def struct(self, cut: Cut, channels: int = 0, outputs: int = 0) -> np.void:
        """The kernels' struct Geometry. channels, outputs: of a group as they lie padded; 0: as they are."""
        x, y, w, own, out = self.x, self.y, self.w, channels or self.w[1], outputs or self.group_outputs
        sizes = (x[0], *x[2:], own * self.group, own, *y[2:], out * self.group, out)
        kept = (self.w[1], self.group_outputs, cut.tiles_m, cut.tiles_n)
        return np.void((*sizes, *w[2:], *self.stride, *self.pad, *self.dilation, self.group, cut.splits, *kept, cut.per_split), GEOMETRY)


@dataclass(frozen=True)
class Finish:
    """What becomes of sums before they are stored: the kernels' struct Finish. drop: after relu. positive, ratio: as in the contract."""

    relu: bool = False
    drop: Drop | None = None
    positive: Array | None = None
    ratio: float | None = None

    def forward(self, bias: Array | None, partial: Array | None) -> tuple[Any, ...]:
        """bias, relu, number, drop: arguments of a forward kernel, which finishes nothing where it leaves partial sums."""
        if partial is not None:
            return None, np.bool_(False), None, NO_DROP
        return bias, np.bool_(self.relu), *self.dropout

    @property
    def dropout(self) -> tuple[Array | None, np.void]:
        """number, drop."""
        return (None, NO_DROP) if self.drop is None else (self.drop.key.iteration, as_struct(self.drop))

    @property
    def below(self) -> tuple[Array | None, np.float32]:
        """positive, factor: arguments of a data gradient's kernels."""
        return self.positive, np.float32(0) if self.ratio is None else factor(self.ratio)


def forward(ops: Base, g: Geometry, x: Array, w: Array, b: Array | None, y: Array, finish: Finish, *, transposed: bool = False, tf32: bool = False) -> None:
    """y = w * x + b. w lies as (O, kH, kW, C/group), whatever its shape says; transposed, for one cell and one group: as (C, O). b: (O) or None."""
    kind = _kind(x, tf32)
    if kind == EXACT:
        return _exact_forward(ops, g, x, w, b, y, finish, transposed=transposed)
    fit = _Fit.pieces(x, g.w[1], narrow=kind == "bf16")
    repack = transposed or w.dtype != x.dtype or fit.channels != g.w[1] or w.address % VECTOR != 0
    weights = g.w[0] * g.cells * fit.channels * x.itemsize if repack else 0

    def run(cut: Cut) -> None:
        space = _Space(ops, weights=weights, bias=_float_bytes(b), partial=cut.partial_bytes, x=fit.nbytes)
        left = _padded(ops, x, space.part("x", x.dtype), g.w[1], fit.channels) if fit.copy else x
        right, room = w, space.part("weights", x.dtype)
        if repack:
            right = _packed(ops, w, room, (1, g.w[1], 1, g.w[0]), fit.channels) if transposed else _padded(ops, w, room, g.w[1], fit.channels)
        bias, partial = space.floats(b), space.part("partial", "float32")
        first, *final = finish.forward(bias, partial)
        windows = _boxes(left, y.size // g.y[1], fit.channels, cut.tile.rows) if g.plain and g.group == 1 else None
        filters = _boxes(right, g.w[0], g.cells * fit.channels, cut.tile.columns)
        name, operands = _loaded("forward", kind, cut, fit.piece, (left, right), (windows, filters))
        _launch(ops, name, cut, *operands, first, y, partial, g.struct(cut, channels=fit.channels), *final)
        if partial is not None:
            _finish(ops, partial, bias, y, cut, finish, columns=g.y[1])

    sizes = {"rows": y.size // g.y[1], "columns": g.group_outputs, "depth": g.cells * fit.channels, "groups": g.group, "outputs": y.size}
    run(_picked(ops, _shape("forward", kind, g), candidates(kind, **sizes, narrow=fit.piece < VECTOR, units=ops.tuner.units), run))
    return None


def backward_data(ops: Base, g: Geometry, dy: Array, w: Array, dx: Array, finish: Finish, *, packed: bool = False, tf32: bool = False) -> None:
    """dx = the transpose of w, applied to dy. packed: w lies as (group, C/group, kH, kW, O/group) already."""
    kind = _kind(dx, tf32)
    fit = _Fit.pieces(dy, g.group_outputs) if kind != EXACT else _Fit(g.group_outputs)
    ready = packed and w.dtype == dx.dtype and fit.channels == g.group_outputs and (kind == EXACT or w.address % VECTOR == 0)
    weights = 0 if ready else g.w[1] * g.group * g.cells * fit.channels * dx.itemsize
    # Packing what is packed already is a copy with another type and zeros: rows of outputs, each a group of one cell and one channel.
    order = (w.size // g.group_outputs, g.group_outputs, 1, 1) if packed else (g.group, g.group_outputs, g.cells, g.w[1])

    def run(cut: Cut) -> None:
        space = _Space(ops, weights=weights, partial=cut.partial_bytes, dy=fit.nbytes)
        left = _padded(ops, dy, space.part("dy", dy.dtype), g.group_outputs, fit.channels) if fit.copy else dy
        right = w if ready else _packed(ops, w, space.part("weights", dx.dtype), order, fit.channels)
        partial = space.part("partial", "float32")
        if kind == EXACT:
            aligned = np.bool_(_whole_vectors(g.group_outputs, left, right))
            ops.launch(GEMM, "gemm_data", cut.blocks, cut.tile.threads, left, right, dx, *finish.below, partial, g.struct(cut), aligned)
        else:
            windows = _boxes(left, dy.size // g.y[1], fit.channels, cut.tile.rows) if g.plain and g.group == 1 else None
            filters = _boxes(right, g.w[1] * g.group, g.cells * fit.channels, cut.tile.columns) if prod(g.stride) == 1 else None
            name, operands = _loaded("data", kind, cut, VECTOR, (left, right), (windows, filters))
            _launch(ops, name, cut, *operands, dx, *finish.below, partial, g.struct(cut, outputs=fit.channels))
        if partial is not None:
            _finish(ops, partial, None, dx, cut, finish, columns=g.x[1])

    sizes = {"rows": g.class_rows, "columns": g.w[1], "depth": g.class_cells * fit.channels, "groups": g.group, "outputs": dx.size}
    if kind == EXACT:
        run(exact(**sizes, classes=prod(g.stride)))
    else:
        run(_picked(ops, _shape("data", kind, g), candidates(kind, **sizes, classes=prod(g.stride), units=ops.tuner.units), run))


@dataclass(frozen=True)
class Gradients:
    """Where backward_weights puts its sums: dw (float32) as (O, kH, kW, C/group), and db (O; float32), or None. add_w, add_b: to what is there."""

    dw: Array
    db: Array | None
    add_w: bool
    add_b: bool

    def split_bytes(self, cut: Cut) -> int:
        """Of db's partial sums, doubles (O, splits)."""
        return 8 * cut.splits * int(self.db.size) if self.db is not None and cut.splits > 1 else 0

    def spare(self, ops: Base) -> Gradients:
        """Others of these sizes, for trials."""
        kind, size = self.dw.dtype, self.dw.size
        scratch = ops.scratch((size + (self.db.size if self.db is not None else 0)) * kind.itemsize, "trial")
        return Gradients(
            ops.part(scratch, 0, (size,), kind),
            None if self.db is None else ops.part(scratch, size * kind.itemsize, (self.db.size,), kind),
            add_w=False,
            add_b=False,
        )


def backward_weights(ops: Base, g: Geometry, x: Array, dy: Array, to: Gradients, *, tf32: bool = False) -> None:
    """dw (+)= the sum over all pixels of dy times what their windows hold of x; db (+)= the sum over all pixels of dy."""
    kind = _kind(x, tf32)
    if kind == EXACT:
        return _exact_weights(ops, g, x, dy, to)
    fit, fit_dy = _Fit.pieces(x, g.w[1], narrow=kind == "bf16"), _Fit.pieces(dy, g.group_outputs)

    def run(cut: Cut, to: Gradients) -> None:
        space = _Space(ops, partial=cut.partial_bytes, partial_b=to.split_bytes(cut), x=fit.nbytes, dy=fit_dy.nbytes)
        right = _padded(ops, x, space.part("x", x.dtype), g.w[1], fit.channels) if fit.copy else x
        left = _padded(ops, dy, space.part("dy", dy.dtype), g.group_outputs, fit_dy.channels) if fit_dy.copy else dy
        partial = (space.part("partial", "float32"), space.part("partial_b", "float64"))
        pixels = dy.size // g.y[1]
        boxes = (_boxes(left, pixels, g.group * fit_dy.channels, BOX_PIXELS), _boxes(right, pixels, g.group * fit.channels, BOX_PIXELS) if g.plain else None)
        name, operands = _loaded("weights", kind, cut, fit.piece, (right, left), boxes)
        adds = (np.bool_(to.add_w), np.bool_(to.add_b))
        _launch(ops, name, cut, *operands, to.dw, to.db, *partial, g.struct(cut, fit.channels, fit_dy.channels), *adds)
        _finish_weights(ops, partial, to, cut)

    def trial(cut: Cut) -> None:  # not into what gradients have been added to
        run(cut, to.spare(ops))

    sizes = {"rows": g.group_outputs, "columns": g.cells * fit.channels, "depth": dy.size // g.y[1], "groups": g.group, "outputs": to.dw.size}
    cuts = candidates(kind, **sizes, transposed=True, narrow=fit.piece < VECTOR, units=ops.tuner.units)
    run(_picked(ops, _shape("weights", kind, g), cuts, trial), to)
    return None


def _exact_forward(ops: Base, g: Geometry, x: Array, w: Array, b: Array | None, y: Array, finish: Finish, *, transposed: bool) -> None:
    columns = g.cells * g.w[1]
    planar = g.cells > 1 and g.w[1] <= IMAGE_CHANNELS
    cut = exact(rows=y.size // g.y[1], columns=g.group_outputs, depth=columns, groups=g.group, outputs=y.size, one_split=planar)
    repack = planar or transposed or w.dtype != x.dtype
    space = _Space(ops, weights=w.size * x.itemsize if repack else 0, bias=_float_bytes(b), partial=cut.partial_bytes)
    if repack:
        shape = (g.w[0], g.cells, 1, g.w[1]) if planar else (1, g.w[1], 1, g.w[0]) if transposed else (1, 1, 1, w.size)
        w = _packed(ops, w, space.part("weights", x.dtype), shape)
    bias, partial = space.floats(b), space.part("partial", "float32")
    aligned = np.bool_(_whole_vectors(g.w[1], x, w) and not planar)
    first, *final = finish.forward(bias, partial)
    ops.launch(GEMM, "gemm_forward", cut.blocks, cut.tile.threads, x, w, first, y, partial, g.struct(cut), aligned, np.bool_(planar), *final)
    if partial is not None:
        _finish(ops, partial, bias, y, cut, finish, columns=g.y[1])


def _exact_weights(ops: Base, g: Geometry, x: Array, dy: Array, to: Gradients) -> None:
    cut = exact(rows=g.group_outputs, columns=g.cells * g.w[1], depth=dy.size // g.y[1], groups=g.group, outputs=to.dw.size)
    space = _Space(ops, partial=cut.partial_bytes, partial_b=to.split_bytes(cut))
    partial = (space.part("partial", "float32"), space.part("partial_b", "float64"))
    whole = [np.bool_(_whole_vectors(channels, operand)) for channels, operand in ((g.w[1], x), (g.group_outputs, dy))]
    adds = (np.bool_(to.add_w), np.bool_(to.add_b))
    ops.launch(GEMM, "gemm_weights", cut.blocks, cut.tile.threads, x, dy, to.dw, to.db, *partial, g.struct(cut), *whole, *adds)
    _finish_weights(ops, partial, to, cut)


@dataclass(frozen=True)
class _Fit:
    """How an operand lies: the channels of a group as they lie, the bytes of a piece (0 where nothing is copied in pieces), and the bytes of
    the copy that this takes, 0 for none."""

    channels: int
    piece: int = 0
    nbytes: int = 0

    @classmethod
    def pieces(cls, x: Array, channels: int, *, narrow: bool = False) -> _Fit:
        """For tensor cores: whole pieces, at addresses of whole pieces. narrow: pieces may be of 8 bytes, for an image's few channels of bfloat16."""
        piece = VECTOR // 2 if narrow and channels <= IMAGE_CHANNELS else VECTOR
        size = piece // x.itemsize
        padded = -(-channels // size) * size
        if padded == channels and x.address % piece == 0:
            return cls(channels, piece)
        return cls(padded, piece, max(x.size // max(channels, 1) * padded * x.itemsize, VECTOR))  # one vector of nothing: an address

    @property
    def copy(self) -> bool:
        """Whether the operand has to be copied."""
        return self.nbytes > 0


class _Space(Space):
    """The scratch memory of one product: weights in another order or type, the bias in float32, partial sums, operands with more channels."""

    def floats(self, b: Array | None) -> Array | None:
        """b in float32."""
        if b is None or b.dtype == FLOAT32:
            return b
        return _packed(self._ops, b, self.part("bias", "float32"), (1, 1, 1, b.size))


def _kind(x: Array, tf32: bool) -> str:
    """The kind of product: what the kernels are compiled for."""
    name = cname(x)
    assert name in ITEM, name
    return "tf32" if tf32 and name == EXACT else name


def _shape(product: str, kind: str, g: Geometry) -> str:
    """Names a product for the table of what was timed."""
    sizes = " ".join("x".join(map(str, size)) for size in (g.x, g.w, g.stride, g.pad, g.dilation))
    return f"{product} {kind}: x, w, stride, pad, dilation {sizes} group {g.group}"


def _picked(ops: Base, shape: str, cuts: Sequence[Cut], trial: Callable[[Cut], None]) -> Cut:
    """The cut that the tuner picks; what trials need of memory beyond this, other cuts' partial sums and outputs of no use, is given back."""
    with ops.trials():
        return ops.tuner.pick(shape, cuts, trial)


def _launch(ops: Base, name: str, cut: Cut, *args: Any) -> None:
    ops.launch(module_of(name), name, cut.blocks, cut.tile.threads, *args, shared=cut.tile.shared)


def _boxes(x: Array, rows: int, columns: int, height: int) -> Boxes | None:
    """A matrix for TMA; None where it is empty, or has more rows than an index counts."""
    return Boxes(x, rows, columns, height) if 0 < rows < 1 << 31 else None


def _loaded(
    product: str, kind: str, cut: Cut, piece: int, arrays: tuple[Array, Array], boxes: tuple[Boxes | None, Boxes | None]
) -> tuple[str, tuple[Array | Boxes, ...]]:
    """The kernel and its operands: two arrays; or, where TMA loads, the first array, which is gathered unless both come in boxes, and A and B."""
    left, right = boxes
    count = (left is not None) + (right is not None)
    name = kernel(product, kind, cut.tile, piece, count)
    return name, (arrays[0], left or right, right or left) if cut.tile.unit == "tma" and count else arrays


def _whole_vectors(channels: int, *operands: Array) -> bool:
    """Whether `channels` elements are whole vectors of 16 bytes, and all operands start where one may: views need not."""
    return all(channels * x.itemsize % VECTOR == 0 and x.address % VECTOR == 0 for x in operands)


def _float_bytes(b: Array | None) -> int:
    return 0 if b is None or b.dtype == FLOAT32 else 4 * int(b.size)


def _packed(ops: Base, w: Array, out: Array | None, shape: Ints, padded: int = 0) -> Array:
    """w of `shape` (group, outputs, cells, channels) as (group, channels, cells, outputs), in the type of `out`; padded: outputs with zeros, or 0."""
    sizes = (*shape, padded or shape[1])
    count = prod(shape) // max(shape[1], 1) * sizes[4]
    ops.launch(GEMM, f"gemm_pack<{cname(w)}, {cname(out)}>", blocks(count), THREADS, w, out, *(np.int32(size) for size in sizes))
    return out


def _padded(ops: Base, x: Array, out: Array | None, channels: int, padded: int) -> Array:
    """x as rows of `channels` that end in zeros up to `padded`, a multiple of 4, in the type of `out`."""
    rows = x.size // max(channels, 1)
    if rows:
        name = f"gemm_pad<{cname(x)}, {cname(out)}>"
        ops.launch(GEMM, name, blocks(rows * padded // 4), THREADS, x, out, np.int64(rows), np.int32(channels), np.int32(padded))
    return out


def _finish(ops: Base, partial: Array, bias: Array | None, y: Array, cut: Cut, finish: Finish, *, columns: int) -> None:
    numbers = (np.int64(y.size), np.int32(columns), np.int32(cut.splits), np.bool_(finish.relu))
    if finish.drop is not None:
        name = f"gemm_finish_dropout<{cname(y)}>"
        ops.launch(GEMM, name, blocks(-(-y.size // DRAWN)), THREADS, partial, bias, y, *numbers, *finish.dropout)
    else:
        ops.launch(GEMM, f"gemm_finish<{cname(y)}>", blocks(y.size), THREADS, partial, bias, *finish.below, y, *numbers)


def _finish_weights(ops: Base, partial: tuple[Array | None, Array | None], to: Gradients, cut: Cut) -> None:
    """Adds up the partial sums of dw and db, where there are some."""
    if cut.splits > 1:
        outputs = 0 if to.db is None else to.db.size
        numbers = (np.int64(to.dw.size), np.int32(outputs), np.int32(cut.splits), np.bool_(to.add_w), np.bool_(to.add_b))
        ops.launch(GEMM, "gemm_weights_finish", blocks(to.dw.size), THREADS, *partial, to.dw, to.db, *numbers)
