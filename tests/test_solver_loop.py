"""The loop: order of events, smoothing, displays, tests, signals, divergence."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
from solver_harness import IMAGES, LINEAR, RATE, Recorder, linear_solver, make_solver, value_of, weights_of

from caffelite.errors import SpecError, TrainingError
from caffelite.solver.loop import Solver
from caffelite.solver.tracking import Best, LossWindow

QUIET = "snapshot_after_train: false "


def test_the_window_is_caffes() -> None:
    losses = [5.0, 3.0, 7.0, 1.0, 9.0, 2.0]
    window = LossWindow(3)
    got = [window.add(loss, i) for i, loss in enumerate(losses)]
    assert got == pytest.approx([5, 4, 5, 11 / 3, 17 / 3, 4])


def test_best_goes_up_for_a_score_and_down_for_a_loss() -> None:
    up, down = Best("accuracy"), Best("val_Loss")
    assert up.beaten_by(0.1)
    assert not up.beaten_by(float("nan"))
    up.value = down.value = 0.5
    assert [up.beaten_by(v) for v in (0.4, 0.5, 0.6)] == [False, False, True]
    assert [down.beaten_by(v) for v in (0.4, 0.5, 0.6)] == [True, False, False]


TESTED = LINEAR + 'layer { name: "score" type: "Power" bottom: "loss" top: "score" power_param { scale: 2 } include { phase: TEST } }'


def test_events_come_in_caffes_order(tmp_path: Path) -> None:
    heard = Recorder()
    text = f'{RATE} max_iter: 4 display: 2 test_interval: 2 test_iter: 1 snapshot: 2 snapshot_prefix: "{tmp_path}/run"'
    solver = make_solver(text, TESTED, listeners=[heard])
    assert solver.solve() is False
    order = [(event[0], event[1]) for event in heard.events if event[0] not in ("message", "snapshot")]
    assert order == [
        ("start", 0), ("test start", 0), ("test", 0), ("display", 0), ("iteration", 1), ("iteration", 2),
        ("test start", 2), ("test", 2), ("display", 2), ("iteration", 3), ("iteration", 4), ("display", 4), ("test start", 4), ("test", 4), ("end", False),
    ]  # fmt: skip
    positions = [i for i, event in enumerate(heard.events) if event[0] == "snapshot"]
    assert [heard.events[i - 3][:2] for i in positions] == [("iteration", 2), ("iteration", 4)]
    assert heard.named("snapshot")[1][1:] == (f"{tmp_path}/run_iter_4.caffemodel", f"{tmp_path}/run_iter_4.solverstate")
    assert sorted(os.listdir(tmp_path)) == [f"run_iter_{n}.{kind}" for n in (2, 4) for kind in ("caffemodel", "solverstate")]
    assert heard.messages()[:3] == [
        "Creating training net specified in net_param.",
        "Creating test net (#0) specified by net_param",
        "Solver scaffolding done.",
    ]
    assert heard.messages()[-2:] == ["Optimization Done.", "Optimization Done."]


def test_the_closing_display_is_a_forward_pass_only() -> None:
    heard = Recorder()
    solver = make_solver(f"{RATE} {QUIET} max_iter: 2 display: 1", LINEAR, listeners=[heard])
    solver.solve()
    final = heard.named("display")[-1]
    assert final[1] == 2
    assert final[3:] == ((), None)
    assert final[2] == pytest.approx(solver.net.loss())


def test_no_test_at_the_start_when_it_is_turned_off() -> None:
    heard = Recorder()
    make_solver(f"{RATE} test_interval: 2 test_iter: 1 test_initialization: false", LINEAR, listeners=[heard]).step(3)
    assert [event[1] for event in heard.named("test")] == [2]


def test_display_shows_the_smoothed_loss_and_the_last_parts_outputs() -> None:
    settings = f"{RATE} display: 3 average_loss: 2 iter_size: 2 random_seed: 3"
    shadow, losses = linear_solver(settings), []
    for _ in range(7):
        shadow.net.forward()
        losses.append(shadow.net.loss())
        shadow.step(1)
    heard = Recorder()
    linear_solver(settings, listeners=[heard]).step(7)
    shown = heard.named("display")
    assert [event[1] for event in shown] == [0, 3, 6]
    assert [event[2] for event in shown] == pytest.approx([losses[0], (losses[2] + losses[3]) / 2, (losses[5] + losses[6]) / 2])
    (output,) = shown[1][3]
    assert (output.blob, output.weight) == ("loss", 1)
    assert output.values == pytest.approx((losses[3],))
    assert shown[1][4] == float(np.float32(0.1))


# --- tests of the weights ------------------------------------------------------------------------------------------------


def mean_over(solver: Solver, positions: list[tuple[int, int]]) -> tuple[float, float]:
    """Mean accuracy and loss over records [start, start+1), each scored alone in a net of batch 1."""
    single = make_solver(f"{RATE} test_interval: 1 test_iter: 1", IMAGES.replace("batch_size: 30", "batch_size: 1"))
    for mine, theirs in zip(single.net.learnable, solver.net.learnable):
        solver.backend.copy(theirs.master, mine.master)
    net, totals = single.test_nets[0], np.zeros(2)
    count = 0
    for start, stop in positions:
        net.data_layers[0].source.seek(start)
        for _ in range(start, stop):
            net.forward()
            values = net.output_values()
            totals += float(values["accuracy"]), float(values["loss"])
            count += 1
    return totals[0] / count, totals[1] / count


def test_without_test_iter_every_record_is_scored_once() -> None:
    heard = Recorder()
    solver = make_solver(f"{RATE} test_interval: 2 random_seed: 1 test_compute_loss: true", IMAGES, listeners=[heard])
    solver.step(3)  # tests at 0 and 2; 200 records in batches of 30: the last one has 20
    solver.step(0)
    events = heard.named("test")
    assert [(event[1], event[5]) for event in events] == [(0, 200), (2, 200)]
    accuracy, loss = mean_over(make_solver(f"{RATE} random_seed: 1", IMAGES), [(0, 200)])
    assert value_of(events[0][3], "accuracy") == pytest.approx(accuracy, abs=1e-7)
    assert value_of(events[0][3], "loss") == pytest.approx(loss, rel=1e-5)
    assert events[0][4] == pytest.approx(loss, rel=1e-5)


def test_the_whole_set_is_scored_again_in_every_test() -> None:
    heard = Recorder()
    solver = make_solver(f"{RATE} test_interval: 1 random_seed: 1", IMAGES, listeners=[heard])
    for _ in range(2):
        solver.test_all()
    first, second = heard.named("test")
    assert first[3] == second[3]


def test_a_shuffled_set_is_scored_whole_after_a_restore_brought_another_seed(tmp_path: Path) -> None:
    net = IMAGES.replace("batch_size: 30", "batch_size: 30 shuffle: true")
    state = make_solver(f'{RATE} random_seed: 1 snapshot_prefix: "{tmp_path}/s"', net).snapshot()
    heard = Recorder()
    solver = make_solver(f"{RATE} test_interval: 1 random_seed: 5", net, listeners=[heard])
    solver.test_all()
    solver.restore(state)
    solver.test_all()
    _, loss = mean_over(solver, [(0, 200)])
    assert value_of(heard.named("test")[1][3], "loss") == pytest.approx(loss, rel=1e-6)


def test_a_set_smaller_than_the_batch() -> None:
    heard = Recorder()
    solver = make_solver(f"{RATE} test_interval: 1 random_seed: 1", IMAGES.replace("batch_size: 30", "batch_size: 256"), listeners=[heard])
    solver.test_all()
    accuracy, _ = mean_over(solver, [(0, 200)])
    assert heard.named("test")[0][5] == 200
    assert value_of(heard.named("test")[0][3], "accuracy") == pytest.approx(accuracy, abs=1e-7)


def test_outputs_with_a_row_per_record_are_averaged_row_by_row() -> None:
    heard = Recorder()
    net = IMAGES + 'layer { name: "prob" type: "Softmax" bottom: "ip" top: "prob" include { phase: TEST } }'
    make_solver(f"{RATE} test_interval: 1 random_seed: 1", net, listeners=[heard]).test_all()
    prob = next(output for output in heard.named("test")[0][3] if output.blob == "prob")
    np.testing.assert_allclose(np.reshape(prob.values, (30, 10)).sum(1), 1, rtol=1e-5)


def test_with_test_iter_a_test_goes_on_where_the_last_one_stopped() -> None:
    heard = Recorder()
    solver = make_solver(f"{RATE} test_interval: 1 test_iter: 3 random_seed: 1", IMAGES, listeners=[heard])
    solver.test_all()
    solver.test_all()
    for event, span in zip(heard.named("test"), ([(0, 90)], [(90, 180)])):
        accuracy, _ = mean_over(solver, span)
        assert value_of(event[3], "accuracy") == pytest.approx(accuracy, abs=1e-6)
        assert event[5] == 90
    assert solver.test_nets[0].data_layers[0].source.position == 180


def test_a_test_net_that_cannot_be_counted() -> None:
    text = f"test_net_param {{ {LINEAR} }} test_interval: 1 {RATE}"
    with pytest.raises(SpecError, match=r"s.prototxt:\d+:\d+: the test net reads no database") as caught:
        make_solver(text, LINEAR)
    assert "add test_iter" in str(caught.value)


def test_testing_changes_no_weight_and_moves_no_training_data() -> None:
    results = []
    for extra in ("", "test_interval: 1 test_iter: 2"):
        solver = make_solver(f"{RATE} {extra} random_seed: 4", IMAGES)
        solver.step(3)
        results.append(weights_of(solver))
    for label, values in results[0].items():
        np.testing.assert_array_equal(values, results[1][label])


def test_best_must_name_an_output() -> None:
    base = f'{RATE} test_interval: 1 snapshot_prefix: "x"\n'
    with pytest.raises(SpecError, match=r"s.prototxt:\d+:1: snapshot_best names 'acc', which no test net puts out\n  its outputs: accuracy, loss"):
        make_solver(base + 'snapshot_best: "acc"', IMAGES)
    with pytest.raises(SpecError, match="which no test net puts out\n  add a test net"):
        make_solver(f'{RATE} snapshot_prefix: "x" snapshot_best: "acc"', IMAGES)


# --- signals -----------------------------------------------------------------------------------------------------------


class SignalAt(Recorder):
    """Sends this process a signal when an event happens."""

    def __init__(self, event: str, at: int, number: int) -> None:
        super().__init__()
        self.event, self.at, self.number = event, at, number

    def on_iteration(self, iteration: int, loss: float) -> None:
        super().on_iteration(iteration, loss)
        if (self.event, self.at) == ("iteration", iteration):
            os.kill(os.getpid(), self.number)

    def on_test_batch(self, net_index: int, done: int, total: int) -> None:
        if (self.event, self.at) == ("batch", done):
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_finishes_the_iteration_and_snapshots(tmp_path: Path, number: int) -> None:
    heard = SignalAt("iteration", 3, number)
    solver = make_solver(f'{RATE} max_iter: 9 snapshot_prefix: "{tmp_path}/s"', LINEAR, listeners=[heard])
    assert solver.solve() is True
    assert solver.iter == 3
    assert sorted(os.listdir(tmp_path)) == ["s_iter_3.caffemodel", "s_iter_3.solverstate"]
    assert heard.messages()[-2:] == ["Optimization stopped early.", "Optimization Done."]
    assert heard.events[-1] == ("end", True)


def test_hangup_snapshots_and_goes_on(tmp_path: Path) -> None:
    heard = SignalAt("iteration", 2, signal.SIGHUP)
    solver = make_solver(f'{RATE} {QUIET} max_iter: 5 snapshot_prefix: "{tmp_path}/s"', LINEAR, listeners=[heard])
    assert solver.solve() is False
    assert sorted(os.listdir(tmp_path)) == ["s_iter_2.caffemodel", "s_iter_2.solverstate"]


def test_a_stop_during_a_test_ends_it(tmp_path: Path) -> None:
    heard = SignalAt("batch", 2, signal.SIGINT)
    solver = make_solver(f'{RATE} max_iter: 5 test_interval: 2 test_initialization: false snapshot_prefix: "{tmp_path}/s"', IMAGES, listeners=[heard])
    assert solver.solve() is True
    assert heard.named("test") == []
    assert "Test interrupted." in heard.messages()
    assert sorted(os.listdir(tmp_path)) == ["s_iter_2.caffemodel", "s_iter_2.solverstate"]


def test_effects_are_configurable(tmp_path: Path) -> None:
    heard = SignalAt("iteration", 2, signal.SIGINT)
    solver = make_solver(f'{RATE} {QUIET} max_iter: 4 snapshot_prefix: "{tmp_path}/s"', LINEAR, listeners=[heard], effects={"SIGINT": "none"})
    assert solver.solve() is False
    assert os.listdir(tmp_path) == []


# --- divergence --------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_the_layer_and_the_last_snapshot(tmp_path: Path) -> None:
    heard = Recorder()
    text = f'base_lr: 1e6 lr_policy: "fixed" max_iter: 400 snapshot: 2 snapshot_keep: 2 snapshot_prefix: "{tmp_path}/s"'
    solver = linear_solver(text, listeners=[heard])
    with pytest.raises(TrainingError) as caught:
        solver.solve()
    text = str(caught.value)
    assert f"in iteration {solver.iter}: layer '" in text or "nothing is saved" in text
    last = heard.named("snapshot")[-1][2]
    assert f"the last good snapshot is {last}" in text
    fresh = linear_solver(f"{RATE} max_iter: 400")
    fresh.restore(last)
    assert all(np.isfinite(values).all() for values in weights_of(fresh).values())


def test_the_first_layer_with_nan_is_named() -> None:
    solver = linear_solver(RATE)
    solver.backend.fill(solver.net.blobs["t"].data, float("nan"))
    with pytest.raises(TrainingError, match=r"the loss is nan in iteration 0: layer 'x' \(Input\): its top 't' is not finite\n  no snapshot was written"):
        solver.step(1)


def test_after_a_bad_loss_the_data_stands_where_its_iteration_began() -> None:
    solver = make_solver(f"{RATE} iter_size: 2", IMAGES)
    solver.step(3)
    solver.backend.fill(solver.net.params["ip"][1].master, float("nan"))
    with pytest.raises(TrainingError, match="in iteration 3: layer 'ip'"):
        solver.step(1)
    assert (solver.iter, solver.net.data_layers[0].source.position) == (3, 3 * 2 * 16)


def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    solver = linear_solver(f'{RATE} snapshot_prefix: "{tmp_path}/s"')
    solver.backend.fill(solver.net.params["ip"][1].master, float("inf"))
    with pytest.raises(TrainingError, match="layer 'ip': parameter 1 is not finite after iteration 0; nothing is saved"):
        solver.snapshot()
    assert os.listdir(tmp_path) == []


# --- the rest ----------------------------------------------------------------------------------------------------------


def test_nothing_to_train() -> None:
    with pytest.raises(SpecError, match="max_iter is missing or 0"):
        make_solver(RATE, LINEAR).solve()
    with pytest.raises(SpecError, match="no parameter of the train net learns from a loss"):
        make_solver(f"{RATE} {QUIET} max_iter: 3", LINEAR.replace("lr_mult: 1.5", "lr_mult: 0").replace("lr_mult: 2", "lr_mult: 0")).solve()


@pytest.mark.parametrize("extra", ["", "clip_gradients: 0.1", "debug_info: true", "iter_size: 2"])
def test_steps_of_a_net_in_which_nothing_learns_change_nothing(extra: str) -> None:
    """As in Caffe, whose step() runs such nets too."""
    frozen = LINEAR.replace("lr_mult: 1.5", "lr_mult: 0").replace("lr_mult: 2", "lr_mult: 0")
    for net in (frozen, frozen.replace('type: "EuclideanLoss"', 'type: "EuclideanLoss" loss_weight: 0')):
        solver = make_solver(f"{RATE} {QUIET} {extra}", net)
        before = weights_of(solver)
        solver.step(2)
        assert solver.iter == 2
        for name, values in weights_of(solver).items():
            np.testing.assert_array_equal(values, before[name])


def test_an_absent_seed_differs_from_run_to_run_and_a_given_one_does_not() -> None:
    def weights(text: str) -> np.ndarray:
        return weights_of(make_solver(RATE + text, LINEAR, seeded=False))["ip/0"]

    assert not np.array_equal(weights(""), weights(""))
    np.testing.assert_array_equal(weights("random_seed: 5"), weights("random_seed: 5"))


def test_debug_lines_on_displayed_iterations_only() -> None:
    heard = Recorder()
    solver = linear_solver(f"{RATE} debug_info: true display: 2", listeners=[heard])
    solver.step(2)
    lines = [text for text in heard.messages() if text.startswith("    [")]
    mean = np.abs(solver.backend.to_host(solver.net.blobs["x"].data)).mean()
    assert lines[0] == f"    [Forward] Layer x, top blob x data: {mean:g}"
    assert [line.split(": ")[0] for line in lines[1:]] == [
        "    [Forward] Layer x, top blob t data",
        "    [Forward] Layer ip, top blob y data",
        "    [Forward] Layer ip, param blob 0 data",
        "    [Forward] Layer ip, param blob 1 data",
        "    [Forward] Layer loss, top blob loss data",
        "    [Backward] Layer loss, bottom blob y diff",
        "    [Backward] Layer ip, param blob 0 diff",
        "    [Backward] Layer ip, param blob 1 diff",
        "    [Backward] All net params (data, diff)",
    ]
    assert heard.events[-1][0] == "iteration"


def test_initial_weights_are_loaded_into_all_nets(tmp_path: Path) -> None:
    source = make_solver(f"{RATE} random_seed: 8", LINEAR)
    source.net.save(tmp_path / "w.caffemodel")
    heard = Recorder()
    solver = make_solver(f'{RATE} test_interval: 1 test_iter: 1 weights: "{tmp_path}/w.caffemodel"', LINEAR, listeners=[heard])
    np.testing.assert_array_equal(weights_of(solver)["ip/0"], weights_of(source)["ip/0"])
    assert heard.messages().count(f"Finetuning from {tmp_path}/w.caffemodel") == 2
    assert not any(text.startswith("Ignoring") for text in heard.messages())


def test_layers_that_find_no_place_in_the_net_are_told(tmp_path: Path) -> None:
    make_solver(RATE, LINEAR + 'layer { name: "score" type: "Power" bottom: "loss" top: "score" }').net.save(tmp_path / "w.caffemodel")
    heard = Recorder()
    make_solver(f'{RATE} weights: "{tmp_path}/w.caffemodel"', LINEAR, listeners=[heard])
    assert [event[1:] for event in heard.named("message") if "Ignoring" in event[1]] == [("Ignoring source layer score", "net.cpp", "I")]
    assert not heard.warnings()


def test_layers_that_find_no_weights_are_told(tmp_path: Path) -> None:
    two = LINEAR.replace('bottom: "x" top: "y"', 'bottom: "s" top: "y"').replace(
        '  layer { name: "ip"', '  layer { name: "more" type: "Scale" bottom: "x" top: "s" }\n  layer { name: "ip"'
    )
    make_solver(RATE, LINEAR).net.save(tmp_path / "one.caffemodel")
    make_solver(RATE, two).net.save(tmp_path / "two.caffemodel")
    for names, warnings in (("one", [f"{tmp_path}/one.caffemodel: no weights for more: left to the filler"]), ("one two", []), ("two", [])):
        heard = Recorder()
        weights = " ".join(f'weights: "{tmp_path}/{name}.caffemodel"' for name in names.split())
        make_solver(f"{RATE} {weights}", two, listeners=[heard])
        assert heard.warnings() == warnings
