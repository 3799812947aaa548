"""Buffers, views, copies: stem memory."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from caffelite.backends.contract import strides_of
from caffelite.errors import BackendError


def test_a_buffer_is_zeroed_and_aligned(backend) -> None:
    for nbytes in (0, 1, 7919):
        buffer = backend.allocate(nbytes)
        assert buffer.shape == (nbytes,)
        assert not backend.to_host(buffer).any()
    for nbytes in (1, 64, 7919):
        array = backend.empty((nbytes,), "uint8")
        address = array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else array.address
        assert address % 64 == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "uint8", "int32"])
def test_a_view_lies_channels_last_at_its_offset(backend, dtype: str) -> None:
    buffer = backend.allocate(4096)
    view = backend.view(buffer, 128, (2, 3, 5, 7), dtype)
    size = view.dtype.itemsize
    assert view.dtype.name == dtype
    assert view.strides == strides_of((2, 3, 5, 7), size) == (105 * size, size, 21 * size, 3 * size)
    backend.fill(view[1:, 2:, 4:, 6:], 3)  # the last element
    assert np.flatnonzero(backend.to_host(buffer)).min() >= 128 + 209 * size
    assert np.flatnonzero(backend.to_host(buffer)).max() < 128 + 210 * size
    assert backend.empty((2, 3, 5), dtype).strides == (15 * size, 5 * size, size)
    assert backend.empty((), dtype).shape == ()


def test_views_share_their_buffer(backend) -> None:
    buffer = backend.allocate(24)
    whole, part = backend.view(buffer, 0, (6,), "float32"), backend.view(buffer, 8, (2,), "float32")
    backend.fill(part, 2.5)
    assert backend.to_host(whole).tolist() == [0, 0, 2.5, 2.5, 0, 0]


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int64, np.uint8, ml_dtypes.bfloat16])
def test_host_values_come_and_go(backend, make, kind) -> None:
    values = np.arange(2 * 3 * 5 * 7).reshape(2, 3, 5, 7).astype(kind)
    x = make.empty(values.shape)
    backend.from_host(values, x)
    got = backend.to_host(x)
    assert got.dtype == np.float32
    assert got.flags.c_contiguous
    np.testing.assert_array_equal(got, values.astype(np.float32))
    got[...] = 0
    assert backend.to_host(x).any(), "to_host must copy"


def test_bfloat16_comes_to_the_host_as_float32_and_integers_stay(backend, make) -> None:
    x = make.empty((3,), "bfloat16")
    backend.from_host(np.array([1.0, 1.00390625, -3.0e38], np.float32), x)  # 1 + 2^-8 lies midway and goes to the even side
    got = backend.to_host(x)
    assert got.dtype == np.float32
    assert got[:2].tolist() == [1.0, 1.0]
    assert backend.to_host(make(np.array([7]), "int32")).dtype == np.int32


@pytest.mark.parametrize("source", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["contract", "plain", "gaps"])
def test_copy_goes_in_logical_order_between_shapes_and_types(backend, make, rng, source: str, target: str, layout: str) -> None:
    x = make(rng.standard_normal((3, 5, 7, 11)), source, layout)
    for shape in [(3, 5, 7, 11), (3, 385), (1155,), (3, 5, 77), (11, 7, 5, 3)]:
        y = make.empty(shape, target, layout)
        backend.copy(x, y)
        want = make.host(x).reshape(shape)
        if target == "bfloat16":
            want = want.astype(np.float32).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(make.host(y), np.asarray(want, np.float64))


@pytest.mark.parametrize("layout", ["contract", "gaps"])
def test_fill(backend, make, layout: str) -> None:
    for dtype in ("float32", "bfloat16"):
        x = make.empty((2, 3, 5, 7), dtype, layout)
        backend.fill(x, -0.5)
        assert (make.host(x) == -0.5).all()


def test_precisions(backend) -> None:
    slow = backend.supports("float32")
    assert slow is None or (backend.name == "cuda" and slow.startswith("the GPU is emulated on the CPU"))
    if backend.name == "cuda":
        assert backend.supports("tf32") == slow
    else:
        with pytest.raises(BackendError, match="tf32"):
            backend.supports("tf32")
    with pytest.raises(BackendError, match="unknown precision 'half'"):
        backend.supports("half")


def test_numpy_says_that_bfloat16_is_slow(reference) -> None:
    assert "no bfloat16 arithmetic" in reference.supports("bfloat16")


def test_time_passes_between_marks(backend) -> None:
    start = backend.mark()
    backend.fill(backend.empty((1000,), "float32"), 1)
    middle = backend.mark()
    backend.fill(backend.empty((1000,), "float32"), 2)
    stop = backend.mark()
    first, second = backend.seconds_between(start, middle), backend.seconds_between(middle, stop)
    assert first > 0
    assert second > 0
    assert backend.seconds_between(start, stop) == pytest.approx(first + second, abs=1e-4)
