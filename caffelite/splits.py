"""Split insertion: a blob that is used more than once gets a Split layer right after its producer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from caffelite.errors import SpecError, nearest
from caffelite.schema import SourceMap, pb

LayerEntry = tuple[pb.LayerParameter, SourceMap]
Place = tuple[int, int]  # (layer, index of a bottom or top)


def insert_splits(entries: Sequence[LayerEntry]) -> list[LayerEntry]:
    """Gives every blob that is used more than once a Split right after its producer (2.2). Bottoms are rewired in order."""
    uses: Counter[Place] = Counter()
    reads: dict[Place, Place] = {}  # (layer, bottom index) -> (producer, top index)
    last: dict[str, Place] = {}
    for i, (param, where) in enumerate(entries):
        for j, bottom in enumerate(param.bottom):
            if bottom not in last:
                raise _undefined_bottom(bottom, j, param, where, last)
            reads[i, j] = last[bottom]
            uses[last[bottom]] += 1
        for j, top in enumerate(param.top):
            last[top] = (i, j)
            if j < len(param.loss_weight) and param.loss_weight[j]:
                uses[i, j] += 1
    _refuse_shared_in_place(entries, reads, uses)
    return _rewire(entries, reads, uses)


def _undefined_bottom(bottom: str, j: int, param: pb.LayerParameter, where: SourceMap, known: dict[str, Place]) -> SpecError:
    near = nearest(bottom, known)
    hint = f"did you mean '{near}'?" if near else "a bottom has to be the top of an earlier layer of the same phase"
    return SpecError(f"bottom '{bottom}' is not produced by any layer before this one", where=where.at("bottom", j), layer=param.name, hint=hint)


def _refuse_shared_in_place(entries: Sequence[LayerEntry], reads: dict[Place, Place], uses: Counter[Place]) -> None:
    for (i, j), source in reads.items():
        param, where = entries[i]
        if uses[source] > 1 and j < len(param.top) and param.top[j] == param.bottom[j]:
            others = [entries[k][0].name for (k, _), s in reads.items() if s == source and k != i]
            raise SpecError(
                f"writes '{param.top[j]}' in place, but " + (f"layer '{others[0]}' reads the same blob" if others else "the blob has a loss weight"),
                where=where.at("top", j),
                layer=param.name,
                hint="give this layer's top a name of its own",
            )


def _rewire(entries: Sequence[LayerEntry], reads: dict[Place, Place], uses: Counter[Place]) -> list[LayerEntry]:
    taken: Counter[Place] = Counter()
    result: list[LayerEntry] = []
    for i, (param, where) in enumerate(entries):
        for j in range(len(param.bottom)):
            source = reads[i, j]
            if uses[source] > 1:
                producer = entries[source[0]][0]
                param.bottom[j] = f"{_split_name(param.bottom[j], producer.name, source[1])}_{taken[source]}"
                taken[source] += 1
        result.append((param, where))
        for j, top in enumerate(param.top):
            if uses[i, j] > 1:
                weight = param.loss_weight[j] if j < len(param.loss_weight) else 0.0
                result.append((_split_layer(top, param, j, uses[i, j], weight), where))
                if weight:
                    param.loss_weight[j] = 0.0  # and not cleared: a loss layer without any would count as 1 again
                    taken[i, j] = 1  # the weight sits on the Split's first top
    return result


def _split_name(blob: str, layer: str, index: int) -> str:
    return f"{blob}_{layer}_{index}_split"


def _split_layer(blob: str, producer: pb.LayerParameter, index: int, count: int, weight: float) -> pb.LayerParameter:
    name = _split_name(blob, producer.name, index)
    split = pb.LayerParameter(name=name, type="Split", bottom=[blob], top=[f"{name}_{k}" for k in range(count)], phase=producer.phase)
    if weight:
        split.loss_weight.extend([weight] + [0.0] * (count - 1))
    return split
