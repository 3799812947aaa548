"""Local response normalisation: kernels/lrn.cu. Backward computes the scales again, so forward leaves no workspace."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.channels import tiles, vector_of
from caffelite.backends.cuda.common import Base, cname
from caffelite.backends.cuda.launch import Module

NEAR = (3, 5)  # sizes whose windows across channels reach no further than the vectors beside a thread's own
ANY = [f"{kernel}<{types}>" for kernel in ("lrn_forward", "lrn_ratios", "lrn_backward") for types in ("float, 1", "float, 4", "bf16, 1", "bf16, 8")]
ACROSS = [f"{kernel}<{kind}, {size // 2}>" for kernel in ("lrn_across_forward", "lrn_across_backward") for kind in ("float", "bf16") for size in NEAR]
LRN = Module("lrn", [*ANY, *ACROSS])
EXTENTS = ("images", "channels", "height", "width", "half_c", "half_h", "half_w")
NUMBERS = np.dtype([*((name, np.int32) for name in EXTENTS), *((name, np.float32) for name in ("k", "factor", "beta"))])


class Lrn(Base):
    def lrn_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float, k: float) -> int:
        return 0

    def lrn_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float, k: float) -> None:
        half, numbers = size // 2, across(x.shape, size, alpha, beta, k)
        vector = vector_of(x, y)
        if size in NEAR and vector > 1:
            self.launch(LRN, f"lrn_across_forward<{cname(x)}, {half}>", *tiles(x, vector), x, y, numbers)
        else:
            self.launch(LRN, f"lrn_forward<{cname(x)}, 1>", *tiles(x, 1), x, y, numbers)

    def lrn_backward(
        self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, k: float, relu: bool = False
    ) -> None:
        half, numbers = size // 2, across(x.shape, size, alpha, beta, k)
        vector = vector_of(x, y, dy, dx)
        if size in NEAR and vector > 1:
            self.launch(LRN, f"lrn_across_backward<{cname(x)}, {half}>", *tiles(x, vector), x, y, dy, dx, numbers, np.bool_(relu))
        else:
            self._backward_by_ratios(x, y, dy, dx, 1, numbers, relu)

    def lrn_within_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float) -> int:
        return 0

    def lrn_within_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float) -> None:
        vector = vector_of(x, y)
        self.launch(LRN, f"lrn_forward<{cname(x)}, {vector}>", *tiles(x, vector), x, y, _within(x.shape, size, alpha, beta))

    def lrn_within_backward(self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, relu: bool = False) -> None:
        self._backward_by_ratios(x, y, dy, dx, vector_of(x, y, dy, dx), _within(x.shape, size, alpha, beta), relu)

    def _backward_by_ratios(self, x: Array, y: Array, dy: Array, dx: Array, vector: int, numbers: np.void, relu: bool) -> None:
        """Two passes, with dy y / s in scratch memory between them."""
        ratios, types = self.part(self.scratch(4 * x.size), 0, x.shape, "float32"), f"<{cname(x)}, {vector}>"
        self.launch(LRN, f"lrn_ratios{types}", *tiles(x, vector), x, y, dy, ratios, numbers)
        self.launch(LRN, f"lrn_backward{types}", *tiles(x, vector), x, dy, ratios, dx, numbers, np.bool_(relu))


def across(shape: Ints, size: int, alpha: float, beta: float, k: float) -> np.void:
    """The kernels' struct Lrn for boxes of `size` channels."""
    return _numbers((*shape, size // 2, 0, 0, k, alpha / size, beta))


def _within(shape: Ints, size: int, alpha: float, beta: float) -> np.void:
    return _numbers((*shape, 0, size // 2, size // 2, 1, alpha / size**2, beta))


def _numbers(values: tuple[float, ...]) -> np.void:
    """The kernels' struct Lrn."""
    return np.void(values, NUMBERS)
