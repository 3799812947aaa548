"""The fast CPU backend: oneDNN's primitives for the heavy ops, NumPy for the rest and for every case oneDNN has no exact rule for."""

from caffelite.backends.onednn.activations import ActivationOps
from caffelite.backends.onednn.batch_norm import BatchNormOps
from caffelite.backends.onednn.convolution import ConvolutionOps
from caffelite.backends.onednn.dropout import DropoutOps
from caffelite.backends.onednn.eltwise import EltwiseOps
from caffelite.backends.onednn.inner_product import InnerProductOps
from caffelite.backends.onednn.losses import LossOps
from caffelite.backends.onednn.lrn import LrnOps
from caffelite.backends.onednn.memory import MemoryOps
from caffelite.backends.onednn.pooling import PoolingOps
from caffelite.backends.onednn.scale_bias import ScaleBiasOps


class OneDNNBackend(MemoryOps, ConvolutionOps, InnerProductOps, PoolingOps, LrnOps, DropoutOps, EltwiseOps, ActivationOps, BatchNormOps, ScaleBiasOps, LossOps):
    """Implements caffelite.backends.contract.Backend with oneDNN. threads: None for OMP_NUM_THREADS or all processors.

    For use from one thread at a time. BackendError when the library cannot be loaded."""

    name = "onednn"
