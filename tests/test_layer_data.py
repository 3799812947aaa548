"""The Data layer in a net: shapes, types, places of errors, position."""

from __future__ import annotations

from pathlib import Path

import lmdb
import numpy as np
import pytest
from data_samples import numbered

from caffelite.backends.numpy import NumpyBackend
from caffelite.blob import Blob
from caffelite.data.source import BatchSource
from caffelite.errors import DataError, SpecError
from caffelite.layer import Layer, create_layer
from caffelite.layers.data import DataLayer
from caffelite.schema import net_from_text, pb


def layer_of(path: Path, tops: str = 'top: "data" top: "label"', data: str = "", transform: str = "", phase: int = pb.TRAIN) -> Layer:
    text = (
        f'layer {{ name: "d" type: "Data" {tops}\n data_param {{ source: "{path}" backend: LMDB batch_size: 4 {data} }}\n transform_param {{ {transform} }} }}'
    )
    spec = net_from_text(text, "net.prototxt")
    return create_layer(spec.param.layer[0], phase, spec.where.child("layer", 0))


def source_of(layer: Layer) -> BatchSource:
    assert isinstance(layer, DataLayer)
    return layer.source


def tops_of(layer: Layer) -> list[Blob]:
    tops = []
    for shape, dtype in zip(layer.infer_shapes([]), layer.top_dtypes([], "float32")):
        data = np.zeros((shape[0], *shape[2:], shape[1]), np.float32).transpose(0, 3, 1, 2) if len(shape) == 4 else np.zeros(shape, np.float32)
        tops.append(Blob("top", shape, dtype, data))
    return tops


def test_shapes_types_and_values(tmp_path: Path) -> None:
    path, images = numbered(tmp_path / "db", 6)
    layer = layer_of(path, transform="scale: 0.5 crop_size: 6", phase=pb.TEST)
    assert layer.infer_shapes([]) == [(4, 3, 6, 6), (4,)]
    assert layer.top_dtypes([], "bfloat16") == ["bfloat16", "float32"]
    tops = tops_of(layer)
    for expected in ([0, 1, 2, 3], [4, 5, 0, 1]):
        layer.feed(NumpyBackend(), tops)
        assert tops[1].data.tolist() == expected
        np.testing.assert_array_equal(tops[0].data, images[expected][:, :, 1:7, 2:8] * np.float32(0.5))
    assert source_of(layer).position == 8
    layer.close()


def test_one_top_leaves_labels_out(tmp_path: Path) -> None:
    layer = layer_of(numbered(tmp_path / "db", 6)[0], 'top: "data"')
    tops = tops_of(layer)
    assert [top.shape for top in tops] == [(4, 3, 8, 10)]
    layer.feed(NumpyBackend(), tops)
    assert tops[0].data.any()
    layer.close()


def test_the_runs_seed_counts(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 6)
    results = []
    for seed in (1, 2, 1):
        layer = layer_of(path, data="shuffle: true", transform="crop_size: 5 mirror: true")
        layer.context.seed = seed
        tops = tops_of(layer)
        layer.feed(NumpyBackend(), tops)
        results.append(tops[0].data.copy())
        layer.close()
    np.testing.assert_array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])


def test_errors_have_their_place(tmp_path: Path) -> None:
    path, _ = numbered(tmp_path / "db", 2)
    with pytest.raises(SpecError) as caught:
        layer_of(path, transform="crop_size: 30").infer_shapes([])
    assert str(caught.value).startswith("net.prototxt:3:20: layer 'd': crop_size is 30, but the images are 8x10")
    with pytest.raises(SpecError) as caught:
        layer_of(path, data="\n  rand_skip: 3")
    assert str(caught.value).startswith("net.prototxt:3:3: layer 'd': rand_skip has no effect")
    with pytest.raises(SpecError, match=r"net\.prototxt:2:\d+: .*mirror.* in"):
        layer_of(path, data="mirror: true")
    with pytest.raises(DataError) as missing:
        layer_of(tmp_path / "none").infer_shapes([])
    assert str(missing.value).startswith(f"net.prototxt:2:15: layer 'd': {tmp_path}/none: no such database\n  make it with")


@pytest.mark.testdata
def test_caffes_golden_database(testdata: Path) -> None:
    first = pb.Datum.FromString(_first_value(testdata / "golden/training/lmdb"))
    layer = layer_of(testdata / "golden/training/lmdb", transform="scale: 0.0078125 mean_value: 104 mean_value: 117 mean_value: 123")
    tops = tops_of(layer)
    layer.feed(NumpyBackend(), tops)
    assert tops[1].data.tolist() == [0, 1, 2, 3]
    expected = (np.frombuffer(first.data, np.uint8).reshape(3, 64, 64).astype(np.float64) - np.array([104, 117, 123])[:, None, None]) / 128
    np.testing.assert_allclose(tops[0].data[0], expected, rtol=1e-6)
    layer.close()


def _first_value(path: Path) -> bytes:
    with lmdb.open(str(path), readonly=True, lock=False) as environment, environment.begin() as transaction:
        return next(iter(transaction.cursor()))[1]
