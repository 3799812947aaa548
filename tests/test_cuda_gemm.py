"""The products behind convolution and inner product where they are cut up: split sums, views off a 16-byte boundary, sums of nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from arrays import DTYPES, assert_close

from caffelite.backends.contract import Backend
from caffelite.backends.cuda.gemm import BM, BN, DEPTH, ENOUGH_BLOCKS, LEAST_SLICES, _Plan

KINDS = {"float32": "float", "bfloat16": "bf16"}
ONE = {"stride": (1, 1), "pad": (0, 0), "dilation": (1, 1), "group": 1}


def put(cuda: Backend, values: np.ndarray, dtype: str, offset: int = 0) -> tuple[Any, np.ndarray]:
    """An array `offset` bytes behind a 64-byte boundary, and its values in float64 as stored."""
    size = 2 if dtype == "bfloat16" else 4
    array = cuda.view(cuda.allocate(values.size * size + offset), offset, values.shape, dtype)
    cuda.from_host(values, array)
    return array, np.asarray(cuda.to_host(array), np.float64)


@pytest.mark.parametrize(("rows", "columns", "depth", "splits"), [(5, 7, 16 * LEAST_SLICES - 1, 1), (5, 7, 32 * LEAST_SLICES, 2), (5, 7, 100_000, 261)])
def test_long_sums_of_few_results_are_split(rows: int, columns: int, depth: int, splits: int) -> None:
    plan = _Plan("float", rows=rows, columns=columns, depth=depth, groups=1, outputs=rows * columns)
    assert plan.splits == splits <= ENOUGH_BLOCKS
    assert plan.per_split % DEPTH["float"] == 0
    assert (plan.splits - 1) * plan.per_split < depth <= plan.splits * plan.per_split
    assert plan.grid == (1, 1, splits)
    assert _Plan("float", rows=BM * 300, columns=BN, depth=depth, groups=1, outputs=1).splits == 1, "enough blocks without"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
def test_split_sums(cuda: Backend, rng: np.random.Generator, dtype: str, relu: bool) -> None:
    m, n, k = 5, 7, 1100
    assert _Plan(KINDS[dtype], rows=m, columns=n, depth=k, groups=1, outputs=m * n).splits > 1
    (x, xs), (w, ws), (b, bs) = (put(cuda, rng.standard_normal(shape), t) for shape, t in (((m, k), dtype), ((n, k), dtype), ((n,), "float32")))
    y = cuda.empty((m, n), dtype)
    cuda.inner_product_forward(x, w, b, y, transpose=False, relu=relu)
    want = xs @ ws.T + bs
    assert_close(cuda.to_host(y), np.maximum(want, 0) if relu else want, dtype)
    (dy, dys), dx = put(cuda, rng.standard_normal((k, n)), dtype), cuda.empty((k, m), dtype)
    (v, vs) = put(cuda, rng.standard_normal((n, m)), dtype)
    cuda.inner_product_backward_data(dy, v, dx, transpose=False)
    assert_close(cuda.to_host(dx), dys @ vs, dtype)
    (left, lefts), dw = put(cuda, rng.standard_normal((k, m)), dtype), put(cuda, np.full((n, m), 2.0), "float32")[0]
    cuda.inner_product_backward_weights(left, dy, dw, None, transpose=False, accumulate_w=True, accumulate_b=False)
    assert_close(cuda.to_host(dw), 2 + dys.T @ lefts, "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("odd", ["x", "w", "y"])
def test_views_off_a_vector_boundary(cuda: Backend, rng: np.random.Generator, dtype: str, odd: str) -> None:
    offsets = {name: 4 if name == odd else 0 for name in "xwy"}
    x, xs = put(cuda, rng.standard_normal((2, 16, 3, 3)), dtype, offsets["x"])
    w, ws = put(cuda, rng.standard_normal((8, 16, 1, 1)), dtype, offsets["w"])
    y, _ = put(cuda, np.zeros((2, 8, 3, 3)), dtype, offsets["y"])
    cuda.convolution_forward(x, w, None, y, **ONE)
    assert_close(cuda.to_host(y), np.einsum("nchw,oc->nohw", xs, ws[:, :, 0, 0]), dtype)
    dx, dw = cuda.empty((2, 16, 3, 3), dtype), cuda.empty((8, 16, 1, 1), "float32")
    ys = np.asarray(cuda.to_host(y), np.float64)
    cuda.convolution_backward_data(y, w, dx, **ONE)
    assert_close(cuda.to_host(dx), np.einsum("nohw,oc->nchw", ys, ws[:, :, 0, 0]), dtype)
    cuda.convolution_backward_weights(x, y, dw, None, **ONE, accumulate_w=False, accumulate_b=False)
    assert_close(cuda.to_host(dw)[:, :, 0, 0], np.einsum("nohw,nchw->oc", ys, xs), "float32")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_of_nothing_is_zero(cuda: Backend, dtype: str) -> None:
    x, dy, dw = cuda.empty((0, 3, 5, 5), dtype), cuda.empty((0, 4, 5, 5), dtype), put(cuda, np.ones((4, 3, 1, 1)), "float32")[0]
    cuda.convolution_forward(x, put(cuda, np.ones((4, 3, 1, 1)), dtype)[0], None, dy, **ONE)
    cuda.convolution_backward_weights(x, dy, dw, None, **ONE, accumulate_w=False, accumulate_b=False)
    assert not cuda.to_host(dw).any()


BIASES = [((2, 6, 3, 3), 9, 1), ((5, 4, 17, 19), 6, 2), ((3, 3, 23, 29), 150, 1)]  # x, outputs, groups: one split, many, more outputs than a block has rows


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "outputs", "group"), BIASES, ids=str)
def test_the_bias_gradient_is_summed_beside_the_weights(
    cuda: Backend, rng: np.random.Generator, monkeypatch, shape, outputs: int, group: int, dtype: str
) -> None:
    monkeypatch.setattr(type(cuda), "bias_backward", None)  # no second pass over dy
    (n, channels, h, w), options = shape, ONE | {"group": group}
    plan = _Plan(KINDS[dtype], rows=outputs // group, columns=channels // group, depth=n * h * w, groups=group, outputs=1)
    assert (plan.splits > 1) == (n * h * w > 1000)
    (x, xs), (dy, dys) = (put(cuda, 1 + rng.standard_normal((n, c, h, w)), dtype) for c in (channels, outputs))
    wanted = np.stack([np.einsum("nohw,nchw->oc", *parts) for parts in zip(np.split(dys, group, axis=1), np.split(xs, group, axis=1))])
    for more_w, more_b in ((False, True), (True, False)):
        dw, db = put(cuda, np.full((outputs, channels // group, 1, 1), 2.0), "float32")[0], put(cuda, np.full(outputs, 2.0), "float32")[0]
        cuda.convolution_backward_weights(x, dy, dw, db, **options, accumulate_w=more_w, accumulate_b=more_b)
        assert_close(cuda.to_host(dw)[:, :, 0, 0], wanted.reshape(outputs, -1) + 2 * more_w)
        assert_close(cuda.to_host(db), dys.sum(axis=(0, 2, 3)) + 2 * more_b)
