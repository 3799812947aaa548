"""Old definitions become current ones, and their errors still name the right lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from caffelite.errors import SnapshotError, SpecError, Where
from caffelite.schema import net_from_text, parse_text, pb, read_caffemodel, read_solver, solver_from_text
from caffelite.schema.places import SourceMap
from caffelite.schema.upgrade import upgrade_net
from caffelite.schema.upgrade_v1 import type_name

# The current names of every V1 type, as Caffe's layer registry spells them.
V1_NAMES = {
    "NONE": "",
    "ABSVAL": "AbsVal",
    "ACCURACY": "Accuracy",
    "ARGMAX": "ArgMax",
    "BNLL": "BNLL",
    "CONCAT": "Concat",
    "CONTRASTIVE_LOSS": "ContrastiveLoss",
    "CONVOLUTION": "Convolution",
    "DATA": "Data",
    "DECONVOLUTION": "Deconvolution",
    "DROPOUT": "Dropout",
    "DUMMY_DATA": "DummyData",
    "EUCLIDEAN_LOSS": "EuclideanLoss",
    "ELTWISE": "Eltwise",
    "EXP": "Exp",
    "FLATTEN": "Flatten",
    "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output",
    "HINGE_LOSS": "HingeLoss",
    "IM2COL": "Im2col",
    "IMAGE_DATA": "ImageData",
    "INFOGAIN_LOSS": "InfogainLoss",
    "INNER_PRODUCT": "InnerProduct",
    "LRN": "LRN",
    "MEMORY_DATA": "MemoryData",
    "MULTINOMIAL_LOGISTIC_LOSS": "MultinomialLogisticLoss",
    "MVN": "MVN",
    "POOLING": "Pooling",
    "POWER": "Power",
    "RELU": "ReLU",
    "SIGMOID": "Sigmoid",
    "SIGMOID_CROSS_ENTROPY_LOSS": "SigmoidCrossEntropyLoss",
    "SILENCE": "Silence",
    "SOFTMAX": "Softmax",
    "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "SPLIT": "Split",
    "SLICE": "Slice",
    "TANH": "TanH",
    "WINDOW_DATA": "WindowData",
    "THRESHOLD": "Threshold",
}


def _net(text: str) -> pb.NetParameter:
    """A current-format text as protobuf reads it, without any upgrade."""
    net = pb.NetParameter()
    parse_text(text, net)
    return net


def test_every_v1_type_has_its_current_name() -> None:
    assert {name: type_name(number) for name, number in pb.V1LayerParameter.LayerType.items()} == V1_NAMES


V1 = """name: "old"
layers {
  name: "d" type: DATA top: "data"
  include { phase: TRAIN }
  data_param { source: "db"
    mean_file: "m"
    crop_size: 7 scale: 0.5 mirror: true }
  transform_param { force_gray: true }
}
layers {
  name: "c" type: CONVOLUTION bottom: "data" top: "c"
  param: "w" param: ""
  blob_share_mode: PERMISSIVE
  blobs_lr: 1
  blobs_lr: 2
  weight_decay: 1 weight_decay: 0
  convolution_param {
    num_output: 3
    kernel_size: 5
  }
  loss_weight: 2
  blobs { data: 1 }
}
"""

V1_NOW = """name: "old"
layer {
  name: "d" type: "Data" top: "data" include { phase: TRAIN }
  data_param { source: "db" }
  transform_param { force_gray: true mean_file: "m" crop_size: 7 scale: 0.5 mirror: true }
}
layer {
  name: "c" type: "Convolution" bottom: "data" top: "c"
  param { name: "w" share_mode: PERMISSIVE lr_mult: 1 decay_mult: 1 }
  param { name: "" lr_mult: 2 decay_mult: 0 }
  convolution_param { num_output: 3 kernel_size: 5 }
  loss_weight: 2
  blobs { data: 1 }
}
"""


def test_v1_net() -> None:
    spec = net_from_text(V1)
    assert spec.param == _net(V1_NOW)
    assert {name for name, _ in spec.where.children} == {"name", "layer"}
    assert {name for name, _ in spec.where.child("layer").child("data_param").children} == {"source"}


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        (("layer", 1), 10, 1),
        (("layer", 1, "type"), 11, 13),
        (("layer", 1, "convolution_param", "kernel_size"), 19, 5),
        (("layer", 1, "param", 1, "lr_mult"), 15, 3),
        (("layer", 1, "param", 0, "name"), 12, 3),
        (("layer", 1, "param", 1, "decay_mult"), 16, 19),
        (("layer", 0, "transform_param", "mean_file"), 6, 5),
        (("layer", 0, "transform_param", "force_gray"), 8, 21),
        (("layer", 0, "include", 0, "phase"), 4, 13),
    ],
)
def test_v1_places(path: tuple[str | int, ...], line: int, column: int) -> None:
    assert net_from_text(V1, "old.prototxt").where.at(*path) == Where("old.prototxt", line, column)


V0 = """name: "older"
input: "data"
input_dim: 1 input_dim: 2 input_dim: 3 input_dim: 4
layers { layer { name: "p" type: "padding" pad: 2 } bottom: "data" top: "padded" }
layers {
  layer {
    name: "c" type: "conv" num_output: 6 kernelsize: 5
    group: 2 stride: 3 biasterm: false
    weight_filler { type: "xavier" }
    blobs_lr: 1 weight_decay: 0.5 scale: 2
  }
  bottom: "padded" top: "c"
}
layers { layer { name: "s" type: "softmax_loss" } bottom: "c" bottom: "label" }
"""

V0_NOW = """name: "older"
layer { name: "input" type: "Input" top: "data" input_param { shape { dim: 1 dim: 2 dim: 3 dim: 4 } } }
layer {
  name: "c" type: "Convolution" bottom: "data" top: "c"
  param { lr_mult: 1 decay_mult: 0.5 }
  convolution_param { num_output: 6 kernel_size: 5 group: 2 stride: 3 bias_term: false pad: 2 weight_filler { type: "xavier" } }
  transform_param { scale: 2 }
}
layer { name: "s" type: "SoftmaxWithLoss" bottom: "c" bottom: "label" }
"""


def test_v0_net() -> None:
    assert net_from_text(V0).param == _net(V0_NOW)


@pytest.mark.parametrize(
    ("path", "line", "column"),
    [
        (("layer", 0), 2, 1),
        (("layer", 0, "input_param", "shape"), 3, 1),
        (("layer", 1), 5, 1),
        (("layer", 1, "bottom"), 12, 3),
        (("layer", 1, "convolution_param", "kernel_size"), 7, 42),
        (("layer", 1, "convolution_param", "pad"), 4, 44),
        (("layer", 1, "convolution_param", "weight_filler", "type"), 9, 21),
        (("layer", 1, "param", 0, "decay_mult"), 10, 17),
        (("layer", 1, "transform_param", "scale"), 10, 35),
        (("layer", 2, "type"), 14, 28),
    ],
)
def test_v0_places(path: tuple[str | int, ...], line: int, column: int) -> None:
    assert net_from_text(V0, "older.prototxt").where.at(*path) == Where("older.prototxt", line, column)


@pytest.mark.parametrize(
    ("v0", "now"),
    [
        (
            'type: "pool" pool: AVE kernelsize: 3 stride: 2 pad: 1',
            'type: "Pooling" pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }',
        ),
        ('type: "lrn" local_size: 3 alpha: 2 beta: 0.5 k: 4', 'type: "LRN" lrn_param { local_size: 3 alpha: 2 beta: 0.5 k: 4 }'),
        ('type: "dropout" dropout_ratio: 0.25', 'type: "Dropout" dropout_param { dropout_ratio: 0.25 }'),
        (
            'type: "innerproduct" num_output: 4 biasterm: false bias_filler { value: 1 }',
            'type: "InnerProduct" inner_product_param { num_output: 4 bias_term: false bias_filler { value: 1 } }',
        ),
        (
            'type: "data" source: "s" batchsize: 8 rand_skip: 3 meanfile: "m" cropsize: 9 mirror: true',
            'type: "Data" data_param { source: "s" batch_size: 8 rand_skip: 3 } transform_param { mean_file: "m" crop_size: 9 mirror: true }',
        ),
        (
            'type: "images" source: "s" batchsize: 8 rand_skip: 3 shuffle_images: true new_height: 5 new_width: 6',
            'type: "ImageData" image_data_param { source: "s" batch_size: 8 rand_skip: 3 shuffle: true new_height: 5 new_width: 6 }',
        ),
        (
            'type: "window_data" source: "s" batchsize: 2 det_fg_threshold: 0.6 det_bg_threshold: 0.4 det_fg_fraction: 0.3 '
            'det_context_pad: 7 det_crop_mode: "square"',
            'type: "WindowData" window_data_param { source: "s" batch_size: 2 fg_threshold: 0.6 bg_threshold: 0.4 fg_fraction: 0.3 context_pad: 7 '
            'crop_mode: "square" }',
        ),
        ('type: "concat" concat_dim: 2', 'type: "Concat" concat_param { concat_dim: 2 }'),
        ('type: "hdf5_data" source: "s" batchsize: 2', 'type: "HDF5Data" hdf5_data_param { source: "s" batch_size: 2 }'),
        ('type: "hdf5_output" hdf5_output_param { file_name: "f" }', 'type: "HDF5Output" hdf5_output_param { file_name: "f" }'),
        ('type: "infogain_loss" source: "h"', 'type: "InfogainLoss" infogain_loss_param { source: "h" }'),
        ('type: "multinomial_logistic_loss"', 'type: "MultinomialLogisticLoss"'),
    ],
)
def test_v0_fields_move_to_their_messages(v0: str, now: str) -> None:
    assert net_from_text(f'layers {{ layer {{ name: "x" {v0} }} top: "t" }}').param == _net(f'layer {{ name: "x" {now} top: "t" }}')


def test_inputs_with_shapes_and_batch_norm() -> None:
    text = """input: "a" input: "b" input_shape { dim: 1 } input_shape { dim: 2 dim: 3 }
      layer { name: "n" type: "BatchNorm" param { lr_mult: 3 } param { decay_mult: 1 } param {} }
      layer { name: "m" type: "BatchNorm" param { lr_mult: 3 } }"""
    expected = """layer { name: "input" type: "Input" top: "a" top: "b" input_param { shape { dim: 1 } shape { dim: 2 dim: 3 } } }
      layer { name: "n" type: "BatchNorm" param { lr_mult: 0 decay_mult: 0 } param { lr_mult: 0 decay_mult: 0 } param { lr_mult: 0 decay_mult: 0 } }
      layer { name: "m" type: "BatchNorm" param { lr_mult: 3 } }"""
    spec = net_from_text(text, "n")
    assert spec.param == _net(expected)
    assert spec.where.at("layer", 1, "type") == Where("n", 2, 25)


def test_stored_nets_drop_what_a_person_must_correct() -> None:
    net = _net('input: "data" layer { name: "a" data_param { scale: 2 } }')
    upgrade_net(net, SourceMap(), strict=False)
    assert net == _net('layer { name: "a" data_param { scale: 2 } }')
    old = _net('layers { layer { type: "relu" num_output: 3 } }')
    upgrade_net(old, SourceMap(), strict=False)
    assert old == _net('layer { type: "ReLU" }')


@pytest.mark.parametrize(
    ("text", "line", "column", "message", "hint"),
    [
        ('layer { name: "a" }\nlayers { type: RELU }', 2, 1, "mixes 'layer' (current format) and 'layers'", "write every layer as"),
        ('layer { name: "a" data_param {\n scale: 2 } }', 2, 2, "'scale' inside data_param has no effect", "transform_param { scale: 2 }"),
        ("layer { data_param { mirror: true } }", 1, 22, "'mirror' inside data_param", "transform_param { mirror: true }"),
        ('layer { image_data_param { mean_file: "m" } }', 1, 28, "'mean_file' inside image_data_param", 'mean_file: "m"'),
        ("layer { window_data_param { crop_size: 3 } }", 1, 29, "'crop_size' inside window_data_param", "crop_size: 3"),
        ('input: "a"\ninput_dim: 1', 2, 1, "1 input(s) need 4 input_dim values, found 1", "four input_dim"),
        ('input: "a"', 1, 1, "1 input(s) need 4 input_dim values, found 0", None),
        ('input: "a" input: "b" input_shape {}', 1, 23, "2 input(s) but 1 input_shape(s)", None),
        ('layers { layer { type: "relu" } }\nlayers { type: RELU }', 2, 1, "no 'layer { ... }'", "one format"),
        ('layers { layer { type: "rleu" } }', 1, 18, "unknown V0 layer type 'rleu'", "relu"),
        ('layers { layer { type: "relu"\n pad: 1 } }', 2, 2, "'pad' has no meaning in a V0 layer of type 'relu'", "remove it"),
        (
            'layers { layer { type: "padding" pad: 1 } bottom: "a" top: "p" }\nlayers { layer { type: "relu" } bottom: "p" }',
            2,
            33,
            "a padding layer may feed only a conv or pool layer with one bottom",
            "remove the padding layer",
        ),
        (
            'layers { layer { type: "padding" pad: 1 } top: "p" }\nlayers { layer { type: "conv" } bottom: "p" }',
            1,
            1,
            "a padding layer needs one bottom",
            None,
        ),
    ],
)
def test_refusals(text: str, line: int, column: int, message: str, hint: str | None) -> None:
    with pytest.raises(SpecError) as caught:
        net_from_text(text, "n.prototxt")
    assert message in caught.value.message
    assert caught.value.where == Where("n.prototxt", line, column)
    assert hint is None or hint in (caught.value.hint or "")


def test_window_data_keeps_its_own_scale() -> None:
    assert net_from_text("layer { window_data_param { scale: 2 } }").param.layer[0].window_data_param.scale == 2


# --- solvers ---


@pytest.mark.parametrize(
    ("old", "new"), [("SGD", "SGD"), ("NESTEROV", "Nesterov"), ("ADAGRAD", "AdaGrad"), ("RMSPROP", "RMSProp"), ("ADADELTA", "AdaDelta"), ("ADAM", "Adam")]
)
def test_solver_type(old: str, new: str) -> None:
    spec = solver_from_text(f"base_lr: 1\nsolver_type: {old}", "s")
    assert spec.param == pb.SolverParameter(base_lr=1, type=new)
    assert spec.where.at("type") == Where("s", 2, 1)


def test_both_solver_types_are_refused() -> None:
    with pytest.raises(SpecError, match="both type") as caught:
        solver_from_text('type: "Adam"\nsolver_type: ADAM', "s")
    assert caught.value.where == Where("s", 2, 1)


@pytest.mark.parametrize("field", ["net_param", "train_net_param", "test_net_param"])
def test_inline_nets_are_upgraded(field: str) -> None:
    spec = solver_from_text(f'{field} {{\n layers {{ type: RELU\n name: "r" }} }}', "s")
    net = getattr(spec.param, field)
    net = net[0] if field.startswith("test") else net
    assert net == _net('layer { type: "ReLU" name: "r" }')
    assert spec.where.child(field).at("layer", 0, "name") == Where("s", 3, 2)


def test_snapshot_prefix_rule(tmp_path: Path) -> None:
    path = tmp_path / "my.solver.prototxt"
    path.write_text("max_iter: 1")
    assert read_solver(path).param.snapshot_prefix == str(tmp_path / "my.solver")
    path.write_text('snapshot_prefix: "some/where"')
    assert read_solver(path).param.snapshot_prefix == "some/where"
    path.write_text(f'snapshot_prefix: "{tmp_path}"')
    assert read_solver(path).param.snapshot_prefix == str(tmp_path / "my.solver")


# --- binary models ---


def test_v1_caffemodel_is_upgraded(tmp_path: Path) -> None:
    path = tmp_path / "old.caffemodel"
    path.write_bytes(_net(V1).SerializeToString())
    assert read_caffemodel(path) == _net(V1_NOW)


def test_unusable_old_caffemodel(tmp_path: Path) -> None:
    path = tmp_path / "old.caffemodel"
    path.write_bytes(_net('layers { layer { name: "x" type: "nothing" } }').SerializeToString())
    with pytest.raises(SnapshotError, match="unknown V0 layer type 'nothing'") as caught:
        read_caffemodel(path)
    assert caught.value.where == Where(str(path))
    assert caught.value.layer == "x"
