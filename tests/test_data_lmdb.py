"""LMDB files: reading in both orders, several users, and every damage as an error."""

from __future__ import annotations

import gc
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest
from data_samples import numbered, write_lmdb

from caffelite.data import lmdb_source
from caffelite.data.lmdb_source import Database, Writer
from caffelite.data.mdb_check import check_mdb
from caffelite.errors import DataError

COUNT = 300


def read_all(path: Path) -> list[tuple[bytes, bytes]]:
    with Database(path) as database:
        reader = database.reader()
        records = [(key, bytes(value)) for key, value in reader.read(range(database.count), ordered=True)]
        reader.close()
    return records


def test_a_folder_that_may_not_be_looked_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not "no LMDB in it". Root may look into all of them, so the system's answer is made up."""
    with pytest.raises(DataError, match="this folder holds no LMDB"):
        Database(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(DataError, match="this folder cannot be read: Permission denied"):
        Database(tmp_path)


def test_reads_what_lmdb_wrote_in_key_order(tmp_path: Path) -> None:
    expected = {f"{i:08d}_x".encode(): os.urandom(i * 37 % 5000) for i in np.random.default_rng(0).permutation(COUNT).tolist()}
    environment = lmdb.open(str(tmp_path), map_size=2**26)
    with environment.begin(write=True) as transaction:
        for key, value in expected.items():
            transaction.put(key, value)
    environment.close()
    assert read_all(tmp_path) == sorted(expected.items())


def test_lmdb_reads_what_we_wrote_beyond_the_first_map(tmp_path: Path) -> None:
    values = [os.urandom(100_000) for _ in range(250)]
    write_lmdb(tmp_path / "db", values)
    with lmdb.open(str(tmp_path / "db"), readonly=True) as environment, environment.begin() as transaction:
        assert [value for _, value in transaction.cursor()] == values


def test_picks_records_by_number_and_walks_from_anywhere(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [b"v%d" % i for i in range(COUNT)])
    with Database(path) as database:
        reader = database.reader()
        for numbers, ordered in (([5, 299, 0, 5], False), ([298, 299, 0, 1], True), ([2, 3], True), ([200, 201], True)):
            assert [(key, bytes(value)) for key, value in reader.read(numbers, ordered)] == [(b"%08d" % i, b"v%d" % i) for i in numbers]
        reader.close()


def test_one_file_serves_several_users_in_a_process(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [b"a", b"b"])
    first, second = Database(path), Database(path)
    first.close()
    first.close()
    reader = second.reader()
    assert [bytes(value) for _, value in reader.read([0, 1], ordered=False)] == [b"a", b"b"]
    reader.close()
    second.close()


def test_the_garbage_collector_may_close_a_forgotten_database_while_another_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (write_lmdb(tmp_path / name, [b"a"]) for name in ("first", "second"))
    forgotten: list[object] = [Database(first)]
    forgotten.append(forgotten)  # only the collector can free a circle
    del forgotten
    opened: list[Database] = []

    def check(file: str, path: str) -> None:
        gc.collect()
        check_mdb(file, path)

    monkeypatch.setattr(lmdb_source, "check_mdb", check)
    thread = threading.Thread(target=lambda: opened.append(Database(second)), daemon=True)  # which would wait for itself for ever
    thread.start()
    thread.join(60)
    assert len(opened) == 1
    status = [os.stat(path / "data.mdb") for path in (first, second)]
    keys = [(each.st_dev, each.st_ino) for each in status]
    assert [key in lmdb_source._open for key in keys] == [False, True]
    opened[0].close()
    assert keys[1] not in lmdb_source._open


def test_another_process_reads_at_the_same_time_without_a_lock_file(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [b"a", b"b"])
    (path / "lock.mdb").unlink()
    with Database(path):
        code = f"from caffelite.data.lmdb_source import Database; print(Database({str(path)!r}).count)"
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert run.stdout == "2\n"
    assert [file.name for file in path.iterdir()] == ["data.mdb"]


def message_of(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_all(path)
    return str(caught.value)


def test_missing_database_names_the_path_and_what_to_do(tmp_path: Path) -> None:
    text = message_of(tmp_path / "none")
    assert text.startswith(f"{tmp_path / 'none'}: no such database")
    assert "caffelite convert" in text


def test_folder_of_databases_lists_them(tmp_path: Path) -> None:
    write_lmdb(tmp_path / "train_lmdb", [b"a"])
    assert "it has train_lmdb inside" in message_of(tmp_path)


def test_leveldb_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "CURRENT").write_text("MANIFEST-000001\n")
    text = message_of(tmp_path)
    assert "this is a LevelDB, expected an LMDB" in text
    assert "convert the images again" in text


@pytest.mark.parametrize("keep", [0, 100, 4096, 8192, 12288, 0.5, 0.999])
def test_a_cut_file_is_an_error_and_no_crash(tmp_path: Path, keep: float) -> None:
    path, _ = numbered(tmp_path / "db", COUNT)
    file = path / "data.mdb"
    size = file.stat().st_size
    os.truncate(file, int(keep if keep >= 1 or keep == 0 else keep * size))
    text = message_of(path)
    assert text.startswith(f"{path}: ")
    assert "cut short" in text or "empty" in text or "not an LMDB" in text


def test_garbage_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(os.urandom(50_000))
    assert "this is not an LMDB database" in message_of(tmp_path)


@pytest.mark.parametrize("size", [30, 3000])
def test_any_scribbled_page_is_an_error_or_harmless_but_no_crash(tmp_path: Path, size: int) -> None:
    path = write_lmdb(tmp_path / "db", [os.urandom(size) for _ in range(COUNT)])
    file = path / "data.mdb"
    whole = file.read_bytes()
    rng = np.random.default_rng(1)
    errors = []
    for page in range(2, len(whole) // 4096):
        damaged = bytearray(whole)
        damaged[page * 4096 : (page + 1) * 4096] = rng.bytes(4096)
        file.write_bytes(damaged)
        try:
            assert len(read_all(path)) == COUNT  # the page held values only
        except DataError as error:
            errors.append(str(error))
    assert len(errors) >= 3  # the root and the leaves at least
    assert all("damaged" in text for text in errors)


def test_flipped_bits_in_the_tree_never_crash(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [os.urandom(200) for _ in range(COUNT)])
    file = path / "data.mdb"
    whole = file.read_bytes()
    rng = np.random.default_rng(2)
    errors = []
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(8192, len(whole), 40):
            damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            read_all(path)
        except DataError as error:
            errors.append(str(error))
    assert errors
    assert all(text.startswith(f"{path}: ") for text in errors)


def pages_of_kind(data: bytes, flag: int) -> list[int]:
    return [page for page in range(2, len(data) // 4096) if struct.unpack_from("<H", data, 4096 * page + 10)[0] == flag]


@pytest.mark.parametrize(
    ("kind", "field", "value", "text"),
    [
        (2, "page number", 1000, "is not what it should be"),
        (2, "upper bound", 5000, "is not what it should be"),
        (2, "lower bound", 14, "is not what it should be"),
        (2, "first offset", 4090, "points outside itself"),
        (2, "value size", 60000, "points outside itself"),
        (2, "key size", 60000, "points outside itself"),
        (1, "child", 60000, "refers to page"),
        (1, "key size", 60000, "points outside itself"),
        (0, "entries", COUNT + 1, f"its header promises {COUNT + 1} records, found {COUNT}"),
    ],
)
def test_every_wrong_field_of_a_page_is_found(tmp_path: Path, kind: int, field: str, value: int, text: str) -> None:
    path = write_lmdb(tmp_path / "db", [os.urandom(30) for _ in range(COUNT)])
    data = bytearray((path / "data.mdb").read_bytes())
    start = 4096 * pages_of_kind(data, kind)[0] if kind else 0
    node = start + struct.unpack_from("<H", data, start + 18)[0]  # the second one: a branch's first has no key
    # mdb.c: MDB_page (number 0, flags 10, lower 12, upper 14, offsets 16), MDB_node (size 0 or child 0, key size 6), MDB_meta (entries of the main table)
    places = {"page number": start, "upper bound": start + 14, "lower bound": start + 12, "first offset": start + 16}
    places |= {"value size": node, "child": node, "key size": node + 6}
    for place in (16 + 24 + 48 + 32, 4096 + 16 + 24 + 48 + 32) if field == "entries" else (places[field],):
        struct.pack_into("<H", data, place, value)
    (path / "data.mdb").write_bytes(data)
    assert text in message_of(path)


def test_values_on_pages_outside_the_file_are_found(tmp_path: Path) -> None:
    path = write_lmdb(tmp_path / "db", [os.urandom(9000) for _ in range(5)])
    data = bytearray((path / "data.mdb").read_bytes())
    start = 4096 * pages_of_kind(data, 2)[0]
    node = start + struct.unpack_from("<H", data, start + 16)[0]
    struct.pack_into("<Q", data, node + 8 + 8, len(data) // 4096 - 1)  # after the node's header and its key of 8 bytes; the value needs three pages
    (path / "data.mdb").write_bytes(data)
    assert "refers to values outside the file" in message_of(path)


def test_keys_that_do_not_grow_are_refused(tmp_path: Path) -> None:
    writer = Writer(str(tmp_path))
    with pytest.raises(DataError, match=r"cannot be written|not in growing order"):
        writer.put([(b"b", b"1"), (b"a", b"2")])
    writer.close()


def test_named_tables_are_not_caffes(tmp_path: Path) -> None:
    with lmdb.open(str(tmp_path), max_dbs=2) as environment, environment.begin(write=True) as transaction:
        transaction.put(b"k", b"v", db=environment.open_db(b"table", txn=transaction))
    assert "tables or duplicates" in message_of(tmp_path)
