"""The documents tell the truth: commands parse, files exist, and tables match the code."""

from __future__ import annotations

import re
import shlex
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layer_harness import Rig, check_gradient, close
from PIL import Image

import caffelite
from caffelite import schema
from caffelite.__main__ import main
from caffelite.cli import COMMANDS, load_command
from caffelite.cli.common import normalise
from caffelite.layer import NOT_THERE, known_types, layer_class
from caffelite.schema import SourceMap, pb

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"`((?:models|solvers|tools|benchmarks|docs|proto|tests)/[\w/.-]*)`")
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def commands() -> list[tuple[str, str]]:
    """(document, command line) of each `caffelite ...` line in a shell block and each complete command in running text."""
    found = []
    for document in DOCUMENTS:
        for language, block in FENCE.findall(document.read_text()):
            if language == "sh":
                found += [(document.name, line.split("  #")[0].strip()) for line in block.splitlines() if line.startswith("caffelite ")]
    return found


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_parse(document: str, line: str) -> None:
    _, name, *words = shlex.split(line)
    assert name in COMMANDS, document
    load_command(name).build_parser(f"caffelite {name}").parse(normalise(words))


def test_every_command_is_in_the_readme() -> None:
    assert re.findall(r"^\| `caffelite ([a-z-]+)` \|", DOCUMENTS[0].read_text(), re.MULTILINE) == list(COMMANDS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(document: Path) -> None:
    text = FENCE.sub("", document.read_text())
    if document.name != "design.md":  # which also names what is to come
        assert [name for name in NAMED_FILE.findall(text) if not (ROOT / name).exists()] == []
    assert [name for name in LINK.findall(text) if not (document.parent / name).exists()] == []


def test_readmes_net_and_solver_are_well_formed(tmp_path: Path) -> None:
    net, solver = [block for language, block in FENCE.findall(DOCUMENTS[0].read_text()) if language == "protobuf"]
    assert [layer.type for layer in schema.net_from_text(net).param.layer][-1] == "SoftmaxWithLoss"
    assert schema.solver_from_text(solver).param.max_iter == 200


def span(least: int, most: int | None) -> str:
    return f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"


def test_layer_table_matches_the_layers() -> None:
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \|([^|]*)\|$", (ROOT / "docs" / "layers.md").read_text(), re.MULTILINE)
    table = {name: (bottoms, tops, fields.strip()) for name, bottoms, tops, fields in rows if name != "type"}
    assert sorted(table) == known_types()
    for name, (bottoms, tops, fields) in table.items():
        cls = layer_class(pb.LayerParameter(name="x", type=name), SourceMap.unknown())
        assert (bottoms, tops) == (span(*cls.bottom_range), span(*cls.top_range)), name
        told = dict(part.strip().split(": ") for part in fields.split(";") if part.strip())
        assert sorted(told) == sorted(cls.param_fields), name
        for message, listed in told.items():
            known = pb.LayerParameter.DESCRIPTOR.fields_by_name[message].message_type.fields_by_name
            legacy = {"scale", "mean_file", "crop_size", "mirror", "rand_skip", "force_encoded_color"} if message == "data_param" else set()
            assert set(listed.split(", ")) == set(known) - legacy, name


def test_layers_that_are_not_there_are_listed() -> None:
    text = (ROOT / "docs" / "layers.md").read_text()
    listed = text.partition("other types are not there: ")[2].partition(". ")[0]
    assert re.split(r",\s", listed) == sorted(NOT_THERE)


def python_blocks(document: str) -> list[str]:
    """The Python code of a document, without the blanks that stand before all of its lines."""
    found = re.findall(r"^ *```python\n(.*?)^ *```", (ROOT / "docs" / document).read_text(), re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for block in found]


SQUARES = """net_param {
  layer { name: "x" type: "DummyData" top: "x" top: "y" dummy_data_param { shape { dim: 2 dim: 3 } data_filler { type: "gaussian" } } }
  layer { name: "ip" type: "InnerProduct" bottom: "x" top: "ip" inner_product_param { num_output: 3 weight_filler { type: "xavier" } } }
  layer { name: "s" type: "Square" bottom: "ip" top: "s" }
  layer { name: "loss" type: "EuclideanLoss" bottom: "s" bottom: "y" top: "loss" }
}
base_lr: 0.1 lr_policy: "fixed" max_iter: 2 snapshot_prefix: "s"
"""


def test_the_layer_that_is_written_there_works(backend, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """docs/adding-layers.md: the class, its tests as they stand, and its use in training."""
    layer, use, tests = python_blocks("adding-layers.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("caffelite.layer._REGISTRY", {name: layer_class(pb.LayerParameter(type=name), SourceMap.unknown()) for name in known_types()})
    Path("square.py").write_text(layer)
    names: dict[str, Any] = {"Rig": Rig, "close": close, "check_gradient": check_gradient}
    exec("import square\n" + tests, names)
    names["test_square"](backend, rng)
    names["test_square_gradient"](rng)
    Path("solver.prototxt").write_text(SQUARES)
    exec(use, names)
    assert "Square" in known_types()
    assert Path("s_iter_2.caffemodel").exists()
    del sys.modules["square"]


def test_a_picture_is_classified_as_testing_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/getting-started.md: the code's preparation of an image is the one that its databases and transform_param make."""
    (code,) = python_blocks("getting-started.md")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAFFELITE_BACKEND", "numpy")
    Path("pets/val/cat").mkdir(parents=True)
    pixels = np.random.default_rng(1).integers(0, 256, (9, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((90, 70), Image.Resampling.BICUBIC).save("pets/val/cat/1.jpg")
    assert main(["convert", "imagefolder", "pets/val", "data/pets/val_lmdb", "--resize", "64x64"]) == 0
    train, deploy = ((ROOT / f"models/nin_quick/{name}.prototxt").read_text() for name in ("train_val", "deploy"))
    train, deploy = (text.replace("num_output: 20 ", "num_output: 2 ") for text in (train, deploy))
    Path("pets_deploy.prototxt").write_text(deploy)
    Path("pets.prototxt").write_text(
        train.replace("data/synth/", "data/pets/").replace("batch_size: 50", "batch_size: 1")
        + 'layer { name: "p" type: "Softmax" bottom: "pool3" top: "prob" }'
    )
    caffelite.set_random_seed(3)
    tested = caffelite.Net("pets.prototxt", caffelite.TEST)
    for name, blobs in tested.params.items():
        if name.startswith("norm"):
            blobs[1].data[...], blobs[2].data[...] = 1, 1  # variances, and how many passes they are sums of
    Path("runs/pets").mkdir(parents=True)
    tested.save("runs/pets/pets_best.caffemodel")
    capsys.readouterr()
    exec(code, {})
    probable = np.array(capsys.readouterr().out.strip("[]\n").split(), float)
    assert 0.01 < probable.min() < 0.49
    np.testing.assert_allclose(probable, tested.forward()["prob"].ravel(), rtol=1e-5)


def test_a_net_is_written_trained_and_used_as_pycaffe_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/pycaffe.md: what the Classifier says of a picture is what the net computes from its pixels."""
    train, classify = (block.replace("max_iter=300", "max_iter=3").replace("iter_300", "iter_3") for block in python_blocks("pycaffe.md"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CAFFELITE_BACKEND", "numpy")
    assert main(["dataset", "synth", "data/synth-images", "--classes", "3", "--train", "6", "--val", "3", "--size", "64"]) == 0
    assert main(["convert", "tiny-imagenet", "data/synth-images", "data/synth"]) == 0
    caffelite.set_random_seed(3)
    exec(train, {})
    capsys.readouterr()
    names: dict[str, Any] = {}
    exec(classify, names)
    best, value = capsys.readouterr().out.split()
    net = caffelite.Net("first_deploy.prototxt", "first_iter_3.caffemodel", caffelite.TEST)
    pixels = np.asarray(Image.open("data/synth-images/train/n90000000/images/n90000000_0.JPEG").convert("RGB"), float)
    net.blobs["data"].data[0] = ((pixels[:, :, ::-1] - [104, 117, 123]) / 128).transpose(2, 0, 1)
    probable = net.forward()["prob"][0]
    np.testing.assert_allclose(names["probable"], probable, rtol=1e-4)
    assert (int(best), float(value)) == (probable.argmax(), pytest.approx(probable.max(), rel=1e-4))
    assert 1 / 20 < probable.max() < 1


def test_what_pycaffe_has_is_listed() -> None:
    told = set(re.findall(r"`(\w+)(?:\.\w+)?`", (ROOT / "docs" / "pycaffe.md").read_text().partition("## From")[0]))
    assert set(caffelite.__all__) - {"Blob", "Layer", "AdaGradSolver", "RMSPropSolver", "AdaDeltaSolver"} <= told
    assert {"draw", "Detector", "NCCL", "log"} <= caffelite._NOT_THERE & told


def test_own_fields_are_listed() -> None:
    rows = re.findall(r"^\| (\w+) \| (\w+) \| ", (ROOT / "docs" / "files.md").read_text(), re.MULTILINE)
    own = {(message.name, field.name) for message in pb.DESCRIPTOR.message_types_by_name.values() for field in message.fields if field.number >= 5000}
    assert own == {row for row in rows if row[0] != "message"}


def test_environment_variables_are_listed() -> None:
    """Every variable of caffelite's own that the package reads, and no other."""
    read = {name for name in re.findall(r'"(CAFFELITE_[A-Z_]+)"', (ROOT / "caffelite" / "environment.py").read_text())}
    listed = set(re.findall(r"^\| `(CAFFELITE_[A-Z_]+)` \|", (ROOT / "docs" / "running.md").read_text(), re.MULTILINE))
    assert listed == read
    assert not [path for path in (ROOT / "caffelite").rglob("*.py") if re.search(r"environ.*CAFFELITE_", path.read_text())]


def test_no_word_is_doubled() -> None:
    """Across line ends too; code blocks aside. Names may well follow each other."""
    small = "a|an|and|are|as|at|be|by|for|from|in|is|it|not|of|on|or|that|the|this|to|with"
    for document in DOCUMENTS:
        found = re.findall(rf"\b({small})\s+\1\b", FENCE.sub("", document.read_text()))
        assert not found, document.name
