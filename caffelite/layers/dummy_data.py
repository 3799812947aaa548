"""DummyData: blobs made by fillers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from caffelite.backends.contract import Array, Backend
from caffelite.blob import Blob, Shape
from caffelite.errors import SpecError
from caffelite.fillers import Values, fill
from caffelite.layer import Layer, register
from caffelite.layers.shapes import given_shape
from caffelite.schema import SourceMap, pb

FIELD = "dummy_data_param"
LEGACY = ("num", "channels", "height", "width")


@register("DummyData")
class DummyData(Layer):
    """Tops of the given shapes, float32, each from its filler: constants once, everything else anew in each forward.

    Shapes: `shape`, or the older num/channels/height/width; each of these, and data_filler, one for all tops or one for
    each; no data_filler: zeros. Draws are a function of the run's seed, the layer's name, the top and the forward's number.
    """

    bottom_range = (0, 0)
    top_range = (1, None)
    param_fields = (FIELD,)
    is_source = True
    differentiable = ()

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        super().__init__(param, phase, where)
        options, tops = param.dummy_data_param, len(param.top)
        self.fillers = list(options.data_filler) or [pb.FillerParameter(type="constant", value=0)]
        if len(self.fillers) not in (1, tops):
            raise self.fail(f"{len(self.fillers)} data_filler(s) for {tops} top(s)", FIELD, "data_filler", hint="give none, one for all, or one for each")
        self.fillers *= tops if len(self.fillers) == 1 else 1
        self.persistent_tops = any(filler.type == "constant" for filler in self.fillers)  # type: ignore[misc]  # known per layer
        self._filled: dict[int, Array] = {}  # the memory that holds a top's constant already

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        options, tops = self.param.dummy_data_param, len(self.param.top)
        old = [name for name in LEGACY if getattr(options, name)]
        if not old:
            if len(options.shape) not in (1, tops):
                raise self.fail(
                    f"{len(options.shape)} shape(s) for {tops} top(s)",
                    FIELD,
                    "shape",
                    hint="give dummy_data_param { shape { dim: ... } }, one for all tops or one for each",
                )
            return [given_shape(self, options.shape[i if len(options.shape) > 1 else 0].dim, FIELD, i) for i in range(tops)]
        if options.shape:
            raise self.fail(f"both shape and {old[0]} are given", FIELD, old[0], hint=f"keep shape: {', '.join(LEGACY)} are its older form")
        columns = []
        for name in LEGACY:
            values = list(getattr(options, name))
            if len(values) not in (1, tops):
                raise self.fail(f"{len(values)} value(s) of {name} for {tops} top(s)", FIELD, name, hint="give one for all tops or one for each")
            columns.append(values * (tops if len(values) == 1 else 1))
        return [given_shape(self, dims, FIELD, i) for i, dims in enumerate(zip(*columns))]

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        return ["float32"] * len(self.param.top)

    def backward_reads(self) -> frozenset[str]:
        return frozenset()

    def feed(self, ops: Backend, tops: Sequence[Blob]) -> None:
        for i, (top, filler) in enumerate(zip(tops, self.fillers)):
            if filler.type == "constant":
                if self._filled.get(i) is not top.data:
                    ops.fill(top.data, filler.value)
                    self._filled[i] = top.data
                continue
            ops.from_host(self._draw(i, filler, top.shape), top.data)

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        """Nothing: `feed` has filled the tops."""

    def _draw(self, index: int, filler: pb.FillerParameter, shape: Shape) -> Values:
        def fail(message: str) -> SpecError:
            return self.fail(message, FIELD, "data_filler", index)

        # The last counter word keeps these draws apart from dropout's, which leave it 0.
        stream = np.random.Philox(key=[self.context.seed, self.stream], counter=[0, 0, self.context.forward_count, index + 1])
        return fill(filler, shape, np.random.Generator(stream), fail)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        """Nothing: there is no bottom."""
