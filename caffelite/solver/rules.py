"""Update rules: which op, how many history arrays, and the settings each one takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from caffelite.backends.contract import Array, Backend, Update
from caffelite.errors import SpecError, did_you_mean
from caffelite.schema import SolverSpec, pb

Settings = Callable[[pb.SolverParameter], dict[str, Any]]
Correction = Callable[[pb.SolverParameter, int], float]


def _none(p: pb.SolverParameter, iteration: int) -> float:
    return 1.0


@dataclass(frozen=True)
class Rule:
    """One solver type: its op in the backend contract, its number of history arrays, the op's own settings, and what multiplies the rate of
    the update that comes after `iteration` others."""

    op: str
    states: int
    settings: Settings
    correction: Correction = _none


def _momentum(p: pb.SolverParameter) -> dict[str, Any]:
    return {"momentum": p.momentum}


def _adagrad(p: pb.SolverParameter) -> dict[str, Any]:
    return {"delta": p.delta}


def _rmsprop(p: pb.SolverParameter) -> dict[str, Any]:
    return {"rms_decay": p.rms_decay, "delta": p.delta}


def _adadelta(p: pb.SolverParameter) -> dict[str, Any]:
    return {"momentum": p.momentum, "delta": p.delta}


def _adam(p: pb.SolverParameter) -> dict[str, Any]:
    return {"momentum": p.momentum, "momentum2": p.momentum2, "delta": p.delta}


def _adam_correction(p: pb.SolverParameter, iteration: int) -> float:
    """The averages start at zero, so that the first of them are too small (Kingma and Ba 2015)."""
    return math.sqrt(1 - p.momentum2 ** (iteration + 1)) / (1 - p.momentum ** (iteration + 1))


RULES: dict[str, Rule] = {
    "SGD": Rule("sgd_update", 1, _momentum),
    "Nesterov": Rule("nesterov_update", 1, _momentum),
    "AdaGrad": Rule("adagrad_update", 1, _adagrad),
    "RMSProp": Rule("rmsprop_update", 1, _rmsprop),
    "AdaDelta": Rule("adadelta_update", 2, _adadelta),
    "Adam": Rule("adam_update", 2, _adam, _adam_correction),
}
REGULARIZERS = ("L2", "L1")


def check_rule(spec: SolverSpec) -> None:
    """SpecError, placed in the solver file, for an unknown type or regularisation, or a setting the rule cannot use."""
    param, at = spec.param, spec.where.at
    if param.type not in RULES:
        raise _unknown(spec)
    if param.type in ("AdaGrad", "RMSProp") and param.momentum != 0:
        raise SpecError(f"{param.type} has no momentum, found momentum {param.momentum:g}", where=at("momentum"), hint='remove it, or use type: "Adam"')
    if param.type == "RMSProp" and not 0 <= param.rms_decay < 1:
        raise SpecError(f"rms_decay must be at least 0 and less than 1, found {param.rms_decay:g}", where=at("rms_decay"))
    if param.type == "Adam":
        for name, value in (("momentum", param.momentum), ("momentum2", param.momentum2)):
            if not 0 <= value < 1:
                raise SpecError(f"Adam divides by 1 - {name}: it must be at least 0 and less than 1, found {value:g}", where=at(name))
    if param.weight_decay != 0 and param.regularization_type not in REGULARIZERS:
        raise SpecError(
            f"unknown regularization_type '{param.regularization_type}'", where=at("regularization_type"), hint=f"choose one of {', '.join(REGULARIZERS)}"
        )


def _unknown(spec: SolverSpec) -> SpecError:
    found = spec.param.type
    return SpecError(f"unknown solver type '{found}'", where=spec.where.at("type"), hint=did_you_mean(found, RULES))


def apply_rule(param: pb.SolverParameter, ops: Backend, weights: Array, gradients: Array, states: Sequence[Array], how: Update) -> None:
    """One update of flat float32 arrays of one length; `states` are the rule's history arrays in the order they are saved."""
    rule = RULES[param.type]
    getattr(ops, rule.op)(weights, gradients, *states, how, **rule.settings(param))
