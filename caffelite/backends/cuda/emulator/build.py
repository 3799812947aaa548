"""Compiles a module of kernels into a shared library for the emulator, once for each text, compiler and options.

What is kept is named after these alone, and not after where the text lies: clones of the project use each other's.
"""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from caffelite.backends.cuda import cache
from caffelite.backends.cuda.launch import FOLDER, digest
from caffelite.errors import BackendError

HERE = Path(__file__).parent
OWN = (HERE / "cuda_emu.h", HERE / "primitives_emu.h", HERE / "emu_core.cpp", HERE / "wgmma_emu.h", HERE / "tma_emu.h")
COMMON = (
    "-std=c++17",
    "-DCF_EMU",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
    "-march=x86-64-v3",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-g1",
    "-gdwarf-4",
)
PLACES = (f"-ffile-prefix-map={HERE.parent}/=", f"-I{HERE}", f"-I{FOLDER}")  # not part of any name
UNDEFINED = "bounds-strict,alignment,shift,integer-divide-by-zero,signed-integer-overflow"


class Mode(NamedTuple):
    """Compiler flags of the kernels and of the emulator's core."""

    kernel: tuple[str, ...]
    core: tuple[str, ...] = ("-O2",)


# check: the compiler calls __tsan_read4 and so on at every access; the core defines them itself, libtsan is not linked.
MODES = {
    "fast": Mode(("-O2",)),
    "check": Mode(("-O1", f"-fsanitize=thread,{UNDEFINED}", "--param", "tsan-distinguish-volatile=1", "--param", "tsan-instrument-func-entry-exit=0")),
}


def build(source: Path, names: Sequence[str], sources: Sequence[Path], mode: str, tell: Callable[[], object] = lambda: None) -> Path:
    """The shared library with kernels `names` of `source`; `sources`: all files it is made of. tell: called before anything is compiled.

    BackendError when g++ is missing or refuses.
    """
    flags, folder = MODES[mode], cache.folder("emulator")
    text = "\n".join([f'#include "{source.name}"', *(f"EMU_EXPORT(emu_kernel_{i}, {name})" for i, name in enumerate(names)), ""])
    core_key = digest(*OWN, mode, COMMON, flags.core, _compiler(), _words()[1:], "with checksum")
    core = folder / f"core-{mode}-{core_key}.o"
    cache.once(core, lambda out: _run(*COMMON, *flags.core, *PLACES, "-c", str(HERE / "emu_core.cpp"), "-o", str(out)), tell)
    library = folder / f"{source.stem}-{mode}-{digest(*sources, text, flags.kernel, core_key)}.so"

    def make(out: Path) -> None:
        unit, compiled = out.with_suffix(".cpp"), out.with_suffix(".o")
        try:
            unit.write_text(text)
            _run(*COMMON, *flags.kernel, f"-I{source.parent}", *PLACES, "-c", str(unit), "-o", str(compiled))
            _run("-shared", "-Wl,-Bsymbolic", str(compiled), str(core), "-o", str(out))
        finally:
            unit.unlink(missing_ok=True)
            compiled.unlink(missing_ok=True)

    cache.once(library, make, tell)
    return library


@functools.cache
def _compiler() -> str:
    return _run("--version").split("\n")[0]


def _words() -> list[str]:
    """The compiler, and options that CXX gives it."""
    return shlex.split(os.environ.get("CXX") or "g++")


def _run(*args: str) -> str:
    command, hint = [*_words(), *args], "install g++, or name a compiler in CXX"
    try:
        # A session of its own: Ctrl-C in a terminal is for this process, which finishes the iteration, and not for the compiler.
        done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    except OSError as error:
        raise BackendError(f"the CUDA emulator needs a C++ compiler: {command[0]}: {error.strerror}", hint=hint) from error
    if done.returncode:
        said = done.stderr.strip() or f"it ended with exit status {done.returncode} and said nothing"
        raise BackendError(f"{command[0]} cannot compile the kernels for the emulator: {said}", hint=hint)
    return done.stdout
