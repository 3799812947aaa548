"""Sigmoid: y = 1 / (1 + exp(-x)), computed as 0.5 tanh(0.5 x) + 0.5."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob
from caffelite.layer import TOP, register
from caffelite.layers.elementwise import Elementwise


@register("Sigmoid")
class Sigmoid(Elementwise):
    """Any shape. dx = dy y (1-y). In place allowed."""

    param_fields = ("sigmoid_param",)
    in_place = True

    def backward_reads(self) -> frozenset[str]:
        return frozenset((TOP,))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.sigmoid_forward(bottoms[0].data, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            ops.sigmoid_backward(tops[0].data, tops[0].diff, bottoms[0].diff)
