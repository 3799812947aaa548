"""What a training run writes while it runs: the live line, the Caffe-shaped log as parsers read it, and metrics.jsonl."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pty
import re
from contextlib import closing
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caffelite.cli.caffe_log import CaffeLog, output_lines, prefix
from caffelite.cli.lines import LineFile
from caffelite.cli.live import CLEAR, CountLine, LiveLine, duration, fitted
from caffelite.cli.metrics import MetricsWriter
from caffelite.cli.progress import ProgressLine, loss_text
from caffelite.cli.train import closing_lines
from caffelite.errors import CaffeliteError
from caffelite.schema import pb
from caffelite.solver.listeners import Output


class Clock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def fake_solver(iteration: int = 0, *, max_iter: int = 1000, iter_size: int = 1, display: int = 100) -> Any:
    net = SimpleNamespace(
        batch_size=50, name="tiny", phase=pb.TRAIN, layers=[], outputs=["accuracy", "loss"], graph=SimpleNamespace(nodes=[]), spec=SimpleNamespace(file="n")
    )
    param = pb.SolverParameter(net="n.prototxt", max_iter=max_iter, iter_size=iter_size, display=display)
    backend = SimpleNamespace(peak_bytes=lambda: None)
    return SimpleNamespace(iter=iteration, net=net, backend=backend, test_nets=[], param=param, spec=SimpleNamespace(param=param, file="s.prototxt"))


def run_events(listeners: list[Any], solver: Any, *, start: int = 0, stop: int = 400, clock: Clock | None = None) -> None:
    """A run that tests every 200 iterations, displays every 100, snapshots at its end, a tenth of a second an iteration."""
    for listener in listeners:
        listener.on_message("Creating training net from net file: n.prototxt", "solver.cpp")
        listener.on_message("Solver scaffolding done.", "solver.cpp")
        listener.on_start(solver)
        listener.on_message("Starting Optimization", "caffe.cpp")
        listener.on_message("Solving tiny", "solver.cpp")
        for k in range(start, stop):
            if k % 200 == 0:
                listener.on_message(f"Iteration {k}, Testing net (#0)", "solver.cpp")
                listener.on_test_start(k, 0)
                listener.on_test(k, 0, [Output("accuracy", (k / 1000,), 0.0), Output("loss", (4.5 - k / 100,), 1.0)], None, 500)
            if k % 100 == 0:
                seconds = 0.0 if k == start else 10.0
                listener.on_display(k, 4.0 - k / 100, [Output("loss", (4.25 - k / 100,), 1.0)], 0.01 if k < 300 else 1e-05, seconds)
            if clock:
                clock.now += 0.1
            listener.on_iteration(k + 1, 4.0 - k / 100)
        listener.on_snapshot(Path(f"snap_iter_{stop}.caffemodel"), Path(f"snap_iter_{stop}.solverstate"))
        listener.on_message("Optimization Done.", "caffe.cpp")
        listener.on_end(False)
        listener.close()


# --- progress --------------------------------------------------------------------------------------------------------


def test_plain_lines_where_the_output_is_no_terminal() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(stream, clock)
    run_events([progress], fake_solver(iter_size=2), clock=clock)
    assert stream.getvalue().splitlines() == [
        "iteration 0: test accuracy 0.0000, loss 4.5000 over 500 records",
        "iteration 0/1,000  loss 4.0000  accuracy 0.0000  lr 0.01",
        "iteration 100/1,000  loss 3.0000  accuracy 0.0000  1,000 images/s  ETA 1:30  lr 0.01",
        "iteration 200: test accuracy 0.2000, loss 2.5000 over 500 records",
        "iteration 200/1,000  loss 2.0000  accuracy 0.2000  1,000 images/s  ETA 1:20  lr 0.01",
        "iteration 300/1,000  loss 1.0000  accuracy 0.2000  1,000 images/s  ETA 1:10  lr 1e-05",
        "snapshot: snap_iter_400.caffemodel",
    ]
    assert (progress.iteration, progress.stopped, progress.scores, progress.model) == (400, False, {"accuracy": 0.2}, Path("snap_iter_400.caffemodel"))


def test_losses_far_from_one_keep_their_digits() -> None:
    assert [loss_text(loss) for loss in (2.47, 0.1, 0.000123456, 87.3365, 123456.7, math.nan, -3.0)] == [
        "2.4700",
        "0.1000",
        "0.0001235",
        "87.3365",
        "1.235e+05",
        "nan",
        "-3.0000",
    ]


def test_warnings_and_debug_lines_are_shown() -> None:
    stream = io.StringIO()
    progress = ProgressLine(stream)
    progress.on_message("Iteration 0, Testing net (#0)", "solver.cpp")
    progress.on_message("    [Forward] Layer ip, top blob ip data: 0.5", "net.cpp")
    progress.on_message("    [Backward] All net params (data, diff): L1 norm = (1, 2); L2 norm = (1, 2)", "net.cpp", "E")
    progress.on_message("s_iter_3.solverstate is of another run", "solver.cpp", "W")
    assert stream.getvalue().splitlines() == [
        "    [Forward] Layer ip, top blob ip data: 0.5",
        "    [Backward] All net params (data, diff): L1 norm = (1, 2); L2 norm = (1, 2)",
        "warning: s_iter_3.solverstate is of another run",
    ]


def test_a_resumed_run_shows_its_own_numbers() -> None:
    stream, clock = io.StringIO(), Clock()
    run_events([ProgressLine(stream, clock)], fake_solver(300), start=300, clock=clock)
    assert stream.getvalue().splitlines()[0] == "iteration 300/1,000  loss 1.0000  lr 1e-05"


def test_time_spent_testing_does_not_count_as_training() -> None:
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(stream, clock)
    progress.on_start(fake_solver())
    for k in range(4):
        if k == 2:
            clock.now += 3600
            progress.on_test(k, 0, [], None, 0)
        clock.now += 0.5
        progress.on_iteration(k + 1, 1.0)
    progress.on_display(4, 1.0, [], 0.1, 2.0)
    assert "  100 images/s" in stream.getvalue().splitlines()[-1]


def test_the_live_line_refreshes_ten_times_a_second_at_most() -> None:
    screen, clock = Screen(), Clock()
    progress = ProgressLine(screen, clock)
    progress.on_start(fake_solver())
    for k in range(1000):
        clock.now += 0.001
        progress.on_iteration(k + 1, 2.0)
    assert screen.getvalue().count(CLEAR) in (10, 11)
    assert "\n" not in screen.getvalue()


def test_the_live_line_fits_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    screen = Screen()
    line = LiveLine(screen, Clock())
    line.show("x" * 100)
    line.print("kept")
    assert screen.getvalue() == CLEAR + "x" * 29 + CLEAR + "kept\n"


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (90, "iteration 231/600  loss 0.0347  accuracy 0.5000  3,645 images/s  ETA 0:04  lr 0.01"),
        (70, "iteration 231/600  loss 0.0347  accuracy 0.5000  3,645 images/s"),
        (60, "iteration 231/600  loss 0.0347  accuracy 0.5000  ETA 0:04"),
        (20, "iteration 231/600"),
        (5, "itera"),
    ],
)
def test_parts_that_do_not_fit_are_left_out_whole(width: int, shown: str) -> None:
    assert fitted("iteration 231/600  loss 0.0347  accuracy 0.5000  3,645 images/s  ETA 0:04  lr 0.01", width) == shown


def test_a_pseudo_terminal_gets_the_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    leader, follower = pty.openpty()
    with os.fdopen(follower, "w") as stream:
        clock = Clock()
        progress = ProgressLine(stream, clock)
        run_events([progress], fake_solver(), stop=5, clock=clock)  # few, as nobody reads a pseudo-terminal's buffer meanwhile
        stream.flush()
        os.set_blocking(leader, False)
        seen = ""
        while not seen.endswith("caffemodel\r\n"):
            seen += os.read(leader, 65536).decode()
    os.close(leader)
    assert "\r\x1b[Kiteration 1/1,000  loss 4.0000  accuracy 0.0000  500 images/s  ETA 1:40  lr 0.01\r" in seen
    assert seen.endswith("\r\x1b[Ksnapshot: snap_iter_5.caffemodel\r\n")


def test_count_line() -> None:
    stream, clock = io.StringIO(), Clock()
    count = CountLine(stream, "converting", clock=clock)
    for done in range(50, 1001, 50):
        clock.now += 1
        count(done, 1000)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[4] == "converting  50%  500/1,000  50 images/s  ETA 0:10"
    assert [duration(s) for s in (0, 59.6, 3599, 36061)] == ["0:00", "1:00", "59:59", "10:01:01"]


# --- log -------------------------------------------------------------------------------------------------------------


def parse_log(text: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """The rows Caffe's parse_log reads (its documented rules, restated): train rows and test rows."""
    lines = iter(text.splitlines())
    for line in lines:
        if "Solving" in line:
            break
    rate, iteration = math.nan, -1
    rows: dict[str, list[dict[str, float]]] = {"Train": [], "Test": []}
    for line in lines:
        found = re.search(r"Iteration (\d+)", line)
        if found:
            iteration = int(found[1])
        if iteration == -1:
            continue
        date, clock = line.split()[:2]
        assert re.fullmatch(r"[IWEF]\d{4}", date)
        datetime.strptime(clock, "%H:%M:%S.%f")
        found = re.search(r"lr = ([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)", line)
        if found:
            rate = float(found[1])
        for which, kept in rows.items():
            found = re.search(which + r" net output #(\d+): (\S+) = ([\.\deE+-]+)", line)
            if found:
                if not kept or kept[-1]["NumIters"] != iteration:
                    kept.append({"NumIters": iteration, "LearningRate": rate})
                kept[-1][found[2]] = float(found[3])
    return rows["Train"], rows["Test"]


def test_the_log_is_read_by_the_parsers_rules(tmp_path: Path) -> None:
    log = CaffeLog(tmp_path / "run.log")
    run_events([log], fake_solver())
    text = (tmp_path / "run.log").read_text(encoding="utf-8")
    train, test = parse_log(text)
    assert [(r["NumIters"], r["loss"]) for r in train] == [(0, 4.25), (100, 3.25), (200, 2.25), (300, 1.25)]
    assert [r["LearningRate"] for r in train[1:]] == [0.01, 0.01, 0.01]  # a row carries the rate of the row before
    assert [(r["NumIters"], r["accuracy"], r["loss"]) for r in test] == [(0, 0.0, 4.5), (200, 0.2, 2.5)]
    # parse_log.sh reads fixed columns: the test value is the 11th, the rate the 9th, the loss follows the first "=".
    by_column = [line.split() for line in text.splitlines()]
    assert [w[10] for w in by_column if "Test net output #0" in " ".join(w)] == ["0", "0.2"]
    assert [w[8] for w in by_column if ", lr = " in " ".join(w)] == ["0.01", "0.01", "0.01", "1e-05"]
    assert [line.split("=")[1].strip() for line in text.splitlines() if ", loss = " in line] == ["4", "3", "2", "1"]
    assert sum("] Solving " in line for line in text.splitlines()) == 1


def test_log_lines_in_caffes_words(tmp_path: Path) -> None:
    log = CaffeLog(tmp_path / "run.log", clock=lambda: datetime(2026, 11, 21, 0, 26, 43, 592013))
    log.line("Use CPU.", "caffe.cpp")
    run_events([log], fake_solver(), stop=101)
    lines = (tmp_path / "run.log").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"I1121 00:26:43\.592013 [ \d]{4,}\d caffe\.cpp:\d+\] Use CPU\.", lines[0])
    words = [re.sub(r"^I1121 00:26:43\.592013 +\d+ (\S+):\d+\] ", r"\1: ", line) for line in lines]
    first = words.index("caffe.cpp: Starting Optimization")
    assert words[first - 1] == "solver.cpp: Solver scaffolding done."
    assert words[first + 1 :] == [
        "solver.cpp: Solving tiny",
        "solver.cpp: Iteration 0, Testing net (#0)",
        "solver.cpp:     Test net output #0: accuracy = 0",
        "solver.cpp:     Test net output #1: loss = 4.5 (* 1 = 4.5 loss)",
        "solver.cpp: Iteration 0 (0 iter/s, 0s/100 iters), loss = 4",
        "solver.cpp:     Train net output #0: loss = 4.25 (* 1 = 4.25 loss)",
        "sgd_solver.cpp: Iteration 0, lr = 0.01",
        "solver.cpp: Iteration 100 (10 iter/s, 10s/100 iters), loss = 3",
        "solver.cpp:     Train net output #0: loss = 3.25 (* 1 = 3.25 loss)",
        "sgd_solver.cpp: Iteration 100, lr = 0.01",
        "caffe.cpp: Optimization Done.",
    ]


def test_numbers_as_cpp_streams_print_them() -> None:
    output = Output("x", (1e-05, 123456789.0, 1 / 3, math.nan, -math.inf), 0.5)
    assert output_lines([output]) == [
        "x = 1e-05 (* 0.5 = 5e-06 loss)",
        "x = 1.23457e+08 (* 0.5 = 6.17284e+07 loss)",
        "x = 0.333333 (* 0.5 = 0.166667 loss)",
        "x = nan (* 0.5 = nan loss)",
        "x = -inf (* 0.5 = -inf loss)",
    ]
    assert prefix("net.cpp", "W", datetime(2026, 1, 2, 3, 4, 5, 6)).startswith("W0102 03:04:05.000006 ")


def test_a_new_run_starts_a_new_log_and_a_resumed_one_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "run.log"
    for text, append in (("first", False), ("second", False), ("third", True)):
        with closing(CaffeLog(path, append=append)) as log:
            log.line(text)
    assert [line.split("] ")[1] for line in path.read_text(encoding="utf-8").splitlines()] == ["second", "third"]
    assert "first" in (tmp_path / "run.log.old").read_text(encoding="utf-8")
    link = tmp_path / "link"
    link.symlink_to(path)
    CaffeLog(link).close()
    assert link.is_symlink()


def test_a_log_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(CaffeliteError, match=r"cannot write log .*folder: Is a directory"):
        CaffeLog(tmp_path / "folder")


# --- metrics ---------------------------------------------------------------------------------------------------------


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def brief(path: Path) -> list[tuple[str, int]]:
    return [(r["event"], r["iteration"]) for r in records(path)]


def test_metrics_of_a_run(tmp_path: Path) -> None:
    path, clock = tmp_path / "deep" / "m.jsonl", Clock()
    run_events([MetricsWriter(path, {"solver": "s"}, clock)], fake_solver(), clock=clock)
    found = records(path)
    assert brief(path) == [
        *[("start", 0), ("test", 0), ("train", 0), ("train", 100), ("test", 200), ("train", 200), ("train", 300), ("snapshot", 400), ("end", 400)]
    ]
    assert found[0] == {"event": "start", "iteration": 0, "seconds": 0.0, "net": "tiny", "max_iter": 1000, "batch": 50, "solver": "s"}
    assert found[4] == {"event": "test", "iteration": 200, "seconds": 20.0, "net": 0, "outputs": {"accuracy": 0.2, "loss": 2.5}, "records": 500}
    assert found[3] == {"event": "train", "iteration": 100, "seconds": 10.0, "loss": 3.0, "lr": 0.01, "images_per_s": 500.0, "outputs": {"loss": 3.25}}
    assert found[-1] == {"event": "end", "iteration": 400, "seconds": 40.0, "stopped": False}


def test_a_resumed_run_goes_on_without_doubled_records(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    run_events([MetricsWriter(path, {})], fake_solver())
    with path.open("a", encoding="utf-8") as file:
        file.write('{"event": "train", "iterat')  # cut short by a kill
    run_events([MetricsWriter(path, {})], fake_solver(200), start=200)
    assert brief(path) == [
        *[("start", 0), ("test", 0), ("train", 0), ("train", 100)],
        *[("start", 200), ("test", 200), ("train", 200), ("train", 300), ("snapshot", 400), ("end", 400)],
    ]


def test_resuming_after_the_last_snapshot_keeps_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    run_events([MetricsWriter(path, {})], fake_solver())
    with closing(MetricsWriter(path, {})) as writer:
        writer.on_start(fake_solver(400))
    assert brief(path)[-3:] == [("train", 300), ("snapshot", 400), ("start", 400)]


def test_a_new_run_keeps_the_old_metrics_aside(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text("old\n", encoding="utf-8")
    with closing(MetricsWriter(path, {})) as writer:
        writer.on_start(fake_solver())
    assert brief(path) == [("start", 0)]
    assert (tmp_path / "m.jsonl.old").read_text(encoding="utf-8") == "old\n"


def test_numbers_json_lacks_become_null(tmp_path: Path) -> None:
    with closing(MetricsWriter(tmp_path / "m.jsonl", {})) as writer:
        writer.on_start(fake_solver())
        writer.on_test(0, 1, [Output("x", (math.nan, 1.5), 0.0)], math.inf, 0)
    expected = {
        "event": "test",
        "iteration": 0,
        "seconds": 0,
        "net": 1,
        "outputs": {"x": [None, 1.5]},
        "loss": None,
    }
    assert records(tmp_path / "m.jsonl")[1] | {"seconds": 0} == expected


def test_a_full_disk_ends_the_metrics_but_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    file = LineFile(tmp_path / "m.jsonl", "metrics")
    with closing(file._file):
        fake = SimpleNamespace(closed=False, write=full)
        fake.close = lambda: setattr(fake, "closed", True)
        monkeypatch.setattr(file, "_file", fake)
        file.write("one")
        file.write("two")
        monkeypatch.undo()
    assert capsys.readouterr().err == f"caffelite: warning: metrics {tmp_path}/m.jsonl ends here: No space left on device; the run goes on\n"


def test_the_pace_of_a_device_that_runs_ahead() -> None:
    """The host starts 99 iterations in no time and waits for them in the 100th: the mean is theirs all the same."""
    stream, clock = io.StringIO(), Clock()
    progress = ProgressLine(stream, clock)
    progress.on_start(fake_solver())
    for k in range(1000):
        clock.now += 1.001 if k % 100 == 99 else 3.0 if k == 0 else 0.00001
        progress.on_iteration(k + 1, 1.0)
        if k % 7 == 0 and k > 200:
            progress.on_display(k, 1.0, [], 0.1, 1.0)
    rates = {int(line.split("  ")[2].split()[0].replace(",", "")) for line in stream.getvalue().splitlines()}
    assert {4900 < rate < 5050 for rate in rates} == {True}


def test_what_goes_before_the_first_display_does_not_slow_the_next(tmp_path: Path) -> None:
    """The first pass compiles kernels and fills caches."""
    clock = Clock()
    metrics = MetricsWriter(tmp_path / "m.jsonl", {}, clock)
    metrics.on_start(fake_solver())
    clock.now += 60
    for k in range(101):
        if k % 100 == 0:
            metrics.on_display(k, 1.0, [], 0.1, 0.0)
        clock.now += 0.1
        metrics.on_iteration(k + 1, 1.0)
    metrics.close()
    first, second = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()][1:]
    assert "images_per_s" not in first
    assert second["images_per_s"] == 500


def test_the_closing_lines_name_the_best_weights_too() -> None:
    progress = ProgressLine(io.StringIO())
    run_events([progress], fake_solver())
    assert closing_lines(progress, {"accuracy": 0.1}, 65.0) == [
        "done at iteration 400 after 1:05",
        "  accuracy  0.2000 (chance 0.1000)",
        "  snapshot  snap_iter_400.caffemodel",
    ]
    progress.on_best(300, "accuracy", 0.75, Path("snap_best.caffemodel"))
    assert closing_lines(progress, {}, 65.0)[2] == "  best      accuracy 0.7500 at iteration 300: snap_best.caffemodel"
