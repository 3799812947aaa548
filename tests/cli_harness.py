"""A small data set, net and solver for tests of the command line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_samples import Pixels, raw, write_lmdb

from caffelite.__main__ import main

NET = """name: "small"
layer { name: "data" type: "Data" top: "data" top: "label"
  data_param { source: "db" batch_size: 6 backend: LMDB } transform_param { crop_size: 6 scale: 0.01 } }
layer { name: "conv" type: "Convolution" bottom: "data" top: "conv" convolution_param { num_output: 4 kernel_size: 3 weight_filler { type: "msra" } } }
layer { name: "ip" type: "InnerProduct" bottom: "conv" top: "ip" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "loss" type: "SoftmaxWithLoss" bottom: "ip" bottom: "label" top: "loss" }
"""
SOLVER = 'base_lr: 0.01 lr_policy: "fixed" max_iter: 4 display: 1 snapshot: 2 random_seed: 1 net: "net.prototxt" snapshot_prefix: "out/small"\n'
TRAIN = ("train", "--solver", "solver.prototxt")
TEST = ("test", "--model", "net.prototxt", "--weights")
RECORDS = 24


def pixels(number: int, size: int = 8) -> Pixels:
    """The picture of record `number`."""
    return np.random.default_rng(number).integers(0, 256, (3, size, size), np.uint8)


def values(bad: dict[int, bytes] | None = None) -> list[bytes]:
    """The records of a database of four classes, some replaced by bad ones."""
    return [(bad or {}).get(i, raw(pixels(i), i % 4)) for i in range(RECORDS)]


def make_run(folder: Path) -> Path:
    """Writes a database, a net and a solver into `folder`, and trains four iterations there (numpy)."""
    write_lmdb(folder / "db", values())
    (folder / "net.prototxt").write_text(NET)
    (folder / "solver.prototxt").write_text(SOLVER)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        assert main([*TRAIN, "--backend", "numpy"]) == 0
    return folder


def said(capsys: pytest.CaptureFixture[str], *argv: str, status: int = 0) -> tuple[str, str]:
    """Runs a command; its output and its errors."""
    capsys.readouterr()
    found = main(list(argv))
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err
