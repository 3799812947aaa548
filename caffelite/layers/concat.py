"""Concat: joins blobs along an axis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from caffelite.backends.contract import Backend
from caffelite.blob import Array, Blob, Shape
from caffelite.layer import Layer, register
from caffelite.layers.shapes import axis_index, old_axis, runs_along, starts_along


@register("Concat")
class Concat(Layer):
    """Bottoms have equal axes but for `axis`, along which the top holds them one after the other."""

    bottom_range = (1, None)
    param_fields = ("concat_param",)

    def _axis(self, axes: int) -> int:
        old = old_axis(self, self.param.concat_param, axes, "concat_param", "concat_dim")
        return axis_index(self, self.param.concat_param.axis, axes, "concat_param", "axis") if old is None else old

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        first = bottoms[0]
        axis = self._axis(len(first))
        for i, shape in enumerate(bottoms):
            if len(shape) != len(first) or any(a != b for j, (a, b) in enumerate(zip(shape, first)) if j != axis):
                raise self.fail(f"bottom {i} has shape {shape}, bottom 0 {first}", "bottom", i, hint=f"only axis {axis} may differ")
        return [(*first[:axis], sum(shape[axis] for shape in bottoms), *first[axis + 1 :])]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return [bottoms[0] if len(set(bottoms)) == 1 else compute]

    def runs(self, bottoms: Sequence[Shape]) -> list[int] | None:
        """Elements of the top before each bottom's, where they lie there in one run each; else None."""
        axis = self._axis(len(bottoms[0]))
        return runs_along(axis, self.infer_shapes(bottoms)[0], [shape[axis] for shape in bottoms])

    def starts(self, bottoms: Sequence[Shape]) -> list[int] | None:
        """Channels of the top before each bottom's, where it joins channels; else None."""
        axis = self._axis(len(bottoms[0]))
        return starts_along(axis, bottoms[0], [shape[axis] for shape in bottoms])

    def takes_gaps(self, bottoms: Sequence[Shape], backend: Backend) -> bool:
        return True

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def _parts(self, whole: Array, bottoms: Sequence[Blob]) -> Iterator[Array]:
        """The part of `whole` that belongs to each bottom."""
        axis, start = self._axis(len(bottoms[0].shape)), 0
        for bottom in bottoms:
            stop = start + bottom.shape[axis]
            yield whole[(slice(None),) * axis + (slice(start, stop),)]
            start = stop

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        for i, (bottom, part) in enumerate(zip(bottoms, self._parts(tops[0].data, bottoms))):
            if i not in self.held_data:
                ops.copy(bottom.data, part)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        for i, (bottom, part) in enumerate(zip(bottoms, self._parts(tops[0].diff, bottoms))):
            if propagate_down[i] and i not in self.held_diffs:
                ops.copy(part, bottom.diff)
