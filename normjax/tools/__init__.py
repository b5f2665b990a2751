"""What is done to the data and the variables of a whole model.

Pure functions on plain trees of arrays: linen's dictionaries, nnx's pure dictionaries.
"""

from normjax.tools.batches import pad_batch as pad_batch
from normjax.tools.fold import Folded as Folded
from normjax.tools.fold import FoldReport as FoldReport
from normjax.tools.fold import fold as fold
from normjax.tools.models import Norm as Norm
from normjax.tools.models import find_norms as find_norms
from normjax.tools.replicas import Drift as Drift
from normjax.tools.replicas import checksum as checksum
from normjax.tools.replicas import find_drift as find_drift
from normjax.tools.replicas import merge_replicas as merge_replicas
