"""Layer: what every layer type is to the graph and the net, and the registry that finds types by Caffe's names."""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from caffelite.backends.contract import Backend
from caffelite.blob import Array, Blob, Param, Shape
from caffelite.errors import SpecError
from caffelite.schema import SourceMap, pb

# What a layer's backward reads of its blobs' data. SIGN is satisfied by any later in-place layer that keeps the sign of
# every element through which gradient flows (ReLU, Dropout).
BOTTOM, TOP, SIGN = "bottom", "top", "sign of top"


@dataclass(frozen=True)
class ParamSpec:
    """One parameter blob: its shape, the filler that starts it, and whether it is learned at all."""

    shape: Shape
    filler: pb.FillerParameter
    learned: bool = True  # False: a statistic (BatchNorm), never given a gradient or a learning rate
    path: tuple[str, ...] = ()  # where the filler stands in the layer's message, for errors


@dataclass(frozen=True)
class BufferSpec:
    """Memory of a layer's own. kept: filled by forward and read by backward; else needed only within one call."""

    shape: Shape
    dtype: str
    kept: bool = True


@dataclass
class RunContext:
    """What layers may depend on beside their blobs: the run's seed and the number of the forward pass (iteration*iter_size + part; also in a
    cell, for ops), for random layers, and whether products may be taken in tf32. skip: a cell; while it is not 0 passes leave statistics as they are.
    tell: takes what a user should hear of."""

    seed: int = 0
    forward_count: int = 0
    pass_number: Array = None
    skip: Array = None
    tf32: bool = False
    tell: Callable[[str], object] = lambda text: None


class Layer:
    """Base class of all layers.

    A subclass states class facts, reads its prototxt fields in `__init__` (through `self.fail` on bad values), and gives
    `infer_shapes` (pure), `param_specs`, `buffer_specs`, `forward` and `backward`. It calls ops of the backend and nothing
    else; it keeps no arrays but `self.params` and `self.buffers`, which the net binds.
    """

    type: ClassVar[str] = ""
    bottom_range: ClassVar[tuple[int, int | None]] = (1, 1)  # least and most bottoms; None: no limit
    top_range: ClassVar[tuple[int, int | None]] = (1, 1)
    same_count: ClassVar[bool] = False  # as many tops as bottoms
    param_fields: ClassVar[tuple[str, ...]] = ()  # the *_param messages that belong to this type
    is_loss: ClassVar[bool] = False  # first top has loss weight 1 unless given; a missing top is made up
    is_source: ClassVar[bool] = False  # has no bottoms and starts a net (data layers)
    in_place: ClassVar[bool] = False  # may write its top over its bottom
    in_place_forward: ClassVar[bool] = False  # may do so only where no backward runs through it
    keeps_sign: ClassVar[bool] = False  # in place, keeps the sign wherever its gradient is not zero
    takes_dropout: ClassVar[bool] = False  # where it takes a ReLU's gradient, it can take that of a dropout after the ReLU too
    shares_data: ClassVar[bool] = False  # every top is the bottom's own memory (Split)
    no_force: ClassVar[tuple[int, ...]] = ()  # bottoms that force_backward does not reach
    differentiable: ClassVar[tuple[int, ...] | None] = None  # bottoms a gradient can reach; None: all, (): none
    persistent_tops: ClassVar[bool] = False  # tops keep their contents between iterations (Input, constant DummyData)

    def __init__(self, param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> None:
        self.param, self.phase = param, phase
        self.where = where or SourceMap.unknown()
        self.name: str = param.name
        self.in_place_here = bool(param.bottom) and list(param.bottom[:1]) == list(param.top[:1])
        self.params: list[Param] = []
        self.buffers: dict[str, Array] = {}
        self.context = RunContext()
        self.stream = zlib.crc32(self.name.encode())  # names this layer's random numbers
        self.training = phase == pb.TRAIN
        self.relu_bottoms: frozenset[int] = frozenset()  # set by the graph: see may_take_relu
        self.drop_ratios: dict[int, float] = {}  # by bottom, of those in relu_bottoms: set by the graph where takes_dropout
        # Set by the graph, of a layer that brings values together or apart: the bottoms (Concat, Eltwise) or tops (Slice, Flatten, Reshape)
        # whose data, and whose gradient, lies where the layer would copy it.
        self.held_data: frozenset[int] = frozenset()
        self.held_diffs: frozenset[int] = frozenset()
        self.keeps = True  # a backward step follows forward; set by the memory plan, before buffer_specs is asked

    # --- set-up --------------------------------------------------------------------------------------------------------

    def fail(self, message: str, *path: str | int, hint: str | None = None) -> SpecError:
        """A SpecError placed at the field named by `path`, as in self.fail("...", "convolution_param", "stride")."""
        return SpecError(message, where=self.where.at(*path), layer=self.name, hint=hint)

    def infer_shapes(self, bottoms: Sequence[Shape]) -> list[Shape]:
        """Shapes of the tops. Pure: may be called any number of times. SpecError when the bottoms do not fit."""
        raise NotImplementedError(self.type)

    def top_dtypes(self, bottoms: Sequence[str], compute: str) -> list[str]:
        """dtypes of the tops, "float32" or "bfloat16"; `compute` is the net's activation type.

        Layers that move values (Split, Concat, Slice, Flatten, Reshape) or take them one by one keep the bottom's dtype: labels stay float32."""
        return [compute] * max(len(self.param.top), 1)

    def param_specs(self, bottoms: Sequence[Shape]) -> list[ParamSpec]:
        """The parameter blobs in Caffe's order."""
        return []

    def buffer_specs(self, bottoms: Sequence[Shape], dtypes: Sequence[str], backend: Backend) -> dict[str, BufferSpec]:
        """Memory this layer needs beside its blobs."""
        return {}

    def backward_reads(self) -> frozenset[str]:
        """Which of BOTTOM, TOP, SIGN the backward of this very layer reads as data. May depend on self.in_place_here."""
        return frozenset((BOTTOM, TOP))

    def may_take_relu(self, bottoms: Sequence[Shape]) -> bool:
        """Whether backward can take the gradient of its bottoms on through the ReLU (slope 0) that made them. For the bottoms in `relu_bottoms`
        it has to: their gradients are then 0 where they are not above 0. What that needs of their data, `backward_reads` says."""
        return False

    def takes_gaps(self, bottoms: Sequence[Shape], backend: Backend) -> bool:
        """Whether its ops take blobs as they are between whose pixels other channels lie (Backend.takes_gaps)."""
        return False

    def statistics(self) -> Sequence[Param]:
        """The parameters that forward changes, without reading them otherwise (BatchNorm's sums)."""
        return ()

    def multiply_adds(self, bottoms: Sequence[Shape]) -> int:
        """Multiply-adds of one forward pass, for summary and time; 0 where they do not matter."""
        return 0

    # --- running -------------------------------------------------------------------------------------------------------

    def feed(self, ops: Backend, tops: Sequence[Blob]) -> None:
        """What of a source's forward pass the host has to do anew each time, just before `forward`: reading data, drawing numbers. `forward` and
        `backward` call ops alone, and always the same ones, so that a backend may record a pass and repeat it."""

    def forward(self, ops: Backend, bottoms: Sequence[Blob], tops: Sequence[Blob]) -> None:
        """Computes every top's data from the bottoms' data."""
        raise NotImplementedError(self.type)

    def backward(self, ops: Backend, tops: Sequence[Blob], propagate_down: Sequence[bool], bottoms: Sequence[Blob]) -> None:
        """Overwrites the diff of each bottom that is asked for; adds to (or sets, see Param.accumulate) parameter diffs."""
        raise NotImplementedError(self.type)

    def close(self) -> None:
        """Ends threads and files."""


_REGISTRY: dict[str, type[Layer]] = {}
# Caffe's other layer types, which are not there: the nearest known name would be no help to who means these. docs/layers.md lists them too.
NOT_THERE = frozenset(
    (
        *("AbsVal", "ArgMax", "BNLL", "BatchReindex", "Clip", "ContrastiveLoss", "Crop", "Deconvolution", "Embed", "Exp", "Filter", "HDF5Data"),
        *("HDF5Output", "HingeLoss", "Im2col", "ImageData", "InfogainLoss", "LSTM", "LSTMUnit", "Log", "MVN", "MemoryData"),
        *("MultinomialLogisticLoss", "Parameter", "Python", "RNN", "Reduction", "SPP", "SigmoidCrossEntropyLoss", "Swish", "Threshold", "Tile"),
        "WindowData",
    )
)
_FROM_FILES = "make a database of the images with `caffelite convert` (its list is written as ImageData's) and read it with a Data layer"
_INSTEAD = {"ImageData": _FROM_FILES, "WindowData": _FROM_FILES, "MemoryData": "an Input layer takes arrays from Python, a Data layer reads a database"}
_INSTEAD["HDF5Data"] = _INSTEAD["MemoryData"]
L = TypeVar("L", bound=type[Layer])


def register(type_name: str) -> Callable[[L], L]:
    """Class decorator: makes a layer class known under Caffe's type name."""

    def add(cls: L) -> L:
        cls.type = type_name
        _REGISTRY[type_name] = cls
        return cls

    return add


def known_types() -> list[str]:
    """All registered type names, sorted."""
    import caffelite.layers  # noqa: F401  (registers every layer)

    return sorted(_REGISTRY)


def layer_class(param: pb.LayerParameter, where: SourceMap) -> type[Layer]:
    """The class for param.type; SpecError for an unknown one, with the nearest known names unless it is another of Caffe's."""
    types = known_types()
    if param.type in _REGISTRY:
        return _REGISTRY[param.type]
    if param.type in NOT_THERE:
        hint = _INSTEAD.get(param.type) or "those that are there: " + ", ".join(types)
        raise SpecError(f"Caffe's layer type '{param.type}' is not there in caffelite", where=where.at("type"), layer=param.name, hint=hint)
    folded = {name.lower(): name for name in types}
    near = [folded[n] for n in difflib.get_close_matches(param.type.lower(), list(folded), n=2, cutoff=0.6)]
    found = f"unknown layer type '{param.type}'" if param.type else "the layer has no type"
    hint = f"did you mean {' or '.join(repr(n) for n in near)}?" if near else "known types: " + ", ".join(types)
    raise SpecError(found, where=where.at("type"), layer=param.name, hint=hint)


def create_layer(param: pb.LayerParameter, phase: int, where: SourceMap | None = None) -> Layer:
    """A validated layer: known type, right numbers of bottoms and tops, no *_param of another type."""
    where = where or SourceMap.unknown()
    cls = layer_class(param, where)
    _check_counts(cls, param, where)
    _check_param_fields(cls, param, where)
    return cls(param, phase, where)


def _check_counts(cls: type[Layer], param: pb.LayerParameter, where: SourceMap) -> None:
    tops = max(len(param.top), 1) if cls.is_loss else len(param.top)
    for noun, count, (least, most) in (("bottom", len(param.bottom), cls.bottom_range), ("top", tops, cls.top_range)):
        if count < least or (most is not None and count > most):
            span = f"{least}" if least == most else f"at least {least}" if most is None else f"{least} to {most}"
            raise SpecError(f"{cls.type} takes {span} {noun}(s), found {count}", where=where.at(noun), layer=param.name)
    if cls.same_count and len(param.bottom) != len(param.top):
        raise SpecError(
            f"{cls.type} takes as many tops as bottoms, found {len(param.bottom)} bottom(s) and {len(param.top)} top(s)", where=where.at(), layer=param.name
        )


def _check_param_fields(cls: type[Layer], param: pb.LayerParameter, where: SourceMap) -> None:
    for descriptor, _ in param.ListFields():
        name: Any = descriptor.name
        if name.endswith("_param") and name not in cls.param_fields:
            allowed = ", ".join(cls.param_fields)
            takes = f"{cls.type} reads {allowed}" if allowed else f"{cls.type} has no parameters of its own"
            raise SpecError(
                f"{name} does not belong to a {cls.type} layer", where=where.at(name), layer=param.name, hint=f"{takes}; remove it or change the type"
            )
