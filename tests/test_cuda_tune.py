"""Cuts chosen by timing: the fastest is kept, in a file that later runs choose by, and nothing that counts is written meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.backends.cuda import gemm_plan, gemm_tune
from caffelite.backends.cuda.peaks import Facts
from caffelite.errors import BackendError

M, K, N = 70, 600, 24
GPU = Facts("NVIDIA H100 80GB HBM3", (9, 0), 132, 1.98e9, 2.6e9, 5120)


@pytest.fixture
def made(cuda: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float] | None], Backend]:
    """Makes tuning backends whose driver says that runs take so long, one after another, in a folder of their own."""
    monkeypatch.setenv("CAFFELITE_CUDA_TUNE", "1")
    monkeypatch.setattr(gemm_tune.Tuner, "path", tmp_path / "tiles.json")

    def make(seconds: list[float] | None) -> Backend:
        backend = backends.get("cuda")
        times = iter(seconds or [])

        def between(start: object, stop: object) -> float:
            if seconds is None:
                raise AssertionError("timed again")
            return next(times)

        backend.driver.seconds_between, backend.driver.facts = between, lambda: GPU
        return backend

    return make


def gradient(backend: Backend) -> np.ndarray:
    """Gradients of a weight and a bias in bfloat16 that are added to ones."""
    rng = np.random.default_rng(3)
    x, dy, dw = backend.empty((M, K), "bfloat16"), backend.empty((M, N), "bfloat16"), backend.empty((N, K), "float32")
    for array in (x, dy):
        backend.from_host(rng.integers(-3, 4, array.shape), array)
    db = backend.empty((N,), "float32")
    for array in (dw, db):
        backend.fill(array, 1)
    backend.inner_product_backward_weights(x, dy, dw, db, transpose=False, accumulate_w=True, accumulate_b=True)
    np.testing.assert_array_equal(backend.to_host(db), 1 + np.asarray(backend.to_host(dy), np.float64).sum(axis=0))
    np.testing.assert_array_equal(backend.to_host(dw), 1 + backend.to_host(dy).T @ backend.to_host(x))
    return backend.to_host(dw)


def test_the_fastest_is_kept(made, tmp_path: Path) -> None:
    cuts = gemm_plan.candidates("bf16", rows=N, columns=K, depth=M, groups=1, outputs=N * K, transposed=True)[: gemm_tune.TRIED]
    assert len(cuts) >= 4
    taken = [9.0] * gemm_tune.RUNS * len(cuts)
    taken[2 * gemm_tune.RUNS + 1] = 0.5  # one run of the third
    backend = made(taken)
    gradient(backend)
    ((shape, entry),) = json.loads((tmp_path / "tiles.json").read_text()).items()
    assert shape == f"weights bf16: x, w, stride, pad, dilation {M}x{K}x1x1 {N}x{K}x1x1 1x1 0x0 1x1 group 1"
    assert entry["chosen"] == f"{cuts[2].tile.rows}x{cuts[2].tile.columns}, {cuts[2].splits} splits of {cuts[2].per_split}"
    assert sorted(entry["seconds"].values()) == [0.5] + [9.0] * (len(cuts) - 1)
    assert list(backend.tuner._picked.values()) == [cuts[2]]
    later = made(None)  # another run finds the choice
    gradient(later)
    assert list(later.tuner._picked.values()) == [cuts[2]]


def test_shapes_of_several_runs_share_the_file(made, tmp_path: Path) -> None:
    first, second = made([1.0] * 99), made([1.0] * 99)
    for backend in (first, second):
        gradient(backend)
    x, y = second.empty((8, 16), "bfloat16"), second.empty((8, 16), "bfloat16")
    second.inner_product_forward(x, second.empty((16, 16), "bfloat16"), None, y, transpose=False)
    second.inner_product_backward_data(y, second.empty((16, 16), "bfloat16"), x, transpose=False)
    assert [shape.split()[0] for shape in sorted(json.loads((tmp_path / "tiles.json").read_text()))] == ["data", "forward", "weights"]


def test_a_table_that_cannot_be_read(made, tmp_path: Path) -> None:
    (tmp_path / "tiles.json").write_text("{")
    with pytest.raises(BackendError, match=r"the table of tiles .*tiles.json cannot be read: .*\n  delete that file"):
        gradient(made([1.0]))


@pytest.mark.parametrize("value", ["", "0"])
def test_the_formula_decides_where_nothing_else_is_asked_for(made, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("CAFFELITE_CUDA_TUNE", value)
    backend = made(None)
    gradient(backend)
    assert not backend.tuner._picked


def test_the_formula_decides_on_the_emulator(cuda: Backend, made, tmp_path: Path) -> None:
    backend = made([1.0])
    del backend.driver.facts
    gradient(backend)
    (picked,) = backend.tuner._picked.values()
    assert picked == gemm_plan.candidates("bf16", rows=N, columns=K, depth=M, groups=1, outputs=N * K, transposed=True)[0]
    assert not (tmp_path / "tiles.json").exists()


def test_a_table_belongs_to_a_device_and_to_kernels(cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, before = gemm_tune.Tuner(cuda.driver), gemm_tune.Tuner(cuda.driver).path
    monkeypatch.setattr(cuda.driver, "facts", lambda: GPU)
    other = tuner.path
    assert other.name.startswith("tiles-NVIDIA-H100-80GB-HBM3-")
    assert other.suffix == ".json"
    monkeypatch.setattr(gemm_tune, "digest", lambda *parts: "changed")
    assert len({before, other, tuner.path}) == 3
