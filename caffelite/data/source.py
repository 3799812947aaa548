"""BatchSource: what a Data layer reads. Batches of transformed images in a defined order, prepared ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.backends.contract import Array, Backend
from caffelite.data.cache import DeviceCache, device_cache
from caffelite.data.datum import DatumDecoder, placed, record_name
from caffelite.data.filling import Batch, CachedFiller, Filler
from caffelite.data.images import size_text
from caffelite.data.lmdb_source import Database, data_file
from caffelite.data.order import Order, class_by_class
from caffelite.data.prefetch import Prefetcher
from caffelite.data.raw import RawFeed, RawLayout
from caffelite.data.transformer import Fail, Transformer
from caffelite.errors import DataError, Where
from caffelite.schema import parse_datum, pb

MOST_PREFETCH = 1000  # batches; each has memory of its own
LOOKED_AT = 64  # records at most, to see whether they lie class by class


class BatchSource:
    """Transformed batches of an LMDB, as data_param and transform_param ask.

    seed and stream key all random draws; fail(message, *path, hint=) makes SpecErrors placed at a field of the layer. The database is
    opened when first asked about. Set `seed` and seek() at any time between batches; start() before next(). `tell` is called with what
    a user should hear of.
    """

    def __init__(self, data: pb.DataParameter, transform: pb.TransformationParameter, phase: int, seed: int, stream: int, fail: Fail) -> None:
        _check_fields(data, fail)
        self.param, self._seed, self.stream, self._fail = data, seed, stream, fail
        self.transformer = Transformer(transform, phase == pb.TRAIN, fail)
        self.tell: Callable[[str], object] = _nobody
        self._position = 0
        self._batch, self._dtype = 0, "float32"
        self._ops: Backend | None = None  # which takes raw images; None where batches are transformed here
        self._database: Database | None = None
        self._item_shape: tuple[int, int, int] | None = None
        self._raw_shape: tuple[int, int, int] | None = None
        self._slots: list[Batch] = []
        self._raw: RawFeed | None = None
        self._cache: DeviceCache | None = None
        self._prefetcher: Prefetcher[Any] | None = None

    # --- what it reads -------------------------------------------------------------------------------------------------

    @property
    def database(self) -> Database:
        """The open database. DataError, placed at the layer's `source`, when it is missing, damaged, empty or of another kind."""
        if self._database is None:
            try:
                self._database = _opened(self.param, self._fail)
            except DataError as error:
                raise self._at_source(error) from error
        return self._database

    def _at_source(self, error: DataError) -> DataError:
        """An error of the database, with the layer and the place in the net that name it."""
        place = self._fail(error.message, "data_param", "source")
        return DataError(f"{error.where}: {error.message}", where=place.where, layer=place.layer, hint=error.hint)

    @property
    def is_open(self) -> bool:
        """Whether the database has been opened."""
        return self._database is not None

    @property
    def count(self) -> int:
        """The number of records."""
        return self.database.count

    @property
    def item_shape(self) -> tuple[int, int, int]:
        """(C,H,W) of a transformed image, from the first record. Errors as for `database`; SpecError when the transform does not fit it,
        DataError when the mean cannot be read."""
        if self._item_shape is None:
            pixels = self._first_pixels()
            channels, height, width = pixels.shape
            self._raw_shape = (channels, height, width) if pixels.dtype == np.uint8 else None
            self._item_shape = self.transformer.output_shape(pixels.shape)
        return self._item_shape

    @property
    def raw_shape(self) -> tuple[int, int, int] | None:
        """(C,H,W) of the first record's image once it has been looked at; None before, and where it does not consist of bytes."""
        return self._raw_shape

    def assume(self, image: tuple[int, int, int]) -> tuple[int, int, int]:
        """Takes the images to be (C,H,W) `image` without opening the database, for those who want shapes alone; returns item_shape.

        SpecError when crop_size is larger."""
        self._item_shape = self.transformer.cropped((self.transformer.channels or image[0], *image[1:]))
        return self._item_shape

    def check_sizes(self, most: int = 64) -> None:
        """DataError when images among `most` records, from all over the database, differ in size and no crop_size makes them equal."""
        if self.transformer.crop:
            return
        seen: dict[tuple[int, ...], bytes] = {}
        decode, step = DatumDecoder(self.transformer.channels), max(1, self.count // most)
        with closing(self.database.reader()) as reader:
            for key, value in reader.read(range(0, self.count, step), ordered=False):
                try:
                    seen.setdefault(decode(value).pixels.shape, key)
                except DataError as error:
                    raise self._at_source(placed(error, self.param.source, key)) from error
                if len(seen) > 1:
                    (first, _), (other, _) = seen.items()
                    sizes = " and ".join(size_text(shape[1:]) for shape in (first, other))
                    hint = "give the layer a crop_size, or convert the images again with --resize"
                    found = DataError(f"the images are not all of one size: {sizes} are among them (height x width)", hint=hint)
                    raise self._at_source(placed(found, self.param.source, key))

    def order_note(self) -> str | None:
        """What to say where batches would be of a few classes alone: in the first one, and among LOOKED_AT records from all over the database, the
        classes follow each other, and the batch lacks some of them. None where `shuffle` mixes them, where a batch has no class twice and so shows
        nothing, and for a record that cannot be read, which is told when its turn comes. Errors as for `database`."""
        if self.param.shuffle:
            return None
        try:
            first = self._labels(range(min(self.count, max(self.param.batch_size, 2))))
            spread = self._labels(range(0, self.count, -(-self.count // LOOKED_AT)))
        except DataError:
            return None
        found = set(first)
        if len(found) == len(first) or not (len(found) == 1 or class_by_class(first)) or not class_by_class(spread) or found >= set(spread):
            return None
        return (
            f"the records of {self.param.source} lie class by class, and so a batch holds few of the classes, the first one {len(found)}: "
            "add shuffle: true to data_param, or convert the images again with --shuffle"
        )

    def _labels(self, numbers: range) -> list[int]:
        with closing(self.database.reader()) as reader:
            return [parse_datum(bytes(value)).label for _, value in reader.read(numbers, ordered=numbers.step == 1)]

    def _first_pixels(self) -> npt.NDArray[Any]:
        with closing(self.database.reader()) as reader:
            key, value = next(reader.read([0], ordered=True))
            try:
                return np.array(DatumDecoder(self.transformer.channels)(value).pixels)
            except DataError as error:
                raise self._at_source(placed(error, self.param.source, key)) from error

    # --- where it is ---------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """How many records have been handed out, over all epochs; the next batch begins with this one."""
        return self._position

    def seek(self, position: int) -> None:
        """Goes on at `position`, exactly as a run that reached it would."""
        if position != self._position:
            self._stop()
            self._position = position

    @property
    def seed(self) -> int:
        """The run's seed."""
        return self._seed

    @seed.setter
    def seed(self, value: int) -> None:
        if value != self._seed:
            self._stop()
            self._seed = value

    # --- running -------------------------------------------------------------------------------------------------------

    def start(self, batch: int, dtype: str = "float32", ops: Backend | None = None) -> None:
        """Says what will be asked for: by next() and take(), batches of `batch` images in "float32" or "bfloat16"; by load(), where the
        backend `ops` takes raw images, such batches. Reading ahead begins."""
        if (batch, dtype, ops) != (self._batch, self._dtype, self._ops):
            self._drop()
            self._batch, self._dtype, self._ops = batch, dtype, ops
        self._run()

    def load(self, ops: Backend, batch: int, dtype: str, images: Array, labels: Array | None) -> None:
        """Puts the next batch into arrays of a backend: images (N,C,H,W) of type `dtype`, labels (N) float32. Errors as for `take`, and
        SpecError for `cache: DEVICE` where the backend has no use for it or the images are not all bytes of one size."""
        if not self._goes_raw(ops):
            self.start(batch, dtype)
            self.take(partial(_copy, ops, images, labels))
            return
        self.start(batch, dtype, ops)
        assert self._raw is not None
        with self._stopped_by_errors():
            self._raw.load(self._run(), images, labels)
        self._position += batch

    def _goes_raw(self, ops: Backend) -> bool:
        cached = self.param.cache == pb.DataParameter.DEVICE
        if cached and not ops.raw_images:
            hint = "train with --gpu 0, or remove cache: DEVICE"
            raise self._fail("cache: DEVICE keeps images in a GPU's memory, and this runs on a CPU", "data_param", "cache", hint=hint)
        if ops.raw_images:
            _ = self.item_shape  # has looked at the first record
        return ops.raw_images and (cached or self._raw_shape is not None)

    def next(self, data_out: npt.NDArray[Any], label_out: npt.NDArray[np.float32] | None = None) -> None:
        """Copies the next batch into data_out (N,C,H,W; fastest when channels lie last in memory) and label_out (N). Errors as for `take`."""

        def copy(images: npt.NDArray[Any], labels: npt.NDArray[np.float32]) -> None:
            data_out[...] = images
            if label_out is not None:
                label_out[...] = labels

        self.take(copy)

    def take(self, use: Callable[[npt.NDArray[Any], npt.NDArray[np.float32]], object]) -> None:
        """Hands the next batch to use(images (N,C,H,W) with the channels last in memory, labels (N)); both are reused once it returns.

        After the last record comes the first of the next epoch. DataError for a record that cannot be used, with the database and
        the key; the position stays at the batch that failed.
        """
        prefetcher = self._run()
        with self._stopped_by_errors():
            batch = prefetcher.get()
        use(batch.data.transpose(0, 3, 1, 2), batch.labels)
        self._position += len(batch.labels)
        prefetcher.put_back(batch)

    def record_of_batch(self, index: int) -> str:
        """Names record `index` of the batch handed out last, for an error: its key and the database."""
        order = Order(self.count, self.param.shuffle, self.seed, self.stream)
        with closing(self.database.reader()) as reader:
            key, _ = next(reader.read(order.numbers(self._position - self._batch + index, 1), ordered=False))
        return f"{record_name(key)} of {self.param.source}"

    def close(self) -> None:
        """Ends the thread, lets go of all memory and closes the database; it may be used again after, from the same position."""
        self._drop()
        self._cache = None
        if self._database is not None:
            self._database.close()
            self._database = None

    def _run(self) -> Prefetcher[Any]:
        if self._prefetcher is None:
            if not self._batch:
                raise ValueError("BatchSource.start() was not called")
            order = Order(self.count, self.param.shuffle, self.seed, self.stream)
            fill, slots = self._raw_way(self._ops, order) if self._ops else self._way(order)
            self._prefetcher = Prefetcher(fill, slots, f"data {self.param.source}")
        return self._prefetcher

    def _way(self, order: Order) -> tuple[Callable[[Any], object], list[Any]]:
        """What fills the memory of batches, and that memory, where batches are transformed here."""
        channels, height, width = self.item_shape
        if not self._slots:
            self._slots = [Batch((self._batch, height, width, channels), _dtype(self._dtype)) for _ in range(self.param.prefetch)]
        return Filler(self.database, order, self.transformer, self._position).fill, self._slots

    def _raw_way(self, ops: Backend, order: Order) -> tuple[Callable[[Any], object], list[Any]]:
        """The same where they are transformed by the backend."""
        if self.param.cache == pb.DataParameter.DEVICE:
            self._cache = device_cache(ops, self.database, self.transformer.channels, self._fail, self.tell)
        cache, image = self._cache, self._cache.image if self._cache else self._raw_shape
        if self._raw is None:
            assert image is not None
            layout = RawLayout(self._batch, 0 if cache else self._batch, image, self.transformer.warp.width(image[0]))
            self._raw = RawFeed(ops, layout, self.transformer, self.param.prefetch, cache.planes if cache else None)
        if cache:
            return CachedFiller(cache, order, self.transformer, self._position).fill, self._raw.slots
        return Filler(self.database, order, self.transformer, self._position).fill, self._raw.slots

    @contextmanager
    def _stopped_by_errors(self) -> Iterator[None]:
        """Ends the thread where it has failed, so that the next batch is read anew."""
        try:
            yield
        except BaseException:
            self._stop()
            raise

    def _stop(self) -> None:
        """Ends the thread and forgets what it has read ahead."""
        self._end_thread()
        if self._raw is not None:
            self._raw.reset()

    def _drop(self) -> None:
        """The same, and lets go of the batches' memory."""
        self._end_thread()
        if self._raw is not None:
            self._raw.close()
        self._raw, self._slots = None, []

    def _end_thread(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


def _copy(ops: Backend, images: Array, labels: Array | None, image_values: Array, label_values: Array) -> None:
    ops.from_host(image_values, images)
    if labels is not None:
        ops.from_host(label_values, labels)


def _nobody(text: str) -> None:
    """Nobody listens."""


def _dtype(name: str) -> Any:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _check_fields(data: pb.DataParameter, fail: Fail) -> None:
    if not data.source:
        raise fail("data_param needs a source, the path of an LMDB", "data_param", "source")
    if data.batch_size == 0:
        raise fail("data_param needs a batch_size of at least 1", "data_param", "batch_size")
    if not 1 <= data.prefetch <= MOST_PREFETCH:
        raise fail(f"prefetch is {data.prefetch}, expected 1 to {MOST_PREFETCH} batches", "data_param", "prefetch")
    if data.rand_skip:
        raise fail("rand_skip has no effect on a Data layer", "data_param", "rand_skip", hint="remove it; shuffle: true reads in a new random order each epoch")
    if data.force_encoded_color:
        raise fail("force_encoded_color has no effect", "data_param", "force_encoded_color", hint="use force_color: true in transform_param")


def _opened(data: pb.DataParameter, fail: Fail) -> Database:
    """The database, with a record at least. DataError, placed at the database, when there is none."""
    _check_backend(data, fail)
    database = Database(data.source)
    if database.count == 0:
        database.close()
        raise DataError("the database holds no records", where=Where(data.source), hint="convert the images again")
    return database


def _check_backend(data: pb.DataParameter, fail: Fail) -> None:
    """Caffe's default is LEVELDB; an LMDB whose net leaves the field out is read all the same."""
    if data.backend == pb.DataParameter.LMDB:
        return
    if not data.HasField("backend"):
        data_file(data.source)
        return
    hint = "convert the images again with `caffelite convert`, which writes LMDB, and set backend: LMDB"
    try:
        data_file(data.source)
        hint = "this source is an LMDB: set backend: LMDB"
    except DataError:
        pass
    raise fail("LevelDB databases are not read, only LMDB", "data_param", "backend", hint=hint)
