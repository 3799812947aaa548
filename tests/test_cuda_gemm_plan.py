"""How products are cut into blocks and splits by their shape, and which units make them."""

from __future__ import annotations

from itertools import product

import pytest

from caffelite.backends.cuda.gemm_plan import (
    ARRIVALS,
    DEPTH,
    ENOUGH_BLOCKS,
    FLOAT_TILE,
    GROUP_TILES,
    GROUP_WEIGHT_TILES,
    LEAST_SLICES,
    SMS,
    UNITS,
    Tile,
    candidates,
    exact,
)


@pytest.mark.parametrize(("rows", "columns", "depth", "splits"), [(5, 7, 16 * LEAST_SLICES - 1, 1), (5, 7, 32 * LEAST_SLICES, 2), (5, 7, 100_000, 261)])
def test_long_sums_of_few_results_are_split(rows: int, columns: int, depth: int, splits: int) -> None:
    cut = exact(rows=rows, columns=columns, depth=depth, groups=1, outputs=rows * columns)
    assert cut.splits == splits <= ENOUGH_BLOCKS
    assert cut.per_split % DEPTH["float"] == 0
    assert (cut.splits - 1) * cut.per_split < depth <= cut.splits * cut.per_split
    assert (cut.tiles_m, cut.tiles_n, cut.blocks) == (1, 1, splits)
    assert exact(rows=FLOAT_TILE.rows * 300, columns=FLOAT_TILE.columns, depth=depth, groups=1, outputs=1).splits == 1, "enough blocks without"


@pytest.mark.parametrize(
    ("rows", "columns", "depth", "tile", "splits"),
    [
        (147456, 192, 2400, (128, 192), 1),  # NIN's conv2 forward: many blocks, no column beyond the outputs
        (147456, 96, 4800, (128, 96), 1),  # and its data gradient
        (36864, 192, 1728, (128, 96), 1),  # conv3: 288 large tiles would fill 2.2 waves of 132, so smaller ones
        (43264, 384, 2304, (128, 128), 1),  # AlexNet's conv3
        (65536, 64, 576, (128, 64), 1),  # ResNet-18's first stage
        (5, 7, 100, (64, 64), 1),
        (64, 64, 147456, (64, 64), 256),  # few results of long sums
    ],
)
def test_tiles_follow_the_shape(rows: int, columns: int, depth: int, tile: tuple[int, int], splits: int) -> None:
    cut = candidates("bf16", rows=rows, columns=columns, depth=depth, groups=1, outputs=rows * columns)[0]
    assert (cut.tile.rows, cut.tile.columns, cut.splits) == (*tile, splits)
    assert cut.per_split % DEPTH["bf16"] == 0
    assert (cut.splits - 1) * cut.per_split < depth <= cut.splits * cut.per_split
    assert cut.blocks == -(-rows // tile[0]) * -(-columns // tile[1]) * splits


def test_the_units_cuts_follow_one_another() -> None:
    """mma's first, as they are alone; wgmma's in slices of 128 bytes."""
    for (transposed, tiles), unit in product(((False, GROUP_TILES), (True, GROUP_WEIGHT_TILES)), UNITS[1:]):
        sizes = {"rows": 192, "columns": 2400, "depth": 147456, "groups": 1, "outputs": 192 * 2400, "transposed": transposed}
        alone, both = candidates("bf16", **sizes), candidates("bf16", **sizes, units=("mma", unit))
        assert both[: len(alone)] == alone
        assert both[len(alone) :] == candidates("bf16", **sizes, units=(unit,))
        assert {(cut.tile.rows, cut.tile.columns) for cut in both[len(alone) :]} == {(tile.rows, tile.columns) for tile in tiles}
        assert {cut.tile.unit for cut in both[len(alone) :]} == {unit}
        for cut in both[len(alone) :]:
            assert cut.per_split % 64 == 0
            assert (cut.splits - 1) * cut.per_split < 147456 <= cut.splits * cut.per_split


@pytest.mark.parametrize(("kind", "narrow"), [("tf32", False), ("bf16", True)])
def test_mma_makes_what_wgmma_cannot(kind: str, narrow: bool) -> None:
    sizes = {"rows": 4096, "columns": 96, "depth": 800, "groups": 1, "outputs": 4096 * 96, "narrow": narrow}
    for units in (("wgmma",), ("tma",), UNITS):
        assert candidates(kind, **sizes, units=units) == candidates(kind, **sizes)


@pytest.mark.parametrize("tile", [*GROUP_TILES, *GROUP_WEIGHT_TILES])
def test_blocks_of_warpgroups_fit_a_hopper(tile: Tile) -> None:
    """As many as are said, with the 1 KB that each takes for itself; an SM has 228 KB, and a block 227 at the most."""
    arrivals = ARRIVALS if tile in GROUP_WEIGHT_TILES else 0
    assert tile.resident * (tile.shared + arrivals + 1024) <= 228 * 1024
    assert tile.shared == tile.stages * 128 * (tile.rows + tile.columns) + 8 * tile.rows <= 227 * 1024


def test_weight_gradients_use_transposed_tiles() -> None:
    cut = candidates("bf16", rows=192, columns=2400, depth=147456, groups=1, outputs=192 * 2400, transposed=True)[0]
    assert (cut.tile.rows, cut.tile.columns) == (192, 128)
    assert SMS <= cut.blocks <= 2 * SMS
    assert cut.partial_bytes == 4 * cut.splits * 192 * 2400
