"""pycaffe's classes over caffelite's engine: `import caffelite as caffe` (spec net-and-solver 13).

Blobs keep memory of their own and layers run unfused here, so that every array can be read and written between calls.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

import caffelite.blob as engine_blob
import caffelite.net as engine
from caffelite import backends
from caffelite.backends.contract import Backend
from caffelite.errors import SpecError
from caffelite.layer import known_types
from caffelite.schema import pb, read_net, read_solver

TRAIN, TEST = 0, 1


class _Settings:
    """What set_mode_cpu, set_mode_gpu and set_random_seed choose for the nets made after them."""

    def __init__(self) -> None:
        self.gpu = False
        self.seed: int | None = None


_settings = _Settings()


def set_mode_cpu() -> None:
    """Nets made from now on run on a CPU backend (CAFFELITE_BACKEND or the fastest that loads)."""
    _settings.gpu = False


def set_mode_gpu() -> None:
    """Nets made from now on run on a GPU; BackendError where there is no GPU backend."""
    backends.get("cuda")
    _settings.gpu = True


def set_device(device: int) -> None:
    """Chooses the GPU for set_mode_gpu; BackendError where there is no GPU backend."""
    backends.get("cuda")


def set_random_seed(seed: int) -> None:
    """Seeds fillers and random layers of the nets made from now on."""
    _settings.seed = seed


def layer_type_list() -> list[str]:
    """All layer types by Caffe's names."""
    return known_types()


def _backend() -> Backend:
    return backends.get("cuda" if _settings.gpu else os.environ.get("CAFFELITE_BACKEND", "auto"))


def _seed() -> int:
    return int.from_bytes(os.urandom(4), "little") if _settings.seed is None else _settings.seed


class Blob:
    """A blob as pycaffe shows it: `.data` and `.diff` are writable float32 arrays in (N,C,H,W) order."""

    def __init__(self, blob: engine_blob.Blob, net: engine.Net) -> None:
        self._blob, self._net = blob, net

    @property
    def data(self) -> np.ndarray:
        if isinstance(self._blob, engine_blob.Param):
            return self._blob.master  # type: ignore[no-any-return]
        return self._blob.data  # type: ignore[no-any-return]

    @property
    def diff(self) -> np.ndarray:
        if self._blob.diff is None:
            self._blob.diff = self._net.backend.empty(self._blob.shape, "float32")
            self._net.backend.fill(self._blob.diff, 0.0)
        return self._blob.diff  # type: ignore[no-any-return]

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
        """Gives a net input a new shape at once; the blobs after it follow at the next Net.reshape or forward."""
        name = self._blob.name
        if name not in self._net.inputs:
            raise SpecError(
                "only a net input can be reshaped: other shapes follow from the inputs", blob=name, hint=f"inputs: {', '.join(self._net.inputs) or 'none'}"
            )
        self._net.reshape({name: tuple(int(size) for size in shape)})


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
        net = engine.Net(read_net(network_file), phase=phase, level=level, stages=stages or (), backend=_backend(), observe=True, seed=_seed())
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
        self._before: dict[str, list[Callable[[str], None]]] = {"forward": [], "backward": []}
        self._after: dict[str, list[Callable[[str], None]]] = {"forward": [], "backward": []}

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
        """Fills the named inputs, runs layers start..end (both included), returns views of the outputs (or of end's tops) and `blobs`."""
        for name, values in inputs.items():
            _fill(self.blobs, name, values, set(self.inputs), set(inputs), "net input")
        first, last = self._index(start, 0), self._index(end, len(self.layers) - 1)
        self._net.parameters_changed()
        self._net.forward_range(first, last, self._hook("forward"))
        self._net.context.forward_count += 1
        names = self.top_names[end] if end else self.outputs
        return {name: self.blobs[name].data for name in [*names, *(blobs or [])]}

    def backward(self, diffs: Sequence[str] | None = None, start: str | None = None, end: str | None = None, **given: Any) -> dict[str, np.ndarray]:
        """Fills the named top diffs, runs backward from start down to end, returns views of the inputs' (or end's bottoms') diffs and `diffs`."""
        tops = set(self.top_names[start] if start else self.outputs)
        for name, values in given.items():
            _fill(self.blobs, name, values, tops, tops, "net output", diff=True)
        first, last = self._index(start, len(self.layers) - 1), self._index(end, 0)
        self._net.backward_range(first, last, self._hook("backward"))
        names = self.bottom_names[end] if end else self.inputs
        return {name: self.blobs[name].diff for name in [*names, *(diffs or [])]}

    def _hook(self, kind: str) -> Callable[[str, bool], None] | None:
        before, after = self._before[kind], self._after[kind]
        if not (before or after):
            return None

        def call(layer: str, done: bool) -> None:
            for function in after if done else before:
                function(layer)

        return call

    def before_forward(self, function: Callable[[str], None]) -> None:
        """Calls function(layer name) before each layer's forward."""
        self._before["forward"].append(function)

    def after_forward(self, function: Callable[[str], None]) -> None:
        """Calls function(layer name) after each layer's forward."""
        self._after["forward"].append(function)

    def before_backward(self, function: Callable[[str], None]) -> None:
        """Calls function(layer name) before each layer's backward."""
        self._before["backward"].append(function)

    def after_backward(self, function: Callable[[str], None]) -> None:
        """Calls function(layer name) after each layer's backward."""
        self._after["backward"].append(function)

    def forward_all(self, blobs: Sequence[str] | None = None, **inputs: Any) -> dict[str, np.ndarray]:
        """Runs inputs of any length through the net batch by batch; the last batch is padded with zeros, results trimmed."""
        results: dict[str, list[np.ndarray]] = {}
        for batch, size in self._batches(inputs):
            for name, values in self.forward(blobs, **batch).items():
                results.setdefault(name, []).extend(np.array(values[:size]))
        return {name: np.asarray(values) for name, values in results.items()}

    def forward_backward_all(
        self, blobs: Sequence[str] | None = None, diffs: Sequence[str] | None = None, **given: Any
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """forward_all and backward for each batch; keyword names that are outputs give diffs, the others inputs."""
        outs: dict[str, list[np.ndarray]] = {}
        grads: dict[str, list[np.ndarray]] = {}
        tops = set(self.outputs)
        for batch, size in self._batches(given):
            inputs = {k: v for k, v in batch.items() if k not in tops}
            for store, values in ((outs, self.forward(blobs, **inputs)), (grads, self.backward(diffs, **{k: v for k, v in batch.items() if k in tops}))):
                for name, array in values.items():
                    store.setdefault(name, []).extend(np.array(array[:size]))
        return {k: np.asarray(v) for k, v in outs.items()}, {k: np.asarray(v) for k, v in grads.items()}

    def _batches(self, arrays: dict[str, Any]) -> Any:
        total = len(next(iter(arrays.values())))
        size = next(iter(self.blobs.values())).shape[0]
        for start in range(0, total, size):
            count = min(size, total - start)
            batch = {}
            for name, values in arrays.items():
                part = np.zeros((size, *np.shape(values)[1:]), np.float32)
                part[:count] = values[start : start + count]
                batch[name] = part
            yield batch, count

    # --- shapes and weights --------------------------------------------------------------------------------------------

    def reshape(self) -> None:
        """Shapes follow the inputs already: kept for pycaffe's callers."""

    def set_input_arrays(self, data: np.ndarray, labels: np.ndarray) -> None:
        """Fills the first two net inputs."""
        for name, values in zip(self.inputs, (data, labels)):
            self.blobs[name].data[...] = values.reshape(self.blobs[name].shape)

    def copy_from(self, path: Any) -> None:
        """Copies weights by layer name from a .caffemodel (or HDF5) file, or a comma-separated list."""
        self._net.copy_from(path)

    def share_with(self, other: Net) -> None:
        """Uses other's parameter values, layer by layer by name."""
        self._net.share_with(other._net)

    def save(self, path: str | Path, write_diff: bool = False) -> None:
        """Writes a binary .caffemodel."""
        self._net.save(Path(path), write_diff)

    def save_hdf5(self, path: str | Path, write_diff: bool = False) -> None:
        """Writes an HDF5 model."""
        from caffelite.hdf5 import write_model

        write_model(self._net, Path(path), write_diff)

    def load_hdf5(self, path: str | Path) -> None:
        """Reads an HDF5 model."""
        self._net.copy_from(path)

    def clear_param_diffs(self) -> None:
        """Zeros every parameter gradient."""
        self._net.zero_grads()
        self._net.arena.settle_grads()


class SolverParameters:
    """The few settings pycaffe shows of a solver."""

    def __init__(self, param: pb.SolverParameter) -> None:
        self.max_iter, self.display, self.layer_wise_reduce, self.base_lr = param.max_iter, param.display, param.layer_wise_reduce, param.base_lr


class Solver:
    """A solver made from a prototxt; `.net` and `.test_nets` share parameters as in training from the command line."""

    TYPE: str | None = None

    def __init__(self, solver_file: str | Path) -> None:
        from caffelite.solver.loop import Solver as EngineSolver

        spec = read_solver(solver_file)
        if self.TYPE:
            spec.param.type = self.TYPE
        if spec.param.random_seed < 0 and _settings.seed is not None:
            spec.param.random_seed = _settings.seed
        self._solver = EngineSolver(spec, backend=_backend(), observe=True)
        self.net = Net.of(self._solver.net)
        self.test_nets = [Net.of(net) for net in self._solver.test_nets]
        self.param = SolverParameters(spec.param)

    @property
    def iter(self) -> int:
        """Updates done."""
        return self._solver.iter

    @property
    def lr(self) -> float:
        """The rate of the next update; reading it can advance multistep, as in Caffe."""
        return self._solver.lr

    def step(self, iterations: int) -> None:
        """Runs some iterations, with the tests, displays and snapshots that fall due."""
        self._solver.step(iterations)

    def solve(self, resume_file: str | Path | None = None) -> None:
        """Trains up to max_iter, from a saved state if given."""
        self._solver.solve(resume_file)

    def restore(self, state_file: str | Path) -> None:
        """Takes up the run saved in a .solverstate file."""
        self._solver.restore(state_file)

    def snapshot(self) -> None:
        """Writes the model and the solver's state."""
        self._solver.snapshot()

    def share_weights(self, net: Net) -> None:
        """Lets `net` use the train net's parameter values."""
        net.share_with(self.net)

    def apply_update(self) -> None:
        """One update from the gradients that are in the net."""
        self._solver.apply_update()


class SGDSolver(Solver):
    TYPE = "SGD"


class NesterovSolver(Solver):
    TYPE = "Nesterov"


class AdaGradSolver(Solver):
    TYPE = "AdaGrad"


class RMSPropSolver(Solver):
    TYPE = "RMSProp"


class AdaDeltaSolver(Solver):
    TYPE = "AdaDelta"


class AdamSolver(Solver):
    TYPE = "Adam"


def get_solver(solver_file: str | Path) -> Solver:
    """The solver of the type that the file names."""
    return Solver(solver_file)


def _fill(blobs: OrderedDict[str, Blob], name: str, values: Any, allowed: set[str], given: set[str], noun: str, diff: bool = False) -> None:
    if name not in allowed or (not diff and given != allowed):
        raise SpecError(f"'{name}' is no {noun}, or not all were given", hint=f"give exactly: {', '.join(sorted(allowed))}")
    blob = blobs[name]
    values = np.asarray(values)
    if values.shape[:1] != blob.shape[:1]:
        raise SpecError(f"{len(values)} item(s) given, the blob has room for {blob.shape[0]}", blob=name, hint="reshape the input blob first")
    (blob.diff if diff else blob.data)[...] = values
