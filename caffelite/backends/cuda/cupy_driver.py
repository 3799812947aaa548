"""The driver of real GPUs, on CuPy's bindings to the CUDA driver and runtime. None of CuPy's own kernels is used."""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from caffelite.backends.contract import Array, Ints
from caffelite.backends.cuda import cache, nvrtc, tensor_map
from caffelite.backends.cuda.array import Boxes, DeviceArray
from caffelite.backends.cuda.driver import refuse_while_capturing
from caffelite.backends.cuda.launch import FOLDER, Module, digest
from caffelite.backends.cuda.meter import Meter
from caffelite.backends.cuda.peaks import Facts
from caffelite.errors import BackendError, OutOfMemoryError

OLDEST = (8, 0)  # compute capability: tensor cores with bfloat16, and cp.async
FREE_SHARED = 32 * 1024  # bytes of dynamic shared memory that a block gets without asking: 48 KB less what the kernel holds by itself
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
# cudaDevAttrMultiProcessorCount, -ClockRate, -MemoryClockRate (both kHz), -GlobalMemoryBusWidth (bits): CUDA 13 has them nowhere else.
ATTRIBUTES = (16, 13, 36, 37)
# What cuModuleLoadData says where the machine code is not for this driver, or this device; anything else is the error of a kernel before.
REFUSED = ("CUDA_ERROR_INVALID_IMAGE", "CUDA_ERROR_NO_BINARY_FOR_GPU", "CUDA_ERROR_UNSUPPORTED")
RESUME = "run again from the last snapshot; it is whole"
INSTALL = "install CuPy for your driver's CUDA, in a clone of caffelite: pip install '.[cuda13]' (or [cuda12])"


class CupyDriver:
    """Implements caffelite.backends.cuda.driver.Driver on one GPU.

    BackendError when CuPy is not installed, there is no driver or no such device, or the device is older than compute capability 8.0.
    """

    name = "cupy"

    def __init__(self, device: int = 0) -> None:
        self.capturing = False
        self._made: list[Any] = []  # memory allocated by what is being recorded
        try:
            import cupy
        except ImportError as error:
            raise BackendError(f"the cuda backend needs CuPy, which does not load: {error}", hint=INSTALL) from error
        self._cupy, self._driver, self._runtime = cupy, cupy.cuda.driver, cupy.cuda.runtime
        self.device, self.meter = device, Meter()
        self.tell: Callable[[str], object] = lambda stem: None
        try:
            capability = self._check(device)
            self._stream, self._copies, self._pool = _queue(cupy, device)
            self._cuda = self._runtime.driverGetVersion() // 1000
        except self._runtime.CUDARuntimeError as error:
            raise BackendError(f"GPU {device} does not start: {error}", hint="nvidia-smi shows what else runs on it") from error
        nvrtc.version(self._cuda)  # better now than at the first kernel
        self.architecture = "sm_90a" if capability == (9, 0) else f"sm_{capability[0]}{capability[1]}"

    def _select(self) -> None:
        """Makes the device the calling thread's current one. Whoever else changes that, in this process, has to change it back."""
        if getattr(_CURRENT, "device", None) != self.device:  # a call of the runtime less for each kernel
            self._runtime.setDevice(self.device)
            _CURRENT.device = self.device

    def _check(self, device: int) -> tuple[int, int]:
        """Makes the device the current one; its compute capability."""
        try:
            count = self._runtime.getDeviceCount()
        except self._runtime.CUDARuntimeError as error:
            raise BackendError(f"no usable GPU: {error}", hint="install NVIDIA's driver, or run on the CPU with --backend onednn") from error
        if not 0 <= device < count:
            raise BackendError(f"there is no GPU {device}: {count} found", hint=f"choose 0 to {count - 1}; caffelite device-query lists them")
        self._select()
        facts = self._runtime.getDeviceProperties(device)
        capability = (int(facts["major"]), int(facts["minor"]))
        if capability < OLDEST:
            name = facts["name"].decode()
            raise BackendError(
                f"GPU {device} ({name}) has compute capability {capability[0]}.{capability[1]}; caffelite needs 8.0 or newer", hint="use --backend onednn"
            )
        return capability

    def allocate(self, nbytes: int) -> Array:
        with self._reported():
            memory = self._allocate(max(nbytes, 1))
            self._runtime.memsetAsync(memory.ptr, 0, max(nbytes, 1), self._stream)
        held = self.meter.hold(memory, nbytes)
        if self.capturing:
            self._made.append(held)
        return DeviceArray(held, memory.ptr, (nbytes,), (1,), np.dtype(np.uint8))

    def _allocate(self, nbytes: int) -> Any:
        try:
            return self._pool.malloc(nbytes)
        except self._cupy.cuda.memory.OutOfMemoryError as error:
            free, total = self._runtime.memGetInfo()
            raise OutOfMemoryError(f"GPU {self.device}", wanted=nbytes, free=free, total=total, used=self.meter.used) from error

    def from_host(self, values: Any, x: Array) -> None:
        refuse_while_capturing(self)
        with self._reported():
            self._runtime.memcpyAsync(x.address, values.ctypes.data, x.size * x.itemsize, TO_DEVICE, self._stream)
        self.synchronize()  # `values` may go as soon as this returns

    def to_host(self, x: Array, into: Any = None) -> Any:
        refuse_while_capturing(self)
        held = x.host() if into is None else into
        with self._reported():
            self._runtime.memcpyAsync(held.ctypes.data, x.address, x.size * x.itemsize, TO_HOST, self._stream)
        self.synchronize()
        return held

    def pinned(self, nbytes: int) -> Any:
        self._select()
        try:
            memory = PinnedMemory(self._runtime, max(nbytes, 1), (self._stream, self._copies))
        except self._runtime.CUDARuntimeError as error:
            needed = f"{nbytes / 2**20:,.1f} MB of page-locked memory for copies to GPU {self.device} cannot be had: {error}"
            raise BackendError(needed, hint="lower prefetch or batch_size in data_param") from error
        return np.asarray(memory)[:nbytes]

    def send(self, values: Any, x: Array) -> None:
        refuse_while_capturing(self)
        with self._reported():
            self._runtime.memcpyAsync(x.address, values.ctypes.data, x.size * x.itemsize, TO_DEVICE, self._stream)

    def event(self) -> CupyEvent:
        with self._reported():
            return CupyEvent(self._runtime, self._reported)

    def record(self, event: Any) -> None:
        with self._reported():
            self._runtime.eventRecord(event.handle, self._stream)

    def wait(self, event: Any) -> None:
        with self._reported():
            self._runtime.streamWaitEvent(self._stream, event.handle)

    def upload(self, values: Any, x: Array, after: Any, done: Any) -> None:
        with self._reported():
            self._runtime.streamWaitEvent(self._copies, after.handle)
            self._runtime.memcpyAsync(x.address, values.ctypes.data, x.size * x.itemsize, TO_DEVICE, self._copies)
            self._runtime.eventRecord(done.handle, self._copies)

    def load(self, module: Module) -> CupyProgram:
        cubin, symbols = compiled(module, self.architecture, self._cuda, lambda: self.tell(module.stem))
        self._select()
        try:
            return CupyProgram(self._driver, self._stream, self._select, cubin, symbols)
        except self._driver.CUDADriverError as error:
            if not any(name in str(error) for name in REFUSED):
                raise BackendError(f"GPU {self.device} stopped before the kernels of {module.name} were loaded: {error}", hint=RESUME) from error
            major, minor = nvrtc.version(self._cuda)
            hint = f"NVIDIA's driver may be older than CUDA {major}.{minor}, which compiled them: update it, or name an older NVRTC in CAFFELITE_NVRTC"
            raise BackendError(f"GPU {self.device} does not load the kernels of {module.name}: {error}", hint=hint) from error

    def capture(self, run: Callable[[], None]) -> CupyRecord:
        with self._reported():
            self._runtime.streamBeginCapture(self._stream, self._runtime.streamCaptureModeRelaxed)
        self.capturing, collects = True, gc.isenabled()
        made: list[Any] = []
        self._made = made
        gc.disable()  # what goes away just now may wait for the stream, which would spoil the capture
        try:
            run()
        except BaseException:
            self._abandon_capture()
            raise
        finally:
            self.capturing, self._made = False, []
            if collects:
                gc.enable()
        with self._reported():
            return CupyRecord(self, self._runtime.streamEndCapture(self._stream), made)

    def _abandon_capture(self) -> None:
        with suppress(self._runtime.CUDARuntimeError):  # what went wrong before is what is to be told
            self._runtime.graphDestroy(self._runtime.streamEndCapture(self._stream))

    def synchronize(self) -> None:
        refuse_while_capturing(self)
        with self._reported():
            self._runtime.streamSynchronize(self._stream)

    def mark(self) -> Any:
        with self._reported():
            event = CupyEvent(self._runtime, self._reported, timed=True)
        self.record(event)
        return event

    def seconds_between(self, start: Any, stop: Any) -> float:
        with self._reported():
            self._runtime.eventSynchronize(stop.handle)
            return float(self._runtime.eventElapsedTime(start.handle, stop.handle)) / 1e3

    def facts(self) -> Facts | None:
        with self._reported():
            properties = self._runtime.getDeviceProperties(self.device)
            found = [int(self._runtime.deviceGetAttribute(attribute, self.device)) for attribute in ATTRIBUTES]
        multiprocessors, clock, memory_clock, bus = found
        capability = (int(properties["major"]), int(properties["minor"]))
        return Facts(properties["name"].decode(), capability, multiprocessors, clock * 1e3, memory_clock * 1e3, bus)

    @contextmanager
    def _reported(self) -> Iterator[None]:
        """For calls on the device, any of which may return the error of a kernel that was started long before."""
        try:
            self._select()
            yield
        except self._runtime.CUDARuntimeError as error:
            raise BackendError(f"GPU {self.device} stopped: {error}", hint=RESUME) from error


class CupyRecord:
    """A CUDA graph, ready to run. made: the memory that it zeroes, which is its own as long as it may run, used by a kernel of it or not."""

    def __init__(self, driver: CupyDriver, graph: int, made: list[Any]) -> None:
        self._driver, self._runtime, self._made = driver, driver._runtime, made
        try:
            self._graph = self._runtime.graphInstantiate(graph)
        finally:
            self._runtime.graphDestroy(graph)
        finalizer = weakref.finalize(self, _destroy, self._runtime, self._runtime.graphExecDestroy, self._graph)
        finalizer.atexit = False  # the device's context may be gone by then, and its graphs with it

    def play(self) -> None:
        with self._driver._reported():
            self._runtime.graphLaunch(self._graph, self._driver._stream)


_CURRENT = threading.local()  # .device: the thread's current device


@functools.cache
def _queue(cupy: Any, device: int) -> tuple[int, int, Any]:
    """The stream of ops, that of uploads, and the memory of a GPU, the same for all backends of this process: their nets may share weights,
    and memory that is free again may still be in use by kernels, which only what follows on their stream waits for. So CuPy's own pool does
    not do, and uploads wait for an event of the stream of ops that is later than the allocation."""
    runtime = cupy.cuda.runtime
    ops, copies = (runtime.streamCreateWithFlags(runtime.streamNonBlocking) for _ in range(2))
    return ops, copies, cupy.cuda.MemoryPool()


class CupyEvent:
    """Implements caffelite.backends.cuda.driver.Event. Whoever waits for it sleeps."""

    def __init__(self, runtime: Any, reported: Any, *, timed: bool = False) -> None:
        self._runtime, self._reported = runtime, reported
        self.handle = runtime.eventCreateWithFlags(runtime.eventBlockingSync | (0 if timed else runtime.eventDisableTiming))
        weakref.finalize(self, _destroy, runtime, runtime.eventDestroy, self.handle).atexit = False

    def synchronize(self) -> None:
        with self._reported():
            self._runtime.eventSynchronize(self.handle)


def _destroy(runtime: Any, destroy: Callable[[int], None], handle: int) -> None:
    with suppress(runtime.CUDARuntimeError):  # of a device that has stopped, which whoever uses it next will hear
        destroy(handle)


class PinnedMemory:
    """Page-locked, zeroed memory of the host, for NumPy to look into; it goes when nobody does any more and no copy can be under way."""

    def __init__(self, runtime: Any, nbytes: int, streams: Ints) -> None:
        address = runtime.hostAlloc(nbytes, runtime.hostAllocDefault)
        ctypes.memset(address, 0, nbytes)
        self.__array_interface__ = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 3}
        weakref.finalize(self, _free, runtime, address, streams).atexit = False


_LEFT: dict[Ints, list[int]] = {}  # addresses of page-locked memory that nobody looks into any more, by the streams that may still copy


def _free(runtime: Any, address: int, streams: Ints) -> None:
    """Gives the memory back; while work is being recorded, in some other thread perhaps, it stays until the next call: to wait then would
    spoil the record."""
    left = _LEFT.setdefault(streams, [])
    left.append(address)
    with suppress(RuntimeError):  # CuPy's own, of a device that has stopped, and the plain one that it raises for a record that was spoilt
        if any(runtime.streamIsCapturing(stream) for stream in streams):
            return
        ready = [left.pop() for _ in range(len(left))]  # what comes while this waits is not ready
        for stream in streams:
            runtime.streamSynchronize(stream)
        for each in ready:
            runtime.freeHost(each)


class CupyProgram:
    """A module as machine code in the device's context."""

    def __init__(self, driver: Any, stream: int, select: Callable[[], None], cubin: bytes, symbols: dict[str, str]) -> None:
        self._driver, self._stream, self._select = driver, stream, select
        self._module = driver.moduleLoadData(cubin)
        self._functions = {name: driver.moduleGetFunction(self._module, symbol) for name, symbol in symbols.items()}
        self._shared: dict[str, int] = {}

    def launch(self, name: str, grid: Ints, block: Ints, args: Sequence[Any], shared: int) -> None:
        self._select()
        function = self._functions[name]
        held = [_parameter(arg) for arg in args]
        pointers = (ctypes.c_void_p * max(len(held), 1))(*(ctypes.addressof(value) for value in held))
        try:
            if shared > max(FREE_SHARED, self._shared.get(name, 0)):
                self._driver.funcSetAttribute(function, MAX_DYNAMIC_SHARED, shared)
                self._shared[name] = shared
            self._driver.launchKernel(function, *grid, *block, shared, self._stream, ctypes.addressof(pointers), 0)
        except self._driver.CUDADriverError as error:
            asked = f"grid {grid}, block {block} and {shared} bytes of shared memory"
            message = f"kernel {name} does not start with {asked}, or one before it failed: {error}"
            raise BackendError(message, hint="CUDA_LAUNCH_BLOCKING=1 in the environment shows which one") from error


def _parameter(arg: Any) -> Any:
    """An argument as the bytes that the kernel's parameter holds."""
    if arg is None:
        return ctypes.c_uint64(0)
    if isinstance(arg, DeviceArray):
        return ctypes.c_uint64(arg.address)
    if isinstance(arg, Boxes):
        return tensor_map.encoded(arg)
    return ctypes.create_string_buffer(arg.tobytes(), arg.dtype.itemsize)


def compiled(module: Module, architecture: str, newest: int = nvrtc.ANY, tell: Callable[[], object] = lambda: None) -> tuple[bytes, dict[str, str]]:
    """The module's machine code and the symbols of its kernels, from the cache of compiled kernels or NVRTC (of CUDA `newest` at the most).

    tell: called before anything is compiled.
    """
    options = [f"-I{FOLDER}", "-lineinfo"]
    key = digest(*module.sources(), module.names, architecture, options[1:], nvrtc.version(newest), "with checksum")
    code, symbols = (cache.folder("cuda") / f"{module.name}-{architecture}-{key}.{ending}" for ending in ("cubin", "json"))
    cubin, names = cache.content(code), cache.content(symbols)
    if cubin is None or names is None:
        tell()
        cubin, found, _ = nvrtc.compile_cubin(module.path.read_text(), str(module.path), architecture, module.names, options, newest=newest)
        names = json.dumps(found).encode()
        for path, text in ((code, cubin), (symbols, names)):
            cache.once(path, lambda out, text=text: out.write_bytes(text))  # type: ignore[misc]
    return cubin, json.loads(names)
