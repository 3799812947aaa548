"""Local response normalisation across channels on oneDNN; within a channel NumPy does it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from caffelite.backends.contract import Array, Ints, is_usual, strides_of
from caffelite.backends.onednn.activations import ActivationOps
from caffelite.backends.onednn.dnnl import (
    BFLOAT16,
    DIFF_DST,
    DIFF_SRC,
    DST,
    FLOAT32,
    INFERENCE,
    LRN_ACROSS,
    SRC,
    TRAINING,
    TYPES,
    WORKSPACE,
    Descriptor,
    Dnnl,
    Primitive,
    PrimitiveDescriptor,
    Unsupported,
)
from caffelite.backends.onednn.plan import Drain, Feed, Run, describe, signature


class Numbers(NamedTuple):
    size: int
    alpha: float
    beta: float
    k: float


def forward_descriptor(dnnl: Dnnl, shape: Ints, dtype: np.dtype[np.generic], numbers: Numbers, *, train: bool) -> tuple[PrimitiveDescriptor, Descriptor]:
    """The forward primitive on channels-last memory, and the descriptor of its source."""
    if dtype not in (FLOAT32, BFLOAT16):
        raise Unsupported(str(dtype))
    # oneDNN 3.2 crashes for size 1, and errs in backward for size 7 and up, or in bfloat16, with channels beyond a multiple of 16.
    if numbers.size not in (3, 5) or shape[1] % 16:
        raise Unsupported("not a case that oneDNN computes right")
    usual = tuple(s // dtype.itemsize for s in strides_of(shape, dtype.itemsize))
    x = dnnl.strided(shape, usual, TYPES[dtype])
    return dnnl.primitive_descriptor("lrn_forward", TRAINING if train else INFERENCE, LRN_ACROSS, x, x, *numbers, dnnl.plain), x


def plan_forward(dnnl: Dnnl, x: Array, y: Array, kept: bool, numbers: Numbers) -> Run:
    descriptor, layout = forward_descriptor(dnnl, x.shape, x.dtype, numbers, train=kept)
    drain = Drain(dnnl, layout, describe(dnnl, y), "output")
    works = kept and dnnl.argument(descriptor, WORKSPACE).nbytes > 0
    run = Primitive(dnnl, descriptor, (SRC, DST, WORKSPACE) if works else (SRC, DST))

    def forward(x: int, y: int, work: int) -> None:
        run(x, drain.target(y), *((work,) if works else ()))
        drain.finish(y)

    return forward


def plan_backward(dnnl: Dnnl, x: Array, dy: Array, dx: Array, numbers: Numbers) -> Run:
    hint, layout = forward_descriptor(dnnl, x.shape, x.dtype, numbers, train=True)
    descriptor = dnnl.primitive_descriptor("lrn_backward", LRN_ACROSS, layout, layout, layout, *numbers, hint, dnnl.plain)
    feed, drain = Feed(dnnl, describe(dnnl, dy), layout, "input"), Drain(dnnl, layout, describe(dnnl, dx), "output")
    works = dnnl.argument(descriptor, WORKSPACE).nbytes > 0
    run = Primitive(dnnl, descriptor, (SRC, DIFF_DST, DIFF_SRC, WORKSPACE) if works else (SRC, DIFF_DST, DIFF_SRC))

    def backward(x: int, dy: int, dx: int, work: int) -> None:
        run(x, feed(dy), drain.target(dx), *((work,) if works else ()))
        drain.finish(dx)

    return backward


class LrnOps(ActivationOps):
    """LRN. Where oneDNN has the forward primitive alone, as without AVX-512, NumPy does backward: it needs no workspace."""

    def lrn_workspace(self, shape: Ints, dtype: str, *, size: int, alpha: float, beta: float, k: float) -> int:
        plain = super().lrn_workspace(shape, dtype, size=size, alpha=alpha, beta=beta, k=k)
        try:
            kind: np.dtype[np.generic] = BFLOAT16 if dtype == "bfloat16" else np.dtype(dtype)
            descriptor, _ = forward_descriptor(self.dnnl, shape, kind, Numbers(size, alpha, beta, k), train=True)
        except Unsupported:
            return plain
        return max(plain, self.dnnl.argument(descriptor, WORKSPACE).nbytes)

    def lrn_forward(self, x: Array, y: Array, work: Array | None, *, size: int, alpha: float, beta: float, k: float) -> None:
        numbers = Numbers(size, alpha, beta, k)
        key = ("lrn forward", signature(x), signature(y), work is None, numbers)
        plan = self.plan(key, lambda: plan_forward(self.dnnl, x, y, work is not None, numbers)) if is_usual(x) else None
        if plan is None:
            super().lrn_forward(x, y, work, size=size, alpha=alpha, beta=beta, k=k)
        else:
            plan(x.ctypes.data, y.ctypes.data, 0 if work is None else work.ctypes.data)

    def lrn_backward(
        self, x: Array, y: Array, dy: Array, dx: Array, work: Array, *, size: int, alpha: float, beta: float, k: float, relu: bool = False
    ) -> None:
        numbers = Numbers(size, alpha, beta, k)
        key = ("lrn backward", signature(x), signature(dy), signature(dx), numbers)
        plan = self.plan(key, lambda: plan_backward(self.dnnl, x, dy, dx, numbers)) if is_usual(x) else None
        if plan is None:
            super().lrn_backward(x, y, dy, dx, work, size=size, alpha=alpha, beta=beta, k=k, relu=relu)
        else:
            plan(x.ctypes.data, dy.ctypes.data, dx.ctypes.data, work.ctypes.data)
            self._rectify(dx, x if relu else None)
