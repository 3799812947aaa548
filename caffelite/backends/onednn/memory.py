"""Copies between layouts and types as oneDNN reorders; which precisions run fast here."""

from __future__ import annotations

import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.onednn.dnnl import TYPES, Dnnl, Unsupported
from caffelite.backends.onednn.plan import PlanningBackend, Run, describe, is_dense, signature

AVX512_BF16, AMX = 0xE7, 0xFEF  # bits of dnnl_cpu_isa_t
SMALL = 1 << 12  # elements; below this NumPy's copy is done before a primitive has started


def same_order(x: Array, y: Array) -> bool:
    """Both are dense and run through memory in one order, so that a flat copy is right."""
    same = all(a * y.itemsize == b * x.itemsize for n, a, b in zip(x.shape, x.strides, y.strides) if n > 1)
    return x.shape == y.shape and same and is_dense(x) and is_dense(y)


def plan_copy(dnnl: Dnnl, x: Array, y: Array) -> Run:
    """A reorder between x and y seen with one shape; where neither can be seen with the other's shape, Unsupported."""
    if x.dtype not in TYPES or y.dtype not in TYPES:
        raise Unsupported(f"{x.dtype} to {y.dtype}")
    if same_order(x, y):
        x, y = (np.lib.stride_tricks.as_strided(z, (z.size,), (z.itemsize,)) for z in (x, y))
    if x.shape != y.shape:
        target, source = y.reshape(x.shape), x.reshape(y.shape)
        if np.may_share_memory(target, y):
            y = target
        elif np.may_share_memory(source, x):
            x = source
        else:
            raise Unsupported("no common shape")
    return dnnl.reorder(describe(dnnl, x), describe(dnnl, y))


class MemoryOps(PlanningBackend):
    """Copies and precisions."""

    def supports(self, precision: str) -> str | None:
        if precision != "bfloat16":
            return super().supports(precision) if precision == "float32" else self._refuse(precision)
        if self.dnnl.instruction_set() & AVX512_BF16 == AVX512_BF16:
            return None
        return "this processor has no bfloat16 instructions (avx512_bf16 or AMX): they are emulated, slower than float32"

    def _refuse(self, precision: str) -> str | None:
        from caffelite.errors import BackendError

        if precision == "tf32":
            raise BackendError("the onednn backend cannot run in tf32, which is a format of CUDA devices", hint="use float32 or bfloat16")
        return super().supports(precision)

    def copy(self, x: Array, y: Array) -> None:
        plan = None if x.size < SMALL else self.plan(("copy", signature(x), signature(y)), lambda: plan_copy(self.dnnl, x, y))
        if plan is None:
            super().copy(x, y)
        else:
            plan(x.ctypes.data, y.ctypes.data)
