"""Compiled kernels on disk: kept whole, made again when cut short, swept of what killed processes left; and the one line about compiling."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from cli_harness import said

from caffelite.backends.contract import Backend
from caffelite.backends.cuda import cache, cupy_driver, nvrtc
from caffelite.backends.cuda.emulator import EmulatorDriver
from caffelite.backends.cuda.launch import Module
from caffelite.backends.cuda.memory import MEMORY

NET = """name: "n"
layer { name: "d" type: "DummyData" top: "x" dummy_data_param { shape { dim: 2 dim: 3 } } }
layer { name: "t" type: "TanH" bottom: "x" top: "y" }
"""


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAFFELITE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_what_is_kept_is_made_once(tmp_path: Path) -> None:
    made: list[Path] = []

    def make(path: Path) -> None:
        made.append(path)
        path.write_bytes(b"code")

    told: list[str] = []
    for _ in range(2):
        cache.once(tmp_path / "k.so", make, lambda: told.append("compiling"))
    assert (len(made), told) == (1, ["compiling"])
    assert cache.content(tmp_path / "k.so") == b"code"
    assert [path.name for path in tmp_path.iterdir()] == ["k.so"]


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "gone"])
def test_what_is_not_whole_is_made_again(tmp_path: Path, damage: str) -> None:
    target = tmp_path / "k.so"
    cache.once(target, lambda path: path.write_bytes(b"some code"))
    held = target.read_bytes()
    damaged = {"cut": held[:-1], "empty": b"", "changed": b"S" + held[1:]}
    target.unlink() if damage == "gone" else target.write_bytes(damaged[damage])
    assert cache.content(target) is None
    cache.once(target, lambda path: path.write_bytes(b"some code"))
    assert target.read_bytes() == held


def test_leftovers_of_processes_that_are_gone_are_swept(tmp_path: Path) -> None:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    old = time.time() - 2 * cache.LEFT_OVER
    names = {f"{done.pid}-k.so": old, f"{done.pid}-k.cpp": old, f"{done.pid}-young.so": time.time(), f"{os.getpid()}-own.so": old, "core-fast.o": old}
    for name, when in names.items():
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (when, when))
    cache.once(tmp_path / "new.so", lambda path: path.write_bytes(b"x"))
    assert {path.name for path in tmp_path.iterdir()} == {f"{done.pid}-young.so", f"{os.getpid()}-own.so", "core-fast.o", "new.so"}


def test_a_truncated_library_is_compiled_again(cuda: Backend, kept: Path) -> None:
    """The loader ends the process at the first access beyond the end of the file."""
    EmulatorDriver("fast").load(MEMORY)
    (library,) = (kept / "emulator").glob("memory-*.so")
    whole = library.read_bytes()
    library.unlink()  # not written over: this process has it in memory
    library.write_bytes(whole[: len(whole) // 2])
    script = """
from caffelite.backends.cuda.emulator import EmulatorDriver
from caffelite.backends.cuda.memory import MEMORY
driver = EmulatorDriver("fast")
driver.tell = print
driver.load(MEMORY)
"""
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "memory\n"
    assert cache.content(library) is not None


def test_truncated_machine_code_is_compiled_again(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []

    def compile_cubin(text: str, file: str, architecture: str, names: object, options: object, *, newest: int) -> tuple[bytes, dict[str, str], str]:
        compiled.append(architecture)
        return b"cubin", {"k": "_Z1k"}, ""

    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    monkeypatch.setattr(nvrtc, "version", lambda newest: (13, 0))
    module = Module("memory", ["k"])
    for _ in range(2):
        assert cupy_driver.compiled(module, "sm_90a") == (b"cubin", {"k": "_Z1k"})
    assert len(compiled) == 1
    for ending in ("cubin", "json"):
        (file,) = (kept / "cuda").glob(f"*.{ending}")
        file.write_bytes(file.read_bytes()[:-3])
        assert cupy_driver.compiled(module, "sm_90a") == (b"cubin", {"k": "_Z1k"})
    assert len(compiled) == 3


def test_one_line_says_that_kernels_are_compiled(
    cuda: Backend, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CAFFELITE_CUDA_DRIVER", "emulator")
    (tmp_path / "n.prototxt").write_text(NET)
    command = ("time", "--model", str(tmp_path / "n.prototxt"), "--gpu", "0", "--iterations", "1", "--json")
    for lines in (1, 0):
        out, err = said(capsys, *command)
        assert out.count("\n") == 1
        assert err.count("note: compiling CUDA kernels (") == lines
    assert len(list((kept / "emulator").glob("*.so"))) == 2, "two modules were compiled"
    assert np.all([cache.content(path) is not None for path in (kept / "emulator").iterdir()])
