"""BatchNorm: each channel is brought to mean 0 and variance 1."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from caffelite.backends.contract import Backend
from caffelite.blob import Blob, Param, Shape
from caffelite.layer import BOTTOM, SIGN, BufferSpec, ParamSpec, register
from caffelite.layers.elementwise import Elementwise
from caffelite.layers.scale import Scale
from caffelite.schema import SourceMap, pb


@register("BatchNorm")
class BatchNorm(Elementwise):
    """y = (x - mean_c) / sqrt(variance_c + eps), x (N,C,...). No scale or shift of its own: a Scale layer follows.

    Three statistics, float32, never learned: (C) sum of means, (C) sum of variances, (1) sum of weights, each decayed by
    moving_average_fraction f at every forward in batch mode: s2 = f s2 + 1, s0 = f s0 + mean, s1 = f s1 + variance m/(m-1)
    with m = N H W values a channel. Batch mode normalises by the batch's own mean and biased variance; global mode
    (use_global_stats, by default the TEST phase) by s0/s2 and s1/s2, and by 0 and 0 while s2 is 0.
    Backward: dx = (dy - mean(dy) - y mean(dy y)) / sqrt(variance + eps); in global mode dx = dy / sqrt(variance + eps).

    The normalised values are kept apart from the top in either case, so that a Scale may follow in place. `scale` and `then_relu` are set
    by the graph when such a Scale, and a ReLU after it, are computed here: then backward reads the bottom instead, and computes them again.
    """

    param_fields = ("batch_norm_param",)
    in_place = True

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options = param.batch_norm_param
        self.global_stats = options.use_global_stats if options.HasField("use_global_stats") else not self.training
        self.scale: Scale | None = None  # set by the graph: the layer that follows in place, whose forward and backward this one does
        self.then_relu = False  # and a ReLU after that
        self.fraction, self.eps = options.moving_average_fraction, options.eps
        if not 0 <= self.fraction <= 1:
            raise self.fail(f"moving_average_fraction is {self.fraction:g}", "batch_norm_param", "moving_average_fraction", hint="give 0 to 1; 0.999 is usual")
        if not self.eps >= 0:
            raise self.fail(f"eps is {self.eps:g}", "batch_norm_param", "eps", hint="give a small positive number; 1e-5 is usual")
        for i, entry in enumerate(param.param):
            if entry.HasField("lr_mult") and entry.lr_mult != 0:
                raise self.fail(
                    f"lr_mult is {entry.lr_mult:g} for a statistic of BatchNorm",
                    "param",
                    i,
                    "lr_mult",
                    hint="its blobs are not learned: give 0, or leave it out",
                )

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        if len(bottoms[0]) < 2:
            raise self.fail(f"BatchNorm needs a bottom with at least 2 axes (N,C,...), found shape {bottoms[0]}", "bottom")
        return super().infer_shapes(bottoms)

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        zero, channels = pb.FillerParameter(type="constant", value=0), bottoms[0][1]
        return [ParamSpec(shape, zero, learned=False) for shape in ((channels,), (channels,), (1,))]

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        channels = (bottoms[0][1],)
        specs = {"mean": BufferSpec(channels, "float32", kept=self.scale is not None), "variance": BufferSpec(channels, "float32")}
        if not self.global_stats and self.scale is None:
            specs["normalised"] = BufferSpec(bottoms[0], dtypes[0])
        return specs

    def statistics(self) -> Sequence[Param]:
        return () if self.global_stats else self.params

    def backward_reads(self) -> frozenset[str]:
        if self.scale is None:
            return frozenset()
        return frozenset((BOTTOM, SIGN)) if self.then_relu else frozenset((BOTTOM,))

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        x, y, mean, variance = bottoms[0].data, tops[0].data, self.buffers["mean"], self.buffers["variance"]
        if self.global_stats:
            mean_sum, variance_sum, weight = (param.data for param in self.params)
            ops.batch_norm_global_statistics(mean_sum, variance_sum, weight, mean, variance)
        else:
            ops.batch_norm_statistics(x, mean, variance)
            self._accumulate(ops, bottoms[0].shape)
        if self.scale is not None:
            s, b = (param.data for param in self.scale.params)
            ops.batch_norm_scale_forward(x, mean, variance, s, b, y, eps=self.eps, relu=self.then_relu)
        elif self.global_stats:
            ops.batch_norm_forward(x, mean, variance, y, eps=self.eps)
        else:
            ops.batch_norm_forward(x, mean, variance, self.buffers["normalised"], eps=self.eps)
            ops.copy(self.buffers["normalised"], y)

    def _accumulate(self, ops: Backend, shape: Shape) -> None:
        """Adds the batch's statistics to the moving sums, the variance as an unbiased estimate."""
        count = prod(shape) // shape[1]
        correction = count / (count - 1) if count > 1 else 1.0
        mean_sum, variance_sum, weight = (param.data for param in self.params)
        given = (self.buffers["mean"], self.buffers["variance"], mean_sum, variance_sum, weight, self.context.skip)
        ops.batch_norm_accumulate(*given, fraction=self.fraction, correction=correction)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if not propagate_down[0]:
            return
        dy, dx, variance = tops[0].diff, bottoms[0].diff, self.buffers["variance"]
        if self.scale is not None:
            self._backward_with_scale(ops, self.scale, tops[0], bottoms[0])
        elif self.global_stats:
            ops.batch_norm_backward_global(variance, dy, dx, eps=self.eps)
        else:
            ops.batch_norm_backward(self.buffers["normalised"], variance, dy, dx, eps=self.eps)

    def _backward_with_scale(self, ops: Backend, scale: Scale, top: Blob, bottom: Blob) -> None:
        s, b = scale.params
        ops.batch_norm_scale_backward(
            bottom.data,
            top.data,
            self.buffers["mean"],
            self.buffers["variance"],
            s.data,
            b.data,
            top.diff,
            bottom.diff,
            s.diff if s.learn else None,
            b.diff if b.learn else None,
            eps=self.eps,
            relu=self.then_relu,
            fixed=self.global_stats,
            accumulate_s=s.accumulate,
            accumulate_b=b.accumulate,
        )
