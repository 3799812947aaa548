"""NetParameter x NetState -> Graph: which layers run, how blobs connect them, who needs backward, who shares parameters.

Everything here works on names and shapes; no array is made. memory.py places the arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod

from caffelite.blob import Shape
from caffelite.errors import SpecError
from caffelite.fillers import check_filler
from caffelite.layer import Layer, ParamSpec, create_layer, layer_class
from caffelite.legality import check_legality
from caffelite.schema import NetSpec, SourceMap, pb
from caffelite.splits import LayerEntry, insert_splits


@dataclass(eq=False)
class BlobInfo:
    """A blob of the graph. An in-place layer's top is the same BlobInfo as its bottom, and joins `writers`."""

    name: str
    shape: Shape
    dtype: str
    writers: list[Node] = field(default_factory=list, repr=False)  # not printed: they would print the rest of the graph, by every path
    readers: list[Node] = field(default_factory=list, repr=False)
    data_of: BlobInfo | None = None  # lies in another blob's memory (a Split's tops)
    diff_of: BlobInfo | None = None  # its gradient lies where another blob's does
    data_start: int = 0  # elements of `data_of` before it
    diff_start: int = 0  # elements of `diff_of`'s gradient before its own
    data_gaps: bool = False  # it is channels of `data_of`, whose others lie between its pixels
    diff_gaps: bool = False  # its gradient lies so in that of `diff_of`
    persistent: bool = False  # keeps its contents between iterations
    absent: bool = False  # lies nowhere: a fused op makes and uses it on its way
    called: str = ""  # the file's name for it, where a fusion has set it apart under one of its own

    @property
    def data_root(self) -> BlobInfo:
        """The blob whose memory holds this blob's data."""
        return self.data_of.data_root if self.data_of else self

    @property
    def data_offset(self) -> int:
        """Elements of the data_root's data before this blob's."""
        return self.data_start + (self.data_of.data_offset if self.data_of else 0)

    @property
    def diff_root(self) -> BlobInfo:
        """The blob whose memory holds this blob's gradient."""
        return self.diff_of.diff_root if self.diff_of else self

    @property
    def diff_offset(self) -> int:
        """Elements of the diff_root's gradient before this blob's."""
        return self.diff_start + (self.diff_of.diff_offset if self.diff_of else 0)

    @property
    def label(self) -> str:
        """The name that the file gives it."""
        return self.called or self.name


@dataclass(eq=False)
class ParamInfo:
    """A parameter blob of one node; `owner` is itself, or the first user of the same share name."""

    node: Node = field(repr=False)
    index: int
    spec: ParamSpec
    share_name: str
    lr_mult: float
    decay_mult: float
    explicit_lr: bool
    explicit_decay: bool
    owner: ParamInfo = None  # type: ignore[assignment]  # set right after construction

    @property
    def label(self) -> str:
        return f"{self.node.name}/{self.index}"


@dataclass(eq=False)
class Node:
    """One layer in its place."""

    layer: Layer
    where: SourceMap
    bottoms: list[BlobInfo] = field(default_factory=list)
    tops: list[BlobInfo] = field(default_factory=list)
    loss_weights: list[float] = field(default_factory=list)  # one per top
    params: list[ParamInfo] = field(default_factory=list)
    needs_backward: bool = False
    propagate_down: list[bool] = field(default_factory=list)
    learn: list[bool] = field(default_factory=list)  # one per parameter: backward computes its gradient
    forward_fused: bool = False  # an earlier node's op already does this node's forward
    backward_fused: bool = False  # a later or an earlier node's op already does this node's backward
    absorbed: list[Node] = field(default_factory=list)  # nodes whose parameters this node's backward gives gradients

    @property
    def name(self) -> str:
        return self.layer.name

    @property
    def runs_backward(self) -> bool:
        """Whether the node has a backward step of its own."""
        return self.needs_backward and not self.backward_fused

    def written_in_place(self, index: int = 0) -> bool:
        """Whether the file has one name for top `index` and bottom `index`."""
        return index < len(self.bottoms) and index < len(self.tops) and self.bottoms[index].label == self.tops[index].label

    def in_place(self, index: int = 0) -> bool:
        """Whether top `index` is bottom `index`."""
        return index < len(self.bottoms) and index < len(self.tops) and self.bottoms[index] is self.tops[index]


@dataclass
class Graph:
    """The layers in order of execution and everything known before allocation."""

    name: str
    phase: int
    nodes: list[Node]
    blobs: dict[str, BlobInfo]
    inputs: list[str]
    outputs: list[str]  # blobs nobody consumes, in byte order of their names, as Caffe numbers them
    file: str

    @property
    def owners(self) -> list[ParamInfo]:
        """Parameters that own their memory, in order of appearance: Caffe's learnable parameters."""
        return [p for node in self.nodes for p in node.params if p.owner is p]

    @property
    def has_backward(self) -> bool:
        return any(node.needs_backward for node in self.nodes)


def build_graph(
    spec: NetSpec,
    *,
    phase: int,
    level: int = 0,
    stages: Sequence[str] = (),
    compute: str = "float32",
    prepare: Callable[[Layer], object] = lambda layer: None,
) -> Graph:
    """The graph of `spec` in the state {phase, level, stages}. Raises SpecError, and DataError for a database that cannot be read.

    compute: the activation dtype. prepare: called with each layer before it is asked for shapes.
    """
    state = pb.NetState(phase=phase, level=level, stage=[*spec.param.state.stage, *stages])  # type: ignore[arg-type]
    entries = insert_splits(select_layers(spec, state))
    if not entries:
        raise SpecError(f"no layer is left in phase {pb.Phase.Name(state.phase)}", where=spec.where.at(), hint="check the layers' include and exclude rules")
    _check_names(entries)
    graph = Graph(spec.param.name, phase, [], {}, [], [], spec.file)
    for param, where in entries:
        _append_node(graph, param, where, compute, prepare)
    _link_parameters(graph)
    consumed = {id(b) for node in graph.nodes for i, b in enumerate(node.bottoms) if not node.in_place(i)}
    graph.outputs = sorted((n for n, b in graph.blobs.items() if id(b) not in consumed and not n.startswith(AUTOMATIC)), key=lambda n: n.encode())
    graph.inputs = [t.name for node in graph.nodes if node.layer.type == "Input" for t in node.tops]
    _mark_backward(graph, force=spec.param.force_backward)
    check_legality(graph)
    for name in graph.outputs:
        graph.blobs[name].data_root.persistent = True
    for node in graph.nodes:
        for top, weight in zip(node.tops, node.loss_weights):
            if weight:  # the loss is added up after the whole pass
                top.data_root.persistent = True
    return graph


# --- selection -----------------------------------------------------------------------------------------------------


def select_layers(spec: NetSpec, state: pb.NetState) -> list[LayerEntry]:
    """The layers whose include/exclude rules the state meets (2.1), each with its own phase filled in."""
    chosen = []
    for index, original in enumerate(spec.param.layer):
        where = spec.where.child("layer", index)
        if original.include and original.exclude:
            raise SpecError("a layer has both include and exclude rules", where=where.at("exclude"), layer=original.name, hint="keep one of the two")
        kept = any(_met(rule, state) for rule in original.include) if original.include else not any(_met(rule, state) for rule in original.exclude)
        if kept:
            param = pb.LayerParameter()
            param.CopyFrom(original)
            if not param.HasField("phase"):
                param.phase = state.phase
            chosen.append((param, where))
    return chosen


def _met(rule: pb.NetStateRule, state: pb.NetState) -> bool:
    return (
        (not rule.HasField("phase") or rule.phase == state.phase)
        and (not rule.HasField("min_level") or state.level >= rule.min_level)
        and (not rule.HasField("max_level") or state.level <= rule.max_level)
        and all(stage in state.stage for stage in rule.stage)
        and not any(stage in state.stage for stage in rule.not_stage)
    )


def _check_names(entries: Sequence[LayerEntry]) -> None:
    seen: dict[str, SourceMap] = {}
    for param, where in entries:
        if param.name in seen:
            first, called = seen[param.name].at("name"), f"named '{param.name}'" if param.name else "without a name"
            raise SpecError(
                f"a second layer {called} in the same phase{f'; the first is at {first}' if first else ''}",
                where=where.at("name"),
                hint="weights are found by layer name: give each layer its own",
            )
        seen[param.name] = where


# --- wiring --------------------------------------------------------------------------------------------------------

AUTOMATIC = "(automatic)"  # Caffe's name for the top of a loss layer that names none


def _append_node(graph: Graph, param: pb.LayerParameter, where: SourceMap, compute: str, prepare: Callable[[Layer], object]) -> None:
    if layer_class(param, where).is_loss and not param.top:
        count = sum(name.startswith(AUTOMATIC) for name in graph.blobs)
        param.top.append(f"{AUTOMATIC}_{count}" if count else AUTOMATIC)
    layer = create_layer(param, param.phase, where)
    prepare(layer)
    node = Node(layer, where, [graph.blobs[name] for name in param.bottom])
    if len(param.propagate_down) not in (0, len(param.bottom)):
        raise layer.fail(
            f"propagate_down has {len(param.propagate_down)} entries for {len(param.bottom)} bottom(s)", "propagate_down", hint="give one per bottom, or none"
        )
    shapes = layer.infer_shapes([b.shape for b in node.bottoms])
    dtypes = layer.top_dtypes([b.dtype for b in node.bottoms], compute)
    for j, name in enumerate(param.top):
        node.tops.append(_top_blob(graph, node, j, name, shapes[j], dtypes[j]))
    for i, bottom in enumerate(node.bottoms):
        if not node.in_place(i):
            bottom.readers.append(node)
    for top in node.tops:
        top.writers.append(node)
    node.loss_weights = _loss_weights(layer)
    node.params = _node_params(node)
    graph.nodes.append(node)


def _top_blob(graph: Graph, node: Node, j: int, name: str, shape: Shape, dtype: str) -> BlobInfo:
    layer = node.layer
    if name in graph.blobs:
        blob = graph.blobs[name]
        if j >= len(node.bottoms) or node.bottoms[j] is not blob:
            raise layer.fail(
                f"top '{name}' is already produced by layer '{blob.writers[0].name}'",
                "top",
                j,
                hint="rename it; only bottom and top of the same index may share a name",
            )
        if shape != blob.shape or dtype != blob.dtype:
            raise layer.fail(f"cannot work in place: it turns shape {blob.shape} into {shape}", "top", j, hint="give the top a name of its own")
        return blob
    blob = BlobInfo(name, shape, dtype, persistent=layer.persistent_tops)
    if layer.shares_data:
        blob.data_of = node.bottoms[0]
    graph.blobs[name] = blob
    return blob


def _loss_weights(layer: Layer) -> list[float]:
    given, tops = list(layer.param.loss_weight), len(layer.param.top)
    if given and len(given) != tops:
        raise layer.fail(f"{len(given)} loss_weight value(s) for {tops} top(s)", "loss_weight", hint="give one per top, or none")
    return given or [1.0 if layer.is_loss and j == 0 else 0.0 for j in range(tops)]


def _node_params(node: Node) -> list[ParamInfo]:
    layer, specs = node.layer, node.layer.param_specs([b.shape for b in node.bottoms])
    given = layer.param.param
    if len(given) > len(specs):
        raise layer.fail(
            f"{len(given)} param entries, but {layer.type} has {len(specs)} parameter blob(s) here", "param", len(specs), hint="remove the extra ones"
        )
    infos = []
    for i, spec in enumerate(specs):
        if i >= len(layer.param.blobs):
            check_filler(spec.filler, spec.shape, partial(_fail_at, layer, spec.path))
        entry = given[i] if i < len(given) else pb.ParamSpec()
        lr = entry.lr_mult if spec.learned else 0.0
        info = ParamInfo(node, i, spec, entry.name, lr, entry.decay_mult, entry.HasField("lr_mult"), entry.HasField("decay_mult"))
        info.owner = info
        infos.append(info)
    return infos


def _fail_at(layer: Layer, path: tuple[str, ...], message: str) -> SpecError:
    return layer.fail(message, *path)


def _link_parameters(graph: Graph) -> None:
    """Parameters of one share name have one owner, whose explicit multipliers rule (2.5)."""
    named: dict[str, ParamInfo] = {}
    for info in [p for node in graph.nodes for p in node.params if p.share_name]:
        owner = named.setdefault(info.share_name, info)
        if owner is info:
            continue
        info.owner = owner
        _check_shared_shape(info, owner)
        for what in ("lr", "decay"):
            mine, theirs = getattr(info, f"{what}_mult"), getattr(owner, f"{what}_mult")
            if getattr(info, f"explicit_{what}"):
                if not getattr(owner, f"explicit_{what}"):
                    setattr(owner, f"{what}_mult", mine)
                    setattr(owner, f"explicit_{what}", True)
                elif mine != theirs:
                    raise info.node.layer.fail(
                        f"parameter '{info.share_name}' has {what}_mult {mine:g} here and {theirs:g} in layer '{owner.node.name}'",
                        "param",
                        info.index,
                        f"{what}_mult",
                        hint="write it once",
                    )


def _check_shared_shape(info: ParamInfo, owner: ParamInfo) -> None:
    permissive = info.node.layer.param.param[info.index].share_mode == pb.ParamSpec.PERMISSIVE
    mine, theirs = info.spec.shape, owner.spec.shape
    if mine == theirs:
        return
    if not permissive or prod(mine) != prod(theirs):
        raise info.node.layer.fail(
            f"shares parameter '{info.share_name}' with layer '{owner.node.name}', but the shapes are {mine} and {theirs}",
            "param",
            info.index,
            hint="equal counts are needed" if permissive else "equal shapes are needed; with share_mode: PERMISSIVE equal counts are enough",
        )


# --- backward ------------------------------------------------------------------------------------------------------


def _mark_backward(graph: Graph, *, force: bool) -> None:
    """Which layers and which bottoms take part in backward (2.4)."""
    blob_needs: dict[int, bool] = {}
    for node in graph.nodes:
        node.learn = [p.spec.learned and p.owner.lr_mult != 0 for p in node.params]
        needs = [blob_needs.get(id(b), False) for b in node.bottoms]
        given = list(node.layer.param.propagate_down)
        node.propagate_down = given or needs
        node.needs_backward = any(needs) or any(node.learn)
        blob_needs.update({id(top): node.needs_backward for top in node.tops})
    _prune(graph)
    if force:
        for node in graph.nodes:
            cls = type(node.layer)
            reachable = [cls.differentiable is None or i in cls.differentiable for i in range(len(node.bottoms))]
            node.needs_backward = not cls.is_source and (any(reachable) or bool(node.params)) and cls.differentiable != ()
            node.propagate_down = [flag or (r and i not in cls.no_force) for i, (flag, r) in enumerate(zip(node.propagate_down, reachable))]
            node.learn = [p.spec.learned for p in node.params]


def _prune(graph: Graph) -> None:
    under_loss: set[str] = set()
    skip: set[str] = set()
    for node in reversed(graph.nodes):
        contributes = any(w or top.name in under_loss for top, w in zip(node.tops, node.loss_weights))
        if node.needs_backward and all(top.name in skip for top in node.tops):
            node.needs_backward, node.propagate_down = False, [False] * len(node.bottoms)
        node.needs_backward &= contributes
        for i, bottom in enumerate(node.bottoms):
            if contributes:
                under_loss.add(bottom.name)
            else:
                node.propagate_down[i] = False
            if not node.propagate_down[i]:
                skip.add(bottom.name)
