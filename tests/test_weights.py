"""Weights between nets and files: what is copied where, what is refused, .caffemodel and HDF5."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from caffelite import backends
from caffelite.errors import CaffeliteError, SnapshotError
from caffelite.net import Net
from caffelite.schema import array_to_blob, net_from_text, pb, read_caffemodel
from caffelite.weights import left_to_fillers

h5py = pytest.importorskip("h5py")

HEAD = """
name: "n" layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 2 dim: 3 dim: 4 dim: 4 } shape { dim: 2 dim: 5 } } }
layer { name: "conv" type: "Convolution" bottom: "x" top: "conv" convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "gaussian" } } }
"""
TEXT = (
    HEAD
    + """
layer { name: "bn" type: "BatchNorm" bottom: "conv" top: "conv" }
layer { name: "relu" type: "ReLU" bottom: "conv" top: "conv" }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 5 weight_filler { type: "gaussian" } } }
layer { name: "loss" type: "EuclideanLoss" bottom: "ip" bottom: "t" top: "loss" include { phase: TRAIN } }
"""
)
TIED = """
layer { name: "in" type: "Input" top: "x" top: "t" input_param { shape { dim: 2 dim: 3 } } }
layer { name: "a" type: "InnerProduct" bottom: "x" top: "a" param { name: "w" } param { name: "b" } inner_product_param { num_output: 3 } }
layer { name: "b" type: "InnerProduct" bottom: "a" top: "b" param { name: "w" } param { lr_mult: 2 } inner_product_param { num_output: 3 } }
layer { name: "c" type: "InnerProduct" bottom: "b" top: "c" param { name: "w" } param { name: "b" } inner_product_param { num_output: 3 } }
layer { name: "loss" type: "EuclideanLoss" bottom: "c" bottom: "t" top: "loss" }
"""


def net(text: str = TEXT, phase: int = pb.TRAIN, seed: int = 1) -> Net:
    return Net(net_from_text(text, "net.prototxt"), phase=phase, backend=backends.get("numpy"), seed=seed)


def source(**layers: list[np.ndarray]) -> pb.NetParameter:
    """A NetParameter with these layers, each with its blobs."""
    message = pb.NetParameter()
    for name, arrays in layers.items():
        layer = message.layer.add(name=name)
        for array in arrays:
            array_to_blob(array, layer.blobs.add())
    return message


def legacy(values: np.ndarray, **shape: int) -> pb.BlobProto:
    return pb.BlobProto(data=values.ravel(), **shape)


def master(made: Net, name: str, index: int = 0) -> np.ndarray:
    return np.array(made.params[name][index].master)


def refused(made: Net, message: pb.NetParameter) -> str:
    """The error; nothing may have been copied."""
    before = np.array(made.arena.master)
    with pytest.raises(SnapshotError) as caught:
        made.copy_from(message)
    np.testing.assert_array_equal(made.arena.master, before)
    assert caught.value.layer
    return str(caught.value)


# --- copying ---------------------------------------------------------------------------------------------------------------


def test_blobs_are_copied_by_layer_name(rng) -> None:
    made, w, b = net(), rng.normal(size=(5, 16)), rng.normal(size=5)
    kept = master(made, "conv")
    assert made.copy_from(source(other=[w], ip=[w, b], relu=[])) == ["other"]
    np.testing.assert_array_equal(master(made, "ip"), w.astype(np.float32))
    np.testing.assert_array_equal(master(made, "ip", 1), b.astype(np.float32))
    np.testing.assert_array_equal(master(made, "conv"), kept)


def test_layers_that_find_no_weights_are_named(rng) -> None:
    made = net()
    made.copy_from(source(ip=[np.ones((5, 16)), np.ones(5)]))
    assert left_to_fillers(made) == "no weights for conv, bn: left to the filler"
    made.copy_from(source(conv=[np.ones((4, 3, 3, 3)), np.ones(4)], bn=[np.ones(4), np.ones(4), np.ones(1)]))
    assert left_to_fillers(made) is None


def test_layers_that_own_no_weights_need_none(rng) -> None:
    made = net(TIED)
    made.copy_from(source(a=[np.ones((3, 3)), np.ones(3)], b=[np.ones((3, 3)), np.ones(3)]))
    assert left_to_fillers(made) is None  # c has only what a owns


def test_a_spatial_weight_keeps_its_meaning(rng) -> None:
    made, w = net(), rng.normal(size=(4, 3, 3, 3)).astype(np.float32)
    made.copy_from(source(conv=[w, np.zeros(4)]))
    x = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    made.backend.from_host(x, made.blobs["x"].data)
    made.forward(0, 2)
    want = [[(w[o].astype(np.float64) * x[0, :, i : i + 3, j : j + 3]).sum() for i in (0, 1) for j in (0, 1)] for o in range(4)]
    np.testing.assert_allclose(np.array(made.blobs["conv"].data[0]).reshape(4, 4), want, rtol=1e-4, atol=1e-5)


def test_stored_gradients_are_copied_too(rng) -> None:
    made, message, grad = net(), source(ip=[np.ones((5, 16)), np.ones(5)]), rng.normal(size=(5, 16)).astype(np.float32)
    array_to_blob(np.ones((5, 16)), message.layer[0].blobs[0], grad)
    made.copy_from(message)
    np.testing.assert_array_equal(made.params["ip"][0].diff, grad)


@pytest.mark.parametrize(
    ("index", "shape", "fits"),
    [
        (0, {"num": 1, "channels": 1, "height": 5, "width": 16}, True),
        (0, {"num": 5, "channels": 16, "height": 1, "width": 1}, False),
        (0, {"num": 1, "channels": 1, "height": 16, "width": 5}, False),
        (1, {"num": 1, "channels": 1, "height": 1, "width": 5}, True),
        (1, {"num": 5, "channels": 1, "height": 1, "width": 1}, False),
    ],
)
def test_old_shapes_align_from_the_last_axis(rng, index: int, shape: dict, fits: bool) -> None:
    made, arrays = net(), [rng.normal(size=(5, 16)), rng.normal(size=5)]
    message = source(ip=arrays)
    message.layer[0].blobs[index].CopyFrom(legacy(arrays[index], **shape))
    if fits:
        made.copy_from(message)
        np.testing.assert_array_equal(master(made, "ip", index), arrays[index].astype(np.float32))
    else:
        assert f"has shape {tuple(shape.values())} for parameter {index}, the net has" in refused(made, message)


def test_double_values_come_first(rng) -> None:
    made, message = net(), source(ip=[np.zeros((5, 16)), np.zeros(5)])
    message.layer[0].blobs[1].double_data.extend([1, 2, 3, 4, 5])
    made.copy_from(message)
    assert master(made, "ip", 1).tolist() == [1, 2, 3, 4, 5]


def test_what_does_not_fit_is_refused_and_nothing_is_copied() -> None:
    w, b = np.ones((5, 16)), np.ones(5)
    good = {"conv": [np.ones((4, 3, 3, 3)), np.ones(4)]}
    assert "layer 'ip': the given message has 1 parameter blob(s) for this layer, the net has 2" in refused(net(), source(**good, ip=[w]))
    assert "layer 'relu': the given message has 1 parameter blob(s) for this layer, the net has 0" in refused(net(), source(**good, relu=[b]))
    text = refused(net(), source(**good, ip=[w.T, b]))
    assert "layer 'ip': the given message has shape (16, 5) for parameter 0, the net has (5, 16)\n" in text
    assert "give it another name" in text
    short = source(**good, ip=[w, b])
    del short.layer[1].blobs[0].data[3:]
    assert "layer 'ip': the given message holds 3 values for parameter 0 of shape (5, 16)" in refused(net(), short)
    short = source(**good, ip=[w, b])
    short.layer[1].blobs[1].diff.append(2)
    assert "holds 1 values for parameter 1 of shape (5,)" in refused(net(), short)


def test_weights_of_another_net_are_refused() -> None:
    names = {f"other{i}": [np.ones(2)] for i in range(4)}
    with pytest.raises(
        SnapshotError, match=r"the given message has no weights for any layer of the net: it has other0, other1, other2, \.\.\., the net has conv, bn, ip"
    ):
        net().copy_from(source(**names))
    assert net().copy_from(source(**names, ip=[np.ones((5, 16)), np.ones(5)])) == list(names)
    assert net().copy_from(source(relu=[], pool=[])) == ["pool"]


def test_with_shared_parameters_the_last_layer_wins() -> None:
    made = net(TIED)
    message = source(a=[np.full((3, 3), 1), np.full(3, 1)], b=[np.full((3, 3), 2), np.full(3, 2)], c=[np.full((3, 3), 3), np.full(3, 3)])
    made.copy_from(message)
    assert [float(p.master.max()) for p in made.learnable] == [3, 3, 2]


# --- .caffemodel ---------------------------------------------------------------------------------------------------------------


def test_a_saved_net_is_what_runs(tmp_path: Path) -> None:
    made = net()
    made.save(tmp_path / "w.caffemodel")
    message = pb.NetParameter.FromString((tmp_path / "w.caffemodel").read_bytes())
    assert message.name == "n"
    assert [layer.name for layer in message.layer] == ["in", "conv", "bn", "relu", "ip", "loss"]
    assert [len(layer.blobs) for layer in message.layer] == [0, 2, 3, 0, 2, 0]
    assert all(layer.phase == pb.TRAIN for layer in message.layer)
    assert message.layer[5].include[0].phase == pb.TRAIN
    assert list(message.layer[5].loss_weight) == [1]
    assert [p.lr_mult for p in message.layer[2].param] == [0, 0, 0]
    blob = message.layer[1].blobs[0]
    assert list(blob.shape.dim) == [4, 3, 3, 3]
    np.testing.assert_array_equal(np.array(blob.data, np.float32).reshape(4, 3, 3, 3), master(made, "conv"))
    assert not blob.diff
    again = net(seed=2)
    assert again.copy_from(tmp_path / "w.caffemodel") == []
    np.testing.assert_array_equal(again.arena.master, made.arena.master)


def test_splits_and_weights_of_losses_are_saved_as_in_effect(tmp_path: Path) -> None:
    made = net(TEXT.replace('top: "loss"', "").replace("include", "loss_weight: 0 include") + 'layer { name: "more" type: "Silence" bottom: "ip" }')
    made.save(tmp_path / "w.caffemodel")
    layers = {layer.name: layer for layer in read_caffemodel(tmp_path / "w.caffemodel").layer}
    assert list(layers["ip_ip_0_split"].top) == ["ip_ip_0_split_0", "ip_ip_0_split_1"]
    assert list(layers["loss"].top) == []
    assert list(layers["loss"].loss_weight) == [0]


def test_several_files_in_order_and_a_name_with_a_comma(tmp_path: Path) -> None:
    made = net()
    for i, name in enumerate(("one.caffemodel", "two.caffemodel", "with,comma.caffemodel")):
        made.backend.fill(made.arena.master, float(i + 1))
        made.save(tmp_path / name)
    other = net(seed=4)
    other.copy_from(f"{tmp_path}/two.caffemodel, {tmp_path}/one.caffemodel")
    assert (np.array(other.params["ip"][0].master) == 1).all()
    other.copy_from(tmp_path / "with,comma.caffemodel")
    assert (np.array(other.params["ip"][0].master) == 3).all()
    with pytest.raises(SnapshotError, match=r"none.caffemodel: no such file"):
        other.copy_from(f"{tmp_path}/one.caffemodel,{tmp_path}/none.caffemodel")
    assert (np.array(other.params["ip"][0].master) == 3).all()


# --- HDF5 ------------------------------------------------------------------------------------------------------------------


def test_hdf5_holds_a_group_for_each_layer_and_own_parameters_alone(tmp_path: Path, rng) -> None:
    made = net(TIED)
    for name in ("x", "t"):
        made.backend.from_host(rng.normal(size=(2, 3)), made.blobs[name].data)
    made.zero_grads()
    made.forward()
    made.backward()
    made.save(tmp_path / "w.h5", diff=True)
    with h5py.File(tmp_path / "w.h5") as file:
        assert sorted(file) == ["data", "diff"]
        assert {name: sorted(group) for name, group in file["data"].items()} == {"in": [], "a": ["0", "1"], "b": ["1"], "c": [], "loss": []}
        assert {name: sorted(group) for name, group in file["diff"].items()} == {"in": [], "a": ["0", "1"], "b": ["0", "1"], "c": ["0", "1"], "loss": []}
        assert file["data/a/0"].dtype == np.float32
        np.testing.assert_array_equal(file["data/a/0"], master(made, "a"))
        np.testing.assert_array_equal(file["diff/c/0"], made.learnable[0].diff)
    again = net(TIED, seed=7)
    assert again.copy_from(tmp_path / "w.h5") == []
    np.testing.assert_array_equal(again.arena.master, made.arena.master)
    np.testing.assert_array_equal(again.arena.grad, made.arena.grad)


def test_hdf5_of_caffe_is_read_whatever_its_name(tmp_path: Path, rng) -> None:
    w, b = rng.normal(size=(5, 16)), np.arange(5)
    with h5py.File(tmp_path / "w.caffemodel", "w") as file:
        file["data/ip/0"], file["data/ip/1"], file["data/unknown/0"] = w, b, w
        file.create_group("data/relu")
    made = net()
    assert made.copy_from(str(tmp_path / "w.caffemodel")) == ["unknown"]
    np.testing.assert_array_equal(master(made, "ip"), w.astype(np.float32))
    assert master(made, "ip", 1).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("datasets", "said"),
    [
        ({"data/ip/0": np.ones((1, 1, 5, 16)), "data/ip/1": np.ones(5)}, "has shape (1, 1, 5, 16) for parameter 0, the net has (5, 16)"),
        ({"data/ip/0": np.ones((5, 16))}, "has 1 parameter blob(s) for this layer, the net has 2"),
        ({"data/ip/1": np.ones(5)}, "has shape () for parameter 0, the net has (5, 16)"),
        ({"data/ip/0": np.ones((5, 16)), "data/ip/1": np.ones(5), "data/ip/2": np.ones(5)}, "has 3 parameter blob(s) for this layer, the net has 2"),
        ({"data": np.ones((5, 3)), "label": np.ones(5)}, "has no group 'data' with a group for each layer: it is not a Caffe model"),
        ({"iter": np.ones(1)}, "has no group 'data' with a group for each layer: it is not a Caffe model"),
        ({"data/ip": np.ones(5)}, "has no group 'data' with a group for each layer: it is not a Caffe model"),
        ({"data/ip/kernel": np.ones((5, 16))}, "cannot be read as a Caffe model: invalid literal for int"),
        ({"data/ip/99999999": np.ones(5)}, "cannot be read as a Caffe model: layer 'ip' has a blob number 99999999"),
        ({"data/ip/0": "text", "data/ip/1": np.ones(5)}, "cannot be read as a Caffe model: "),
        ({"data/ip/0/deep": np.ones(5), "data/ip/1": np.ones(5)}, "cannot be read as a Caffe model: "),
    ],
)
def test_hdf5_that_does_not_fit_is_refused(tmp_path: Path, datasets: dict, said: str) -> None:
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for name, value in datasets.items():
            file[name] = value
    with pytest.raises(SnapshotError) as caught:
        net().copy_from(tmp_path / "w.h5")
    assert said in str(caught.value)
    assert str(tmp_path / "w.h5") in str(caught.value)


def test_damaged_hdf5_is_refused(tmp_path: Path) -> None:
    net().save(tmp_path / "w.h5")
    whole = (tmp_path / "w.h5").read_bytes()
    for length in (8, 100, len(whole) // 2, len(whole) - 100):
        (tmp_path / "cut.h5").write_bytes(whole[:length])
        with pytest.raises(SnapshotError, match=r"cut\.h5"):
            net().copy_from(tmp_path / "cut.h5")
    rng = np.random.default_rng(3)
    for _ in range(60):  # whatever is read of it, nothing but a CaffeliteError may come out
        broken = np.frombuffer(whole, np.uint8).copy()
        broken[rng.integers(8, len(whole), 40)] = rng.integers(0, 256, 40)
        (tmp_path / "bad.h5").write_bytes(broken.tobytes())
        try:
            net().copy_from(tmp_path / "bad.h5")
        except CaffeliteError as error:
            assert str(tmp_path) in str(error) or error.layer  # noqa: PT017


def test_a_layer_name_with_a_slash_cannot_go_to_hdf5(tmp_path: Path) -> None:
    with pytest.raises(SnapshotError, match="layer name 'in/conv' has a slash"):
        net(TEXT.replace('name: "conv"', 'name: "in/conv"')).save(tmp_path / "w.h5")
    assert list(tmp_path.iterdir()) == []


FULL = """
import resource, sys
from pathlib import Path
from caffelite.errors import SnapshotError
from caffelite.hdf5 import write_hdf5
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write_hdf5(Path(sys.argv[1]), lambda file: file.create_dataset("data", data=b"x" * 20000))
except SnapshotError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [500, 5000])
def test_a_quota_reached_in_mid_write_leaves_the_last_file_whole(tmp_path: Path, limit: int) -> None:
    path = tmp_path / "w.h5"
    net().save(path)
    whole = path.read_bytes()
    result = subprocess.run([sys.executable, "-c", FULL, str(path), str(limit)], capture_output=True, text=True, check=True)
    assert result.stdout == f"cannot write {path}: File too large\n  the disk or quota is full: make room; files written before are whole\n"
    assert path.read_bytes() == whole
    assert list(tmp_path.iterdir()) == [path]
