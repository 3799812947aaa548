"""A stand-in for CuPy whose device memory is the host's, and which notes what it is asked for."""

from __future__ import annotations

import ctypes
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np

OPS, COPIES = 77, 78  # streams


class RuntimeError_(RuntimeError):
    """cupy.cuda.runtime.CUDARuntimeError."""


class DriverError(RuntimeError):
    """cupy.cuda.driver.CUDADriverError."""


class OutOfMemory(MemoryError):
    """cupy.cuda.memory.OutOfMemoryError."""


class Stand:
    """CuPy's names. `capability`, `devices` and `free` say what machine it is; `launches` holds what was started."""

    def __init__(self) -> None:
        self.capability, self.devices, self.free = (9, 0), 1, 1 << 20
        self.launches: list[dict[str, Any]] = []
        self.limits: list[tuple[int, int, int]] = []
        self.lost = self.capturing = False
        self.graphs: list[str] = []
        self.streams = [OPS, COPIES]
        self.calls: list[tuple[Any, ...]] = []  # what concerns events and copies
        self.locked: dict[int, Any] = {}  # page-locked memory by its address
        self.chosen: list[tuple[int, int]] = []
        runtime = SimpleNamespace(
            CUDARuntimeError=RuntimeError_,
            streamNonBlocking=1,
            getDeviceCount=self.count,
            driverGetVersion=lambda: 13000,
            setDevice=lambda device: self.chosen.append((threading.get_ident(), device)),
            getDeviceProperties=lambda device: {"name": b"Test GPU", "major": self.capability[0], "minor": self.capability[1]},
            streamCreateWithFlags=self.create_stream,
            streamSynchronize=self.wait,
            memsetAsync=lambda address, value, size, stream: ctypes.memset(address, value, size),
            memcpyAsync=self.copy,
            eventElapsedTime=lambda start, stop: 250.0 * (stop - start),
            deviceGetAttribute=lambda attribute, device: {16: 132, 13: 1_980_000, 36: 2_619_000, 37: 5120}[attribute],
            memGetInfo=lambda: (self.free, 4 << 20),
            streamCaptureModeRelaxed=2,
            streamIsCapturing=lambda stream: self.capturing,
            streamBeginCapture=lambda stream, mode: self.graphs.append(f"begin {stream} {mode}"),
            streamEndCapture=self.end_capture,
            graphInstantiate=self.instantiate,
            graphLaunch=self.launch_graph,
            graphDestroy=lambda graph: self.graphs.append(f"destroy {graph}"),
            graphExecDestroy=lambda graph: (self.wait(0), self.graphs.append(f"destroy exec {graph}")),
            eventDisableTiming=2,
            eventBlockingSync=1,
            hostAllocDefault=0,
            eventCreateWithFlags=self.create_event,
            eventRecord=lambda event, stream: self.calls.append(("record", event, stream)),
            eventSynchronize=lambda event: (self.wait(0), self.calls.append(("synchronize", event))),
            eventDestroy=lambda event: (self.wait(0), self.calls.append(("destroy", event))),
            streamWaitEvent=lambda stream, event: self.calls.append(("wait", stream, event)),
            hostAlloc=self.lock,
            freeHost=self.locked.pop,
        )
        driver = SimpleNamespace(
            CUDADriverError=DriverError,
            moduleLoadData=self.load,
            moduleGetFunction=lambda module, symbol: {"_Z1k": 11}[symbol],
            funcSetAttribute=lambda function, attribute, value: self.limits.append((function, attribute, value)),
            launchKernel=self.launch,
        )
        self.cuda = SimpleNamespace(
            runtime=runtime, driver=driver, MemoryPool=lambda: SimpleNamespace(malloc=self.alloc), memory=SimpleNamespace(OutOfMemoryError=OutOfMemory)
        )

    def count(self) -> int:
        if self.devices < 0:
            raise RuntimeError_("cudaErrorInsufficientDriver: CUDA driver version is insufficient for CUDA runtime version")
        return self.devices

    def wait(self, stream: int) -> None:
        if self.lost:
            raise RuntimeError_("cudaErrorIllegalAddress: an illegal memory access was encountered")

    def create_stream(self, flags: int) -> int:
        if self.lost:
            raise RuntimeError_("cudaErrorDevicesUnavailable: CUDA-capable device(s) is/are busy or unavailable")
        assert flags == 1
        return self.streams.pop(0) if self.streams else 99

    def create_event(self, flags: int) -> int:
        assert flags in (1, 3)
        self.calls.append(("event",))
        return 1000 + self.calls.count(("event",))

    def lock(self, size: int, flags: int) -> int:
        if size > self.free:
            raise RuntimeError_("cudaErrorMemoryAllocation: out of memory")
        held = np.full(size, 0xEE, np.uint8)
        self.locked[held.ctypes.data] = held
        return int(held.ctypes.data)

    def copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.wait(stream)
        self.calls.append(("copy", stream))
        ctypes.memmove(to, source, size)

    def load(self, image: bytes) -> int:
        self.wait_driver()
        if image == b"newer":
            raise DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
        return 5

    def wait_driver(self) -> None:
        if self.lost:
            raise DriverError("CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered")

    def alloc(self, nbytes: int) -> Any:
        if nbytes > self.free:
            raise OutOfMemory
        held = np.full(nbytes, 0xEE, np.uint8)
        return SimpleNamespace(held=held, ptr=held.ctypes.data)

    def end_capture(self, stream: int) -> int:
        self.graphs.append(f"end {stream}")
        self.wait(stream)
        return 31

    def instantiate(self, graph: int) -> int:
        self.graphs.append(f"instantiate {graph}")
        return 32

    def launch_graph(self, graph: int, stream: int) -> None:
        self.wait(stream)
        self.graphs.append(f"play {graph} {stream}")

    def launch(self, function: int, *rest: int) -> None:
        *geometry, shared, stream, pointers, extra = rest
        if shared > 1 << 20:
            raise DriverError("CUDA_ERROR_INVALID_VALUE: invalid argument")
        table = (ctypes.c_void_p * 4).from_address(pointers)
        self.launches.append({"function": function, "geometry": geometry, "shared": shared, "stream": stream, "extra": extra})
        self.launches[-1]["bytes"] = [ctypes.string_at(table[i], size) for i, size in enumerate((8, 8, 4, 12))]
