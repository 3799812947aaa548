"""Fusions: layers whose work another layer's op does on its way, so that a blob is read and written fewer times.

Only in-place layers are fused away: every blob then still holds what the file says when the pass has gone by, and a net made to be observed
is not fused at all. Marks are left in Node.forward_fused and Node.backward_fused, and in the layers that take the work over. To be called
once, on a graph that is legal, before memory is planned: it changes what layers read in backward.
"""

from __future__ import annotations

from caffelite.graph import BlobInfo, Graph, Node
from caffelite.layer import SIGN, TOP


def fuse(graph: Graph) -> None:
    """Marks all fusions of `graph`."""
    for node in graph.nodes:
        _fuse_relu_forward(node)
    for node in graph.nodes:
        if _is_relu(node) and node.in_place() and node.needs_backward and node.propagate_down[0]:
            _fuse_relu_backward(node)


def _is_relu(node: Node) -> bool:
    return node.layer.type == "ReLU" and node.layer.param.relu_param.negative_slope == 0


def _later_writers(node: Node, blob: BlobInfo) -> list[Node]:
    """The nodes that write `blob` in place after `node`."""
    return blob.writers[blob.writers.index(node) + 1 :]


def _fuse_relu_forward(node: Node) -> None:
    """Convolution and InnerProduct do the forward of a ReLU that follows in place."""
    if hasattr(node.layer, "relu") and len(node.tops) == 1:
        after = _later_writers(node, node.tops[0])[:1]
        if after and _is_relu(after[0]):
            node.layer.relu = True
            after[0].forward_fused = True


def _fuse_relu_backward(relu: Node) -> None:
    """The one layer that takes the ReLU's top, in place or not, applies the ReLU's gradient too while it writes its own."""
    blob = relu.tops[0]
    takers = _later_writers(relu, blob)[:1] or blob.readers
    if len(takers) != 1:
        return
    (taker,) = takers
    index = taker.bottoms.index(blob)
    if not (taker.needs_backward and taker.propagate_down[index] and taker.layer.may_take_relu([b.shape for b in taker.bottoms])):
        return
    before = taker.layer.relu_bottoms
    taker.layer.relu_bottoms = before | {index}
    if _reads_what_it_wrote(taker):
        relu.backward_fused = True
    else:
        taker.layer.relu_bottoms = before


def _reads_what_it_wrote(node: Node) -> bool:
    """Whether what the node's backward reads of its tops is still there after all layers that write them in place."""
    reads = node.layer.backward_reads()
    for top in node.tops:
        for later in _later_writers(node, top):
            if TOP in reads or (SIGN in reads and not later.layer.keeps_sign):
                return False
    return True
