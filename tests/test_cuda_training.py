"""A whole NIN, narrow and small, on CUDA kernels: the losses are the numpy backend's, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.schema import pb, read_net, solver_from_text, to_text
from caffelite.solver.loop import Solver

MODEL = Path(__file__).parent.parent / "models" / "nin_crop48" / "train_val.prototxt"
SIZE, BATCH, NARROWER, ITERATIONS = 12, 3, 12, 10


def solver_for(folder: Path, backend: Backend, precision: str = "float32") -> Solver:
    """NIN with a twelfth of its channels, on random images drawn anew in each iteration."""
    net = read_net(MODEL).param
    layers = [layer for layer in net.layer if layer.type != "Data"]
    for layer in layers:
        if layer.type == "Convolution":
            layer.convolution_param.num_output //= NARROWER
    data = pb.LayerParameter(name="data", type="DummyData", top=["data", "label"])
    for dims in ((BATCH, 3, SIZE, SIZE), (BATCH,)):
        data.dummy_data_param.shape.add().dim.extend(dims)
    data.dummy_data_param.data_filler.add(type="gaussian", std=1)
    data.dummy_data_param.data_filler.add(type="constant", value=2)
    del net.layer[:]
    net.layer.extend([data, *layers])
    path = folder / "net.prototxt"
    path.write_text(to_text(net))
    text = f'net: "{path}" base_lr: 0.01 lr_policy: "step" stepsize: 4 gamma: 0.5 momentum: 0.9 weight_decay: 0.0005 max_iter: {ITERATIONS} random_seed: 5'
    return Solver(solver_from_text(f'{text} snapshot_prefix: "{folder}/nin"', str(folder / "solver.prototxt")), backend=backend, precision=precision)


def losses(solver: Solver, count: int) -> list[float]:
    found = []
    for _ in range(count):
        solver.step(1)
        found.append(solver.net.loss())
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("tf32", 1e-2), ("bfloat16", 2e-2)])
def test_losses_are_those_of_the_reference(tmp_path: Path, cuda: Backend, precision: str, tolerance: float) -> None:
    """tf32, bfloat16: 10 iterations of rounding to 11 or 8 bits, in sums of another order. The reference has no tf32."""
    want = losses(solver_for(tmp_path, backends.get("numpy"), "float32" if precision == "tf32" else precision), ITERATIONS)
    assert want[-1] < 0.9 * want[0]
    np.testing.assert_allclose(losses(solver_for(tmp_path, cuda, precision), ITERATIONS), want, rtol=tolerance)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, cuda: Backend, precision: str) -> None:
    whole = solver_for(tmp_path, cuda, precision)
    whole.step(ITERATIONS)
    first = solver_for(tmp_path, cuda, precision)
    first.step(ITERATIONS // 2)
    first.snapshot()
    second = solver_for(tmp_path, cuda, precision)
    second.restore(tmp_path / f"nin_iter_{ITERATIONS // 2}.solverstate")
    second.step(ITERATIONS - ITERATIONS // 2)
    assert second.iter == whole.iter
    np.testing.assert_array_equal(cuda.to_host(second.net.arena.master), cuda.to_host(whole.net.arena.master))
