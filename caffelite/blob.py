"""Blob: a named array with its gradient; Param: a learnable blob."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Any

Shape = tuple[int, ...]
Array = Any  # a backend's own array type: numpy.ndarray on the CPU backends


@dataclass
class Blob:
    """An activation. `data` and `diff` are backend arrays of `shape` (Caffe's order: N,C,H,W); None until allocated.

    A 4-D array lies in memory with its channels last; every other number of axes in C order.
    `dtype` is "float32" or "bfloat16"; `diff` has the same dtype as `data`.
    """

    name: str
    shape: Shape
    dtype: str = "float32"
    data: Array = None
    diff: Array = None

    @property
    def count(self) -> int:
        return prod(self.shape)


@dataclass
class Param(Blob):
    """A parameter blob of a layer, float32 master values in the parameter arena.

    `data` is what layers compute with (the compute type); `master` the float32 values that are trained and saved;
    the two are one array in float32. `diff` is float32. Backward adds to `diff` when `accumulate`, else overwrites it.
    """

    lr_mult: float = 1.0
    decay_mult: float = 1.0
    learn: bool = True  # backward computes this gradient
    accumulate: bool = True
    master: Array = None
    owner: Param | None = field(default=None, repr=False)  # set when this blob is shared from another layer
