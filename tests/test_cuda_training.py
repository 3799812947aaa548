"""A whole NIN, narrow and small, on CUDA kernels: the losses are the numpy backend's, and a resumed run equals an uninterrupted one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from solver_harness import RATE, Watcher, make_solver, weights_of

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


ENDING = """
  layer { name: "data" type: "DummyData" top: "data" top: "label" dummy_data_param { shape { dim: 5 dim: 3 dim: 9 dim: 7 } shape { dim: 5 }
    data_filler { type: "gaussian" std: 1 } data_filler { type: "constant" value: 2 } } }
  layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
    convolution_param { num_output: 11 kernel_size: 3 stride: 2 weight_filler { type: "msra" } } }
  layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
  layer { name: "drop" type: "Dropout" bottom: "conv" top: "conv" dropout_param { dropout_ratio: 0.2 } }
  layer { name: "fc6" type: "InnerProduct" bottom: "conv" top: "fc6" inner_product_param { num_output: 45 weight_filler { type: "xavier" } } }
  layer { name: "relu6" type: "ReLU" bottom: "fc6" top: "fc6" }
  layer { name: "drop6" type: "Dropout" bottom: "fc6" top: "fc6" }
  layer { name: "fc7" type: "InnerProduct" bottom: "fc6" top: "fc7" inner_product_param { num_output: 33 bias_term: false weight_filler { type: "xavier" } } }
  layer { name: "relu7" type: "ReLU" bottom: "fc7" top: "fc7" }
  layer { name: "drop7" type: "Dropout" bottom: "fc7" top: "fc7" }
  layer { name: "fc8" type: "InnerProduct" bottom: "fc7" top: "fc8" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
  layer { name: "loss" type: "SoftmaxWithLoss" bottom: "fc8" bottom: "label" top: "loss" }
"""


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_products_that_drop_train_alike(tmp_path: Path, cuda: Backend, monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """As the same layers do with passes of their own, recorded or op by op, and when the run is resumed; without the masks' memory."""
    text = f'{RATE} momentum: 0.9 max_iter: 6 snapshot_prefix: "{tmp_path}/s"'

    def trained(count: int = 6, resume: Path | None = None, **options: Any) -> Solver:
        solver = make_solver(text, ENDING, cuda, precision=precision, **options)
        if resume:
            solver.restore(resume)
        solver.step(count)
        return solver

    fused, watched, half = trained(), trained(listeners=[Watcher()]), trained(3)
    half.snapshot()
    resumed = trained(3, tmp_path / "s_iter_3.solverstate")
    monkeypatch.setattr(type(cuda), "drops_along", False)
    plain = trained()
    found = ["drop", "drop6", "drop7"] if precision != "bfloat16" else ["drop6", "drop7"]  # the data that the convolution takes is float32
    assert [node.name for node in fused.net.graph.nodes if node.forward_fused and node.layer.type == "Dropout"] == found
    assert not [node.name for node in plain.net.graph.nodes if node.forward_fused and node.layer.type == "Dropout"]
    want = weights_of(plain)
    assert all(np.isfinite(values).all() for values in want.values())
    for solver in (fused, watched, resumed):
        for label, values in weights_of(solver).items():
            np.testing.assert_array_equal(values, want[label], label)
    masks = [sum("mask" in layer.buffers for layer in solver.net.layers) for solver in (fused, plain)]
    assert masks == [3 - len(found), 3]
