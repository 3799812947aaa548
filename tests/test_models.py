"""The nets and solvers in models/ and solvers/: they build, with the published shapes and parameter counts."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path

import lmdb
import pytest
from cli_harness import said

from caffelite import backends
from caffelite.fusion import fuse
from caffelite.graph import Graph, build_graph
from caffelite.schema import pb, read_net, read_solver

ROOT = Path(__file__).resolve().parent.parent
MODELS = ["alexnet", "alexnet9", "lenet", "nin", "nin_crop48", "resnet18", "squeezenet", "vgg16"]
# Parameter scalars as published, with 200 outputs instead of 1000 (NIN: of CIFAR-10's 10). VGG-16: the published convolutions, and inner products from
# 512x2x2. ResNet-18: those that are learned, and of each BatchNorm two statistics a channel (4,800 channels in all) and a weight.
PARAMETERS = {
    "alexnet": 60_965_224,
    "alexnet9": 2_688 + 221_440 + 885_120 + 1_327_488 + 884_992 + 590_080 + 2 * 4097 * 4096 + 4097 * 200,
    "lenet": 431_080,
    "nin": 966_986 + 193 * 190,
    "nin_crop48": 966_986 + 193 * 190,
    "resnet18": 11_689_512 - 513 * 800 + 2 * 4800 + 20,
    "squeezenet": 1_235_496 - 513 * 800,
    "vgg16": 14_714_688 + 2049 * 4096 + 4097 * 4096 + 4097 * 200,
}
# Products of weights and values for one image. The published convolutions of VGG-16 and ResNet-18 are for 224x224, whose planes are 49/4 times as
# large as 64x64's, layer by layer. AlexNet of nine layers: LRN's window of five as well. SqueezeNet: each layer's weights, at 31x31 places and so on.
MULTIPLY_ADDS = {
    "vgg16": 15_346_630_656 * 4 // 49 + (2048 + 4096 + 200) * 4096,
    "resnet18": 1_813_561_344 * 4 // 49 + 512 * 200,
    "alexnet9": 9 * (3 * 96 * 64**2 + 96 * 256 * 32**2 + (256 * 384 + 384 * 384) * 16**2 + (384 * 256 + 256 * 256) * 8**2)
    + 5 * (96 * 64**2 + 256 * 32**2)
    + (4096 + 4096 + 200) * 4096,
    "squeezenet": 27 * 64 * 31**2
    + 16 * (64 + 128 + 2 * (64 + 9 * 64)) * 15**2
    + 32 * (128 + 256 + 2 * (128 + 9 * 128)) * 7**2
    + (48 * (256 + 384 + 2 * (192 + 9 * 192)) + 64 * (384 + 512 + 2 * (256 + 9 * 256)) + 512 * 200) * 3**2,
}
BATCHES = {
    "alexnet": (256, 50),
    "alexnet9": (128, 100),
    "lenet": (64, 100),
    "nin": (100, 100),
    "nin_crop48": (100, 100),
    "resnet18": (256, 100),
    "squeezenet": (128, 100),
    "vgg16": (256, 100),
}
RECORD = {"alexnet": (3, 256, 256), "lenet": (1, 28, 28)}  # others: 3x64x64
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
    "alexnet9": {
        "data": (3, 64, 64),
        "norm1": (96, 64, 64),
        "pool1": (96, 32, 32),
        "norm2": (256, 32, 32),
        "pool2": (256, 16, 16),
        "conv4": (384, 16, 16),
        "pool4": (384, 8, 8),
        "conv6": (256, 8, 8),
        "pool6": (256, 4, 4),
        "fc8": (4096,),
        "fc9": (200,),
    },
    "resnet18": {
        "data": (3, 64, 64),
        "conv1": (64, 32, 32),
        "pool1": (64, 16, 16),  # the last window hangs over the edge
        "res2b": (64, 16, 16),
        "res3a_branch1": (128, 8, 8),
        "res3b": (128, 8, 8),
        "res4b": (256, 4, 4),
        "res5b": (512, 2, 2),
        "pool5": (512, 1, 1),
        "fc200": (200,),
    },
    "squeezenet": {
        "data": (3, 64, 64),
        "conv1": (64, 31, 31),
        "pool1": (64, 15, 15),
        "fire2/squeeze1x1": (16, 15, 15),
        "fire3/concat": (128, 15, 15),
        "pool3": (128, 7, 7),
        "fire5/concat": (256, 7, 7),
        "pool5": (256, 3, 3),
        "fire7/concat": (384, 3, 3),
        "fire9/concat": (512, 3, 3),
        "conv10": (200, 3, 3),
        "pool10": (200, 1, 1),
    },
    "vgg16": {
        "data": (3, 64, 64),
        "conv1_2": (64, 64, 64),
        "pool1": (64, 32, 32),
        "pool2": (128, 16, 16),
        "pool3": (256, 8, 8),
        "pool4": (512, 4, 4),
        "conv5_3": (512, 4, 4),
        "pool5": (512, 2, 2),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (200,),
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
    "vgg16": {
        "conv1_1": 1_792,
        "conv1_2": 36_928,
        "conv2_1": 73_856,
        "conv2_2": 147_584,
        "conv3_1": 295_168,
        "conv3_2": 590_080,
        "conv3_3": 590_080,
        "conv4_1": 1_180_160,
        **dict.fromkeys(["conv4_2", "conv4_3", "conv5_1", "conv5_2", "conv5_3"], 2_359_808),
        "fc6": 2049 * 4096,
        "fc7": 16_781_312,
        "fc8": 4097 * 200,
    },
    "squeezenet": {
        "conv1": 1_792,
        **{f"fire{n}/squeeze1x1": count for n, count in enumerate((1_040, 2_064, 4_128, 8_224, 12_336, 18_480, 24_640, 32_832), 2)},
        **{f"fire{n}/expand1x1": count for n, count in enumerate((1_088, 1_088, 4_224, 4_224, 9_408, 9_408, 16_640, 16_640), 2)},
        **{f"fire{n}/expand3x3": count for n, count in enumerate((9_280, 9_280, 36_992, 36_992, 83_136, 83_136, 147_712, 147_712), 2)},
        "conv10": 513 * 200,
    },
}


def _count(graph: Graph) -> int:
    return sum(prod(info.spec.shape) for info in graph.owners)


@pytest.fixture
def databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record for every database that the models name, under the working directory they expect."""
    monkeypatch.chdir(tmp_path)
    for model in MODELS:
        channels, height, width = RECORD.get(model, (3, 64, 64))
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


@pytest.mark.parametrize("model", MULTIPLY_ADDS)
def test_summary_counts_what_the_file_says(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "models" / model / "train_val.prototxt"
    found = json.loads(said(capsys, "summary", str(path), "--image", "3x64x64", "--json")[0])["nets"][0]
    assert (found["parameters"], found["multiply_adds"]) == (PARAMETERS[model], MULTIPLY_ADDS[model] * BATCHES[model][0])
    comment = path.read_text().partition("name:")[0]
    assert f"{found['parameters']:,} parameters" in comment
    assert f"{MULTIPLY_ADDS[model]:,} multiply-adds" in comment


@pytest.mark.usefixtures("databases")
def test_all_of_resnet_that_can_be_fused_is() -> None:
    """Scale and ReLU are part of BatchNorm, the blocks' last ReLU is part of the sum; its gradient part of the split or pooling that takes it."""
    graph = build_graph(read_net(ROOT / "models" / "resnet18" / "train_val.prototxt"), phase=pb.TRAIN)
    try:
        fuse(graph)
        absorbed = {node.name: [other.layer.type for other in node.absorbed] for node in graph.nodes if node.layer.type == "BatchNorm"}
        inner = {"bn_conv1", *(f"bn{stage}{block}_branch2a" for stage in (2, 3, 4, 5) for block in "ab")}
        outer = {f"bn{stage}{block}_branch2b" for stage in (2, 3, 4, 5) for block in "ab"} | {f"bn{stage}a_branch1" for stage in (3, 4, 5)}
        assert absorbed == {name: ["Scale", "ReLU"] for name in inner} | {name: ["Scale"] for name in outer}
        assert [node.layer.relu for node in graph.nodes if node.layer.type == "Eltwise"] == [True] * 8
        fused = [(node.forward_fused, node.backward_fused) for node in graph.nodes if node.layer.type in ("Scale", "ReLU")]
        assert fused == [(True, True)] * (20 + 17)
        assert [node.layer.type for node in graph.nodes if node.layer.relu_bottoms] == ["Split"] * 7 + ["Pooling"]
    finally:
        for node in graph.nodes:
            node.layer.close()


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize(("model", "products"), [("alexnet", ["fc6", "fc7"]), ("alexnet9", ["fc7", "fc8"]), ("vgg16", ["fc6", "fc7"])])
def test_the_last_products_drop_on_a_gpu(model: str, products: list[str], compute: str) -> None:
    """With their ReLUs, both ways: no pass is left, and no mask."""
    graph = build_graph(read_net(ROOT / "models" / model / "train_val.prototxt"), phase=pb.TRAIN, compute=compute)
    try:
        fuse(graph, backends.counting())
        assert [node.name for node in graph.nodes if getattr(node.layer, "dropout", None)] == products
        taken = {node.name: (node.layer.relu_bottoms, node.layer.drop_ratios) for node in graph.nodes if node.layer.drop_ratios}
        assert list(taken.values()) == [({0}, {0: 0.5})] * 2
        left = [node.name for node in graph.nodes if node.layer.type == "Dropout" and not (node.forward_fused and node.backward_fused)]
        assert left == []
    finally:
        for node in graph.nodes:
            node.layer.close()


@pytest.mark.usefixtures("databases")
@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_nothing_of_squeezenet_is_copied(compute: str) -> None:
    """Where convolutions take gaps, all that is joined lies in what it is joined to; no ReLU has a pass of its own, where no backend does more."""
    graph = build_graph(read_net(ROOT / "models" / "squeezenet" / "train_val.prototxt"), phase=pb.TRAIN, compute=compute)
    try:
        fuse(graph, backends.counting())
        both = frozenset({0, 1})
        assert [(node.layer.held_data, node.layer.held_diffs) for node in graph.nodes if node.layer.type == "Concat"] == [(both, both)] * 8
        assert [(node.forward_fused, node.backward_fused) for node in graph.nodes if node.layer.type == "ReLU"] == [(True, True)] * 26
    finally:
        for node in graph.nodes:
            node.layer.close()


def _weighted(model: str) -> list[pb.LayerParameter]:
    net = read_net(ROOT / "models" / model / "train_val.prototxt").param
    return [layer for layer in net.layer if layer.type in ("Convolution", "InnerProduct")]


@pytest.mark.parametrize("model", [*MODELS, "nin_quick"])
def test_train_and_deploy_have_the_same_weighted_layers(model: str) -> None:
    deploy = read_net(ROOT / "models" / model / "deploy.prototxt").param
    names = [layer.name for layer in deploy.layer if layer.type in ("Convolution", "InnerProduct")]
    assert names == [layer.name for layer in _weighted(model)]


def test_deploy_of_the_quick_net_has_its_layers_and_its_own_ends() -> None:
    nets = [read_net(ROOT / "models/nin_quick" / f"{name}.prototxt").param for name in ("train_val", "deploy")]
    layers = [[layer for layer in net.layer if not {"Data", "Input", "SoftmaxWithLoss", "Accuracy", "Softmax"} & {layer.type}] for net in nets]
    for layer in layers[0]:  # what deploy leaves out concerns training alone
        layer.convolution_param.ClearField("weight_filler")
        layer.batch_norm_param.ClearField("moving_average_fraction")
    for train, deploy in zip(*layers, strict=True):
        assert [getattr(train, name) for name in ("name", "bottom", "top")] == [getattr(deploy, name) for name in ("name", "bottom", "top")]
        assert train.convolution_param == deploy.convolution_param
        assert train.pooling_param == deploy.pooling_param
    deployed = build_graph(read_net(ROOT / "models/nin_quick/deploy.prototxt"), phase=pb.TEST)
    assert (deployed.inputs, deployed.outputs, deployed.blobs["data"].shape) == (["data"], ["prob"], (10, 3, 48, 48))


@pytest.mark.parametrize(("model", "bias_decay"), [("alexnet", 0), ("alexnet9", 0), ("lenet", 1), ("nin", 0), ("nin_crop48", 0), ("vgg16", 0)])
def test_multipliers_of_weights_and_biases(model: str, bias_decay: float) -> None:
    for layer in _weighted(model):
        assert [(param.lr_mult, param.decay_mult) for param in layer.param] == [(1, 1), (2, bias_decay)], layer.name


def test_alexnet_fillers() -> None:
    for layer in _weighted("alexnet"):
        param = layer.convolution_param if layer.type == "Convolution" else layer.inner_product_param
        assert param.weight_filler.type == "gaussian"
        assert param.weight_filler.std == pytest.approx(0.005 if layer.name in ("fc6", "fc7") else 0.01)
        assert param.bias_filler.value == pytest.approx(0 if layer.name in ("conv1", "conv3", "fc8") else 0.1)


@pytest.mark.parametrize("model", ["resnet18", "squeezenet"])
def test_all_blobs_learn_and_decay_alike(model: str) -> None:
    assert all(not layer.param for layer in read_net(ROOT / "models" / model / "train_val.prototxt").param.layer)


@pytest.mark.parametrize(
    ("model", "small"),
    [
        ("alexnet9", {"fc7": 0.005, "fc8": 0.005, "fc9": 0.01}),
        ("squeezenet", {"conv10": 0.01}),
        ("vgg16", {"fc6": 0.01, "fc7": 0.01, "fc8": 0.01}),
    ],
)
def test_weights_start_by_the_rule_of_he_or_small(model: str, small: dict[str, float]) -> None:
    for layer in _weighted(model):
        filler = (layer.convolution_param if layer.type == "Convolution" else layer.inner_product_param).weight_filler
        assert filler.type == ("gaussian" if layer.name in small else "msra"), layer.name
        assert filler.std == pytest.approx(small.get(layer.name, 1)), layer.name


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
        ("vgg16", {"base_lr": 0.01, "lr_policy": "multistep", "gamma": 0.1, "max_iter": 74 * 391, "momentum": 0.9, "weight_decay": 0.0005}),
        ("resnet18", {"base_lr": 0.1, "lr_policy": "multistep", "gamma": 0.1, "max_iter": 90 * 391, "momentum": 0.9, "weight_decay": 0.0001}),
        ("alexnet9", {"base_lr": 0.01, "lr_policy": "multistep", "gamma": 0.1, "max_iter": 90 * 782, "momentum": 0.9, "weight_decay": 0.0005}),
        ("squeezenet", {"base_lr": 0.01, "lr_policy": "poly", "power": 1.0, "max_iter": 68 * 782, "momentum": 0.9, "weight_decay": 0.0002}),
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
