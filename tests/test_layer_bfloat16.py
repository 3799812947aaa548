"""Every layer type with bfloat16 activations agrees with itself in float32, and bottoms of either type may be mixed."""

from __future__ import annotations

import numpy as np
import pytest
from layer_harness import Rig, all_different, clear_of_zero

from caffelite.backends.contract import Backend

X = (2, 4, 5, 6)
# text, shapes of the bottoms ("labels": class numbers), shapes of the parameters, number of tops
CASES = {
    "convolution": ('type: "Convolution" convolution_param { num_output: 6 kernel_size: 3 pad: 1 group: 2 }', [X], [(6, 2, 3, 3), (6,)], 1),
    "inner_product": ('type: "InnerProduct" inner_product_param { num_output: 5 }', [X], [(5, 120), (5,)], 1),
    "max_pool": ('type: "Pooling" pooling_param { kernel_size: 3 stride: 2 }', [X], [], 2),
    "ave_pool": ('type: "Pooling" pooling_param { pool: AVE kernel_size: 3 stride: 2 pad: 1 }', [X], [], 1),
    "lrn": ('type: "LRN" lrn_param { local_size: 3 }', [X], [], 1),
    "lrn_within": ('type: "LRN" lrn_param { local_size: 3 norm_region: WITHIN_CHANNEL }', [X], [], 1),
    "relu": ('type: "ReLU"', [X], [], 1),
    "relu_negative": ('type: "ReLU" relu_param { negative_slope: -0.5 }', [X], [], 1),
    "prelu": ('type: "PReLU"', [X], [(4,)], 1),
    "elu": ('type: "ELU" elu_param { alpha: -1 }', [X], [], 1),
    "sigmoid": ('type: "Sigmoid"', [X], [], 1),
    "tanh": ('type: "TanH"', [X], [], 1),
    "power": ('type: "Power" power_param { power: 2 shift: 1 }', [X], [], 1),
    "dropout": ('type: "Dropout"', [X], [], 1),
    "scale": ('type: "Scale" scale_param { bias_term: true }', [X], [(4,), (4,)], 1),
    "scale_by": ('type: "Scale"', [X, (4, 5)], [], 1),
    "bias": ('type: "Bias"', [X, (4,)], [], 1),
    "concat": ('type: "Concat"', [X, X], [], 1),
    "slice": ('type: "Slice"', [X], [], 2),
    "eltwise_sum": ('type: "Eltwise" eltwise_param { coeff: 1 coeff: -0.5 }', [X, X], [], 1),
    "eltwise_product": ('type: "Eltwise" eltwise_param { operation: PROD }', [X, X], [], 1),
    "eltwise_max": ('type: "Eltwise" eltwise_param { operation: MAX }', [X, X], [], 1),
    "flatten": ('type: "Flatten"', [X], [], 1),
    "reshape": ('type: "Reshape" reshape_param { shape { dim: 4 dim: 3 dim: 2 dim: -1 } }', [X], [], 1),
    "softmax": ('type: "Softmax"', [X], [], 1),
    "softmax_loss": ('type: "SoftmaxWithLoss"', [(6, 5), "labels"], [], 1),
    "euclidean_loss": ('type: "EuclideanLoss"', [X, X], [], 1),
    "accuracy": ('type: "Accuracy"', [(6, 5), "labels"], [], 1),
}


def run(backend: Backend, case: str, dtype: str, mixed: bool) -> list[np.ndarray]:
    text, shapes, param_shapes, tops = CASES[case]
    rng = np.random.default_rng(3)
    make = all_different if "max" in case else clear_of_zero
    values = [np.array([0.0, 3, 4, 1, 2, 2]) if shape == "labels" else make(rng, *shape) for shape in shapes]
    params = [rng.uniform(0.2, 0.8, shape) for shape in param_shapes]
    values, params = ([v.astype(np.float32).view(np.uint32) & 0xFFFF0000 for v in group] for group in (values, params))  # exact in bfloat16
    values, params = ([v.astype(np.uint32).view(np.float32).astype(np.float64) for v in group] for group in (values, params))
    types = [("float32" if shape == "labels" or (mixed and i == 0) else dtype) for i, shape in enumerate(shapes)]
    rig = Rig(backend, text, values, params, tops=tops, dtype=dtype, bottom_types=types)
    got = rig.forward()
    if rig.layer.differentiable == ():
        return got
    down = [rig.layer.differentiable is None or i in rig.layer.differentiable for i in range(len(values))]
    dbottoms = rig.backward(*[rng.uniform(0.5, 1, top.shape) for top in rig.tops], down=down)
    return [*got, *[d for d, wanted in zip(dbottoms, down) if wanted], *rig.gradients()]


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_float32(backend: Backend, reference: Backend, case: str, mixed: bool) -> None:
    for got, want in zip(run(backend, case, "bfloat16", mixed), run(reference, case, "float32", False), strict=True):
        # bfloat16 keeps 8 bits, 2^-9 a rounding; results pass through a few, and softmax's gradient is a small difference of large terms
        np.testing.assert_allclose(got, want, rtol=0, atol=0.025 * (np.abs(want).max() + 1e-3))
