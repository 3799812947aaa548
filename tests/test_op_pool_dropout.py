"""Dropout of what pooling gives: what the two ops give one after the other, and the mask by its definition: stem pool_dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import DTYPES, Shape, drawn_mask, dropout_key, pooled, rectified

from caffelite.backends.contract import pool_mask_dtype

POOLS = {
    "3x3 stride 2": {"kernel": (3, 3), "stride": (2, 2), "pad": (0, 0)},
    "padded": {"kernel": (3, 2), "stride": (2, 1), "pad": (1, 1)},
    "gaps between windows": {"kernel": (2, 1), "stride": (3, 2), "pad": (0, 0)},
    "2x2 stride 1": {"kernel": (2, 2), "stride": (1, 1), "pad": (0, 0)},
    "wide window": {"kernel": (16, 16), "stride": (1, 2), "pad": (0, 0)},  # 256 cells: an int32 mask of max pooling
}
SHAPES = [(2, 5, 17, 18), (3, 24, 17, 16)]  # fast paths want whole vectors of channels; 24 are one and a half blocks of random bits
SEED, LAYER, ITERATION = 2**63 + 5, 7, 2**40


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ratio", [0.5, 0.3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("kind", ["max", "ave"])
def test_both_in_one(backend, make, rng, kind: str, pool: str, shape: Shape, ratio: float, dtype: str, layout: str) -> None:
    p, out = POOLS[pool], pooled(shape, **POOLS[pool])
    key, mask_dtype = dropout_key(backend, SEED, LAYER, ITERATION), pool_mask_dtype(p["kernel"]) if kind == "max" else "uint8"
    op = {way: getattr(backend, f"{kind}_pool_dropout_{way}") for way in ("forward", "backward")}
    x, dy = make(rng.standard_normal(shape), dtype, layout), make(rng.standard_normal(out), dtype, layout)
    y, mask, dx, through = (make.empty(s, d, layout) for s, d in ((out, dtype), (out, mask_dtype), (shape, dtype), (shape, dtype)))
    op["forward"](x, y, mask, ratio=ratio, key=key, **p)
    op["backward"](dy, mask, dx, ratio=ratio, **p)
    op["backward"](dy, mask, through, y if kind == "max" else x, ratio=ratio, **p)

    plain, winner, keep, kept, want = (make.empty(s, d, layout) for s, d in ((out, dtype), (out, mask_dtype), (out, "uint8"), (out, dtype), (shape, dtype)))
    first = {way: getattr(backend, f"{kind}_pool_{way}") for way in ("forward", "backward")}
    masks = (winner,) if kind == "max" else ()
    first["forward"](x, plain, *masks, **p)
    backend.dropout_forward(plain, plain, keep, ratio=ratio, key=key)
    backend.dropout_backward(dy, keep, kept, ratio=ratio)
    first["backward"](kept, *masks, want, **p)
    mine = drawn_mask(out, ratio, (SEED, LAYER, ITERATION))
    none = 255 if mask_dtype == "uint8" else -1
    np.testing.assert_array_equal(make.host(mask), np.where(mine, make.host(winner), none) if kind == "max" else mine)
    np.testing.assert_array_equal(make.host(y), make.host(plain))
    np.testing.assert_array_equal(make.host(dx), make.host(want))
    if kind == "max":
        first["backward"](kept, winner, want, y, **p)
    np.testing.assert_array_equal(make.host(through), make.host(want) if kind == "max" else rectified(make.host(dx), make.host(x)))
    alone = make.empty(out, dtype, layout)
    op["forward"](x, alone, None, ratio=ratio, key=key, **p)
    np.testing.assert_array_equal(make.host(alone), make.host(y))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_dropped_gives_no_gradient(backend, make, dtype: str) -> None:
    """Not even of an infinity; of average pooling 0 times it, as dropout does."""
    options: dict[str, Any] = {"kernel": (1, 1), "stride": (1, 1), "pad": (0, 0)}
    mask, dx = make(np.array([[[[0, 255]]]]), "uint8"), make.empty((1, 1, 1, 2), dtype)
    dy = make(np.full((1, 1, 1, 2), np.inf), dtype)
    backend.max_pool_dropout_backward(dy, mask, dx, ratio=0.5, **options)
    assert make.host(dx).ravel().tolist() == [np.inf, 0]
    backend.ave_pool_dropout_backward(dy, make(np.array([[[[1, 0]]]]), "uint8"), dx, ratio=0.5, **options)
    np.testing.assert_array_equal(make.host(dx).ravel(), [np.inf, np.nan])
