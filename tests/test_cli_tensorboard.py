"""train --tensorboard: what is written, through a stand-in for tensorboardX that keeps every call."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from cli_harness import TRAIN, make_run, said

from caffelite.cli.tensorboard import TensorBoardWriter
from caffelite.solver.listeners import Output


class Board:
    """Stands for tensorboardX.SummaryWriter (add_scalar(tag, value, step), close())."""

    made: ClassVar[list[Board]] = []

    def __init__(self, folder: str, purge_step: int | None) -> None:
        self.folder, self.purge_step = folder, purge_step
        self.scalars: dict[tuple[str, int], float] = {}
        self.closed = False
        Board.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert not self.closed
        self.scalars[tag, step] = value

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def boards(monkeypatch: pytest.MonkeyPatch) -> list[Board]:
    """The writers made so far."""
    monkeypatch.setattr(Board, "made", [])
    monkeypatch.setitem(sys.modules, "tensorboardX", SimpleNamespace(SummaryWriter=Board))  # type: ignore[arg-type]
    return Board.made


def test_scalars_of_each_event(boards: list[Board]) -> None:
    solver: Any = SimpleNamespace(iter=0)
    writer = TensorBoardWriter(Path("curves"))
    writer.on_start(solver)
    writer.on_display(20, 1.5, [Output("loss", (1.25,), 1.0), Output("top1", (0.5,), 0.0), Output("prob", (0.5, 0.5), 0.0)], 0.1, 1.0)
    writer.on_display(40, 1.0, (), None, 0.0)
    writer.on_test(40, 0, [Output("accuracy", (0.75,), 0.0), Output("loss", (0.9,), 1.0)], None, 10)
    writer.on_test(40, 1, [Output("accuracy", (0.25,), 0.0)], None, 10)
    writer.close()
    (board,) = boards
    assert (board.folder, board.purge_step, board.closed) == ("curves", None, True)
    assert board.scalars == {
        **{("train/loss", 20): 1.5, ("train/lr", 20): 0.1, ("train/top1", 20): 0.5, ("train/loss", 40): 1.0},
        **{("test/accuracy", 40): 0.75, ("test/loss", 40): 0.9, ("test1/accuracy", 40): 0.25},
    }


def test_a_run_and_its_resumption(boards: list[Board], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(make_run(tmp_path))
    said(capsys, *TRAIN, "--backend", "numpy", "--tensorboard", "curves")
    said(capsys, *TRAIN, "--backend", "numpy", "--tensorboard", "curves", "--snapshot", "out/small_iter_2.solverstate")
    assert [(board.purge_step, board.closed) for board in boards] == [(None, True), (2, True)]
    whole, again = (board.scalars for board in boards)
    assert sorted(step for tag, step in whole if tag == "train/loss") == [0, 1, 2, 3, 4]
    assert again == {key: value for key, value in whole.items() if key[1] >= 2}


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    monkeypatch.chdir(make_run(tmp_path))
    _, err = said(capsys, *TRAIN, "--backend", "numpy", "--tensorboard", "curves", status=1)
    assert err == "caffelite: error: --tensorboard needs tensorboardX, which is not installed\n  in a clone of caffelite: pip install '.[tensorboard]'\n"
