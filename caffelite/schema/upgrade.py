"""Brings old definitions to the current form, as Caffe does on loading, with the places of their fields.

Unlike Caffe, nets inside a solver are upgraded too, and old fields that would be ignored in a
current-format net are refused.
"""

from __future__ import annotations

from typing import Any

from caffelite import caffelite_pb2 as pb
from caffelite.errors import SpecError
from caffelite.schema.moves import Draft
from caffelite.schema.places import SourceMap
from caffelite.schema.upgrade_v0 import upgrade_v0
from caffelite.schema.upgrade_v1 import upgrade_v1

# Fields that moved to transform_param; WindowData still reads a scale of its own.
MOVED_FIELDS = {
    "data_param": ("scale", "mean_file", "crop_size", "mirror"),
    "image_data_param": ("scale", "mean_file", "crop_size", "mirror"),
    "window_data_param": ("mean_file", "crop_size", "mirror"),
}
_SOLVER_TYPES = {0: "SGD", 1: "Nesterov", 2: "AdaGrad", 3: "RMSProp", 4: "AdaDelta", 5: "Adam"}
_DIMS_PER_INPUT = 4


def upgrade_net(net: pb.NetParameter, places: SourceMap, strict: bool = True) -> None:
    """Upgrades `net` and `places` in place: V0, V1, net inputs, BatchNorm multipliers.

    strict refuses what has no effect (as in a net that a person wrote); without it, such parts of a stored model are dropped.
    SpecError for mixed formats, unknown V0 types, padding layers before anything but one convolution or pooling.
    """
    if net.layer and net.layers:
        raise SpecError(
            "the net mixes 'layer' (current format) and 'layers' (old format)",
            where=places.at("layers"),
            hint="write every layer as: layer { name: ... type: ... }",
        )
    draft = Draft(net, places)
    if strict:
        _refuse_moved_fields(net, places)
    if any(old.HasField("layer") for old in net.layers):
        upgrade_v0(draft, strict)
    if net.layers:
        upgrade_v1(draft)
    if net.input or net.input_shape or net.input_dim:
        _upgrade_inputs(draft, strict)
    _upgrade_batch_norm(net)


def upgrade_solver(solver: pb.SolverParameter, places: SourceMap) -> None:
    """Upgrades a solver and the nets inside it in place: solver_type becomes type. SpecError when both are set."""
    if solver.HasField("solver_type"):
        name = _SOLVER_TYPES[solver.solver_type]
        if solver.HasField("type"):
            raise SpecError(
                f'both type ("{solver.type}") and solver_type are set', where=places.at("solver_type"), hint=f'keep type: "{name}", or the one you mean, alone'
            )
        draft = Draft(solver, places)
        place = places.child("solver_type")
        draft.drop("solver_type")
        draft.put("type", name, place)
    for field in ("net_param", "train_net_param"):
        if solver.HasField(field):
            upgrade_net(getattr(solver, field), places.child(field))
    for index, net in enumerate(solver.test_net_param):
        upgrade_net(net, places.child("test_net_param", index))


def _refuse_moved_fields(net: pb.NetParameter, places: SourceMap) -> None:
    for index, layer in enumerate(net.layer):
        for message, names in MOVED_FIELDS.items():
            if not layer.HasField(message):
                continue
            for name in names:
                if getattr(layer, message).HasField(name):
                    raise SpecError(
                        f"'{name}' inside {message} has no effect in a current-format layer",
                        where=places.child("layer", index).at(message, name),
                        layer=layer.name,
                        hint=f"write transform_param {{ {name}: {_shown(getattr(getattr(layer, message), name))} }} beside {message}",
                    )


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else f"{value:g}"


def _upgrade_inputs(draft: Draft, strict: bool) -> None:
    """Net-level inputs become an Input layer named "input", put first."""
    net, places = draft.message, draft.places
    inputs, shapes, dims = list(net.input), list(net.input_shape), list(net.input_dim)
    if strict:
        _check_inputs(inputs, shapes, dims, places)
    if inputs and (len(shapes) >= len(inputs) or len(dims) >= _DIMS_PER_INPUT * len(inputs)):
        place = places.child("input")
        layer = Draft(pb.LayerParameter(), SourceMap(place.where))
        layer.put("name", "input", place)
        layer.put("type", "Input", place)
        param = layer.inside("input_param", place)
        for index, name in enumerate(inputs):
            layer.put("top", name, places.child("input", index))
            if shapes:
                param.put("shape", shapes[index], places.child("input_shape", index))
            else:
                start = _DIMS_PER_INPUT * index
                param.put("shape", pb.BlobShape(dim=dims[start : start + _DIMS_PER_INPUT]), places.child("input_dim", start))
        _put_first(draft, layer)
    for name in ("input", "input_shape", "input_dim"):
        draft.drop(name)


def _check_inputs(inputs: list[str], shapes: list[Any], dims: list[int], places: SourceMap) -> None:
    if shapes and len(shapes) != len(inputs):
        raise SpecError(f"{len(inputs)} input(s) but {len(shapes)} input_shape(s)", where=places.at("input_shape"), hint="give one input_shape per input")
    if not shapes and len(dims) != _DIMS_PER_INPUT * len(inputs):
        raise SpecError(
            f"{len(inputs)} input(s) need {_DIMS_PER_INPUT * len(inputs)} input_dim values, found {len(dims)}",
            where=places.at("input_dim") if dims else places.at("input"),
            hint="give four input_dim values, or one input_shape, per input",
        )


def _put_first(draft: Draft, layer: Draft) -> None:
    net, places = draft.message, draft.places
    count = len(net.layer)
    net.layer.insert(0, layer.message)
    for index in range(count - 1, -1, -1):
        node = places.children.pop(("layer", index), None)
        if node is not None:
            places.children[("layer", index + 1)] = node
    places.children[("layer", 0)] = layer.places


def _upgrade_batch_norm(net: pb.NetParameter) -> None:
    """Old nets set multipliers on the three statistics by hand; statistics are never learned."""
    for layer in net.layer:
        if layer.type == "BatchNorm" and len(layer.param) == 3:
            for param in layer.param:
                param.lr_mult, param.decay_mult = 0, 0
