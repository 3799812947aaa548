"""Images that the backend transforms: the same batches, order, errors and positions as those transformed on the host, cached or not."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from data_samples import fail, numbered, raw, source_of, write_lmdb

from caffelite import backends
from caffelite.backends.numpy import NumpyBackend
from caffelite.data.source import BatchSource
from caffelite.errors import BackendError, DataError, SpecError
from caffelite.net import Net
from caffelite.schema import array_to_blob, message_bytes, net_from_text, pb

RANDOM = {"crop_size": 6, "mirror": True, "mean_value": [10.5, 20.25, 30.125], "scale": 0.0173}
WARPED = {**RANDOM, "rotation": 40, "min_zoom": 0.7, "max_zoom": 1.5, "lighting": 0.2}
DEVICE = pb.DataParameter.DEVICE


class RawNumpy(NumpyBackend):
    """The reference of the backends that transform images themselves."""

    raw_images = True


@pytest.fixture(params=["numpy", "cuda"])
def ops(request: pytest.FixtureRequest) -> Any:
    """Backends that take raw images."""
    return RawNumpy() if request.param == "numpy" else request.getfixturevalue("cuda")


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Any]:
    """Makes sources of one database, and closes them."""
    made = []

    def make(path: Path, batch: int = 4, **options: Any) -> BatchSource:
        made.append(source_of(path, batch, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def loaded(source: BatchSource, ops: Any, count: int, dtype: str = "float32", labelled: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The next `count` batches through the backend."""
    size = source.param.batch_size
    data, labels = [], []
    for _ in range(count):
        images, numbers = ops.empty((size, *source.item_shape), dtype), ops.empty((size,), "float32")
        ops.fill(images, -7)
        source.load(ops, size, dtype, images, numbers if labelled else None)
        data.append(ops.to_host(images))
        labels.append(ops.to_host(numbers))
    return np.concatenate(data), np.concatenate(labels)


def taken(source: BatchSource, count: int, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """The same, transformed on the host."""
    return loaded(source, NumpyBackend(), count, dtype)


def with_mean(folder: Path, shape: tuple[int, int, int]) -> str:
    blob = pb.BlobProto()
    array_to_blob(np.random.default_rng(3).uniform(0, 255, (1, *shape)).astype(np.float32), blob)
    (folder / "mean.binaryproto").write_bytes(message_bytes(blob))
    return str(folder / "mean.binaryproto")


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["plain", "random", "mean file", "one mean, in order", "test phase", "lighting", "warped", "warped, mean file"])
def test_batches_are_the_hosts_to_the_bit(tmp_path: Path, source: Any, ops: Any, kind: str, dtype: str, cache: bool) -> None:
    path, _ = numbered(tmp_path / "db", 11)
    transform: dict[str, Any] = {} if kind == "plain" else dict(WARPED if "warped" in kind else RANDOM)
    if kind == "lighting":
        transform["lighting"] = 0.3
    if "mean file" in kind:
        del transform["mean_value"]
        transform["mean_file"] = with_mean(tmp_path, (3, 8, 10))
    elif kind == "one mean, in order":
        transform["mean_value"] = [99.0]
    options = {"transform": transform, "shuffle": kind != "one mean, in order", "phase": pb.TEST if kind == "test phase" else pb.TRAIN}
    want, labels = taken(source(path, **options), 7, dtype)
    subject = source(path, **options, **({"cache": DEVICE} if cache else {}))
    got, numbers = loaded(subject, ops, 7, dtype)
    assert subject._raw is not None
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(numbers, labels)
    assert subject.position == 28


def test_bfloat16_is_the_rounded_float32(tmp_path: Path, source: Any, ops: Any) -> None:
    path, _ = numbered(tmp_path / "db", 5)
    want = loaded(source(path, transform=RANDOM), ops, 2)[0].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(loaded(source(path, transform=RANDOM), ops, 2, "bfloat16")[0], want)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("prefetch", [1, 4])
@pytest.mark.parametrize("transform", [RANDOM, WARPED], ids=["random", "warped"])
def test_seek_goes_on_exactly_as_an_uninterrupted_run(tmp_path: Path, source: Any, ops: Any, transform: dict[str, Any], prefetch: int, cache: bool) -> None:
    path, _ = numbered(tmp_path / "db", 10)
    options = {"transform": transform, "shuffle": True, "prefetch": prefetch, **({"cache": DEVICE} if cache else {})}
    data, labels = loaded(source(path, **options), ops, 9)
    subject = source(path, **options)
    for position in (0, 4, 12, 24, 8):  # back too, with batches on their way
        subject.seek(position)
        again, numbers = loaded(subject, ops, 3)
        np.testing.assert_array_equal(again, data[position : position + 12])
        np.testing.assert_array_equal(numbers, labels[position : position + 12])


def test_a_late_seed_counts_and_close_may_be_followed_by_more(tmp_path: Path, source: Any, ops: Any) -> None:
    path, _ = numbered(tmp_path / "db", 10)
    want = taken(source(path, transform=RANDOM, seed=4), 4)[0]
    subject = source(path, transform=RANDOM, seed=3)
    loaded(subject, ops, 1)
    subject.seed = 4
    np.testing.assert_array_equal(loaded(subject, ops, 2)[0], want[4:12])
    subject.close()
    np.testing.assert_array_equal(loaded(subject, ops, 1)[0], want[12:])


def test_other_batch_sizes_and_backends_in_turn(tmp_path: Path, source: Any, ops: Any) -> None:
    path, images = numbered(tmp_path / "db", 10)
    subject = source(path)
    np.testing.assert_array_equal(loaded(subject, ops, 1)[0], images[:4])
    subject.param.batch_size = 3
    np.testing.assert_array_equal(loaded(subject, ops, 1, labelled=False)[0], images[4:7])
    np.testing.assert_array_equal(taken(subject, 1)[0], images[7:10])


def test_the_next_batch_is_on_its_way_while_one_is_used(tmp_path: Path, source: Any, ops: Any) -> None:
    path, _ = numbered(tmp_path / "db", 10)
    subject = source(path)
    loaded(subject, ops, 1)
    state = subject._prefetcher._state
    with state.changed:
        assert state.changed.wait_for(lambda: len(state.ready) >= 2, 10)
    loaded(subject, ops, 1)
    assert len(subject._raw._coming) == 1


def test_nobody_need_look_at_a_batch_before_the_next(tmp_path: Path, source: Any, ops: Any) -> None:
    """Without a look, nothing waits for the device but what must: the emulator sees memory that is filled again too early."""
    path, _ = numbered(tmp_path / "db", 10)
    want = taken(source(path, transform=RANDOM), 9)[0]
    subject, images = source(path, transform=RANDOM), ops.empty((4, 3, 6, 6), "float32")
    for _ in range(9):
        subject.load(ops, 4, "float32", images, None)
    np.testing.assert_array_equal(ops.to_host(images), want[-4:])


def test_a_batch_of_other_images_is_transformed_on_the_host(tmp_path: Path, source: Any, ops: Any) -> None:
    """Images of another size, and of floats, beside 8-bit ones of the first record's size."""
    rng = np.random.default_rng(5)
    records = [raw(rng.integers(0, 256, (3, 8, 10)).astype(np.uint8), i) for i in range(12)]
    records[5] = raw(rng.integers(0, 256, (3, 9, 12)).astype(np.uint8), 5)
    records[9] = pb.Datum(channels=3, height=8, width=10, float_data=rng.uniform(0, 255, 240), label=9).SerializeToString()
    path = write_lmdb(tmp_path / "db", records)
    for dtype in ("float32", "bfloat16"):
        want, labels = taken(source(path, transform=RANDOM), 8, dtype)
        got, numbers = loaded(source(path, transform=RANDOM), ops, 8, dtype)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(numbers, labels)


def test_float_records_are_transformed_on_the_host(tmp_path: Path, source: Any, ops: Any) -> None:
    records = [pb.Datum(channels=1, height=2, width=2, float_data=[i, 1, 2, 3.5], label=i).SerializeToString() for i in range(5)]
    subject = source(write_lmdb(tmp_path / "db", records))
    data, labels = loaded(subject, ops, 2)
    assert subject._raw is None
    assert data[:, 0, 0, 0].tolist() == labels.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (b"garbage", "is not a Datum"),
        (raw(np.zeros((3, 8, 9), np.uint8)), "it is 8x9, the first record is 8x10"),
        (raw(np.zeros((3, 8, 10), np.uint8), 2**30), "label 1073741824 is outside"),
    ],
)
def test_a_bad_record_names_database_and_key_at_the_batch_that_holds_it(tmp_path: Path, source: Any, ops: Any, bad: bytes, text: str) -> None:
    good = raw(np.zeros((3, 8, 10), np.uint8), 1)
    path = write_lmdb(tmp_path / "db", [*[good] * 9, bad, good])
    subject = source(path)
    loaded(subject, ops, 2)
    for _ in range(2):
        with pytest.raises(DataError, match=text) as caught:
            loaded(subject, ops, 1)
        assert str(caught.value).startswith(f"{path}: record '00000009': ")
        assert subject.position == 8
    subject.seek(0)
    loaded(subject, ops, 2)


# --- cache: DEVICE -----------------------------------------------------------------------------------------------------


def test_a_cache_is_held_once_told_once_and_let_go(tmp_path: Path, source: Any, ops: Any) -> None:
    path, images = numbered(tmp_path / "db", 10)
    first, second = source(path, cache=DEVICE), source(path, 3, cache=DEVICE, phase=pb.TEST)
    told: list[str] = []
    first.tell = second.tell = told.append
    np.testing.assert_array_equal(loaded(first, ops, 1)[0], images[:4])
    np.testing.assert_array_equal(loaded(second, ops, 1)[0], images[:3])
    assert told == [f"cache: DEVICE holds 0.0 MB for the 10 images (3x8x10) of {path} in the GPU's memory"]
    assert first._cache is second._cache
    assert (first._cache.image, first._cache.planes.shape, first._cache.labels.tolist()) == ((3, 8, 10), (30, 8, 10), list(range(10)))
    held = weakref.ref(first._cache)
    first.close()
    np.testing.assert_array_equal(loaded(second, ops, 1)[0], images[3:6])
    second.close()
    gc.collect()
    assert held() is None


def test_a_cache_loaded_piece_by_piece(tmp_path: Path, source: Any, ops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("caffelite.data.cache._CHUNK", 3 * 240 + 1)
    path, images = numbered(tmp_path / "db", 10)
    np.testing.assert_array_equal(loaded(source(path, 10, cache=DEVICE), ops, 1)[0], images)


def test_a_cache_needs_a_device(tmp_path: Path, source: Any) -> None:
    path, _ = numbered(tmp_path / "db", 4)
    with pytest.raises(SpecError) as caught:
        taken(source(path, cache=DEVICE), 1)
    assert str(caught.value) == (
        "data_param.cache: cache: DEVICE keeps images in a GPU's memory, and this runs on a CPU\n  train with --gpu 0, or remove cache: DEVICE"
    )


def test_a_cache_that_does_not_fit(tmp_path: Path, source: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ops = RawNumpy()
    path, _ = numbered(tmp_path / "db", 4)

    def refuse(nbytes: int) -> None:
        raise BackendError(f"out of memory: {nbytes} bytes")

    monkeypatch.setattr(ops, "allocate", refuse)
    subject = source(path, cache=DEVICE)
    with pytest.raises(BackendError) as caught:
        subject.load(ops, 4, "float32", np.zeros((4, 3, 8, 10), np.float32), None)
    wanted = f"cache: DEVICE needs 0.0 MB for the 4 images (3x8x10) of {path}: out of memory: 960 bytes\n  remove cache: DEVICE; images then travel"
    assert str(caught.value).startswith(wanted)


@pytest.mark.parametrize(
    ("bad", "kind", "text"),
    [
        (
            raw(np.zeros((3, 9, 12), np.uint8)),
            SpecError,
            "'00000002' of {path} is an 8-bit image of 3x9x12; cache: DEVICE takes 8-bit images of one size",
        ),
        (pb.Datum(channels=3, height=8, width=10, float_data=[1.0] * 240).SerializeToString(), SpecError, "is a float image of 3x8x10; cache: DEVICE takes"),
        (b"garbage", DataError, "{path}: record '00000002': "),
    ],
)
def test_a_record_that_cannot_be_cached(tmp_path: Path, source: Any, ops: Any, bad: bytes, kind: type, text: str) -> None:
    good = raw(np.zeros((3, 8, 10), np.uint8), 1)
    path = write_lmdb(tmp_path / "db", [good, good, bad])
    with pytest.raises(kind) as caught:
        loaded(source(path, 2, cache=DEVICE, transform={"crop_size": 5}), ops, 1)
    assert text.format(path=path) in str(caught.value)
    assert kind is not SpecError or str(caught.value).startswith(fail("", "data_param", "cache").message)


# --- memory ------------------------------------------------------------------------------------------------------------


class Held:
    """Memory that one can watch go."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory


@pytest.mark.parametrize("cache", [False, True])
def test_close_lets_all_memory_go(tmp_path: Path, source: Any, cuda: Any, monkeypatch: pytest.MonkeyPatch, cache: bool) -> None:
    held: list[weakref.ref[Any]] = []
    allocate, pinned = cuda.driver.allocate, cuda.driver.pinned

    def watched_allocate(nbytes: int) -> Any:
        array = allocate(nbytes)
        array.memory = Held(array.memory)
        held.append(weakref.ref(array.memory))
        return array

    def watched_pinned(nbytes: int) -> Any:
        memory = pinned(nbytes)
        held.append(weakref.ref(memory))
        return memory

    path, _ = numbered(tmp_path / "db", 10)
    images = cuda.empty((4, 3, 6, 6), "float32")
    cuda.from_host(np.zeros((4, 3, 6, 6)), images)  # what the backend keeps for all is there
    monkeypatch.setattr(cuda.driver, "allocate", watched_allocate)
    monkeypatch.setattr(cuda.driver, "pinned", watched_pinned)
    subject = source(path, transform=RANDOM, **({"cache": DEVICE} if cache else {}))
    for _ in range(3):
        subject.load(cuda, 4, "float32", images, None)
    assert len(held) == 2 + 1 + cache + 4 + 2  # staging, mean, cache; page-locked: prefetch, and two on their way
    subject.close()
    gc.collect()
    assert [reference for reference in held if reference() is not None] == []


def test_a_layer_in_a_net_names_the_field(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 4)
    text = f'layer {{ name: "d" type: "Data" top: "data"\n  data_param {{ source: "{path}" backend: LMDB batch_size: 4 cache: DEVICE }} }}'
    net = Net(net_from_text(text, "net.prototxt"), phase=pb.TRAIN, backend=backends.get("numpy"))
    with pytest.raises(SpecError, match=r"net\.prototxt:2:\d+: layer 'd': cache: DEVICE keeps images"):
        net.forward()
    net.close()
