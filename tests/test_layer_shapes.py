"""The helpers of layers/shapes.py against what memory really allows."""

from __future__ import annotations

import itertools

import numpy as np

from caffelite.backends import get
from caffelite.backends.contract import c_order
from caffelite.layers.shapes import viewable


def test_a_view_is_promised_only_where_numpy_needs_no_copy() -> None:
    ops, promised = get("numpy"), set()
    shapes = [shape for n in range(5) for shape in itertools.product((1, 2, 3), repeat=n)]
    for shape in shapes:
        data = ops.empty(shape, "float32")
        assert c_order(shape) == (data.flags.c_contiguous or data.size == 1), shape
        for other in [(data.size,), (1, *shape), (shape[0], -1) if shape else (1,), (*shape[:2], -1) if len(shape) > 2 else shape, (-1, *shape[-1:])]:
            seen = data.reshape(other)
            promised.add(viewable(shape, seen.shape))
            assert np.shares_memory(data, seen) or not viewable(shape, seen.shape), (shape, seen.shape)
            assert viewable(shape, seen.shape) or not data.flags.c_contiguous
    assert promised == {True, False}
