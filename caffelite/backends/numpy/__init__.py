"""The plainest correct implementation of every op: the reference of all backends, and the portable fall-back.

Works on float32, bfloat16 and float64 arrays of any strides; float64 ones are computed in float64 (gradient checks).
"""

from caffelite.backends.numpy.activations import Activations
from caffelite.backends.numpy.batch_norm import BatchNorm
from caffelite.backends.numpy.convolution import Convolution
from caffelite.backends.numpy.dropout import Dropout
from caffelite.backends.numpy.eltwise import Eltwise
from caffelite.backends.numpy.inner_product import InnerProduct
from caffelite.backends.numpy.losses import Losses
from caffelite.backends.numpy.lrn import Lrn
from caffelite.backends.numpy.lrn_pool import LrnPool
from caffelite.backends.numpy.memory import Memory
from caffelite.backends.numpy.pool_dropout import PoolDropout
from caffelite.backends.numpy.pooling import Pooling
from caffelite.backends.numpy.scale_bias import ScaleBias
from caffelite.backends.numpy.transform import Transform
from caffelite.backends.numpy.updates import Updates


class NumpyBackend(
    Memory, Convolution, InnerProduct, LrnPool, PoolDropout, Pooling, Lrn, Activations, Dropout, BatchNorm, ScaleBias, Eltwise, Losses, Transform, Updates
):
    """Implements caffelite.backends.contract.Backend with NumPy. threads: for long passes over flat arrays; None: all cores."""
