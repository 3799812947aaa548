"""DeviceArray: what an Array is on the CUDA backend, whatever the driver; Boxes: a matrix as TMA reads it."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided

from caffelite.backends.contract import Ints


class DeviceArray:
    """Elements in a GPU's memory: shape, strides in bytes, dtype, and views by reshape and slicing. Holds its memory alive."""

    def __init__(self, memory: Any, address: int, shape: Ints, strides: Ints, dtype: np.dtype[Any]) -> None:
        self.memory, self.address, self.shape, self.strides, self.dtype = memory, address, tuple(shape), tuple(strides), dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def itemsize(self) -> int:
        return int(self.dtype.itemsize)

    def reshape(self, *shape: Any) -> DeviceArray:
        """A view of the same elements in C order. ValueError where the memory's order does not allow one."""
        wanted = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        try:
            after = _reshaped(self._outline(), wanted)
        except (ValueError, AttributeError) as error:
            raise ValueError(f"an array of shape {self.shape} and strides {self.strides} cannot be seen as {tuple(wanted)}") from error
        return DeviceArray(self.memory, self.address, after.shape, after.strides, self.dtype)

    def __getitem__(self, index: Any) -> DeviceArray:
        items = index if isinstance(index, tuple) else (index,)
        if not all(item is Ellipsis or isinstance(item, (int, slice)) for item in items):
            raise TypeError("an array on a GPU takes whole numbers, slices and ... as indices")
        before = self._outline()
        after = before[items if Ellipsis in items else (*items, ...)]  # with "..." NumPy always gives a view
        return DeviceArray(self.memory, self.address + _start(after) - _start(before), after.shape, after.strides, self.dtype)

    def at(self, offset: int, shape: Ints, strides: Ints, dtype: Any) -> DeviceArray:
        """An array of NumPy type `dtype` that begins `offset` bytes after this one, in the same memory."""
        return DeviceArray(self.memory, self.address + offset, shape, strides, np.dtype(dtype))

    def host(self) -> Any:
        """A numpy.ndarray of this shape, type and strides (which must leave no gaps), with undefined contents."""
        return np.ndarray(self.shape, self.dtype, np.empty(max(self.size, 1) * self.itemsize, np.uint8), 0, self.strides)

    def _outline(self) -> Any:
        """A numpy.ndarray of this shape and strides, never to be read, on which NumPy works out views."""
        return as_strided(np.empty(1, self.dtype), self.shape, self.strides, writeable=False)


def _start(outline: Any) -> int:
    return int(outline.__array_interface__["data"][0])


def _reshaped(outline: Any, shape: Any) -> Any:
    """A view, never a copy, which would read what is not there. ValueError or AttributeError where there is none."""
    if np.lib.NumpyVersion(np.__version__) >= "2.1.0":
        return np.reshape(outline, shape, copy=False)
    view = outline.view()
    view.shape = shape
    return view


@dataclass(frozen=True)
class Boxes:
    """An array of 16-bit elements as a matrix (rows, columns), which a kernel reads in boxes of `height` rows (256 at the most) and BOX_COLUMNS
    columns: an argument for the parameter cf_tensor_map (kernels/primitives.cuh). step: elements from row to row; 0: the columns. It is whole pieces
    of 16 bytes, as is the address."""

    array: DeviceArray
    rows: int
    columns: int
    height: int
    step: int = 0

    @property
    def pitch(self) -> int:
        """Bytes from one row to the next."""
        return (self.step or self.columns) * self.array.itemsize


BOX_COLUMNS = 64  # 128 bytes, as many as a 128-byte swizzle takes
