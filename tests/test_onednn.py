"""What is special to the oneDNN backend: the plan cache, when NumPy takes over, and agreement with NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from onednn_harness import channel_results, computes, difference, has_avx512, like, random

from caffelite import backends
from caffelite.backends.contract import DropoutKey, is_usual, strides_of


class Conv(NamedTuple):
    """A convolution layer: input channels and size, outputs, kernel, stride, pad, groups."""

    name: str
    channels: int
    size: int
    outputs: int
    kernel: int
    stride: int
    pad: int
    group: int

    @property
    def numbers(self) -> dict[str, Any]:
        return {"stride": (self.stride,) * 2, "pad": (self.pad,) * 2, "dilation": (1, 1), "group": self.group}


# NIN with 48x48 crops and AlexNet with 227x227 crops.
LAYERS = [
    Conv("nin-conv1", 3, 48, 192, 5, 1, 2, 1),
    Conv("nin-cccp1", 192, 48, 160, 1, 1, 0, 1),
    Conv("nin-cccp2", 160, 48, 96, 1, 1, 0, 1),
    Conv("nin-conv2", 96, 24, 192, 5, 1, 2, 1),
    Conv("nin-cccp3", 192, 24, 192, 1, 1, 0, 1),
    Conv("nin-conv3", 192, 12, 192, 3, 1, 1, 1),
    Conv("nin-cccp6", 192, 12, 200, 1, 1, 0, 1),
    Conv("alexnet-conv1", 3, 227, 96, 11, 4, 0, 1),
    Conv("alexnet-conv2", 96, 27, 256, 5, 1, 2, 2),
    Conv("alexnet-conv3", 256, 13, 384, 3, 1, 1, 1),
    Conv("alexnet-conv4", 384, 13, 384, 3, 1, 1, 2),
    Conv("alexnet-conv5", 384, 13, 256, 3, 1, 1, 2),
]


# --- agreement with NumPy ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_the_layers_of_nin_and_alexnet_agree_with_numpy(onednn: Any, reference: Any, no_numpy: Any, layer: Conv, dtype: str) -> None:
    """Both add up to 5000 terms in float32 in another order; bfloat16 results are rounded once more, by half of 2^-8 each."""
    out = (layer.size + 2 * layer.pad - layer.kernel) // layer.stride + 1
    x, dy = random((2, layer.channels, layer.size, layer.size), dtype), random((2, layer.outputs, out, out), dtype, 1)
    w = random((layer.outputs, layer.channels // layer.group, layer.kernel, layer.kernel), dtype, 2, 0.05)
    b, dw, db = random((layer.outputs,), seed=3), random(w.shape, seed=4), random((layer.outputs,), seed=5)
    rounding = 1e-5 if dtype == "float32" else 2.0**-8
    results = []
    for backend in (reference, onednn):
        calls = [no_numpy(f"convolution_{part}") for part in ("forward", "backward_data", "backward_weights")]
        y, dx, gradient, bias = like(dy), like(x), dw.copy(order="K"), db.copy()
        backend.convolution_forward(x, w, b, y, relu=True, **layer.numbers)
        backend.convolution_backward_data(dy, w, dx, **layer.numbers)
        backend.convolution_backward_weights(x, dy, gradient, bias, accumulate_w=True, accumulate_b=True, **layer.numbers)
        results.append((y, dx, gradient, bias))
        assert sum(map(len, calls)) == (3 if backend is reference else 0) or not computes(onednn, dtype)
    for got, want, limit in zip(results[1], results[0], (rounding, rounding, 2e-5, 2e-5)):
        assert difference(got, want) < limit


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_inner_product_agrees_with_numpy(onednn: Any, reference: Any, no_numpy: Any, dtype: str, transpose: bool) -> None:
    x, dy, w = random((3, 257), dtype), random((3, 131), dtype, 1), random((257, 131) if transpose else (131, 257), dtype, 2)
    b, dw, db = random((131,), dtype, 3), random(w.shape, seed=4), random((131,), seed=5)
    results = []
    for backend in (reference, onednn):
        calls = [no_numpy(f"inner_product_{part}") for part in ("forward", "backward_data", "backward_weights")]
        y, dx, gradient, bias = like(dy), like(x), dw.copy(), db.copy()
        backend.inner_product_forward(x, w, b, y, transpose=transpose, relu=True)
        backend.inner_product_backward_data(dy, w, dx, transpose=transpose)
        backend.inner_product_backward_weights(x, dy, gradient, bias, transpose=transpose, accumulate_w=True, accumulate_b=True)
        results.append((y, dx, gradient, bias))
        assert sum(map(len, calls)) == (3 if backend is reference else 0) or not computes(onednn, dtype)
    for got, want in zip(*results):
        assert difference(got, want) < (2e-6 if got.dtype == np.float32 else 2.0**-8)


def test_float32_data_meet_bfloat16_tops(onednn: Any, reference: Any) -> None:
    """The data blob stays float32 when a net computes in bfloat16: it is rounded on the way in."""
    layer = LAYERS[0]
    x, w, b = random((2, 3, 48, 48)), random((192, 3, 5, 5), "bfloat16", 1, 0.1), random((192,), seed=2)
    rounded = random((2, 3, 48, 48), "bfloat16")
    y, want, dy = random((2, 192, 48, 48), "bfloat16"), random((2, 192, 48, 48), "bfloat16"), random((2, 192, 48, 48), "bfloat16", 5)
    onednn.convolution_forward(x, w, b, y, **layer.numbers)
    onednn.convolution_forward(rounded, w, b, want, **layer.numbers)
    native = computes(onednn, "bfloat16")  # NumPy's code takes the data as they are
    assert np.array_equal(y.view(np.int16), want.view(np.int16)) if native else difference(y, want) < 2.0**-6
    dw, wanted = random((192, 3, 5, 5)), random((192, 3, 5, 5))
    for source, backend, target in ((x, onednn, dw), (rounded, reference, wanted)):
        backend.convolution_backward_weights(source, dy, target, None, accumulate_w=False, accumulate_b=False, **layer.numbers)
    assert difference(dw, wanted) < (2e-5 if native else 2.0**-8)


def test_a_diverged_net_is_not_hidden_by_relu(onednn: Any) -> None:
    x, w = random((1, 16, 4, 4)), random((16, 16, 1, 1), seed=1)
    x[0, 3, 2, 1] = np.nan
    y = like(x)
    onednn.convolution_forward(x, w, None, y, stride=(1, 1), pad=(0, 0), dilation=(1, 1), group=1, relu=True)
    assert np.isnan(y[0, :, 2, 1]).all()
    assert np.isfinite(y).sum() == 16 * 15
    flat, top = x.reshape(1, -1), np.empty((1, 3), np.float32)
    onednn.inner_product_forward(flat, random((3, 256)), None, top, transpose=False, relu=True)
    assert np.isnan(top).all()


# --- when NumPy takes over -----------------------------------------------------------------------------------------------


def pool_case(size: int, kernel: int, stride: int, pad: int, outputs: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    return random((2, 16, size, size), dtype), random((2, 16, outputs, outputs), dtype), {"kernel": (kernel,) * 2, "stride": (stride,) * 2, "pad": (pad,) * 2}


@pytest.mark.parametrize(
    ("case", "plain"),
    [
        ((24, 3, 2, 0, 12), 0),  # the last window is cut by the image: its area is what lies inside
        ((13, 3, 1, 1, 13), 0),  # zero padding counts, no window reaches beyond it
        ((24, 3, 2, 1, 13), 1),  # the last window reaches beyond the padding, where cells do not count
        ((4, 1, 2, 0, 3), 1),  # the last window is empty
    ],
)
def test_average_pooling_uses_numpy_where_the_divisors_differ(onednn: Any, reference: Any, no_numpy: Any, case: tuple[int, ...], plain: int) -> None:
    x, y, numbers = pool_case(*case)
    want, calls = like(y), no_numpy("ave_pool_forward")
    onednn.ave_pool_forward(x, y, **numbers)
    assert len(calls) == plain
    reference.ave_pool_forward(x, want, **numbers)
    np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_max_window_without_a_winner_is_numpys(onednn: Any, reference: Any, no_numpy: Any, dtype: str) -> None:
    x, y, numbers = pool_case(8, 2, 2, 0, 4, dtype)
    calls, mask = no_numpy("max_pool_forward"), np.zeros((2, 4, 4, 16), np.uint8).transpose(0, 3, 1, 2)
    onednn.max_pool_forward(x, y, mask, **numbers)
    assert not calls or not computes(onednn, dtype)
    calls.clear()
    x[1, 5, 2:4, 4:6] = np.nan
    onednn.max_pool_forward(x, y, mask, **numbers)
    assert len(calls) == 1
    assert mask[1, 5, 1, 2] == 255
    assert (mask == 255).sum() == 1


def test_first_maximum_wins_and_nan_never(onednn: Any, reference: Any, no_numpy: Any) -> None:
    x, y, numbers = pool_case(9, 3, 2, 1, 5)
    x[...] = np.random.default_rng(3).integers(0, 3, x.shape)
    x[0, 0, 1, 1] = np.nan
    masks = [np.zeros((2, 5, 5, 16), np.uint8).transpose(0, 3, 1, 2) for _ in range(2)]
    want = like(y)
    reference.max_pool_forward(x, want, masks[1], **numbers)
    calls = no_numpy("max_pool_forward")
    onednn.max_pool_forward(x, y, masks[0], **numbers)
    assert not calls
    assert np.array_equal(y, want)
    assert np.array_equal(*masks)


@pytest.mark.parametrize(
    ("channels", "size", "beta", "plain"), [(96, 5, 0.75, 0), (256, 3, 0.75, 0), (96, 1, 0.75, 2), (96, 7, 0.75, 2), (17, 5, 0.75, 2), (96, 5, 0.5, 2)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lrn_uses_numpy_where_onednn_errs(onednn: Any, reference: Any, no_numpy: Any, channels: int, size: int, beta: float, plain: int, dtype: str) -> None:
    """oneDNN 3.2 crashes for size 1, errs for size 7 or odd channels, and is slow for other beta; on memory channels last it takes AVX-512."""
    x, dy = random((2, channels, 5, 3), dtype), random((2, channels, 5, 3), dtype, 1)
    numbers = {"size": size, "alpha": 0.5, "beta": beta, "k": 1.0}
    calls = [no_numpy(op) for op in ("lrn_forward", "lrn_backward")]
    work = onednn.allocate(onednn.lrn_workspace(x.shape, dtype, **numbers))
    y, dx = like(x), like(x)
    onednn.lrn_forward(x, y, work, **numbers)
    onednn.lrn_backward(x, y, dy, dx, work, **numbers)
    assert sum(map(len, calls)) == plain or not has_avx512(onednn)
    want, want_dx = like(x), like(x)
    reference.lrn_forward(x, want, None, **numbers)
    reference.lrn_backward(x, y, dy, want_dx, work, **numbers)
    assert difference(y, want) < (1e-6 if dtype == "float32" else 2.0**-8)
    assert difference(dx, want_dx) < (1e-6 if dtype == "float32" else 2.0**-6)


def test_float64_is_numpys(onednn: Any, no_numpy: Any) -> None:
    x, y = np.ones((4, 8)), np.zeros((4, 3))
    calls = no_numpy("inner_product_forward")
    onednn.inner_product_forward(x, np.ones((3, 8)), None, y, transpose=False)
    assert len(calls) == 1
    assert (y == 8).all()


# --- memory, cache, determinism --------------------------------------------------------------------------------------------


def training_ops(onednn: Any, x: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """A layer of each kind, forward and backward; yields every result."""
    w, b = random((32, 16, 3, 3), seed=1), random((32,), seed=2)
    numbers = {"stride": (1, 1), "pad": (1, 1), "dilation": (1, 1), "group": 1}
    y, dx, dw, db = random((4, 32, 9, 9)), like(x), like(w), like(b)
    onednn.convolution_forward(x, w, b, y, relu=True, **numbers)
    onednn.convolution_backward_data(y, w, dx, **numbers)
    onednn.convolution_backward_weights(x, y, dw, db, accumulate_w=True, accumulate_b=True, **numbers)
    pooled, mask = random((4, 32, 4, 4)), np.zeros((4, 4, 4, 32), np.uint8).transpose(0, 3, 1, 2)
    window = {"kernel": (3, 3), "stride": (2, 2), "pad": (0, 0)}
    onednn.max_pool_forward(y, pooled, mask, **window)
    kept = np.zeros_like(mask)
    onednn.dropout_forward(pooled, pooled, kept, ratio=0.5, key=DropoutKey(1, 2, np.array([float(seed)])))
    yield from (y, dx, dw, db, pooled, kept)
    yield from channel_results(onednn, x, x).values()


def test_results_do_not_change_from_run_to_run(onednn: Any) -> None:
    x = random((4, 16, 9, 9))
    first = [z.copy() for z in training_ops(onednn, x, 0)]
    for _ in range(5):
        assert all(np.array_equal(a, b) for a, b in zip(first, training_ops(onednn, x, 0)))


def test_many_calls_take_no_more_memory_and_no_more_plans(onednn: Any) -> None:
    x = random((4, 16, 9, 9))
    for i in range(20):  # until the memory allocator has what it needs
        list(training_ops(onednn, x, i))
    plans, scratch, before = len(onednn._plans), onednn.dnnl.scratch.nbytes, resident()
    for i in range(250):
        list(training_ops(onednn, x, i))
    assert len(onednn._plans) == plans
    assert onednn.dnnl.scratch.nbytes == scratch
    assert resident() - before < 1 << 20  # a leak of one memory object a call would be more


def resident() -> int:
    """Bytes of memory this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_plans_of_old_shapes_are_let_go(onednn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from caffelite.backends.onednn import plan

    fresh = backends.get("onednn")
    monkeypatch.setattr(plan, "CACHE_LIMIT", 8)
    for rows in range(1, 30):
        x = random((rows, 64))
        y = like(x)
        fresh.relu_forward(x, y, slope=0.0)  # type: ignore[attr-defined]
        assert np.array_equal(y, np.maximum(x, 0))
    assert len(fresh._plans) <= 8  # type: ignore[attr-defined]


def test_dropout_masks_do_not_depend_on_the_pieces_they_are_drawn_in(reference: Any) -> None:
    """Two and a half pieces and an odd rest, drawn by two threads and by NumPy in one go."""
    several = backends.get("onednn", threads=2)
    x = random((5, 131, 1171))
    masks = [np.zeros(x.shape, np.uint8) for _ in range(2)]
    for backend, mask in zip((reference, several), masks):
        y = like(x)
        backend.dropout_forward(x, y, mask, ratio=0.3, key=DropoutKey(2**63 + 5, 77, np.array([2.0**40 + 1])))
        np.testing.assert_allclose(y, x * mask / np.float32(0.7), rtol=1e-6)
    assert np.array_equal(*masks)
    assert abs(masks[0].mean() - 0.7) < 0.01


def test_usual_strides_are_told_apart(onednn: Any) -> None:
    from caffelite.backends.onednn.plan import is_dense

    x = random((2, 3, 4, 5))
    assert x.strides == strides_of(x.shape, 4)
    assert is_usual(x)
    assert is_dense(x)
    assert not is_usual(np.zeros((2, 3, 4, 5), np.float32))
    assert is_dense(np.zeros((2, 3, 4, 5), np.float32))
    assert not is_dense(x[:, :, :, ::2])
    assert is_usual(np.zeros((2, 3, 1, 1), np.float32)[:, :, ::-1])  # the stride of an axis of one element does not matter


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_relu_runs_on_onednn_and_keeps_nan(onednn: Any, no_numpy: Any, slope: float, dtype: str) -> None:
    calls = [no_numpy("relu_forward"), no_numpy("relu_backward")]
    x = random((2, 3, 5, 7), dtype)
    x[0, 0, 0] = [np.nan, np.inf, 0, -1, 1, -0.0, -2]
    y, dx, flat = like(x), like(x), x.astype(np.float64)
    onednn.relu_forward(x, y, slope=slope)
    want = np.where(flat > 0, flat, slope * np.minimum(flat, 0))
    np.testing.assert_allclose(y.astype(np.float64), want, rtol=2.0**-8)
    onednn.relu_backward(y, np.ones_like(x), dx, slope=slope)
    number = ~np.isnan(want)
    assert np.array_equal(dx.astype(np.float64)[number], np.where(want > 0, 1.0, slope)[number])
    assert not any(calls) or not computes(onednn, dtype)


@pytest.mark.parametrize("add", [False, True])
def test_pieces_of_a_batch_add_up(onednn: Any, reference: Any, monkeypatch: pytest.MonkeyPatch, add: bool) -> None:
    """Work that goes a few images at a time, here 2 of 6: first-layer weight gradients, and bfloat16 gradients of pooling."""
    from caffelite.backends.onednn import convolution_weights, pooling

    layer = Conv("first", 3, 24, 32, 5, 1, 2, 1)
    x, dy = random((6, 3, 24, 24)), random((6, 32, 24, 24), seed=1)
    wide_dx, wide_dy = random((6, 16, 9, 9), "bfloat16"), random((6, 16, 4, 4), "bfloat16", 2)
    mask = np.random.default_rng(3).integers(0, 9, (6, 4, 4, 16), np.uint8).transpose(0, 3, 1, 2)
    monkeypatch.setattr(convolution_weights, "PIECE_BYTES", 2 * 4 * dy[0].size)
    monkeypatch.setattr(pooling, "WIDE_BYTES", 2 * 4 * wide_dx[0].size)
    results = []
    for backend in (reference, backends.get("onednn", threads=onednn.threads)):
        dw, db, dx = random((32, 3, 5, 5), seed=4), random((32,), seed=5), like(wide_dx)
        backend.convolution_backward_weights(x, dy, dw, db, accumulate_w=add, accumulate_b=add, **layer.numbers)
        backend.max_pool_backward(wide_dy, mask, dx, kernel=(3, 3), stride=(2, 2), pad=(0, 0))
        results.append((dw, db, dx))
    for got, want, limit in zip(results[1], results[0], (1e-5, 1e-5, 1e-9)):
        assert difference(got, want) <= limit


def test_small_float32_products_are_numpys_to_the_bit(reference: Any) -> None:
    """Caffe's order of sums in small nets: see PlanningBackend.small_products."""
    chosen: Any = backends.get("onednn")
    x, w, b = random((4, 3, 9, 9)), random((6, 3, 5, 5)), random((6,))
    numbers = {"stride": (1, 1), "pad": (0, 0), "dilation": (1, 1), "group": 1}
    results = []
    for backend in (chosen, reference):
        y, dw, db = random((4, 6, 5, 5)), like(w), like(b)
        backend.convolution_forward(x, w, b, y, **numbers)
        backend.convolution_backward_weights(x, y, dw, db, **numbers, accumulate_w=False, accumulate_b=False)
        results.append((y, dw, db))
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(*results))
    matrix, weights = random((7, 75)), random((5, 75))
    products = [np.zeros((7, 5), np.float32) for _ in range(2)]
    for backend, out in zip((chosen, reference), products):
        backend.inner_product_forward(matrix, weights, None, out, transpose=False)
    assert np.array_equal(*products)
    assert set(chosen._plans.values()) == {None}
