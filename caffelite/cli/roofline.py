"""How near a GPU's layers come to what it can do: operations and bytes of each layer, and the time they take at the least (the roofline)."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod
from typing import Any

from caffelite.backends.contract import Array, Peaks
from caffelite.blob import Blob
from caffelite.layer import BOTTOM, SIGN, TOP
from caffelite.net import Step

PASSES = ("forward", "backward")
PEAKS = (("operations", 1e12, "TFLOP/s"), ("bandwidth", 1e9, "GB/s"))  # fields of Peaks, and how they are shown
MEANING = (
    "share: the least time that the device's peaks allow over the time measured. Of bytes, each blob, gradient and parameter is read and written once;",
    "a multiply-add is two operations. A time includes waiting for the host, where that is slower than the GPU.",
)


def roofline_row(step: Step, row: dict[str, Any], peaks: Peaks | None) -> dict[str, Any]:
    """Of a layer and its times: bytes, GB/s, the share of the roofline, and what bounds it ("memory", "arithmetic"), where these are known."""
    found: dict[str, Any] = {}
    for name, nbytes in zip(PASSES, traffic(step)):
        seconds = row[f"{name}_ms"] / 1e3
        operations = (row[f"{name}_gflops"] or 0.0) * 1e9 * seconds
        found[f"{name}_bytes"] = nbytes if seconds else 0
        found[f"{name}_gb_per_s"] = nbytes / seconds / 1e9 if seconds and nbytes else None
        share, bound = _roofline(operations, nbytes, seconds, peaks) if seconds and nbytes else (None, None)
        found[f"{name}_share"], found[f"{name}_bound"] = share, bound
    return found


def _roofline(operations: float, nbytes: int, seconds: float, peaks: Peaks | None) -> tuple[float | None, str | None]:
    if peaks is None or peaks.operations is None or peaks.bandwidth is None:
        return None, None
    arithmetic, memory = operations / peaks.operations, nbytes / peaks.bandwidth
    return max(arithmetic, memory) / seconds, "memory" if memory > arithmetic else "arithmetic"


def traffic(step: Step) -> tuple[int, int]:
    """Bytes that a layer's forward and backward have to move; 0 for what the host does (sources) and what moves nothing (Split's forward)."""
    node, layer = step.node, step.layer
    if layer.is_source:
        return 0, 0
    bottoms, tops = (sum(_size(blob.data) for blob in blobs) for blobs in (step.bottoms, step.tops))
    params = sum(_size(param.data) for param in layer.params)
    kept = sum(_size(array) for name, array in layer.buffers.items() if _is_kept(step, name))
    forward = 0 if layer.shares_data else bottoms + tops + params + kept - 2 * sum(_size(part.data) for part in _held(step, layer.held_data))
    if not node.runs_backward:
        return forward, 0
    reads = layer.backward_reads()
    backward = sum(_size(top.diff) for top in step.tops) + kept
    backward += bottoms * (BOTTOM in reads) + tops * bool(reads & {TOP, SIGN})
    backward += sum(_size(bottom.diff) for bottom, wanted in zip(step.bottoms, node.propagate_down) if wanted)
    backward += params * any(node.propagate_down) + sum(_size(param.diff) for param, learn in zip(layer.params, node.learn) if learn)
    held = sum(_size(part.diff) for part in _held(step, layer.held_diffs))
    if layer.type != "Eltwise":
        return forward, backward - 2 * held
    copies = any(wanted and i not in layer.held_diffs for i, wanted in enumerate(node.propagate_down))  # if any, the top's is read once for all
    return forward, backward - held - (0 if copies else _size(step.tops[0].diff))


def _held(step: Step, numbers: Iterable[int]) -> list[Blob]:
    """The bottoms or tops of these numbers, of a layer that brings values together or apart: it neither reads nor writes them where they are held."""
    parts = step.tops if step.layer.type in ("Slice", "Flatten", "Reshape") else step.bottoms
    return [parts[i] for i in numbers]


def _is_kept(step: Step, name: str) -> bool:
    return step.layer.buffers[name] is step.backward_buffers.get(name)


def _size(x: Array | None) -> int:
    return 0 if x is None else int(prod(x.shape) * x.itemsize)


# --- as text -----------------------------------------------------------------------------------------------------------


def gpu_table(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the layers' table, its head first; shares only where the device's peaks are known."""
    shares = _shares_known(result)
    columns = ("ms", "TFLOP/s", "GB/s", *(["share"] if shares else []))
    rows: list[tuple[str, ...]] = [("layer", "type", *(f"forward {columns[0]}", *columns[1:]), *(f"backward {columns[0]}", *columns[1:]))]
    for layer in result["layers"]:
        cells = [layer["name"], layer["type"]]
        for name in PASSES:
            fused = name == "forward" and layer["fused"]
            cells += ["fused" if fused else f"{layer[f'{name}_ms']:.3f}" if layer[f"{name}_ms"] else ""]
            cells += [_rate(layer[f"{name}_gflops"], 1e3), _rate(layer[f"{name}_gb_per_s"], 1)]
            cells += ["" if layer[f"{name}_share"] is None else f"{layer[f'{name}_share']:.0%}"] if shares else []
        rows.append(tuple(cells))
    return rows


def _rate(value: float | None, unit: float) -> str:
    if not value:
        return ""
    return f"{value / unit:,.1f}" if value / unit >= 1 else f"{value / unit:.2g}"


def _shares_known(result: dict[str, Any]) -> bool:
    peaks = result.get("peaks")
    return bool(peaks and peaks["operations"] and peaks["bandwidth"])


def gpu_lines(result: dict[str, Any]) -> list[str]:
    """What stands below the table: the peaks and their source, what a share is, and which layers are bound by memory."""
    if result["driver"] == "emulator":
        return ["emulated: the times are those of this machine's CPU and say nothing of a GPU"]
    peaks = result.get("peaks") or {}
    operations, bandwidth = (f"{peaks[key] / unit:,.0f} {name}" if peaks.get(key) else "" for key, unit, name in PEAKS)
    known = " and ".join(part for part in (operations, bandwidth) if part)
    lines = [f"peaks of {peaks.get('device', 'this GPU')} in {result['precision']}: {known or 'not known'}" + (f" ({peaks['source']})" if known else "")]
    if not _shares_known(result):
        return [*lines, "shares of the peaks are left out: one of the two is not known of this GPU"]
    for name in PASSES:
        for bound in ("memory", "arithmetic"):
            names = [layer["name"] for layer in result["layers"] if layer[f"{name}_bound"] == bound]
            lines.append(f"bound by {bound}, {name}: {', '.join(names) or 'none'}")
    return [*lines, *MEANING]
