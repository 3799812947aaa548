"""NetSpec: nets written in Python as programs written for pycaffe write them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import caffelite as caffe
from caffelite import layers as L
from caffelite import params as P
from caffelite.errors import SpecError
from caffelite.layer import NOT_THERE, known_types
from caffelite.proto import caffe_pb2
from caffelite.pycaffe.settings import settings
from caffelite.schema import net_from_text, pb, read_net

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "gpu", False)


def lenet(phase: int) -> Any:
    """models/lenet/train_val.prototxt for one phase."""
    learned = dict(param=[dict(lr_mult=1), dict(lr_mult=2)], weight_filler=dict(type="xavier"))
    halved = dict(pool=P.Pooling.MAX, kernel_size=2, stride=2)
    source = dict(source="data/mnist/train_lmdb", batch_size=64, shuffle=True) if phase == caffe.TRAIN else dict(source="data/mnist/test_lmdb", batch_size=100)
    n = caffe.NetSpec()
    n.data, n.label = L.Data(name="mnist", include=dict(phase=phase), transform_param=dict(scale=0.00390625), backend=P.Data.LMDB, ntop=2, **source)
    n.conv1 = L.Convolution(n.data, num_output=20, kernel_size=5, **learned)
    n.pool1 = L.Pooling(n.conv1, **halved)
    n.conv2 = L.Convolution(n.pool1, num_output=50, kernel_size=5, **learned)
    n.pool2 = L.Pooling(n.conv2, **halved)
    n.ip1 = L.InnerProduct(n.pool2, num_output=500, **learned)
    n.relu1 = L.ReLU(n.ip1, in_place=True)
    n.ip2 = L.InnerProduct(n.relu1, num_output=10, **learned)
    n.loss = L.SoftmaxWithLoss(n.ip2, n.label)
    if phase == caffe.TEST:
        n.accuracy = L.Accuracy(n.ip2, n.label, include=dict(phase=phase))
    return n.to_proto()


@pytest.mark.parametrize("phase", [caffe.TRAIN, caffe.TEST])
def test_lenet_is_the_one_of_its_prototxt(phase: int) -> None:
    whole = read_net(ROOT / "models/lenet/train_val.prototxt").param
    expected = [layer for layer in whole.layer if not layer.include or layer.include[0].phase == phase]
    found = lenet(phase)
    assert type(found) is pb.NetParameter
    assert [str(layer) for layer in found.layer] == [str(layer) for layer in expected]
    assert list(found.layer) == expected
    assert net_from_text(str(found)).param == found


def test_a_program_writes_a_net_and_trains_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses of 5 iterations are those of the same net written by hand."""
    monkeypatch.chdir(tmp_path)
    n = caffe.NetSpec()
    shape = [dict(dim=[8, 3, 6, 6]), dict(dim=[8])]
    n.data, n.label = L.DummyData(shape=shape, data_filler=[dict(type="gaussian", std=0.5), dict(type="constant", value=2)], ntop=2)
    n.conv = L.Convolution(n.data, kernel_size=3, num_output=4, weight_filler=dict(type="xavier"))
    n.pool = L.Pooling(n.conv, pool=P.Pooling.AVE, global_pooling=True)
    n.score = L.InnerProduct(L.ReLU(n.pool, in_place=True), num_output=5, weight_filler=dict(type="xavier"))
    n.loss = L.SoftmaxWithLoss(n.score, n.label)
    with open("auto.prototxt", "w") as file:
        file.write(str(n.to_proto()))
    Path("hand.prototxt").write_text("""
        layer { name: "data" type: "DummyData" top: "data" top: "label" dummy_data_param {
          shape { dim: 8 dim: 3 dim: 6 dim: 6 } shape { dim: 8 }
          data_filler { type: "gaussian" std: 0.5 } data_filler { type: "constant" value: 2 } } }
        layer { name: "conv" type: "Convolution" bottom: "data" top: "conv"
          convolution_param { kernel_size: 3 num_output: 4 weight_filler { type: "xavier" } } }
        layer { name: "pool" type: "Pooling" bottom: "conv" top: "pool" pooling_param { pool: AVE global_pooling: true } }
        layer { name: "ReLU1" type: "ReLU" bottom: "pool" top: "pool" }
        layer { name: "score" type: "InnerProduct" bottom: "pool" top: "score" inner_product_param { num_output: 5 weight_filler { type: "xavier" } } }
        layer { name: "loss" type: "SoftmaxWithLoss" bottom: "score" bottom: "label" top: "loss" }
    """)
    losses: dict[str, list[float]] = {}
    for name in ("auto", "hand"):
        s = caffe_pb2.SolverParameter(train_net=f"{name}.prototxt", base_lr=0.5, lr_policy="fixed", max_iter=5, random_seed=1)
        s.solver_mode = caffe_pb2.SolverParameter.CPU
        s.snapshot_prefix = name
        Path(f"{name}_solver.prototxt").write_text(str(s))
        solver = caffe.get_solver(f"{name}_solver.prototxt")
        for _ in range(5):
            solver.step(1)
            losses.setdefault(name, []).append(float(solver.net.blobs["loss"].data))
    assert losses["auto"] == losses["hand"]
    assert losses["auto"][4] < losses["auto"][0]


# --- names ---------------------------------------------------------------------------------------------------------------------


def test_names_of_layers_that_have_none_and_of_those_in_place() -> None:
    data = L.Input(shape=dict(dim=[1, 2]))
    hidden = L.InnerProduct(data, num_output=3)
    active = L.ReLU(hidden, in_place=True)
    net = caffe.to_proto(L.InnerProduct(active, num_output=4), L.Softmax(hidden))
    assert [(layer.name, list(layer.bottom), list(layer.top)) for layer in net.layer] == [
        ("Input1", [], ["Input1"]),
        ("InnerProduct1", ["Input1"], ["InnerProduct1"]),
        ("ReLU1", ["InnerProduct1"], ["InnerProduct1"]),
        ("InnerProduct2", ["InnerProduct1"], ["InnerProduct2"]),
        ("Softmax1", ["InnerProduct1"], ["Softmax1"]),
    ]
    assert active.to_proto() == pb.NetParameter(layer=net.layer[:3])


def test_a_spec_holds_its_tops_by_name() -> None:
    n = caffe.NetSpec()
    n.data, second = L.DummyData(shape=[dict(dim=[2])], ntop=2)
    n["a/b"] = L.Split(n.data)
    n.silence = L.Silence(second, n["a/b"], ntop=0)
    n.gone = L.ReLU(n.data)
    del n.gone
    assert list(n.tops) == ["data", "a/b", "silence"]
    assert n["data"] is n.data is n.tops["data"]
    assert not hasattr(n, "gone")
    assert [(layer.name, list(layer.bottom), list(layer.top)) for layer in n.to_proto().layer] == [
        ("data", [], ["data", "DummyData1"]),
        ("a/b", ["data"], ["a/b"]),
        ("silence", ["DummyData1", "a/b"], []),
    ]


def test_a_net_of_thousands_of_layers() -> None:
    top = L.Input(shape=dict(dim=[1]))
    for _ in range(3000):
        top = L.Power(top)
    assert caffe.to_proto(top).layer[-1].bottom == ["Power2999"]


# --- keywords --------------------------------------------------------------------------------------------------------------------


def only(top: Any) -> str:
    """A layer's fields but its name, type and blobs, as text."""
    layer = caffe.to_proto(top).layer[-1]
    for field in ("name", "type", "top", "bottom"):
        layer.ClearField(field)
    return " ".join(str(layer).split())


def test_where_keywords_go() -> None:
    data = L.Input(shape=dict(dim=[1, 2]))
    assert only(data) == "input_param { shape { dim: 1 dim: 2 } }"
    assert only(L.Convolution(data, kernel_size=3, pad=[1, 2])) == "convolution_param { pad: 1 pad: 2 kernel_size: 3 }"
    assert only(L.Convolution(data, convolution_param=dict(stride=(2,)))) == "convolution_param { stride: 2 }"
    assert only(L.SoftmaxWithLoss(data, loss_weight=2, loss_param=dict(ignore_label=9))) == "loss_weight: 2 loss_param { ignore_label: 9 }"
    assert only(L.Pooling(data, pool="AVE", propagate_down=False)) == "propagate_down: false pooling_param { pool: AVE }"
    assert only(L.Scale(data, axis=np.int64(0), num_axes=-1, bias_term=True)) == "scale_param { axis: 0 num_axes: -1 bias_term: true }"
    assert only(L.Eltwise(data, data, coeff=np.array([1, -1]))) == "eltwise_param { coeff: 1 coeff: -1 }"
    assert only(L.Dropout(data, include=[dict(phase="TEST"), dict(stage=["a", "b"])])) == 'include { phase: TEST } include { stage: "a" stage: "b" }'
    assert only(L.Input(shape=[caffe_pb2.BlobShape(dim=[3])])) == "input_param { shape { dim: 3 } }"
    assert only(L.Deconvolution(data, convolution_param=dict(group=2))) == "convolution_param { group: 2 }"  # for nets that Caffe is to read


def test_every_type_has_a_function_and_every_enum_its_values() -> None:
    for name in [*known_types(), *NOT_THERE]:
        made = getattr(L, name)
        assert made.__name__ == made(ntop=1).fn.type_name == name
    with_values = {name for name, message in pb.DESCRIPTOR.message_types_by_name.items() if message.enum_types and name.endswith("Parameter")}
    assert {"PoolingParameter", "EltwiseParameter", "LRNParameter"} <= with_values
    for name in with_values:
        for value in pb.DESCRIPTOR.message_types_by_name[name].enum_values_by_name.values():
            assert getattr(getattr(P, name.removesuffix("Parameter")), value.name) == value.number
    assert (P.Pooling.MAX, P.Pooling.AVE, P.LRN.WITHIN_CHANNEL, P.Eltwise.SUM, P.Data.LMDB) == (0, 1, 1, 1, 1)


DATA = L.Input(shape=dict(dim=[1, 2]))
WRONG = {
    r"unknown layer type 'Convolutoin'\n  did you mean 'Convolution'\?": lambda: L.Convolutoin,
    r"L\.Convolution: there is no field 'kernel_sise'\n  did you mean 'kernel_size'\?": lambda: L.Convolution(DATA, kernel_sise=3),
    r"L\.SoftmaxWithLoss: there is no field 'ignore_label'\n  'ignore_label' is a field of loss_param": lambda: L.SoftmaxWithLoss(DATA, ignore_label=3),
    r"L\.Convolution: FillerParameter has no field 'typ'\n  did you mean 'type'": lambda: L.Convolution(DATA, weight_filler=dict(typ="xavier")),
    r"L\.Convolution: 'weight_filler' takes a dict of FillerParameter's fields, found 'xavier'": lambda: L.Convolution(DATA, weight_filler="xavier"),
    r"L\.Convolution: 'kernel_size' takes a whole number, found 2\.5$": lambda: L.Convolution(DATA, kernel_size=2.5),
    r"L\.Dropout: 'dropout_ratio' takes a number, found 'half'": lambda: L.Dropout(DATA, dropout_ratio="half"),
    r"L\.Convolution: 'bias_term' takes True or False, found 'no'": lambda: L.Convolution(DATA, bias_term="no"),
    r"L\.Data: 'source' takes a text, found 5": lambda: L.Data(source=5),
    r"L\.Data: 'batch_size' holds one value, found a list: \[3\]": lambda: L.Data(batch_size=[3]),
    r"L\.Pooling: 'pool' has no value 'MX'\n  did you mean MAX\?": lambda: L.Pooling(DATA, pool="MX"),
    r"L\.Pooling: 'pool' has no value 17\n": lambda: L.Pooling(DATA, pool=17),
    r"L\.ReLU: input 0 is tuple, expected a layer's top\n  a layer with ntop=2 gives two": lambda: L.ReLU(L.Data(ntop=2)),
    r"L\.ReLU: input 1 is str, expected a layer's top$": lambda: L.ReLU(DATA, "data"),
    r"L\.ReLU: 0 input\(s\) and 1 top\(s\), expected one top over each input": lambda: L.ReLU(in_place=True),
    r"L\.Data: ntop is 'two', expected how many tops": lambda: L.Data(ntop="two"),
    r"n\.data is given tuple, expected a layer's top\n  a layer with ntop=2": lambda: setattr(caffe.NetSpec(), "data", L.Data(ntop=2)),
    r"the net has no top 'dada'\n  it has none yet": lambda: caffe.NetSpec().dada,
    r"to_proto is given int, expected layers' tops": lambda: caffe.to_proto(3),
    r"PoolingParameter has no enum value 'MX'\n  did you mean 'MAX'\?": lambda: P.Pooling.MX,
    r"PolingParameter has no enum values\n  did you mean 'Pooling'\?": lambda: P.Poling,
}


@pytest.mark.parametrize("message", WRONG)
def test_what_is_wrong_is_told_where_it_stands(message: str) -> None:
    with pytest.raises(SpecError, match="^" + message):
        WRONG[message]()


# --- modules ---------------------------------------------------------------------------------------------------------------------


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300).stdout.strip()


@pytest.mark.parametrize(
    "code",
    [
        "from caffelite import layers as L, params as P; print(L.Pooling.__name__, P.Pooling.AVE)",
        "import caffelite as caffe; print(caffe.layers.Pooling.__name__, caffe.params.Pooling.AVE)",
        "import caffelite as caffe; caffe.layer_type_list(); from caffelite import layers as L; print(L.Pooling.__name__, caffe.params.Pooling.AVE)",
        "from caffelite.layers import Pooling; from caffelite.params import Pooling as P; print(Pooling.__name__, P.AVE)",
        "import caffelite.proto.caffe_pb2 as pb; print('Pooling', pb.PoolingParameter.AVE)",
        "import caffelite as caffe; print('Pooling', caffe.proto.caffe_pb2.PoolingParameter.AVE)",
        "from caffelite.proto.caffe_pb2 import PoolingParameter; print('Pooling', PoolingParameter.AVE)",
        "from caffelite import NetSpec, to_proto, net_spec; print('Pooling', net_spec.enum_values('Pooling').AVE)",
    ],
)
def test_the_ways_to_import(code: str) -> None:
    assert run(code) == "Pooling 1"


def test_importing_io_does_not_load_pillow() -> None:
    assert run("import sys, caffelite as caffe; caffe.io, caffe.Classifier; print({'PIL', 'h5py', 'matplotlib'} & set(sys.modules))") == "set()"
    assert run("import sys, caffelite; print({'numpy', 'google.protobuf', 'caffelite.layer'} & set(sys.modules))") == "set()"


def test_messages_are_the_engines_own() -> None:
    assert caffe_pb2.NetParameter is pb.NetParameter
    assert (caffe_pb2.TRAIN, caffe_pb2.TEST) == (0, 1)
    assert "SolverParameter" in dir(caffe_pb2)
    with pytest.raises(AttributeError):
        _ = caffe_pb2.NoSuchParameter
