"""Net: a graph on a backend: arrays, running, loading and saving."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from caffelite.backends.contract import Array, Backend, same_order
from caffelite.blob import Blob, Param, Shape
from caffelite.errors import CaffeliteError, LabelError, SpecError
from caffelite.fusion import fuse
from caffelite.graph import Graph, Node, ParamInfo, build_graph
from caffelite.layer import Layer, RunContext
from caffelite.layers.data import DataLayer
from caffelite.memory import ITEM_BYTES, MemoryPlan, plan_memory
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
    backward_buffers: dict[str, Array] = field(default_factory=dict)  # what layer.buffers is during backward
    repeats: bool = False  # a parameter blob serves twice in this layer


@dataclass
class Hooks:
    """Functions called with a layer's number around its forward and its backward step."""

    before_forward: list[Callable[[int], object]] = field(default_factory=list)
    after_forward: list[Callable[[int], object]] = field(default_factory=list)
    before_backward: list[Callable[[int], object]] = field(default_factory=list)
    after_backward: list[Callable[[int], object]] = field(default_factory=list)


class Net:
    """A net in one phase.

    spec: the net as read. backend: where it runs. precision: "float32", "tf32" or "bfloat16". observe: every blob keeps memory of
    its own and no layer is fused, so that any blob can be read and written between calls (pycaffe). seed: of fillers and of
    every random layer. share: a net whose parameter values (by layer name) this one uses as its own; workspace: a net whose
    arena of passing values this one may use too, when the two never run at the same time. `hooks`: see Hooks.
    prepare: given for a net that is only to be measured: called with each layer before it is asked for shapes; no parameter gets a value.
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
        prepare: Callable[[Layer], object] | None = None,
    ) -> None:
        self.spec, self.phase, self.backend, self.precision, self.observe, self.seed = spec, phase, backend, precision, observe, seed
        self.compute = "bfloat16" if precision == "bfloat16" else "float32"
        self.context = RunContext(seed, pass_number=backend.empty((1,), "float64"), tf32=precision == "tf32")
        self._run: Callable[[], None] | None = None  # forward_again's, and what it holds for good: the seed, arrays
        self._run_holds: tuple[int, list[Array]] = (0, [])
        self.hooks = Hooks()
        self.graph: Graph = build_graph(spec, phase=phase, level=level, stages=stages, compute=self.compute, prepare=prepare or _nothing)
        self.has_backward = self.graph.has_backward and (observe or phase == pb.TRAIN)
        if not observe:
            fuse(self.graph, backend)
        self.name = self.graph.name
        self.layers = [node.layer for node in self.graph.nodes]
        self.layer_names = [layer.name for layer in self.layers]
        self.inputs, self.outputs = self.graph.inputs, self.graph.outputs
        self.data_layers = [layer for layer in self.layers if isinstance(layer, DataLayer)]
        self.blobs = {name: Blob(name, info.shape, info.dtype) for name, info in self.graph.blobs.items()}
        self.steps = [Step(n, n.layer, [self.blobs[b.name] for b in n.bottoms], [self.blobs[t.name] for t in n.tops]) for n in self.graph.nodes]
        self.prepare = prepare
        self._start_positions: dict[str, int] = {}
        self.borrows = False  # share_with was called: values lie in another net's arena
        try:
            self._make_params(share)
            self._place(workspace)
        except BaseException:
            self.close()
            raise

    # --- set-up --------------------------------------------------------------------------------------------------------

    def _make_params(self, share: Net | None) -> None:
        # A net that runs backward needs gradients of its own, so it makes all its parameters and shares values alone.
        lender = None if self.has_backward else share
        borrowed = lender.params if lender else {}
        own = [info for info in self.graph.owners if info.node.name not in borrowed]
        self.arena = ParamArena(self.backend, own, compute=self.compute, gradients=self.has_backward)
        self._arenas: list[ParamArena] = [self.arena, *(lender._arenas if lender else [])]
        for info in own if self.prepare is None else ():
            self.backend.from_host(initial_values(info, self.seed), self.arena.find(info).master)
        for step in self.steps:
            node, layer = step.node, step.layer
            layer.context = self.context
            if node.params and node.name in borrowed:
                _check_borrowed(node, borrowed[node.name])
                layer.params = borrowed[node.name]
            else:
                layer.params = [self._param_of(info, borrowed) for info in node.params]
            step.repeats = len({id(info.owner) for info in node.params}) < len(node.params)
        self.params: dict[str, list[Param]] = {node.name: node.layer.params for node in self.graph.nodes if node.params}
        self.copied: set[str] = set()  # the layers that copy_from has found weights for
        if share and not lender:
            self.share_with(share)

    def _param_of(self, info: ParamInfo, borrowed: dict[str, list[Param]]) -> Param:
        owner = info.owner
        param = borrowed[owner.node.name][owner.index] if owner.node.name in borrowed else self.arena.find(owner)
        return param if param.shape == info.spec.shape else _other_shape(param, info)

    def _place(self, workspace: Net | None) -> None:
        self.memory: MemoryPlan = plan_memory(self.graph, self.backend, backward=self.has_backward, reuse=not self.observe)
        lent = workspace.shared_buffer if workspace and workspace.memory.shared_bytes >= self.memory.shared_bytes else None
        self.shared_buffer: Array = self.backend.allocate(self.memory.shared_bytes) if lent is None else lent
        self.persistent_buffer = self.backend.allocate(self.memory.persistent_bytes)
        for name, info in self.graph.blobs.items():
            blob = self.blobs[name]
            blob.data = self._array(("data", info.data_root.name), info.shape, info.data_offset)
            blob.diff = self._array(("diff", info.diff_root.name), info.shape, info.diff_offset)
        self._bind_buffers()
        for blob, weight in self.weighted_tops():
            if blob.diff is not None:
                self.backend.fill(blob.diff, weight)

    def _array(self, key: tuple[str, ...], shape: Shape | None = None, start: int = 0) -> Array:
        """The region named by `key`, or what of it begins `start` elements on and has another shape; None where there is no such region."""
        region = self.memory.by_key.get(key)
        if region is None:
            return None
        buffer = self.persistent_buffer if region.persistent else self.shared_buffer
        return self.backend.view(buffer, region.offset + start * ITEM_BYTES[region.dtype], region.shape if shape is None else shape, region.dtype)

    def _bind_buffers(self) -> None:
        forward: dict[str, dict[str, Array]] = {name: {} for name in self.layer_names}
        backward: dict[str, dict[str, Array]] = {name: {} for name in self.layer_names}
        for part, owner, *name in self.memory.by_key:
            if name:
                (forward if part == "buffer" else backward)[owner][name[0]] = self._array((part, owner, *name))
        for step in self.steps:
            step.layer.buffers = forward[step.layer.name]
            step.backward_buffers = {**step.layer.buffers, **backward[step.layer.name]}

    # --- input shapes; only for observe=True ------------------------------------------------------------------------------

    def resize_input(self, name: str, shape: Shape) -> None:
        """Gives a net input another shape, filled with zeros; `reshape` brings the rest of the net after it. SpecError for any other blob."""
        if name not in self.inputs:
            hint = f"inputs: {', '.join(self.inputs) or 'none'}"
            raise SpecError("only a net input can be reshaped: other shapes follow from the inputs", blob=name, hint=hint)
        if any(size < 1 for size in shape):
            raise SpecError(f"shape {shape} has a size below 1", blob=name, hint="give sizes of 1 or more")
        blob = self.blobs[name]
        if shape != blob.shape:
            blob.shape, blob.data = shape, self.backend.empty(shape, blob.dtype)
            blob.diff = None if blob.diff is None else self.backend.empty(shape, blob.dtype)

    def reshape(self) -> None:
        """Gives all blobs the shapes that follow from the inputs' ones; a blob of unchanged shape keeps its contents.

        SpecError when a layer cannot take its new bottoms, or a parameter would change its shape; everything but the inputs then stays as it was.
        """
        if all(self.blobs[name].shape == self.graph.blobs[name].shape for name in self.inputs):
            return
        try:
            shapes = self._shapes_from({name: self.blobs[name].shape for name in self.inputs})
        except SpecError:
            self._shapes_from({})  # a layer may note something of the shapes it is asked about
            raise
        old = {name: blob.data for name, blob in self.blobs.items() if blob.shape == shapes[name]}
        for name, shape in shapes.items():
            self.graph.blobs[name].shape = self.blobs[name].shape = shape
        self._place(None)
        for name, data in old.items():
            self.backend.copy(data, self.blobs[name].data)

    def _shapes_from(self, inputs: dict[str, Shape]) -> dict[str, Shape]:
        """The shape of every blob, given those of the inputs (as they are, for those left out)."""
        shapes: dict[str, Shape] = {}
        for node in self.graph.nodes:
            bottoms = [shapes[b.name] for b in node.bottoms]
            tops = [inputs.get(t.name, t.shape) for t in node.tops] if node.layer.is_source else node.layer.infer_shapes(bottoms)
            specs = [spec.shape for spec in node.layer.param_specs(bottoms)]
            if specs != [info.spec.shape for info in node.params]:
                raise node.layer.fail(f"its parameters would change shape to {specs}", hint="make a new net for these input shapes")
            shapes.update((top.name, tuple(shape)) for top, shape in zip(node.tops, tops))
        return shapes

    # --- running -------------------------------------------------------------------------------------------------------

    def forward(self, start: int = 0, end: int | None = None) -> None:
        """Runs layers start..end-1 forward (all by default). A CaffeliteError gains the layer's name."""
        if self.observe:
            self.reshape()
        self.feed(start, end)
        self.forward_fed(start, end)

    def feed(self, start: int = 0, end: int | None = None) -> None:
        """What the host has to do for a forward pass through these layers: counting it, reading data, drawing numbers."""
        if start == 0:
            self._start_positions = {layer.name: layer.source.position for layer in self.data_layers}
        self._count()
        for step in (step for step in self.steps[start:end] if step.layer.is_source):
            with self._named(step):
                step.layer.feed(self.backend, step.tops)

    def forward_fed(self, start: int = 0, end: int | None = None) -> None:
        """The ops of a forward pass, always the same ones; `feed` comes before."""
        self.refresh()
        for index in range(start, len(self.steps) if end is None else end):
            step = self.steps[index]
            for hook in self.hooks.before_forward:
                hook(index)
            if not step.node.forward_fused:
                with self._named(step):
                    step.layer.forward(self.backend, step.bottoms, step.tops)
            for hook in self.hooks.after_forward:
                hook(index)

    def _count(self) -> None:
        self.backend.assign(self.context.pass_number, [self.context.forward_count])

    @contextmanager
    def _named(self, step: Step) -> Iterator[None]:
        """An error gains the layer's name; one about a label gains the record's where it comes straight from a Data layer."""
        try:
            yield
        except CaffeliteError as error:
            error.layer = error.layer or step.layer.name
            if isinstance(error, LabelError) and (record := self._record_of(step.node.bottoms[1].name, error.position)):
                error.message += f" ({record})"
            raise

    def _record_of(self, label: str, index: int) -> str | None:
        makers = {top.name: step for step in self.steps for top in step.node.tops}
        maker = makers.get(label)
        while maker is not None and maker.layer.type == "Split":
            maker = makers.get(maker.node.bottoms[0].name)
        return next((layer.source.record_of_batch(index) for layer in self.data_layers if maker is not None and layer is maker.layer), None)

    def forward_step(self, step: Step) -> None:
        """One layer of a forward pass that has been counted, fed and run at once."""
        with self._named(step):
            step.layer.feed(self.backend, step.tops)
            step.layer.forward(self.backend, step.bottoms, step.tops)

    def forward_again(self) -> None:
        """As forward(), for a net that is run many times: a backend may record its ops and play them back.

        A label out of range shows itself as a NaN then; `recheck` raises the DataError."""
        self.feed()
        holds = self.context.seed, [self.context.skip, *(param.data for params in self.params.values() for param in params)]
        if self._run is None or self._run_holds[0] != holds[0] or any(a is not b for a, b in zip(self._run_holds[1], holds[1])):
            self._run, self._run_holds = self.repeatable(self.forward_fed), holds
        self.refresh()
        self._run()

    def repeatable(self, run: Callable[[], None]) -> Callable[[], None]:
        """As Backend.repeatable, as long as nobody watches this net layer by layer."""
        recorded = self.backend.repeatable(run)
        return lambda: run() if self.observe or self.hooks != Hooks() else recorded()

    def rewind(self) -> None:
        """Takes the data layers back to the batch of the last forward pass from layer 0."""
        for layer in self.data_layers:
            layer.source.seek(self._start_positions[layer.name])

    def recheck(self) -> None:
        """Repeats the last forward pass, op by op. DataError where its data is bad."""
        self.rewind()
        with self._statistics_kept():
            self.forward()

    @contextmanager
    def _statistics_kept(self) -> Iterator[None]:
        """For passes that look for a fault, and are not to count as passes."""
        held = [(param, self.backend.to_host(param.master)) for layer in self.layers for param in layer.statistics()]
        try:
            yield
        finally:
            for param, values in held:
                self.backend.from_host(values, param.master)

    def backward(self, start: int | None = None, end: int = 0) -> None:
        """Runs backward from layer `start` (the last by default) down to layer `end`, both included, skipping layers that need none.

        A part of the net is a net made with observe=True: elsewhere another layer's step may do what this one's would, and
        gradients that are not needed any more lie under others."""
        for index in range(len(self.steps) - 1 if start is None else start, end - 1, -1):
            for hook in self.hooks.before_backward:
                hook(index)
            if self.steps[index].node.runs_backward:
                self.backward_step(self.steps[index])
            for hook in self.hooks.after_backward:
                hook(index)

    def backward_step(self, step: Step) -> None:
        """Runs one layer backward."""
        layer = step.layer
        if step.repeats:
            self.arena.settle_grads()  # its first share of the gradient must not be overwritten by the second
        learned = [(param, learn) for node in (step.node, *step.node.absorbed) for param, learn in zip(node.layer.params, node.learn)]
        for param, learn in learned:
            param.learn = learn
            param.accumulate = (param.owner or param).accumulate
        forward_buffers, layer.buffers = layer.buffers, step.backward_buffers
        try:
            layer.backward(self.backend, step.tops, step.node.propagate_down, step.bottoms)
        finally:
            layer.buffers = forward_buffers
        for param, learn in learned:
            if learn:
                (param.owner or param).accumulate = param.accumulate = True

    def zero_grads(self) -> None:
        """Starts a new sum of parameter gradients."""
        self.arena.zero_grads()

    def parameters_changed(self) -> None:
        """To be called after master values changed: the compute-type copies are made anew at the next forward."""
        for arena in self._arenas:
            arena.dirty = True

    def refresh(self) -> None:
        """Brings the compute-type copies of all parameters up to date; forward does so by itself."""
        for arena in self._arenas:
            arena.refresh()

    def add_loss(self, total: Array, *, accumulate: bool) -> None:
        """total, a cell, (+)= the weighted sum of all loss tops of the last forward."""
        for top, weight in self.weighted_tops():
            self.backend.add_sum(top.data, total, factor=weight, accumulate=accumulate)
            accumulate = True

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
        """Runs forward layer by layer; says which layer first had a parameter or a top with NaN or infinity. Changes no statistics."""
        with self._statistics_kept():
            return self._first_nonfinite()

    def _first_nonfinite(self) -> str | None:
        self._count()
        for step in self.steps:
            written = step.layer.statistics()  # by earlier passes: what is wrong in them is wrong elsewhere in this one too, or does not matter
            for index, param in enumerate(step.layer.params):
                if all(param is not other for other in written) and not self.backend.all_finite(param.master):
                    return f"layer '{step.layer.name}' ({step.layer.type}): its parameter {index} is not finite"
            if not step.node.forward_fused:
                self.forward_step(step)
            for top, info in zip(step.tops, step.node.tops):
                if not info.absent and not self.backend.all_finite(top.data):
                    return f"layer '{step.layer.name}' ({step.layer.type}): its top '{info.label}' is not finite"
        return None

    # --- weights -------------------------------------------------------------------------------------------------------

    def copy_from(self, source: str | Path | pb.NetParameter) -> list[str]:
        """Copies weights by layer name; returns the names of the source's layers that this net does not have.

        source: a .caffemodel or HDF5 file; a text may name several, separated by commas, later ones overwriting; or a message.
        SnapshotError when one cannot be read or does not fit: nothing of that one is copied then.
        """
        if isinstance(source, pb.NetParameter):
            sources = [("the given message", source)]
        else:
            paths = [source] if isinstance(source, Path) else [part.strip() for part in source.split(",")]
            sources = [(str(path), read_weights(path)) for path in paths]
        ignored = [layer for name, message in sources for layer in copy_weights(message, self, name)]
        self.parameters_changed()
        return ignored

    def share_with(self, other: Net) -> None:
        """Uses `other`'s parameter values from now on, layer by layer by name; layers it does not have keep their own.

        SpecError, and nothing shared, when the shapes of a layer's parameters differ.
        """
        common = [node for node in self.graph.nodes if node.params and node.name in other.params]
        for node in common:
            _check_borrowed(node, other.params[node.name])
        for node in common:
            for mine, theirs in zip(node.layer.params, other.params[node.name]):
                mine.master, mine.data, mine.dtype = theirs.master, theirs.data, theirs.dtype
        self.borrows |= bool(common)
        self._arenas += [arena for arena in other._arenas if arena not in self._arenas]

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


def _nothing(layer: Layer) -> None:
    """What a net does to its layers beforehand, unless it is told to do something."""


def _check_borrowed(node: Node, params: Sequence[Param]) -> None:
    mine, theirs = [info.spec.shape for info in node.params], [param.shape for param in params]
    if mine != theirs:
        raise node.layer.fail(
            f"shares its parameters with the layer of the same name in another net, but shapes differ: {mine} here, {theirs} there",
            hint="give it another name to train it by itself, or make the layers equal",
        )


def _other_shape(param: Param, info: ParamInfo) -> Param:
    """A view of a shared parameter in another shape of the same count (share_mode: PERMISSIVE), element by element in C order as in Caffe.

    SpecError where one of the shapes lies channels last in memory, and the other not or with other channels: no view puts elements in another order.
    """
    shape = info.spec.shape
    if not same_order(param.shape, shape):
        raise info.node.layer.fail(
            f"parameter '{info.share_name}' has the shape {param.shape} in layer '{info.owner.node.name}' and {shape} here, which share_mode: PERMISSIVE "
            "allows here for weights of 1x1 or one channel, or where kernel_h and kernel_w alone differ: others lie channels last in memory",
            "param",
            info.index,
            hint="give both layers one shape, or each a parameter of its own",
        )
    data, diff, master = (a if a is None else a.reshape(shape) for a in (param.data, param.diff, param.master))
    return Param(param.name, shape, param.dtype, data, diff, param.lr_mult, param.decay_mult, master=master, owner=param)
