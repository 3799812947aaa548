"""How a product is cut into blocks and splits, and the modules that hold a kernel for each choice; kernels/gemm.cu, gemm_mma.cu,
gemm_wgmma.cu, gemm_tma.cu.

The choice is a plain function of the product's sizes, not of the machine at hand or of a measurement (gemm_tune.py offers that too), so that a
run repeats bit for bit anywhere: sums depend on the splits. `candidates` compares, for each tile and a few numbers of splits, an estimate of
clock cycles on a GPU of SMS multiprocessors: blocks that each must make, times the clocks of a block, and the bytes of partial sums. Its
constants are estimates from arithmetic (kernels/gemm_mma.cuh), not measured.
A unit is what makes a product: mma (mma.sync, everywhere), wgmma (Hopper alone, bfloat16), or tma (wgmma too, with operands that TMA loads where it
can). Estimates of two units are not compared: which one is faster only a measurement can tell.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

from caffelite.backends.cuda.launch import Module

SMS = 132  # multiprocessors of an H100
EXACT, TENSOR = "float", ("bf16", "tf32")  # kinds of products
ITEM = {"float": 4, "tf32": 4, "bf16": 2}  # bytes of an operand's element in memory
UNITS = ("mma", "wgmma", "tma")
DEPTH = {"float": 16, "tf32": 16, "bf16": 32}  # columns k of a slice of gemm.cu and gemm_mma.cu

ENOUGH_BLOCKS = 264  # two for each multiprocessor
LEAST_SLICES = 8  # of DEPTH columns in a split
# Multiply-adds a clock that a unit can reach on one multiprocessor.
MACS = {("mma", "tf32"): 650, ("mma", "bf16"): 1300, ("wgmma", "bf16"): 1500, ("tma", "bf16"): 1500}
EXTRA_SLICES = 12  # of DEPTH columns: what starting a block, filling its slots and storing its sums cost, in slices, where no other block works meanwhile
FEW_WARPS, FEW_RATE = 8, 0.7  # a multiprocessor with fewer warps than these reaches so much of its rate
FINISH_CLOCKS = 5000  # a second kernel
BYTES_A_CLOCK = 2500  # to and from memory, all multiprocessors


class Tile(NamedTuple):
    """A block's part of the product (rows x columns), its threads, how many fit an H100's multiprocessor, and the share of MACS they reach;
    its unit, slots, the bytes along k of a slice, and those of shared memory beside the slots, for each row and in all."""

    rows: int
    columns: int
    threads: int
    resident: int
    rate: float
    unit: str = "mma"
    stages: int = 4
    slice_bytes: int = 64
    row_bytes: int = 0
    more_bytes: int = 0

    @property
    def transposed(self) -> Tile:
        return self._replace(rows=self.columns, columns=self.rows)

    @property
    def shared(self) -> int:
        """Bytes of dynamic shared memory."""
        return self.stages * self.slice_bytes * (self.rows + self.columns) + self.row_bytes * self.rows + self.more_bytes

    def depth(self, kind: str) -> int:
        """Columns k of a slice."""
        return self.slice_bytes // ITEM[kind]


FLOAT_TILE = Tile(128, 64, 256, 2, 1.0)
TILES = (
    Tile(64, 64, 128, 4, 0.55),
    Tile(128, 64, 128, 3, 0.75),
    Tile(128, 96, 128, 3, 0.85),
    Tile(128, 128, 128, 2, 0.95),
    Tile(128, 192, 256, 1, 1.0),
)
NARROW_TILE = TILES[1]  # for images padded to 4 channels of bfloat16
ARRIVALS = 64  # bytes of mbarriers, which in products of windows find room elsewhere


def _group_tile(rows: int, columns: int, resident: int, stages: int, rate: float) -> Tile:
    """A tile of two warpgroups: GroupTile in kernels/gemm_wgmma.cuh."""
    return Tile(rows, columns, 256, resident, rate, "wgmma", stages, slice_bytes=128, row_bytes=8)


GROUP_TILES = (
    _group_tile(128, 64, 2, 4, 0.5),
    _group_tile(128, 96, 2, 4, 0.65),
    _group_tile(128, 128, 2, 3, 0.75),
    _group_tile(128, 192, 1, 5, 0.85),
    _group_tile(256, 96, 1, 5, 0.8),
    _group_tile(256, 192, 1, 4, 1.0),
)
GROUP_WEIGHT_TILES = (_group_tile(64, 128, 2, 4, 0.5), _group_tile(128, 128, 2, 3, 0.75), _group_tile(192, 128, 1, 5, 0.85), _group_tile(256, 128, 1, 4, 0.95))


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
    kind: str,
    *,
    rows: int,
    columns: int,
    depth: int,
    groups: int,
    outputs: int,
    classes: int = 1,
    transposed: bool = False,
    narrow: bool = False,
    units: tuple[str, ...] = UNITS[:1],
) -> tuple[Cut, ...]:
    """Cuts of a product on tensor cores, one unit's after another's, the cheapest of each first. transposed: a weight gradient, with tiles for
    more columns than rows. Ties keep the order of the tiles. What a unit has no kernels for is left to mma."""
    tiles = [_tiles(unit, kind, transposed, narrow) for unit in units]
    found: list[Cut] = []
    for each in tiles if any(tiles) else [_tiles("mma", kind, transposed, narrow)]:
        cuts = [cut for tile in each for cut in _candidates(kind, tile, rows, columns, depth, groups * classes, outputs)]
        found += sorted(dict.fromkeys(cuts), key=lambda cut: clocks(kind, cut))
    return tuple(found)


def _tiles(unit: str, kind: str, transposed: bool, narrow: bool) -> tuple[Tile, ...]:
    if unit == "mma":
        return tuple(tile.transposed if transposed else tile for tile in ((NARROW_TILE,) if narrow else TILES))
    tiles = () if kind != "bf16" or narrow else GROUP_WEIGHT_TILES if transposed else GROUP_TILES
    return tiles if unit == "wgmma" else tuple(tile._replace(unit=unit, more_bytes=ARRIVALS * transposed) for tile in tiles)


def _candidates(kind: str, tile: Tile, rows: int, columns: int, depth: int, products: int, outputs: int) -> Iterator[Cut]:
    """One split, and as many as give each multiprocessor one to four blocks."""
    tiles, most = -(-rows // tile.rows) * -(-columns // tile.columns) * products, -(-depth // DEPTH[kind]) // LEAST_SLICES
    for wanted in dict.fromkeys(max(1, min(SMS * each // max(tiles, 1), most)) for each in (0, 1, 2, 3, 4)):
        yield _cut(kind, tile, wanted, rows, columns, depth, products, outputs)


def _cut(kind: str, tile: Tile, wanted: int, rows: int, columns: int, depth: int, products: int, outputs: int) -> Cut:
    slices = -(-depth // tile.depth(kind))
    per_split = max(1, -(-slices // wanted)) * tile.depth(kind)
    splits = max(1, -(-depth // per_split))  # a sum of no terms is written too
    down, across = -(-rows // tile.rows), -(-columns // tile.columns)
    return Cut(tile, down, across, splits, per_split, down * across * products * splits, 4 * splits * outputs if splits > 1 else 0)


def clocks(kind: str, cut: Cut) -> float:
    """An estimate of the clock cycles that a cut takes."""
    tile, each = cut.tile, -(-cut.blocks // SMS)
    together = max(1, min(tile.resident, each))
    slices, size = cut.per_split // DEPTH[kind] + EXTRA_SLICES / together, tile.rows * tile.columns * DEPTH[kind]
    rate = MACS[tile.unit, kind] * tile.rate * (FEW_RATE if together * tile.threads < 32 * FEW_WARPS else 1.0)
    products = each * slices * size / rate
    return products + (FINISH_CLOCKS + 2 * cut.partial_bytes / BYTES_A_CLOCK if cut.partial_bytes else 0)


def kernel(product: str, kind: str, tile: Tile, piece: int = 16, boxes: int = 0) -> str:
    """The kernel that makes a product: "forward", "data" or "weights"; piece: bytes of a piece; boxes: how many operands TMA loads."""
    size = f"{tile.rows}, {tile.columns}"
    if tile.unit == "tma" and boxes:
        return f"tma_{product}<{size}, {str(boxes == 2).lower()}>"
    if tile.unit != "mma":
        return f"wgmma_{product}<{size}>"
    return f"mma_{product}<{kind}, {size}>" if product == "data" else f"mma_{product}<{kind}, {size}, {piece}>"


def _mma(kind: str, tile: Tile) -> Module:
    names = [kernel("forward", kind, tile), kernel("data", kind, tile), kernel("weights", kind, tile.transposed)]
    return Module("gemm_mma", names, part=f"{kind}-{tile.rows}x{tile.columns}")


def _wgmma(tile: Tile, *products: str) -> Module:
    part = f"{'-'.join(products)}-{tile.rows}x{tile.columns}"
    return Module("gemm_wgmma", [kernel(product, "bf16", tile) for product in products], part=part, only="sm_90a")


def _tma(tile: Tile, boxes: int, *products: str) -> Module:
    part = f"{'-'.join(products)}-{tile.rows}x{tile.columns}-{'both' if boxes == 2 else 'one'}"
    return Module("gemm_tma", [kernel(product, "bf16", tile._replace(unit="tma"), boxes=boxes) for product in products], part=part, only="sm_90a")


# A module for each kind and tile, so that a net compiles those alone that it uses.
MODULES = (
    *(_mma(kind, tile) for kind in TENSOR for tile in TILES),
    Module("gemm_mma", [kernel("forward", "bf16", NARROW_TILE, 8), kernel("weights", "bf16", NARROW_TILE.transposed, 8)], part="narrow"),
    *(_wgmma(tile, "forward", "data") for tile in GROUP_TILES),
    *(_wgmma(tile, "weights") for tile in GROUP_WEIGHT_TILES),
    *(_tma(tile, boxes, "forward", "data") for tile in GROUP_TILES for boxes in (1, 2)),
    *(_tma(tile, boxes, "weights") for tile in GROUP_WEIGHT_TILES for boxes in (1, 2)),
)
_BY_KERNEL = {name: module for module in MODULES for name in module.names}


def module_of(name: str) -> Module:
    """The module that holds a kernel of gemm_mma.cu, gemm_wgmma.cu or gemm_tma.cu."""
    return _BY_KERNEL[name]
