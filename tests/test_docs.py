"""The documents tell the truth: commands parse, files exist, and tables match the code."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from caffelite import schema
from caffelite.cli import COMMANDS, load_command
from caffelite.cli.common import normalise
from caffelite.layer import known_types, layer_class
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
