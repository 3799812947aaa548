"""caffe.Classifier: ten crops or one, prepared, through the net and averaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import caffelite as caffe
from caffelite.errors import SpecError
from caffelite.pycaffe.settings import settings

NET = """
layer { name: "data" type: "Input" top: "data" input_param { shape { dim: 3 dim: 3 dim: 4 dim: 5 } } }
layer { name: "score" type: "InnerProduct" bottom: "data" top: "score" inner_product_param { num_output: 4 weight_filler { type: "xavier" } } }
layer { name: "prob" type: "Softmax" bottom: "score" top: "prob" }
"""


@pytest.fixture(autouse=True, params=["cpu", "gpu"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs in both of pycaffe's modes."""
    if request.param == "gpu":
        request.getfixturevalue("cuda")
    monkeypatch.setattr(settings, "gpu", request.param == "gpu")
    monkeypatch.setattr(settings, "seed", 3)


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, str]:
    net, weights = str(tmp_path / "net.prototxt"), str(tmp_path / "net.caffemodel")
    Path(net).write_text(NET)
    caffe.Net(net, caffe.TEST).save(weights)
    return net, weights


def probabilities(net: caffe.Net, prepared: np.ndarray) -> np.ndarray:
    """The net in float64."""
    weights, bias = (param.data.astype(np.float64) for param in net.params["score"])
    powers = np.exp(prepared.reshape(len(prepared), -1) @ weights.T + bias)
    return powers / powers.sum(1, keepdims=True)


def test_predictions_are_means_over_ten_crops(files: tuple[str, str], rng: np.random.Generator) -> None:
    net = caffe.Classifier(*files, image_dims=(6, 8), mean=np.array([1.0, 2.0, 3.0]), input_scale=0.5, raw_scale=4, channel_swap=(2, 1, 0))
    images = [rng.random((6, 8, 3)), rng.random((9, 7, 3))]
    crops = []
    for image in (images[0], caffe.io.resize_image(images[1], (6, 8))):
        cut = [image[y : y + 4, x : x + 5] for y, x in ((0, 0), (0, 3), (2, 0), (2, 3), (1, 1))]
        crops += [*cut, *(crop[:, ::-1] for crop in cut)]
    prepared = (np.array(crops)[:, :, :, ::-1].transpose(0, 3, 1, 2) * 4 - np.array([1.0, 2, 3])[:, None, None]) * 0.5
    each = probabilities(net, prepared)
    predicted = net.predict(images)
    assert predicted.shape == (2, 4)
    np.testing.assert_allclose(predicted, each.reshape(2, 10, 4).mean(1), rtol=1e-5)
    centre = net.predict(images, oversample=False)
    np.testing.assert_allclose(centre, each[[4, 14]], rtol=1e-5)
    assert np.abs(centre - predicted).max() > 1e-3


def test_images_have_the_inputs_size_unless_told(files: tuple[str, str], rng: np.random.Generator) -> None:
    net = caffe.Classifier(*files)
    assert tuple(net.image_dims) == tuple(net.crop_dims) == (4, 5)
    image = rng.random((4, 5, 3))
    expected = probabilities(net, np.array([image, image[:, ::-1]]).transpose(0, 3, 1, 2))
    np.testing.assert_allclose(net.predict([image]), [expected.mean(0)], rtol=1e-5)
    np.testing.assert_allclose(net.predict([image], False), expected[:1], rtol=1e-5)
    assert isinstance(net, caffe.Net)
    assert net.transformer.inputs == {"data": (3, 3, 4, 5)}


def test_what_does_not_fit_is_told(files: tuple[str, str]) -> None:
    with pytest.raises(SpecError, match="a crop of 5 pixels does not fit into 4"):
        caffe.Classifier(*files, image_dims=(4, 4))
    with pytest.raises(SpecError, match=r"image_dims is \(4,\), expected height and width"):
        caffe.Classifier(*files, image_dims=(4,))
    with pytest.raises(SpecError, match="a mean of 1 values"):
        caffe.Classifier(*files, mean=np.zeros(1))
    net = caffe.Classifier(*files)
    with pytest.raises(SpecError, match="no image is given"):
        net.predict([])
    with pytest.raises(SpecError, match=r"an image of shape \(4, 5, 1\) is given, the input has 3 channel"):
        net.predict([np.zeros((4, 5, 1))])
    sourced = Path(files[0]).with_name("train.prototxt")
    sourced.write_text('layer { name: "d" type: "DummyData" top: "d" dummy_data_param { shape { dim: 1 } } }')
    with pytest.raises(SpecError, match=r"train\.prototxt has no input for images\n  give the net's deploy\.prototxt"):
        caffe.Classifier(sourced, files[1])
