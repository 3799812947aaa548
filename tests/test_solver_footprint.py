"""What a run is foretold to need of a GPU's memory is what it takes, scratch memory and all; found without a GPU, CuPy or a compiler."""

from __future__ import annotations

import json
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import Any

import pytest
from cli_harness import said, values
from data_samples import write_lmdb
from test_memory import NET as MANY_LAYERS

from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.fusion import fuse
from caffelite.graph import build_graph
from caffelite.layer import Layer
from caffelite.memory import plan_memory
from caffelite.schema import pb, read_solver
from caffelite.solver.config import NetChoice, train_choice
from caffelite.solver.config import test_choices as choices_of_tests
from caffelite.solver.footprint import Footprint, footprint
from caffelite.solver.loop import Solver

ROOT = Path(__file__).resolve().parent.parent
SHORT = """name: "short"
layer { name: "data" type: "Data" top: "data" top: "label" data_param { source: "db" batch_size: 7 backend: LMDB } transform_param { scale: 0.01 } }
layer { name: "c" type: "Convolution" bottom: "data" top: "c" convolution_param { num_output: 5 kernel_size: 3 group: 1 weight_filler { type: "msra" } } }
layer { name: "p" type: "Pooling" bottom: "c" top: "p" pooling_param { kernel_size: 2 stride: 2 } }
layer { name: "r" type: "ReLU" bottom: "p" top: "p" }
layer { name: "ip" type: "InnerProduct" bottom: "p" top: "ip" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
layer { name: "accuracy" type: "Accuracy" bottom: "ip" bottom: "label" top: "accuracy" include { phase: TEST } }
"""
LONG = MANY_LAYERS.replace('top: "acc" }', 'top: "acc" include { phase: TEST } }')
WARPED = SHORT.replace("scale: 0.01", "scale: 0.01 rotation: 10 lighting: 0.1")
DROPPED = SHORT.replace(
    'layer { name: "loss"',
    """layer { name: "r2" type: "ReLU" bottom: "ip" top: "ip" }
layer { name: "drop" type: "Dropout" bottom: "ip" top: "ip" }
layer { name: "ip2" type: "InnerProduct" bottom: "ip" top: "ip2" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "loss\"""",
).replace('bottom: "ip" bottom: "label"', 'bottom: "ip2" bottom: "label"')
FIRE = """layer { name: "a" type: "Convolution" bottom: "c" top: "a" convolution_param { num_output: 8 kernel_size: 1 weight_filler { type: "msra" } } }
layer { name: "ra" type: "ReLU" bottom: "a" top: "a" }
layer { name: "b" type: "Convolution" bottom: "c" top: "b" convolution_param { num_output: 16 kernel_size: 3 pad: 1 weight_filler { type: "msra" } } }
layer { name: "rb" type: "ReLU" bottom: "b" top: "b" }
layer { name: "j" type: "Concat" bottom: "a" bottom: "b" top: "j" }
"""
JOINED = SHORT.replace('layer { name: "p"', FIRE + 'layer { name: "p"').replace('bottom: "c" top: "p"', 'bottom: "j" top: "p"')
DEEP = SHORT.replace("num_output: 4", "num_output: 900")  # whose data gradient takes more scratch memory than the passes of a test
NETS = {"dropped": DROPPED, "short": SHORT, "long": LONG, "warped": WARPED, "joined": JOINED, "deep": DEEP}
RULES = {"sgd": "momentum: 0.9", "adam": 'type: "Adam" momentum: 0.9 clip_gradients: 1e-3', "plain": "snapshot_after_train: false debug_info: true"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a database of 24 images."""
    monkeypatch.chdir(tmp_path)
    write_lmdb(tmp_path / "db", values())
    return tmp_path


def write_solver(net: str, rule: str, test: str) -> None:
    Path("net.prototxt").write_text(NETS[net])
    text = f'net: "net.prototxt" base_lr: 0.001 lr_policy: "fixed" weight_decay: 0.01 random_seed: 1 snapshot_prefix: "out" {rule} {test}'
    text += "" if "max_iter" in rule else " max_iter: 2"
    Path("solver.prototxt").write_text(text)


def choices() -> tuple[pb.SolverParameter, list[NetChoice]]:
    spec = read_solver("solver.prototxt")
    train = train_choice(spec)
    return spec.param, [train, *choices_of_tests(spec, train)]


def foretold(precision: str) -> Footprint:
    param, nets = choices()
    return footprint(nets, precision=precision, param=param)


def taken(precision: str) -> int | None:
    backend: Any = backends.get("cuda")
    solver = Solver(read_solver("solver.prototxt"), backend=backend, precision=precision)
    solver.solve()
    solver.close()
    return backend.peak_bytes()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("net", NETS)
def test_a_run_takes_what_it_is_foretold(cuda: Backend, net: str, rule: str, precision: str) -> None:
    """24 records make three batches of 7 and one of 3, which a net of its own scores."""
    write_solver(net, RULES[rule], "test_interval: 1" + (" test_iter: 1" if net == "long" else ""))
    assert taken(precision) == foretold(precision).peak


ONCE, TWICE = "test_interval: 2 test_iter: 1", "test_interval: 2 test_iter: 2"


@pytest.mark.parametrize("test", [ONCE, TWICE, TWICE + " test_initialization: false", "test_interval: 1 test_iter: 2 test_initialization: false"])
def test_records_hold_the_scratch_memory_of_their_time(cuda: Backend, test: str) -> None:
    """The second pass of the first test is recorded; training then makes more scratch memory beside what that record holds."""
    peaks = {}
    for each in (ONCE, test):
        write_solver("deep", "max_iter: 4", each)
        peaks[each] = foretold("float32").peak
    assert taken("float32") == peaks[test]
    assert (peaks[test] - peaks[ONCE] >= 1 << 16) == (test == TWICE)


@pytest.mark.parametrize("display", [0, 1])
def test_the_closing_report(cuda: Backend, display: int) -> None:
    """It runs op by op, and copies float32 images for a convolution in bfloat16, as the record of the training pass did and holds."""
    drawn = 'type: "DummyData" top: "data" top: "label" dummy_data_param { shape { dim: 7 dim: 16 dim: 28 dim: 28 } shape { dim: 7 } }'
    write_solver("short", RULES["sgd"], f"display: {display}")
    net = Path("net.prototxt")
    net.write_text(drawn.join([net.read_text().split('type: "Data"')[0], net.read_text()[net.read_text().index(' }\nlayer { name: "c"') :]]))
    assert taken("bfloat16") == foretold("bfloat16").peak


def test_parts_are_those_of_the_plan() -> None:
    write_solver("long", RULES["sgd"], "")
    found, (_, nets) = foretold("bfloat16"), choices()
    graph = build_graph(nets[0].spec, phase=pb.TRAIN, compute="bfloat16")
    fuse(graph, backends.counting())
    plan = plan_memory(graph, backends.counting(), backward=True)
    parameters = 4 * sum(-(-prod(p.spec.shape) // 16) * 16 for p in graph.owners)
    assert (found.parameters, found.gradients, found.histories, found.copies) == (parameters, parameters, parameters, parameters // 2)
    assert found.activations == plan.peak_bytes
    assert found.peak == sum(value for name, value in found.as_dict().items() if name != "peak_bytes")
    assert found.other > 0


def test_memory_is_counted_in_pieces_of_512_bytes_while_it_is_used() -> None:
    backend: Any = backends.counting()
    first, second = backend.allocate(1), backend.allocate(513)
    assert backend.driver.meter.used == 512 + 1024
    part = backend.view(first, 0, (1,), "uint8")
    del first
    assert backend.driver.meter.used == 1536, "a view holds its buffer"
    del part, second
    assert (backend.driver.meter.used, backend.peak_bytes()) == (0, 1536)
    assert backends.get("numpy").peak_bytes() is None


@pytest.mark.parametrize(("model", "size", "parameters"), [("nin", (3, 64, 64), 1_003_656), ("alexnet", (3, 256, 256), 60_965_224)])
def test_large_nets_are_measured_whole(model: str, size: tuple[int, int, int], parameters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    def assume(layer: Layer) -> None:
        if layer.type == "Data":
            layer.source.assume(size)  # type: ignore[attr-defined]

    spec = read_solver(ROOT / f"solvers/{model}.prototxt")
    net = NetChoice(train_choice(spec).spec, "", pb.TRAIN, 0, ())
    found = [footprint([net], precision=precision, param=spec.param, prepare=assume) for precision in ("float32", "bfloat16")]
    assert found[0].parameters == pytest.approx(4 * parameters, rel=1e-3)
    assert found[1].activations / found[0].activations == pytest.approx(0.5, abs=0.02)
    assert found[1].peak < found[0].peak - found[1].copies


def test_summary_needs_neither_cupy_nor_a_compiler(folder: Path) -> None:
    write_solver("short", "", "")
    script = """
import sys
sys.modules["cupy"] = None
from caffelite.__main__ import main
sys.exit(main(["summary", "solver.prototxt", "--backend", "cuda", "--json"]))
"""
    environment = {"PATH": "/nonexistent", "PYTHONPATH": ":".join(sys.path), "CAFFELITE_CACHE": str(folder / "none")}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["gpu_memory"] == foretold("float32").as_dict()
    assert not (folder / "none").exists()


def test_the_commands_say_it(cuda: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    write_solver("short", "", "")
    peak = foretold("float32").peak
    said_so = f"{peak / 2**10:,.1f} KB"
    assert f"GPU memory     {said_so} predicted at the peak: parameters 1.4 KB" in said(capsys, "summary", "solver.prototxt", "--backend", "cuda")[0]
    assert "GPU memory" not in said(capsys, "summary", "solver.prototxt", "--backend", "numpy")[0]
    assert f"  memory    {said_so} of the GPU's at the peak" in said(capsys, "train", "--solver", "solver.prototxt", "--backend", "cuda")[0]
    end = json.loads(Path("out_metrics.jsonl").read_text().splitlines()[-1])
    assert (end["event"], end["peak_device_mb"]) == ("end", pytest.approx(peak / 2**20, abs=1e-3))
    timed = json.loads(said(capsys, "time", "--solver", "solver.prototxt", "--backend", "cuda", "--iterations", "1", "--json")[0])
    assert timed["peak_device_mb"] == pytest.approx(peak / 2**20, abs=1e-3)
    said(capsys, "train", "--solver", "solver.prototxt", "--backend", "numpy")
    assert "peak_device_mb" not in Path("out_metrics.jsonl").read_text()
