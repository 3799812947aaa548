"""LRN: local response normalisation, across neighbouring channels or within a channel."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, TOP, BufferSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.schema import SourceMap, pb


@register("LRN")
class LRN(Elementwise):
    """x (N,C,H,W), n = local_size. ACROSS_CHANNELS: y = x s^-beta, s = k + (alpha/n) sum of x^2 over the n channels around.

    WITHIN_CHANNEL: y = x (1 + alpha A)^-beta, A = the sum of x^2 over the n x n square around, divided by n^2; k plays no part.
    """

    param_fields = ("lrn_param",)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.lrn_param
        self.size, self.alpha, self.beta, self.k = options.local_size, options.alpha, options.beta, options.k
        self.within = options.norm_region == pb.LRNParameter.WITHIN_CHANNEL
        if self.size % 2 == 0:
            raise self.fail(f"local_size is {self.size}", "lrn_param", "local_size", hint="give an odd number, so that the window has a centre")

    @property
    def numbers(self) -> dict[str, Any]:
        """What ops across channels are told, by name."""
        return {"size": self.size, "alpha": self.alpha, "beta": self.beta, "k": self.k}

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        if len(bottoms[0]) != 4:
            raise self.fail(f"LRN needs a bottom with 4 axes (N,C,H,W), found shape {bottoms[0]}", "bottom")
        return super().infer_shapes(bottoms)

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        if not self.keeps:
            return {}
        if self.within:
            nbytes = backend.lrn_within_workspace(bottoms[0], dtypes[0], size=self.size, alpha=self.alpha, beta=self.beta)
        else:
            nbytes = backend.lrn_workspace(bottoms[0], dtypes[0], **self.numbers)
        return {"work": BufferSpec((nbytes,), "uint8")}

    def backward_reads(self) -> frozenset[str]:
        return frozenset((BOTTOM, TOP))

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        return True

    def multiply_adds(self, bottoms: Sequence[Shape]) -> int:
        return prod(bottoms[0]) * (self.size * self.size if self.within else self.size)

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        x, y, work = bottoms[0].data, tops[0].data, self.buffers.get("work")
        if self.within:
            ops.lrn_within_forward(x, y, work, size=self.size, alpha=self.alpha, beta=self.beta)
        else:
            ops.lrn_forward(x, y, work, **self.numbers)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if not propagate_down[0]:
            return
        x, y, dy, dx, work = bottoms[0].data, tops[0].data, tops[0].diff, bottoms[0].diff, self.buffers["work"]
        relu = bool(self.relu_bottoms)
        if self.within:
            ops.lrn_within_backward(x, y, dy, dx, work, size=self.size, alpha=self.alpha, beta=self.beta, relu=relu)
        else:
            ops.lrn_backward(x, y, dy, dx, work, **self.numbers, relu=relu)
