"""pycaffe's Net, Blob and Layer. Blobs keep memory of their own and layers run unfused, so that every array can be read and written between calls."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import caffelite.blob as engine_blob
import caffelite.net as engine
from caffelite.errors import SpecError
from caffelite.pycaffe.mirror import Mirror, called_back, engine_runs, shown
from caffelite.pycaffe.settings import TEST, TRAIN, new_backend, new_seed
from caffelite.schema import read_net
from caffelite.weights import write_binary


class Blob:
    """A blob as pycaffe shows it: `.data` and `.diff` are writable float32 arrays in (N,C,H,W) order."""

    def __init__(self, blob: engine_blob.Blob, net: engine.Net) -> None:
        self._blob, self._net = blob, net
        self._mirrors: dict[str, Mirror] = {}

    @property
    def data(self) -> np.ndarray:
        array = self._blob.master if isinstance(self._blob, engine_blob.Param) else self._blob.data
        return shown(self._mirrors, "data", self._net.backend, array)

    @property
    def diff(self) -> np.ndarray:
        if self._blob.diff is None:
            self._blob.diff = self._net.backend.empty(self._blob.shape, "float32")
            self._net.backend.fill(self._blob.diff, 0.0)
        return shown(self._mirrors, "diff", self._net.backend, self._blob.diff)

    @property
    def shape(self) -> tuple[int, ...]:
        return self._blob.shape

    @property
    def count(self) -> int:
        return prod(self.shape)

    def _legacy(self, axis: int) -> int:
        if len(self.shape) > 4:
            raise SpecError(f"num, channels, height and width need at most 4 axes, the shape is {self.shape}", blob=self._blob.name, hint="use .shape")
        return self.shape[axis] if axis < len(self.shape) else 1

    num = property(lambda self: self._legacy(0))
    channels = property(lambda self: self._legacy(1))
    height = property(lambda self: self._legacy(2))
    width = property(lambda self: self._legacy(3))

    def reshape(self, *shape: int) -> None:
        """Gives a net input a new shape at once, filled with zeros; the other blobs follow at the next Net.reshape or forward."""
        with engine_runs():
            self._net.resize_input(self._blob.name, tuple(int(size) for size in shape))


class Layer:
    """A layer of a pycaffe Net: its type name and its parameter blobs."""

    def __init__(self, step: engine.Step, net: engine.Net) -> None:
        self.type = step.layer.type
        self.blobs = [Blob(param, net) for param in step.layer.params]


class Net:
    """Net(file, phase, level=0, stages=None, weights=None), or the older Net(file, weights, phase)."""

    def __init__(
        self, network_file: str | Path, *args: Any, phase: int | None = None, level: int = 0, stages: Sequence[str] | None = None, weights: Any = None
    ) -> None:
        rest = list(args)
        if rest and isinstance(rest[0], (str, Path)):
            weights = rest.pop(0)
        if rest:
            phase = rest.pop(0)
        for value in rest:
            if isinstance(value, int):
                level = value
            elif isinstance(value, (str, Path)):
                weights = value
            else:
                stages = value
        if phase not in (TRAIN, TEST):
            raise SpecError(f"phase is {phase!r}; expected caffe.TRAIN or caffe.TEST")
        net = engine.Net(read_net(network_file), phase=phase, level=level, stages=stages or (), backend=new_backend(), observe=True, seed=new_seed())
        self._wrap(net)
        if weights is not None:
            self.copy_from(weights)

    def _wrap(self, net: engine.Net) -> None:
        self._net = net
        self.blobs: OrderedDict[str, Blob] = OrderedDict((name, Blob(blob, net)) for name, blob in net.blobs.items())
        self.layers = [Layer(step, net) for step in net.steps]
        self.layer_dict = OrderedDict(zip(net.layer_names, self.layers))
        self.params: OrderedDict[str, list[Blob]] = OrderedDict((name, self.layer_dict[name].blobs) for name in net.params)
        self.inputs, self.outputs = net.inputs, net.outputs
        self._layer_names, self._blob_names = net.layer_names, list(net.blobs)
        self.top_names = OrderedDict((s.layer.name, [t.name for t in s.tops]) for s in net.steps)
        self.bottom_names = OrderedDict((s.layer.name, [b.name for b in s.bottoms]) for s in net.steps)
        self.blob_loss_weights = OrderedDict((name, net.loss_weight(name)) for name in net.blobs)

    @classmethod
    def of(cls, net: engine.Net) -> Net:
        """The pycaffe face of an engine net made with observe=True."""
        self = cls.__new__(cls)
        self._wrap(net)
        return self

    @property
    def name(self) -> str:
        return self._net.name

    # --- running -------------------------------------------------------------------------------------------------------

    def _index(self, name: str | None, default: int) -> int:
        if name is None:
            return default
        if name not in self._layer_names:
            raise SpecError(f"the net has no layer '{name}'", hint=f"its layers: {', '.join(self._layer_names)}")
        return self._layer_names.index(name)

    def forward(self, blobs: Sequence[str] | None = None, start: str | None = None, end: str | None = None, **inputs: Any) -> dict[str, np.ndarray]:
        """Fills the inputs (all, or none), runs layers start..end (both included), returns views of the outputs (or of end's tops) and `blobs`."""
        if inputs and set(inputs) != set(self.inputs):
            raise SpecError(f"values given for {_names(inputs)}, the net's inputs are {_names(self.inputs)}", hint="give all of them, or none")
        for name, values in inputs.items():
            _fill(name, self.blobs[name].data, values)
        first, last = self._index(start, 0), self._index(end, len(self.layers) - 1)
        with engine_runs():
            self._net.parameters_changed()
            self._net.forward(first, last + 1)
        self._net.context.forward_count += 1
        names = self.top_names[end] if end else self.outputs
        return {name: self.blobs[name].data for name in [*names, *(blobs or [])]}

    def backward(self, diffs: Sequence[str] | None = None, start: str | None = None, end: str | None = None, **given: Any) -> dict[str, np.ndarray]:
        """Fills the diffs of the named outputs (or of start's tops), runs backward from start down to end (both included), returns views
        of the inputs' (or end's bottoms') diffs and of `diffs`."""
        first, last = self._index(start, len(self.layers) - 1), self._index(end, 0)
        tops = [*(self.top_names[start] if start else []), *self.outputs]
        for name, values in given.items():
            if name not in tops:
                raise SpecError(f"a gradient is given for '{name}', which is no output", hint=f"outputs: {_names(tops)}")
            _fill(name, self.blobs[name].diff, values)
        with engine_runs():
            self._net.backward(first, last)
        names = self.bottom_names[end] if end else self.inputs
        return {name: self.blobs[name].diff for name in [*names, *(diffs or [])]}

    def before_forward(self, function: Callable[[int], object]) -> None:
        """Calls function(layer number) before each layer's forward, in training too."""
        self._net.hooks.before_forward.append(called_back(function))

    def after_forward(self, function: Callable[[int], object]) -> None:
        """Calls function(layer number) after each layer's forward, in training too."""
        self._net.hooks.after_forward.append(called_back(function))

    def before_backward(self, function: Callable[[int], object]) -> None:
        """Calls function(layer number) before each layer's backward, in training too."""
        self._net.hooks.before_backward.append(called_back(function))

    def after_backward(self, function: Callable[[int], object]) -> None:
        """Calls function(layer number) after each layer's backward, in training too."""
        self._net.hooks.after_backward.append(called_back(function))

    def forward_all(self, blobs: Sequence[str] | None = None, **inputs: Any) -> dict[str, np.ndarray]:
        """Runs inputs of any length through the net batch by batch; the last batch is padded with zeros, results trimmed.

        An output without axes (a loss) gives one value for each batch."""
        results: dict[str, list[np.ndarray]] = {}
        for batch, size in self._batches(inputs):
            _collect(results, self.forward(blobs, **batch), size)
        return {name: np.asarray(values) for name, values in results.items()}

    def forward_backward_all(
        self, blobs: Sequence[str] | None = None, diffs: Sequence[str] | None = None, **given: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """forward_all and backward for each batch; keyword names that are outputs give diffs, the others inputs."""
        outs: dict[str, list[np.ndarray]] = {}
        grads: dict[str, list[np.ndarray]] = {}
        for batch, size in self._batches(given):
            dtops: dict[str, Any] = {name: batch.pop(name) for name in self.outputs if name in batch}
            _collect(outs, self.forward(blobs, **batch), size)
            _collect(grads, self.backward(diffs, **dtops), size)
        return {k: np.asarray(v) for k, v in outs.items()}, {k: np.asarray(v) for k, v in grads.items()}

    def _batches(self, arrays: dict[str, Any]) -> Iterator[tuple[dict[str, Any], int]]:
        if not arrays:
            raise SpecError("no values are given", hint=f"name them by input: {_names(self.inputs)}")
        total = len(next(iter(arrays.values())))
        size = next(iter(self.blobs.values())).shape[0]
        for start in range(0, total, size):
            count = min(size, total - start)
            batch: dict[str, Any] = {}
            for name, values in arrays.items():
                batch[name] = np.zeros((size, *np.shape(values)[1:]), np.float32)
                batch[name][:count] = values[start : start + count]
            yield batch, count

    # --- shapes and weights --------------------------------------------------------------------------------------------

    def reshape(self) -> None:
        """Brings all shapes in line with the inputs'. forward does so, too."""
        with engine_runs():
            self._net.reshape()

    def copy_from(self, path: str | Path) -> None:
        """Copies weights by layer name from a .caffemodel or HDF5 file; a text may name several, separated by commas."""
        with engine_runs():
            self._net.copy_from(path)

    def share_with(self, other: Net) -> None:
        """Uses other's parameter values, layer by layer by name."""
        with engine_runs():
            self._net.share_with(other._net)

    def save(self, path: str | Path, write_diff: bool = False) -> None:
        """Writes a binary .caffemodel, whatever the name."""
        with engine_runs():
            write_binary(self._net, Path(path), write_diff)

    def save_hdf5(self, path: str | Path, write_diff: bool = False) -> None:
        """Writes an HDF5 model."""
        from caffelite.hdf5 import write_model

        with engine_runs():
            write_model(self._net, Path(path), write_diff)

    def load_hdf5(self, path: str | Path) -> None:
        """Reads an HDF5 model."""
        with engine_runs():
            self._net.copy_from(path)

    def clear_param_diffs(self) -> None:
        """Zeros every parameter gradient."""
        with engine_runs():
            self._net.zero_grads()
            self._net.arena.settle_grads()


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _fill(name: str, array: np.ndarray, values: Any) -> None:
    values = np.asarray(values)
    if array.ndim and values.shape[:1] != array.shape[:1]:
        found = f"{len(values)} item(s)" if values.ndim else "a single number"
        raise SpecError(f"{found} given, the blob has room for {len(array)}", blob=name, hint="reshape the input blob first")
    try:
        array[...] = values
    except ValueError as error:
        raise SpecError(f"values of shape {values.shape} do not fit the blob's shape {array.shape}", blob=name) from error


def _collect(results: dict[str, list[np.ndarray]], arrays: dict[str, np.ndarray], size: int) -> None:
    for name, values in arrays.items():
        results.setdefault(name, []).extend(np.array(values[:size]) if values.ndim else [np.array(values)])
