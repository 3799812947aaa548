"""Slice: cuts a blob into several along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from caffelite.backends.contract import Backend
from caffelite.blob import Array, Blob, Shape
from caffelite.layer import Layer, register
from caffelite.layers.shapes import axis_index, old_axis, runs_along, starts_along
from caffelite.schema import SourceMap, pb

FIELD = "slice_param"


@register("Slice")
class Slice(Layer):
    """Tops are the parts of the bottom along `axis`, cut at each slice_point, or of equal size without any."""

    top_range = (1, None)
    param_fields = (FIELD,)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.points = [int(point) for point in param.slice_param.slice_point]
        if self.points and len(self.points) != len(param.top) - 1:
            raise self.fail(
                f"{len(self.points)} slice_point value(s) for {len(param.top)} top(s)",
                FIELD,
                "slice_point",
                hint=f"give {len(param.top) - 1}, or none for equal parts",
            )
        for i, (before, point) in enumerate(zip([0, *self.points], self.points)):
            if point <= before:
                raise self.fail(f"slice_point {point} follows {before}", FIELD, "slice_point", i, hint="they have to rise, starting above 0")

    def _axis(self, axes: int) -> int:
        old = old_axis(self, self.param.slice_param, axes, FIELD, "slice_dim")
        return axis_index(self, self.param.slice_param.axis, axes, FIELD, "axis") if old is None else old

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        shape, tops = bottoms[0], len(self.param.top)
        axis = self._axis(len(shape))
        size = shape[axis]
        if self.points:
            if self.points[-1] >= size:
                last = len(self.points) - 1
                raise self.fail(
                    f"slice_point {self.points[-1]} leaves nothing of {size} for the last top", FIELD, "slice_point", last, hint=f"stay below {size}"
                )
            cuts = [0, *self.points, size]
            sizes = [stop - start for start, stop in pairwise(cuts)]
        else:
            if size % tops:
                raise self.fail(f"axis {axis} has size {size}, which does not divide into {tops} tops", "top", hint="give slice_point values")
            sizes = [size // tops] * tops
        return [(*shape[:axis], part, *shape[axis + 1 :]) for part in sizes]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0]] * len(self.param.top)

    def runs(self, bottoms: Sequence[Shape]) -> list[int] | None:
        """Elements of the bottom before each top's, where they lie there in one run each; else None."""
        axis = self._axis(len(bottoms[0]))
        return runs_along(axis, bottoms[0], [shape[axis] for shape in self.infer_shapes(bottoms)])

    def starts(self, bottoms: Sequence[Shape]) -> list[int] | None:
        """Channels of the bottom before each top's, where it cuts channels apart; else None."""
        axis = self._axis(len(bottoms[0]))
        return starts_along(axis, bottoms[0], [shape[axis] for shape in self.infer_shapes(bottoms)])

    def takes_gaps(self, bottoms: Sequence[Shape], backend: Backend) -> bool:
        return True

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def _parts(self, whole: Array, tops: Sequence[Blob]) -> Iterator[Array]:
        """The part of `whole` that belongs to each top."""
        axis, start = self._axis(len(tops[0].shape)), 0
        for top in tops:
            stop = start + top.shape[axis]
            yield whole[(slice(None),) * axis + (slice(start, stop),)]
            start = stop

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        for i, (top, part) in enumerate(zip(tops, self._parts(bottoms[0].data, tops))):
            if i not in self.held_data:
                ops.copy(part, top.data)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        if propagate_down[0]:
            for i, (top, part) in enumerate(zip(tops, self._parts(bottoms[0].diff, tops))):
                if i not in self.held_diffs:
                    ops.copy(top.diff, part)
