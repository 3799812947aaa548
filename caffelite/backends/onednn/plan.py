"""Base of the backend's parts: the cache of prepared operations, and how arrays are described to oneDNN."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from math import prod
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints, strides_of
from caffelite.backends.numpy import NumpyBackend
from caffelite.backends.onednn import library
from caffelite.backends.onednn.dnnl import BF16, TYPES, Descriptor, Dnnl, Primitive, Unsupported

Run = Callable[..., None]
CACHE_LIMIT = 4096  # plans; more means shapes keep changing, and old ones will hardly come back


def signature(x: Array) -> tuple[Any, ...]:
    """All that a plan depends on of an array."""
    return (x.shape, x.strides, x.dtype)


class PlanningBackend(NumpyBackend):
    """Keeps one prepared operation (a plan) for each op, shapes, strides, types and numbers it has met.

    A plan is a function of the arrays' addresses. Not for use from several threads at once: plans share scratch memory.

    small_products: float32 products of at most so many multiply-adds are left to NumPy, where the inputs are an image's few
    channels or a matrix. NumPy's BLAS adds in Caffe's order, oneDNN in orders of its own; in a small net on real images, whose
    patches are often nearly equal, the difference can make a max pooling choose another cell than Caffe's.
    """

    small_products = 1 << 22

    def __init__(self, threads: int | None = None) -> None:
        if threads is not None:
            library.set_threads(threads)
        super().__init__(threads or library.thread_count())
        self.dnnl = Dnnl()
        self._plans: dict[Hashable, Run | None] = {}

    def leave_small(self, products: int, *arrays: Array) -> None:
        """Raises Unsupported for float32 products that small_products leaves to NumPy."""
        if products <= self.small_products and all(array.dtype == np.float32 for array in arrays):
            raise Unsupported("small")

    def plan(self, key: Hashable, build: Callable[[], Run]) -> Run | None:
        """The plan for key, built at first need; None where oneDNN cannot do it, and NumPy has to."""
        try:
            return self._plans[key]
        except KeyError:
            pass
        if len(self._plans) >= CACHE_LIMIT:
            self._plans.clear()
        try:
            plan: Run | None = build()
        except Unsupported:
            plan = None
        self._plans[key] = plan
        return plan


def address(x: Array | None) -> int:
    """Where x's first element lies; 0 for an array that is left out."""
    return 0 if x is None else int(x.ctypes.data)


def type_of(x: Array) -> int:
    """oneDNN's number for x's type; Unsupported for others, such as float64."""
    try:
        return TYPES[x.dtype]
    except KeyError:
        raise Unsupported(str(x.dtype)) from None


def compute_type(*arrays: Array | None) -> int:
    """bfloat16 when any of the activations is, else float32."""
    types = [type_of(x) for x in arrays if x is not None]
    return BF16 if BF16 in types else max(types)


def element_strides(x: Array) -> Ints:
    """x's strides in elements. An axis of length 1 gets the stride that a blob of this shape has, so that layouts compare equal."""
    usual, itemsize = strides_of(x.shape, x.itemsize), x.itemsize
    if all(size == 1 or have == want for size, have, want in zip(x.shape, x.strides, usual)):
        return tuple(s // itemsize for s in usual)
    if any(s <= 0 or s % itemsize for s in x.strides):
        raise Unsupported(f"strides {x.strides}")
    return tuple(s // itemsize for s in x.strides)


def is_dense(x: Array) -> bool:
    """x's elements fill one run of memory, in whatever order of axes."""
    step = x.itemsize
    for stride, size in sorted((s, n) for s, n in zip(x.strides, x.shape) if n > 1):
        if stride != step:
            return False
        step *= size
    return True


def describe(dnnl: Dnnl, x: Array) -> Descriptor:
    """x as it lies. Scalars become one element."""
    if not prod(x.shape):
        raise Unsupported("empty array")
    return dnnl.strided(x.shape or (1,), element_strides(x) or (1,), type_of(x))


def describe_flat(dnnl: Dnnl, *arrays: Array) -> list[Descriptor]:
    """Arrays of one shape and order as flat runs, for elementwise work. Unsupported where their memory has gaps or differs in order."""
    first = arrays[0]
    for x in arrays:
        same = all(a * first.itemsize == b * x.itemsize for n, a, b in zip(x.shape, x.strides, first.strides) if n > 1)
        if x.shape != first.shape or not same or not is_dense(x) or not prod(x.shape):
            raise Unsupported("not one run of memory in one order")
    return [dnnl.strided((prod(x.shape),), (1,), type_of(x)) for x in arrays]


class Feed:
    """Brings an input into the layout and type a primitive wants; nothing happens when it lies so already."""

    def __init__(self, dnnl: Dnnl, have: Descriptor, want: Descriptor, purpose: str) -> None:
        self._reorder: Primitive | None = None if dnnl.equal(have, want) else dnnl.reorder(have, want)
        self._scratch, self._purpose, self._nbytes = dnnl.scratch, purpose, want.nbytes

    @property
    def idle(self) -> bool:
        return self._reorder is None

    def __call__(self, address: int) -> int:
        if self._reorder is None:
            return address
        held = self._scratch.address(self._purpose, self._nbytes)
        self._reorder(address, held)
        return held


class Drain:
    """Takes an output from the layout a primitive writes to where it belongs; add: adds to what is there."""

    def __init__(self, dnnl: Dnnl, made: Descriptor, want: Descriptor, purpose: str, *, add: bool = False) -> None:
        direct = not add and dnnl.equal(made, want)
        self._reorder: Primitive | None = None if direct else dnnl.reorder(made, want, add=add)
        self._scratch, self._purpose, self._nbytes = dnnl.scratch, purpose, made.nbytes

    @property
    def idle(self) -> bool:
        return self._reorder is None

    def target(self, address: int) -> int:
        """Where the primitive shall write."""
        return address if self._reorder is None else self._scratch.address(self._purpose, self._nbytes)

    def finish(self, address: int) -> None:
        """Call after the primitive ran."""
        if self._reorder is not None:
            self._reorder(self._scratch.address(self._purpose, self._nbytes), address)
