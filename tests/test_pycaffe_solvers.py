"""pycaffe's solvers, hooks and callbacks, called as programs written for pycaffe call them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import caffelite as caffe
from caffelite.errors import SpecError
from caffelite.pycaffe.settings import settings

NET = """
layer { name: "in" type: "Input" top: "data" top: "label" input_param { shape { dim: 4 dim: 3 } shape { dim: 4 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "gaussian" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST stage: "score" } }
"""


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in both of pycaffe's modes."""
    if request.param == "gpu":
        request.getfixturevalue("cuda")
    monkeypatch.setattr(settings, "gpu", request.param == "gpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a net and its solver."""
    (tmp_path / "train.prototxt").write_text(NET)
    solver = f'net: "{tmp_path}/train.prototxt" base_lr: 0.5 lr_policy: "fixed" max_iter: 6 momentum: 0.5 random_seed: 7 display: 3 '
    solver += f'test_iter: 1 test_interval: 100 test_state {{ stage: "score" }} test_initialization: false snapshot_prefix: "{tmp_path}/run"'
    (tmp_path / "solver.prototxt").write_text(solver)
    return tmp_path


def feed(net: caffe.Net) -> None:
    rng = np.random.default_rng(4)
    net.blobs["data"].data[...] = rng.normal(size=(4, 3))
    net.blobs["label"].data[...] = [0, 1, 2, 3]


def test_a_solver_shows_its_nets_and_settings(folder: Path) -> None:
    solver = caffe.SGDSolver(str(folder / "solver.prototxt"))
    assert isinstance(solver.net, caffe.Net)
    assert [net.outputs for net in solver.test_nets] == [["accuracy", "loss"]]
    assert (solver.iter, solver.lr) == (0, 0.5)
    assert (solver.param.max_iter, solver.param.display, solver.param.base_lr) == (6, 3, 0.5)
    feed(solver.net)
    solver.step(2)
    assert solver.iter == 2
    feed(solver.test_nets[0])
    np.testing.assert_array_equal(solver.test_nets[0].params["ip"][0].data, solver.net.params["ip"][0].data)
    assert solver.test_nets[0].forward()["loss"] == solver.net.forward()["loss"]


def test_a_step_by_hand_is_a_step(folder: Path) -> None:
    solvers = [caffe.get_solver(str(folder / "solver.prototxt")) for _ in range(2)]
    for solver in solvers:
        feed(solver.net)
    solvers[0].step(3)
    for _ in range(3):
        solvers[1].net.clear_param_diffs()
        solvers[1].net.forward()
        solvers[1].net.backward()
        solvers[1].apply_update()
    assert solvers[1].iter == 3
    np.testing.assert_array_equal(solvers[0].net.params["ip"][0].data, solvers[1].net.params["ip"][0].data)
    np.testing.assert_array_equal(solvers[0].net.params["ip"][0].diff, solvers[1].net.params["ip"][0].diff)  # the last step


def test_base_lr_can_be_changed(folder: Path) -> None:
    solver = caffe.get_solver(str(folder / "solver.prototxt"))
    solver.param.base_lr = 0.25
    assert solver.lr == 0.25
    feed(solver.net)
    before = np.array(solver.net.params["ip"][1].data)
    solver.net.forward()
    solver.net.backward()
    gradient = np.array(solver.net.params["ip"][1].diff)
    solver.apply_update()
    np.testing.assert_allclose(solver.net.params["ip"][1].data, before - 0.25 * gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam"])
def test_the_type_chooses_the_class_and_a_class_its_type(folder: Path, kind: str) -> None:
    path = folder / "solver.prototxt"
    text = path.read_text().replace("momentum: 0.5", "rms_decay: 0.9" if kind == "RMSProp" else "")
    path.write_text(text + f' type: "{kind}"')
    cls = getattr(caffe, f"{kind}Solver")
    chosen = caffe.get_solver(str(path))
    assert type(chosen) is cls
    path.write_text(text + ' type: "SGD"')
    named = cls(str(path))
    for solver in (chosen, named):
        feed(solver.net)
        solver.step(2)
    np.testing.assert_array_equal(chosen.net.params["ip"][0].data, named.net.params["ip"][0].data)


def test_an_unknown_type_is_refused(folder: Path) -> None:
    (folder / "solver.prototxt").write_text((folder / "solver.prototxt").read_text() + ' type: "Adm"')
    with pytest.raises(SpecError, match="unknown solver type 'Adm'\n  did you mean 'Adam'"):
        caffe.get_solver(str(folder / "solver.prototxt"))


def test_hooks_and_callbacks_are_called_in_training(folder: Path) -> None:
    solver, heard = caffe.get_solver(str(folder / "solver.prototxt")), []
    feed(solver.net)
    for name in ("before_forward", "after_forward", "before_backward", "after_backward"):
        getattr(solver.net, name)(lambda layer, name=name: heard.append((name, solver.net._layer_names[layer])))
    solver.add_callback(lambda: heard.append("start"), lambda: heard.append(float(np.abs(solver.net.params["ip"][0].diff).sum()) > 0))
    solver.step(1)
    layers = ["in", "ip", "loss"]
    forward = [(name, layer) for layer in layers for name in ("before_forward", "after_forward")]
    backward = [(name, layer) for layer in reversed(layers) for name in ("before_backward", "after_backward")]
    assert heard == ["start", *forward, *backward, True]


def test_a_callback_may_change_the_gradients(folder: Path) -> None:
    solver = caffe.get_solver(str(folder / "solver.prototxt"))
    feed(solver.net)
    before = np.array(solver.net.params["ip"][0].data)

    def clear() -> None:
        solver.net.params["ip"][0].diff[...] = 0

    solver.add_callback(lambda: None, clear)
    solver.step(2)
    np.testing.assert_array_equal(solver.net.params["ip"][0].data, before)
    assert solver.net.params["ip"][1].data.any()


def test_snapshot_restore_and_solve(folder: Path) -> None:
    path = str(folder / "solver.prototxt")
    whole, part, resumed = (caffe.get_solver(path) for _ in range(3))
    for solver in (whole, part, resumed):
        feed(solver.net)
        feed(solver.test_nets[0])
    whole.solve()
    assert whole.iter == 6
    part.step(4)
    part.snapshot()
    assert (folder / "run_iter_4.solverstate").is_file()
    resumed.restore(str(folder / "run_iter_4.solverstate"))
    assert resumed.iter == 4
    resumed.solve()
    np.testing.assert_array_equal(resumed.net.params["ip"][0].data, whole.net.params["ip"][0].data)


def test_share_weights(folder: Path) -> None:
    solver = caffe.get_solver(str(folder / "solver.prototxt"))
    other = caffe.Net(str(folder / "train.prototxt"), caffe.TEST)
    solver.share_weights(other)
    feed(solver.net)
    solver.step(1)
    np.testing.assert_array_equal(other.params["ip"][0].data, solver.net.params["ip"][0].data)


def test_a_train_net_with_borrowed_weights_is_not_trained(folder: Path) -> None:
    solver = caffe.get_solver(str(folder / "solver.prototxt"))
    feed(solver.net)
    solver.net.share_with(caffe.Net(str(folder / "train.prototxt"), caffe.TRAIN))
    with pytest.raises(SpecError, match=r"the train net uses another net's parameters .*\n  share the other way round"):
        solver.step(1)
