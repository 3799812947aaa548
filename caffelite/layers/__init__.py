"""All layer types; importing this package registers each under Caffe's name.

For programs it is pycaffe's `layers` as well: under the names of layer types it has the functions that write such layers (net_spec.py).
"""

from typing import TYPE_CHECKING, Any

from caffelite.layers import (
    accuracy,
    batch_norm,
    bias,
    concat,
    convolution,
    data,
    dropout,
    dummy_data,
    eltwise,
    elu,
    euclidean_loss,
    flatten,
    inner_product,
    input,
    lrn,
    pooling,
    power,
    prelu,
    relu,
    reshape,
    scale,
    sigmoid,
    silence,
    slice,
    softmax,
    softmax_loss,
    split,
    tanh,
)

__all__ = [
    "accuracy",
    "batch_norm",
    "bias",
    "concat",
    "convolution",
    "data",
    "dropout",
    "dummy_data",
    "eltwise",
    "elu",
    "euclidean_loss",
    "flatten",
    "inner_product",
    "input",
    "lrn",
    "pooling",
    "power",
    "prelu",
    "relu",
    "reshape",
    "scale",
    "sigmoid",
    "silence",
    "slice",
    "softmax",
    "softmax_loss",
    "split",
    "tanh",
]

if not TYPE_CHECKING:  # so that a misspelt import is still found

    def __getattr__(name: str) -> Any:
        if not name[:1].isupper():
            raise AttributeError(f"module 'caffelite.layers' has no attribute '{name}'")
        from caffelite.net_spec import layer_function

        return layer_function(name)
