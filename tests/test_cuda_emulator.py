"""The emulator finds planted faults of every kind, runs sound kernels in any order of threads, and refuses wrong arguments."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from caffelite import backends
from caffelite.backends.cuda.emulator import ORDERS, EmulatedProgram, EmulatorDriver
from caffelite.backends.cuda.emulator.build import _compiler
from caffelite.backends.cuda.launch import Module
from caffelite.errors import BackendError

BLOCK = 64
SOURCE = """
#include "common.cuh"
__global__ void sound(const float* x, float* y, int n) {  // reverses each block's part, by way of shared memory
  __shared__ float part[64];
  int i = thread_index();
  part[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  if (i < n) y[i] = part[63 - threadIdx.x];
}
__global__ void race(const float* x, float* y, int n) {
  __shared__ float part[64];
  part[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = part[63 - threadIdx.x];  // no barrier before
}
__global__ void race_between_blocks(const float* x, float* y, int n) { y[0] += x[thread_index()]; }
__global__ void unwritten(const float* x, float* y, int n) {
  __shared__ float part[64];
  if (threadIdx.x) part[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = part[threadIdx.x];
}
__global__ void beyond(const float* x, float* y, int n) { y[thread_index() + 1] = x[thread_index()]; }
__global__ void before(const float* x, float* y, int n) { y[thread_index()] = x[thread_index() - 1]; }
__global__ void crooked(const float* x, float* y, int n) { store_vec(y + threadIdx.x * 4 % 60, load_vec(x + 1)); }
__global__ void divergent(const float* x, float* y, int n) {
  if (threadIdx.x < 32) __syncthreads();
  y[threadIdx.x] = x[threadIdx.x];
}
__global__ void half_a_warp(const float* x, float* y, int n) {
  float v = x[threadIdx.x];
  if (threadIdx.x % 2) v += __shfl_xor_sync(0xffffffffu, v, 2);
  y[threadIdx.x] = v;
}
__global__ void impatient(const float* x, float* y, int n) {
  __shared__ __align__(16) float part[64];
  cf_cp_async4(part + threadIdx.x, x + threadIdx.x, 4);
  cf_cp_commit();  // and no wait
  y[threadIdx.x] = part[threadIdx.x];
}
__global__ void askew(const float* x, float* y, int n) {
  __shared__ __align__(16) float part[256];
  cf_cp_async16(part + 4 * threadIdx.x, x + 2, 0);  // zeros, whatever the address
  cf_cp_commit();
  cf_cp_wait<0>();
  y[threadIdx.x] = part[4 * threadIdx.x];
}
__global__ void patient(const float* x, float* y, int n) {
  __shared__ __align__(16) float part[64];
  cf_cp_async4(part + threadIdx.x, x + threadIdx.x, 4);
  cf_cp_commit();
  cf_cp_wait<0>();
  __syncthreads();
  y[threadIdx.x] = part[63 - threadIdx.x];
}
"""
FAULTS = {
    "race": "RACE",
    "race_between_blocks": "RACE",
    "unwritten": "UNINITIALISED SHARED READ",
    "beyond": "OUT-OF-BOUNDS write",
    "before": "OUT-OF-BOUNDS read",
    "crooked": "MISALIGNED ACCESS",
    "divergent": "BARRIER DIVERGENCE",
    "half_a_warp": "DEADLOCK",
    "impatient": "IN-FLIGHT cp.async",
    "askew": "cp.async: address not 16-byte aligned",
}


class Planted(Module):
    """The kernels above, in a file of their own."""

    folder: Path

    @property
    def path(self) -> Path:
        return self.folder / "planted.cu"


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> Module:
    planted = Planted("planted", ["sound", "patient", *FAULTS])
    planted.folder = tmp_path_factory.mktemp("planted")
    planted.path.write_text(SOURCE)
    return planted


@pytest.fixture(scope="module")
def checked(module: Module) -> EmulatedProgram:
    return EmulatorDriver("check").load(module)


def array(values: np.ndarray) -> Any:
    driver = EmulatorDriver("fast")
    x = driver.allocate(values.nbytes).at(0, values.shape, values.strides, values.dtype)
    driver.from_host(values, x)
    return x


def run(program: EmulatedProgram, name: str, count: int = BLOCK) -> np.ndarray:
    x, y = array(np.arange(count, dtype=np.float32)), array(np.zeros(count, np.float32))
    program.launch(name, (-(-count // BLOCK), 1, 1), (BLOCK, 1, 1), [x, y, np.int32(count)], 0)
    return EmulatorDriver("fast").to_host(y)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_with_its_line(checked: EmulatedProgram, name: str) -> None:
    with pytest.raises(BackendError) as caught:
        run(checked, name, 2 * BLOCK if name in ("race_between_blocks", "beyond") else BLOCK)
    report = str(caught.value)
    assert FAULTS[name] in report
    lines = SOURCE.split("\n")
    start = next(i for i, line in enumerate(lines, 1) if f"void {name}(" in line)
    end = next((i for i, line in enumerate(lines, 1) if i > start and "__global__" in line), len(lines))
    if "planted.cu:" in report:  # a deadlock has no one line; a vector access lies in common.cuh
        assert start <= int(report.split("planted.cu:")[1].split()[0].rstrip(",)")) < end
    else:
        assert name in ("half_a_warp", "crooked", "askew")


@pytest.mark.parametrize("order", ORDERS)
def test_sound_kernels_give_the_same_in_any_order(module: Module, order: str) -> None:
    program = EmulatorDriver("fast", order).load(module)
    want = np.arange(2 * BLOCK, dtype=np.float32).reshape(2, BLOCK)[:, ::-1].ravel()
    np.testing.assert_array_equal(run(program, "sound", 2 * BLOCK), want)
    np.testing.assert_array_equal(run(program, "patient"), want[:BLOCK])


def test_sound_kernels_pass_the_check(checked: EmulatedProgram) -> None:
    run(checked, "sound", 2 * BLOCK)
    run(checked, "patient")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([np.zeros(4, np.float32), np.zeros(4, np.float32)], "2 arguments for the parameters"),
        ([np.zeros(4, np.float64), np.zeros(4, np.float32), np.int32(4)], "argument 0: an array of float64"),
        ([np.zeros(4, np.float32), np.zeros(4, np.float32), np.int64(4)], "argument 2: a int64 of 8 bytes"),
        ([np.zeros(4, np.float32), np.float32(1), np.int32(4)], "argument 1: a float32"),
    ],
)
def test_arguments_must_have_the_types_of_the_parameters(checked: EmulatedProgram, args: list, message: str) -> None:
    with pytest.raises(BackendError) as caught:
        checked.launch("sound", (1, 1, 1), (BLOCK, 1, 1), [array(a) if isinstance(a, np.ndarray) else a for a in args], 0)
    assert message in str(caught.value)


def test_what_does_not_compile_is_shown(module: Module, tmp_path: Path) -> None:
    broken = Planted("planted", ["sound"])
    broken.folder = tmp_path
    broken.path.write_text("__global__ void sound( {")
    with pytest.raises(BackendError, match=r"planted.cu:1"):
        EmulatorDriver("fast").load(broken)


def test_there_is_one_emulated_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAFFELITE_CUDA_DRIVER", "emulator")
    with pytest.raises(BackendError, match="there is no GPU 1: the emulator is GPU 0"):
        backends.get("cuda", device=1)


@pytest.mark.parametrize(
    ("compiler", "message"),
    [
        ("no-such-compiler", "the CUDA emulator needs a C\\+\\+ compiler: no-such-compiler: No such file"),
        ("false", "false cannot compile the kernels for the emulator: it ended with exit status 1 and said nothing\n  install g\\+\\+"),
        ("g++ -no-such-flag", "g\\+\\+ cannot compile the kernels for the emulator: .*no-such-flag"),
    ],
)
def test_a_compiler_that_does_not_serve(compiler: str, message: str, module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("CAFFELITE_CACHE", str(tmp_path))
    _compiler.cache_clear()
    try:
        with pytest.raises(BackendError, match=message):
            EmulatorDriver("fast").load(module)
    finally:
        _compiler.cache_clear()


CLONE = """from pathlib import Path
import caffelite
from caffelite import backends
assert Path(caffelite.__file__).is_relative_to(Path.cwd()), caffelite.__file__
backend = backends.get("cuda")
x, y = backend.empty((5,), "float32"), backend.empty((5,), "float32")
backend.fill(x, -1.0)
backend.tanh_forward(x, y)
print(backend.to_host(y)[0])
"""


def test_clones_share_what_is_compiled(tmp_path: Path) -> None:
    """And a clone whose kernels differ compiles them: its compiler here knows its name and nothing else."""
    for clone in ("one", "two"):
        shutil.copytree(Path(backends.__file__).parent.parent, tmp_path / clone / "caffelite", ignore=shutil.ignore_patterns("__pycache__"))
    compiler = tmp_path / "g++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\necho "must compile" >&2\nexit 1\n')
    compiler.chmod(0o755)

    def run_clone(clone: str, compiler: str) -> subprocess.CompletedProcess[str]:
        around = {"CXX": compiler, "CAFFELITE_CUDA_DRIVER": "emulator", "CAFFELITE_CACHE": str(tmp_path / "cache")}
        around |= {"PYTHONPATH": str(tmp_path / clone), "CAFFELITE_DEBUG": ""}
        return subprocess.run([sys.executable, "-c", CLONE], cwd=tmp_path / clone, env={**os.environ, **around}, capture_output=True, text=True, check=False)

    assert "must compile" in run_clone("one", str(compiler)).stderr
    want = run_clone("one", "g++").stdout
    assert float(want) == pytest.approx(np.tanh(-1), abs=1e-6)
    second = run_clone("two", str(compiler))
    assert (second.returncode, second.stdout) == (0, want), second.stderr
    kernel = tmp_path / "two" / "caffelite" / "backends" / "cuda" / "kernels" / "activations.cu"
    kernel.write_text(kernel.read_text() + "// another text\n")
    assert "must compile" in run_clone("two", str(compiler)).stderr
    assert run_clone("one", str(compiler)).stdout == want


def test_ctrl_c_is_not_for_the_compiler(module: Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal sends SIGINT to its foreground process group; the compiler must be in another."""
    script = tmp_path / "compiler"
    script.write_text('#!/bin/sh\necho "group $(cut -d" " -f5 /proc/$$/stat)" >&2\nexit 1\n')
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    _compiler.cache_clear()
    try:
        with pytest.raises(BackendError, match="group") as caught:
            EmulatorDriver("fast").load(module)
    finally:
        _compiler.cache_clear()
    assert int(str(caught.value).split("group")[1].split()[0]) != os.getpgrp()


def test_a_cache_folder_that_cannot_be_made(tmp_path: Path, module: Module, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CAFFELITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(BackendError, match=r"cannot make the folder for compiled kernels .*\n  name another one in CAFFELITE_CACHE"):
        EmulatorDriver("fast").load(module)
