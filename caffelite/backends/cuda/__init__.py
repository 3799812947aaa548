"""The CUDA backend: kernels written here (kernels/*.cu), thin wrappers around them, and a driver that runs them on a GPU or emulates one."""

from caffelite.backends.cuda.activations import Activations
from caffelite.backends.cuda.batch_norm import BatchNorm
from caffelite.backends.cuda.convolution import Convolution
from caffelite.backends.cuda.driver import choose
from caffelite.backends.cuda.dropout import Dropout
from caffelite.backends.cuda.eltwise import Eltwise
from caffelite.backends.cuda.inner_product import InnerProduct
from caffelite.backends.cuda.losses import Losses
from caffelite.backends.cuda.lrn import Lrn
from caffelite.backends.cuda.lrn_pool import LrnPool
from caffelite.backends.cuda.memory import Memory
from caffelite.backends.cuda.pool_dropout import PoolDropout
from caffelite.backends.cuda.pooling import Pooling
from caffelite.backends.cuda.scale_bias import ScaleBias
from caffelite.backends.cuda.transform import Transform
from caffelite.backends.cuda.updates import Updates


class CudaBackend(
    Memory, Convolution, InnerProduct, LrnPool, PoolDropout, Pooling, Lrn, Activations, Dropout, BatchNorm, ScaleBias, Eltwise, Losses, Transform, Updates
):
    """Implements caffelite.backends.contract.Backend on GPU number `device`. BackendError when the driver does not load."""

    def __init__(self, device: int = 0) -> None:
        super().__init__(choose(device))
