"""Where every array of a graph lies: how long each lives, which can share memory, how much the whole needs.

Time runs over 2n steps for n nodes: node i computes forward at i and backward at 2n-1-i. A region that is alive over
[first, last] gets bytes of the arena that no region alive at the same time uses (largest first, lowest fitting offset).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from caffelite.backends.contract import Backend
from caffelite.graph import BlobInfo, Graph, Node
from caffelite.layer import BOTTOM, SIGN, TOP, BufferSpec

ITEM_BYTES = {"float32": 4, "bfloat16": 2, "uint8": 1, "int32": 4, "float64": 8}
ALIGN = 64


@dataclass(eq=False)
class Region:
    """One array's bytes: `key` names it, [first, last] is its life; persistent regions are never shared."""

    key: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: str
    first: int
    last: int
    persistent: bool = False
    offset: int = 0

    @property
    def nbytes(self) -> int:
        return -(-max(prod(self.shape), 1) * ITEM_BYTES[self.dtype] // ALIGN) * ALIGN


@dataclass
class MemoryPlan:
    """All regions of a graph, placed. `shared_bytes` is the arena of reusable regions, `persistent_bytes` the other one."""

    regions: list[Region]
    shared_bytes: int
    persistent_bytes: int
    total_bytes: int  # the same arrays without any reuse, as Caffe keeps them
    by_key: dict[tuple[str, ...], Region] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return self.shared_bytes + self.persistent_bytes


def plan_memory(graph: Graph, backend: Backend, *, backward: bool, reuse: bool = True) -> MemoryPlan:
    """Places data, diffs (if `backward`) and layer buffers of `graph`. reuse=False gives every region bytes of its own."""
    regions = [*_blob_regions(graph, backward), *_buffer_regions(graph, backend, backward)]
    for region in regions:
        region.persistent |= not reuse
    persistent_bytes = 0
    for region in regions:
        if region.persistent:
            region.offset, persistent_bytes = persistent_bytes, persistent_bytes + region.nbytes
    shared_bytes = _place([r for r in regions if not r.persistent])
    total = sum(r.nbytes for r in regions)
    return MemoryPlan(regions, shared_bytes, persistent_bytes, total, {r.key: r for r in regions})


def _place(regions: list[Region]) -> int:
    """Offsets by size, largest first, each at the lowest gap among the regions alive at the same time. Returns the extent."""
    placed: list[Region] = []
    extent = 0
    for region in sorted(regions, key=lambda r: (-r.nbytes, r.first, r.key)):
        offset = 0
        for other in placed:  # kept sorted by offset
            if other.first <= region.last and region.first <= other.last:
                if other.offset - offset >= region.nbytes:
                    break
                offset = max(offset, other.offset + other.nbytes)
        region.offset = offset
        extent = max(extent, offset + region.nbytes)
        placed.append(region)
        placed.sort(key=lambda r: r.offset)
    return extent


def _blob_regions(graph: Graph, backward: bool) -> Iterable[Region]:
    steps = {id(node): i for i, node in enumerate(graph.nodes)}
    end = 2 * len(graph.nodes)
    lives: dict[int, list[int]] = {}
    roots: dict[int, BlobInfo] = {}
    for blob in graph.blobs.values():
        if blob.absent:
            continue
        root = blob.data_root
        roots[id(root)] = root
        lives.setdefault(id(root), []).extend(_data_uses(blob, steps, end, backward))
        if blob.persistent:
            root.persistent = True
    for key, root in roots.items():
        yield Region(("data", root.name), root.shape, root.dtype, min(lives[key]), max(lives[key]), root.persistent)
    if backward:
        yield from _diff_regions(graph, steps, end)


def _data_uses(blob: BlobInfo, steps: dict[int, int], end: int, backward: bool) -> list[int]:
    uses = [steps[id(node)] for node in [*blob.writers, *blob.readers]]
    if any(node.layer.is_source for node in blob.writers):
        uses.append(0)  # where a pass is recorded, all sources are fed before its first layer runs
    if backward:
        late = [n for n in blob.writers if n.runs_backward and n.layer.backward_reads() & {TOP, SIGN}]
        late += [n for n in blob.readers if n.runs_backward and BOTTOM in n.layer.backward_reads()]
        uses += [end - 1 - steps[id(node)] for node in late]
    return uses


def _diff_regions(graph: Graph, steps: dict[int, int], end: int) -> Iterable[Region]:
    lodgers: dict[int, list[Node]] = {}  # nodes that use a blob's gradient by way of another blob
    for blob in graph.blobs.values():
        if blob.diff_of:
            lodgers.setdefault(id(blob.diff_root), []).extend(node for node in [*blob.writers, *blob.readers] if node.needs_backward)
    for blob in graph.blobs.values():
        if blob.diff_of or blob.absent:
            continue
        writers = [node for node in blob.writers if node.needs_backward]
        givers = [node for node in blob.readers if node.needs_backward and gives(node, blob)]
        if not (weighted(blob) or writers or givers):
            continue
        times = [end - 1 - steps[id(node)] for node in [*writers, *givers, *lodgers.get(id(blob), [])]]
        unwritten = not givers
        keep = weighted(blob) or unwritten or blob.persistent  # what nobody writes stays zero, as all memory starts
        yield Region(("diff", blob.name), blob.shape, blob.dtype, min(times, default=0), max(times, default=end), keep)


def weighted(blob: BlobInfo) -> bool:
    """Whether the blob counts as a loss."""
    return any(weight for node in blob.writers for top, weight in zip(node.tops, node.loss_weights) if top is blob)


def gives(node: Node, blob: BlobInfo) -> bool:
    """Whether the node's backward is asked for the gradient of `blob`, a bottom."""
    return any(b is blob and flag for b, flag in zip(node.bottoms, node.propagate_down))


def _buffer_regions(graph: Graph, backend: Backend, backward: bool) -> Iterable[Region]:
    end = 2 * len(graph.nodes)
    for i, node in enumerate(graph.nodes):
        runs_back = node.layer.keeps = backward and node.runs_backward
        if node.forward_fused and not runs_back:
            continue
        for name, spec in buffer_specs(node, backend).items():
            for part, first, last in _buffer_lives(spec, i, end - 1 - i, runs_back):
                yield Region((part, node.name, name), spec.shape, spec.dtype, first, last)


def buffer_specs(node: Node, backend: Backend) -> dict[str, BufferSpec]:
    """The node's own buffers, as its layer asks for them."""
    return node.layer.buffer_specs([b.shape for b in node.bottoms], [b.dtype for b in node.bottoms], backend)


def _buffer_lives(spec: BufferSpec, forward: int, back: int, runs_back: bool) -> list[tuple[str, int, int]]:
    if not runs_back:
        return [("buffer", forward, forward)]
    if spec.kept:
        return [("buffer", forward, back)]
    return [("buffer", forward, forward), ("backward buffer", back, back)]
