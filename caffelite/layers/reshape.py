"""Reshape: the same values in another shape."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from caffelite.blob import Shape
from caffelite.layer import register
from caffelite.layers.regroup import Regroup
from caffelite.schema import SourceMap, pb

FIELD = "reshape_param"


@register("Reshape")
class Reshape(Regroup):
    """Replaces num_axes axes from `axis` on (-1: all that follow) by `shape`.

    In `shape`, 0 copies the bottom's size at the same place and one -1 takes what is left. A negative `axis` counts from
    behind the last one: -1 appends.
    """

    param_fields = (FIELD,)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        self.dims = [int(dim) for dim in param.reshape_param.shape.dim]
        for i, dim in enumerate(self.dims):
            if dim < -1 or (dim == -1 and -1 in self.dims[:i]):
                found = "a second -1" if dim == -1 else f"dim {dim}"
                raise self.fail(f"{found} in shape", FIELD, "shape", 0, "dim", i, hint="give sizes, 0 to copy one, and at most one -1")

    def _span(self, axes: int) -> tuple[int, int]:
        """First and one past the last of the axes that are replaced."""
        axis, count = self.param.reshape_param.axis, self.param.reshape_param.num_axes
        start = axis if axis >= 0 else axes + axis + 1
        if not 0 <= start <= axes:
            raise self.fail(f"axis {axis} does not exist in a bottom with {axes} axes", FIELD, "axis", hint=f"choose {-axes - 1} to {axes}")
        if count < -1:
            raise self.fail(f"num_axes is {count}", FIELD, "num_axes", hint="give 0 or more, or -1 for all axes from `axis` on")
        end = axes if count == -1 else start + count
        if end > axes:
            raise self.fail(f"axis {start} and num_axes {count} reach past the {axes} axes of the bottom", FIELD, "num_axes", hint="lower it, or give -1")
        return start, end

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        shape = bottoms[0]
        start, end = self._span(len(shape))
        dims = list(self.dims)
        for i, dim in enumerate(dims):
            if dim == 0:
                if start + i >= len(shape):
                    raise self.fail(
                        f"dim 0 copies axis {start + i} of a bottom with {len(shape)} axes", FIELD, "shape", 0, "dim", i, hint="give the size itself"
                    )
                dims[i] = shape[start + i]
        result = [*shape[:start], *dims, *shape[end:]]
        if -1 in dims:
            rest = prod(dim for dim in result if dim != -1)
            if rest == 0 or prod(shape) % rest:
                raise self.fail(
                    f"{prod(shape)} values of shape {shape} do not divide by the {rest} of the other axes", FIELD, "shape", hint="change the sizes beside -1"
                )
            result[start + dims.index(-1)] = prod(shape) // rest
        elif prod(result) != prod(shape):
            raise self.fail(
                f"the bottom of shape {shape} has {prod(shape)} values, the new shape {tuple(result)} {prod(result)}", FIELD, "shape", hint="let one dim be -1"
            )
        return [tuple(result)]
