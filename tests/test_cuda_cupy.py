"""The CuPy driver against a stand-in for CuPy whose device memory is the host's: what it asks for, and what it says when it is refused."""

from __future__ import annotations

import sys
import threading
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from cupy_stand import COPIES, OPS, Stand

from caffelite import backends
from caffelite.backends.contract import Peaks
from caffelite.backends.cuda import cupy_driver
from caffelite.backends.cuda.array import DeviceArray
from caffelite.backends.cuda.cupy_driver import CupyDriver
from caffelite.backends.cuda.driver import choose
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError, SpecError


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setattr(cupy_driver, "_CURRENT", threading.local())
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
    assert message.endswith("\n  install CuPy for your driver's CUDA, in a clone of caffelite: pip install '.[cuda13]' (or [cuda12])")


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
    with pytest.raises(SpecError) as caught:
        choose()
    assert str(caught.value) == "CAFFELITE_CUDA_DRIVER is 'opencl' in the environment\n  known ones: cupy, emulator"


def test_values_come_and_go(cupy: Stand) -> None:
    driver = CupyDriver()
    buffer = driver.allocate(64)
    assert not driver.to_host(buffer).any(), "memory is zeroed"
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    x = buffer.at(8, (2, 3), (12, 4), np.float32)
    driver.from_host(values, x)
    np.testing.assert_array_equal(driver.to_host(x), values)
    assert isinstance(x, DeviceArray)
    assert not isinstance(values, DeviceArray)


def test_an_upload_has_a_stream_of_its_own_between_events(cupy: Stand) -> None:
    driver = CupyDriver()
    x, values = driver.allocate(16), driver.pinned(16)
    assert not values.any(), "memory is zeroed"
    values[:] = 7
    after, done = driver.event(), driver.event()
    driver.record(after)
    driver.upload(values, x, after, done)
    driver.wait(done)
    done.synchronize()
    driver.send(values, x)
    one, two = after.handle, done.handle
    assert cupy.calls == [
        ("event",),
        ("event",),
        ("record", one, OPS),
        ("wait", COPIES, one),
        ("copy", COPIES),
        ("record", two, COPIES),
        ("wait", OPS, two),
        ("synchronize", two),
        ("copy", OPS),
    ]
    assert driver.to_host(x).tolist() == [7] * 16
    del after
    assert cupy.calls[-1] == ("destroy", one)


def test_page_locked_memory_goes_when_nobody_looks_into_it(cupy: Stand) -> None:
    driver = CupyDriver()
    part = driver.pinned(64)[8:16].view(np.float32)
    assert len(cupy.locked) == 1
    part[:] = 3
    assert next(iter(cupy.locked.values()))[8:16].view(np.float32).tolist() == [3, 3]
    del part
    assert not cupy.locked


def test_page_locked_memory_that_goes_during_a_recording_goes_later(cupy: Stand) -> None:
    driver = CupyDriver()
    one, another = driver.pinned(64), driver.pinned(64)
    cupy.capturing, cupy.lost = True, True  # to wait for the stream would fail
    del one
    assert len(cupy.locked) == 2
    cupy.capturing = cupy.lost = False
    del another
    assert not cupy.locked


def test_page_locked_memory_that_cannot_be_had(cupy: Stand) -> None:
    with pytest.raises(BackendError) as caught:
        CupyDriver().pinned(3 << 20)
    wanted = (
        "3.0 MB of page-locked memory for copies to GPU 0 cannot be had: cudaErrorMemoryAllocation: out of memory\n  lower prefetch or batch_size in data_param"
    )
    assert str(caught.value) == wanted


def test_out_of_memory_says_how_much(cupy: Stand) -> None:
    with pytest.raises(BackendError) as caught:
        CupyDriver().allocate(3 << 20)
    assert str(caught.value) == ("out of memory on GPU 0: 3 MB more are needed, 1 of 4 MB are free\n  lower batch_size, or train with --precision bfloat16")


def test_time_is_measured_by_events_on_the_stream(cupy: Stand) -> None:
    backend = backends.get("cuda")
    start, stop = backend.mark(), backend.mark()
    assert cupy.calls == [("event",), ("record", 1001, OPS), ("event",), ("record", 1002, OPS)]
    assert backend.seconds_between(start, stop) == 0.25
    del start, stop
    assert {("destroy", 1001), ("destroy", 1002)} < set(cupy.calls), "events are given back"


def test_what_the_device_is_made_of(cupy: Stand) -> None:
    backend = backends.get("cuda")
    assert backend.peaks("float32") == Peaks("Test GPU", pytest.approx(2 * 128 * 132 * 1.98e9), pytest.approx(2 * 2.619e9 * 640), "clocks and units")
    assert backend.peaks("bfloat16").operations is None


def test_memory_in_use_is_counted(cupy: Stand) -> None:
    driver = CupyDriver()
    before = driver.meter.used
    x = driver.allocate(513)
    assert driver.meter.used == before + 1024
    del x
    assert driver.meter.used == before
    assert driver.meter.peak >= before + 1024


def test_a_lost_device_is_reported(cupy: Stand) -> None:
    driver = CupyDriver()
    x, event, locked = driver.allocate(4), driver.event(), driver.pinned(4)
    cupy.lost = True
    for call in (
        driver.synchronize,
        event.synchronize,
        lambda: driver.send(locked, x),
        lambda: driver.upload(locked, x, event, event),
        lambda: driver.to_host(x),
        lambda: driver.from_host(np.zeros(4, np.uint8), x),
    ):
        with pytest.raises(BackendError, match=r"GPU 0 stopped: cudaErrorIllegalAddress.*\n  run again from the last snapshot"):
            call()


def test_backends_of_one_gpu_share_its_stream_and_memory(cupy: Stand) -> None:
    one, another = CupyDriver(), CupyDriver()
    assert (one._stream, one._copies, one._pool) == (another._stream, another._copies, another._pool) == (OPS, COPIES, one._pool)
    cupy.devices = 2
    assert CupyDriver(1)._pool is not one._pool


def test_every_call_is_made_on_the_drivers_own_device(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs in one process, and one GPU used from two threads."""
    monkeypatch.setattr(cupy_driver, "compiled", lambda module, architecture, newest, tell: (b"code", {"k": "_Z1k"}))
    cupy.devices = 2
    drivers = [CupyDriver(0), CupyDriver(1)]
    arrays = [driver.allocate(4) for driver in drivers]
    programs = [driver.load(Module("k", ["k"])) for driver in drivers]
    me = threading.get_ident()

    def devices(*calls: Any) -> list[int]:
        cupy.chosen.clear()
        for call in calls:
            call()
        return [device for _, device in cupy.chosen]

    assert devices(drivers[0].synchronize, drivers[1].synchronize, drivers[1].synchronize) == [0, 1], "asked for where it changes, and not again"
    calls = [lambda i=i: drivers[i].to_host(arrays[i]) for i in (0, 1)]
    calls += [lambda i=i: drivers[i].from_host(np.zeros(4, np.uint8), arrays[i]) for i in (0, 1)]
    calls += [lambda i=i: drivers[i].allocate(4) for i in (0, 1)]
    calls += [drivers[i].mark for i in (0, 1)]
    arguments = (None, np.float32(0), np.zeros((), [("a", np.int32), ("b", np.float32, 2)])[()])
    calls += [lambda i=i: programs[i].launch("k", (1, 1, 1), (1, 1, 1), [arrays[i], *arguments], 0) for i in (0, 1)]
    assert devices(*calls[:8]) == [0, 1] * 4
    assert devices(*calls[8:]) == [0, 1]
    worker = threading.Thread(target=drivers[1].synchronize)
    assert devices(worker.start, worker.join) == [1]
    assert cupy.chosen[0][0] != me


def test_a_busy_device(cupy: Stand) -> None:
    cupy.lost = True
    assert refusal().startswith("GPU 0 does not start: cudaErrorDevicesUnavailable")


def test_kernels_that_the_driver_does_not_know(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_driver, "compiled", lambda module, architecture, newest, tell: (b"newer", {"k": "_Z1k"}))
    monkeypatch.setattr("caffelite.backends.cuda.nvrtc.version", lambda newest: (13, 0))
    with pytest.raises(BackendError, match=r"GPU 0 does not load the kernels of k: CUDA_ERROR_INVALID_IMAGE.*\n  NVIDIA's driver may be older than CUDA 13\.0"):
        CupyDriver().load(Module("k", ["k"]))


def test_kernels_that_are_loaded_after_one_has_failed(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is not to blame."""
    monkeypatch.setattr(cupy_driver, "compiled", lambda module, architecture, newest, tell: (b"code", {"k": "_Z1k"}))
    driver = CupyDriver()
    cupy.lost = True
    with pytest.raises(BackendError, match=r"GPU 0 stopped before the kernels of k were loaded: CUDA_ERROR_ILLEGAL_ADDRESS.*\n  run again from the last"):
        driver.load(Module("k", ["k"]))


def test_a_kernel_gets_its_arguments_by_value(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cupy_driver, "compiled", lambda module, architecture, newest, tell: (b"code", {"k": "_Z1k"}))
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
    with pytest.raises(BackendError, match=r"kernel k does not start with grid \(1, 1, 1\), block \(64, 1, 1\) and 2000000 bytes.*\n  CUDA_LAUNCH_BLOCKING=1"):
        program.launch("k", (1, 1, 1), (64, 1, 1), [x], 2_000_000)


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


def test_memory_that_a_record_zeroes_is_not_given_to_others(cupy: Stand) -> None:
    """Also where none of its kernels uses it."""
    driver = CupyDriver()
    before = driver.meter.used
    record = driver.capture(lambda: driver.allocate(1024) and None)
    assert driver.meter.used == before + 1024
    driver.allocate(1024)
    assert driver.meter.used == before + 1024, "what is allocated at other times is not kept"
    del record
    assert driver.meter.used == before


def test_a_record_that_goes_after_the_device_says_nothing(cupy: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    driver = CupyDriver()
    record, event = driver.capture(lambda: None), driver.event()
    cupy.lost = True
    del record, event
    assert not said


def test_an_error_while_recording_ends_the_capture(cupy: Stand) -> None:
    driver = CupyDriver()
    x = driver.allocate(8)
    with pytest.raises(RuntimeError, match="copies from or to the host, or waits"):
        driver.capture(lambda: driver.to_host(x))
    assert cupy.graphs == ["begin 77 2", "end 77", "destroy 31"]
    assert driver.to_host(x).tolist() == [0] * 8


def test_a_copy_that_is_recorded_by_mistake_leaves_no_event_in_the_record(cupy: Stand) -> None:
    backend = backends.get("cuda")
    half = backend.view(backend.allocate(1 << 20), 0, (1 << 20,), "uint8")
    cupy.free = 8 << 20  # for the ring
    backend.to_host(half)  # fills a half, so that the next copy goes on with the other
    cupy.calls.clear()
    with pytest.raises(RuntimeError, match="copies from or to the host, or waits"):
        backend.driver.capture(lambda: backend.to_host(half))
    assert cupy.calls == []
    assert not backend.to_host(half).any()


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
