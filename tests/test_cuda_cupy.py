"""The CuPy driver against a stand-in for CuPy whose device memory is the host's: what it asks for, and what it says when it is refused."""

from __future__ import annotations

import ctypes
import sys
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from caffelite import backends
from caffelite.backends.cuda import cupy_driver
from caffelite.backends.cuda.array import DeviceArray
from caffelite.backends.cuda.cupy_driver import CupyDriver
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError


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
        self.lost = False
        self.events: list[str] = []
        self.graphs: list[str] = []
        runtime = SimpleNamespace(
            CUDARuntimeError=RuntimeError_,
            streamNonBlocking=1,
            getDeviceCount=self.count,
            driverGetVersion=lambda: 13000,
            setDevice=lambda device: None,
            getDeviceProperties=lambda device: {"name": b"Test GPU", "major": self.capability[0], "minor": self.capability[1]},
            streamCreateWithFlags=self.create_stream,
            streamSynchronize=self.wait,
            memsetAsync=lambda address, value, size, stream: ctypes.memset(address, value, size),
            memcpyAsync=self.copy,
            memGetInfo=lambda: (self.free, 4 << 20),
            streamCaptureModeRelaxed=2,
            streamBeginCapture=lambda stream, mode: self.graphs.append(f"begin {stream} {mode}"),
            streamEndCapture=self.end_capture,
            graphInstantiate=self.instantiate,
            graphLaunch=self.launch_graph,
            graphDestroy=lambda graph: self.graphs.append(f"destroy {graph}"),
            graphExecDestroy=lambda graph: self.graphs.append(f"destroy exec {graph}"),
            eventCreate=lambda: self.event("create", 31 + len(self.events)),
            eventRecord=lambda event, stream: self.event("record", event, stream),
            eventSynchronize=lambda event: self.event("wait for", event),
            eventElapsedTime=lambda start, end: 2.5 if (start, end) == (31, 32) else -1.0,
            eventDestroy=lambda event: self.event("destroy", event),
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

    def event(self, what: str, *numbers: int) -> int:
        self.events.append(" ".join(map(str, (what, *numbers))))
        return numbers[0]

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
        return 77

    def copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self.wait(stream)
        ctypes.memmove(to, source, size)

    def load(self, image: bytes) -> int:
        if image == b"newer":
            raise DriverError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
        return 5

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


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setitem(sys.modules, "cupy", stand)
    monkeypatch.delenv("CAFFELITE_CUDA_DRIVER", raising=False)
    return stand


def refusal(device: int = 0) -> str:
    with pytest.raises(BackendError) as caught:
        backends.get("cuda", device=device)
    return str(caught.value)


def test_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.delenv("CAFFELITE_CUDA_DRIVER", raising=False)
    message = refusal()
    assert message.startswith("the cuda backend needs CuPy, which does not load: ")
    assert message.endswith("\n  install CuPy for your driver's CUDA: pip install 'caffelite[cuda13]' (or [cuda12])")


def test_without_a_driver(cupy: Stand) -> None:
    cupy.devices = -1
    assert refusal().startswith("no usable GPU: cudaErrorInsufficientDriver")


def test_a_device_that_is_not_there(cupy: Stand) -> None:
    cupy.devices = 2
    assert refusal(2) == "there is no GPU 2: 2 found\n  choose 0 to 1; caffelite device-query lists them"


def test_a_gpu_that_is_too_old(cupy: Stand) -> None:
    cupy.capability = (7, 5)
    assert refusal() == "GPU 0 (Test GPU) has compute capability 7.5; caffelite needs 8.0 or newer\n  use --backend onednn"


@pytest.mark.parametrize(("capability", "architecture"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"), ((10, 0), "sm_100")])
def test_the_architecture_is_the_devices_own(cupy: Stand, capability: tuple[int, int], architecture: str) -> None:
    cupy.capability = capability
    assert CupyDriver().architecture == architecture


def test_an_unknown_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAFFELITE_CUDA_DRIVER", "opencl")
    assert refusal() == "CAFFELITE_CUDA_DRIVER is 'opencl'\n  known ones: cupy, emulator"


def test_values_come_and_go(cupy: Stand) -> None:
    driver = CupyDriver()
    buffer = driver.allocate(64)
    assert not driver.to_host(buffer).any(), "memory is zeroed"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = driver.view(buffer, 8, (2, 3), (12, 4), np.float32)
    driver.from_host(values, x)
    np.testing.assert_array_equal(driver.to_host(x), values)
    assert driver.is_array(x)
    assert not driver.is_array(values)


def test_out_of_memory_says_how_much(cupy: Stand) -> None:
    with pytest.raises(BackendError) as caught:
        CupyDriver().allocate(3 << 20)
    assert str(caught.value) == ("out of memory on GPU 0: 3 MB more are needed, 1 of 4 MB are free\n  lower batch_size, or train with --precision bfloat16")


def test_a_lost_device_is_reported(cupy: Stand) -> None:
    driver = CupyDriver()
    x = driver.allocate(4)
    cupy.lost = True
    for call in (driver.synchronize, lambda: driver.to_host(x), lambda: driver.from_host(np.zeros(4, np.uint8), x)):
        with pytest.raises(BackendError, match=r"GPU 0 stopped: cudaErrorIllegalAddress.*\n  run again from the last snapshot"):
            call()


def test_backends_of_one_gpu_share_its_stream_and_memory(cupy: Stand) -> None:
    one, another = CupyDriver(), CupyDriver()
    assert (one._stream, one._pool) == (another._stream, another._pool)
    cupy.devices = 2
    assert CupyDriver(1)._pool is not one._pool


def test_a_busy_device(cupy: Stand) -> None:
    cupy.lost = True
    assert refusal().startswith("GPU 0 does not start: cudaErrorDevicesUnavailable")


def test_kernels_that_the_driver_does_not_know(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_driver, "compiled", lambda module, architecture, newest: (b"newer", {"k": "_Z1k"}))
    monkeypatch.setattr("caffelite.backends.cuda.nvrtc.version", lambda newest: (13, 0))
    with pytest.raises(BackendError, match=r"GPU 0 does not load the kernels of k: CUDA_ERROR_INVALID_IMAGE.*\n  NVIDIA's driver may be older than CUDA 13\.0"):
        CupyDriver().load(Module("k", ["k"]))


def test_a_kernel_gets_its_arguments_by_value(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_driver, "compiled", lambda module, architecture, newest: (b"code", {"k": "_Z1k"}))
    driver = CupyDriver()
    x, record = driver.allocate(16), np.zeros((), np.dtype([("a", np.int32), ("b", np.float32, 2)]))
    record["a"], record["b"] = 7, (1, 2)
    program = driver.load(Module("k", ["k"]))
    program.launch("k", (3, 2, 1), (64, 1, 1), [x, None, np.float32(2.5), record[()]], 50_000)
    (launch,) = cupy.launches
    assert launch["bytes"] == [x.address.to_bytes(8, "little"), bytes(8), np.float32(2.5).tobytes(), record.tobytes()]
    assert (launch["function"], launch["geometry"], launch["shared"], launch["stream"], launch["extra"]) == (11, [3, 2, 1, 64, 1, 1], 50_000, 77, 0)
    assert cupy.limits == [(11, 8, 50_000)], "more than 48 KB must be asked for"
    program.launch("k", (1, 1, 1), (64, 1, 1), [x, None, np.float32(0), record[()]], 40_000)
    assert len(cupy.limits) == 1
    with pytest.raises(BackendError, match=r"kernel k does not start with grid \(1, 1, 1\), block \(64, 1, 1\) and 2000000 bytes"):
        program.launch("k", (1, 1, 1), (64, 1, 1), [x], 2_000_000)


def test_time_is_taken_between_two_events(cupy: Stand) -> None:
    driver = CupyDriver()
    assert driver.seconds(lambda: cupy.events.append("run")) == 0.0025
    assert cupy.events == ["create 31", "create 32", "record 31 77", "run", "record 32 77", "wait for 32", "destroy 31", "destroy 32"]
    assert driver.device_name == "Test GPU"


def test_views_are_numpys() -> None:
    memory = np.arange(2 * 3 * 4 * 5, dtype=np.float32).view(ml_dtypes.bfloat16)[:120].reshape(2, 4, 5, 3).transpose(0, 3, 1, 2)
    x = DeviceArray(None, 1000, memory.shape, memory.strides, memory.dtype)
    for index in (1, (slice(None), slice(1, 3)), (..., slice(None, None, 2)), (0, 2, 3, 4)):
        want, got = memory[index if isinstance(index, int) else (*index, ...) if Ellipsis not in index else index], x[index]
        assert (got.shape, got.strides, got.dtype) == (want.shape, want.strides, want.dtype)
        assert got.address - 1000 == want.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    assert x[:, :1].reshape(2, 20).strides == memory[:, :1].reshape(2, 20).strides
    assert x.reshape(2, 3, 4, 5).shape == (2, 3, 4, 5)
    with pytest.raises(TypeError, match="whole numbers, slices"):
        x[np.array([1, 0])]
    with pytest.raises(ValueError, match=r"cannot be seen as \(2, 60\)"):
        x.reshape(2, 60)


def test_a_record_is_a_graph_of_the_stream(cupy: Stand) -> None:
    driver = CupyDriver()
    seen = []
    record = driver.capture(lambda: seen.append(driver.capturing))
    assert seen == [True]
    assert not driver.capturing
    record.play()
    record.play()
    assert cupy.graphs == ["begin 77 2", "end 77", "instantiate 31", "destroy 31", "play 32 77", "play 32 77"]
    del record
    assert cupy.graphs[-1] == "destroy exec 32"


def test_an_error_while_recording_ends_the_capture(cupy: Stand) -> None:
    driver = CupyDriver()
    x = driver.allocate(8)
    with pytest.raises(RuntimeError, match="copies from or to the host, or waits"):
        driver.capture(lambda: driver.to_host(x))
    assert cupy.graphs == ["begin 77 2", "end 77", "destroy 31"]
    assert driver.to_host(x).tolist() == [0] * 8


def test_a_device_lost_while_recording_or_playing(cupy: Stand) -> None:
    driver = CupyDriver()
    record = driver.capture(lambda: None)
    cupy.lost = True
    with pytest.raises(BackendError, match="GPU 0 stopped: cudaErrorIllegalAddress"):
        record.play()
    with pytest.raises(BackendError, match="GPU 0 stopped: cudaErrorIllegalAddress"):
        driver.capture(lambda: None)
    with pytest.raises(BackendError, match="first of all"):
        driver.capture(raises)


def raises() -> None:
    raise BackendError("first of all")
