"""What is done to the data and the variables of a whole model.

Pure functions on plain trees of arrays: linen's dictionaries, nnx's pure dictionaries.
"""

from normjax.tools.average import RunningVariables as RunningVariables
from normjax.tools.batches import global_batch as global_batch
from normjax.tools.batches import pad_batch as pad_batch
from normjax.tools.convert import from_equinox as from_equinox
from normjax.tools.convert import from_haiku as from_haiku
from normjax.tools.convert import from_keras as from_keras
from normjax.tools.convert import from_torch as from_torch
from normjax.tools.convert import to_equinox as to_equinox
from normjax.tools.convert import to_haiku as to_haiku
from normjax.tools.convert import to_keras as to_keras
from normjax.tools.convert import to_torch as to_torch
from normjax.tools.doctor import Finding as Finding
from normjax.tools.doctor import Report as Report
from normjax.tools.doctor import doctor as doctor
from normjax.tools.files import read_weights as read_weights
from normjax.tools.files import write_weights as write_weights
from normjax.tools.fold import Folded as Folded
from normjax.tools.fold import FoldReport as FoldReport
from normjax.tools.fold import fold as fold
from normjax.tools.freeze import freeze as freeze
from normjax.tools.freeze import unfreeze as unfreeze
from normjax.tools.keras_names import keras_names as keras_names
from normjax.tools.looks import Look as Look
from normjax.tools.looks import Rate as Rate
from normjax.tools.looks import effective_rates as effective_rates
from normjax.tools.looks import look as look
from normjax.tools.looks import scalars as scalars
from normjax.tools.models import Norm as Norm
from normjax.tools.models import find_norms as find_norms
from normjax.tools.optimize import decay_mask as decay_mask
from normjax.tools.optimize import labels as labels
from normjax.tools.plots import plot as plot
from normjax.tools.plots import plot_table as plot_table
from normjax.tools.presets import preset as preset
from normjax.tools.recalibrate import Moved as Moved
from normjax.tools.recalibrate import Recalibrated as Recalibrated
from normjax.tools.recalibrate import recalibrate as recalibrate
from normjax.tools.replace import find_dropped as find_dropped
from normjax.tools.replace import replace as replace
from normjax.tools.replace_linen import Replaced as Replaced
from normjax.tools.replicas import Drift as Drift
from normjax.tools.replicas import checksum as checksum
from normjax.tools.replicas import find_drift as find_drift
from normjax.tools.replicas import merge_replicas as merge_replicas
from normjax.tools.tables import Row as Row
from normjax.tools.tables import norm_table as norm_table
from normjax.tools.tent import entropy as entropy
from normjax.tools.tent import tent as tent
