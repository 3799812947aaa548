"""The nets and solvers in models/ and solvers/: they build, with the published shapes and parameter counts."""

from __future__ import annotations

from math import prod
from pathlib import Path

import lmdb
import pytest

from caffelite.graph import Graph, build_graph
from caffelite.schema import pb, read_net, read_solver

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["alexnet", "lenet", "nin", "nin_crop48"]
# Parameter scalars: AlexNet and LeNet as published; NIN as published for CIFAR-10 (966,986), with 200 outputs instead of 10.
PARAMETERS = {"alexnet": 60_965_224, "lenet": 431_080, "nin": 966_986 + 193 * 190, "nin_crop48": 966_986 + 193 * 190}
BATCHES = {"alexnet": (256, 50), "lenet": (64, 100), "nin": (100, 100), "nin_crop48": (100, 100)}
RECORD = {"alexnet": (3, 256, 256), "lenet": (1, 28, 28), "nin": (3, 64, 64), "nin_crop48": (3, 64, 64)}
# Channels, rows and columns of blobs, per item.
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "alexnet": {
        "data": (3, 227, 227),
        "conv1": (96, 55, 55),
        "norm1": (96, 55, 55),
        "pool1": (96, 27, 27),
        "conv2": (256, 27, 27),
        "pool2": (256, 13, 13),
        "conv3": (384, 13, 13),
        "conv4": (384, 13, 13),
        "conv5": (256, 13, 13),
        "pool5": (256, 6, 6),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    },
    "lenet": {
        "data": (1, 28, 28),
        "conv1": (20, 24, 24),
        "pool1": (20, 12, 12),
        "conv2": (50, 8, 8),
        "pool2": (50, 4, 4),
        "ip1": (500,),
        "ip2": (10,),
    },
    "nin": {
        "data": (3, 64, 64),
        "conv1": (192, 64, 64),
        "cccp1": (160, 64, 64),
        "cccp2": (96, 64, 64),
        "pool1": (96, 32, 32),
        "conv2": (192, 32, 32),
        "pool2": (192, 16, 16),
        "conv3": (192, 16, 16),
        "cccp6": (200, 16, 16),
        "pool3": (200, 1, 1),
    },
    "nin_crop48": {
        "data": (3, 48, 48),
        "cccp2": (96, 48, 48),
        "pool1": (96, 24, 24),
        "pool2": (192, 12, 12),
        "cccp6": (200, 12, 12),
        "pool3": (200, 1, 1),
    },
}
# Scalars of each layer's blobs together, from the published tables.
LAYER_SCALARS = {
    "alexnet": {
        "conv1": 34_944,
        "conv2": 307_456,
        "conv3": 885_120,
        "conv4": 663_936,
        "conv5": 442_624,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    },
    "lenet": {"conv1": 520, "conv2": 25_050, "ip1": 400_500, "ip2": 5_010},
    "nin": {
        "conv1": 14_592,
        "cccp1": 30_880,
        "cccp2": 15_456,
        "conv2": 460_992,
        "cccp3": 37_056,
        "cccp4": 37_056,
        "conv3": 331_968,
        "cccp5": 37_056,
        "cccp6": 193 * 200,
    },
}


def _count(graph: Graph) -> int:
    return sum(prod(info.spec.shape) for info in graph.owners)


@pytest.fixture
def databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record for every database that the models name, under the working directory they expect."""
    monkeypatch.chdir(tmp_path)
    for model in MODELS:
        channels, height, width = RECORD[model]
        datum = pb.Datum(channels=channels, height=height, width=width, data=bytes(channels * height * width), label=1)
        for layer in read_net(ROOT / "models" / model / "train_val.prototxt").param.layer:
            if layer.type == "Data":
                Path(layer.data_param.source).mkdir(parents=True, exist_ok=True)
                with lmdb.open(layer.data_param.source, map_size=2**20) as env, env.begin(write=True) as transaction:
                    transaction.put(b"00000000_a", datum.SerializeToString())


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("phase", [pb.TRAIN, pb.TEST])
@pytest.mark.parametrize("model", MODELS)
def test_train_val_builds_as_published(model: str, phase: int) -> None:
    graph = build_graph(read_net(ROOT / "models" / model / "train_val.prototxt"), phase=phase)
    try:
        batch = BATCHES[model][phase]
        assert {name: graph.blobs[name].shape for name in SHAPES[model]} == {name: (batch, *shape) for name, shape in SHAPES[model].items()}
        assert _count(graph) == PARAMETERS[model]
        scalars = {node.name: sum(prod(info.spec.shape) for info in node.params) for node in graph.nodes if node.params}
        assert scalars == LAYER_SCALARS.get(model, scalars)
        assert graph.outputs == (["loss"] if phase == pb.TRAIN else ["accuracy", "loss"])
        assert graph.has_backward
    finally:
        for node in graph.nodes:
            node.layer.close()


@pytest.mark.parametrize("model", MODELS)
def test_deploy_builds_with_the_same_parameters(model: str) -> None:
    graph = build_graph(read_net(ROOT / "models" / model / "deploy.prototxt"), phase=pb.TEST)
    assert _count(graph) == PARAMETERS[model]
    assert graph.inputs == ["data"]
    assert graph.outputs == ["prob"]
    assert graph.blobs["data"].shape[1:] == SHAPES[model]["data"]


def _weighted(model: str) -> list[pb.LayerParameter]:
    net = read_net(ROOT / "models" / model / "train_val.prototxt").param
    return [layer for layer in net.layer if layer.type in ("Convolution", "InnerProduct")]


@pytest.mark.parametrize("model", MODELS)
def test_train_and_deploy_have_the_same_weighted_layers(model: str) -> None:
    deploy = read_net(ROOT / "models" / model / "deploy.prototxt").param
    names = [layer.name for layer in deploy.layer if layer.type in ("Convolution", "InnerProduct")]
    assert names == [layer.name for layer in _weighted(model)]


@pytest.mark.parametrize(("model", "bias_decay"), [("alexnet", 0), ("lenet", 1), ("nin", 0), ("nin_crop48", 0)])
def test_multipliers_of_weights_and_biases(model: str, bias_decay: float) -> None:
    for layer in _weighted(model):
        assert [(param.lr_mult, param.decay_mult) for param in layer.param] == [(1, 1), (2, bias_decay)], layer.name


def test_alexnet_fillers() -> None:
    for layer in _weighted("alexnet"):
        param = layer.convolution_param if layer.type == "Convolution" else layer.inner_product_param
        assert param.weight_filler.type == "gaussian"
        assert param.weight_filler.std == pytest.approx(0.005 if layer.name in ("fc6", "fc7") else 0.01)
        assert param.bias_filler.value == pytest.approx(0 if layer.name in ("conv1", "conv3", "fc8") else 0.1)


@pytest.mark.parametrize("model", MODELS)
def test_data_layers(model: str) -> None:
    train, test = (layer for layer in read_net(ROOT / "models" / model / "train_val.prototxt").param.layer if layer.type == "Data")
    assert train.include[0].phase == pb.TRAIN
    assert test.include[0].phase == pb.TEST
    assert (train.data_param.shuffle, test.data_param.shuffle) == (True, False)
    assert (train.transform_param.mirror, test.transform_param.mirror) == (model != "lenet", False)
    for layer in (train, test):
        assert layer.data_param.backend == pb.DataParameter.LMDB
        assert list(layer.transform_param.mean_value) == ([] if model == "lenet" else [104, 117, 123])
        assert layer.transform_param.crop_size == {"alexnet": 227, "nin_crop48": 48}.get(model, 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alexnet", {"base_lr": 0.01, "lr_policy": "step", "gamma": 0.1, "stepsize": 100_000, "max_iter": 450_000, "momentum": 0.9, "weight_decay": 0.0005}),
        ("lenet", {"base_lr": 0.01, "lr_policy": "inv", "gamma": 0.0001, "power": 0.75, "max_iter": 10_000, "momentum": 0.9, "weight_decay": 0.0005}),
        ("nin", {"base_lr": 0.01, "lr_policy": "multistep", "gamma": 0.1, "momentum": 0.9, "weight_decay": 0.0005}),
        ("nin_crop48", {"base_lr": 0.01, "lr_policy": "multistep", "gamma": 0.1, "max_iter": 10_000, "momentum": 0.9, "weight_decay": 0.0005}),
    ],
)
def test_solvers(name: str, expected: dict[str, object]) -> None:
    solver = read_solver(ROOT / "solvers" / f"{name}.prototxt").param
    assert solver.net == f"models/{name}/train_val.prototxt"
    assert (ROOT / solver.net).is_file()
    assert {key: getattr(solver, key) for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()
    }
    assert solver.test_interval > 0
    assert not solver.test_iter  # the whole set is scored


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*/*.prototxt")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_net_is_read(path: Path) -> None:
    assert read_net(path).param.layer


@pytest.mark.parametrize("path", sorted((ROOT / "solvers").glob("*.prototxt")), ids=lambda path: path.name)
def test_every_solver_names_a_net(path: Path) -> None:
    assert (ROOT / read_solver(path).param.net).is_file()
