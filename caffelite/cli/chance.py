"""What guessing reaches, to be shown next to an accuracy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from caffelite.net import Net
    from caffelite.solver.loop import Solver


def chances(solver: Solver) -> dict[str, float]:
    """The chance level of each test output that is an accuracy, under the label the progress line gives it."""
    found: dict[str, float] = {}
    for index, net in enumerate(solver.test_nets):
        found.update({blob + (f" (net {index})" if index else ""): chance for blob, chance in net_chances(net).items()})
    return found


def net_chances(net: Net) -> dict[str, float]:
    """top_k of the number of classes, for each Accuracy layer's first top."""
    found = {}
    for node in net.graph.nodes:
        if node.layer.type == "Accuracy":
            param = node.layer.param.accuracy_param
            classes = node.bottoms[0].shape[param.axis]
            found[node.tops[0].name] = min(param.top_k / classes, 1.0)
    return found
