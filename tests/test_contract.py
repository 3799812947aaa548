"""Every backend has every op, with exactly the contract's signature; backends.get finds them."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caffelite import backends
from caffelite.backends.contract import Backend, pitch_of, strides_of
from caffelite.errors import BackendError

OPS = [name for name, member in vars(Backend).items() if inspect.isfunction(member) and not name.startswith("_")]
NUMPY = Path(backends.__file__).parent / "numpy"


def last(*shape: int) -> np.ndarray:
    """Elements of a blob of this shape, channels last."""
    return np.lib.stride_tricks.as_strided(np.zeros(np.prod(shape), np.float32), shape, strides_of(shape, 4))


PITCHES = {
    "a blob": (last(2, 3, 5, 7), 3),
    "its channels": (last(2, 11, 5, 7)[:, 4:7], 11),
    "one of them": (last(2, 11, 5, 7)[:, 4:5], 11),
    "a line": (last(2, 11, 1, 7)[:, :3], 11),
    "a column": (last(2, 11, 5, 1)[:, :3], 11),
    "a pixel each": (last(2, 11, 1, 1)[:, :3], 11),
    "one pixel": (last(1, 11, 1, 1)[:, :3], 3),
    "every other column": (last(2, 3, 5, 8)[..., ::2], 6),
    "every other row": (last(2, 3, 6, 7)[:, :, ::2], 0),
    "fewer columns": (last(2, 3, 5, 7)[..., :6], 0),
    "fewer rows": (last(2, 3, 5, 7)[:, :, :4], 0),
    "every other channel": (last(2, 6, 5, 7)[:, ::2], 0),
    "turned round": (last(2, 3, 5, 7)[..., ::-1], 0),
    "channels first": (np.zeros((2, 3, 5, 7), np.float32), 0),
    "one value for all": (np.broadcast_to(np.float32(0), (2, 3, 5, 7)), 0),
    "two axes": (np.zeros((2, 3), np.float32), 0),
}


@pytest.mark.parametrize("name", PITCHES)
def test_elements_from_pixel_to_pixel(name: str) -> None:
    array, want = PITCHES[name]
    assert pitch_of(array) == want


def sections() -> dict[str, list[str]]:
    """Op names by stem: the first word of their section's head in contract.py."""
    found: dict[str, list[str]] = {}
    for line in (NUMPY.parent / "contract.py").read_text().split("class Backend(")[1].splitlines():
        if head := re.match(r"    # --- (\w+)", line):
            ops = found.setdefault(head[1], [])
        elif op := re.match(r"    def (\w+)", line):
            ops.append(op[1])
    return found


def test_the_contract_is_read() -> None:
    assert len(OPS) >= 70
    assert {"convolution_forward", "adam_update", "view", "accuracy"} <= set(OPS)


def test_a_stem_names_a_file_of_ops_and_a_file_of_tests() -> None:
    stems = sorted(sections())
    assert stems == sorted(path.stem for path in NUMPY.glob("*.py") if path.stem not in ("__init__", "blas", "common"))
    assert stems == sorted(path.stem.removeprefix("test_op_") for path in Path(__file__).parent.glob("test_op_*.py"))


def test_ops_lie_in_the_file_of_their_stem(backend) -> None:
    files = {op: Path(inspect.getfile(inspect.unwrap(getattr(type(backend), op)))).stem for op in OPS}
    assert files == {op: stem for stem, ops in sections().items() for op in ops}


@pytest.mark.parametrize("op", OPS)
def test_signature(backend, op: str) -> None:
    def outline(function) -> list[tuple]:
        return [(p.name, p.kind, p.default, p.annotation) for p in inspect.signature(function).parameters.values()]

    assert hasattr(backend, op), f"{backend.name} lacks {op}"
    wanted, got = getattr(Backend, op), getattr(type(backend), op)
    assert outline(got) == outline(wanted)
    assert inspect.signature(got).return_annotation == inspect.signature(wanted).return_annotation


def test_names(backend) -> None:
    assert backend.name in backends.NAMES
    assert backends.get(backend.name).name == backend.name


def test_auto_takes_onednn_where_it_loads() -> None:
    try:
        expected = backends.get("onednn").name
    except BackendError:
        expected = "numpy"
    assert backends.get("auto").name == backends.get().name == expected


def test_an_unknown_name() -> None:
    with pytest.raises(BackendError) as caught:
        backends.get("cudnn")
    assert str(caught.value) == "unknown backend 'cudnn'\n  known ones: auto, numpy, onednn, cuda"


@pytest.mark.parametrize("name", ["auto", "numpy"])
def test_threads_must_be_positive(name: str) -> None:
    with pytest.raises(BackendError, match="number of threads must be at least 1, found 0"):
        backends.get(name, threads=0)
    assert backends.get(name, threads=1)


def test_without_the_library_auto_is_numpy_and_onednn_says_what_to_install(tmp_path) -> None:
    missing = str(tmp_path / "libdnnl.so.3")
    script = f"""
from caffelite import backends
from caffelite.backends.onednn import library
from caffelite.errors import BackendError
library.candidates = lambda: iter([{missing!r}])
print(backends.get("auto").name)
try:
    backends.get("onednn")
except BackendError as error:
    print(error)
"""
    out = subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": ":".join(sys.path)}, capture_output=True, text=True, check=True)
    first, *rest = out.stdout.splitlines()
    assert first == "numpy"
    assert missing in "\n".join(rest)
    assert "pip install onednn-cpu-gomp" in "\n".join(rest)
