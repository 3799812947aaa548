"""Matrix products on arrays as they lie: C = A B + bias, used by InnerProduct and by 1x1 convolutions."""

from __future__ import annotations

import numpy as np

from caffelite.backends.onednn.dnnl import BFLOAT16, BIAS, DST, F32, FLOAT32, RELU_POST_OP, RELU_SLOPE, SRC, WEIGHTS, Descriptor, Dnnl, Primitive
from caffelite.backends.onednn.plan import Run


def product(dnnl: Dnnl, a: Descriptor, b: Descriptor, bias: Descriptor | None, c: Descriptor, *, relu: bool = False, add: bool = False) -> Primitive:
    """c = a b + bias, or c += a b; relu: max(c, 0) after. The addresses follow in the order a, b, (bias,) c."""
    post = [("sum", 1.0)] if add else []
    attributes = dnnl.attributes(*post, *([RELU_POST_OP] if relu else []))
    descriptor = dnnl.primitive_descriptor("matmul", a, b, bias, c, attributes)
    return Primitive(dnnl, descriptor, (SRC, WEIGHTS, DST) if bias is None else (SRC, WEIGHTS, BIAS, DST), RELU_SLOPE if relu else None)


def column_sums(dnnl: Dnnl, rows: int, columns: int, dtype: int, *, add: bool) -> Run:
    """target[j] (+)= sum over i of x[i, j], x (rows, columns) contiguous, float32 sums: a product with a row of ones."""
    ones = np.ones(rows, FLOAT32 if dtype == F32 else BFLOAT16)
    left, right = dnnl.strided((1, rows), (rows, 1), dtype), dnnl.strided((rows, columns), (columns, 1), dtype)
    multiply = product(dnnl, left, right, None, dnnl.strided((1, columns), (columns, 1), F32), add=add)
    return lambda x, target: multiply(ones.ctypes.data, x, target)
