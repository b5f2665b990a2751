"""What is done to the data and the variables of a whole model.

Pure functions on plain trees of arrays: linen's dictionaries, nnx's pure dictionaries.
"""

from normjax.tools.batches import pad_batch as pad_batch
from normjax.tools.convert import from_equinox as from_equinox
from normjax.tools.convert import from_haiku as from_haiku
from normjax.tools.convert import from_keras as from_keras
from normjax.tools.convert import from_torch as from_torch
from normjax.tools.convert import to_equinox as to_equinox
from normjax.tools.convert import to_haiku as to_haiku
from normjax.tools.convert import to_keras as to_keras
from normjax.tools.convert import to_torch as to_torch
from normjax.tools.files import read_weights as read_weights
from normjax.tools.files import write_weights as write_weights
from normjax.tools.presets import preset as preset
from normjax.tools.replicas import Drift as Drift
from normjax.tools.replicas import checksum as checksum
from normjax.tools.replicas import find_drift as find_drift
from normjax.tools.replicas import merge_replicas as merge_replicas
