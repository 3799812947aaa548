"""caffelite: a Caffe-style engine in Python.

`import caffelite as caffe` offers what programs use of pycaffe: Net, Classifier, get_solver, SGDSolver and its siblings, io, NetSpec with
layers, params and to_proto, proto.caffe_pb2, TRAIN, TEST, set_mode_cpu, set_mode_gpu, set_device, set_random_seed, layer_type_list. They are
imported on first use, so that `import caffelite` is quick.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

TRAIN, TEST = 0, 1

_PYCAFFE = frozenset(
    (
        *("Net", "Blob", "Layer", "get_solver", "SGDSolver", "NesterovSolver", "AdaGradSolver", "RMSPropSolver", "AdaDeltaSolver", "AdamSolver"),
        *("set_mode_cpu", "set_mode_gpu", "set_device", "set_random_seed", "layer_type_list", "io", "Classifier", "NetSpec", "to_proto"),
    )
)
_MODULES = frozenset(("layers", "params", "net_spec", "proto"))  # modules of this package that pycaffe has, too

# What else pycaffe has.
_NOT_THERE = frozenset(("draw", "Detector", "NCCL", "init_log", "log", "set_multiprocess"))

__all__ = ["TEST", "TRAIN", *sorted(_PYCAFFE)]


def __getattr__(name: str) -> Any:
    if name in _NOT_THERE:
        raise AttributeError(f"pycaffe's '{name}' is not there in caffelite, which has {', '.join(sorted(_PYCAFFE | _MODULES))}")
    if name in _MODULES:
        return import_module(f"caffelite.{name}")
    if name not in _PYCAFFE:
        raise AttributeError(f"module 'caffelite' has no attribute '{name}'")
    from caffelite import pycaffe

    return getattr(pycaffe, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_PYCAFFE, *_MODULES})
