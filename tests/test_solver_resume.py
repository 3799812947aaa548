"""Exact resume: a run that is killed and taken up again ends with the weights of an uninterrupted one, byte for byte.

The killed run is a real process, ended by SIGKILL. Crop, mirror, shuffle, dropout, momentum, iter_size, several epochs, rate steps and
tests that go on where they stopped all take part.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from solver_harness import IMAGES, Recorder, make_solver

from caffelite import backends
from caffelite.solver.loop import Solver
from caffelite.solver.snapshot import find_newest
from caffelite.solver.state_files import read_state

SETTINGS = """base_lr: 0.05 lr_policy: "multistep" gamma: 0.5 stepvalue: 5 stepvalue: 11 momentum: 0.9 weight_decay: 0.001 iter_size: 2 max_iter: 16
  snapshot: 4 snapshot_prefix: "s" test_interval: 6 test_iter: 2 """

RUN = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from solver_harness import IMAGES, Recorder, make_solver
from caffelite import backends
from caffelite.solver.snapshot import find_newest

settings, name, precision, kill_at = sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5])

class Killer(Recorder):
    def on_iteration(self, iteration, loss):
        if iteration == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

heard = Killer()
solver = make_solver(settings, IMAGES, backends.get(name), seeded=False, precision=precision, listeners=[heard])
solver.solve(find_newest("s", print))
print(heard.named("start", "test"))
"""


def run(folder: Path, settings: str, backend: str, precision: str, kill_at: int) -> subprocess.CompletedProcess[str]:
    arguments = [sys.executable, "-c", RUN, str(Path(__file__).parent), settings, backend, precision, str(kill_at)]
    environment_path = str(Path(__file__).parent.parent)
    return subprocess.run(arguments, cwd=folder, env={**os.environ, "PYTHONPATH": environment_path}, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize(("precision", "kind"), [("float32", "SGD"), ("bfloat16", "Adam")])
def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend, precision: str, kind: str) -> None:
    broken, whole = tmp_path / "broken", tmp_path / "whole"
    broken.mkdir()
    whole.mkdir()
    settings = f'{SETTINGS} type: "{kind}" '  # no random_seed: the second process must take the seed from the snapshot
    killed = run(broken, settings, backend.name, precision, 7)
    assert killed.returncode == -9, killed.stderr
    state = read_state(find_newest(f"{broken}/s", pytest.fail) or "")
    assert state.iter == 4
    resumed = run(broken, settings, backend.name, precision, -1)
    assert resumed.returncode == 0, resumed.stderr

    monkeypatch.chdir(whole)
    heard = Recorder()
    same = backends.get(backend.name)  # as the other processes make it
    make_solver(f"{settings} random_seed: {state.run.seed}", IMAGES, same, precision=precision, listeners=[heard]).solve()
    assert (broken / "s_iter_16.caffemodel").read_bytes() == (whole / "s_iter_16.caffemodel").read_bytes()
    assert (broken / "s_iter_16.solverstate").read_bytes() == (whole / "s_iter_16.solverstate").read_bytes()
    assert resumed.stdout.strip() == str([("start", 4), *(event for event in heard.named("test") if event[1] >= 6)])


def test_a_wrong_seed_or_position_would_be_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    solver = make_solver(f"{SETTINGS} random_seed: 3", IMAGES)
    solver.step(4)
    state = solver.snapshot()
    results = []
    for change in ("", "seed", "position"):
        other = make_solver(f"{SETTINGS} random_seed: 5", IMAGES)
        other.restore(state)
        if change == "seed":
            other.net.context.seed += 1
        elif change == "position":
            other.net.data_layers[0].source.seek(0)
        other.step(1)
        results.append(b"".join(other.backend.to_host(p.master).tobytes() for p in other.net.learnable))
    assert len(set(results)) == 3


def test_every_forward_pass_has_a_number_of_its_own_also_after_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    numbers: list[int] = []

    def counted() -> Solver:
        solver = make_solver(SETTINGS, IMAGES)
        feed = solver.net.feed
        monkeypatch.setattr(solver.net, "feed", lambda: (numbers.append(solver.net.context.forward_count), feed()))
        return solver

    first = counted()
    first.step(3)
    second = counted()
    second.restore(first.snapshot())
    second.step(2)
    assert numbers == list(range(10))
