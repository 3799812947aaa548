"""Every CUDA kernel compiles for Ampere and Hopper, keeps everything in registers, and takes what the committed table says."""

from __future__ import annotations

import ctypes.util
import importlib.util
import struct
from pathlib import Path

import pytest

from caffelite.backends.cuda import launch, nvrtc
from caffelite.backends.cuda.cupy_driver import compiled
from caffelite.backends.cuda.launch import FOLDER
from caffelite.errors import BackendError

TOOL = Path(__file__).parent.parent / "tools" / "cuda_resources.py"
spec = importlib.util.spec_from_file_location("cuda_resources", TOOL)
assert spec
assert spec.loader
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
MODULES = {module.name: module for module in tool.modules()}


def test_every_kernel_file_is_a_module() -> None:
    assert {module.stem for module in MODULES.values()} == {path.stem for path in FOLDER.glob("*.cu")}
    assert sorted(MODULES) == sorted({row.module for row in tool.read()})


def test_a_module_is_made_of_its_file_and_what_that_includes() -> None:
    assert [path.name for path in MODULES["updates"].sources()] == ["updates.cu", "elementwise.cuh", "partials.cuh", "common.cuh", "primitives.cuh"]
    used = {path for module in MODULES.values() for path in module.sources()}
    assert used == {*FOLDER.glob("*.cu"), *FOLDER.glob("*.cuh")}


@pytest.mark.parametrize(("name", "architecture"), [(name, architecture) for name, module in MODULES.items() for architecture in tool.architectures(module)])
def test_resources(name: str, architecture: str) -> None:
    found = tool.measure(MODULES[name], architecture)
    assert [row for row in found if row.spills or row.stack] == []
    kept = [row for row in tool.read() if (row.module, row.architecture) == (name, architecture)]
    assert found == kept, "run tools/cuda_resources.py and look at the difference"


def instructions(cubin: bytes) -> dict[str, bytes]:
    """Each kernel's machine code by its symbol: the .text. sections of an ELF file."""
    (table,), (size, count, names) = struct.unpack_from("<Q", cubin, 0x28), struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + size * number) for number in range(count)]  # name, type, flags, address, start, bytes
    strings = headers[names][4]
    found = {cubin[strings + name :].split(b"\0", 1)[0].decode(): cubin[start : start + nbytes] for name, _, _, _, start, nbytes in headers}
    return {name.removeprefix(".text."): code for name, code in found.items() if name.startswith(".text.")}


@pytest.mark.parametrize("name", ["lrn", "lrn_pool", "pool_dropout", "pooling", "transform", "updates"])
def test_no_rounding_is_left_to_the_compiler(name: str) -> None:
    """Ops that are to give the same bits as others, or as the host, say themselves where a product is fused with a sum; the emulator never fuses any.
    Sums of a whole array promise no bits."""
    module = MODULES[name]
    made = []
    for fused in ("true", "false"):
        options = [f"-I{FOLDER}", f"--fmad={fused}"]
        cubin, symbols, _ = nvrtc.compile_cubin(module.path.read_text(), str(module.path), "sm_90a", module.names, options)
        made.append({kernel: instructions(cubin)[symbol] for kernel, symbol in symbols.items()})
    assert [kernel for kernel in module.names if made[0][kernel] != made[1][kernel] and not kernel.startswith("sum_")] == []


def test_a_report_is_of_the_text_as_it_is(tmp_path, monkeypatch) -> None:
    """What was measured before counts only while the kernels' text, and the compiler, are the same."""
    monkeypatch.setenv("CAFFELITE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "FOLDER", tmp_path)
    monkeypatch.setattr(nvrtc, "compile_cubin", lambda text, *args: (b"", {"k": "_Z1k"}, REPORT.format(len(text))))
    source, module = tmp_path / "made.cu", launch.Module("made", ["k"])
    registers = []
    for text in ("ab", "ab", "abcd"):
        source.write_text(text)
        registers.append([row.registers for row in tool.measure(module, "sm_80")])
    monkeypatch.setattr(nvrtc, "compile_cubin", None)  # a further compilation would fail
    assert [row[:5] for row in tool.measure(module, "sm_80")] == [("made", "k", "sm_80", 4, 16)]
    assert registers == [[2], [2], [4]]


def test_products_that_wait_for_one_another_are_refused(tmp_path, monkeypatch) -> None:
    """The assembler does so where accumulators are touched in flight."""
    monkeypatch.setenv("CAFFELITE_CACHE", str(tmp_path / "cache"))
    source, module = tmp_path / "made.cu", launch.Module("made", ["k"], only="sm_90a")
    text = """#include "primitives.cuh"
        extern "C" __global__ void k(float* y, cf_u64 a) {
          float d[8][4] = {};
          for (int i = 0; i < 9; ++i) {
            cf_wgmma_fence();
            cf_wgmma_m64k16_bf16<0, 0>(d, a, a);
            cf_wgmma_commit();
            TOUCH
            cf_wgmma_wait<0>();
          }
          for (int i = 0; i < 32; ++i) y[32 * threadIdx.x + i] = d[i / 4][i % 4];
        }"""
    monkeypatch.setattr(launch.Module, "path", source)
    source.write_text(text.replace("TOUCH", ""))
    assert [row[:3] for row in tool.measure(module, "sm_90a")] == [("made", "k", "sm_90a")]
    source.write_text(text.replace("TOUCH", "d[3][1] += y[i];"))
    with pytest.raises(BackendError, match=r"made: the assembler puts wgmma one after another:\n.*C75"):
        tool.measure(module, "sm_90a")


REPORT = """ptxas info    : Compiling entry function '_Z1k' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used {} registers, 16 bytes smem"""


def test_machine_code_is_kept(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CAFFELITE_CACHE", str(tmp_path))
    code, symbols = compiled(MODULES["memory"], "sm_80")
    assert code[:4] == b"\x7fELF"
    assert list(symbols) == list(MODULES["memory"].names)
    assert len(list((tmp_path / "cuda").iterdir())) == 2
    monkeypatch.setattr(nvrtc, "compile_cubin", None)  # a second compilation would fail
    assert compiled(MODULES["memory"], "sm_80") == (code, symbols)


def test_a_kernel_that_does_not_compile_shows_the_log() -> None:
    with pytest.raises(BackendError) as caught:
        nvrtc.compile_cubin("__global__ void broken( {", "broken.cu", "sm_80", [])
    assert "broken.cu does not compile for sm_80" in str(caught.value)
    assert "broken.cu(1): error" in str(caught.value)


def test_a_gpu_that_the_compiler_does_not_know() -> None:
    major, minor = nvrtc.version()
    with pytest.raises(BackendError, match=rf"does not compile for sm_999:\n.*\n  NVRTC {major}\.{minor} does not know that GPU: update nvidia-cuda-nvrtc"):
        nvrtc.compile_cubin("__global__ void k() {}", "k.cu", "sm_999", ["k"])


def test_a_library_that_is_not_nvrtc(monkeypatch) -> None:
    nvrtc._library.cache_clear()
    monkeypatch.setenv("CAFFELITE_NVRTC", ctypes.util.find_library("m"))
    try:
        with pytest.raises(BackendError, match=r"NVRTC, the CUDA compiler library, does not load: .*nvrtcGetErrorString"):
            nvrtc.version()
    finally:
        nvrtc._library.cache_clear()


def test_no_newer_cuda_than_the_drivers_is_chosen() -> None:
    assert {nvrtc._major(path) for path in nvrtc._candidates(nvrtc.ANY) if ".so." in path} >= {13}
    assert all(nvrtc._major(path) <= 12 for path in nvrtc._candidates(12) if "nvidia" in path)
