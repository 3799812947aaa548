"""caffelite plot: loss, accuracy and learning rate of one or several runs, from their metrics, as a picture."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from caffelite.cli.common import Parser, named_file
from caffelite.errors import CaffeliteError, DataError, SpecError, did_you_mean
from caffelite.files import write_atomically

SUFFIX = "_metrics.jsonl"
# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "os^Dv<>"
MOST_MARKERS = 40  # on one curve; more would run into each other


@dataclass
class Curve:
    """One line: (iteration, value) points."""

    label: str
    kind: str  # "train" or "test"
    points: list[tuple[float, float]] = field(default_factory=list)


@dataclass
class Run:
    """The curves of one run, by panel: "loss", "score", "rate"."""

    name: str
    panels: dict[str, list[Curve]]
    chance: float | None = None


def build_parser(prog: str) -> Parser:
    parser = Parser(prog, "Draws loss, accuracy and learning rate of training runs from their metrics into one PNG.", f"{prog} runs/nin/nin --out nin.png")
    parser.add_argument("runs", nargs="+", metavar="RUN", help=f"a metrics file, a snapshot prefix, or a folder with *{SUFFIX}; several are overlaid")
    parser.add_argument(
        "--out",
        type=named_file,
        metavar="FILE",
        help="the picture, .png or another kind that matplotlib writes (default: RUN_curves.png beside the first run's metrics)",
    )
    parser.add_argument("--title", metavar="TEXT", help="a title (default: the runs' names)")
    return parser


def run(args: argparse.Namespace) -> int:
    files = [path for name in args.runs for path in metrics_files(name)]
    runs = [read_run(path) for path in files]
    if len({run.name for run in runs}) < len(runs):  # runs of one prefix in different folders
        for run, path in zip(runs, files):
            run.name = str(path.with_name(run.name))
    out = Path(args.out) if args.out else files[0].with_name(files[0].name.replace(".jsonl", "").removesuffix("_metrics") + "_curves.png")
    draw(runs, out, args.title)
    print(f"curves of {', '.join(run.name for run in runs)}: {out}")
    return 0


# --- reading -----------------------------------------------------------------------------------------------------------


def metrics_files(name: str) -> list[Path]:
    """The metrics files a RUN argument means. DataError if there are none."""
    path = Path(name)
    if path.is_dir():
        found = sorted(path.glob(f"*{SUFFIX}"))
        if found:
            return found
        raise DataError(f"{name}: no *{SUFFIX} in this folder", hint="caffelite train writes <snapshot_prefix>" + SUFFIX)
    for candidate in (path, Path(name + SUFFIX)):
        if candidate.is_file():
            return [candidate]
    raise DataError(f"{name}: no such run", hint=f"give a metrics file, a snapshot prefix (for <prefix>{SUFFIX}) or a folder that holds one")


def read_run(path: Path) -> Run:
    """The curves in one metrics file. DataError if it holds none."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # a line cut short by a kill
        if isinstance(record, dict):
            records.append(record)
    run = Run(path.name.replace(".jsonl", "").removesuffix("_metrics"), {"loss": [], "score": [], "rate": []})
    curves: dict[tuple[str, str], Curve] = {}
    for record in records:
        run.chance = record.get("chance", run.chance)
        for panel, label, value in _values(record):
            kind = str(record["event"])
            if (label, kind) not in curves:
                curves[label, kind] = Curve(label, kind)
                run.panels[panel].append(curves[label, kind])
            curves[label, kind].points.append((float(record["iteration"]), float(value)))
    for panel_curves in run.panels.values():  # so that a kind of curve has the same colour in every picture
        panel_curves.sort(key=lambda curve: (curve.kind != "train", curve.label))
    if not curves:
        raise DataError(f"{path}: no training or test record in this file", hint="the run may have ended before its first display or test")
    return run


def _values(record: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(panel, label, value) of every number of a train or test record that can be drawn."""
    event = record.get("event")
    if event not in ("train", "test") or not isinstance(record.get("iteration"), (int, float)):
        return []
    net = f" (net {record['net']})" if event == "test" and record.get("net") else ""
    values: list[tuple[str, str, Any]] = []
    if event == "train":
        values += [("loss", "train loss", record.get("loss")), ("rate", "learning rate", record.get("lr"))]
    outputs = record.get("outputs")
    for blob, value in (outputs if isinstance(outputs, dict) else {}).items():
        is_loss = "loss" in blob.lower()
        if event == "test" or not is_loss:  # the smoothed training loss is drawn already
            values.append(("loss" if is_loss else "score", f"{event} {blob}{net}", value))
    return [(panel, label, value) for panel, label, value in values if isinstance(value, (int, float))]


# --- drawing -----------------------------------------------------------------------------------------------------------


def draw(runs: Sequence[Run], out: Path, title: str | None = None) -> None:
    """Writes the picture; panels without a curve are left out. CaffeliteError without matplotlib, SpecError for a kind of file it does not write."""
    try:
        import matplotlib
    except ImportError as error:
        raise CaffeliteError("plot needs matplotlib, which is not installed", hint="in a clone of caffelite: pip install '.[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    kind = check_kind(out, pyplot.figure().canvas.get_supported_filetypes())
    pyplot.close()
    heights = {"loss": 3.0, "score": 3.0, "rate": 1.6}
    names = [name for name in heights if any(run.panels[name] for run in runs)]
    figure, axes = pyplot.subplots(
        len(names), 1, sharex=True, squeeze=False, figsize=(9, 0.8 + sum(heights[n] for n in names)), height_ratios=[heights[n] for n in names]
    )
    for name, (axis,) in zip(names, axes):
        _panel(axis, name, runs)
    axes[-1][0].set_xlabel("iteration")
    figure.suptitle(title or ", ".join(run.name for run in runs), x=0.01, ha="left", fontsize=13)
    figure.tight_layout()
    figure.canvas.draw()  # settles the axes, on which the labels' places depend
    for _, (axis,) in zip(names, axes):
        _spread_labels(axis)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda file: figure.savefig(file, format=kind, dpi=150, bbox_inches="tight"))
    pyplot.close(figure)


def check_kind(out: Path, known: Iterable[str]) -> str:
    """The kind of picture that a name asks for by its ending, png without one. SpecError when it is none of the known ones."""
    kind = out.suffix[1:].lower() or "png"
    if kind not in known:
        raise SpecError(f"--out {out}: pictures of the kind '{kind}' are not written", hint=did_you_mean(kind, sorted(known)))
    return kind


def style_of(curve: Curve, panel: str, points: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """How a curve is drawn: tests dashed, a rate that stays and then changes in steps."""
    if curve.kind == "test":
        return {"linestyle": "--", "linewidth": 1.6}
    changes = sum(one[1] != other[1] for one, other in pairwise(points))
    steps = panel == "rate" and 2 * changes < len(points)
    return {"linestyle": "-", "linewidth": 1.3, "drawstyle": "steps-post" if steps else "default"}


def _panel(axis: Any, name: str, runs: Sequence[Run]) -> None:
    for number, run in enumerate(runs):
        for index, curve in enumerate(run.panels[name]):
            # One run: a colour for each curve. Several: a colour for each run, as they are what is compared.
            colour = COLOURS[(number if len(runs) > 1 else index + (2 if name == "score" else 0)) % len(COLOURS)]
            points = sorted(curve.points)
            style = style_of(curve, name, points)
            if curve.kind == "test":
                style |= {"marker": MARKERS[number % len(MARKERS)], "markevery": -(-len(points) // MOST_MARKERS)}
            axis.plot([x for x, _ in points], [y for _, y in points], color=colour, markersize=4, **style)
            label = curve.label if len(runs) == 1 else f"{run.name}: {curve.label}"
            axis.annotate(label, points[-1], xytext=(8, 0), textcoords="offset points", color=colour, fontsize=9, va="center", annotation_clip=False)
    chances = {run.chance for run in runs if run.chance}
    if name == "score" and len(chances) == 1:
        chance = chances.pop()
        axis.axhline(chance, color="0.5", linewidth=1, linestyle=":")
        axis.annotate(f"chance {chance:g}", (0.5, chance), xycoords=("axes fraction", "data"), color="0.4", fontsize=8, ha="center", va="bottom")
    axis.set_ylabel({"loss": "loss", "score": "accuracy", "rate": "learning rate"}[name])
    rates = [y for run in runs for curve in run.panels["rate"] for _, y in curve.points]
    if name == "rate" and rates and min(rates) > 0 and max(rates) > 5 * min(rates):
        axis.set_yscale("log")
    axis.grid(True, color="0.9", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)


def _spread_labels(axis: Any) -> None:
    """Moves the labels at the curves' ends apart, so that none lies over another."""
    gap = 13.0  # points, a little over the font's height
    to_points = 72.0 / axis.figure.dpi
    labels = [text for text in axis.texts if text.get_position()[0] == 8]
    heights = {id(text): axis.transData.transform(text.xy)[1] * to_points for text in labels}
    last = float("-inf")
    for text in sorted(labels, key=lambda text: heights[id(text)]):
        place = max(heights[id(text)], last + gap)
        text.set_position((8, place - heights[id(text)]))
        last = place
