"""Iteration: what one iteration of training asks of the device, with the numbers that change in its memory, so that it can be recorded."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from caffelite.backends.contract import JOURNAL_HEAD, Array, Dials, Update
from caffelite.net import Net
from caffelite.schema import pb
from caffelite.solver.rules import RULES, apply_rule

MOST_UNREAD = 256  # iterations that the journals hold


class Iteration:
    """The forward and backward passes of `net` (iter_size of them), the loss, clipping and the update.

    states: the rule's history arrays. write_step: leave the applied step in the gradients. Losses and gradient norms go to journals, which
    take_losses and take_norms empty. From the first loss that is not finite on nothing is updated, BatchNorm's sums neither, until `reset`.
    """

    def __init__(self, net: Net, param: pb.SolverParameter, states: Sequence[Array], *, write_step: bool) -> None:
        self.net, self.param, self._states = net, param, states
        self._ops, self._rule = net.backend, RULES[param.type]
        self._total, self._norm, rate, scale = (self._cells(1) for _ in range(4))
        self._losses, self._norms = self._cells(JOURNAL_HEAD + MOST_UNREAD), self._cells(JOURNAL_HEAD + MOST_UNREAD)
        self._dials, l1 = Dials(rate, scale, self._losses[1:2]), param.regularization_type == "L1"
        self._how = Update(net.arena.segments(param.weight_decay), self._dials, l1, write_step, net.arena.lowered)
        self._ops.assign(scale, [1 / param.iter_size])
        net.context.skip = self._dials.skip
        self._pieces: dict[tuple[bool, bool], Callable[[], None]] = {}

    def _cells(self, count: int) -> Array:
        return self._ops.empty((count,), "float64")

    @property
    def clips(self) -> bool:
        """Whether gradients are clipped."""
        return self.param.clip_gradients >= 0

    def set_rate(self, rate: float, iteration: int) -> None:
        """The rate of the update after `iteration` updates."""
        self._ops.assign(self._dials.rate, [rate * self._rule.correction(self.param, iteration)])

    # --- the whole, as a backend may record it ----------------------------------------------------------------------------

    def run(self, part: int) -> None:
        """Pass number `part`, the net being fed; the last one ends with the update."""
        piece = part == 0, part == self.param.iter_size - 1
        if piece not in self._pieces:
            self._pieces[piece] = self.net.repeatable(lambda: self._run(*piece))
        self.net.refresh()  # where something else than updates has changed the weights
        self._pieces[piece]()
        self.net.arena.grads_written()

    def _run(self, starts: bool, ends: bool) -> None:
        if starts:
            self.net.zero_grads()
        self.net.forward_fed()
        self.add_loss(starts, ends)
        self.net.backward()
        if ends:
            self.update()

    # --- and step by step -------------------------------------------------------------------------------------------------

    def add_loss(self, starts: bool, ends: bool) -> None:
        """Adds the loss of the last forward pass to the iteration's, which the last pass writes into the journal."""
        self.net.add_loss(self._total, accumulate=not starts)
        if ends:
            self._ops.append(self._losses, self._total, divisor=self.param.iter_size)

    def update(self) -> None:
        """Clips and applies the gradients in the net; nothing where it has none."""
        arena = self.net.arena
        if arena.grad is None:
            return
        arena.settle_grads()
        if self.clips:
            self._ops.clip_gradients(arena.grad, self._norm, self._dials.grad_scale, limit=self.param.clip_gradients, divisor=self.param.iter_size)
            self._ops.append(self._norms, self._norm, divisor=1)
        apply_rule(self.param, self._ops, arena.master, arena.grad, self._states, self._how)

    # --- what came of it --------------------------------------------------------------------------------------------------

    def take_losses(self) -> list[float]:
        """The losses since the last call; waits for them."""
        return self._take(self._losses)

    def take_norms(self) -> list[float]:
        """The gradients' norms since the last call, where they are clipped; waits for them."""
        return self._take(self._norms) if self.clips else []

    def reset(self) -> None:
        """Forgets losses and norms that were not taken, and lets updates happen again."""
        for journal in (self._losses, self._norms):
            self._ops.assign(journal, [0, 0])

    def _take(self, journal: Array) -> list[float]:
        values: np.ndarray = self._ops.to_host(journal)
        self._ops.assign(journal[:1], [0])
        return [float(value) for value in values[JOURNAL_HEAD : JOURNAL_HEAD + int(values[0])]]
