"""Input: the blobs that the caller fills."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import Layer, register
from caffelite.layers.shapes import given_shape

FIELD = "input_param"


@register("Input")
class Input(Layer):
    """Tops of the given shapes (one for all, or one each), float32, zeros until the caller writes them. The net's inputs."""

    bottom_range = (0, 0)
    top_range = (1, None)
    param_fields = (FIELD,)
    is_source = True
    differentiable = ()
    persistent_tops = True

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        shapes, tops = self.param.input_param.shape, len(self.param.top)
        if len(shapes) not in (1, tops):
            raise self.fail(
                f"{len(shapes)} shape(s) for {tops} top(s)", FIELD, "shape", hint="give input_param { shape { dim: ... } }, one for all tops or one for each"
            )
        return [given_shape(self, shape.dim, FIELD, i) for i, shape in enumerate(list(shapes) * (tops if len(shapes) == 1 else 1))]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return ["float32"] * len(self.param.top)

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        """Nothing: the caller has written the tops."""

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        """Nothing: there is no bottom."""
