"""What caffelite train says after a stop: the command that goes on is one that does."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from caffelite.cli.progress import ProgressLine
from caffelite.cli.train import how_to_go_on


def stopped(prefix: str, *, snapshot: int | None, at: int) -> ProgressLine:
    """The progress of a run that wrote one snapshot, or none, and stopped."""
    progress = ProgressLine(io.StringIO())
    if snapshot is not None:
        progress.iteration = snapshot
        state = Path(f"{prefix}_iter_{snapshot}.solverstate")
        state.touch()
        progress.on_snapshot(Path(f"{prefix}_iter_{snapshot}.caffemodel"), state)
    progress.iteration = at
    return progress


@pytest.mark.parametrize(
    ("snapshot", "at", "older", "weights", "said"),
    [
        (7, 7, None, False, "the same command with --snapshot auto goes on from here"),
        (7, 7, 3, False, "the same command with --snapshot auto goes on from here"),
        (7, 7, 12, False, "the same command with --snapshot out/s_iter_7.solverstate goes on from here"),
        (7, 7, None, True, "the same command with --snapshot auto instead of --weights goes on from here"),
        (5, 7, None, False, "the same command with --snapshot auto goes on from iteration 5"),
        (None, 7, 12, False, "no snapshot was written in this run"),
    ],
    ids=["plain", "after an earlier one", "below another run's", "fine-tuning", "without a snapshot at the end", "without any"],
)
def test_the_way_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, snapshot: int | None, at: int, older: int | None, weights: bool, said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    if older is not None:
        Path(f"out/s_iter_{older}.solverstate").touch()
    assert how_to_go_on(stopped("./out/s", snapshot=snapshot, at=at), "./out/s", weights) == said
