"""pycaffe's interface, called as programs written for pycaffe call it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import caffelite as caffe
from caffelite.errors import BackendError, SnapshotError, SpecError
from caffelite.pycaffe.settings import new_backend, settings
from caffelite.schema import pb

NET = """
name: "deploy" force_backward: true
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 3 dim: 8 dim: 8 } } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 6 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { pool: AVE global_pooling: true } }
layer { name: "ip" type: "InnerProduct" bottom: "pool" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "msra" } } }
layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" }
"""
TRAIN_NET = """
layer { name: "in" type: "Input" top: "data" top: "label" input_param { shape { dim: 4 dim: 3 } shape { dim: 4 } } }
layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "gaussian" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST stage: "score" } }
layer { name: "deep" type: "Softmax" bottom: "ip" top: "deep" include { min_level: 2 } }
"""


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs in both of pycaffe's modes."""
    if request.param == "gpu":
        request.getfixturevalue("cuda")
    monkeypatch.setattr(settings, "gpu", request.param == "gpu")
    monkeypatch.setattr(settings, "seed", 3)
    return str(request.param)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "net.prototxt").write_text(NET)
    (tmp_path / "train.prototxt").write_text(TRAIN_NET)
    return tmp_path


@pytest.fixture
def net(folder: Path) -> caffe.Net:
    return caffe.Net(str(folder / "net.prototxt"), caffe.TEST)


def fill(net: caffe.Net, rng: np.random.Generator) -> np.ndarray:
    values = rng.normal(size=net.blobs["data"].data.shape).astype(np.float32)
    net.blobs["data"].data[...] = values
    return values


def expected(net: caffe.Net, x: np.ndarray) -> np.ndarray:
    """The net's output in float64, from its weights."""
    w, b = (p.data.astype(np.float64) for p in net.params["conv"])
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), (3, 3), axis=(2, 3))
    pooled = np.maximum(np.einsum("nchwij,ocij->nohw", windows, w) + b[:, None, None], 0).mean((2, 3))
    scores = pooled @ net.params["ip"][0].data.T.astype(np.float64) + net.params["ip"][1].data
    powers = np.exp(scores - scores.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


# --- what a net shows -------------------------------------------------------------------------------------------------------


def test_names_and_order(net: caffe.Net) -> None:
    assert list(net.blobs) == net._blob_names == ["data", "conv", "pool", "ip", "prob"]
    assert list(net.params) == ["conv", "ip"]
    assert net._layer_names == list(net.layer_dict) == ["data", "conv", "relu", "pool", "ip", "prob"]
    assert [layer.type for layer in net.layers] == ["Input", "Convolution", "ReLU", "Pooling", "InnerProduct", "Softmax"]
    assert [len(layer.blobs) for layer in net.layers] == [0, 2, 0, 0, 2, 0]
    assert (net.inputs, net.outputs, net.name) == (["data"], ["prob"], "deploy")
    assert net.top_names["relu"] == net.bottom_names["relu"] == ["conv"]
    assert net.bottom_names["data"] == []


def test_loss_weights_and_outputs_of_a_training_net(folder: Path) -> None:
    net = caffe.Net(str(folder / "train.prototxt"), caffe.TRAIN)
    assert net.blob_loss_weights == {"data": 0, "label": 0, "ip": 0, "loss": 1}
    assert net.outputs == ["loss"]


def test_blobs_are_caffes(net: caffe.Net) -> None:
    blob = net.blobs["data"]
    assert (tuple(blob.shape), blob.count) == ((4, 3, 8, 8), 768)
    assert (blob.num, blob.channels, blob.height, blob.width) == (4, 3, 8, 8)
    ip = net.blobs["ip"]
    assert (ip.num, ip.channels, ip.height, ip.width) == (4, 5, 1, 1)
    for array in (blob.data, blob.diff, net.params["conv"][0].data, net.params["conv"][0].diff):
        assert array.dtype == np.float32
        assert array.flags.writeable
    assert net.params["conv"][0].data.shape == net.params["conv"][0].diff.shape == (6, 3, 3, 3)
    net.params["conv"][0].diff[...] = 2
    assert (net.params["conv"][0].diff == 2).all()
    net.clear_param_diffs()
    assert not net.params["conv"][0].diff.any()


def test_layer_types() -> None:
    assert {"Convolution", "SoftmaxWithLoss", "Data"} <= set(caffe.layer_type_list())


# --- making one ---------------------------------------------------------------------------------------------------------------


def test_the_forms_of_the_constructor(folder: Path) -> None:
    file, weights = str(folder / "train.prototxt"), str(folder / "w.caffemodel")
    first = caffe.Net(file, caffe.TRAIN)
    first.params["ip"][0].data[...] = 4
    first.save(weights)
    forms = [
        caffe.Net(file, weights, caffe.TEST),
        caffe.Net(file, caffe.TEST, weights=weights),
        caffe.Net(file, caffe.TEST, 0, None, weights),
        caffe.Net(file, phase=caffe.TEST, level=0, stages=None, weights=weights),
        caffe.Net(network_file=file, phase=caffe.TEST, weights=weights),
    ]
    assert all((net.params["ip"][0].data == 4).all() and net.outputs == ["loss"] for net in forms)
    assert caffe.Net(file, caffe.TEST, 2).outputs == ["deep", "loss"]
    assert caffe.Net(file, caffe.TEST, 0, ["score"]).outputs == ["accuracy", "loss"]
    assert caffe.Net(file, caffe.TEST, stages=["score"], level=3).outputs == ["accuracy", "deep", "loss"]


def test_wrong_arguments(folder: Path) -> None:
    with pytest.raises(SpecError, match=r"phase is None; expected caffe.TRAIN or caffe.TEST"):
        caffe.Net(str(folder / "net.prototxt"))
    with pytest.raises(SpecError, match="no such file"):
        caffe.Net(str(folder / "none.prototxt"), caffe.TEST)
    with pytest.raises(SnapshotError, match="no such file"):
        caffe.Net(str(folder / "net.prototxt"), str(folder / "none.caffemodel"), caffe.TEST)


def test_what_else_pycaffe_has_is_not_there_and_told() -> None:
    with pytest.raises(AttributeError, match=r"^pycaffe's 'draw' is not there in caffelite, which has AdaDeltaSolver, .*Net, "):
        _ = caffe.draw
    with pytest.raises(AttributeError, match=r"^module 'caffelite' has no attribute 'Ent'"):
        _ = caffe.Ent


def test_a_seed_makes_weights_repeatable(folder: Path) -> None:
    def weights() -> np.ndarray:
        return np.array(caffe.Net(str(folder / "net.prototxt"), caffe.TEST).params["conv"][0].data)

    caffe.set_random_seed(5)
    first = weights()
    np.testing.assert_array_equal(weights(), first)
    caffe.set_random_seed(6)
    assert not np.array_equal(weights(), first)
    settings.seed = None
    assert not np.array_equal(weights(), weights())


def test_modes_and_devices(cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    caffe.set_mode_cpu()
    assert new_backend().name in ("numpy", "onednn")
    caffe.set_mode_gpu()
    assert new_backend().name == "cuda"
    assert new_backend() is new_backend(), "kernels are loaded once"
    caffe.set_mode_cpu()
    monkeypatch.setattr(settings, "device", 0)
    caffe.set_device(3)
    assert new_backend().name in ("numpy", "onednn")
    with pytest.raises(BackendError, match="there is no GPU 3"):
        caffe.set_mode_gpu()
    assert new_backend().name in ("numpy", "onednn")


def test_the_environment_chooses_where_no_mode_was_set(cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "gpu", None)
    monkeypatch.setenv("CAFFELITE_BACKEND", "cuda")
    assert new_backend().name == "cuda"
    monkeypatch.setenv("CAFFELITE_BACKEND", "numpy")
    assert new_backend().name == "numpy"
    monkeypatch.setattr(settings, "gpu", True)
    assert new_backend().name == "cuda"


# --- forward ------------------------------------------------------------------------------------------------------------------


def test_forward_returns_views_of_the_outputs(net: caffe.Net, rng) -> None:
    x = fill(net, rng)
    out = net.forward()
    assert list(out) == ["prob"]
    np.testing.assert_allclose(out["prob"], expected(net, x), rtol=1e-4)
    assert np.shares_memory(out["prob"], net.blobs["prob"].data)
    net.params["ip"][1].data[:] = [9, 0, 0, 0, 0]
    net.forward()
    np.testing.assert_allclose(out["prob"], expected(net, x), rtol=1e-4)  # the same memory


def test_forward_with_inputs_and_more_blobs(net: caffe.Net, rng) -> None:
    x = rng.normal(size=(4, 3, 8, 8))
    out = net.forward(blobs=["conv", "data"], data=x)
    assert set(out) == {"prob", "conv", "data"}
    np.testing.assert_array_equal(out["data"], x.astype(np.float32))
    with pytest.raises(SpecError, match="3 item\\(s\\) given, the blob has room for 4"):
        net.forward(data=x[:3])
    with pytest.raises(SpecError, match="values given for date, the net's inputs are data"):
        net.forward(date=x)
    with pytest.raises(SpecError, match=r"values of shape \(4, 8, 8, 3\) do not fit the blob's shape \(4, 3, 8, 8\)"):
        net.forward(data=x.transpose(0, 2, 3, 1))


def test_partial_passes_include_both_ends(net: caffe.Net, rng) -> None:
    fill(net, rng)
    out = net.forward(end="pool")
    assert list(out) == ["pool"]
    assert not net.blobs["ip"].data.any()
    net.blobs["pool"].data[...] = 1
    out = net.forward(start="ip", end="ip")
    np.testing.assert_allclose(out["ip"][0], net.params["ip"][0].data.sum(1) + net.params["ip"][1].data, rtol=1e-5)
    with pytest.raises(SpecError, match="the net has no layer 'fc'\n  its layers: data, conv"):
        net.forward(start="fc")


def test_forward_all_pads_and_trims(net: caffe.Net, rng) -> None:
    x = rng.normal(size=(10, 3, 8, 8)).astype(np.float32)
    out = net.forward_all(blobs=["pool"], data=x)
    assert out["pool"].shape == (10, 6, 1, 1)
    np.testing.assert_allclose(out["prob"], expected(net, x), rtol=1e-4)
    with pytest.raises(SpecError, match="no values are given\n  name them by input: data"):
        net.forward_all()


def test_forward_all_with_a_loss(folder: Path, rng) -> None:
    net = caffe.Net(str(folder / "train.prototxt"), caffe.TRAIN)
    x, t = rng.normal(size=(8, 3)), np.arange(8) % 5
    losses = net.forward_all(data=x, label=t)["loss"]
    assert losses.shape == (2,)
    for i in range(2):
        net.forward(data=x[4 * i : 4 * i + 4], label=t[4 * i : 4 * i + 4])
        assert net.blobs["loss"].data == losses[i]


# --- backward -----------------------------------------------------------------------------------------------------------------


def test_backward_of_a_chosen_output(net: caffe.Net, rng) -> None:
    x = fill(net, rng)
    net.forward()
    dtop = np.zeros((4, 5))
    dtop[:, 2] = 1
    got = net.backward(prob=dtop, diffs=["pool"])
    assert set(got) == {"data", "pool"}
    gradient, step = np.array(got["data"]), 1e-4
    for place in [(0, 0, 0, 0), (1, 2, 3, 4), (3, 1, 7, 7)]:
        sides = []
        for sign in (1, -1):
            moved = x.astype(np.float64)
            moved[place] += sign * step
            sides.append(expected(net, moved)[place[0], 2])
        assert gradient[place] == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=2e-3, abs=1e-6)
    with pytest.raises(SpecError, match="a gradient is given for 'ip', which is no output"):
        net.backward(ip=dtop)


def test_backward_from_a_layer_in_the_middle(net: caffe.Net, rng) -> None:
    fill(net, rng)
    net.forward(end="ip")
    net.blobs["ip"].diff[...] = net.blobs["ip"].data  # as in DeepDream
    got = net.backward(start="ip", end="ip")
    assert list(got) == ["pool"]
    want = net.blobs["ip"].data.astype(np.float64) @ net.params["ip"][0].data
    np.testing.assert_allclose(got["pool"].reshape(4, 6), want, rtol=1e-4, atol=1e-6)
    assert not net.blobs["data"].diff.any()
    twice = net.backward(start="ip", ip=2 * net.blobs["ip"].data)
    np.testing.assert_allclose(net.blobs["pool"].diff.reshape(4, 6), 2 * want, rtol=1e-4, atol=1e-6)
    assert twice["data"].any()


def test_parameter_gradients_add_up_until_cleared(folder: Path, rng) -> None:
    net = caffe.Net(str(folder / "train.prototxt"), caffe.TRAIN)
    net.forward(data=rng.normal(size=(4, 3)), label=np.array([0, 1, 2, 3]))
    net.backward()
    once = np.array(net.params["ip"][0].diff)
    assert once.any()
    net.backward()
    np.testing.assert_allclose(net.params["ip"][0].diff, 2 * once, rtol=1e-5)
    net.clear_param_diffs()
    net.backward()
    np.testing.assert_array_equal(net.params["ip"][0].diff, once)


def test_forward_backward_all(net: caffe.Net, rng) -> None:
    x, d = rng.normal(size=(6, 3, 8, 8)).astype(np.float32), rng.normal(size=(6, 5)).astype(np.float32)
    outs, grads = net.forward_backward_all(blobs=["ip"], diffs=["pool"], data=x, prob=d)
    assert {name: a.shape[0] for name, a in {**outs, **grads}.items()} == {"prob": 6, "ip": 6, "data": 6, "pool": 6}
    net.forward(data=x[:4])
    np.testing.assert_array_equal(net.backward(prob=d[:4])["data"], grads["data"][:4])


# --- shapes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (7, 3, 8, 8), (2, 3, 12, 5), (4, 3, 3, 3)])
def test_reshape(net: caffe.Net, rng, shape: tuple[int, ...]) -> None:
    weights = net.params["conv"][0].data
    before = np.array(weights)
    net.blobs["data"].reshape(*shape)
    x = fill(net, rng)  # before the net follows, as pycaffe's programs do
    assert x.shape == shape
    net.reshape()
    assert tuple(net.blobs["conv"].shape) == (shape[0], 6, shape[2] - 2, shape[3] - 2)
    out = net.forward()["prob"]
    np.testing.assert_allclose(out, expected(net, x), rtol=1e-4)
    assert net.backward(prob=np.ones((shape[0], 5)))["data"].shape == shape
    np.testing.assert_array_equal(weights, before)
    weights[...] *= 2  # still the net's own
    np.testing.assert_allclose(net.forward()["prob"], expected(net, x), rtol=1e-4)


def test_forward_follows_a_reshaped_input_by_itself(net: caffe.Net, rng) -> None:
    net.blobs["data"].reshape(2, 3, 9, 9)
    x = rng.normal(size=(2, 3, 9, 9)).astype(np.float32)
    np.testing.assert_allclose(net.forward(data=x)["prob"], expected(net, x), rtol=1e-4)


def test_reshape_to_the_same_shape_changes_nothing(net: caffe.Net, rng) -> None:
    fill(net, rng)
    net.forward()
    data, prob = net.blobs["data"].data, net.blobs["prob"].data
    net.blobs["data"].reshape(4, 3, 8, 8)
    net.reshape()
    assert net.blobs["data"].data is data
    assert net.blobs["prob"].data is prob


def test_inputs_can_be_reshaped_one_after_the_other(folder: Path, rng) -> None:
    net = caffe.Net(str(folder / "train.prototxt"), caffe.TRAIN)
    x, t = rng.normal(size=(9, 3)), np.arange(9) % 5
    net.blobs["data"].reshape(9, 3)
    net.blobs["label"].reshape(9)
    net.reshape()
    loss = net.forward(data=x, label=t)["loss"]
    scores = x @ net.params["ip"][0].data.T.astype(np.float64) + net.params["ip"][1].data
    assert loss == pytest.approx((np.log(np.exp(scores).sum(1)) - scores[np.arange(9), t]).mean(), rel=1e-5)


def test_a_shape_that_does_not_fit_leaves_the_net_usable(net: caffe.Net, rng) -> None:
    x = fill(net, rng)
    net.blobs["data"].reshape(4, 5, 8, 8)
    with pytest.raises(SpecError, match="layer 'conv': its parameters would change shape"):
        net.reshape()
    with pytest.raises(SpecError, match="layer 'conv'"):
        net.forward()
    net.blobs["data"].reshape(4, 3, 8, 8)
    np.testing.assert_allclose(net.forward(data=x)["prob"], expected(net, x), rtol=1e-4)
    with pytest.raises(SpecError, match=r"blob 'conv': only a net input can be reshaped.*\n  inputs: data"):
        net.blobs["conv"].reshape(4, 6, 2, 2)
    with pytest.raises(SpecError, match="has a size below 1"):
        net.blobs["data"].reshape(0, 3, 8, 8)


def test_an_inner_products_copy_comes_and_goes_with_the_shape(folder: Path, rng) -> None:
    text = 'force_backward: true layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 4 dim: 48 } } }'
    text += 'layer { name: "ip" type: "InnerProduct" bottom: "data" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "msra" } } }'
    (folder / "flat.prototxt").write_text(text)
    net = caffe.Net(str(folder / "flat.prototxt"), caffe.TEST)
    x = rng.normal(size=(4, 48)).astype(np.float32)
    w, b = net.params["ip"][0].data.astype(np.float64), net.params["ip"][1].data
    for shape in ((4, 3, 4, 4), (2, 48, 1, 1), (3, 3, 4, 4), (4, 12, 2, 2), (4, 48)):
        rows = x[: shape[0]]
        net.blobs["data"].reshape(*shape)
        np.testing.assert_allclose(net.forward(data=rows.reshape(shape))["ip"], rows @ w.T + b, rtol=1e-4, atol=1e-5)
    net.blobs["data"].reshape(4, 6, 2, 2)
    with pytest.raises(SpecError, match="layer 'ip': its parameters would change shape"):
        net.reshape()
    net.blobs["data"].reshape(4, 48)
    np.testing.assert_allclose(net.forward(data=x)["ip"], x @ w.T + b, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net.backward(ip=np.ones((4, 5)))["data"], np.tile(w.sum(0), (4, 1)), rtol=1e-4, atol=1e-5)


# --- weights -------------------------------------------------------------------------------------------------------------------


def test_save_is_binary_whatever_the_name(net: caffe.Net, folder: Path) -> None:
    net.save(str(folder / "w.h5"))
    message = pb.NetParameter.FromString((folder / "w.h5").read_bytes())
    assert [len(layer.blobs) for layer in message.layer] == [0, 2, 0, 0, 2, 0]


def test_hdf5_both_ways(net: caffe.Net, folder: Path) -> None:
    pytest.importorskip("h5py")
    net.save_hdf5(str(folder / "w.caffemodel"))
    before = np.array(net.params["conv"][0].data)
    net.params["conv"][0].data[...] = 0
    net.load_hdf5(str(folder / "w.caffemodel"))
    np.testing.assert_array_equal(net.params["conv"][0].data, before)


def test_share_with(net: caffe.Net, folder: Path, rng) -> None:
    other = caffe.Net(str(folder / "net.prototxt"), caffe.TEST)
    other.share_with(net)
    net.params["conv"][0].data[...] = rng.normal(size=(6, 3, 3, 3))
    np.testing.assert_array_equal(other.params["conv"][0].data, net.params["conv"][0].data)
    x = fill(other, rng)
    np.testing.assert_allclose(other.forward()["prob"], expected(net, x), rtol=1e-4)
