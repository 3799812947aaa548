"""Every recorded BVLC Caffe case whose layer types exist here: outputs, gradients and kept statistics agree (float32).

Each tests/golden/layers/NAME.npz holds: prototxt, phase, in/BLOB, param/LAYER/I, dtop/BLOB (gradient fed to each output that is no
loss), and Caffe's results out/BLOB, after/LAYER/I (parameters after one forward), dbottom/BLOB, dparam/LAYER/I.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from caffelite.layer import known_types
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

FOLDER = Path(__file__).parent / "golden" / "layers"
NO_TOP_GRADIENT = {"loss", "acc", "per", "mask", "p"}
NO_BOTTOM_GRADIENT = {"t", "i", "s_filter", "cont", "H", "r"}
# float32 sums in another order: Caffe's BLAS against ours
RTOL, ATOL = 2e-4, 2e-5


def _supported() -> list[str]:
    names = []
    for path in sorted(FOLDER.glob("*.npz")):
        spec = net_from_text(str(np.load(path)["prototxt"]))
        if {layer.type for layer in spec.param.layer} <= set(known_types()):
            names.append(path.stem)
    return names


CASES = _supported()


def test_the_cases_of_all_listed_layers_are_there() -> None:
    assert len(CASES) == 66


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_caffe(name: str, backend) -> None:
    golden = dict(np.load(FOLDER / f"{name}.npz"))
    phase = pb.TRAIN if str(golden["phase"]) == "TRAIN" else pb.TEST
    net = Net(net_from_text(str(golden["prototxt"])), phase=phase, backend=backend, observe=True)
    got = _run(net, golden, phase == pb.TRAIN)
    unread = NO_BOTTOM_GRADIENT | set(net.outputs)  # an input that nothing reads is an output, and keeps the diff it was given
    wanted = [k for k in golden if k.split("/")[0] in ("out", "after", "dparam") or (k.startswith("dbottom/") and k[8:] not in unread)]
    assert wanted
    for key in wanted:
        want = golden[key].astype(np.float64)
        assert got[key].shape == want.shape, key
        np.testing.assert_allclose(got[key], want, rtol=0, atol=ATOL + RTOL * np.abs(want).max(initial=0), err_msg=key)


def _run(net: Net, golden: dict[str, np.ndarray], train: bool) -> dict[str, np.ndarray]:
    ops, got = net.backend, {}
    for name, params in net.params.items():
        for i, param in enumerate(params):
            ops.from_host(golden[f"param/{name}/{i}"], param.master)
    inputs = [k[3:] for k in golden if k.startswith("in/")]
    for name in inputs:
        ops.from_host(golden[f"in/{name}"].reshape(net.blobs[name].shape), net.blobs[name].data)
    net.forward()
    for name, value in net.output_values().items():
        got[f"out/{name}"] = np.array(value)
    got |= {f"after/{n}/{i}": np.array(ops.to_host(p.master)) for n, ps in net.params.items() for i, p in enumerate(ps)}
    if not train:
        return got
    for name in set(net.outputs) - NO_TOP_GRADIENT:
        if net.blobs[name].diff is not None:
            ops.from_host(golden[f"dtop/{name}"], net.blobs[name].diff)
    net.backward()
    for name in set(inputs) - set(net.outputs) - NO_BOTTOM_GRADIENT:
        got[f"dbottom/{name}"] = np.array(ops.to_host(net.blobs[name].diff))
    got |= {f"dparam/{n}/{i}": np.array(ops.to_host(p.diff)) for n, ps in net.params.items() for i, p in enumerate(ps)}
    return got
