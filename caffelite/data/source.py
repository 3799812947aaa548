"""BatchSource: what a Data layer reads. Batches of transformed images in a defined order, prepared ahead in a thread."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from caffelite.data.datum import DatumDecoder
from caffelite.data.lmdb_source import Database, data_file
from caffelite.data.order import Order, words_at
from caffelite.data.prefetch import Prefetcher
from caffelite.data.transformer import Fail, ItemError, Transformer
from caffelite.errors import DataError, Where
from caffelite.schema import pb

MOST_PREFETCH = 1000  # batches; each has memory of its own


class Batch:
    """Memory for one batch: data (N,H,W,C) in the wanted type and labels (N)."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self.data: npt.NDArray[Any] = np.zeros(shape, dtype)
        self.labels = np.zeros(shape[0], np.float32)


class BatchSource:
    """Transformed batches of an LMDB, as data_param and transform_param ask.

    seed and stream key all random draws; fail(message, *path, hint=) makes SpecErrors placed at a field of the layer. The database is
    opened when first asked about. Set `seed` and seek() at any time between batches; start() before next().
    """

    def __init__(self, data: pb.DataParameter, transform: pb.TransformationParameter, phase: int, seed: int, stream: int, fail: Fail) -> None:
        _check_fields(data, fail)
        self.param, self._seed, self.stream, self._fail = data, seed, stream, fail
        self.transformer = Transformer(transform, phase == pb.TRAIN, fail)
        self._position = 0
        self._batch, self._dtype = 0, "float32"
        self._database: Database | None = None
        self._item_shape: tuple[int, int, int] | None = None
        self._prefetcher: Prefetcher[Batch] | None = None

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
        """(C,H,W) of a transformed image, from the first record. Errors as for `database`; SpecError when the transform does not fit it."""
        if self._item_shape is None:
            self._item_shape = self.transformer.output_shape(self._first_shape())
        return self._item_shape

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
                    sizes = " and ".join("x".join(map(str, shape[1:])) for shape in (first, other))
                    text = key.decode("utf-8", "backslashreplace")
                    hint = "give the layer a crop_size, or convert the images again with --resize"
                    message = f"record '{text}': the images are not all of one size: {sizes} are among them (height x width)"
                    raise self._at_source(DataError(message, where=Where(self.param.source), hint=hint))

    def _first_shape(self) -> tuple[int, ...]:
        with closing(self.database.reader()) as reader:
            key, value = next(reader.read([0], ordered=True))
            try:
                return DatumDecoder(self.transformer.channels)(value).pixels.shape
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

    def start(self, batch: int, dtype: str = "float32") -> None:
        """Says what next() will be asked for: batches of `batch` images in "float32" or "bfloat16". Reading ahead begins."""
        if (batch, dtype) != (self._batch, self._dtype):
            self._stop()
            self._batch, self._dtype = batch, dtype
        self._run()

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
        try:
            batch = prefetcher.get()
        except BaseException:
            self._stop()
            raise
        use(batch.data.transpose(0, 3, 1, 2), batch.labels)
        self._position += len(batch.labels)
        prefetcher.put_back(batch)

    def close(self) -> None:
        """Ends the thread and closes the database; it may be used again after, from the same position."""
        self._stop()
        if self._database is not None:
            self._database.close()
            self._database = None

    def _run(self) -> Prefetcher[Batch]:
        if self._prefetcher is None:
            if not self._batch:
                raise ValueError("BatchSource.start() was not called")
            channels, height, width = self.item_shape
            slots = [Batch((self._batch, height, width, channels), _dtype(self._dtype)) for _ in range(self.param.prefetch)]
            order = Order(self.count, self.param.shuffle, self.seed, self.stream)
            feed = _Feed(self.database, order, self.transformer, self._position)
            self._prefetcher = Prefetcher(feed.fill, slots, f"data {self.param.source}")
        return self._prefetcher

    def _stop(self) -> None:
        if self._prefetcher is not None:
            self._prefetcher.close()
            self._prefetcher = None


class _Feed:
    """Fills batches one after another from a position on; runs in the prefetch thread."""

    def __init__(self, database: Database, order: Order, transformer: Transformer, position: int) -> None:
        self.database, self.order, self.transformer = database, order, transformer
        self.position = position
        self._reader = database.reader()
        self._decode = DatumDecoder(transformer.channels)
        self._floats: npt.NDArray[np.float32] = np.empty(0, np.float32)

    def fill(self, batch: Batch) -> None:
        """Fills one batch and moves on behind it."""
        order, count = self.order, len(batch.labels)
        items, keys = [], []
        for i, (key, value) in enumerate(self._reader.read(order.numbers(self.position, count), not order.shuffle)):
            try:
                pixels, batch.labels[i] = self._decode(value)
            except DataError as error:
                raise placed(error, self.database.path, key) from error
            items.append(pixels)
            keys.append(key)
        floats = self._scratch(batch)
        try:
            self.transformer.apply(items, words_at(order.seed, order.stream, self.position, count), floats)
        except ItemError as error:
            raise placed(error, self.database.path, keys[error.index]) from error
        if floats is not batch.data:
            batch.data[...] = floats
        self.position += count

    def _scratch(self, batch: Batch) -> npt.NDArray[np.float32]:
        """Where float32 values are made: the batch itself, or memory of our own for another type."""
        if batch.data.dtype == np.float32:
            return batch.data
        if self._floats.shape != batch.data.shape:
            self._floats = np.empty(batch.data.shape, np.float32)
        return self._floats


def placed(error: DataError, source: str, key: bytes) -> DataError:
    """The error of one record with its database and key."""
    text = key.decode("utf-8", "backslashreplace")
    return DataError(f"record '{text}': {error.message}", where=Where(source), hint=error.hint)


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
