"""What every stem shares: the arithmetic type, views with the channels last, writing results, and chunks over threads."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from inspect import isfunction
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from caffelite.backends.contract import Array
from caffelite.backends.numpy.blas import one_thread
from caffelite.errors import BackendError, LabelError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
FLOAT_MAX = float(np.finfo(np.float32).max)
FLOAT_MIN = float(np.finfo(np.float32).tiny)  # C's FLT_MIN
CHUNK = 1 << 19  # elements; a few float32 arrays of this size stay in the last-level cache, and threads seldom wait for each other's Python
SMALL_PRODUCT = 1 << 22  # multiply-adds, which one thread does in a tenth or two of a millisecond
THREAD_FROM = 1 << 20  # elements; below this, handing out chunks costs more than it saves

Item = TypeVar("Item")
Result = TypeVar("Result")


def work_type(*arrays: Array) -> np.dtype[Any]:
    """The type arithmetic runs in: float64 as soon as one array is float64 (gradient checks), else float32."""
    return np.dtype(np.float64 if any(a.dtype == np.float64 for a in arrays) else np.float32)


def widen(*arrays: Array) -> tuple[Array, ...]:
    """The arrays in their common work_type; one that has it already is returned itself, not copied."""
    work = work_type(*arrays)
    return tuple(a.astype(work, copy=False) for a in arrays)


def store(target: Array, values: Array) -> None:
    """target[...] = values, rounded to the target's type."""
    np.copyto(target, values, casting="unsafe")


def store_gradient(target: Array, values: Array, accumulate: bool) -> None:
    """Parameter gradients: added to what is there, or overwriting it."""
    if accumulate:
        target += values
    else:
        target[...] = values


def multiplied(left: Array, right: Array) -> Array:
    """The product of two matrices; a small one is not cut for threads, see blas.py."""
    if left.size * right.shape[1] > SMALL_PRODUCT:
        return left @ right
    with one_thread():
        return left @ right


def rectified(gradient: Array, positive: Array | None) -> Array:
    """A gradient taken on through the ReLU that put out `positive`; None: as it is."""
    return gradient if positive is None else gradient * (positive > 0)


def taken_on(gradient: Array, positive: Array | None, ratio: float | None, dtype: np.dtype[Any]) -> Array:
    """As `rectified`; with a ratio through a dropout before it, for a gradient that would have been stored in `dtype`."""
    if ratio is not None:
        gradient = gradient.astype(dtype).astype(gradient.dtype) * gradient.dtype.type(1 / (1 - ratio))
    return rectified(gradient, positive)


def channels_last(x: Array) -> Array:
    """A view of (N,C,...) as (N,...,C)."""
    return np.moveaxis(x, 1, -1)


def rows(x: Array) -> Array:
    """(N,C,...) as a matrix (positions, C): a view where the channels are last in memory, else a copy."""
    return channels_last(x).reshape(-1, x.shape[1])


def column_sums(matrix: Array) -> Array:
    """Sums of the columns, in float64."""
    return matrix.sum(axis=0, dtype=np.float64)


def per_channel(values: Array, axes: int) -> Array:
    """A vector over the channels shaped so that it broadcasts along axis 1 of an array of `axes` axes; a scalar stays one."""
    return values.reshape((-1,) + (1,) * (axes - 2)) if values.ndim else values


def class_numbers(label: Array, shape: Sequence[int], classes: int, ignore_label: int | None) -> tuple[Array, Array]:
    """Labels as integers of `shape` (truncated, as C does), and which positions count. Ignored positions get class 0.

    LabelError for a label that is not ignored and not in 0..classes-1.
    """
    values = label.astype(np.float64).reshape(shape)
    whole = np.trunc(values)
    counted = whole != ignore_label if ignore_label is not None else np.ones(whole.shape, bool)
    bad = counted & ~((whole >= 0) & (whole < classes))  # NaN is bad
    if bad.any():
        position = int(np.flatnonzero(bad)[0])
        raise LabelError(
            f"label {values.reshape(-1)[position]:g} at position {position} of the batch is outside 0..{classes - 1}",
            position=position,
            hint="make the scores' channels (num_output) cover every class of the data, or set ignore_label",
        )
    return np.where(counted, whole, 0).astype(np.int64), counted


def chunks(count: int) -> list[tuple[int, int]]:
    """(start, stop) of pieces of at most CHUNK elements."""
    return [(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def flat(x: Array) -> Array:
    """All elements in one axis, in memory order: a view of any gap-free array, else a copy."""
    return x.ravel(order="K")


class Base:
    """Holds the number of threads that long passes over flat arrays use (NumPy lets threads run within its loops).

    Matrix products use the threads of NumPy's BLAS, which are set in the environment (OPENBLAS_NUM_THREADS).
    """

    name = "numpy"
    runs_ahead = False
    drops_along = False
    takes_gaps: frozenset[str] = frozenset()
    raw_images = False

    def __init_subclass__(cls) -> None:
        """Makes every op quiet: infinities and NaN are results here, which the solver looks for, and not warnings."""
        super().__init_subclass__()
        for name, member in list(vars(cls).items()):
            if isfunction(member) and not name.startswith("_"):
                setattr(cls, name, _quiet(member))

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None and threads < 1:
            raise BackendError(f"the number of threads must be at least 1, found {threads}")
        self.threads = threads or _usable_cores()
        self._pool: ThreadPoolExecutor | None = None

    def _each(self, run: Callable[[Item], Result], items: Iterable[Item], count: int) -> list[Result]:
        """run(item) for all items, which cover `count` elements together, over threads where that pays; results in order."""
        if self.threads == 1 or count < THREAD_FROM:
            return [run(item) for item in items]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "caffelite-numpy")
        return list(self._pool.map(_quiet(run), items))

    def copy(self, x: Array, y: Array) -> None:
        """y <- x; see memory.py."""
        raise NotImplementedError


def _quiet(function: Callable[..., Result]) -> Callable[..., Result]:
    @wraps(function)
    def run(*args: Any, **options: Any) -> Result:
        with np.errstate(all="ignore"):
            return function(*args, **options)

    return run


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
