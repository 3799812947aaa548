"""V0 nets (`layers { layer { type: "conv" kernelsize: 3 } }`) to V1."""

from __future__ import annotations

from typing import Any

from caffelite import caffelite_pb2 as pb
from caffelite.errors import SpecError
from caffelite.schema.moves import Draft
from caffelite.schema.places import SourceMap

_TYPES = {
    "accuracy": "ACCURACY",
    "bnll": "BNLL",
    "concat": "CONCAT",
    "conv": "CONVOLUTION",
    "data": "DATA",
    "dropout": "DROPOUT",
    "euclidean_loss": "EUCLIDEAN_LOSS",
    "flatten": "FLATTEN",
    "hdf5_data": "HDF5_DATA",
    "hdf5_output": "HDF5_OUTPUT",
    "im2col": "IM2COL",
    "images": "IMAGE_DATA",
    "infogain_loss": "INFOGAIN_LOSS",
    "innerproduct": "INNER_PRODUCT",
    "lrn": "LRN",
    "multinomial_logistic_loss": "MULTINOMIAL_LOGISTIC_LOSS",
    "pool": "POOLING",
    "relu": "RELU",
    "sigmoid": "SIGMOID",
    "softmax": "SOFTMAX",
    "softmax_loss": "SOFTMAX_LOSS",
    "split": "SPLIT",
    "tanh": "TANH",
    "window_data": "WINDOW_DATA",
}
_PARAMS = {
    "concat": "concat_param",
    "conv": "convolution_param",
    "data": "data_param",
    "dropout": "dropout_param",
    "hdf5_data": "hdf5_data_param",
    "images": "image_data_param",
    "infogain_loss": "infogain_loss_param",
    "innerproduct": "inner_product_param",
    "lrn": "lrn_param",
    "pool": "pooling_param",
    "window_data": "window_data_param",
}
# V0 field: its current name, and the types that read it.
_FIELDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "num_output": ("num_output", ("conv", "innerproduct")),
    "biasterm": ("bias_term", ("conv", "innerproduct")),
    "weight_filler": ("weight_filler", ("conv", "innerproduct")),
    "bias_filler": ("bias_filler", ("conv", "innerproduct")),
    "pad": ("pad", ("conv", "pool")),
    "kernelsize": ("kernel_size", ("conv", "pool")),
    "group": ("group", ("conv",)),
    "stride": ("stride", ("conv", "pool")),
    "pool": ("pool", ("pool",)),
    "dropout_ratio": ("dropout_ratio", ("dropout",)),
    "local_size": ("local_size", ("lrn",)),
    "alpha": ("alpha", ("lrn",)),
    "beta": ("beta", ("lrn",)),
    "k": ("k", ("lrn",)),
    "source": ("source", ("data", "hdf5_data", "images", "window_data", "infogain_loss")),
    "batchsize": ("batch_size", ("data", "hdf5_data", "images", "window_data")),
    "rand_skip": ("rand_skip", ("data", "images")),
    "shuffle_images": ("shuffle", ("images",)),
    "new_height": ("new_height", ("images",)),
    "new_width": ("new_width", ("images",)),
    "concat_dim": ("concat_dim", ("concat",)),
    "det_fg_threshold": ("fg_threshold", ("window_data",)),
    "det_bg_threshold": ("bg_threshold", ("window_data",)),
    "det_fg_fraction": ("fg_fraction", ("window_data",)),
    "det_context_pad": ("context_pad", ("window_data",)),
    "det_crop_mode": ("crop_mode", ("window_data",)),
}
_TRANSFORM = {"scale": "scale", "meanfile": "mean_file", "cropsize": "crop_size", "mirror": "mirror"}
_AS_THEY_ARE = ("name", "blobs", "blobs_lr", "weight_decay")
_KEPT_IN_NET = ("name", "input", "input_dim", "force_backward", "layers")


def upgrade_v0(net: Draft, strict: bool) -> None:
    """Turns every V0 entry of `layers` into a V1 one; padding layers are dissolved into their consumers."""
    old = [Draft(entry, net.places.child("layers", index)) for index, entry in enumerate(net.message.layers)]
    for entry in old:
        if not entry.message.HasField("layer"):
            raise SpecError("this entry has no 'layer { ... }', but others of the net have", where=entry.places.where, hint="write all layers in one format")
    _dissolve_padding(old)
    new = [_upgrade_layer(entry, strict) for entry in old if entry.message.layer.type != "padding"]
    for field, _ in net.message.ListFields():
        if field.name not in _KEPT_IN_NET:
            net.drop(field.name)
    net.drop("layers")
    for layer in new:
        net.put("layers", layer.message, layer.places)


def _dissolve_padding(entries: list[Draft]) -> None:
    """Gives the pad of each padding layer to the convolution or pooling that reads its top, and its bottom with it."""
    producer: dict[str, Draft] = {}
    for entry in entries:
        layer = entry.message.layer
        for index, bottom in enumerate(entry.message.bottom):
            source = producer.get(bottom)
            if source is None or source.message.layer.type != "padding":
                continue
            if layer.type not in ("conv", "pool") or len(entry.message.bottom) != 1:
                raise SpecError(
                    f"a padding layer may feed only a conv or pool layer with one bottom, found a '{layer.type}' layer with {len(entry.message.bottom)}",
                    where=entry.places.at("bottom", index),
                    layer=layer.name,
                    hint="remove the padding layer",
                )
            if len(source.message.bottom) != 1:
                raise SpecError("a padding layer needs one bottom", where=source.places.where, layer=source.message.layer.name)
            entry.message.bottom[index] = source.message.bottom[0]
            entry.inside("layer", entry.places).put("pad", source.message.layer.pad, source.places.child("layer").child("pad"))
        for top in entry.message.top:
            producer[top] = entry


def _upgrade_layer(entry: Draft, strict: bool) -> Draft:
    old = Draft(entry.message.layer, entry.places.child("layer"))
    new = Draft(pb.V1LayerParameter(), SourceMap(entry.places.where))
    new.copy(entry, "bottom")
    new.copy(entry, "top")
    kind: str = old.message.type
    if old.message.HasField("type"):
        new.put("type", _type_number(kind, old), old.places.child("type"))
    for field, value in old.message.ListFields():
        if field.name != "type":
            _move_field(field.name, value, kind, old, new, strict)
    return new


def _type_number(kind: str, old: Draft) -> int:
    if kind not in _TYPES:
        hint = "V0 types are " + ", ".join(sorted(_TYPES))
        raise SpecError(f"unknown V0 layer type '{kind}'", where=old.places.at("type"), layer=old.message.name, hint=hint)
    return int(pb.V1LayerParameter.LayerType.Value(_TYPES[kind]))


def _move_field(name: str, value: Any, kind: str, old: Draft, new: Draft, strict: bool) -> None:
    place = old.places.child(name)
    if name in _AS_THEY_ARE:
        new.copy(old, name)
    elif name in _TRANSFORM:
        new.inside("transform_param", place).put(_TRANSFORM[name], value, place)
    elif name in _FIELDS and kind in _FIELDS[name][1]:
        new.inside(_PARAMS[kind], place).put(_FIELDS[name][0], value, place)
    elif name == "hdf5_output_param" and kind == "hdf5_output":
        new.copy(old, name)
    elif strict:
        raise SpecError(f"'{name}' has no meaning in a V0 layer of type '{kind}'", where=place.where, layer=old.message.name, hint="remove it")
