"""The Data layer: images and labels from an LMDB (layers 10.1, 10.2)."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.data.source import BatchSource
from caffelite.layer import Layer, register
from caffelite.schema import SourceMap, pb


@register("Data")
class DataLayer(Layer):
    """Tops: data (batch, C, H, W) in the compute type and, if there are two, labels (batch) in float32.

    `source` is its BatchSource, whose position the solver saves and seeks.
    """

    bottom_range = (0, 0)
    top_range = (1, 2)
    param_fields = ("data_param", "transform_param")
    is_source = True
    differentiable = ()

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.source = BatchSource(param.data_param, param.transform_param, phase, 0, self.stream, self.fail)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        batch = self.param.data_param.batch_size
        return [(batch, *self.source.item_shape), (batch,)][: len(self.param.top)]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [compute, "float32"][: len(self.param.top)]

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def feed(self, ops: Backend, tops: Sequence[Blob]) -> None:
        self.source.seed, self.source.tell = self.context.seed, self.context.tell
        labels = tops[1].data if len(tops) > 1 else None
        self.source.load(ops, tops[0].shape[0], tops[0].dtype, tops[0].data, labels)

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        """Nothing: `feed` has filled the tops."""

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        """Nothing: no gradient leaves a data layer."""

    def order_note(self) -> str | None:
        """BatchSource.order_note with the layer's name before it; None where no labels are asked for. Errors as there."""
        note = self.source.order_note() if len(self.param.top) > 1 else None
        return note and f"layer '{self.name}': {note}"

    def close(self) -> None:
        self.source.close()
