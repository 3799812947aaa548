"""SoftmaxWithLoss: the multinomial logistic loss of a softmax over scores."""

from __future__ import annotations

from collections.abc import Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Shape
from caffelite.layer import BOTTOM, BufferSpec, Layer, register
from caffelite.layers.shapes import axis_index, check_labels
from caffelite.schema import SourceMap, pb


@register("SoftmaxWithLoss")
class SoftmaxWithLoss(Layer):
    """loss = -sum over positions of ln(max(p[label], FLT_MIN)) / Z, p = softmax of bottom 0 along softmax_param.axis.

    Bottom 1 holds one class number for each position. loss_param: positions with ignore_label count for nothing; Z, at least
    1, is by `normalization` VALID (positions not ignored), FULL (all), BATCH_SIZE (positions before the axis) or NONE (1);
    the older `normalize` means VALID or BATCH_SIZE. d scores = (p - onehot(label)) loss_weight / Z. A label outside
    0..classes-1 is a DataError.
    """

    bottom_range = (2, 2)
    param_fields = ("loss_param", "softmax_param")
    is_loss = True
    no_force = (1,)
    differentiable = (0,)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.loss_param
        self.ignore_label = options.ignore_label if options.HasField("ignore_label") else None
        mode = options.normalization
        if options.HasField("normalize") and not options.HasField("normalization"):
            mode = pb.LossParameter.VALID if options.normalize else pb.LossParameter.BATCH_SIZE
        self.normalization = pb.LossParameter.NormalizationMode.Name(mode)

    def _axis(self, shape: Shape) -> int:
        return axis_index(self, self.param.softmax_param.axis, len(shape), "softmax_param", "axis")

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        check_labels(self, bottoms[0], bottoms[1], self._axis(bottoms[0]))
        return [()]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return ["float32"]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        return {"prob": BufferSpec(bottoms[0], "float32"), "normalizer": BufferSpec((), "float32")}

    def backward_reads(self) -> frozenset[str]:
        return frozenset((BOTTOM,))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        ops.softmax_loss_forward(
            bottoms[0].data,
            bottoms[1].data,
            self.buffers["prob"],
            tops[0].data,
            self.buffers["normalizer"],
            axis=self._axis(bottoms[0].shape),
            ignore_label=self.ignore_label,
            normalization=self.normalization,
        )

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            ops.softmax_loss_backward(
                self.buffers["prob"],
                bottoms[1].data,
                tops[0].diff,
                self.buffers["normalizer"],
                bottoms[0].diff,
                axis=self._axis(bottoms[0].shape),
                ignore_label=self.ignore_label,
            )
