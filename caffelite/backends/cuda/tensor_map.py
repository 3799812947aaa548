"""Boxes as the driver encodes them for TMA: cuTensorMapEncodeTiled of libcuda, through ctypes. Nothing of it runs on the device."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from caffelite.backends.cuda.array import BOX_COLUMNS, Boxes
from caffelite.errors import BackendError

LIBRARY = "libcuda.so.1"
BYTES, ALIGN = 128, 64  # of a CUtensorMap
BFLOAT16, NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS = 9, 0, 3, 3, 0  # CUtensorMapDataType, -Interleave, -Swizzle, -L2promotion, -FloatOOBfill


def encoded(boxes: Boxes) -> Any:
    """The bytes of the kernel's parameter. BackendError when the driver refuses."""
    memory = ctypes.create_string_buffer(BYTES + ALIGN)
    start = ctypes.addressof(memory) + -ctypes.addressof(memory) % ALIGN
    sizes, pitch = (ctypes.c_uint64 * 2)(boxes.columns, boxes.rows), (ctypes.c_uint64 * 1)(boxes.pitch)
    box, steps = (ctypes.c_uint32 * 2)(BOX_COLUMNS, boxes.height), (ctypes.c_uint32 * 2)(1, 1)
    kinds = (NO_INTERLEAVE, SWIZZLE_128B, PROMOTE_256B, FILL_ZEROS)
    encode = _library().cuTensorMapEncodeTiled
    status = encode(ctypes.c_void_p(start), BFLOAT16, ctypes.c_uint32(2), ctypes.c_void_p(boxes.array.address), sizes, pitch, box, steps, *kinds)
    if status:
        matrix = f"{boxes.rows} x {boxes.columns} at {boxes.array.address:#x} in boxes of {boxes.height} rows"
        raise BackendError(f"the driver encodes no tensor map of a matrix {matrix}: CUDA error {status}", hint="set CAFFELITE_CUDA_PRODUCTS=wgmma")
    return ctypes.create_string_buffer(ctypes.string_at(start, BYTES), BYTES)


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
        library.cuTensorMapEncodeTiled.restype = ctypes.c_int
    except (OSError, AttributeError) as error:
        raise BackendError(f"TMA needs a driver of CUDA 12 or newer: {error}", hint="update NVIDIA's driver, or set CAFFELITE_CUDA_PRODUCTS=wgmma") from error
    return library
