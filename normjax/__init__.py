"""normjax: the normalization toolkit for JAX and Flax, as pure functions.

Flax modules are in `normjax.linen`, which is never imported from here.
"""

from normjax._fused import add_layer_norm as add_layer_norm
from normjax._fused import add_rms_norm as add_rms_norm
from normjax._measure import moments as moments
from normjax._moments import Moments as Moments
from normjax._moments import merge as merge
from normjax._normalize import normalize as normalize
from normjax._norms import batch_norm as batch_norm
from normjax._norms import group_norm as group_norm
from normjax._norms import instance_norm as instance_norm
from normjax._norms import layer_norm as layer_norm
from normjax._norms import rms_norm as rms_norm
from normjax._remat import remat_policy as remat_policy
from normjax._running import RunningMoments as RunningMoments
from normjax.kernels.choice import set_implementation as set_implementation

__version__ = "0.1.0"
