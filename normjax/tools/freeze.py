"""Batch norms with frozen statistics."""

from collections.abc import Mapping
from typing import Any

from normjax.tools.kinds import checked_kinds
from normjax.tools.models import patterns
from normjax.tools.replace import replaced
from normjax.tools.replace_rules import Rule


def freeze(
    model: Any, paths: Any = "*", *, kinds: Mapping[type, str | None] | None = None
) -> Any:
    """Freezes the statistics of a model's batch norms.

    They normalize by their running statistics, and leave them as they are, whatever the
    call says and whatever ``train()`` sets. Each is then the affine map
    ``x * (scale * rstd) + (bias - mean * scale * rstd)``, with
    ``rstd = 1 / sqrt(var + epsilon)``, and has its gradients: what fine-tuning on small
    batches needs. Their parameters are trained, unless the optimizer leaves them out:
    see `labels`.

    Args:
      model: a linen or nnx module, or what `replace` returned.
      paths: a pattern of paths, or several: ``"encoder/*"``. A pattern that matches a
        module stands for all in it; ``*`` stands for any characters, slashes too.
      kinds: which norms classes of your own are, as of `find_norms`:
        ``{MyBatchNorm: "BatchNorm"}``. Such a norm stays what it is, and is told to use
        its running statistics, by a field or an argument of its call that is
        ``use_running_average``, ``deterministic``, ``train``, ``training`` or
        ``is_training``.

    Returns:
      For nnx a copy of the model. For linen a `Replaced`, a module that is used as the
      model is, for the same variables.

    Raises:
      TypeError: if model is no module.
      ValueError: if a pattern matches no batch norm; for linen in its calls.

    Warns:
      UserWarning: if a module that matches looks like a batch norm, but its class is
        unknown.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import tools
      >>> model = nn.BatchNorm()
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = model.init(jax.random.key(0), x, use_running_average=False)
      >>> frozen = tools.freeze(model)
      >>> y, updates = frozen.apply(
      ...     variables, x, use_running_average=False, mutable=["batch_stats"]
      ... )
      >>> y.round(1).tolist(), updates["batch_stats"]["mean"]
      ([[1.0], [3.0]], Array([0.], dtype=float32))
    """
    of, kinds = patterns("freeze", paths), checked_kinds("freeze", kinds)
    return replaced(model, Rule("freeze", "batch", "frozen", of, {}, kinds))


def unfreeze(
    model: Any, paths: Any = "*", *, kinds: Mapping[type, str | None] | None = None
) -> Any:
    """Takes `freeze` back: each norm uses its statistics as it did before.

    A norm that the model itself has frozen, by its fields ``normalize_with="running"``
    and ``update_statistics=False``, has None for both then: its calls and ``train()``
    decide. A norm of Flax in an nnx model comes back as normjax's, which does the same.

    Args:
      model: what `freeze` returned, or a model with such norms.
      paths: a pattern of paths, or several, as of `freeze`.
      kinds: as of `freeze`.

    Returns:
      What `freeze` returns.

    Raises:
      TypeError: if model is no module.
      ValueError: if a pattern matches no frozen batch norm; for linen in its calls.

    Example:
      >>> from flax import nnx
      >>> from normjax import tools
      >>> frozen = tools.freeze(nnx.BatchNorm(2, rngs=nnx.Rngs(0)))
      >>> frozen.normalize_with, tools.unfreeze(frozen).normalize_with
      ('running', None)
    """
    of, kinds = patterns("unfreeze", paths), checked_kinds("unfreeze", kinds)
    return replaced(model, Rule("unfreeze", "batch", "unfrozen", of, {}, kinds))
