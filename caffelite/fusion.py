"""Fusions: layers whose work another layer's op does on its way, so that a blob is read and written fewer times.

In-place layers are fused away, so that every blob still holds what the file says when the pass has gone by; and an LRN whose top max pooling
alone takes, where the backend's pooling had better do it: that top then lies nowhere (BlobInfo.absent). A net made to be observed is not fused at
all. Marks are left in Node.forward_fused and Node.backward_fused, and in the layers that take the work over. To be called once, on a graph that
is legal, before memory is planned: it changes what layers read in backward.
"""

from __future__ import annotations

from caffelite.backends.contract import Backend
from caffelite.graph import BlobInfo, Graph, Node
from caffelite.layer import SIGN, TOP
from caffelite.layers.batch_norm import BatchNorm
from caffelite.layers.concat import Concat
from caffelite.layers.convolution import Convolution
from caffelite.layers.dropout import Dropout
from caffelite.layers.inner_product import InnerProduct
from caffelite.layers.lrn import LRN
from caffelite.layers.pooling import Pooling
from caffelite.layers.scale import Scale
from caffelite.schema import pb
from caffelite.sharing import share


def fuse(graph: Graph, backend: Backend | None = None) -> None:
    """Marks all fusions of `graph`, and lays blobs inside others where that saves a copy. backend: the one that says what it had better do at
    once; None: nothing that depends on it."""
    for node in graph.nodes:
        if backend is not None and isinstance(node.layer, LRN):
            _fuse_lrn(node, node.layer, backend)
        if backend is not None and backend.drops_along and isinstance(node.layer, Pooling):
            _fuse_pooled_dropout(node, node.layer)
    for node in graph.nodes:
        if isinstance(node.layer, BatchNorm):
            _fuse_batch_norm(graph, node, node.layer)
    for node in graph.nodes:
        _fuse_relu_forward(node)
        if backend is not None and backend.drops_along and isinstance(node.layer, (Convolution, InnerProduct)):
            _fuse_dropout(node, node.layer)
    for node in graph.nodes:
        if _goes_back_in_place(node):
            _fuse_relu_backward([node], node)
    for node in graph.nodes:
        if isinstance(node.layer, Concat) and (relus := _relus_below(node)):
            _fuse_relu_backward(relus, node)
    share(graph, backend)


def _is_relu(node: Node) -> bool:
    return node.layer.type == "ReLU" and node.layer.param.relu_param.negative_slope == 0


def _goes_back_in_place(node: Node) -> bool:
    """Whether it is a ReLU in place whose backward is its own as yet."""
    return _is_relu(node) and node.in_place() and not node.backward_fused and node.needs_backward and node.propagate_down[0]


def _later_writers(node: Node, blob: BlobInfo) -> list[Node]:
    """The nodes that write `blob` in place after `node`."""
    return blob.writers[blob.writers.index(node) + 1 :]


def _fuse_relu_forward(node: Node) -> None:
    """Convolution, InnerProduct and sums do the forward of a ReLU that follows in place."""
    if hasattr(node.layer, "relu") and getattr(node.layer, "may_do_relu", True) and len(node.tops) == 1:
        after = _later_writers(node, node.tops[0])[:1]
        if after and _is_relu(after[0]):
            node.layer.relu = True
            after[0].forward_fused = True


def _relus_below(concat: Node) -> list[Node]:
    """The ReLUs in place that made all bottoms of a Concat, which alone takes them; none where there is a bottom of another kind, or type."""
    last = [blob.writers[-1] for blob in concat.bottoms]
    every = all(map(_goes_back_in_place, last)) and concat.needs_backward and all(concat.propagate_down)
    return last if every and {blob.dtype for blob in concat.bottoms} == {concat.tops[0].dtype} else []


def _fuse_relu_backward(relus: list[Node], last: Node) -> None:
    """The one layer that takes the top of `last`, in place or not, applies the gradient of the ReLUs that made it too while it writes its own: `last`
    is the ReLU, or joins what they made."""
    taker = _taker(last)
    if taker is not None and _takes_relu(taker, last.tops[0]):
        for relu in relus:
            relu.backward_fused = True


def _taker(node: Node) -> Node | None:
    """The one node that takes the node's top, in place or not; None where there are several."""
    takers = _later_writers(node, node.tops[0])[:1] or node.tops[0].readers
    return takers[0] if len(takers) == 1 else None


def _takes_relu(taker: Node, blob: BlobInfo) -> bool:
    """Makes the node take its gradient on through the ReLU that put out `blob`, if it can."""
    index = taker.bottoms.index(blob)
    if not (taker.needs_backward and taker.propagate_down[index] and taker.layer.may_take_relu([b.shape for b in taker.bottoms])):
        return False
    before = taker.layer.relu_bottoms
    taker.layer.relu_bottoms = before | {index}
    if _reads_what_it_wrote(taker):
        return True
    taker.layer.relu_bottoms = before
    return False


def _reads_what_it_wrote(node: Node) -> bool:
    """Whether what the node's backward reads of its tops is still there after all layers that write them in place."""
    reads = node.layer.backward_reads()
    for top in node.tops:
        for later in _later_writers(node, top):
            if TOP in reads or (SIGN in reads and not later.layer.keeps_sign):
                return False
    return True


def _fuse_batch_norm(graph: Graph, norm: Node, layer: BatchNorm) -> None:
    """BatchNorm does forward and backward of a Scale by channel that follows in place, and of a ReLU after that."""
    blob, shape = norm.tops[0], norm.bottoms[0].shape
    after = _later_writers(norm, blob)[:2]
    scale = after[0].layer if after else None
    if len(shape) not in (2, 4) or not isinstance(scale, Scale) or not scale.has_own_channels(shape) or any(p.share_name for p in after[0].params):
        return
    taken = after if len(after) == 2 and _is_relu(after[1]) else after[:1]
    chain = [norm, *taken]
    if graph.phase == pb.TRAIN and any(node.needs_backward for node in chain):
        if not all(node.needs_backward and node.propagate_down[0] for node in chain):
            return
        if norm.in_place() and not _keep_bottom(graph, norm):
            return
    layer.scale, layer.then_relu = scale, len(taken) == 2
    norm.absorbed = taken
    for node in taken:
        node.forward_fused = node.backward_fused = True


def _fuse_lrn(norm: Node, layer: LRN, backend: Backend) -> None:
    """Max pooling does forward and backward of the LRN across channels whose top it alone takes: it reads that one's bottom."""
    between, blob = norm.tops[0], norm.bottoms[0]
    if layer.within or between.persistent or between.writers != [norm] or len(between.readers) != 1:
        return
    (pool,) = between.readers
    if not (isinstance(pool.layer, Pooling) and pool.layer.is_max) or between.dtype != blob.dtype:
        return
    if (pool.needs_backward, pool.propagate_down) != (norm.needs_backward, norm.propagate_down):
        return
    g = pool.layer.geometry(blob.shape)
    if not backend.lrn_max_pool_pays(blob.shape, blob.dtype, size=layer.size, kernel=g.kernel, stride=g.stride):
        return
    pool.layer.lrn = layer
    pool.bottoms, between.absent = [blob], True
    blob.readers = [pool if reader is norm else reader for reader in blob.readers]
    norm.forward_fused = norm.backward_fused = True


def _fuse_pooled_dropout(pool: Node, layer: Pooling) -> None:
    """Pooling does forward and backward of a Dropout that follows in place. Not beside an LRN, nor for a second top, which asks for all winners,
    nor from float32 to bfloat16, where what is dropped would not be rounded first."""
    after = _later_writers(pool, pool.tops[0])[:1]
    dropout = after[0].layer if after else None
    if not isinstance(dropout, Dropout) or not dropout.training or layer.lrn is not None or len(pool.tops) > 1:
        return
    if pool.bottoms[0].dtype != pool.tops[0].dtype:
        return
    if (pool.needs_backward, pool.propagate_down) == (after[0].needs_backward, after[0].propagate_down):
        layer.dropout = dropout
        after[0].forward_fused = after[0].backward_fused = True


def _fuse_dropout(node: Node, layer: Convolution | InnerProduct) -> None:
    """A product does the forward of a Dropout that follows in place. No mask is kept, so this is for what no gradient goes through, and where a
    ReLU of slope 0 lies between and a further product takes the top: that one's data gradient goes on through both, by the signs of its bottom."""
    blob, after = node.tops[0], _later_writers(node, node.tops[0])[:2]
    relu = after.pop(0) if layer.relu else None
    dropout = after[0].layer if after else None
    if not isinstance(dropout, Dropout) or not dropout.training or len(node.tops) > 1 or node.bottoms[0].dtype != blob.dtype:
        return
    if not layer.may_drop([b.shape for b in node.bottoms]) or not (_no_gradient(after[0]) or (relu and _takes_both(relu, after[0], dropout.ratio))):
        return
    layer.dropout = dropout
    after[0].forward_fused = after[0].backward_fused = True


def _no_gradient(node: Node) -> bool:
    return not (node.needs_backward and node.propagate_down[0])


def _takes_both(relu: Node, dropout: Node, ratio: float) -> bool:
    """Makes the product that takes the dropout's top take its gradient on through both, if there is one."""
    taker, blob = _taker(dropout), dropout.tops[0]
    if taker is None or not taker.layer.takes_dropout or _no_gradient(relu):
        return False
    if not _takes_relu(taker, blob):
        return False
    taker.layer.drop_ratios[taker.bottoms.index(blob)] = ratio
    relu.backward_fused = True
    return True


def _keep_bottom(graph: Graph, node: Node) -> bool:
    """Gives what the node finds in its in-place blob a memory of its own, so that backward may read it; the gradient stays where it is.
    False for the top of a data layer or input, which is filled from outside."""
    blob = node.tops[0]
    start = blob.writers.index(node)
    writers = blob.writers[:start]
    if any(writer.layer.is_source for writer in writers):
        return False
    kept = BlobInfo(f"{blob.name} before {node.name}", blob.shape, blob.dtype, writers, [node], diff_of=blob, called=blob.label)
    graph.blobs[kept.name] = kept
    blob.writers = blob.writers[start:]
    for writer in writers:
        writer.tops = [kept if top is blob else top for top in writer.tops]
        if writer is not writers[0]:
            writer.bottoms = [kept if bottom is blob else bottom for bottom in writer.bottoms]
    node.bottoms = [kept]
    return True
