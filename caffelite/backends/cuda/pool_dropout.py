"""Pooling and the dropout of what it gives in one pass each way: kernels/pool_dropout.cu."""

from __future__ import annotations

from caffelite.backends.contract import Array, Drop, DropoutKey, Ints
from caffelite.backends.cuda.channels import tiles, vector_of
from caffelite.backends.cuda.common import Base
from caffelite.backends.cuda.dropout import as_struct, factor
from caffelite.backends.cuda.launch import Module
from caffelite.backends.cuda.pooling import KERNELS, STRIDES, ave_kernel, max_kernel, names, windows

POOL_DROPOUT = Module("pool_dropout", [*names("float", 4, "pool_dropout"), *names("bf16", 8, "pool_dropout")])


class PoolDropout(Base):
    def max_pool_dropout_forward(self, x: Array, y: Array, mask: Array | None, *, ratio: float, key: DropoutKey, kernel: Ints, stride: Ints, pad: Ints) -> None:
        vector = vector_of(x, y, mask)
        name = max_kernel("pool_dropout_forward", x, mask, vector, kernel, KERNELS)
        self.launch(
            POOL_DROPOUT, name, *tiles(y, vector), x, y, mask, key.iteration, as_struct(Drop(ratio, key)), windows(x.shape, y.shape, kernel, stride, pad)
        )

    def max_pool_dropout_backward(
        self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        vector = vector_of(dx, dy, mask, positive)
        name = max_kernel("pool_dropout_backward", dx, mask, vector, stride, STRIDES)
        self.launch(POOL_DROPOUT, name, *tiles(dx, vector), dy, mask, positive, dx, factor(ratio), windows(dx.shape, dy.shape, kernel, stride, pad))

    def ave_pool_dropout_forward(self, x: Array, y: Array, mask: Array | None, *, ratio: float, key: DropoutKey, kernel: Ints, stride: Ints, pad: Ints) -> None:
        vector = vector_of(x, y, mask)
        name = ave_kernel("pool_dropout_forward", x, vector, kernel, KERNELS)
        self.launch(
            POOL_DROPOUT, name, *tiles(y, vector), x, y, mask, key.iteration, as_struct(Drop(ratio, key)), windows(x.shape, y.shape, kernel, stride, pad)
        )

    def ave_pool_dropout_backward(
        self, dy: Array, mask: Array, dx: Array, positive: Array | None = None, *, ratio: float, kernel: Ints, stride: Ints, pad: Ints
    ) -> None:
        vector = vector_of(dx, dy, mask, positive)
        name = ave_kernel("pool_dropout_backward", dx, vector, stride, STRIDES)
        self.launch(POOL_DROPOUT, name, *tiles(dx, vector), dy, mask, positive, dx, factor(ratio), windows(dx.shape, dy.shape, kernel, stride, pad))
