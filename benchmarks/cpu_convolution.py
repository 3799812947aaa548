"""Times convolutions on the CPU by plain products and by Winograd's filters, pass by pass, and says which of them the backend would choose.

    python benchmarks/cpu_convolution.py                # layers of the shipped models, batch 32
    python benchmarks/cpu_convolution.py --batch 100

Both ways run in turn on the same operands; the table holds medians, in ms, and how many times faster filters are. Layers that filters may not
take at all (other strides, other kernels, 3x3 in bfloat16) are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from caffelite.backends.onednn import OneDNNBackend, convolution, convolution_weights, convolution_winograd
from caffelite.backends.onednn.convolution_geometry import Geometry
from caffelite.backends.onednn.dnnl import Unsupported

ROUNDS = 7


class Layer(NamedTuple):
    """Stride 1; `pad` keeps the size."""

    channels: int
    outputs: int
    size: int
    kernel: int
    group: int = 1


LAYERS = {
    "nin_crop48 conv2": Layer(96, 192, 24, 5),
    "nin_crop48 conv3": Layer(192, 192, 12, 3),
    "alexnet conv2": Layer(96, 256, 27, 5, 2),
    "alexnet conv3": Layer(256, 384, 13, 3),
    "alexnet conv4": Layer(384, 384, 13, 3, 2),
    "alexnet conv5": Layer(384, 256, 13, 3, 2),
    "vgg16 conv1_2": Layer(64, 64, 64, 3),
    "vgg16 conv2_1": Layer(64, 128, 32, 3),
    "vgg16 conv3_2": Layer(256, 256, 16, 3),
    "vgg16 conv4_2": Layer(512, 512, 8, 3),
    "vgg16 conv5_1": Layer(512, 512, 4, 3),
}
PRECISIONS = ("float32", "bfloat16")
PASSES = ("forward", "data", "weights")


def blob(backend: OneDNNBackend, shape: tuple[int, ...], precision: str, seed: int) -> Any:
    """Normal values."""
    made = backend.empty(shape, precision)
    backend.from_host(np.random.default_rng(seed).standard_normal(shape, np.float32), made)
    return made


def ways(backend: OneDNNBackend, layer: Layer, batch: int, precision: str) -> tuple[bool, list[list[Callable[[], None]]]]:
    """Whether filters are the backend's choice; and for each pass both ways, plain products first. Unsupported: filters may not."""
    dnnl, pad, one = backend.dnnl, (layer.kernel // 2,) * 2, (1, 1)
    x, dy = (blob(backend, (batch, count, layer.size, layer.size), precision, i) for i, count in enumerate((layer.channels, layer.outputs)))
    w = blob(backend, (layer.outputs, layer.channels // layer.group, layer.kernel, layer.kernel), precision, 2)
    b, db, dw = backend.empty((layer.outputs,), "float32"), backend.empty((layer.outputs,), "float32"), backend.empty(w.shape, "float32")
    y, dx = backend.empty(dy.shape, precision), backend.empty(x.shape, precision)
    backend.fill(b, 0)
    s, g = convolution_winograd.shape_of(x, w, y, one, pad, one, layer.group), Geometry(dnnl, x, w, y, one, pad, one, layer.group)
    plans = [
        (convolution.plan_forward(g, x, w, b, y, True), convolution_winograd.plan_forward(dnnl, s, x, w, b, True), (x, w, b, y)),
        (convolution.plan_backward_data(g, dy, w, dx), convolution_winograd.plan_backward_data(dnnl, s, dy, w), (dy, w, dx)),
        (
            convolution_weights.plan_backward_weights(g, x, dy, dw, db, False, False, backend.threads),
            convolution_winograd.plan_backward_weights(dnnl, s, x, True, False, False),
            (x, dy, dw, db),
        ),
    ]
    bound = [[bind(plan, arrays) for plan in both] for *both, arrays in plans]
    return convolution_winograd.pays(s), bound


def bind(plan: Callable[..., None], arrays: tuple[Any, ...]) -> Callable[[], None]:
    """The plan on these arrays, which stay alive with it."""
    return lambda: plan(*(array.ctypes.data for array in arrays))


def times(runs: list[Callable[[], None]]) -> list[float]:
    """Medians in ms of runs in turn, after one of each."""
    taken: list[list[float]] = [[] for _ in runs]
    for i in range(ROUNDS + 1):
        for run, into in zip(runs, taken):
            start = perf_counter()
            run()
            if i:
                into.append(1e3 * (perf_counter() - start))
    return [median(each) for each in taken]


def row(backend: OneDNNBackend, name: str, layer: Layer, batch: int, precision: str) -> str | None:
    """One line of the table; None where filters may not be used."""
    try:
        chosen, passes = ways(backend, layer, batch, precision)
    except Unsupported:
        return None
    cells = [f"{plain:.1f} / {filtered:.1f} = {plain / filtered:.2f}" for plain, filtered in map(times, passes)]
    return f"| {name} | {precision} | {' | '.join(cells)} | {'filters' if chosen else 'plain'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--layers", nargs="*", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    args = parser.parse_args()
    backend = OneDNNBackend()
    print(f"batch {args.batch}, {backend.threads} threads; plain / filters = times faster, in ms")
    print("| layer | type | " + " | ".join(PASSES) + " | chosen |\n|---|---|" + "---:|" * len(PASSES) + "---|")
    for precision in PRECISIONS:
        for name in args.layers:
            line = row(backend, name, LAYERS[name], args.batch, precision)
            if line:
                print(line, flush=True)


if __name__ == "__main__":
    main()
