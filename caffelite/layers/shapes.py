"""What several layers share: axes given by number, operands that broadcast, and blobs seen under another shape."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from caffelite.backends.contract import Backend, c_order
from caffelite.blob import Array, Shape
from caffelite.layer import Layer


def axis_index(layer: Layer, axis: int, axes: int, *path: str | int) -> int:
    """`axis` as 0..axes-1, counting negative ones from the end. SpecError at `path` when there is no such axis."""
    if -axes <= axis < axes:
        return axis % axes
    raise layer.fail(
        f"axis {axis} does not exist in a bottom with {axes} axes", *path, hint=f"choose {-axes} to {axes - 1}" if axes else "a bottom without axes has none"
    )


def viewable(shape: Shape, other: Shape) -> bool:
    """Whether a blob of `shape` can be seen as `other` (of equal count) without moving its values."""
    return c_order(shape) or [n for n in shape if n != 1] == [n for n in other if n != 1]


def runs_along(axis: int, shape: Shape, sizes: Sequence[int]) -> list[int] | None:
    """Elements of a blob of `shape` before each of the parts of these sizes along `axis`; None where they are no unbroken runs of its memory."""
    order = (0, 2, 3, 1) if len(shape) == 4 else tuple(range(len(shape)))
    if any(shape[other] != 1 for other in order[: order.index(axis)]):
        return None
    step = prod(shape) // shape[axis]
    return [sum(sizes[:i]) * step for i in range(len(sizes))]


def starts_along(axis: int, shape: Shape, sizes: Sequence[int]) -> list[int] | None:
    """Channels of a blob (N,C,H,W) before each of the parts of these sizes along them; None along other axes."""
    return [sum(sizes[:i]) for i in range(len(sizes))] if len(shape) == 4 and axis == 1 else None


# A blob seen under another shape is a view where memory order allows; else its values pass through a buffer of that shape.


def loaded(ops: Backend, data: Array, shape: Shape, buffer: Array | None) -> Array:
    """The values of `data` in `shape`, for reading."""
    if buffer is None:
        return data if data.shape == shape else data.reshape(shape)
    ops.copy(data, buffer)
    return buffer


def target(data: Array, shape: Shape, buffer: Array | None) -> Array:
    """An array of `shape` to be written in place of `data`; `stored` brings the values home."""
    if buffer is not None:
        return buffer
    return data if data.shape == shape else data.reshape(shape)


def stored(ops: Backend, data: Array, buffer: Array | None) -> None:
    """Copies what was written to a `target` into `data`, unless it is there already."""
    if buffer is not None:
        ops.copy(buffer, data)


def operand_run(layer: Layer, bottoms: Sequence[Shape], axis: int, num_axes: int, field: str) -> tuple[int, Shape]:
    """Where the second operand of Scale and Bias lies on bottom 0: (first axis, shape).

    Two bottoms: bottom 1's shape must be the run of bottom 0's axes from `axis` on. One bottom: the learned operand has
    bottom 0's axes axis..axis+num_axes-1 (num_axes -1: to the end, 0: a scalar). SpecError where that does not fit.
    """
    shape = bottoms[0]
    if len(bottoms) == 2:
        first = axis_index(layer, axis, len(shape), field, "axis") if bottoms[1] else 0
        if shape[first : first + len(bottoms[1])] != tuple(bottoms[1]):
            raise layer.fail(
                f"bottom 1 has shape {bottoms[1]}, which is no run of bottom 0's shape {shape} from axis {first}",
                "bottom",
                1,
                hint=f"its axes must equal those of bottom 0 from axis {first} on; {field} {{ axis }} moves the start",
            )
        return first, tuple(bottoms[1])
    if num_axes < -1:
        raise layer.fail(f"num_axes is {num_axes}", field, "num_axes", hint="give 0 or more, or -1 for all axes from `axis` to the end")
    if num_axes == 0 and not shape:
        return 0, ()
    first = axis_index(layer, axis, len(shape), field, "axis")
    end = len(shape) if num_axes == -1 else first + num_axes
    if end > len(shape):
        raise layer.fail(f"axis {first} and num_axes {num_axes} reach past the {len(shape)} axes of the bottom", field, "num_axes", hint="lower it, or give -1")
    return first, tuple(shape[first:end])


def broadcast_view(operand: Array, first: int, axes: int) -> Array:
    """`operand`, whose axes are those of a bottom from `first` on, with axes of size 1 around them: `axes` in all."""
    shape = tuple(operand.shape)
    return operand.reshape((1,) * first + shape + (1,) * (axes - first - len(shape)))


def check_labels(layer: Layer, scores: Shape, labels: Shape, axis: int) -> None:
    """SpecError unless bottom 1 holds one label for every position of bottom 0 outside its class axis."""
    expected = prod(scores) // max(scores[axis], 1)
    if prod(labels) != expected or (labels and labels[0] != scores[0] and axis != 0):
        raise layer.fail(
            f"bottom 1 has shape {labels}, {prod(labels)} label(s), for scores of shape {scores} with classes on axis {axis}",
            "bottom",
            1,
            hint=f"give {expected} label(s), one for each position, first axis {scores[0]}",
        )


def old_axis(layer: Layer, options: Any, axes: int, field: str, name: str) -> int | None:
    """The axis given by Caffe's older, unsigned `name` (concat_dim, slice_dim); None when it is not used."""
    if not options.HasField(name):
        return None
    if options.HasField("axis"):
        raise layer.fail(f"both axis and {name} are given", field, name, hint="keep axis: the other is its older form")
    axis = int(getattr(options, name))
    return axis_index(layer, axis, axes, field, name)


def given_shape(layer: Layer, dims: Sequence[int], field: str, index: int) -> Shape:
    """A shape written in a file, as a tuple. SpecError at `field` { shape } number `index` unless every size is at least 1."""
    if any(dim < 1 for dim in dims):
        raise layer.fail(f"shape {tuple(dims)} has a size below 1", field, "shape", index, hint="give sizes of 1 or more")
    return tuple(int(dim) for dim in dims)
