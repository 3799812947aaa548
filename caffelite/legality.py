"""Refuses what Caffe accepts silently and computes wrong, or would abort on: unsafe in-place use, gradients that do not exist, lost loss weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from caffelite.layer import BOTTOM, SIGN, TOP

if TYPE_CHECKING:
    from caffelite.graph import BlobInfo, Graph, Node


def check_legality(graph: Graph) -> None:
    """SpecError at the first layer that could not work as written. To be called when backward is marked."""
    for node in graph.nodes:
        _check_differentiable(node)
        for i, top in enumerate(node.tops):
            if node.in_place(i):
                _check_in_place(node, i, top)
            if node.loss_weights[i]:
                _check_loss_weight(node, i, top)


def _check_differentiable(node: Node) -> None:
    allowed = type(node.layer).differentiable
    if not node.needs_backward or allowed is None:
        return
    for i, flag in enumerate(node.propagate_down):
        if flag and i not in allowed:
            raise node.layer.fail(
                f"{node.layer.type} has no gradient for its bottom '{node.bottoms[i].name}'",
                "bottom",
                i,
                hint=f"add propagate_down: false for bottom {i}, or feed it from a layer without parameters",
            )


def _check_in_place(node: Node, i: int, blob: BlobInfo) -> None:
    layer, hint = node.layer, "give this layer's top a name of its own"
    if not layer.in_place and (node.needs_backward or not layer.in_place_forward):
        raise layer.fail(f"{layer.type} cannot work in place: it would compute wrong results", "top", i, hint=hint)
    if blob.data_of is not None:
        raise layer.fail(f"writes '{blob.name}' in place, which lies in the memory of '{blob.data_root.name}'", "top", i, hint=hint)
    for earlier in blob.writers[: blob.writers.index(node)]:
        reads = earlier.layer.backward_reads() if earlier.needs_backward else frozenset()
        if TOP in reads or (SIGN in reads and not layer.keeps_sign):
            raise layer.fail(f"overwrites '{blob.name}', which layer '{earlier.name}' ({earlier.layer.type}) needs for its gradient", "top", i, hint=hint)
    assert not (node.needs_backward and BOTTOM in layer.backward_reads()), f"{layer.type} in place must keep what its backward reads"


def _check_loss_weight(node: Node, i: int, top: BlobInfo) -> None:
    """A loss weight stands in the top's gradient, once and for all: nothing may write there."""
    if node.in_place(i) and node.needs_backward:
        hint = "give this layer's top a name of its own"
        raise node.layer.fail(f"'{top.name}' has a loss weight and is written in place, so that its gradient would overwrite the weight", "top", i, hint=hint)
    for reader in top.readers:
        if reader.needs_backward and any(b is top and flag for b, flag in zip(reader.bottoms, reader.propagate_down)):
            raise node.layer.fail(
                f"layer '{reader.name}' sends a gradient into '{top.name}', which is a loss itself",
                "top",
                i,
                hint=f"write loss_weight: {node.loss_weights[i]:g} here, so that both are added, or loss_weight: 0",
            )
