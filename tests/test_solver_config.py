"""What a solver asks for: settings that cannot work, and which nets it trains and tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from caffelite.errors import SpecError
from caffelite.schema import SolverSpec, pb, solver_from_text
from caffelite.solver.config import NetChoice, check_solver, test_choices, train_choice

test_choices.__test__ = False  # type: ignore[attr-defined]  # a function of the package, no test

RATE = 'base_lr: 0.1 lr_policy: "fixed" '
INPUT = 'layer { name: "in" type: "Input" top: "x" input_param { shape { dim: 1 } } }'
DATA = 'layer { name: "d" type: "Data" top: "x" include { phase: TEST } data_param { source: "db" batch_size: 2 backend: LMDB } } ' + INPUT.replace(
    'type: "Input"', 'type: "Input" include { phase: TRAIN }'
)


def choices_of(spec: SolverSpec) -> list[NetChoice]:
    check_solver(spec)
    return test_choices(spec, train_choice(spec))


def refusal(text: str) -> str:
    spec = solver_from_text(text, "s.prototxt")
    with pytest.raises(SpecError) as caught:
        choices_of(spec)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('type: "adam"', "s.prototxt:2:1: unknown solver type 'adam'\n  did you mean 'Adam'?"),
        ('type: "Momentum"', "s.prototxt:2:1: unknown solver type 'Momentum'"),
        ('type: "AdaGrad"\nmomentum: 0.9', "s.prototxt:3:1: AdaGrad has no momentum, found momentum 0.9"),
        ('type: "RMSProp"\nmomentum: 0.9', "s.prototxt:3:1: RMSProp has no momentum"),
        ('type: "RMSProp"\nrms_decay: 1', "s.prototxt:3:1: rms_decay must be at least 0 and less than 1, found 1"),
        ('type: "Adam"\nmomentum: 1', "s.prototxt:3:1: Adam divides by 1 - momentum"),
        ('weight_decay: 0.1\nregularization_type: "L3"', "s.prototxt:3:1: unknown regularization_type 'L3'\n  choose one of L2, L1"),
        ("average_loss: 0", "s.prototxt:2:1: average_loss must be 1 or greater, found 0"),
        ("iter_size: 0", "s.prototxt:2:1: iter_size must be 1 or greater, found 0"),
        ("test_interval: 5\ntest_iter: 0", "s.prototxt:3:1: test_iter must be 1 or greater, found 0"),
        ("random_seed: -7", "s.prototxt:2:1: random_seed must be 0 or greater, found -7"),
        ("snapshot: 10", "s.prototxt:2:1: snapshot is set but snapshot_prefix is not"),
        ("snapshot_keep: -1", "s.prototxt:2:1: snapshot_keep must be 0 or greater"),
        ('train_net: "b"', "s.prototxt:2:1: a solver has exactly one of net, net_param, train_net, train_net_param; found net and train_net"),
        ("test_iter: 3", "s.prototxt:2:1: a test net needs test_interval greater than 0"),
        ('test_net: "b"', "s.prototxt:2:1: a test net needs test_interval greater than 0"),
        ('test_interval: 9 test_net: "a" test_net: "b"\ntest_iter: 1', "s.prototxt:3:1: at least 2 test_iter value(s) expected, one per test net; found 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_with_their_place(text: str, message: str) -> None:
    assert message in refusal(f'net: "n" {RATE}\n{text}')


def test_a_decay_of_zero_needs_no_regularisation_type() -> None:
    check_solver(solver_from_text(f'net: "n" {RATE} regularization_type: "none"'))


def test_no_net_at_all() -> None:
    assert "exactly one of net, net_param, train_net, train_net_param; found none of them" in refusal(RATE)


def test_separate_test_nets_need_one_count_each() -> None:
    text = f"train_net_param {{ {INPUT} }} test_net_param {{ {INPUT} }} test_interval: 5 test_iter: 1 test_iter: 2 {RATE}"
    assert "1 test_iter value(s) expected, one per test net; found 2" in refusal(text)


def test_a_missing_net_file_is_placed_in_the_solver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    message = refusal(f'{RATE}\nnet: "models/none.prototxt"')
    assert message.startswith("s.prototxt:2:1: the net file 'models/none.prototxt' does not exist\n")
    assert str(tmp_path) in message


def choices(text: str) -> list[tuple[str, int | None]]:
    return [(choice.origin, choice.test_iter) for choice in choices_of(solver_from_text(text, "s.prototxt"))]


def test_test_nets_come_in_caffes_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "n"):
        Path(name).write_text(INPUT)
    text = f'test_net: "a" test_net: "b" net: "n" test_net_param {{ {INPUT} }} test_interval: 5 {RATE}'
    counts = " ".join(f"test_iter: {n}" for n in (10, 20, 30, 40, 50))
    expected = ["test_net_param", "test_net file: a", "test_net file: b", "net file: n", "net file: n"]
    assert choices(text + counts) == list(zip(expected, (10, 20, 30, 40, 50)))
    assert choices(text) == list(zip(expected[:3], (None, None, None)))


def test_a_net_with_test_data_is_tested_whole_when_test_iter_is_absent() -> None:
    assert choices(f"net_param {{ {DATA} }} test_interval: 5 {RATE}") == [("net_param", None)]
    assert choices(f"net_param {{ {DATA} }} {RATE}") == []  # as in Caffe: nothing asks for a test
    assert choices(f"net_param {{ {INPUT} }} test_interval: 5 {RATE}") == []  # nothing that could be counted


def test_states_are_merged_in_caffes_order() -> None:
    text = f"""net_param {{ state {{ level: 3 stage: "file" }} {INPUT} }} test_interval: 5 test_iter: 1 test_iter: 1 {RATE}
      train_state {{ stage: "train" }} test_state {{ level: 7 }} test_state {{ stage: "second" }}"""
    spec = solver_from_text(text)
    train = train_choice(spec)
    assert (train.phase, train.level, train.stages) == (pb.TRAIN, 3, ("train",))
    tests = test_choices(spec, train)
    assert [(t.phase, t.level, t.stages) for t in tests] == [(pb.TEST, 7, ()), (pb.TEST, 3, ("second",))]


def test_one_state_per_test_net() -> None:
    message = refusal(f"net_param {{ {INPUT} }} test_interval: 5 test_iter: 1 {RATE}\ntest_state {{ }} test_state {{ }}")
    assert "s.prototxt:2:1: 2 test_state(s) for 1 test net(s)" in message
