"""pycaffe's names over caffelite's engine: `import caffelite as caffe`."""

from caffelite.net_spec import NetSpec, to_proto
from caffelite.pycaffe import io
from caffelite.pycaffe.classifier import Classifier
from caffelite.pycaffe.net import Blob, Layer, Net
from caffelite.pycaffe.settings import TEST, TRAIN, layer_type_list, set_device, set_mode_cpu, set_mode_gpu, set_random_seed
from caffelite.pycaffe.solvers import (
    AdaDeltaSolver,
    AdaGradSolver,
    AdamSolver,
    NesterovSolver,
    RMSPropSolver,
    SGDSolver,
    Solver,
    get_solver,
)

__all__ = [
    "TEST",
    "TRAIN",
    "AdaDeltaSolver",
    "AdaGradSolver",
    "AdamSolver",
    "Blob",
    "Classifier",
    "Layer",
    "NesterovSolver",
    "Net",
    "NetSpec",
    "RMSPropSolver",
    "SGDSolver",
    "Solver",
    "get_solver",
    "io",
    "layer_type_list",
    "set_device",
    "set_mode_cpu",
    "set_mode_gpu",
    "set_random_seed",
    "to_proto",
]
