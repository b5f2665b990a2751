"""What stands in an nnx model where a batch norm was that is folded."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx


class FoldedNorm(nnx.Module):
    """Stands for a norm whose scale and shift another layer has.

    Args:
      past: what it does, a function of x and ``use_running_average``.
      use_running_average: as of the norm; ``train()`` and ``eval()`` set it.

    Example:
      >>> from normjax.tools.nnx_folded import FoldedNorm
      >>> FoldedNorm(lambda x, use_running_average: x, True)(3.0)
      3.0
    """

    def __init__(self, past: Callable, use_running_average: bool | None):
        self.past = past
        self.use_running_average = use_running_average

    def __call__(
        self, x: Any, use_running_average: bool | None = None, **others: Any
    ) -> jax.Array:
        """Returns what ``past`` does with x."""
        if use_running_average is None:
            use_running_average = self.use_running_average
        return self.past(x, use_running_average, **others)
