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
from caffelite.backends.cuda.gemm_plan import UNITS
from caffelite.backends.cuda.peaks import Facts
from caffelite.errors import BackendError, CaffeliteError

M, K, N = 70, 600, 24
GPU = Facts("NVIDIA H100 of a test", (9, 0), 132, 1.98e9, 2.6e9, 5120)


@pytest.fixture
def made(cuda: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[float] | None], Backend]:
    """Makes tuning backends whose driver says that runs take so long, one after another, in a folder of their own."""
    facts = cuda.driver.facts()
    if facts and facts.capability != gemm_tune.HOPPER:
        pytest.skip(f"{facts.name} has no wgmma")
    monkeypatch.setenv("CAFFELITE_CUDA_TUNE", "1")
    monkeypatch.setattr(gemm_tune.Tuner, "path", tmp_path / "tiles.json")
    monkeypatch.setattr(gemm_tune, "IN_A_ROW", 2)

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


@pytest.mark.parametrize("unit", UNITS)
def test_the_fastest_is_kept(made, tmp_path: Path, unit: str) -> None:
    sizes = {"rows": N, "columns": K, "depth": M, "groups": 1, "outputs": N * K, "transposed": True}
    cuts = [cut for unit in UNITS for cut in gemm_plan.candidates("bf16", **sizes, units=(unit,))[: gemm_tune.TRIED]]
    assert len(cuts) >= 12
    taken = [9.0] * gemm_tune.RUNS * len(cuts)
    number = [cut.tile.unit for cut in cuts].index(unit) + 2
    taken[number * gemm_tune.RUNS + 1] = 0.5  # one run of one of them
    backend = made(taken)
    gradient(backend)
    ((shape, entry),) = json.loads((tmp_path / "tiles.json").read_text()).items()
    assert shape == f"weights bf16: x, w, stride, pad, dilation {M}x{K}x1x1 {N}x{K}x1x1 1x1 0x0 1x1 group 1"
    best = cuts[number]
    assert best.tile.unit == unit
    assert entry["chosen"] == f"{'' if unit == 'mma' else unit + ' '}{best.tile.rows}x{best.tile.columns}, {best.splits} splits of {best.per_split}"
    assert sorted(entry["seconds"].values()) == [0.25] + [4.5] * (len(cuts) - 1), "of one product"
    assert list(backend.tuner._picked.values()) == [best]
    later = made(None)  # another run finds the choice
    gradient(later)
    assert list(later.tuner._picked.values()) == [best]


def test_trials_leave_no_memory_behind(made) -> None:
    """What is in use is what a run needs that finds the choice; scratch memory that other ops have asked for stays."""
    used = []
    for first in (0, 1):
        for seconds in ([1.0] * 199, None):
            backend = made(seconds)
            if first:
                backend.scratch(1 << 20)
            gradient(backend)
            used.append(backend.driver.meter.used)
            assert backend.driver.meter.peak > used[-1] or seconds is None
    assert used == [used[0], used[0], used[2], used[2]]
    assert used[0] == 0, "the cut that is taken needs none"
    assert used[2] >= 1 << 20


def test_what_is_timed_is_started_at_once(made, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a short product would be as long as what the host needs to start it. Nothing but the record lies between two marks."""
    backend = made([1.0] * 199)
    told: list[str] = []

    def watched(owner: object, name: str) -> None:
        does = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **options: (told.append(name), does(*args, **options))[1])

    for owner, name in ((backend.driver, "capture"), (backend.driver, "mark"), (backend, "launch")):
        watched(owner, name)
    gradient(backend)
    recorded = told[told.index("capture") + 1 : told.index("mark")]
    assert recorded == ["launch"] * len(recorded)
    assert len(recorded) in (2, 4), "two products, with or without split sums"
    assert told[told.index("mark") :][: 2 * gemm_tune.RUNS] == ["mark"] * 2 * gemm_tune.RUNS


def test_shapes_of_several_runs_share_the_file(made, tmp_path: Path) -> None:
    first, second = made([1.0] * 199), made([1.0] * 199)
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
    if backend.driver.facts():
        pytest.skip("on a GPU, which is timed")
    gradient(backend)
    (picked,) = backend.tuner._picked.values()
    assert picked == gemm_plan.candidates("bf16", rows=N, columns=K, depth=M, groups=1, outputs=N * K, transposed=True)[0]
    assert not (tmp_path / "tiles.json").exists()


@pytest.mark.parametrize(("capability", "offered"), [((9, 0), UNITS), ((8, 0), ("mma",)), ((10, 0), ("mma",))])
def test_units_are_timed_against_each_other_where_there_are_both(made, capability: tuple[int, int], offered: tuple[str, ...]) -> None:
    backend = made([])
    backend.driver.facts = lambda: GPU._replace(capability=capability)
    assert backend.tuner.units == offered


def test_mma_makes_everything_unless_something_is_asked_for(cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAFFELITE_CUDA_TUNE", raising=False)
    monkeypatch.delenv("CAFFELITE_CUDA_PRODUCTS", raising=False)
    monkeypatch.setattr(cuda.driver, "facts", lambda: GPU)
    assert gemm_tune.Tuner(cuda.driver).units == ("mma",)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("tuned", ["0", "1"])
def test_a_unit_that_is_asked_for_makes_everything(cuda: Backend, monkeypatch: pytest.MonkeyPatch, unit: str, tuned: str) -> None:
    monkeypatch.setenv("CAFFELITE_CUDA_TUNE", tuned)
    monkeypatch.setenv("CAFFELITE_CUDA_PRODUCTS", unit)
    monkeypatch.setattr(cuda.driver, "facts", lambda: GPU)
    tuner = gemm_tune.Tuner(cuda.driver)
    assert tuner.units == (unit,)
    assert f"-{unit}-" in tuner.path.name, "what else was timed stays as it is"


def test_units_that_there_are_not(cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.driver, "facts", lambda: GPU._replace(name="NVIDIA A100", capability=(8, 0)))
    for value, message in (
        ("wmma", r"CAFFELITE_CUDA_PRODUCTS is 'wmma' in the environment\n  did you mean 'wgmma'\?"),
        ("tma", r"CAFFELITE_CUDA_PRODUCTS is 'tma', which NVIDIA A100 does not have"),
        ("wgmma", r"which NVIDIA A100 does not have: it needs compute capability 9.0, found 8.0\n  unset CAFFELITE_CUDA_PRODUCTS, or choose mma"),
    ):
        monkeypatch.setenv("CAFFELITE_CUDA_PRODUCTS", value)
        with pytest.raises(CaffeliteError, match=message):
            gemm_tune.Tuner(cuda.driver)


def test_a_table_belongs_to_a_device_and_to_kernels(cuda: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, before = gemm_tune.Tuner(cuda.driver), gemm_tune.Tuner(cuda.driver).path
    monkeypatch.setattr(cuda.driver, "facts", lambda: GPU)
    other = tuner.path
    assert other.name.startswith("tiles-NVIDIA-H100-of-a-test-")
    assert other.suffix == ".json"
    monkeypatch.setattr(gemm_tune, "digest", lambda *parts: "changed")
    assert len({before, other, tuner.path}) == 3
