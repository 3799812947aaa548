"""Net: a graph on a backend: arrays, running, loading and saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from caffelite.backends.contract import Array, Backend
from caffelite.blob import Blob, Param, Shape
from caffelite.errors import CaffeliteError, SnapshotError
from caffelite.graph import Graph, Node, ParamInfo, build_graph, fuse
from caffelite.layer import Layer, RunContext
from caffelite.memory import MemoryPlan, plan_memory
from caffelite.params import ParamArena, initial_values
from caffelite.schema import NetSpec, pb
from caffelite.weights import copy_weights, net_to_proto, read_weights, write_weights


@dataclass
class Step:
    """One layer with its blobs, ready to run."""

    node: Node
    layer: Layer
    bottoms: list[Blob]
    tops: list[Blob]
    backward_buffers: dict[str, Array]  # what self.buffers holds during backward, where that differs


class Net:
    """A net in one phase.

    spec: the net as read. backend: where it runs. precision: "float32", "tf32" or "bfloat16". observe: every blob keeps memory of
    its own and no layer is fused, so that any blob can be read and written between calls (pycaffe). seed: of fillers and of
    every random layer. share: a net whose parameters (by layer name) this one uses as its own; workspace: a net whose
    arena of passing values this one may use too, when the two never run at the same time.
    """

    def __init__(
        self,
        spec: NetSpec,
        *,
        phase: int,
        backend: Backend,
        level: int = 0,
        stages: Sequence[str] = (),
        precision: str = "float32",
        observe: bool = False,
        seed: int = 0,
        share: Net | None = None,
        workspace: Net | None = None,
    ) -> None:
        self.spec, self.phase, self.backend, self.precision, self.observe, self.seed = spec, phase, backend, precision, observe, seed
        self.compute = "bfloat16" if precision == "bfloat16" else "float32"
        self.context = RunContext(seed)
        self.graph: Graph = build_graph(spec, phase=phase, level=level, stages=stages, compute=self.compute)
        self.has_backward = self.graph.has_backward and (observe or phase == pb.TRAIN)
        if not observe:
            fuse(self.graph)
        self.name = self.graph.name
        self.layers = [node.layer for node in self.graph.nodes]
        self.layer_names = [layer.name for layer in self.layers]
        self.inputs, self.outputs = self.graph.inputs, self.graph.outputs
        self.data_layers = [layer for layer in self.layers if hasattr(layer, "source")]
        self.blobs = {name: Blob(name, info.shape, info.dtype) for name, info in self.graph.blobs.items()}
        self.steps = [Step(n, n.layer, [self.blobs[b.name] for b in n.bottoms], [self.blobs[t.name] for t in n.tops], {}) for n in self.graph.nodes]
        self._start_positions: dict[str, int] = {}
        try:
            self._make_params(share)
            self._place(workspace)
        except BaseException:
            self.close()
            raise

    # --- set-up --------------------------------------------------------------------------------------------------------

    def _make_params(self, share: Net | None) -> None:
        borrowed = share.params if share else {}
        for node in self.graph.nodes:
            if node.name in borrowed and node.params:
                _check_borrowed(node, borrowed[node.name])
        own = [info for info in self.graph.owners if info.node.name not in borrowed]
        self.arena = ParamArena(self.backend, own, compute=self.compute, gradients=self.has_backward)
        self._shared_arena = share.arena if share else None
        for info in own:
            self.backend.from_host(initial_values(info, self.seed), self.arena.find(info).master)
        for node in self.graph.nodes:
            node.layer.context = self.context
            if node.name in borrowed:
                node.layer.params = borrowed[node.name]
            else:
                node.layer.params = [self._param_of(info, share) for info in node.params]
        self.params: dict[str, list[Param]] = {node.name: node.layer.params for node in self.graph.nodes if node.params}

    def _param_of(self, info: ParamInfo, share: Net | None) -> Param:
        owner = info.owner
        borrowed = share.params.get(owner.node.name) if share else None
        param = borrowed[owner.index] if borrowed else self.arena.find(owner)
        return param if param.shape == info.spec.shape else _other_shape(param, info)

    def _place(self, workspace: Net | None) -> None:
        self.memory: MemoryPlan = plan_memory(self.graph, self.backend, backward=self.has_backward, reuse=not self.observe)
        lent = workspace.shared_buffer if workspace and workspace.memory.shared_bytes >= self.memory.shared_bytes else None
        self.shared_buffer: Array = self.backend.allocate(self.memory.shared_bytes) if lent is None else lent
        self.persistent_buffer = self.backend.allocate(self.memory.persistent_bytes)
        for name, info in self.graph.blobs.items():
            blob = self.blobs[name]
            blob.data = self._array(("data", info.data_root.name), info.shape)
            blob.diff = self._array(("diff", name), info.shape)
        for step in self.steps:
            self._bind_buffers(step)
            for top, weight in zip(step.tops, step.node.loss_weights):
                if weight and top.diff is not None:
                    self.backend.fill(top.diff, weight)

    def _array(self, key: tuple[str, ...], shape: Shape | None = None) -> Array:
        region = self.memory.by_key.get(key)
        if region is None:
            return None
        buffer = self.persistent_buffer if region.persistent else self.shared_buffer
        return self.backend.view(buffer, region.offset, region.shape if shape is None else shape, region.dtype)

    def _bind_buffers(self, step: Step) -> None:
        for region in self.memory.regions:
            part, owner, *rest = region.key
            if owner == step.node.name and rest and part == "buffer":
                step.layer.buffers[rest[0]] = self._array(region.key)
            elif owner == step.node.name and rest:
                step.backward_buffers[rest[0]] = self._array(region.key)

    def reshape(self, shapes: dict[str, Shape]) -> None:
        """Gives net inputs new shapes and everything after them what follows from it; only for observe=True.

        Blobs of unchanged shape keep their contents. SpecError when a parameter would change its shape.
        """
        old = {name: (blob.shape, blob.data) for name, blob in self.blobs.items()}
        for node in self.graph.nodes:
            if node.layer.is_source:
                new = [shapes.get(top.name, top.shape) for top in node.tops]
            else:
                new = node.layer.infer_shapes([b.shape for b in node.bottoms])
                specs = [spec.shape for spec in node.layer.param_specs([b.shape for b in node.bottoms])]
                if specs != [info.spec.shape for info in node.params]:
                    raise node.layer.fail(f"its parameters would change shape to {specs}", hint="make a new net for these input shapes")
            for top, shape in zip(node.tops, new):
                top.shape = self.blobs[top.name].shape = tuple(shape)
        if all(blob.shape == old[name][0] for name, blob in self.blobs.items()):
            return
        self._place(None)
        for name, blob in self.blobs.items():
            if blob.shape == old[name][0]:
                self.backend.copy(old[name][1], blob.data)

    # --- running -------------------------------------------------------------------------------------------------------

    def forward(self, start: int = 0, end: int | None = None) -> None:
        """Runs layers start..end-1 forward (all by default)."""
        self._refresh()
        if start == 0:
            self._start_positions = {layer.name: layer.source.position for layer in self.data_layers}
        for step in self.steps[start:end]:
            if not step.node.forward_fused:
                self.forward_step(step)

    def forward_range(self, first: int, last: int, hook: Callable[[str, bool], None] | None = None) -> None:
        """Runs layers first..last (both included); hook(layer name, done) is called before and after each."""
        if hook is None:
            return self.forward(first, last + 1)
        self._refresh()
        for step in self.steps[first : last + 1]:
            hook(step.layer.name, False)
            self.forward_step(step)
            hook(step.layer.name, True)

    def forward_step(self, step: Step) -> None:
        """Runs one layer forward; an error gains the layer's name."""
        try:
            step.layer.forward(self.backend, step.bottoms, step.tops)
        except CaffeliteError as error:
            error.layer = error.layer or step.layer.name
            raise

    def backward(self, start: int | None = None, end: int = 0) -> None:
        """Runs backward from layer `start` (the last by default) down to layer `end`, skipping layers that need none."""
        first = len(self.steps) - 1 if start is None else start
        for step in reversed(self.steps[end : first + 1]):
            if step.node.needs_backward:
                self.backward_step(step)

    def backward_range(self, first: int, last: int, hook: Callable[[str, bool], None] | None = None) -> None:
        """Runs backward from layer `first` down to `last` (both included); hook as in forward_range."""
        if hook is None:
            return self.backward(first, last)
        for step in reversed(self.steps[last : first + 1]):
            if step.node.needs_backward:
                hook(step.layer.name, False)
                self.backward_step(step)
                hook(step.layer.name, True)

    def backward_step(self, step: Step) -> None:
        """Runs one layer backward."""
        layer = step.layer
        kept = layer.buffers
        if step.backward_buffers:
            layer.buffers = {**kept, **step.backward_buffers}
        for param, learn in zip(layer.params, step.node.learn):
            param.learn = learn
            param.accumulate = (param.owner or param).accumulate
        layer.backward(self.backend, step.tops, step.node.propagate_down, step.bottoms)
        layer.buffers = kept
        for param in layer.params:
            if param.learn:
                (param.owner or param).accumulate = param.accumulate = True

    def zero_grads(self) -> None:
        """Starts a new sum of parameter gradients."""
        self.arena.zero_grads()

    def parameters_changed(self) -> None:
        """To be called after master values changed: the compute-type copies are made anew at the next forward."""
        self.arena.dirty = True

    def _refresh(self) -> None:
        for arena in (self.arena, self._shared_arena):
            if arena is not None:
                arena.refresh()

    def loss(self) -> float:
        """The weighted sum of all loss tops of the last forward."""
        return float(sum(w * np.sum(self.backend.to_host(top.data), dtype=np.float64) for top, w in self.weighted_tops()))

    def weighted_tops(self) -> Iterator[tuple[Blob, float]]:
        """Every top with a loss weight other than 0, with the weight."""
        for step in self.steps:
            yield from ((top, w) for top, w in zip(step.tops, step.node.loss_weights) if w)

    def loss_weight(self, blob: str) -> float:
        """The loss weight of a blob, 0 for one without."""
        return next((w for top, w in self.weighted_tops() if top.name == blob), 0.0)

    def output_values(self) -> dict[str, np.ndarray]:
        """Net outputs of the last forward by name, in Caffe's order, as float32 arrays."""
        return {name: self.backend.to_host(self.blobs[name].data) for name in self.outputs}

    @property
    def learnable(self) -> list[Param]:
        """The owning parameters, in Caffe's order."""
        return self.arena.params

    @property
    def batch_size(self) -> int:
        """Items per forward pass: axis 0 of the first data layer's or input's first top, 1 without one."""
        for step in self.steps:
            if step.layer.is_source and step.tops and step.tops[0].shape:
                return step.tops[0].shape[0]
        return 1

    def first_nonfinite(self) -> str | None:
        """Repeats the last forward layer by layer; says which layer first had a parameter or a top with NaN or infinity."""
        for layer in self.data_layers:
            layer.source.seek(self._start_positions[layer.name])
        for step in self.steps:
            for index, param in enumerate(step.layer.params):
                if not self.backend.all_finite(param.master):
                    return f"layer '{step.layer.name}' ({step.layer.type}): its parameter {index} is not finite"
            if not step.node.forward_fused:
                self.forward_step(step)
            for top in step.tops:
                if not self.backend.all_finite(top.data):
                    return f"layer '{step.layer.name}' ({step.layer.type}): its top '{top.name}' is not finite"
        return None

    # --- weights -------------------------------------------------------------------------------------------------------

    def copy_from(self, source: str | Path | pb.NetParameter) -> None:
        """Copies weights by layer name from a .caffemodel or HDF5 file, a comma-separated list of them, or a message."""
        if isinstance(source, pb.NetParameter):
            copy_weights(source, self, "the given message")
        else:
            for path in (part.strip() for part in str(source).split(",")):
                copy_weights(read_weights(path), self, path)
        self.parameters_changed()

    def share_with(self, other: Net) -> None:
        """Uses `other`'s parameter values from now on, layer by layer by name; layers it does not have keep their own."""
        for node in self.graph.nodes:
            if node.params and node.name in other.params:
                theirs = other.params[node.name]
                _check_borrowed(node, theirs)
                for mine, param in zip(node.layer.params, theirs):
                    mine.master, mine.data = param.master, param.data
        self._shared_arena = other.arena

    def to_proto(self, diff: bool = False) -> pb.NetParameter:
        """The running net with its weights (and diffs), as Caffe's .caffemodel holds it."""
        return net_to_proto(self, diff)

    def save(self, path: str | Path, diff: bool = False) -> None:
        """Writes to_proto as a .caffemodel, atomically (HDF5 for a name ending in .h5)."""
        write_weights(self, Path(path), diff)

    def close(self) -> None:
        """Ends the data layers' threads and closes their files."""
        for layer in self.layers:
            layer.close()


def _check_borrowed(node: Node, params: Sequence[Param]) -> None:
    mine, theirs = [info.spec.shape for info in node.params], [param.shape for param in params]
    if mine != theirs:
        raise SnapshotError(f"shares the parameters of the layer of the same name, but shapes differ: {mine} here, {theirs} there", layer=node.name)


def _other_shape(param: Param, info: ParamInfo) -> Param:
    """A view of a shared parameter in another shape of the same count (share_mode: PERMISSIVE)."""
    if not (_c_order(param.shape) and _c_order(info.spec.shape)):
        raise info.node.layer.fail(
            f"cannot use parameter '{param.name}' of shape {param.shape} as {info.spec.shape}", "param", info.index, hint="give both layers one shape"
        )
    data, diff, master = (a if a is None else a.reshape(info.spec.shape) for a in (param.data, param.diff, param.master))
    return Param(param.name, info.spec.shape, param.dtype, data, diff, param.lr_mult, param.decay_mult, master=master, owner=param)


def _c_order(shape: Shape) -> bool:
    """Whether a blob of this shape lies in memory in C order (see strides_of)."""
    return len(shape) != 4 or shape[1] == 1 or shape[2] * shape[3] == 1
