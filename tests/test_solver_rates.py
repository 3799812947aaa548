"""Learning-rate policies against their formulas, and the checks made when a solver is read."""

from __future__ import annotations

import math

import numpy as np
import pytest

from caffelite.errors import SpecError
from caffelite.schema import solver_from_text
from caffelite.solver.config import check_solver
from caffelite.solver.rates import RatePolicy, as_float32

NET = 'net: "net.prototxt" max_iter: 100 '


def policy(text: str) -> tuple[RatePolicy, list[str]]:
    spec = solver_from_text(NET + text)
    check_solver(spec)
    heard: list[str] = []
    return RatePolicy(spec.param, heard.append), heard


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ('lr_policy: "fixed" base_lr: 0.02', lambda k: 0.02),
        ('lr_policy: "step" base_lr: 0.02 gamma: 0.5 stepsize: 7', lambda k: 0.02 * 0.5 ** math.floor(k / 7)),
        ('lr_policy: "exp" base_lr: 0.05 gamma: 0.93', lambda k: 0.05 * 0.93**k),
        ('lr_policy: "inv" base_lr: 0.05 gamma: 0.1 power: 0.75', lambda k: 0.05 / (1 + 0.1 * k) ** 0.75),
        ('lr_policy: "poly" base_lr: 0.05 power: 1.5', lambda k: 0.05 * (1 - k / 100) ** 1.5),
        ('lr_policy: "sigmoid" base_lr: 0.05 gamma: -0.5 stepsize: 6', None),
        ('lr_policy: "sigmoid" base_lr: 0.05 gamma: 0.5 stepsize: 6', lambda k: 0.05 / (1 + math.exp(-0.5 * (k - 6)))),
        ('lr_policy: "multistep" base_lr: 0.5 gamma: 0.1 stepvalue: 3 stepvalue: 9', lambda k: 0.5 * 0.1 ** ((k >= 3) + (k >= 9))),
    ],
)
def test_rate_follows_its_formula(text: str, formula) -> None:
    if formula is None:
        with pytest.raises(SpecError, match="gamma must be 0 or greater"):
            policy(text)
        return
    rates, _ = policy(text)
    for k in range(101):
        assert rates.rate(k) == pytest.approx(formula(k), rel=1e-7 * (k + 3)), k  # gamma itself is rounded to float32


def test_rate_is_a_float32() -> None:
    rates, _ = policy('lr_policy: "exp" base_lr: 0.1 gamma: 0.7')
    assert all(rates.rate(k) == float(np.float32(rates.rate(k))) for k in range(20))
    assert rates.rate(0) == float(np.float32(0.1)) != 0.1
    assert as_float32(1e60) == math.inf


def test_multistep_advances_one_step_per_evaluation_and_says_so() -> None:
    rates, heard = policy('lr_policy: "multistep" base_lr: 1 gamma: 0.5 stepvalue: 2 stepvalue: 2 stepvalue: 5')
    assert [rates.rate(k) for k in (0, 1, 2, 3, 4, 5, 6)] == [1, 1, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert heard == ["MultiStep Status: Iteration 2, step = 1", "MultiStep Status: Iteration 3, step = 2", "MultiStep Status: Iteration 5, step = 3"]
    assert rates.current_step == 3


def test_step_recomputes_its_step() -> None:
    rates, _ = policy('lr_policy: "step" base_lr: 1 gamma: 0.5 stepsize: 10')
    rates.current_step = 99
    assert rates.rate(25) == 0.25
    assert rates.current_step == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('lr_policy: "fixed"', "s.prototxt:1:1: base_lr is missing"),
        ("base_lr: 1", "s.prototxt:1:1: lr_policy is missing"),
        ('base_lr: 1\nlr_policy: "stepp"', "s.prototxt:3:1: unknown lr_policy 'stepp'\n  did you mean 'step'?"),
        ('base_lr: 1\nlr_policy: "step" gamma: 0.1', "s.prototxt:3:1: lr_policy 'step' needs stepsize"),
        ('base_lr: 1\nlr_policy: "step" stepsize: 5', "s.prototxt:3:1: lr_policy 'step' needs gamma"),
        ('base_lr: 1 lr_policy: "step" gamma: 0.1\n stepsize: 0', "s.prototxt:3:2: stepsize must be greater than 0, found 0"),
        ('base_lr: 1 lr_policy: "exp"\n  gamma: -0.5', "s.prototxt:3:3: gamma must be 0 or greater, found -0.5"),
        ('base_lr: 1 lr_policy: "multistep" gamma: 0.1', "lr_policy 'multistep' needs stepvalue"),
        ('base_lr: 1 lr_policy: "multistep" gamma: 0.1 stepvalue: 9\nstepvalue: 5', "s.prototxt:3:1: stepvalue must not decrease: 5 follows 9"),
        ('base_lr: 1 lr_policy: "sigmoid" gamma: 0.1', "lr_policy 'sigmoid' needs stepsize"),
    ],
)
def test_bad_policies_are_refused_with_their_place(text: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_solver(solver_from_text('net: "n"\n' + text, "s.prototxt"))
    assert message in str(caught.value)


def test_poly_needs_a_length() -> None:
    with pytest.raises(SpecError, match="lr_policy 'poly' needs max_iter"):
        check_solver(solver_from_text('net: "n" base_lr: 1 lr_policy: "poly"'))
