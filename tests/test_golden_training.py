"""Every recorded BVLC Caffe training run: losses of 12 iterations, final weights, and Caffe's own snapshot taken up again.

tests/golden/training/lmdb holds 200 images (10 classes, 3x64x64), init.caffemodel the starting weights; RUN/ the solver's settings,
golden.npz (losses, final weights) and the snapshot that Caffe wrote. Records are read in order without crop or mirror.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffelite import backends
from caffelite.schema import read_solverstate, solver_from_text
from caffelite.solver.loop import Solver

FOLDER = Path(__file__).parent / "golden" / "training"
RUNS = sorted(path.parent.name for path in FOLDER.glob("*/golden.npz"))
ITERATIONS = 12
NET = """name: "tiny"
layer { name: "data" type: "Data" top: "data" top: "label" transform_param { scale: 0.0078125 mean_value: 104 mean_value: 117 mean_value: 123 }
  data_param { source: "%s" backend: LMDB batch_size: 16 } }
layer { name: "conv1" type: "Convolution" bottom: "data" top: "conv1" param { lr_mult: 1 decay_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 8 kernel_size: 5 stride: 4 weight_filler { type: "xavier" } } }
layer { name: "relu1" type: "ReLU" bottom: "conv1" top: "conv1" }
layer { name: "pool1" type: "Pooling" bottom: "conv1" top: "pool1" pooling_param { pool: MAX kernel_size: 3 stride: 2 } }
layer { name: "norm1" type: "LRN" bottom: "pool1" top: "norm1" lrn_param { local_size: 5 alpha: 0.0001 beta: 0.75 } }
layer { name: "ip" type: "InnerProduct" bottom: "norm1" top: "ip" param { lr_mult: 1 } param { lr_mult: 2 decay_mult: 0 }
  inner_product_param { num_output: 10 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
LOSS_ATOL, WEIGHT_ATOL, WEIGHT_RTOL = 2e-4, 1e-4, 1e-3


def make_solver(run: str, backend, folder: Path, **options) -> Solver:
    net = folder / "net.prototxt"
    net.write_text(NET % (FOLDER / "lmdb"))
    settings = (FOLDER / run / "solver.txt").read_text()
    text = f'net: "{net}"\n{settings}\nmax_iter: {ITERATIONS}\nsnapshot_prefix: "{folder / "snap"}"\nrandom_seed: 7\nsolver_mode: CPU\n'
    return Solver(solver_from_text(text, "solver.prototxt"), backend=backend, **options)


def test_all_recorded_runs_are_there() -> None:
    assert len(RUNS) == 13


@pytest.mark.parametrize("observe", [True, False], ids=["observed", "planned"])
@pytest.mark.parametrize("run", RUNS)
def test_agrees_with_caffe(run: str, observe: bool, backend, tmp_path: Path) -> None:
    """In sgd_fixed two different patches reach maxima of one pooling window 7e-7 apart in 1.43: the order of sums matters there."""
    backend = backends.get(backend.name)
    golden = np.load(FOLDER / run / "golden.npz")
    solver = make_solver(run, backend, tmp_path, observe=observe)
    try:
        solver.net.copy_from(str(FOLDER / "init.caffemodel"))
        losses = []
        for _ in range(ITERATIONS):
            solver.step(1)
            losses.append(float(backend.to_host(solver.net.blobs["loss"].data)))
        np.testing.assert_allclose(losses, golden["losses"], rtol=0, atol=LOSS_ATOL)
        for name, params in solver.net.params.items():
            for i, param in enumerate(params):
                want = golden[f"{name}/{i}"]
                np.testing.assert_allclose(backend.to_host(param.master), want, rtol=0, atol=WEIGHT_ATOL + WEIGHT_RTOL * np.abs(want).max())
    finally:
        solver.close()


@pytest.mark.parametrize("run", RUNS)
def test_takes_up_caffes_own_snapshot(run: str, backend, tmp_path: Path) -> None:
    solver = make_solver(run, backend, tmp_path)
    try:
        path = FOLDER / run / f"snap_iter_{ITERATIONS}.solverstate"
        solver.restore(path)
        assert solver.iter == ITERATIONS
        stored = read_solverstate(path).history
        parts = [part for state in solver.history for part in state.parts]
        assert len(parts) == len(stored)
        for part, blob in zip(parts, stored):
            np.testing.assert_array_equal(backend.to_host(part).ravel(), np.array(blob.data, np.float32))
        golden = np.load(FOLDER / run / "golden.npz")
        for name, params in solver.net.params.items():
            for i, param in enumerate(params):
                np.testing.assert_array_equal(backend.to_host(param.master), golden[f"{name}/{i}"])
    finally:
        solver.close()
