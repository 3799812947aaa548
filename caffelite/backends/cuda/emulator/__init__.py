"""The driver without a GPU: kernels compiled by g++ and run on the CPU, block by block, one fiber for each thread.

Arrays are as opaque as on a GPU. CAFFELITE_EMULATOR chooses the mode: "fast" (the default), or "check", which finds races, divergent
barriers, accesses outside the arguments, reads of shared memory that nobody wrote, and misaligned accesses.
CAFFELITE_EMULATOR_ORDER runs threads in another order: "up" (the default), "down", "random" or "lifo".
CAFFELITE_EMULATOR_MEMORY gives the device so many megabytes of memory and no more.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from caffelite import environment
from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda.array import BOX_COLUMNS, Boxes, DeviceArray
from caffelite.backends.cuda.driver import refuse_while_capturing
from caffelite.backends.cuda.emulator.build import MODES, build
from caffelite.backends.cuda.emulator.traffic import EmulatedEvent, Traffic
from caffelite.backends.cuda.launch import Module
from caffelite.backends.cuda.meter import Meter, rounded
from caffelite.backends.cuda.peaks import Facts
from caffelite.errors import BackendError, OutOfMemoryError

ALIGN = 64
ORDERS = ("up", "down", "random", "lifo")
KINDS = {"f": "f", "d": "f", "i": "iu", "l": "iu", "s": "iu", "b": "b", "S": "V"}  # a parameter's letter: the NumPy kinds that fit

# struct emu::TensorMap of emulator/cuda_emu.h.
BOXES = np.dtype(
    {
        "names": ["address", "pitch", "columns", "rows", "box_columns", "box_rows"],
        "formats": [np.uint64, np.uint64, *[np.uint32] * 4],
        "offsets": [0, 8, 16, 20, 24, 28],
        "itemsize": 128,
    }
)


class EmulatorDriver:
    """Implements caffelite.backends.cuda.driver.Driver on the CPU. mode and order: None for what the environment says."""

    name = "emulator"

    def __init__(self, mode: str | None = None, order: str | None = None) -> None:
        self._tape: list[Callable[[], None]] | None = None
        self.mode = mode or environment.choice(environment.EMULATOR, tuple(MODES))
        self.order = order or environment.choice(environment.EMULATOR_ORDER, ORDERS)
        self._traffic, self.meter, self.limit = Traffic(), Meter(), environment.megabytes(environment.EMULATOR_MEMORY)
        self.tell: Callable[[str], object] = lambda stem: None

    @property
    def capturing(self) -> bool:
        return self._tape is not None

    def run(self, action: Callable[[], None]) -> None:
        """Runs what a GPU would put on its stream, or records it."""
        if self._tape is None:
            action()
        else:
            self._tape.append(action)

    def capture(self, run: Callable[[], None]) -> EmulatedRecord:
        tape: list[Callable[[], None]] = []
        self._tape = tape
        try:
            run()
        finally:
            self._tape = None
        return EmulatedRecord(tape)

    def allocate(self, nbytes: int) -> Array:
        used = self.meter.used
        if self.limit is not None and used + rounded(nbytes) > self.limit:
            raise OutOfMemoryError("the emulated GPU", wanted=nbytes, free=self.limit - used, total=self.limit, used=used)
        memory = np.zeros(nbytes + ALIGN, np.uint8)
        address = memory.ctypes.data
        self._traffic.allocated((address, memory.nbytes))
        if self.capturing:
            self.run(lambda: memory.fill(0))
        return DeviceArray(self.meter.hold(memory, nbytes), address + -address % ALIGN, (nbytes,), (1,), np.dtype(np.uint8))

    def from_host(self, values: Any, x: Array) -> None:
        refuse_while_capturing(self)
        self._traffic.touch([_span(x)])
        ctypes.memmove(x.address, values.ctypes.data, x.size * x.itemsize)

    def to_host(self, x: Array, into: Any = None) -> Any:
        refuse_while_capturing(self)
        self._traffic.touch([_span(x)])
        held = x.host() if into is None else into
        ctypes.memmove(held.ctypes.data, x.address, x.size * x.itemsize)
        self._traffic.finish()
        return held

    def pinned(self, nbytes: int) -> Any:
        return self._traffic.pinned(nbytes)

    def touch(self, spans: list[tuple[int, int]]) -> None:
        """A kernel uses these bytes: see Traffic.touch."""
        self._traffic.touch(spans)

    def send(self, values: Any, x: Array) -> None:
        refuse_while_capturing(self)
        self._traffic.send(values, _span(x))

    def event(self) -> EmulatedEvent:
        return EmulatedEvent(self._traffic)

    def record(self, event: Any) -> None:
        self._traffic.record(event)

    def wait(self, event: Any) -> None:
        self._traffic.wait(event)

    def upload(self, values: Any, x: Array, after: Any, done: Any) -> None:
        self._traffic.upload(values, _span(x), after, done)

    def load(self, module: Module) -> EmulatedProgram:
        library = build(module.path, module.names, module.sources(), self.mode, lambda: self.tell(module.stem))
        return EmulatedProgram(library, module, self)

    def synchronize(self) -> None:
        """Every kernel has finished when its launch returns."""
        refuse_while_capturing(self)
        self._traffic.finish()

    def mark(self) -> Any:
        return time.perf_counter()

    def seconds_between(self, start: Any, stop: Any) -> float:
        return float(stop - start)

    def facts(self) -> Facts | None:
        return None


class EmulatedRecord:
    """Launches as functions without arguments."""

    def __init__(self, actions: list[Callable[[], None]]) -> None:
        self._actions = actions

    def play(self) -> None:
        for action in self._actions:
            action()


class _Kernel(ctypes.Structure):
    """struct emu::Kernel of emulator/cuda_emu.h."""

    _fields_ = (("bind", ctypes.c_void_p), ("call", ctypes.c_void_p), ("signature", ctypes.c_char_p))


class EmulatedProgram:
    """A module as a shared library."""

    def __init__(self, library: Path, module: Module, driver: EmulatorDriver) -> None:
        self.path, self._driver = library, driver
        self._library = ctypes.CDLL(str(library))
        self._library.emu_errors.restype = ctypes.c_char_p
        self._kernels = {name: self._find(f"emu_kernel_{i}") for i, name in enumerate(module.names)}

    def _find(self, symbol: str) -> tuple[Any, list[str]]:
        """A kernel's entry, and its parameters as cuda_emu.h spells them: P for a pointer with const, kind and size; else letter and size."""
        entry = getattr(self._library, symbol)
        entry.restype = _Kernel
        return entry, entry().signature.decode().split(";")[:-1]

    def launch(self, name: str, grid: Ints, block: Ints, args: Sequence[Any], shared: int) -> None:
        entry, parameters = self._kernels[name]
        if len(args) != len(parameters):
            raise BackendError(f"{name}: {len(args)} arguments for the parameters {parameters}")
        held = [_value(name, number, arg, parameter) for number, (arg, parameter) in enumerate(zip(args, parameters))]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.cast(ctypes.byref(value), ctypes.c_void_p) for value in held))
        spans = [_span(arg) for arg in args]
        regions = (ctypes.c_uint64 * max(2 * len(spans), 1))(*(word for span in spans for word in span))

        def run(_alive: Any = held) -> None:
            self._driver.touch(spans)
            self._library.emu_config(ORDERS.index(self._driver.order), ctypes.c_uint64(1), 0, int(self._driver.mode == "check"))
            failures = self._library.emu_launch(entry, (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block), shared, pointers, len(spans), regions)
            if failures:
                raise BackendError(f"{name}: {failures} error(s) on the emulator\n{self._located(self._library.emu_errors().decode())}")

        self._driver.run(run)

    def _located(self, report: str) -> str:
        """The report with code addresses replaced by file:line of the innermost frame in a kernel."""
        for address in sorted(set(re.findall(r"\+(0x[0-9a-f]+)", report))):
            command = ["addr2line", "-i", "-e", str(self.path), hex(int(address, 16) - 1)]
            try:
                frames = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split("\n")
            except OSError:
                return report
            lines = [os.path.basename(frame).split(" ")[0] for frame in frames]
            places = [line for line in lines if re.search(r"\.cuh?:", line)] or lines
            report = re.sub(rf"\+{address}\b", places[0], report)
        return report


def _value(name: str, number: int, arg: Any, parameter: str) -> Any:
    """The argument as bytes to be copied into the parameter. BackendError unless types and sizes agree."""
    if arg is None or isinstance(arg, DeviceArray):
        if "P" not in parameter[:1] or (arg is not None and not _points_to(arg, parameter)):
            raise BackendError(f"{name}, argument {number}: an array of {arg.dtype if arg is not None else 'nothing'} for the parameter {parameter}")
        return ctypes.c_void_p(0 if arg is None else arg.address)
    if isinstance(arg, Boxes):
        if parameter != f"S{BOXES.itemsize}":
            raise BackendError(f"{name}, argument {number}: a matrix in boxes for the parameter {parameter}")
        arg = np.void((arg.array.address, arg.pitch, arg.columns, arg.rows, BOX_COLUMNS, arg.height), BOXES)
    if arg.dtype.kind not in KINDS.get(parameter[0], "") or arg.dtype.itemsize != int(parameter[1:]):
        raise BackendError(f"{name}, argument {number}: a {arg.dtype} of {arg.dtype.itemsize} bytes for the parameter {parameter}")
    return ctypes.create_string_buffer(arg.tobytes(), arg.dtype.itemsize)


def _points_to(array: Array, parameter: str) -> bool:
    """Whether a pointer parameter such as Pcf4 (const float*) or Pv2 (bf16*; a struct) may point to the array's elements."""
    kind, size = parameter.lstrip("Pc")[0], int(parameter.lstrip("Pcfiv"))
    if array.dtype == np.uint8:  # raw memory
        return True
    return array.dtype.itemsize == size and (kind == "v" or (array.dtype.kind == "f") == (kind == "f"))


def _span(arg: Any) -> tuple[int, int]:
    """First address and number of bytes that an argument's elements lie in."""
    if isinstance(arg, Boxes):
        return _span(arg.array)
    if not isinstance(arg, DeviceArray) or not arg.size:
        return 0, 0
    return arg.address, sum((size - 1) * stride for size, stride in zip(arg.shape, arg.strides)) + arg.itemsize
