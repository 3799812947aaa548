"""Max and average pooling: kernels/pooling.cu."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.channels import tiles, vector_of
from caffelite.backends.cuda.common import Base, cname
from caffelite.backends.cuda.launch import Module

KERNELS = (2, 3)  # square ones with a forward of their own
STRIDES = (1, 2)  # equal ones with a backward of their own
FIELDS = ("images", "channels", "height", "width", "out_h", "out_w", "kernel_h", "kernel_w", "stride_h", "stride_w", "pad_h", "pad_w")
WINDOWS = np.dtype([(name, np.int32) for name in FIELDS])


def variants(vector: int, fixed: Ints) -> list[str]:
    """The last two template arguments: channels a thread takes, and a kernel or stride known when compiling (0: none)."""
    return ["1, 0", f"{vector}, 0", *(f"{vector}, {number}" for number in fixed)]


def names(kind: str, vector: int, what: str) -> list[str]:
    """The kernels of "pool", or of what goes with it, for one type of activations."""
    found = [f"ave_{what}_forward<{kind}, {v}>" for v in variants(vector, KERNELS)]
    found += [f"ave_{what}_backward<{kind}, {v}>" for v in variants(vector, STRIDES)]
    for mask, kernels, strides in (("unsigned char", KERNELS, STRIDES), ("int", (), ())):
        found += [f"max_{what}_forward<{kind}, {mask}, {v}>" for v in variants(vector, kernels)]
        found += [f"max_{what}_backward<{kind}, {mask}, {v}>" for v in variants(vector, strides)]
    return found


INDICES = [f"max_pool_indices<{kind}, {mask}, {v}>" for kind, vector in (("float", 4), ("bf16", 8)) for mask in ("unsigned char", "int") for v in (1, vector)]
POOLING = Module("pooling", [*names("float", 4, "pool"), *names("bf16", 8, "pool"), *INDICES])


class Pooling(Base):
    def max_pool_forward(self, x: Array, y: Array, mask: Array | None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        vector = vector_of(x, y, mask)
        name = max_kernel("pool_forward", x, mask, vector, kernel, KERNELS)
        self.launch(POOLING, name, *tiles(y, vector), x, y, mask, windows(x.shape, y.shape, kernel, stride, pad))

    def max_pool_backward(self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        vector = vector_of(dx, dy, mask, positive)
        name = max_kernel("pool_backward", dx, mask, vector, stride, STRIDES)
        self.launch(POOLING, name, *tiles(dx, vector), dy, mask, positive, dx, windows(dx.shape, dy.shape, kernel, stride, pad))

    def max_pool_indices(self, mask: Array, top: Array, *, kernel: Ints, stride: Ints, pad: Ints, width: int) -> None:
        vector = vector_of(top, mask)
        image = (*top.shape[:2], 0, width)  # the kernel does not ask for the height
        name = f"max_pool_indices<{cname(top)}, {cname(mask)}, {vector}>"
        self.launch(POOLING, name, *tiles(top, vector), mask, top, windows(image, top.shape, kernel, stride, pad))

    def ave_pool_forward(self, x: Array, y: Array, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        vector = vector_of(x, y)
        name = ave_kernel("pool_forward", x, vector, kernel, KERNELS)
        self.launch(POOLING, name, *tiles(y, vector), x, y, windows(x.shape, y.shape, kernel, stride, pad))

    def ave_pool_backward(self, dy: Array, dx: Array, positive: Array | None = None, *, kernel: Ints, stride: Ints, pad: Ints) -> None:
        vector = vector_of(dx, dy, positive)
        name = ave_kernel("pool_backward", dx, vector, stride, STRIDES)
        self.launch(POOLING, name, *tiles(dx, vector), dy, positive, dx, windows(dx.shape, dy.shape, kernel, stride, pad))


def max_kernel(what: str, x: Array, mask: Array | None, vector: int, numbers: Ints, choices: Ints) -> str:
    """The kernel of max pooling, of those that `names` lists, for activations as x and masks as `mask` (None: none is written)."""
    kind = "unsigned char" if mask is None else cname(mask)
    fixed = known(numbers, choices) if vector > 1 and kind == "unsigned char" else 0
    return f"max_{what}<{cname(x)}, {kind}, {vector}, {fixed}>"


def ave_kernel(what: str, x: Array, vector: int, numbers: Ints, choices: Ints) -> str:
    """The same of average pooling."""
    fixed = known(numbers, choices) if vector > 1 else 0
    return f"ave_{what}<{cname(x)}, {vector}, {fixed}>"


def known(numbers: Ints, choices: Ints) -> int:
    """The number of both axes if a kernel was compiled for it, else 0."""
    return int(numbers[0]) if numbers[0] == numbers[1] and numbers[0] in choices else 0


def windows(image: Ints, out: Ints, kernel: Ints, stride: Ints, pad: Ints) -> np.void:
    """The kernels' struct Windows."""
    return np.void((*image, *out[2:], *kernel, *stride, *pad), WINDOWS)
