"""Blobs that lie inside others, so that layers that bring values together or apart have nothing to copy.

A bottom of Concat lies in its top, a top of Slice in its bottom, that of Flatten or Reshape where its bottom does: wherever they are unbroken
runs of memory, or channels with gaps between their pixels which all ops that meet them take so. Gradients likewise; and that of a sum's bottom is
the top's own. A blob is laid so only where every value is still there when it is read; where one would be overwritten, the layer copies. To be
called once, after all fusions, before memory is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import prod
from typing import NamedTuple

from caffelite.backends.contract import PIECE, Backend
from caffelite.blob import Shape
from caffelite.graph import BlobInfo, Graph, Node
from caffelite.layer import BOTTOM, SIGN, TOP
from caffelite.layers.concat import Concat
from caffelite.layers.eltwise import Eltwise
from caffelite.layers.regroup import Regroup
from caffelite.layers.slice import Slice
from caffelite.memory import ALIGN, ITEM_BYTES, gives, weighted


class Edge(NamedTuple):
    """`part`, bottom or top `number` of `node`, has the values that lie in `whole`, on the node's other side, from element `start` on, and the
    same of its gradient (Eltwise: of its gradient alone): the node would copy them from one to the other. gaps: from channel `start` on."""

    node: Node
    number: int
    part: BlobInfo
    whole: BlobInfo
    start: int
    gaps: bool = False

    @property
    def fits(self) -> bool:
        """All arrays begin at the boundary that regions do: some ops take other ways, and round otherwise, where they do not. Those with gaps are
        what ops take (Backend.takes_gaps)."""
        sizes, unit = ((self.start, self.part.shape[1], self.whole.shape[1]), PIECE) if self.gaps else ((self.start,), ALIGN)
        return self.part.dtype == self.whole.dtype and all(size * ITEM_BYTES[self.part.dtype] % unit == 0 for size in sizes)


def share(graph: Graph, backend: Backend | None = None) -> None:
    """Lays blobs inside others wherever nothing is lost by it. backend: the one whose ops may take gaps; None: none does."""
    data, diffs = _Data(graph), _Diffs(graph)
    for node in graph.nodes:
        for edge in filter(lambda edge: edge.fits, _edges(node)):
            if not isinstance(node.layer, Eltwise) and _may_share_data(graph, edge, backend):
                _share_data(data, edge)
            if _may_share_diff(graph, edge, backend):
                _share_diff(diffs, edge)


def _edges(node: Node) -> list[Edge]:
    layer = node.layer
    if isinstance(layer, (Concat, Slice, Regroup)):
        joins = isinstance(layer, Concat)
        whole, parts = (node.tops[0], node.bottoms) if joins else (node.bottoms[0], node.tops)
        shapes = [b.shape for b in node.bottoms]
        runs = layer.runs(shapes)
        starts = runs if runs is not None or isinstance(layer, Regroup) else layer.starts(shapes)
        return [Edge(node, i, part, whole, start, gaps=runs is None) for i, (part, start) in enumerate(zip(parts, starts or []))]
    if isinstance(layer, Eltwise):
        return [Edge(node, i, bottom, node.tops[0], 0) for i, bottom in enumerate(node.bottoms) if layer.passes(i)]
    return []


class Place(NamedTuple):
    """Where a blob lies in its root's memory: `runs` runs of `run` elements each, from `start` on, which begin `pitch` elements apart."""

    start: int
    run: int
    runs: int
    pitch: int

    @classmethod
    def of(cls, shape: Shape, start: int, gaps_of: BlobInfo | None) -> Place:
        """gaps_of: the blob whose other channels lie between its pixels."""
        run, pitch = (prod(shape), 1) if gaps_of is None else (shape[1], gaps_of.shape[1])
        return cls(start, run, prod(shape) // run, pitch)

    def meets(self, other: Place) -> bool:
        """Whether some element is in both; said to be so of two whose gaps are different, if one begins before the other ends."""
        if self.start >= other.end or other.start >= self.end:
            return False
        column = (self.start - other.start) % self.pitch
        return self.pitch != other.pitch or self.pitch == 1 or column < other.run or column + self.run > self.pitch

    @property
    def end(self) -> int:
        return self.start + (self.runs - 1) * self.pitch + self.run


def _take_gaps(nodes: Iterable[Node], backend: Backend | None) -> bool:
    return backend is not None and all(node.layer.takes_gaps([blob.shape for blob in node.bottoms], backend) for node in nodes)


# --- data ------------------------------------------------------------------------------------------------------------------


def _may_share_data(graph: Graph, edge: Edge, backend: Backend | None) -> bool:
    """Whether the part lies nowhere else yet, and is neither to be kept after the pass nor written before it (as sources are). With gaps: whether all
    that use it take them, and nothing lies in it that may not; what has gaps itself holds nothing."""
    part = edge.part
    if part.data_of is not None or part.persistent or edge.whole.data_gaps or any(writer.layer.is_source for writer in part.writers):
        return False
    users = (node for node in (*part.writers, *part.readers) if not node.forward_fused or node.runs_backward)
    return not edge.gaps or (_take_gaps(users, backend) and all(blob.data_of is not part for blob in graph.blobs.values()))


def _share_data(data: _Data, edge: Edge) -> None:
    part, layer = edge.part, edge.node.layer
    inner, outer = data.group(part), data.group(edge.whole.data_root)
    part.data_of, part.data_start, part.data_gaps = edge.whole, edge.start, edge.gaps
    layer.held_data |= {edge.number}
    if data.clash(inner, outer):
        part.data_of, part.data_start, part.data_gaps = None, 0, False
        layer.held_data -= {edge.number}


def _data_place(blob: BlobInfo) -> Place:
    return Place.of(blob.shape, blob.data_offset, blob.data_of if blob.data_gaps else None)


def _past_split(blob: BlobInfo) -> bool:
    """Whether a Split lies between the blob and that whose memory it lies in, so that gradient comes back by other ways too: where Dropout has put
    zeros into the blob, the signs of what it lies in still matter."""
    return blob.data_of is not None and (blob.writers[0].layer.shares_data or _past_split(blob.data_of))


class _Data:
    """When data is written and read. Node i computes forward at i and backward at 2n-1-i, as in memory.py."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._steps = {id(node): i for i, node in enumerate(graph.nodes)}

    def group(self, root: BlobInfo) -> list[BlobInfo]:
        """All blobs in the memory of `root`."""
        return [blob for blob in self._graph.blobs.values() if blob.data_root is root]

    def clash(self, group: list[BlobInfo], other: list[BlobInfo]) -> bool:
        """Whether a write to a blob of one group spoils one of the other, now that they are in one memory. Within each, none did."""
        return any(self._spoils(a, b) or self._spoils(b, a) for a in group for b in other)

    def _spoils(self, a: BlobInfo, b: BlobInfo) -> bool:
        """Whether a write to `a` changes what is read of `b` afterwards."""
        if not _data_place(a).meets(_data_place(b)):
            return False
        start = min(self._steps[id(node)] for node in b.writers)
        for writer in a.writers:
            step = self._steps[id(writer)]
            if step <= start or self._only_says_where(writer, a):
                continue
            kept = SIGN if writer.layer.keeps_sign and not _past_split(a) else None
            if b.persistent or any(time >= step and what != kept for time, what in self._reads(b)):
                return True
        return False

    def _only_says_where(self, writer: Node, blob: BlobInfo) -> bool:
        """Whether `writer` leaves what it finds of the blob's memory where other blobs lie in it."""
        if isinstance(writer.layer, (Slice, Regroup)):
            return writer.tops.index(blob) in writer.layer.held_data
        return isinstance(writer.layer, Concat) or writer.layer.shares_data

    def _reads(self, blob: BlobInfo) -> Iterator[tuple[int, str]]:
        """When the blob is read, and what of it."""
        last = 2 * len(self._graph.nodes) - 1
        for node in [*blob.writers[1:], *blob.readers]:
            yield self._steps[id(node)], BOTTOM
        for nodes, kinds in ((blob.writers, (TOP, SIGN)), (blob.readers, (BOTTOM,))):
            for node in nodes:
                if node.runs_backward:
                    yield from ((last - self._steps[id(node)], kind) for kind in kinds if kind in node.layer.backward_reads())


# --- gradients -------------------------------------------------------------------------------------------------------------


def _may_share_diff(graph: Graph, edge: Edge, backend: Backend | None) -> bool:
    """Whether this layer passes the gradient on, which others write anew in every pass, and nobody looks for afterwards. With gaps: as of data."""
    node, part, whole = edge.node, edge.part, edge.whole
    below, above = (whole, part) if part in node.tops else (part, whole)
    if part.diff_of is not None or part.persistent or whole.persistent or weighted(part) or weighted(whole) or whole.diff_gaps:
        return False
    users = (user for user in (*part.writers, *part.readers) if user.runs_backward)
    if edge.gaps and not part.data_gaps and any(reader.layer.relu_bottoms for reader in part.readers):
        return False  # it would write the gradient with gaps, and read signs without
    if edge.gaps and not (_take_gaps(users, backend) and all(blob.diff_of is not part for blob in graph.blobs.values())):
        return False
    return node.runs_backward and gives(node, below) and any(reader.needs_backward and gives(reader, above) for reader in above.readers)


def _share_diff(diffs: _Diffs, edge: Edge) -> None:
    """Where it is a BatchNorm in place that would overwrite the one gradient of a sum's bottoms, with that of what it found there (which a fusion laid
    so), that one gets memory of its own."""
    part, layer = edge.part, edge.node.layer
    inner, outer = diffs.group(part), diffs.group(edge.whole.diff_root)
    part.diff_of, part.diff_start, part.diff_gaps = edge.whole, edge.start, edge.gaps
    layer.held_diffs |= {edge.number}
    if not diffs.clash(inner, outer):
        return
    held = [edge.node.bottoms[i] for i in layer.held_diffs] if isinstance(layer, Eltwise) else []
    lodgers = [(blob, blob.diff_of) for blob in diffs.blobs if blob.called and blob.diff_of in held]
    for blob, _ in lodgers:
        blob.diff_of = None
    if diffs.clash(inner, outer):
        part.diff_of, part.diff_start, part.diff_gaps = None, 0, False
        layer.held_diffs -= {edge.number}
        for blob, before in lodgers:
            blob.diff_of = before


def _diff_place(blob: BlobInfo) -> Place:
    return Place.of(blob.shape, blob.diff_offset, blob.diff_of if blob.diff_gaps else None)


class _Diffs:
    """When gradients are written and read, by the time of backward: later nodes first."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._times = {id(node): -i for i, node in enumerate(graph.nodes)}

    @property
    def blobs(self) -> Sequence[BlobInfo]:
        return list(self._graph.blobs.values())

    def group(self, root: BlobInfo) -> list[BlobInfo]:
        """All blobs whose gradients lie in the memory of `root`'s, but for those whose gradient nobody reads."""
        return [blob for blob in self.blobs if blob.diff_root is root and any(node.needs_backward for node in blob.writers)]

    def clash(self, group: list[BlobInfo], other: list[BlobInfo]) -> bool:
        """As of _Data."""
        return any(self._spoils(a, b) or self._spoils(b, a) for a in group for b in other)

    def _spoils(self, a: BlobInfo, b: BlobInfo) -> bool:
        """Whether a write to `a`'s gradient changes what is read of `b`'s afterwards."""
        if a.diff_root is not b.diff_root or not _diff_place(a).meets(_diff_place(b)):
            return False
        givers = [self._times[id(reader)] for reader in b.readers if reader.needs_backward and gives(reader, b)]
        start, end = min(givers, default=-len(self._times)), self._times[id(b.writers[0])]
        for node in self._writers(a):
            passes_on = b in node.tops and node.layer.in_place and a.shape == b.shape  # reads b's while it writes a's: dx may be dy
            if start < self._times[id(node)] <= end and not (self._times[id(node)] == end and passes_on):
                return True
        return False

    def _writers(self, blob: BlobInfo) -> Iterator[Node]:
        """The nodes whose backward writes the blob's gradient."""
        for node in blob.writers[1:]:
            if node.runs_backward:
                yield node
        for node in blob.readers:
            if node.runs_backward and gives(node, blob) and not self._only_says_where(node, blob):
                yield node

    def _only_says_where(self, reader: Node, blob: BlobInfo) -> bool:
        """Whether `reader` leaves what it finds of the gradient's memory where other gradients lie in it."""
        if isinstance(reader.layer, (Concat, Eltwise)):
            return reader.bottoms.index(blob) in reader.layer.held_diffs
        return isinstance(reader.layer, Slice) or (isinstance(reader.layer, Regroup) and bool(reader.layer.held_diffs))
