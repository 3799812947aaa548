"""Recording: a pass that is played back gives the bits of one that is run op by op, and what changes between iterations still changes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from solver_harness import IMAGES, LINEAR, RATE, Recorder, Watcher, linear_solver, make_solver, weights_of

from caffelite.backends.contract import Backend
from caffelite.errors import DataError, TrainingError
from caffelite.solver import loop
from caffelite.solver.loop import Solver

SLOW = (
    f'{RATE} momentum: 0.9 weight_decay: 0.001 clip_gradients: 0.5 average_loss: 3 display: 4 max_iter: 12 test_interval: 5 test_iter: 2 snapshot_prefix: "s"'
)
OTHERS = {
    "sgd": f'{SLOW} lr_policy: "multistep" gamma: 0.5 stepvalue: 3 stepvalue: 7'.replace('lr_policy: "fixed"', ""),
    "two passes": f"{SLOW} iter_size: 2",
    "three passes": f"{SLOW} iter_size: 3",
    "adam": f'{SLOW} type: "Adam" momentum2: 0.99',
}


@pytest.fixture
def seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is looked at only where something is due."""
    monkeypatch.setattr(loop, "LOOK_SECONDS", 1e9)


def cell(ops: Backend, value: float) -> Any:
    array = ops.empty((1,), "float64")
    ops.assign(array, [value])
    return array


def test_a_record_reads_what_is_in_memory_when_it_is_played(cuda: Any) -> None:
    x, total, journal = cuda.empty((1000,), "float32"), cell(cuda, 0), cuda.empty((2 + 8,), "float64")
    calls = []

    def run() -> None:
        calls.append(1)
        cuda.add_sum(x, total, factor=0.5, accumulate=False)
        cuda.append(journal, total, divisor=1)

    again = cuda.repeatable(run)
    for value in range(5):
        cuda.fill(x, value)
        again()
    assert cuda.to_host(journal).tolist() == [5, 0, 0, 500, 1000, 1500, 2000, 0, 0, 0]
    assert len(calls) == 2, "run once to warm up, once to be recorded"


def test_a_record_keeps_its_scratch_memory(cuda: Any) -> None:
    """A larger scratch buffer takes the place of the one in the record, whose memory must not be given to others."""
    x, total = cuda.empty((100_000,), "float32"), cell(cuda, 0)
    again = cuda.repeatable(lambda: cuda.add_sum(x, total, factor=1, accumulate=False))
    cuda.fill(x, 1)
    again()
    again()
    cuda.scratch(1 << 24)
    others = [cuda.empty((1 << 14,), "float32") for _ in range(50)]
    for other in others:
        cuda.fill(other, 7)
    again()
    assert cuda.to_host(total)[0] == 100_000
    assert all((cuda.to_host(other) == 7).all() for other in others)


def test_memory_that_a_record_makes_is_zeroed_each_time(cuda: Any) -> None:
    x, sums = cell(cuda, 3), cuda.empty((2 + 4,), "float64")

    def run() -> None:
        fresh = cuda.new((1,), np.dtype(np.float64))
        cuda.append(sums, fresh, divisor=1)
        cuda.copy(x, fresh)

    again = cuda.repeatable(run)
    for _ in range(4):
        again()
    assert cuda.to_host(sums).tolist() == [4, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("op", ["to_host", "from_host", "synchronize"])
def test_what_waits_cannot_be_recorded(cuda: Any, op: str) -> None:
    x = cell(cuda, 1)
    waits = {"to_host": lambda: cuda.to_host(x), "from_host": lambda: cuda.from_host(np.ones(1), x), "synchronize": cuda.synchronize}[op]
    again = cuda.repeatable(waits)
    again()
    with pytest.raises(RuntimeError, match="copies from or to the host, or waits"):
        again()
    assert not cuda.driver.capturing
    cuda.assign(x, [5])
    assert cuda.to_host(x)[0] == 5


def trained(ops: Backend, text: str, listener: Recorder, folder: Path) -> Solver:
    solver = make_solver(text.replace('"s"', f'"{folder}/s"'), IMAGES, ops, listeners=[listener])
    solver.step(12)
    return solver


@pytest.mark.parametrize("name", OTHERS)
def test_recorded_training_is_training(cuda: Any, tmp_path: Path, seldom: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Crop, mirror, dropout, clipping, a rate that changes, tests in between: the same weights, displays and messages in the same order."""
    heard, watched, captures = Recorder(), Watcher(), []
    monkeypatch.setattr(cuda.driver, "capture", lambda run, capture=cuda.driver.capture: (captures.append(run), capture(run))[1])
    recorded, plain = trained(cuda, OTHERS[name], heard, tmp_path), trained(cuda, OTHERS[name], watched, tmp_path)
    for label, want in weights_of(plain).items():
        np.testing.assert_array_equal(weights_of(recorded)[label], want, label)
    kinds = ("message", "display", "test", "test start")
    assert heard.named(*kinds) == watched.named(*kinds)
    assert [event for event in heard.messages() if "clipping" in event], "some gradients are clipped"
    assert [event[1] for event in heard.named("iteration")] == list(range(1, 13))
    of_training, of_tests = {"sgd": 1, "adam": 1, "two passes": 2, "three passes": 3}[name], 2 * 1
    assert len(captures) == of_training + of_tests, "a watched solver records nothing but its test net"


def test_a_loss_that_is_not_finite_stops_the_updates_at_once(cuda: Any, tmp_path: Path, seldom: None) -> None:
    """Nobody looks for 30 iterations; the error names the first bad one, and the weights are those before it."""
    settings = f'{RATE.replace("0.1", "30")} snapshot_prefix: "{tmp_path}/s"'
    solver = linear_solver(settings, cuda)
    with pytest.raises(TrainingError, match=r"^the loss is (inf|nan) in iteration \d+: layer '\w+' \(\w+\): its top '\w+' is not finite") as caught:
        solver.step(60)
    found = re.search(r"in iteration (\d+)", str(caught.value))
    assert found is not None
    first = int(found[1])
    assert 5 < first < 55
    assert solver.iter == first
    want = linear_solver(settings, cuda, listeners=[Watcher()])
    with pytest.raises(TrainingError, match=f"in iteration {first}:"):
        want.step(60)
    for label, weights in weights_of(want).items():
        np.testing.assert_array_equal(weights_of(solver)[label], weights, label)


NORMED = LINEAR.replace('bottom: "x" top: "y"', 'bottom: "n" top: "y"').replace(
    'layer { name: "ip"',
    """layer { name: "in" type: "InnerProduct" bottom: "x" top: "n" inner_product_param { num_output: 4 weight_filler { type: "gaussian" std: 0.5 } } }
  layer { name: "norm" type: "BatchNorm" bottom: "n" top: "n" }
  layer { name: "ip\"""",
)


@pytest.mark.parametrize("parts", [1, 2])
def test_sums_of_batch_norm_stop_at_a_bad_loss(cuda: Any, reference: Any, tmp_path: Path, seldom: None, parts: int) -> None:
    """They hold the passes of the bad iteration, and none of those that went by before somebody looked: as where every loss is looked at."""
    settings = f'{RATE.replace("0.1", "30")} iter_size: {parts} snapshot_prefix: "{tmp_path}/s"'
    weights, iterations = [], []
    for ops, listeners in ((cuda, []), (cuda, [Watcher()]), (reference, [])):
        solver = make_solver(settings, NORMED, ops, listeners=listeners)
        for name, values in zip("xt", (np.random.default_rng(5).normal(size=(7, size)).astype(np.float32) for size in (5, 3))):
            ops.from_host(values, solver.net.blobs[name].data)
        with pytest.raises(TrainingError, match="the loss is "):
            solver.step(120)
        weights.append(weights_of(solver))
        iterations.append(solver.iter)
        assert weights[-1]["norm/2"] == pytest.approx(sum(0.999**i for i in range(parts * (solver.iter + 1))), rel=1e-5)
    assert iterations[0] == iterations[1] < 115
    for label, want in weights[1].items():
        np.testing.assert_array_equal(weights[0][label], want, label)


class Breaking(Recorder):
    """Breaks the run off after an iteration."""

    def __init__(self, last: int) -> None:
        super().__init__()
        self.last = last

    def on_iteration(self, iteration: int, loss: float) -> None:
        if iteration == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", ["step", "apply_update", "snapshot"])
def test_a_bad_loss_is_not_forgotten_when_something_else_ends_the_call(cuda: Any, tmp_path: Path, seldom: None, after: str) -> None:
    """The device stopped updating at the bad loss; whatever is asked for next, the error names that iteration."""
    settings = f'{RATE.replace("0.1", "30")} snapshot_prefix: "{tmp_path}/s"'
    want = linear_solver(settings, cuda, listeners=[Watcher()])
    with pytest.raises(TrainingError):
        want.step(60)
    solver = linear_solver(settings, cuda, listeners=[Breaking(want.iter + 5)])
    with pytest.raises(KeyboardInterrupt):
        solver.step(60)
    ask = {"step": lambda: solver.step(1), "apply_update": solver.apply_update, "snapshot": solver.snapshot}[after]
    with pytest.raises(TrainingError, match=f"in iteration {want.iter}:"):
        ask()
    assert solver.iter == want.iter
    assert not list(tmp_path.iterdir())


LABELS = """
  layer { name: "x" type: "Input" top: "x" top: "t" input_param { shape { dim: 4 dim: 3 } shape { dim: 4 } } }
  layer { name: "ip" type: "InnerProduct" bottom: "x" top: "y" inner_product_param { num_output: 3 weight_filler { type: "gaussian" std: 0.5 } } }
  layer { name: "soft" type: "SoftmaxWithLoss" bottom: "y" bottom: "t" top: "loss" include { phase: TRAIN } }
  layer { name: "accuracy" type: "Accuracy" bottom: "y" bottom: "t" top: "accuracy" include { phase: TEST } }
"""


def test_a_label_out_of_range_is_told_by_its_layer(cuda: Any, seldom: None) -> None:
    solver = make_solver(f"{RATE} test_interval: 1000 test_iter: 2 test_initialization: false", LABELS, cuda)
    solver.step(6)
    cuda.from_host(np.array([0, 1, 3, 2]), solver.net.blobs["t"].data)
    with pytest.raises(DataError, match=r"^layer 'soft': label 3 at position 2 of the batch is outside 0\.\.2"):
        solver.step(6)
    assert solver.iter == 6


ROOTS = """
  layer { name: "x" type: "Input" top: "x" top: "t" input_param { shape { dim: 7 dim: 5 } shape { dim: 7 dim: 5 } } }
  layer { name: "bn" type: "BatchNorm" bottom: "x" top: "y" }
  layer { name: "root" type: "Power" bottom: "y" top: "root" power_param { power: 0.5 } }
  layer { name: "ip" type: "InnerProduct" bottom: "y" top: "z" inner_product_param { num_output: 5 weight_filler { type: "gaussian" std: 0.5 } } }
  layer { name: "loss" type: "EuclideanLoss" bottom: "z" bottom: "t" top: "loss" }
"""


def test_a_display_of_a_nan_is_no_pass(cuda: Any, rng: np.random.Generator, seldom: None) -> None:
    """The pass that is repeated to see whether a label is to blame leaves the sums of BatchNorm as they were."""
    x, found = rng.normal(size=(7, 5)), {}
    for display in (0, 1):
        heard = Recorder()
        solver = make_solver(f"{RATE} display: {display}", ROOTS, cuda, listeners=[heard])
        cuda.from_host(x, solver.net.blobs["x"].data)
        solver.step(3)
        assert all(np.isnan(outputs[1].values).any() for _, _, _, outputs, _ in heard.named("display")), "root"
        assert len(heard.named("display")) == 3 * display
        found[display] = weights_of(solver)
    assert found[1]["bn/2"] == pytest.approx(1 + 0.999 + 0.999**2)
    for label, want in found[0].items():
        np.testing.assert_array_equal(found[1][label], want, label)


def test_a_label_out_of_range_in_a_test(cuda: Any) -> None:
    solver = make_solver(f"{RATE} test_interval: 1000 test_iter: 2 test_initialization: false", LABELS, cuda)
    for _ in range(3):
        solver.test_all()
    cuda.from_host(np.array([0, 1, 2, -1]), solver.test_nets[0].blobs["t"].data)
    with pytest.raises(DataError, match=r"^layer 'accuracy': label -1 at position 3 of the batch is outside 0\.\.2"):
        solver.test_all()


def test_a_restored_seed_counts(cuda: Any, tmp_path: Path) -> None:
    """A record holds the seed of dropout, so that a restored one needs a new record."""
    settings = f'{RATE} snapshot_prefix: "{tmp_path}/s" random_seed: '
    first = make_solver(f"{settings} 1", IMAGES, cuda)
    first.step(4)
    state = first.snapshot()
    first.step(4)
    second = make_solver(f"{settings} 2", IMAGES, cuda)
    second.step(3)
    second.restore(state)
    second.step(4)
    for label, want in weights_of(first).items():
        np.testing.assert_array_equal(weights_of(second)[label], want, label)


def test_a_restored_seed_counts_in_tests(cuda: Any, tmp_path: Path) -> None:
    """A layer may say phase: TRAIN in a test net too; its mask is then drawn from the seed."""
    net = IMAGES.replace('type: "Dropout"', 'type: "Dropout" phase: TRAIN')
    settings = f'{RATE} test_interval: 100 test_iter: 1 snapshot_prefix: "{tmp_path}/s" random_seed: '
    heard = [Recorder(), Recorder()]
    first, second = (make_solver(f"{settings} {seed}", net, cuda, listeners=[listener]) for seed, listener in zip((1, 2), heard))
    for solver in (first, second):
        for _ in range(3):
            solver.test_all()
    second.restore(first.snapshot())
    for solver in (first, second):
        solver.test_all()
    scores = [listener.named("test") for listener in heard]
    assert scores[0][-1] == scores[1][-1]
    assert scores[0][-2] != scores[1][-2]


def test_hooks_are_called_also_when_they_come_late(cuda: Any) -> None:
    solver = linear_solver(RATE, cuda)
    solver.step(4)
    seen: list[int] = []
    solver.net.hooks.after_forward.append(seen.append)
    solver.step(2)
    assert seen == [0, 1, 2] * 2
    solver.net.hooks.after_forward.clear()
    want = linear_solver(RATE, cuda)
    want.step(8)
    solver.step(2)
    for label, weights in weights_of(want).items():
        np.testing.assert_array_equal(weights_of(solver)[label], weights, label)


LATE = """
  layer { name: "x" type: "DummyData" top: "x" dummy_data_param { shape { dim: 4 dim: 3 dim: 16 dim: 16 } data_filler { type: "gaussian" std: 1 } } }
  layer { name: "c" type: "Convolution" bottom: "x" top: "c" convolution_param { num_output: 3 kernel_size: 3 weight_filler { type: "msra" } } }
  layer { name: "p" type: "Pooling" bottom: "c" top: "p" pooling_param { pool: AVE kernel_size: 7 stride: 7 } }
  layer { name: "t" type: "Data" top: "t" transform_param { crop_size: 2 scale: 0.01 } data_param { source: "LMDB" backend: LMDB batch_size: 4 } }
  layer { name: "loss" type: "EuclideanLoss" bottom: "p" bottom: "t" top: "loss" }
"""


def test_a_source_behind_other_layers_is_fed_before_them(cuda: Any, reference: Any) -> None:
    """All sources are fed before a record is played: what the layers in between write must not lie where the source's top does."""
    losses = []
    for ops in (cuda, reference):  # with observe, all have memory of their own
        solver, found = make_solver(RATE, LATE, ops, observe=ops is reference), []
        for _ in range(5):
            solver.step(1)
            found.append(solver.net.loss())
        losses.append(found)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_the_weights_in_bfloat16_follow_updates_and_changes_from_outside(cuda: Any) -> None:
    solver = make_solver(RATE, IMAGES, cuda, precision="bfloat16")
    other = make_solver(RATE, IMAGES, cuda, precision="bfloat16")
    for steps in (1, 4, 2):
        solver.step(steps)
        arena = solver.net.arena
        want = cuda.to_host(arena.master).astype(ml_dtypes.bfloat16).astype(np.float32)
        np.testing.assert_array_equal(cuda.to_host(arena.lowered), want)
        other.net.copy_from(solver.net.to_proto())
        other.step(1)  # with weights that its record has not seen
        loss = other.net.loss()
        np.testing.assert_array_equal(cuda.to_host(other.net.arena.lowered), cuda.to_host(other.net.arena.master).astype(ml_dtypes.bfloat16).astype(np.float32))
        assert np.isfinite(loss)


def test_a_record_follows_its_parameters_to_other_arrays(cuda: Any) -> None:
    solver, other = (make_solver(f"{RATE} test_interval: 1000 test_iter: 2 test_initialization: false", LABELS, cuda) for _ in range(2))
    for one in (solver, other):
        cuda.from_host(np.arange(12.0).reshape(4, 3), one.test_nets[0].blobs["x"].data)
    test = solver.test_nets[0]
    for _ in range(3):
        test.forward_again()
    cuda.fill(other.net.params["ip"][0].master, 7.0)
    solver.net.share_with(other.net)
    test.forward_again()
    np.testing.assert_array_equal(cuda.to_host(test.blobs["y"].data), np.repeat([[21], [84], [147], [210]], 3, 1))
