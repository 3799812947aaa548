"""What guessing reaches, to be shown next to an accuracy."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from caffelite.errors import DataError

if TYPE_CHECKING:
    from caffelite.net import Net
    from caffelite.solver.loop import Solver

MOST_RECORDS = 20_000  # a larger database is not read through for this


def chances(solver: Solver) -> dict[str, float]:
    """The chance level of each test output that is an accuracy, under the label the progress line gives it."""
    found: dict[str, float] = {}
    for index, net in enumerate(solver.test_nets):
        found.update({blob + (f" (net {index})" if index else ""): chance for blob, chance in net_chances(net).items()})
    return found


def net_chances(net: Net) -> dict[str, float]:
    """What always naming the top_k most frequent classes reaches, for each Accuracy layer's first top.

    Without a database whose labels can be counted: top_k of as many classes as the net puts out.
    """
    nodes = [node for node in net.graph.nodes if node.layer.type == "Accuracy"]
    shares = label_shares(net) if nodes else []
    found = {}
    for node in nodes:
        param = node.layer.param.accuracy_param
        classes = node.bottoms[0].shape[param.axis]
        found[node.tops[0].name] = min(sum(shares[: param.top_k]) if shares else param.top_k / classes, 1.0)
    return found


def label_shares(net: Net) -> list[float]:
    """The share of each label in the net's database, the largest first; empty where there is no one database, or a very large one."""
    if len(net.data_layers) != 1 or net.data_layers[0].source.count > MOST_RECORDS:
        return []
    database = net.data_layers[0].source.database
    reader = database.reader()
    try:
        labels = Counter(_label(database.path, key, value) for key, value in reader.read(range(database.count), ordered=True))
    finally:
        reader.close()
    return [count / database.count for _, count in labels.most_common()]


def _label(database: str, key: bytes, value: memoryview) -> int:
    from caffelite.data.datum import placed
    from caffelite.schema import parse_datum

    try:
        return parse_datum(bytes(value)).label
    except DataError as error:
        raise placed(error, database, key) from error
