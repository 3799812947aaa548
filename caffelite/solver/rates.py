"""Learning-rate policies, checked against the solver file before training starts."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

from caffelite.errors import SpecError, did_you_mean
from caffelite.schema import SolverSpec, pb

# What each policy needs: fields that must be in the file, because their default 0 would make the rate 0 or nothing at all.
NEEDED: dict[str, tuple[str, ...]] = {
    "fixed": (),
    "step": ("gamma", "stepsize"),
    "exp": ("gamma",),
    "inv": (),
    "multistep": ("gamma", "stepvalue"),
    "poly": ("max_iter",),
    "sigmoid": ("stepsize",),
}


def check_policy(spec: SolverSpec) -> None:
    """SpecError, placed in the solver file, when lr_policy is unknown or a field that it uses is missing or makes no sense."""
    param, at = spec.param, spec.where.at
    if not param.HasField("base_lr"):
        raise SpecError("base_lr is missing", where=at(), hint="write the learning rate, as in base_lr: 0.01")
    if param.lr_policy not in NEEDED:
        raise _unknown(spec)
    for name in NEEDED[param.lr_policy]:
        missing = not param.stepvalue if name == "stepvalue" else not param.HasField(name)
        if missing:
            raise SpecError(f"lr_policy '{param.lr_policy}' needs {name}, which is missing", where=at("lr_policy"), hint=f"add {name}: VALUE to the solver")
    if "stepsize" in NEEDED[param.lr_policy] and param.stepsize <= 0:
        raise SpecError(f"stepsize must be greater than 0, found {param.stepsize}", where=at("stepsize"))
    if param.lr_policy not in ("fixed", "poly") and not param.gamma >= 0:
        raise SpecError(f"gamma must be 0 or greater, found {param.gamma:g}", where=at("gamma"))
    if param.lr_policy == "poly" and param.max_iter <= 0:
        raise SpecError(f"lr_policy 'poly' needs max_iter greater than 0, found {param.max_iter}", where=at("max_iter"))
    for i in range(1, len(param.stepvalue)):
        if param.stepvalue[i] < param.stepvalue[i - 1]:
            found = f"{param.stepvalue[i]} follows {param.stepvalue[i - 1]}"
            raise SpecError(f"stepvalue must not decrease: {found}", where=at("stepvalue", i), hint="list the iterations in order")


def _unknown(spec: SolverSpec) -> SpecError:
    policy = spec.param.lr_policy
    if not policy:
        return SpecError("lr_policy is missing", where=spec.where.at(), hint=f"choose one of {', '.join(NEEDED)}")
    return SpecError(f"unknown lr_policy '{policy}'", where=spec.where.at("lr_policy"), hint=did_you_mean(policy, NEEDED))


def as_float32(value: float) -> float:
    """The float32 nearest to `value`; infinity beyond its range."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return math.copysign(math.inf, value)


class RatePolicy:
    """The rate of every iteration. `current_step` belongs to the saved state.

    tell(text): hears when multistep steps down.
    """

    def __init__(self, param: pb.SolverParameter, tell: Callable[[str], None]) -> None:
        self.param, self.tell = param, tell
        self.current_step = 0

    def rate(self, iteration: int) -> float:
        """The float32 rate for `iteration` (updates done so far).

        Advances `current_step`: multistep by one at most on each call, as Caffe does.
        """
        p = self.param
        return as_float32(p.base_lr * self._factor(p, iteration))

    def _factor(self, p: pb.SolverParameter, k: int) -> float:
        if p.lr_policy == "fixed":
            return 1.0
        if p.lr_policy == "step":
            self.current_step = k // p.stepsize
            return power(p.gamma, self.current_step)
        if p.lr_policy == "exp":
            return power(p.gamma, k)
        if p.lr_policy == "inv":
            return power(1.0 + p.gamma * k, -p.power)
        if p.lr_policy == "multistep":
            if self.current_step < len(p.stepvalue) and k >= p.stepvalue[self.current_step]:
                self.current_step += 1
                self.tell(f"MultiStep Status: Iteration {k}, step = {self.current_step}")
            return power(p.gamma, self.current_step)
        if p.lr_policy == "poly":
            return power(1.0 - k / p.max_iter, p.power)
        return 1.0 / (1.0 + exponential(-p.gamma * (k - p.stepsize)))


def power(base: float, exponent: float) -> float:
    """base ** exponent with C's pow rules: infinity on overflow, NaN where no real result exists."""
    try:
        return math.pow(base, exponent)
    except OverflowError:
        return math.inf
    except ValueError:
        return math.inf if base == 0 else math.nan


def exponential(x: float) -> float:
    """e ** x, infinity on overflow."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
