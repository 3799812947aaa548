"""Copies that nobody waits for: uploads beside the ops, small arrays through page-locked memory; and that the emulator finds misuse of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from caffelite.backends.cuda import CudaBackend
from caffelite.backends.cuda.emulator import EmulatorDriver
from caffelite.backends.cuda.uploads import CudaUploads, Ring
from caffelite.errors import BackendError

SIZE = 100


class Rig:
    """An emulated device with page-locked memory, a destination for it, and two events: `after`, recorded, and `done`."""

    def __init__(self) -> None:
        self.driver = EmulatorDriver("fast")
        self.source, self.target = self.driver.pinned(SIZE), self.driver.allocate(SIZE)
        self.source[:] = np.arange(SIZE)
        self.after, self.done = self.driver.event(), self.driver.event()
        self.driver.record(self.after)

    def upload(self) -> None:
        self.driver.upload(self.source, self.target, self.after, self.done)

    def arrived(self) -> bool:
        return self.driver.to_host(self.target).tolist() == list(range(SIZE))


@pytest.fixture
def rig() -> Rig:
    return Rig()


def emulated(driver: EmulatorDriver) -> Any:
    """The cuda backend on a driver of one's own."""
    backend = CudaBackend.__new__(CudaBackend)
    super(CudaBackend, backend).__init__(driver)
    return backend


def test_an_upload_arrives_when_it_is_waited_for(rig: Rig) -> None:
    rig.upload()
    rig.driver.wait(rig.done)
    assert rig.arrived()


def test_waiting_on_the_host_makes_uploads_in_their_order(rig: Rig) -> None:
    rig.upload()
    other, done = rig.driver.allocate(SIZE), rig.driver.event()
    rig.driver.upload(rig.source, other, rig.after, done)
    done.synchronize()
    assert rig.arrived()


def use_of_a_kernel(rig: Rig) -> None:
    emulated(rig.driver).fill(rig.target, 3)


@pytest.mark.parametrize(
    "use",
    [
        lambda rig: rig.driver.to_host(rig.target),
        lambda rig: rig.driver.from_host(np.zeros(SIZE, np.uint8), rig.target),
        lambda rig: rig.driver.send(rig.source, rig.target),
        use_of_a_kernel,
    ],
    ids=["to_host", "from_host", "send", "kernel"],
)
def test_memory_is_not_used_before_its_upload_was_waited_for(rig: Rig, use: Any) -> None:
    rig.upload()
    with pytest.raises(BackendError, match="memory was used before the upload into it was waited for"):
        use(rig)


def test_a_source_does_not_change_while_it_travels(rig: Rig) -> None:
    rig.upload()
    rig.source[3] += 1
    with pytest.raises(BackendError, match="page-locked memory was changed before a copy out of it was waited for"):
        rig.driver.wait(rig.done)


def test_that_ops_wait_for_an_upload_is_no_leave_to_change_its_source(rig: Rig) -> None:
    for wait in (rig.done.synchronize, rig.driver.synchronize):
        rig.driver.record(rig.after)
        rig.upload()
        rig.driver.wait(rig.done)
        rig.source[3] += 1
        with pytest.raises(BackendError, match="page-locked memory was changed"):
            wait()
        rig.driver._traffic._sources.clear()
    rig.driver.record(rig.after)
    rig.upload()
    rig.driver.wait(rig.done)
    rig.done.synchronize()
    rig.source[3] += 1
    rig.driver.synchronize()


def test_an_upload_waits_for_those_who_use_its_destination(rig: Rig) -> None:
    rig.upload()
    rig.driver.wait(rig.done)
    rig.driver.to_host(rig.target)
    with pytest.raises(BackendError, match="an upload would overwrite what was used later than the event that it waits for"):
        rig.upload()
    rig.driver.record(rig.after)
    rig.upload()


def test_a_copy_that_nobody_waits_for_needs_page_locked_memory(rig: Rig) -> None:
    with pytest.raises(BackendError, match="needs page-locked memory"):
        rig.driver.upload(np.zeros(SIZE, np.uint8), rig.target, rig.after, rig.done)
    with pytest.raises(BackendError, match="needs page-locked memory"):
        rig.driver.send(np.zeros(SIZE, np.uint8), rig.target)


@pytest.mark.parametrize("wait", [lambda rig: rig.after.synchronize(), lambda rig: rig.driver.synchronize(), lambda rig: rig.driver.to_host(rig.target)])
def test_a_source_of_a_copy_in_order_does_not_change_either(rig: Rig, wait: Any) -> None:
    rig.driver.send(rig.source, rig.target)
    rig.driver.record(rig.after)
    rig.source[3] += 1
    with pytest.raises(BackendError, match="page-locked memory was changed"):
        wait(rig)


def test_a_source_may_change_once_a_later_event_has_happened(rig: Rig) -> None:
    rig.driver.send(rig.source, rig.target)
    rig.driver.record(rig.after)
    rig.after.synchronize()
    rig.source[3] += 1
    rig.driver.synchronize()


# --- the two users -----------------------------------------------------------------------------------------------------


def test_blocks_arrive_in_order_with_one_on_its_way() -> None:
    driver = EmulatorDriver("fast")
    uploads = CudaUploads(driver, SIZE)
    blocks = [uploads.block() for _ in range(3)]
    blocks[0][:] = 0
    settle = [uploads.send(blocks[0])]
    for i in range(1, 9):
        received = uploads.receive()
        block = blocks[i % 3]
        if i >= 3:
            settle[i - 3]()
        block[:] = i
        settle.append(uploads.send(block))
        assert set(driver.to_host(received).tolist()) == {i - 1}
    uploads.close()


def test_blocks_are_sent_and_received_in_turn() -> None:
    uploads = CudaUploads(EmulatorDriver("fast"), SIZE)
    with pytest.raises(RuntimeError, match="receive\\(\\) before send\\(\\)"):
        uploads.receive()
    uploads.send(uploads.block())
    with pytest.raises(RuntimeError, match="send\\(\\) twice without receive\\(\\)"):
        uploads.send(uploads.block())


def test_a_forgotten_upload_is_waited_for() -> None:
    driver = EmulatorDriver("fast")
    uploads = CudaUploads(driver, SIZE)
    uploads.send(uploads.block())
    assert driver._traffic._uploads
    del uploads
    assert not driver._traffic._uploads


def test_small_arrays_do_not_wait_and_arrive(rng: np.random.Generator) -> None:
    """More of them than the ring holds, of many sizes, types and layouts; the emulator would see a source change too early."""
    backend = emulated(EmulatorDriver("fast"))
    backend._ring = Ring(backend.driver, 1 << 12)
    waited: list[int] = []
    plain = backend.driver.from_host
    backend.driver.from_host = lambda values, x: (waited.append(x.size), plain(values, x))
    made = []
    for size in rng.integers(1, 30, 200):
        values = rng.standard_normal((size, 3, 2, 2)).astype(np.float32)
        x = backend.empty(values.shape, "float32")
        backend.from_host(values, x)
        made.append((values, x))
    for got, (values, _) in zip([backend.to_host(x) for _, x in made], made):  # what has come is not overwritten by what comes
        np.testing.assert_array_equal(got, values)
    assert waited == []
    large = backend.empty((2000,), "float32")
    backend.from_host(np.ones(2000), large)
    assert waited == [2000]
    assert backend.to_host(large).all()
    backend.from_host(np.zeros((0, 3)), backend.empty((0, 3), "float32"))


def send_nine(ring: Ring, driver: EmulatorDriver, target: Any) -> list[int]:
    """Sends nine parts of half of a half through a ring; what the target holds in the end."""
    for i in range(9):
        part = ring.take(64)
        part[:] = i
        driver.send(part, target)
    return sorted(set(driver.to_host(target).tolist()))


def test_a_half_of_the_ring_is_not_filled_again_too_early() -> None:
    """Without the wait between, the emulator sees the source change."""
    driver = EmulatorDriver("fast")
    target = driver.allocate(64)
    assert send_nine(Ring(driver, 128), driver, target) == [8]
    careless = Ring(driver, 128)
    careless.take(64)
    for event in careless._left:
        event.synchronize = lambda: None
    with pytest.raises(BackendError, match="page-locked memory was changed"):
        send_nine(careless, driver, target)


def test_what_lay_in_new_memory_before_is_forgotten(rig: Rig) -> None:
    rig.upload()
    rig.driver.wait(rig.done)
    assert rig.arrived()  # a later use than `after`
    with pytest.raises(BackendError, match="an upload would overwrite"):
        rig.upload()
    rig.driver._traffic.allocated((rig.target.address, SIZE))
    rig.upload()
