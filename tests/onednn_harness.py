"""What the tests of the oneDNN backend share: random blobs, how far results differ, and all ops of BatchNorm, Scale and Bias in one call."""

from __future__ import annotations

from typing import Any

import numpy as np

from caffelite import backends

AVX512 = 0x27  # of dnnl_cpu_isa_t


def random(shape: tuple[int, ...], dtype: str = "float32", seed: int = 0, scale: float = 1.0) -> np.ndarray:
    """A blob of normal values."""
    numpy = backends.get("numpy")
    x = numpy.empty(shape, dtype)
    numpy.from_host(np.random.default_rng(seed).standard_normal(shape, np.float32) * scale, x)
    return x


def like(x: np.ndarray) -> np.ndarray:
    return np.full_like(x, 7)


def difference(got: np.ndarray, want: np.ndarray) -> float:
    """Largest difference by the largest value."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    return float(np.abs(got - want).max() / np.abs(want).max())


def computes(onednn: Any, dtype: str) -> bool:
    """Whether oneDNN has primitives in this type here: in bfloat16 it takes AVX-512. Where it has none, NumPy's code gives the results."""
    return dtype == "float32" or has_avx512(onednn)


def has_avx512(onednn: Any) -> bool:
    return onednn.dnnl.instruction_set() & AVX512 == AVX512


def operand_of(x: np.ndarray, values: np.ndarray) -> np.ndarray:
    """A vector over the channels, as Scale and Bias hand it over."""
    return values.reshape(1, -1, *(1,) * (x.ndim - 2))


def channel_results(backend: Any, x: np.ndarray, dy: np.ndarray) -> dict[str, np.ndarray]:
    """What every op of BatchNorm, Scale and Bias makes of x and dy, by op. Scale's operand has the type of x, as in a net."""
    channels = x.shape[1]
    mean, variance, s, b = random((channels,), seed=5), np.abs(random((channels,), seed=6)) + np.float32(0.1), random((channels,), seed=7), random((channels,))
    factor, shift = operand_of(x, s.astype(x.dtype)), operand_of(x, b)
    y = {op: like(x) for op in CHANNEL_OPS}
    ds, db, found = operand_of(x, b.copy()), operand_of(x, s.copy()), [np.empty_like(mean) for _ in range(2)]
    backend.batch_norm_statistics(x, *found)
    backend.batch_norm_forward(x, mean, variance, y["batch_norm_forward"], eps=0.01)
    backend.batch_norm_backward_global(variance, dy, y["batch_norm_backward_global"], eps=0.01)
    backend.scale_forward(x, factor, shift, y["scale_forward"])
    backend.scale_backward_data(dy, factor, y["scale_backward_data"])
    backend.bias_forward(x, shift, y["bias_forward"])
    for more in (False, True):
        backend.scale_backward_factor(x, dy, ds, accumulate=more)
        backend.bias_backward(dy, db, accumulate=more)
    return y | {"batch_norm_statistics": np.stack(found), "scale_backward_factor": ds, "bias_backward": db}


CHANNEL_OPS = [
    "batch_norm_statistics",
    "batch_norm_forward",
    "batch_norm_backward_global",
    "scale_forward",
    "scale_backward_data",
    "scale_backward_factor",
    "bias_forward",
    "bias_backward",
]
