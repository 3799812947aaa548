"""Reductions and update rules over the parameter arena: one pass in pieces that stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import fsum, sqrt

import numpy as np

from caffelite.backends.contract import JOURNAL_HEAD, Array, Segment, Update
from caffelite.backends.numpy.common import Base, chunks, flat, store, widen

# rule(rate, step, scratch, states...) -> D, in `step`, in a state or in `scratch`. On entry `step` holds g'; `scratch` is free memory.
Rule = Callable[..., Array]


class Updates(Base):
    def sum_squares(self, x: Array) -> float:
        return self._sum(x, lambda part: float(np.dot(part, part)))

    def sum_absolute(self, x: Array) -> float:
        return self._sum(x, lambda part: float(np.abs(part).sum()))

    def all_finite(self, x: Array) -> bool:
        values = flat(x)
        return all(self._each(lambda span: bool(np.isfinite(values[slice(*span)]).all()), chunks(values.size), values.size))

    def scale_in_place(self, x: Array, factor: float) -> None:
        (values,) = widen(x)
        store(x, np.multiply(values, factor, out=values))

    def add_sum(self, x: Array, total: Array, *, factor: float, accumulate: bool) -> None:
        total[0] = (total[0] if accumulate else 0.0) + factor * self._sum(x, lambda part: float(part.sum()))

    def append(self, journal: Array, value: Array, *, divisor: float) -> None:
        place, kept = JOURNAL_HEAD + int(journal[0]), value[0] / divisor
        journal[1] = float(journal[1] or not np.isfinite(kept))
        if place < len(journal):
            journal[place] = kept
            journal[0] += 1

    def clip_gradients(self, g: Array, norm: Array, grad_scale: Array, *, limit: float, divisor: float) -> None:
        norm[0] = sqrt(self.sum_squares(g))
        grad_scale[0] = (limit / norm[0] if norm[0] > limit else 1.0) / divisor

    def sgd_update(self, w: Array, g: Array, h: Array, how: Update, *, momentum: float) -> None:
        def rule(rate: float, step: Array, scratch: Array, h: Array) -> Array:
            h *= momentum
            step *= rate
            h += step
            return h

        self._update(rule, w, g, (h,), how)

    def nesterov_update(self, w: Array, g: Array, h: Array, how: Update, *, momentum: float) -> None:
        def rule(rate: float, step: Array, scratch: Array, h: Array) -> Array:
            np.multiply(h, momentum, out=scratch)
            step *= rate
            np.add(scratch, step, out=h)
            np.multiply(h, 1 + momentum, out=step)
            step -= scratch
            return step

        self._update(rule, w, g, (h,), how)

    def adagrad_update(self, w: Array, g: Array, h: Array, how: Update, *, delta: float) -> None:
        def rule(rate: float, step: Array, scratch: Array, h: Array) -> Array:
            np.multiply(step, step, out=scratch)
            h += scratch
            return _divide_by_root(step, h, delta, rate, scratch)

        self._update(rule, w, g, (h,), how)

    def rmsprop_update(self, w: Array, g: Array, h: Array, how: Update, *, rms_decay: float, delta: float) -> None:
        def rule(rate: float, step: Array, scratch: Array, h: Array) -> Array:
            _average_square(h, step, rms_decay, scratch)
            return _divide_by_root(step, h, delta, rate, scratch)

        self._update(rule, w, g, (h,), how)

    def adadelta_update(self, w: Array, g: Array, h: Array, v: Array, how: Update, *, momentum: float, delta: float) -> None:
        def rule(rate: float, step: Array, scratch: Array, h: Array, v: Array) -> Array:
            _average_square(h, step, momentum, scratch)
            np.add(v, delta, out=scratch)
            scratch /= h + h.dtype.type(delta)
            np.sqrt(scratch, out=scratch)
            step *= scratch
            _average_square(v, step, momentum, scratch)
            step *= rate
            return step

        self._update(rule, w, g, (h, v), how)

    def adam_update(self, w: Array, g: Array, h: Array, v: Array, how: Update, *, momentum: float, momentum2: float, delta: float) -> None:
        def rule(rate: float, step: Array, scratch: Array, h: Array, v: Array) -> Array:
            _average_square(v, step, momentum2, scratch)
            h *= momentum
            step *= 1 - momentum
            h += step
            step[...] = h
            return _divide_by_root(step, v, delta, rate, scratch)

        self._update(rule, w, g, (h, v), how)

    def _update(self, rule: Rule, w: Array, g: Array, states: Sequence[Array], how: Update) -> None:
        """Runs a rule over all segments. Every pass over a piece counts, so factors of 1 are left out and terms added where they first arise."""
        rate, grad_scale, skip = (float(cell[0]) for cell in how.dials)  # plain numbers, which leave float32 arrays float32
        if skip:
            return
        pieces = [(s, s.start + a, s.start + b) for s in how.segments for a, b in chunks(s.stop - s.start)]

        def run(piece: tuple[Segment, int, int]) -> None:
            segment, start, stop = piece
            weights, gradient = w[start:stop], g[start:stop]
            scratch, step = np.empty_like(weights), np.empty_like(weights)
            if grad_scale != 1:
                gradient = np.multiply(gradient, grad_scale, out=scratch)
            if segment.decay:
                np.multiply(np.sign(weights) if how.l1 else weights, segment.decay, out=step)
                step += gradient
            else:
                step[...] = gradient
            done = rule(rate * segment.lr_mult, step, scratch, *(state[start:stop] for state in states))
            weights -= done
            if how.write_step:
                g[start:stop] = done

        self._each(run, pieces, w.size)
        if how.lowered is not None:
            self.copy(w, how.lowered)

    def _sum(self, x: Array, of: Callable[[Array], float]) -> float:
        """The sum of `of` over float64 pieces, added exactly, so that it does not depend on the number of threads."""
        values = flat(x)
        return fsum(self._each(lambda span: of(values[slice(*span)].astype(np.float64)), chunks(values.size), values.size))


def _average_square(state: Array, value: Array, keep: float, scratch: Array) -> None:
    """state <- keep state + (1-keep) value^2."""
    np.multiply(value, value, out=scratch)
    scratch *= 1 - keep
    state *= keep
    state += scratch


def _divide_by_root(step: Array, state: Array, delta: float, rate: float, scratch: Array) -> Array:
    """step <- rate step / (sqrt(state) + delta), which is returned."""
    np.sqrt(state, out=scratch)
    scratch += delta
    step /= scratch
    step *= rate
    return step
