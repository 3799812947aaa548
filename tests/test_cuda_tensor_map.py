"""What the driver is told of a matrix that TMA loads; the driver itself is on machines with a GPU alone."""

from __future__ import annotations

import ctypes
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from caffelite.backends.cuda import cupy_driver, tensor_map
from caffelite.backends.cuda.array import Boxes, DeviceArray
from caffelite.errors import BackendError

BOXES = Boxes(DeviceArray(None, 0x7000, (5, 72), (144, 2), np.dtype(ml_dtypes.bfloat16)), 5, 72, 96)


class Library:
    """libcuda with one function, which writes 128 bytes and remembers what it was told."""

    def __init__(self, status: int = 0) -> None:
        self.status, self.told = status, ()

    def cuTensorMapEncodeTiled(self, out: Any, kind: int, rank: Any, address: Any, *rest: Any) -> int:
        assert out.value % 64 == 0
        ctypes.memset(out.value, 0x5A, 128)
        self.told = (kind, rank.value, address.value, *(list(part) if isinstance(part, ctypes.Array) else part for part in rest))
        return self.status


def test_what_the_driver_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    library = Library()
    monkeypatch.setattr(tensor_map, "_library", lambda: library)
    parameter = cupy_driver._parameter(BOXES)
    assert parameter.raw == b"\x5a" * 128
    # CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, rank; inner size first; pitch in bytes; box; steps; no interleave, SWIZZLE_128B, L2_PROMOTION_L2_256B, zeros
    assert library.told == (9, 2, 0x7000, [72, 5], [144], [64, 96], [1, 1], 0, 3, 3, 0)


def test_rows_that_are_further_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns 72 of 80: the row's size is that of what is read, the pitch that of all."""
    library = Library()
    monkeypatch.setattr(tensor_map, "_library", lambda: library)
    tensor_map.encoded(Boxes(BOXES.array, 5, 72, 96, step=80))
    assert library.told == (9, 2, 0x7000, [72, 5], [160], [64, 96], [1, 1], 0, 3, 3, 0)


def test_a_driver_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_map, "_library", lambda: Library(1))
    message = r"no tensor map of a matrix 5 x 72 at 0x7000 in boxes of 96 rows: CUDA error 1\n  set CAFFELITE_CUDA_PRODUCTS=wgmma"
    with pytest.raises(BackendError, match=message):
        tensor_map.encoded(BOXES)


@pytest.mark.parametrize("name", ["libno-such-thing.so.1", "libm.so.6"])
def test_a_driver_that_knows_no_tensor_maps(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(tensor_map, "LIBRARY", name)
    tensor_map._library.cache_clear()
    with pytest.raises(BackendError, match=r"TMA needs a driver of CUDA 12 or newer: .*\n  update NVIDIA's driver"):
        tensor_map.encoded(BOXES)
    tensor_map._library.cache_clear()
