"""Flatten: joins neighbouring axes into one."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from caffelite.blob import Shape
from caffelite.layer import register
from caffelite.layers.regroup import Regroup
from caffelite.layers.shapes import axis_index

FIELD = "flatten_param"


@register("Flatten")
class Flatten(Regroup):
    """Axes axis..end_axis (1..-1 by default, both included) become one of their count."""

    param_fields = (FIELD,)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        shape, options = bottoms[0], self.param.flatten_param
        first = axis_index(self, options.axis, len(shape), FIELD, "axis")
        last = axis_index(self, options.end_axis, len(shape), FIELD, "end_axis")
        if last < first:
            raise self.fail(f"end_axis {last} comes before axis {first}", FIELD, "end_axis", hint="give the last axis to join")
        return [(*shape[:first], prod(shape[first : last + 1]), *shape[last + 1 :])]
