"""BatchNorm, Scale and Bias on oneDNN: agreement with NumPy, sums in pieces, and when NumPy takes over."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onednn_harness import CHANNEL_OPS, channel_results, computes, difference, random

from caffelite import backends


def assert_channels_agree(got: dict[str, np.ndarray], want: dict[str, np.ndarray], dtype: str) -> None:
    for op in CHANNEL_OPS:
        rounded = dtype == "bfloat16" and got[op].dtype != np.float32
        assert difference(got[op], want[op]) < (2.0**-8 if rounded else 2e-6), op


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 32, 5, 4), (3, 24, 6, 4), (4, 24, 3, 3), (2, 1, 8, 8), (1, 48, 1, 1), (7, 16), (6, 40)], ids=str)
def test_batch_norm_scale_and_bias_run_on_onednn(onednn: Any, reference: Any, no_numpy: Any, shape: tuple[int, ...], dtype: str) -> None:
    x, dy = random(shape, dtype), random(shape, dtype, 1)
    want, calls = channel_results(reference, x, dy), [no_numpy(op) for op in CHANNEL_OPS]
    assert_channels_agree(channel_results(onednn, x, dy), want, dtype)
    assert not any(calls) or not computes(onednn, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [16, 20])
def test_channels_are_summed_in_pieces(reference: Any, monkeypatch: pytest.MonkeyPatch, channels: int, dtype: str) -> None:
    """7 images of which each counts as 3, summed 6 at a time and the last 3; 20 channels are seen as 80, with 4 sums for each."""
    from caffelite.backends.onednn import channels as module

    x, dy = random((7, channels, 12, 4), dtype), random((7, channels, 12, 4), dtype, 1)
    x += np.arange(7).reshape(7, 1, 1, 1).astype(x.dtype)  # the pieces' own means differ
    width = channels if channels == 16 else 80
    cells = 48 * channels // width
    monkeypatch.setattr(module, "IMAGE", width * cells // 3)
    monkeypatch.setattr(module, "PIECE_ROWS", 2 * cells)
    chosen: Any = backends.get("onednn", threads=2)
    assert module.layout(x)[:3] == (21, width, cells // 3)
    assert_channels_agree(channel_results(chosen, x, dy), channel_results(reference, x, dy), dtype)


def test_statistics_of_many_values_far_from_zero(onednn: Any) -> None:
    """In one float32 sum the later values would lose half of their digits: the mean would be 0.01 deviations off or more."""
    x = random((8, 16, 256, 256))
    x += 1000
    mean, variance = np.empty((2, 16), np.float32)
    onednn.batch_norm_statistics(x, mean, variance)
    values = x.astype(np.float64)
    assert np.abs(mean - values.mean(axis=(0, 2, 3))).max() < 2e-3
    np.testing.assert_allclose(variance, values.var(axis=(0, 2, 3)), rtol=2e-5)


@pytest.mark.parametrize("shape", [(3, 17, 5, 4), (7, 11), (2, 16, 5)], ids=str)
def test_odd_channels_and_c_order_are_numpys(onednn: Any, no_numpy: Any, shape: tuple[int, ...]) -> None:
    """oneDNN has only plain loops for them, which take longer than NumPy's; sums of rows are a matrix product and do without them."""
    calls = {op: no_numpy(op) for op in CHANNEL_OPS}
    channel_results(onednn, random(shape), random(shape))
    assert {op for op in CHANNEL_OPS if not calls[op]} == ({"bias_backward"} if len(shape) != 3 else set())


@pytest.mark.parametrize("operand", [(1, 8, 3, 1), (1, 1, 1, 1), (2, 1, 1, 1), (2, 8, 3, 5)], ids=str)
def test_operands_of_other_shapes_are_numpys(onednn: Any, no_numpy: Any, operand: tuple[int, ...]) -> None:
    x, s, y = random((2, 8, 3, 5)), random(operand, seed=1), random((2, 8, 3, 5))
    calls = [no_numpy(op) for op in ("scale_forward", "scale_backward_data", "scale_backward_factor", "bias_forward", "bias_backward")]
    onednn.scale_forward(x, s, s, y)
    onednn.scale_backward_data(x, s, y)
    onednn.scale_backward_factor(x, x, s.copy(), accumulate=False)
    onednn.bias_forward(x, s, y)
    onednn.bias_backward(x, s.copy(), accumulate=False)
    assert [len(c) for c in calls] == [1] * 5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_norm_and_scale_keep_nan_in_its_channel(onednn: Any, dtype: str) -> None:
    x = random((2, 16, 4, 4), dtype)
    x[1, 3, 2, 0] = np.nan
    with np.errstate(invalid="ignore"):
        results = channel_results(onednn, x, x)
    for op in ("batch_norm_forward", "batch_norm_backward_global", "scale_forward", "scale_backward_data", "bias_forward"):
        assert np.array_equal(np.isnan(results[op].astype(np.float32)), np.isnan(x.astype(np.float32))), op
    lost = np.arange(16) == 3
    for sums in (*results["batch_norm_statistics"], results["scale_backward_factor"], results["bias_backward"]):
        assert np.array_equal(np.isnan(sums.reshape(-1)), lost)
