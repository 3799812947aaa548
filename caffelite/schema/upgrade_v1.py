"""V1 nets (`layers { type: CONVOLUTION }`) to the current form (`layer { type: "Convolution" }`)."""

from __future__ import annotations

from caffelite import caffelite_pb2 as pb
from caffelite.schema.moves import Draft
from caffelite.schema.places import SourceMap

_SPECIAL_NAMES = {
    "NONE": "",
    "ABSVAL": "AbsVal",
    "ARGMAX": "ArgMax",
    "BNLL": "BNLL",
    "HDF5_DATA": "HDF5Data",
    "HDF5_OUTPUT": "HDF5Output",
    "IM2COL": "Im2col",
    "LRN": "LRN",
    "MVN": "MVN",
    "RELU": "ReLU",
    "SOFTMAX_LOSS": "SoftmaxWithLoss",
    "TANH": "TanH",
}
# Data layers whose transformation fields stood in their own message.
_DATA_PARAMS = {"DATA": "data_param", "IMAGE_DATA": "image_data_param", "WINDOW_DATA": "window_data_param"}
_TRANSFORM_FIELDS = ("scale", "mean_file", "crop_size", "mirror")
# Per blob: the V1 list and the field of `param` that its entries become.
_PER_BLOB = (("param", "name"), ("blob_share_mode", "share_mode"), ("blobs_lr", "lr_mult"), ("weight_decay", "decay_mult"))
_NOT_COPIED = {"type", "layer", *(name for name, _ in _PER_BLOB)}


def type_name(value: int) -> str:
    """Caffe's current name of a V1 layer type: CONVOLUTION is "Convolution", SOFTMAX_LOSS "SoftmaxWithLoss"."""
    name: str = pb.V1LayerParameter.LayerType.Name(value)
    return _SPECIAL_NAMES.get(name, "".join(part.capitalize() for part in name.split("_")))


def upgrade_v1(net: Draft) -> None:
    """Turns every `layers` entry into a `layer`."""
    for index, old in enumerate(net.message.layers):
        source = Draft(old, net.places.child("layers", index))
        _move_transformation(source)
        target = Draft(net.message.layer.add(), SourceMap(source.places.where))
        _upgrade_layer(source, target)
        net.places.children[("layer", index)] = target.places
        old.Clear()  # its weights are copied; holding both doubles the peak memory
    net.drop("layers")


def _move_transformation(layer: Draft) -> None:
    name = _DATA_PARAMS.get(pb.V1LayerParameter.LayerType.Name(layer.message.type))
    if name is None or not layer.message.HasField(name):
        return
    param = Draft(getattr(layer.message, name), layer.places.child(name))
    for field in _TRANSFORM_FIELDS:
        if param.message.HasField(field):
            layer.inside("transform_param", param.places.child(field)).copy(param, field)
            param.drop(field)


def _upgrade_layer(old: Draft, new: Draft) -> None:
    for field, _ in old.message.ListFields():
        if field.name not in _NOT_COPIED:
            new.copy(old, field.name)
    if old.message.HasField("type"):
        new.put("type", type_name(old.message.type), old.places.child("type"))
    for name, target in _PER_BLOB:
        for index, value in enumerate(getattr(old.message, name)):
            place = old.places.child(name, index)
            new.entry("param", index, place).put(target, value, place)
