"""The nets that the benchmarks run: the shipped models, on data that is there already, and solvers for them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from surroundings import ROOT

from caffelite.schema import pb, read_net, to_text


class Images(NamedTuple):
    """What a model takes: channels, height and width of an image, and how many classes its labels have."""

    channels: int
    size: int
    classes: int


NETS = {  # folders of models/
    "nin_crop48": Images(3, 48, 200),
    "nin": Images(3, 64, 200),
    "alexnet": Images(3, 227, 1000),
    "nin_quick": Images(3, 48, 20),
    "lenet": Images(1, 28, 10),
    "vgg16": Images(3, 64, 200),
    "resnet18": Images(3, 64, 200),
    "alexnet9": Images(3, 64, 200),
    "squeezenet": Images(3, 64, 200),
}


def on_constants(model: str, batch: int) -> pb.NetParameter:
    """The model's training net with DummyData in place of its Data layers, filled once."""
    net, images = read_net(ROOT / "models" / model / "train_val.prototxt").param, NETS[model]
    layers = [layer for layer in net.layer if layer.type != "Data"]
    data = pb.LayerParameter(name="data", type="DummyData", top=["data", "label"])
    for value, dims in ((0.5, (batch, images.channels, images.size, images.size)), (1, (batch,))):
        data.dummy_data_param.shape.add().dim.extend(dims)
        data.dummy_data_param.data_filler.add(type="constant", value=value)
    del net.layer[:]
    net.layer.extend([data, *layers])
    return net


def on_database(model: str, batch: int, source: Path, *, cached: bool = False) -> pb.NetParameter:
    """The model's net for training alone, reading the database `source`; cached: kept in the GPU's memory (cache: DEVICE)."""
    net = read_net(ROOT / "models" / model / "train_val.prototxt").param
    layers = [layer for layer in net.layer if not any(rule.HasField("phase") and rule.phase == pb.TEST for rule in layer.include)]
    del net.layer[:]
    net.layer.extend(layers)
    data = next(layer for layer in net.layer if layer.type == "Data").data_param
    data.source, data.batch_size = str(source), batch
    if cached:
        data.cache = pb.DataParameter.DEVICE
    return net


def write_solver(folder: Path, net: pb.NetParameter, name: str) -> Path:
    """Writes NAME.prototxt and NAME_solver.prototxt, SGD at a rate so tiny that the loss stays where it is; returns the solver's path."""
    net_path, solver_path = folder / f"{name}.prototxt", folder / f"{name}_solver.prototxt"
    net_path.write_text(to_text(net))
    solver = pb.SolverParameter(net=str(net_path), base_lr=1e-6, lr_policy="fixed", momentum=0.9, weight_decay=0.0005, max_iter=10**6)
    solver.snapshot_prefix, solver.random_seed, solver.snapshot_after_train = str(folder / name), 1, False
    solver.solver_mode = pb.SolverParameter.CPU
    solver_path.write_text(to_text(solver))
    return solver_path
