"""How the oneDNN backend finds its library, and what it says about the machine."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import pytest

from caffelite import backends
from caffelite.backends.onednn import library
from caffelite.backends.onednn.dnnl import Dnnl, Unsupported
from caffelite.errors import BackendError


@pytest.fixture(scope="module")
def onednn() -> Any:
    """The backend; it must load where its wheel exists, and is skipped on other machines."""
    try:
        return backends.get("onednn")
    except BackendError as error:
        if sys.platform == "linux" and platform.machine() == "x86_64":
            raise
        pytest.skip(str(error))


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs code in a new interpreter: a process loads the library once."""
    kept = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, timeout=300)


def test_a_named_library_that_is_missing_says_what_to_do(tmp_path: Any) -> None:
    missing = tmp_path / "libdnnl.so.3"
    code = (
        "from caffelite import backends\nfrom caffelite.errors import BackendError\ntry:\n    backends.get('onednn')\nexcept BackendError as e:\n    print(e)"
    )
    done = python(code, CAFFELITE_DNNL=str(missing))
    assert "libdnnl.so.3 cannot be loaded" in done.stdout, done.stderr
    assert str(missing) in done.stdout
    assert "pip install onednn-cpu-gomp" in done.stdout
    assert "CAFFELITE_DNNL" in done.stdout


def test_auto_is_numpy_where_the_library_is_missing_unless_it_is_named(tmp_path: Any) -> None:
    missing = str(tmp_path / "none.so")
    code = "from caffelite import backends\nfrom caffelite.backends.onednn import library\n"
    done = python(f"{code}library.candidates = lambda: iter([{missing!r}])\nprint(backends.get('auto').name)")
    assert done.stdout.strip() == "numpy", done.stderr
    done = python(f"{code}print(backends.get('auto').name)", CAFFELITE_DNNL=missing)
    assert (done.stdout, f"libdnnl.so.3 cannot be loaded ({missing}" in done.stderr) == ("", True), done.stderr


def test_a_library_that_is_not_onednn_is_refused() -> None:
    import _ctypes

    code = (
        "from caffelite import backends\nfrom caffelite.errors import BackendError\ntry:\n    backends.get('onednn')\nexcept BackendError as e:\n    print(e)"
    )
    done = python(code, CAFFELITE_DNNL=_ctypes.__file__)
    assert "is not a oneDNN library" in done.stdout, done.stderr


def test_a_library_without_an_engine_for_cpus_is_refused(onednn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a oneDNN built for SYCL answers where there are no SYCL devices: invalid arguments."""
    monkeypatch.setattr(Dnnl, "create", lambda *_: (_ for _ in ()).throw(Unsupported("dnnl_engine_create: invalid arguments")))
    with pytest.raises(BackendError, match=r"computes nothing on CPUs by itself \(dnnl_engine_create") as refused:
        Dnnl()
    assert "pip install onednn-cpu-gomp" in str(refused.value)


def test_the_variable_names_the_library(onednn: Any) -> None:
    found = onednn.dnnl.lib._name
    done = python("from caffelite import backends; print(backends.get('onednn').dnnl.lib._name)", CAFFELITE_DNNL=found)
    assert done.stdout.strip() == found, done.stderr


@pytest.mark.parametrize("count", [1, 2])
def test_threads_come_from_the_environment_or_the_argument(onednn: Any, count: int) -> None:
    code = f"""
from caffelite import backends
from caffelite.backends.onednn import library
from caffelite.backends.onednn.dnnl import Dnnl, Unsupported
from caffelite.backends.onednn import library
from caffelite.backends.onednn.dnnl import Dnnl, Unsupported
print(backends.get("onednn").threads, library.thread_count(), backends.get("onednn", threads={count + 1}).threads, library.thread_count())
"""
    done = python(code, OMP_NUM_THREADS=str(count))
    assert done.stdout.split() == [str(n) for n in (count, count, count + 1, count + 1)], done.stderr


def test_no_threads_are_refused(onednn: Any) -> None:
    with pytest.raises(BackendError, match="at least 1, found 0"):
        backends.get("onednn", threads=0)


def test_bfloat16_is_fast_or_said_to_be_slow(onednn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn.dnnl, "instruction_set", lambda: 0x67)  # AVX-512 with VNNI
    assert "no bfloat16 instructions" in onednn.supports("bfloat16")
    monkeypatch.setattr(onednn.dnnl, "instruction_set", lambda: 0xE7)
    assert onednn.supports("bfloat16") is None
    assert onednn.supports("float32") is None
    with pytest.raises(BackendError, match="tf32"):
        onednn.supports("tf32")


@pytest.mark.parametrize(("given", "seen"), [({}, "2000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)])
def test_idle_threads_sleep_soon_unless_the_environment_says_otherwise(given: dict[str, str], seen: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    during: list[str | None] = []
    monkeypatch.setattr(library.ctypes, "CDLL", lambda path: during.append(os.environ.get("GOMP_SPINCOUNT")))
    with pytest.raises(BackendError, match="not a oneDNN library"):
        library._open.__wrapped__("some path")
    assert during == [seen]
    assert os.environ.get("GOMP_SPINCOUNT") == given.get("GOMP_SPINCOUNT")
