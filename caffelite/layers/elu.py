"""ELU: y = x where x > 0, else alpha (exp(x) - 1)."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import TOP, BufferSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.schema import SourceMap, pb


@register("ELU")
class ELU(Elementwise):
    """Any shape. dx = dy where x > 0, else dy (alpha + y).

    A negative alpha makes y positive on both sides of 0, so the layer then keeps z = ELU(x) for |alpha|, which has x's sign,
    and gives y = z where z > 0, else -z.
    """

    param_fields = ("elu_param",)
    in_place = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.alpha = param.elu_param.alpha

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        if self.alpha >= 0:
            return {}
        return {"z": BufferSpec(bottoms[0], dtypes[0]), "minus": BufferSpec((), "float32")}

    def backward_reads(self) -> frozenset[str]:
        return frozenset((TOP,)) if self.alpha >= 0 else frozenset()

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        if self.alpha >= 0:
            ops.elu_forward(bottoms[0].data, tops[0].data, alpha=self.alpha)
            return
        z, minus = self.buffers["z"], self.buffers["minus"]
        ops.elu_forward(bottoms[0].data, z, alpha=-self.alpha)
        ops.fill(minus, -1.0)
        ops.prelu_forward(z, minus, tops[0].data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if not propagate_down[0]:
            return
        dy, dx = tops[0].diff, bottoms[0].diff
        if self.alpha >= 0:
            ops.elu_backward(tops[0].data, dy, dx, alpha=self.alpha)
            return
        z = self.buffers["z"]
        ops.elu_backward(z, dy, dx, alpha=-self.alpha)
        ops.prelu_backward_data(z, self.buffers["minus"], dx, dx)
