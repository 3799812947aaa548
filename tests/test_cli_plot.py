"""caffelite plot: reading metrics, and the picture drawn from them."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from caffelite.__main__ import main
from caffelite.cli.plot import COLOURS, Curve, metrics_files, read_run, style_of

RECORDS: list[dict[str, Any]] = [
    {"event": "start", "iteration": 0, "chance": 0.25},
    {"event": "test", "iteration": 0, "net": 0, "outputs": {"accuracy": 0.25, "loss": 1.5}},
    {"event": "train", "iteration": 0, "loss": 1.5, "lr": 0.1, "outputs": {"loss": 1.5, "top1": 0.2}},
    {"event": "train", "iteration": 5, "loss": 1.0, "lr": 0.01, "outputs": {"loss": 1.1, "top1": 0.4}},
    {"event": "test", "iteration": 10, "net": 0, "outputs": {"accuracy": 0.75, "loss": None}},
    {"event": "test", "iteration": 10, "net": 1, "outputs": {"accuracy": 0.5, "per_class": [0.1, 0.2]}},
    {"event": "train", "iteration": 10, "loss": 0.5},
]


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the metrics of a run "one", its last line cut short, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("snaps").mkdir()
    Path("snaps/one_metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS) + '{"event": "tr', encoding="utf-8")
    return tmp_path


def colours(picture: Path) -> set[str]:
    with Image.open(picture) as image:
        found = image.convert("RGB").getcolors(maxcolors=2**20) or []
    return {"#{:02X}{:02X}{:02X}".format(*colour) for _, colour in found} & set(COLOURS[:-1])  # the last is black, as text is


def test_the_curves_of_a_run(runs: Path) -> None:
    run = read_run(Path("snaps/one_metrics.jsonl"))
    assert (run.name, run.chance) == ("one", 0.25)
    assert {panel: {c.label: c.points for c in curves} for panel, curves in run.panels.items()} == {
        "loss": {"train loss": [(0, 1.5), (5, 1.0), (10, 0.5)], "test loss": [(0, 1.5)]},
        "score": {"train top1": [(0, 0.2), (5, 0.4)], "test accuracy": [(0, 0.25), (10, 0.75)], "test accuracy (net 1)": [(10, 0.5)]},
        "rate": {"learning rate": [(0, 0.1), (5, 0.01)]},
    }
    assert [c.kind for c in run.panels["loss"]] == ["train", "test"]  # so that colours do not depend on what came first


def test_what_names_a_run(runs: Path) -> None:
    assert metrics_files("snaps") == metrics_files("snaps/one") == metrics_files("snaps/one_metrics.jsonl") == [Path("snaps/one_metrics.jsonl")]


def test_one_run_has_a_colour_a_curve(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "snaps/one"]) == 0
    assert capsys.readouterr().out == "curves of one: snaps/one_curves.png\n"
    assert colours(Path("snaps/one_curves.png")) == set(COLOURS[:5])  # two losses, three scores; the rate shares the first


def test_several_runs_have_a_colour_each(runs: Path) -> None:
    assert main(["plot", "snaps/one", "snaps", "--out", "new/both.png", "--title", "twice"]) == 0
    assert colours(Path("new/both.png")) == set(COLOURS[:2])


def test_runs_of_one_name_are_told_apart_by_their_folders(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("snaps", "others")
    assert main(["plot", "snaps/one", "others/one", "--out", "both.png"]) == 0
    assert capsys.readouterr().out == "curves of snaps/one, others/one: both.png\n"


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("nosuch", 1, "no such run\n  give a metrics file, a snapshot prefix"),
        ("empty", 1, "no *_metrics.jsonl in this folder"),
        ("nothing", 1, "nothing_metrics.jsonl: no training or test record in this file"),
    ],
)
def test_runs_without_curves(runs: Path, name: str, status: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("empty").mkdir()
    Path("nothing_metrics.jsonl").write_text('{"event": "start"}\n[1]\ngarbage\n{"event": "train"}\n', encoding="utf-8")
    assert main(["plot", name]) == status
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "start"), [("p.svg", b"<?xml"), ("p.PNG", b"\x89PNG"), ("p", b"\x89PNG")])
def test_the_name_says_which_kind_of_picture(runs: Path, name: str, start: bytes) -> None:
    assert main(["plot", "snaps", "--out", name]) == 0
    assert Path(name).read_bytes().startswith(start)
    assert sorted(path.name for path in runs.iterdir()) == sorted([name, "snaps"])


def test_kinds_of_pictures_that_are_not_written(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "snaps", "--out", "p.pgn"]) == 2
    assert "error: --out p.pgn: pictures of the kind 'pgn' are not written\n  did you mean 'png'? known ones: " in capsys.readouterr().err
    assert not Path("p.pgn").exists()


def test_a_picture_is_never_half_written(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plot", "snaps", "--out", "p.png"]) == 0
    before = Path("p.png").read_bytes()

    def full(file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("caffelite.files.os.fsync", full)
    assert main(["plot", "snaps", "--out", "p.png", "--title", "other"]) == 1
    assert "cannot write p.png: No space left on device\n  the disk or quota is full" in capsys.readouterr().err
    assert Path("p.png").read_bytes() == before


@pytest.mark.parametrize(
    ("panel", "kind", "values", "drawn"),
    [
        ("rate", "train", [0.1, 0.1, 0.1, 0.01, 0.01, 0.01], "steps-post"),
        ("rate", "train", [0.1, 0.09, 0.08, 0.07, 0.06, 0.05], "default"),
        ("rate", "train", [0.1], "steps-post"),
        ("loss", "train", [2.0, 2.0, 2.0, 1.0], "default"),
        ("score", "test", [0.5, 0.5], None),
    ],
)
def test_rates_are_drawn_as_steps_where_they_are(panel: str, kind: str, values: list[float], drawn: str | None) -> None:
    assert style_of(Curve("x", kind), panel, list(enumerate(values))).get("drawstyle") == drawn


def test_without_matplotlib(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plot", "snaps"]) == 1
    assert "plot needs matplotlib, which is not installed\n  in a clone of caffelite: pip install '.[plot]'" in capsys.readouterr().err
