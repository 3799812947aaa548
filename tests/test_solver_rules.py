"""All update rules, clipping, iter_size and regularisation against a float64 restatement of the whole training of a linear net."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from solver_harness import RATE, linear_solver

from caffelite.solver.loop import Solver

STEPS = 8
LR_MULT, DECAY_MULT = (1.5, 2.0), (0.5, 0.0)  # of solver_harness.LINEAR


@dataclass
class Restated:
    """The linear net and its solver in float64, written from the formulas alone."""

    kind: str
    rate: float = 0.1
    momentum: float = 0.0
    momentum2: float = 0.999
    delta: float = 1e-8
    rms_decay: float = 0.99
    decay: float = 0.0
    l1: bool = False
    clip: float = -1.0
    iter_size: int = 1
    first: list[np.ndarray] = field(default_factory=list)
    second: list[np.ndarray] = field(default_factory=list)

    def run(self, params: list[np.ndarray], x: np.ndarray, t: np.ndarray) -> list[np.ndarray]:
        self.first, self.second = [np.zeros_like(p) for p in params], [np.zeros_like(p) for p in params]
        for k in range(STEPS):
            miss = x @ params[0].T + params[1] - t
            grads = [self.iter_size * miss.T @ x / len(x), self.iter_size * miss.sum(0) / len(x)]
            norm = np.sqrt(sum((g**2).sum() for g in grads))
            if 0 <= self.clip < norm:
                grads = [g * self.clip / norm for g in grads]
            params = [self._updated(i, k, p, g) for i, (p, g) in enumerate(zip(params, grads))]
        return params

    def _updated(self, i: int, k: int, w: np.ndarray, g: np.ndarray) -> np.ndarray:
        g = g / self.iter_size + self.decay * DECAY_MULT[i] * (np.sign(w) if self.l1 else w)
        eta, mu, h, v = self.rate * LR_MULT[i], self.momentum, self.first[i], self.second[i]
        if self.kind == "SGD":
            step = h_new = mu * h + eta * g
        elif self.kind == "Nesterov":
            h_new = mu * h + eta * g
            step = (1 + mu) * h_new - mu * h
        elif self.kind == "AdaGrad":
            h_new = h + g * g
            step = eta * g / (np.sqrt(h_new) + self.delta)
        elif self.kind == "RMSProp":
            h_new = self.rms_decay * h + (1 - self.rms_decay) * g * g
            step = eta * g / (np.sqrt(h_new) + self.delta)
        elif self.kind == "AdaDelta":
            h_new = mu * h + (1 - mu) * g * g
            part = g * np.sqrt((v + self.delta) / (h_new + self.delta))
            self.second[i] = mu * v + (1 - mu) * part * part
            step = eta * part
        else:
            h_new = mu * h + (1 - mu) * g
            self.second[i] = self.momentum2 * v + (1 - self.momentum2) * g * g
            correction = np.sqrt(1 - self.momentum2 ** (k + 1)) / (1 - mu ** (k + 1))
            step = eta * correction * h_new / (np.sqrt(self.second[i]) + self.delta)
        self.first[i] = h_new
        return w - step


CASES = {
    "sgd": ("", Restated("SGD")),
    "sgd momentum decay": ("momentum: 0.9 weight_decay: 0.02", Restated("SGD", momentum=0.9, decay=0.02)),
    "sgd l1": ('momentum: 0.5 weight_decay: 0.02 regularization_type: "L1"', Restated("SGD", momentum=0.5, decay=0.02, l1=True)),
    "sgd clip": ("momentum: 0.9 clip_gradients: 0.3 weight_decay: 0.05", Restated("SGD", momentum=0.9, clip=0.3, decay=0.05)),
    "sgd clip to zero": ("clip_gradients: 0 weight_decay: 0.05", Restated("SGD", clip=0.0, decay=0.05)),
    "sgd parts": ("momentum: 0.9 iter_size: 3 weight_decay: 0.05", Restated("SGD", momentum=0.9, iter_size=3, decay=0.05)),
    # the limit lies between the norm of one part and that of the raw sum, where the order of clipping and dividing matters
    "sgd parts clip": ("iter_size: 3 clip_gradients: 2.5 weight_decay: 0.05", Restated("SGD", iter_size=3, clip=2.5, decay=0.05)),
    "nesterov": ('type: "Nesterov" momentum: 0.9 weight_decay: 0.02', Restated("Nesterov", momentum=0.9, decay=0.02)),
    "adagrad": ('type: "AdaGrad" delta: 1e-3 weight_decay: 0.02', Restated("AdaGrad", delta=1e-3, decay=0.02)),
    "rmsprop": ('type: "RMSProp" rms_decay: 0.9 weight_decay: 0.02', Restated("RMSProp", rms_decay=0.9, decay=0.02)),
    "rmsprop defaults": ('type: "RMSProp"', Restated("RMSProp")),
    "adadelta": ('type: "AdaDelta" momentum: 0.9 delta: 1e-6 weight_decay: 0.02', Restated("AdaDelta", momentum=0.9, delta=1e-6, decay=0.02)),
    "adam": ('type: "Adam" momentum: 0.9 momentum2: 0.99 weight_decay: 0.02', Restated("Adam", momentum=0.9, momentum2=0.99, decay=0.02)),
    "adam without beta1": ('type: "Adam" delta: 1e-4', Restated("Adam", delta=1e-4)),
}


def arrays(solver: Solver) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    host = solver.backend.to_host
    params = [np.array(host(p.master), np.float64) for p in solver.net.learnable]
    return params, *(np.array(host(solver.net.blobs[name].data), np.float64) for name in ("x", "t"))


@pytest.mark.parametrize("name", CASES)
def test_training_follows_the_formulas(name: str, backend) -> None:
    text, restated = CASES[name]
    solver = linear_solver(RATE + text, backend)
    expected = restated.run(*arrays(solver))
    solver.step(STEPS)
    for got, want in zip(arrays(solver)[0], expected):
        np.testing.assert_allclose(got, want, rtol=0, atol=3e-5 * max(1, np.abs(want).max()))  # float32 over 8 steps
    states = [restated.first, restated.second][: len(solver.history)]
    for history, want_parts in zip(solver.history, states):
        for part, want in zip(history.parts, want_parts):
            np.testing.assert_allclose(backend.to_host(part), want, rtol=0, atol=3e-5 * max(1, np.abs(want).max()))


def test_two_rules_have_a_second_history() -> None:
    counts = {kind: len(linear_solver(f'{RATE} type: "{kind}"').history) for kind in ("SGD", "Nesterov", "AdaGrad", "RMSProp", "AdaDelta", "Adam")}
    assert counts == {"SGD": 1, "Nesterov": 1, "AdaGrad": 1, "RMSProp": 1, "AdaDelta": 2, "Adam": 2}


def test_clipping_is_reported() -> None:
    from solver_harness import Recorder

    heard = Recorder()
    solver = linear_solver(f"{RATE} clip_gradients: 0.5", listeners=[heard])
    params, x, t = arrays(solver)
    miss = x @ params[0].T + params[1] - t
    norm = np.sqrt(((miss.T @ x / 7) ** 2).sum() + ((miss.sum(0) / 7) ** 2).sum())
    solver.step(1)
    line = next(text for text in heard.messages() if text.startswith("Gradient clipping"))
    assert line == f"Gradient clipping: scaling down gradients (L2 norm {norm:g} > 0.5) by scale factor {0.5 / norm:g}"


def test_the_diff_holds_the_applied_step_when_it_is_to_be_saved() -> None:
    solver = linear_solver(f"{RATE} momentum: 0.9 snapshot_diff: true")
    before, _, _ = arrays(solver)
    solver.step(1)
    after, _, _ = arrays(solver)
    for param, old, new in zip(solver.net.learnable, before, after):
        np.testing.assert_allclose(solver.backend.to_host(param.diff), old - new, atol=1e-6)
