"""Conversion never leaves a half-written database: bad images, kills, full disks, existing names."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_samples import photo, save_image

from caffelite.data.convert import convert_dataset
from caffelite.data.lmdb_source import Database
from caffelite.errors import DataError

ROOT = Path(__file__).parents[1]


def images(folder: Path, count: int, size: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for i in range(count):
        save_image(folder / "a" / f"{i}.png", rng.integers(0, 256, (size, size, 3), np.uint8))
    return folder


def count_of(path: Path) -> int:
    with Database(path) as database:
        return database.count


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    source = images(tmp_path / "src", 3)
    whole = save_image(source / "a" / "cut.jpg", photo(64, 64), quality=95)
    whole.write_bytes(whole.read_bytes()[:700])
    (source / "a" / "junk.jpg").write_bytes(b"no image")
    (source / "a" / "zero.png").write_bytes(b"")
    return source


@pytest.mark.parametrize("threads", [1, 2])
def test_unreadable_images_are_listed_and_nothing_is_written(damaged: Path, tmp_path: Path, threads: int) -> None:
    if threads > 1:
        images(damaged, 300)
    with pytest.raises(DataError) as caught:
        convert_dataset("imagefolder", damaged, tmp_path / "db", threads=threads)
    text = str(caught.value)
    assert "3 image(s) cannot be used" in text
    assert all(f"{damaged / 'a' / name}: not a readable image" in text for name in ("cut.jpg", "junk.jpg", "zero.png"))
    assert "--allow-bad" in text
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_allowed_bad_images_leave_gaps_in_the_keys(damaged: Path, tmp_path: Path) -> None:
    report = convert_dataset("imagefolder", damaged, tmp_path / "db", allow_bad=True)
    assert (report.count, len(report.bad)) == (3, 3)
    assert {Path(path).name for path, _ in report.bad} == {"cut.jpg", "junk.jpg", "zero.png"}
    with Database(tmp_path / "db") as database:
        reader = database.reader()
        assert [key for key, _ in reader.read(range(3), ordered=True)] == [b"00000000_a/0.png", b"00000001_a/1.png", b"00000002_a/2.png"]
        reader.close()


@pytest.mark.parametrize("name", ["wnids.txt", "words.txt", "val/val_annotations.txt"])
def test_text_files_that_are_none_are_named(tmp_path: Path, name: str) -> None:
    save_image(tmp_path / "src/train/n1/images/a.png", photo())
    (tmp_path / "src/val").mkdir()
    (tmp_path / "src" / name).write_bytes(b"n1\n\xe9\xff\n")
    with pytest.raises(DataError) as caught:
        convert_dataset("tiny-imagenet", tmp_path / "src", tmp_path / "db")
    assert str(caught.value).startswith(f"{tmp_path}/src/{name}: this is no text in UTF-8 (byte 3 is 0xe9)\n  expected ")


def test_a_folder_that_cannot_be_read_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, scan = images(tmp_path / "src", 1), os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("/locked"):
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    (source / "a" / "locked").mkdir()
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="a/locked: this folder cannot be read: Permission denied"):
        convert_dataset("imagefolder", source, tmp_path / "db")


def test_only_bad_images_are_no_database_even_when_allowed(tmp_path: Path) -> None:
    (tmp_path / "src/a").mkdir(parents=True)
    (tmp_path / "src/a/x.png").write_bytes(b"junk")
    with pytest.raises(DataError, match="no image to write"):
        convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", allow_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_names_too_long_for_a_key_are_bad_images(tmp_path: Path) -> None:
    deep = tmp_path / "src" / "a" / ("d" * 200) / ("e" * 200) / ("f" * 200)
    save_image(deep / "x.png", photo())
    with pytest.raises(DataError, match="its name is too long"):
        convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db")


def test_an_existing_database_is_kept_unless_forced(tmp_path: Path) -> None:
    images(tmp_path / "src", 3)
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db")
    images(tmp_path / "src", 5)
    with pytest.raises(DataError, match="it exists already") as caught:
        convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db")
    assert "--force" in str(caught.value)
    assert count_of(tmp_path / "db") == 3
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", force=True)
    assert count_of(tmp_path / "db") == 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "db.labels.txt", "src"]


def test_force_never_replaces_what_is_no_database(tmp_path: Path) -> None:
    images(tmp_path / "src", 1)
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "thesis.txt").write_text("years of work")
    with pytest.raises(DataError, match="is not a database"):
        convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", force=True)
    assert (tmp_path / "db" / "thesis.txt").read_text() == "years of work"


def run_convert(source: Path, target: Path, before: str = "", progress: str = "None") -> subprocess.CompletedProcess[str]:
    code = (
        f"{before}\nfrom caffelite.data.convert import convert_dataset\nconvert_dataset('imagefolder', {str(source)!r}, {str(target)!r}, progress={progress})"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_a_killed_conversion_leaves_no_database_and_the_next_one_cleans_up(tmp_path: Path) -> None:
    images(tmp_path / "src", 1100)
    run = run_convert(tmp_path / "src", tmp_path / "db", "import os", "lambda done, total: done > 1050 and os.kill(os.getpid(), 9)")
    assert run.returncode == -signal.SIGKILL
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2
    assert left[0].startswith("db.partial-")
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db")
    assert count_of(tmp_path / "db") == 1100
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "db.labels.txt", "src"]


def test_a_kill_while_the_database_is_put_in_place_leaves_a_whole_one(tmp_path: Path) -> None:
    images(tmp_path / "src", 3)
    before = "import os, pathlib; pathlib.Path.unlink = lambda self, missing_ok=False: os.kill(os.getpid(), 9)"  # the step after the rename
    run = run_convert(tmp_path / "src", tmp_path / "db", before)
    assert run.returncode == -signal.SIGKILL
    assert count_of(tmp_path / "db") == 3
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db", force=True)
    assert sorted(path.name for path in (tmp_path / "db").iterdir()) == ["data.mdb", "lock.mdb"]


def test_partial_folders_in_use_or_of_others_are_left_alone(tmp_path: Path) -> None:
    images(tmp_path / "src", 2)
    (tmp_path / "db.partial-1").mkdir()
    busy = os.open(tmp_path / "db.partial-1" / "owner.lock", os.O_CREAT | os.O_RDWR)
    fcntl.flock(busy, fcntl.LOCK_EX)
    (tmp_path / "db.partial-notes").mkdir()
    convert_dataset("imagefolder", tmp_path / "src", tmp_path / "db")
    os.close(busy)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["db", "db.labels.txt", "db.partial-1", "db.partial-notes", "src"]


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    images(tmp_path / "src", 120, size=100)  # 3.6 MB of pixels
    limit = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))"
    run = run_convert(tmp_path / "src", tmp_path / "db", limit)
    assert run.returncode == 1
    assert "DataError" in run.stderr.splitlines()[-2]
    assert "cannot be written" in run.stderr
    assert "full" in run.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    images(tmp_path / "src", 1)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cannot be written") as caught:
        convert_dataset("imagefolder", tmp_path / "src", tmp_path / "file" / "db")
    assert "choose a folder you can write to" in str(caught.value)


def test_decoding_processes_end_with_the_program(tmp_path: Path) -> None:
    images(tmp_path / "src", 600)
    code = (
        "import os, signal\nfrom caffelite.data.decoding import Decoder, ImageFile, Settings\n"
        f"decoder = Decoder(Settings(), 2); made = decoder.make([ImageFile({str(tmp_path / 'src/a/0.png')!r}, 'x', 0)] * 1000); next(made)\n"
        "print(*[worker._process.pid for worker in decoder._started], flush=True); os.kill(os.getpid(), 9)"
    )
    # The workers inherit the error stream; it ends when the last of them has ended.
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    assert len(run.stdout.split()) == 2
