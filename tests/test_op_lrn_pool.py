"""Max pooling of normalised values: what the two ops give one after the other, and in float64: stem lrn_pool."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import DTYPES, Shape, assert_close, last, pooled, rectified

from caffelite.backends.contract import pool_mask_dtype

LRN = {
    "AlexNet's": {"size": 5, "alpha": 1e-4, "beta": 0.75, "k": 1.0},
    "three": {"size": 3, "alpha": 2.0, "beta": 0.5, "k": 2.0},
    "seven": {"size": 7, "alpha": 1.0, "beta": 0.75, "k": 1.0},
}
POOLS = {
    "3x3 stride 2": {"kernel": (3, 3), "stride": (2, 2), "pad": (0, 0)},
    "padded": {"kernel": (3, 2), "stride": (2, 1), "pad": (1, 1)},
    "gaps between windows": {"kernel": (2, 1), "stride": (3, 2), "pad": (0, 0)},
    "wide window": {"kernel": (16, 16), "stride": (1, 2), "pad": (0, 0)},  # 256 cells: an int32 mask
}
SHAPES = [
    (2, 11, 17, 18),
    (2, 32, 17, 16),
    (3, 136, 16, 17),
]  # fast paths want whole vectors of channels; 136 are more than a block takes of bfloat16 or float32


def one_after_the_other(ops: Any, x: Any, dy: Any, mask_dtype: str, new: Any, n: dict, p: dict) -> list[Any]:
    """y, mask and dx, without and with a ReLU below."""
    dtype = "float64" if x.dtype == np.float64 else "bfloat16" if x.itemsize == 2 else "float32"
    normalised, between, y, mask = new(x.shape, dtype), new(x.shape, dtype), new(dy.shape, dtype), new(dy.shape, mask_dtype)
    work = new((ops.lrn_workspace(x.shape, dtype, **n),), "uint8")
    ops.lrn_forward(x, normalised, work, **n)
    ops.max_pool_forward(normalised, y, mask, **p)
    ops.max_pool_backward(dy, mask, between, **p)
    gradients = [new(x.shape, dtype) for _ in range(2)]
    for dx, relu in zip(gradients, (False, True)):
        ops.lrn_backward(x, normalised, between, dx, work, **n, relu=relu)
    return [y, mask, *gradients]


@pytest.mark.parametrize("layout", ["contract", "gaps"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("lrn", LRN)
def test_both_in_one(backend, reference, make, rng, lrn: str, pool: str, shape: Shape, dtype: str, layout: str) -> None:
    n, p = LRN[lrn], POOLS[pool]
    mask_dtype, out = pool_mask_dtype(p["kernel"]), pooled(shape, **p)
    x, dy = make(rng.standard_normal(shape), dtype, layout), make(rng.standard_normal(out), dtype, layout)
    y, mask = make.empty(out, dtype, layout), make.empty(out, mask_dtype, layout)
    backend.lrn_max_pool_forward(x, y, mask, **n, **p)
    gradients = [make.empty(shape, dtype, layout) for _ in range(2)]
    for dx, relu in zip(gradients, (False, True)):
        backend.lrn_max_pool_backward(x, dy, mask, dx, **n, **p, relu=relu)
    got = [make.host(array) for array in (y, mask, *gradients)]
    for ours, theirs in zip(got, one_after_the_other(backend, x, dy, mask_dtype, make.empty, n, p)):
        np.testing.assert_array_equal(ours, make.host(theirs))
    np.testing.assert_array_equal(got[3], rectified(got[2], make.host(x)))
    alone = make.empty(out, dtype, layout)
    backend.lrn_max_pool_forward(x, alone, None, **n, **p)
    np.testing.assert_array_equal(make.host(alone), got[0])
    if dtype == "float32":  # in bfloat16 rounding makes ties among what is pooled
        values = [last(make.host(array)) for array in (x, dy)]
        wanted = one_after_the_other(reference, *values, mask_dtype, lambda s, d: last(np.empty(s, d)) if len(s) == 4 else np.empty(s, d), n, p)
        assert_close(got[0], wanted[0])
        np.testing.assert_array_equal(got[1], wanted[1])
        assert_close(got[2], wanted[2], slack=4)  # a window's gradients are added in float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite(backend, make, dtype: str) -> None:
    """An infinity is normalised to NaN, which never wins; neighbours in channels become 0."""
    x = np.ones((1, 16, 2, 4))
    x[0, 3, 0, 0] = np.inf
    x[0, 8, :, 2:] = np.nan
    y, mask = make.empty((1, 16, 1, 2), dtype), make.empty((1, 16, 1, 2), "uint8")
    backend.lrn_max_pool_forward(make(x, dtype), y, mask, size=3, alpha=3.0, beta=1.0, k=1.0, kernel=(2, 2), stride=(2, 2), pad=(0, 0))
    got, numbers = make.host(y)[0, :, 0], make.host(mask)[0, :, 0]
    assert_close(got[:, 0], [1 / 3] + [0.25] * 14 + [1 / 3], dtype)
    assert numbers[:, 0].tolist() == [0, 0, 1, 1, 1, *[0] * 11]
    assert np.isfinite(got[[*range(7), *range(10, 16)], 1]).all()
    assert numbers[7:10, 1].tolist() == [255] * 3
    assert numbers[[6, 10], 1].tolist() == [0, 0]


def test_where_it_pays(backend) -> None:
    """On CUDA where there is a kernel for it: whole vectors of channels, boxes of 3 or 5, windows that fit a byte and shared memory."""
    window: dict[str, Any] = {"kernel": (3, 3), "stride": (2, 2)}
    found = [
        backend.lrn_max_pool_pays((2, 96, 55, 55), "bfloat16", size=5, **window),
        backend.lrn_max_pool_pays((2, 12, 55, 55), "float32", size=3, **window),
        backend.lrn_max_pool_pays((2, 12, 55, 55), "bfloat16", size=3, **window),
        backend.lrn_max_pool_pays((2, 96, 55, 55), "bfloat16", size=7, **window),
        backend.lrn_max_pool_pays((2, 96, 55, 55), "bfloat16", size=5, kernel=(16, 16), stride=(1, 1)),
        backend.lrn_max_pool_pays((2, 128, 55, 55), "bfloat16", size=5, kernel=(15, 15), stride=(1, 1)),
        backend.lrn_max_pool_pays((2, 4096, 5, 5), "bfloat16", size=5, **window),
    ]
    assert found == [backend.name == "cuda"] * 2 + [False] * 5
