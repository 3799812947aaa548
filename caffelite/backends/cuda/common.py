"""What every stem shares: launching kernels, C++ type names, scratch memory, and arrays of any strides brought into the contract's layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from inspect import isfunction, signature
from math import prod
from typing import Any

import ml_dtypes
import numpy as np

from caffelite.backends.contract import Array, Ints, is_usual, strides_of
from caffelite.backends.cuda.array import Boxes, DeviceArray
from caffelite.backends.cuda.driver import Driver, Program
from caffelite.backends.cuda.gemm_tune import Tuner
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError

DTYPES = {name: np.dtype(name) for name in ("float32", "float64", "uint8", "int32")} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
C_NAMES = {np.dtype(np.float32): "float", np.dtype(ml_dtypes.bfloat16): "bf16", np.dtype(np.uint8): "unsigned char", np.dtype(np.int32): "int"}
THREADS = 256  # of a block, where nothing else is said
WARP = 32
MOST_BLOCKS = 1 << 16  # of a grid whose threads loop over items
MOST_PARTIALS = 1024  # blocks of a kernel whose sums one further block adds up
SCRATCH_ROUND = 1 << 16

# The parameters of ops that are written, by name; and those that only the update rules, and scale_in_place, write.
OUTPUTS = frozenset(
    (
        "y",
        "dx",
        "dw",
        "db",
        "ds",
        "da",
        "mask",
        "top",
        "work",
        "mean",
        "variance",
        "mean_sum",
        "variance_sum",
        "weight",
        "winner",
        "prob",
        "loss",
        "normalizer",
        "accuracy",
        "per_class",
    )
)
UPDATED = frozenset(("w", "g", "h", "v"))
IN_PLACE = frozenset("x")
ACTIVATIONS = frozenset(("x", "y", "dx", "dy", "xs", "positive"))  # of these, an op's kernels take one type at a time
FLOAT32 = np.dtype(np.float32)


def blocks(items: int, threads: int = THREADS) -> int:
    """How many blocks give one thread to each item, at most MOST_BLOCKS; the kernel's threads then loop."""
    return max(1, min(-(-items // threads), MOST_BLOCKS))


def partial_blocks(items: int) -> int:
    """As blocks, for a kernel that leaves partial sums."""
    return min(blocks(items), MOST_PARTIALS)


def cname(x: Array) -> str:
    """The C++ type of x's elements. BackendError for types that no kernel is written for."""
    try:
        return C_NAMES[x.dtype]
    except KeyError:
        raise BackendError(f"the cuda backend has no kernels for arrays of {x.dtype}", hint="use float32 or bfloat16") from None


class Base:
    """Holds the driver, the loaded programs and the scratch memory. Not for use from several threads at once."""

    name = "cuda"
    runs_ahead = True
    drops_along = True
    raw_images = True

    def __init_subclass__(cls, *, any_layout: bool = False) -> None:
        """Lets ops see only arrays that lie as strides_of says. any_layout: the class's own ops take every layout themselves."""
        super().__init_subclass__()
        if any_layout:
            return
        for name, member in list(vars(cls).items()):
            if isfunction(member) and not name.startswith("_"):
                setattr(cls, name, _laid_out(member))

    def __init__(self, driver: Driver) -> None:
        self.driver, self.tuner = driver, Tuner(driver)
        self._programs: dict[str, Program] = {}
        self._scratch: dict[str, Array] = {}
        self._held: list[Any] | None = None

    def launch(self, module: Module, name: str, grid: int | Ints, block: int | Ints, *args: Any, shared: int = 0) -> None:
        """Runs a kernel of a module. args: arrays, None, NumPy scalars or Boxes. A grid without blocks runs nothing."""
        grid, block = _three(grid), _three(block)
        if not prod(grid):
            return
        for number, arg in enumerate(args):
            if not (arg is None or isinstance(arg, (np.generic, DeviceArray, Boxes))):
                raise TypeError(f"{name}: argument {number} is a {type(arg).__name__}, expected an array, None or a NumPy scalar")
        program = self._programs.get(module.name)
        if program is None:
            program = self._programs[module.name] = self.driver.load(module)
        program.launch(name, grid, block, args, shared)
        if self._held is not None:
            self._held.extend(args)

    @contextmanager
    def holding(self, arrays: list[Any]) -> Iterator[None]:
        """Within it, the arguments of all launches are added to `arrays`."""
        self._held = arrays
        try:
            yield
        finally:
            self._held = None

    def scratch(self, nbytes: int, use: str = "") -> Array:
        """At least `nbytes` bytes (uint8) with undefined contents, aligned to 64, until the next call of scratch for the same use."""
        if use not in self._scratch or self._scratch[use].size < nbytes:
            self._scratch.pop(use, None)  # so that its memory may serve the new one; kernels that still use it run before those that will
            self._scratch[use] = self.driver.allocate(-(-nbytes // SCRATCH_ROUND) * SCRATCH_ROUND)
        return self._scratch[use]

    @contextmanager
    def trials(self) -> Iterator[None]:
        """Within it scratch memory grows as it may; afterwards it is as large as before."""
        before = {use: buffer.size for use, buffer in self._scratch.items()}
        try:
            yield
        finally:
            for use in [use for use, buffer in self._scratch.items() if buffer.size > before.get(use, 0)]:
                del self._scratch[use]
                if use in before:
                    self.scratch(before[use], use)

    def part(self, buffer: Array, offset: int, shape: Ints, dtype: Any) -> Array:
        """An array of NumPy type `dtype`, or of that name, at byte `offset` of `buffer`, laid out by strides_of."""
        kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
        return buffer.at(offset, shape, strides_of(shape, kind.itemsize), kind)

    def new(self, shape: Ints, dtype: Any) -> Array:
        """A new array, as `part` gives it."""
        kind = DTYPES[dtype] if isinstance(dtype, str) else dtype
        return self.part(self.driver.allocate(prod(shape) * kind.itemsize), 0, shape, kind)

    def _dense(self, x: Array, dtype: Any = None) -> Array:
        """A new array of x's shape, and its type or `dtype`."""
        return self.new(x.shape, dtype or x.dtype)

    def _move(self, x: Array, y: Array) -> None:
        """y <- x for any strides; see memory.py."""
        raise NotImplementedError


def _three(sizes: int | Ints) -> Ints:
    given = (sizes,) if isinstance(sizes, int) else tuple(sizes)
    return (*given, 1, 1)[:3]


def _laid_out(function: Callable[..., Any]) -> Callable[..., Any]:
    """The op with copies in place of arrays that its kernels do not take: those that lie otherwise than the contract says, and bfloat16
    activations beside float32 ones. What the op writes is copied back."""
    name, names = function.__name__, list(signature(function).parameters)[1:]
    written = OUTPUTS | (UPDATED if name.endswith("_update") else IN_PLACE if name.endswith("_in_place") else frozenset())

    @wraps(function)
    def run(self: Base, *args: Any, **options: Any) -> Any:
        given = dict(zip(names, args)) | options
        types = {x.dtype for parameter, value in given.items() if parameter in ACTIVATIONS for x in _arrays(value)}
        mixed = len(types) > 1
        if not mixed and all(is_usual(x) for value in given.values() for x in _arrays(value)):
            return function(self, *args, **options)
        copies = _Copies(self)
        ready = {name: copies.of(value, widen=mixed and name in ACTIVATIONS, written=name in written) for name, value in given.items()}
        result = function(self, **ready)
        copies.bring_back()
        return result

    return run


class _Copies:
    """The copies made for one call of an op; the same array is copied once, so that what works in place still does."""

    def __init__(self, backend: Base) -> None:
        self._backend = backend
        self._made: dict[int, Array] = {}
        self._back: list[tuple[Array, Array]] = []

    def of(self, value: Any, *, widen: bool, written: bool) -> Any:
        """An argument with its arrays replaced where they have to be."""
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):  # a named tuple, such as a dropout key, goes through as it is
            return [self.of(item, widen=widen, written=written) for item in value]
        if not hasattr(value, "strides") or (is_usual(value) and not (widen and value.dtype != FLOAT32)):
            return value
        if id(value) not in self._made:
            self._made[id(value)] = self._backend._dense(value, FLOAT32 if widen else None)
            self._backend._move(value, self._made[id(value)])
        if written:
            self._back.append((self._made[id(value)], value))
        return self._made[id(value)]

    def bring_back(self) -> None:
        """Copies what was written to where it belongs."""
        for made, value in self._back:
            self._backend._move(made, value)


def _arrays(value: Any) -> list[Array]:
    """The arrays in an argument."""
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _arrays(item)]
    return [value] if hasattr(value, "strides") else []
