"""How a product is cut into blocks and splits, and the modules that hold a kernel for each choice; kernels/gemm.cu, gemm_mma.cu.

The choice is a plain function of the product's sizes, not of the machine at hand or of a measurement (gemm_tune.py offers that too), so that a
run repeats bit for bit anywhere: sums depend on the splits. `candidates` compares, for each tile and a few numbers of splits, an estimate of
clock cycles on a GPU of SMS multiprocessors: blocks that each must make, times the clocks of a block, and the bytes of partial sums. Its
constants are estimates from arithmetic (kernels/gemm_mma.cuh), not measured.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from caffelite.backends.cuda.launch import Module

SMS = 132  # multiprocessors of an H100
EXACT, TENSOR = "float", ("bf16", "tf32")  # kinds of products
ITEM = {"float": 4, "tf32": 4, "bf16": 2}  # bytes of an operand's element in memory
DEPTH = {"float": 16, "tf32": 16, "bf16": 32}  # columns k of a slice: BK in the kernels
STAGES, SLICE_BYTES = 4, 64  # as in gemm_mma.cuh

ENOUGH_BLOCKS = 264  # two for each multiprocessor
LEAST_SLICES = 8  # of BK columns in a split
MACS = {"tf32": 650, "bf16": 1300}  # multiply-adds a clock that mma.sync can reach on one multiprocessor
EXTRA_SLICES = 12  # what starting a block, filling its slots and storing its sums cost, in slices, where no other block works meanwhile
FEW_WARPS, FEW_RATE = 8, 0.7  # a multiprocessor with fewer warps than these reaches so much of its rate
FINISH_CLOCKS = 5000  # a second kernel
BYTES_A_CLOCK = 2500  # to and from memory, all multiprocessors


class Tile(NamedTuple):
    """A block's part of the product (rows x columns), its threads, how many fit an H100's multiprocessor, and the share of MACS they reach."""

    rows: int
    columns: int
    threads: int
    resident: int
    rate: float

    @property
    def transposed(self) -> Tile:
        return self._replace(rows=self.columns, columns=self.rows)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return STAGES * SLICE_BYTES * (self.rows + self.columns)


FLOAT_TILE = Tile(128, 64, 256, 2, 1.0)
TILES = (
    Tile(64, 64, 128, 4, 0.55),
    Tile(128, 64, 128, 3, 0.75),
    Tile(128, 96, 128, 3, 0.85),
    Tile(128, 128, 128, 2, 0.95),
    Tile(128, 192, 256, 1, 1.0),
)
NARROW_TILE = TILES[1]  # for images padded to 4 channels of bfloat16


class Cut(NamedTuple):
    """A product cut up: `splits` runs of `per_split` columns k each, `blocks` in all; partial_bytes: of the sums of more than one split."""

    tile: Tile
    tiles_m: int
    tiles_n: int
    splits: int
    per_split: int
    blocks: int
    partial_bytes: int


def exact(*, rows: int, columns: int, depth: int, groups: int, outputs: int, classes: int = 1, one_split: bool = False) -> Cut:
    """A product in float32. rows x columns over `depth` for each of groups and classes; outputs: elements of the result."""
    slices, tiles = -(-depth // DEPTH[EXACT]), -(-rows // FLOAT_TILE.rows) * -(-columns // FLOAT_TILE.columns) * groups * classes
    wanted = 1 if one_split else max(1, min(ENOUGH_BLOCKS // max(tiles, 1), slices // LEAST_SLICES))
    return _cut(EXACT, FLOAT_TILE, wanted, rows, columns, depth, groups * classes, outputs)


@functools.cache
def candidates(
    kind: str, *, rows: int, columns: int, depth: int, groups: int, outputs: int, classes: int = 1, transposed: bool = False, narrow: bool = False
) -> tuple[Cut, ...]:
    """Cuts of a product on tensor cores, the cheapest first; transposed: with tiles of more columns than rows. Ties keep the order of TILES."""
    tiles = (NARROW_TILE,) if narrow else TILES
    cuts = [cut for tile in tiles for cut in _candidates(kind, tile.transposed if transposed else tile, rows, columns, depth, groups * classes, outputs)]
    return tuple(sorted(dict.fromkeys(cuts), key=lambda cut: clocks(kind, cut)))


def _candidates(kind: str, tile: Tile, rows: int, columns: int, depth: int, products: int, outputs: int) -> Iterator[Cut]:
    """One split, and as many as give each multiprocessor one to four blocks."""
    tiles, most = -(-rows // tile.rows) * -(-columns // tile.columns) * products, -(-depth // DEPTH[kind]) // LEAST_SLICES
    for wanted in dict.fromkeys(max(1, min(SMS * each // max(tiles, 1), most)) for each in (0, 1, 2, 3, 4)):
        yield _cut(kind, tile, wanted, rows, columns, depth, products, outputs)


def _cut(kind: str, tile: Tile, wanted: int, rows: int, columns: int, depth: int, products: int, outputs: int) -> Cut:
    slices = -(-depth // DEPTH[kind])
    per_split = max(1, -(-slices // wanted)) * DEPTH[kind]
    splits = max(1, -(-depth // per_split))  # a sum of no terms is written too
    down, across = -(-rows // tile.rows), -(-columns // tile.columns)
    return Cut(tile, down, across, splits, per_split, down * across * products * splits, 4 * splits * outputs if splits > 1 else 0)


def clocks(kind: str, cut: Cut) -> float:
    """An estimate of the clock cycles that a cut takes."""
    tile, each = cut.tile, -(-cut.blocks // SMS)
    together = max(1, min(tile.resident, each))
    slices, size = cut.per_split // DEPTH[kind] + EXTRA_SLICES / together, tile.rows * tile.columns * DEPTH[kind]
    rate = MACS[kind] * tile.rate * (FEW_RATE if together * tile.threads < 32 * FEW_WARPS else 1.0)
    products = each * slices * size / rate
    return products + (FINISH_CLOCKS + 2 * cut.partial_bytes / BYTES_A_CLOCK if cut.partial_bytes else 0)


def _names(kind: str, tile: Tile) -> list[str]:
    m, n = tile.rows, tile.columns
    return [f"mma_forward<{kind}, {m}, {n}, 16>", f"mma_data<{kind}, {m}, {n}>", f"mma_weights<{kind}, {n}, {m}, 16>"]


def _narrow_names(tile: Tile) -> list[str]:
    return [f"mma_forward<bf16, {tile.rows}, {tile.columns}, 8>", f"mma_weights<bf16, {tile.columns}, {tile.rows}, 8>"]


# A module for each kind and tile, so that a net compiles those alone that it uses.
MODULES = (
    *(Module("gemm_mma", _names(kind, tile), part=f"{kind}-{tile.rows}x{tile.columns}") for kind in TENSOR for tile in TILES),
    Module("gemm_mma", _narrow_names(NARROW_TILE), part="narrow"),
)
_BY_KERNEL = {name: module for module in MODULES for name in module.names}


def module_of(kernel: str) -> Module:
    """The module that holds a kernel of gemm_mma.cu."""
    return _BY_KERNEL[kernel]
