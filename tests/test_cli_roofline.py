"""caffelite time on a GPU: bytes by layer, the roofline, peaks of known and unknown cards, and what is said where they are not known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli_harness import said

from caffelite import backends
from caffelite.backends.contract import Backend, Peaks
from caffelite.backends.cuda.peaks import CARDS, Facts, peaks_of
from caffelite.cli.roofline import gpu_lines, gpu_table, roofline_row, traffic
from caffelite.net import Net
from caffelite.schema import net_from_text, pb

NET = """name: "n"
layer { name: "d" type: "DummyData" top: "x" top: "t" dummy_data_param { shape { dim: 2 dim: 3 dim: 5 dim: 7 } shape { dim: 2 } } }
layer { name: "c" type: "Convolution" bottom: "x" top: "c" convolution_param { num_output: 4 kernel_size: 1 } }
layer { name: "r" type: "TanH" bottom: "c" top: "r" }
layer { name: "p" type: "Pooling" bottom: "r" top: "p" pooling_param { kernel_size: 5 } }
layer { name: "i" type: "InnerProduct" bottom: "p" top: "i" inner_product_param { num_output: 6 } }
layer { name: "l" type: "SoftmaxWithLoss" bottom: "i" bottom: "t" top: "l" }
"""
X, C, P = 2 * 3 * 5 * 7, 2 * 4 * 5 * 7, 2 * 4 * 1 * 3


@pytest.mark.parametrize(("precision", "size"), [("float32", 4), ("bfloat16", 2)])
def test_bytes_of_each_layer(precision: str, size: int) -> None:
    net = Net(net_from_text(NET), phase=pb.TRAIN, backend=backends.get("numpy"), precision=precision)
    found = {step.layer.name: traffic(step) for step in net.steps}
    weights, bias = 4 * 3, 4  # a bias stays float32; gradients of parameters too
    assert found["d"] == (0, 0)
    assert found["c"] == (4 * X + size * (C + weights) + 4 * bias, size * C + 4 * (X + weights + bias)), "the image stays float32 and gets no gradient"
    assert found["r"] == (size * 2 * C, size * 3 * C), "backward reads its top and two gradients pass"
    assert found["p"] == (size * (C + P) + P, size * (C + P) + P), "the mask takes a byte"


def test_what_lies_inside_another_blob_moves_nothing() -> None:
    """Concat and Slice along the batch move nothing; nor does a sum backward, but where its bottoms' gradients lie inside another already."""
    text = NET.split('layer { name: "r"')[0].replace("dim: 3 dim: 5 dim: 7", "dim: 4 dim: 4 dim: 4") + (
        'layer { name: "b" type: "Convolution" bottom: "x" top: "b" convolution_param { num_output: 4 kernel_size: 1 } }'
        'layer { name: "a" type: "TanH" bottom: "c" top: "a" }'
        'layer { name: "k" type: "Eltwise" bottom: "a" bottom: "b" top: "k" }'
        'layer { name: "g" type: "Convolution" bottom: "x" top: "g" convolution_param { num_output: 4 kernel_size: 1 } }'
        'layer { name: "j" type: "Concat" bottom: "g" bottom: "k" top: "j" concat_param { axis: 0 } }'
        'layer { name: "e" type: "Convolution" bottom: "j" top: "e" convolution_param { num_output: 4 kernel_size: 1 } }'
        'layer { name: "s" type: "Slice" bottom: "e" top: "u" top: "v" slice_param { axis: 0 } }'
        'layer { name: "m" type: "Eltwise" bottom: "u" bottom: "v" top: "m" }'
        'layer { name: "i" type: "InnerProduct" bottom: "m" top: "i" inner_product_param { num_output: 6 } }'
        'layer { name: "l" type: "SoftmaxWithLoss" bottom: "i" bottom: "t" top: "l" }'
    )
    net = Net(net_from_text(text), phase=pb.TRAIN, backend=backends.get("numpy"))
    found, blob = {step.layer.name: traffic(step) for step in net.steps}, 4 * 2 * 4 * 4 * 4
    assert (found["j"], found["s"], found["k"], found["m"]) == ((0, 0), (0, 0), (3 * blob, 0), (3 * blob, 3 * blob))


def test_the_share_is_of_the_larger_of_two_times() -> None:
    net = Net(net_from_text(NET), phase=pb.TRAIN, backend=backends.get("numpy"))
    step = net.steps[1]
    forward, backward = traffic(step)
    row = {"forward_ms": 2.0, "backward_ms": 4.0, "forward_gflops": 3.0, "backward_gflops": 1.0}
    found = roofline_row(step, row, Peaks("gpu", 12e9, forward / 0.5e-3, "test"))
    assert found["forward_gb_per_s"] == pytest.approx(forward / 2e-3 / 1e9)
    assert found["forward_share"] == pytest.approx(max(3e9 * 2e-3 / 12e9, 0.5e-3) / 2e-3)
    assert found["backward_share"] == pytest.approx(max(1e9 * 4e-3 / 12e9, 0.5e-3 * backward / forward) / 4e-3)
    assert found["backward_bound"] == "memory"
    tight = roofline_row(step, row, Peaks("gpu", 4e9, 1e15, "test"))
    assert (tight["forward_share"], tight["forward_bound"]) == (pytest.approx(0.75), "arithmetic")
    for peaks in (None, Peaks("gpu", None, 1e12, "test"), Peaks("gpu", 1e12, None, "test")):
        unknown = roofline_row(step, row, peaks)
        assert (unknown["forward_share"], unknown["backward_bound"], unknown["forward_bytes"]) == (None, None, forward)


@pytest.mark.parametrize(
    ("name", "bfloat16", "bandwidth"),
    [
        ("A100-SXM4-80GB", 312, 2039),
        ("A100 80GB PCIe", 312, 1935),
        ("A100-PCIE-40GB", 312, 1555),
        ("A100-SXM4-40GB", 312, 1555),
        ("H100 80GB HBM3", 989, 3350),
        ("H100 PCIe", 756, 2000),
        ("H200", 989, 4800),
        ("L4", 121, 300),
        ("L40S", 362, 864),
        ("A10", 125, 600),
    ],
)
def test_known_cards(name: str, bfloat16: float, bandwidth: float) -> None:
    found = peaks_of(Facts(f"NVIDIA {name}", (9, 0), 1, 1.0, 1.0, 1), "bfloat16")
    assert found == Peaks(f"NVIDIA {name}", pytest.approx(bfloat16 * 1e12), pytest.approx(bandwidth * 1e9), "data sheet")


# Multiprocessors, boost clock, memory clock (MHz) and bus as the driver tells them; the data sheets' figures follow from them.
@pytest.mark.parametrize(
    ("name", "capability", "multiprocessors", "clock", "memory", "bus"),
    [("A100-SXM4-40GB", (8, 0), 108, 1410, 1215, 5120), ("GeForce RTX 3090", (8, 6), 82, 1695, 9751, 384), ("GeForce RTX 4090", (8, 9), 128, 2520, 10501, 384)],
)
def test_an_unknown_card_is_counted(name: str, capability: tuple[int, int], multiprocessors: int, clock: float, memory: float, bus: int) -> None:
    facts = Facts(f"NVIDIA {name}", capability, multiprocessors, clock * 1e6, memory * 1e6, bus)
    known, found = peaks_of(facts, "float32"), peaks_of(facts._replace(name="NVIDIA Test"), "float32")
    assert known is not None
    assert found == Peaks("NVIDIA Test", pytest.approx(known.operations, rel=0.01), pytest.approx(known.bandwidth, rel=0.01), "clocks and units")
    in_bfloat16 = peaks_of(facts._replace(name="NVIDIA A10G"), "bfloat16")
    assert in_bfloat16 is not None
    assert in_bfloat16.operations is None, "nobody says what its tensor cores do"
    future = peaks_of(facts._replace(name="NVIDIA Next", capability=(99, 0)), "float32")
    assert future is not None
    assert future.operations is None


def test_the_table_of_cards_is_in_order() -> None:
    for _, bfloat16, tf32, float32, _ in CARDS:
        assert bfloat16 == pytest.approx(2 * tf32, rel=0.02)
        assert tf32 >= float32


def timed(peaks: Peaks | None) -> dict[str, Any]:
    row = {"name": "c", "type": "Convolution", "fused": False, "forward_ms": 2.0, "backward_ms": 4.0, "forward_gflops": 3e4, "backward_gflops": 5.0}
    row |= {"forward_gb_per_s": 1234.0, "backward_gb_per_s": 0.5, "forward_share": 0.4 if peaks else None, "backward_share": 0.1 if peaks else None}
    row |= {"forward_bound": "arithmetic" if peaks else None, "backward_bound": "memory" if peaks else None}
    relu = row | {"name": "r", "fused": True, "forward_ms": 0.0, "forward_gflops": None, "forward_gb_per_s": None, "forward_share": None, "forward_bound": None}
    return {"layers": [row, relu], "precision": "bfloat16", "driver": "cupy", **({"peaks": peaks._asdict()} if peaks else {})}


def test_shares_are_shown_where_peaks_are_known() -> None:
    result = timed(Peaks("NVIDIA H200", 989e12, 4800e9, "data sheet"))
    head, first, fused = gpu_table(result)
    assert head == ("layer", "type", "forward ms", "TFLOP/s", "GB/s", "share", "backward ms", "TFLOP/s", "GB/s", "share")
    assert first == ("c", "Convolution", "2.000", "30.0", "1,234.0", "40%", "4.000", "0.005", "0.5", "10%")
    assert fused[2:6] == ("fused", "", "", "")
    lines = gpu_lines(result)
    assert lines[0] == "peaks of NVIDIA H200 in bfloat16: 989 TFLOP/s and 4,800 GB/s (data sheet)"
    assert lines[1:3] == ["bound by memory, forward: none", "bound by arithmetic, forward: c"]
    assert lines[3:5] == ["bound by memory, backward: c, r", "bound by arithmetic, backward: none"]


def test_shares_are_left_out_where_they_are_not() -> None:
    result = timed(None) | {"peaks": Peaks("NVIDIA Test", None, 100e9, "clocks and units")._asdict()}
    assert gpu_table(result)[0] == ("layer", "type", "forward ms", "TFLOP/s", "GB/s", "backward ms", "TFLOP/s", "GB/s")
    assert gpu_lines(result) == [
        "peaks of NVIDIA Test in bfloat16: 100 GB/s (clocks and units)",
        "shares of the peaks are left out: one of the two is not known of this GPU",
    ]
    assert gpu_lines(timed(None))[0] == "peaks of this GPU in bfloat16: not known"


def test_an_emulated_gpu_says_so(cuda: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CAFFELITE_CUDA_DRIVER", "emulator")
    (tmp_path / "n.prototxt").write_text(NET)
    command = ("time", "--model", str(tmp_path / "n.prototxt"), "--iterations", "1")
    out, _ = said(capsys, *command, "--gpu", "0")
    assert out.startswith("n, phase TRAIN, cuda (emulated), float32, batch 2, medians of 1 rounds\n")
    assert out.endswith("emulated: the times are those of this machine's CPU and say nothing of a GPU\n")
    found = json.loads(said(capsys, *command, "--gpu", "0", "--json")[0])
    assert (found["backend"], found["driver"]) == ("cuda", "emulator")
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["r"]["forward_bytes"] == 8 * C
    assert layers["r"]["forward_gb_per_s"] == pytest.approx(8 * C / layers["r"]["forward_ms"] / 1e6)
    assert layers["c"]["forward_ms"] > 0
    on_cpu = json.loads(said(capsys, *command, "--backend", "numpy", "--json")[0])
    assert not {"driver", "peaks", "peak_device_mb"} & set(on_cpu)
    assert set(on_cpu["layers"][0]) == {"name", "type", "forward_ms", "backward_ms", "forward_gflops", "backward_gflops", "fused", "backward_fused"}
    assert "emulated" not in said(capsys, *command, "--backend", "numpy")[0]
