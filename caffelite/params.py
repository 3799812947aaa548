"""ParamArena: all parameters of a net in one flat float32 array, all gradients in another (design.md, decision 2).

For programs it is pycaffe's `params` as well: under the names of messages it has their enum values (net_spec.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from caffelite.backends.contract import Array, Backend, Segment
from caffelite.blob import Param
from caffelite.fillers import fill
from caffelite.graph import ParamInfo
from caffelite.schema import blob_to_array

ALIGN_ITEMS = 16  # each parameter starts on a 64-byte boundary


@dataclass
class FlatState:
    """A flat array laid out like the arena, and its part for each parameter in the parameter's shape."""

    flat: Array
    parts: list[Array]


class ParamArena:
    """The owning parameters of a net, in Caffe's order of learnable parameters.

    `master` and `grad` are flat float32 backend arrays of one length (zero in the padding between parameters);
    `grad` is None for a net that never runs backward. In bfloat16 the weights have a copy in that type, `lowered`,
    made by `refresh` and kept up to date by the solver's updates.
    """

    def __init__(self, backend: Backend, infos: Iterable[ParamInfo], *, compute: str, gradients: bool) -> None:
        self.backend = backend
        self.params: list[Param] = []
        self.labels: list[str] = []  # "layer/index" of each parameter
        self.offsets: list[int] = []
        self._by_info: dict[int, Param] = {}
        infos, length = list(infos), 0
        for info in infos:
            self.offsets.append(length)
            length += -(-prod(info.spec.shape) // ALIGN_ITEMS) * ALIGN_ITEMS
        self.length = length
        values, grads = self._flat(length), self._flat(length) if gradients else None
        lowered = backend.allocate(2 * length) if compute == "bfloat16" else None
        self.master = backend.view(values, 0, (length,), "float32")
        self.grad = backend.view(grads, 0, (length,), "float32") if gradients else None
        self.lowered = backend.view(lowered, 0, (length,), "bfloat16") if lowered is not None else None
        for info, offset in zip(infos, self.offsets):
            self._add(info, offset, values, grads, lowered)
        self.dirty = True

    def _flat(self, length: int) -> Array:
        return self.backend.allocate(4 * max(length, 1))

    def _add(self, info: ParamInfo, offset: int, values: Array, grads: Array, lowered: Array) -> None:
        view, shape = self.backend.view, info.spec.shape
        param = Param(info.share_name or info.label, shape, lr_mult=info.lr_mult, decay_mult=info.decay_mult)
        param.master = param.data = view(values, 4 * offset, shape, "float32")
        if grads is not None:
            param.diff = view(grads, 4 * offset, shape, "float32")
        if lowered is not None and info.spec.learned and len(shape) > 1:
            param.data, param.dtype = view(lowered, 2 * offset, shape, "bfloat16"), "bfloat16"
        self.params.append(param)
        self.labels.append(info.label)
        self._by_info[id(info)] = param

    def find(self, info: ParamInfo) -> Param:
        """The Param made for an owning ParamInfo."""
        return self._by_info[id(info)]

    def refresh(self) -> None:
        """Brings the bfloat16 copy up to date after the master values changed (`dirty`)."""
        if self.lowered is not None and self.dirty:
            self.backend.copy(self.master, self.lowered)
        self.dirty = False

    def segments(self, weight_decay: float) -> list[Segment]:
        """One Segment for each parameter, with its own multiple of `weight_decay`."""
        return [Segment(o, o + p.count, p.lr_mult, weight_decay * p.decay_mult) for p, o in zip(self.params, self.offsets)]

    def state(self) -> FlatState:
        """A new zeroed history of the arena's length."""
        buffer = self._flat(self.length)
        parts = [self.backend.view(buffer, 4 * o, p.shape, "float32") for p, o in zip(self.params, self.offsets)]
        return FlatState(self.backend.view(buffer, 0, (self.length,), "float32"), parts)

    def zero_grads(self) -> None:
        """The next gradients overwrite: no memory is touched now."""
        for param in self.params:
            param.accumulate = False

    def grads_written(self) -> None:
        """To be called after a record of passes was played: the next gradients are added."""
        for param in self.params:
            param.accumulate = True

    def settle_grads(self) -> None:
        """Zeros the gradients that no layer has written since zero_grads."""
        for param in self.params:
            if not param.accumulate and param.diff is not None:
                self.backend.fill(param.diff, 0.0)
                param.accumulate = True


def initial_values(info: ParamInfo, seed: int) -> np.ndarray:
    """The values a parameter starts with: the layer's own blobs if the definition holds some, else the filler's draw."""
    layer = info.node.layer
    if info.index < len(layer.param.blobs):
        values = blob_to_array(layer.param.blobs[info.index])
        if values.size != prod(info.spec.shape):
            raise layer.fail(f"blobs[{info.index}] holds {values.size} values for shape {info.spec.shape}", "blobs", info.index)
        return values.reshape(info.spec.shape)
    # The last counter word keeps these draws apart from dropout's, which leave it 0.
    rng = np.random.Generator(np.random.Philox(key=[seed, layer.stream], counter=[0, 0, 0, info.index + 1]))
    return fill(info.spec.filler, info.spec.shape, rng, lambda message: layer.fail(message, *info.spec.path))


if not TYPE_CHECKING:  # so that a misspelt import is still found

    def __getattr__(name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(f"module 'caffelite.params' has no attribute '{name}'")
        from caffelite.net_spec import enum_values

        return enum_values(name)
