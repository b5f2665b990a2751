"""Other norms in place of a model's, with the parameters that both have."""

from collections.abc import Mapping
from typing import Any

from normjax.tools.kinds import checked_kinds
from normjax.tools.models import leaves, system_of, variables_of
from normjax.tools.replace_linen import replaced_in_linen
from normjax.tools.replace_nnx import replaced_in_nnx
from normjax.tools.replace_rules import Rule, rule_of


def replace(
    model: Any,
    old: str,
    new: Any,
    *,
    paths: Any = "*",
    kinds: Mapping[type, str | None] | None = None,
    **fields: Any,
) -> Any:
    """Puts other norms in place of a model's, without a change of its source.

    The new norms stand at the paths of the old ones, and have their fields and their
    parameters, as far as both have them: a batch norm that becomes a group norm keeps
    its scale, bias and epsilon, and has no statistics; a layer norm that becomes an RMS
    norm loses its bias; what an RMS norm becomes has none. ``axis_name`` of a batch
    norm, which divides the batch, is not that of the others, which divide space or
    features. The new norms are those of normjax: ``replace(model, "any", "same")`` puts
    them in place of Flax's, and changes nothing else.

    Args:
      model: a linen or nnx module, or what this function returned.
      old: which norms: "batch", "layer", "rms", "group", "instance" or "any".
      new: what to put there: one of the same words but "any"; "same", the norm of
        normjax of the same kind; "synced", a batch norm over the device axes that
        ``axis_name`` says; "frozen", as `freeze` does; "none", which returns its input;
        or, for all that has no word, a function of the `Norm` that returns a module, or
        None to leave it as it is. For linen also a module itself, and the function may
        return any function of ``x``.
      paths: a pattern of paths, or several: ``"encoder/*"``. A pattern that matches a
        module stands for all in it; ``*`` stands for any characters, slashes too.
      kinds: which norms classes of your own are, as of `find_norms`: ``{MyNorm:
        "LayerNorm"}``. Such a norm is called with x first, and its fields are read by
        the names that Flax has for them.
      **fields: fields of the new norms: ``num_groups=8``, ``axis_name="batch"``.

    Returns:
      For nnx a copy of the model, whose variables are copies. For linen a `Replaced`,
      a module that is used as the model is, with ``convert`` for variables that the
      model has already.

    Raises:
      TypeError: if model is no module, or a function returns none.
      ValueError: if nothing matches, a word is unknown, groups do not divide the
        features of all the norms, or a replacement makes no sense, such as a layer norm
        with frozen statistics. For linen, where that depends on the call, in its calls.

    Warns:
      UserWarning: if a module that matches looks like a norm, but its class is unknown.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import tools
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
      >>> grouped = tools.replace(model, "batch", "group", num_groups=2)
      >>> variables = grouped.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> list(variables), grouped.apply(variables, jnp.ones((8, 3))).shape
      (['params'], (8, 4))
    """
    return replaced(model, rule_of("replace", old, new, paths, fields, kinds))


def replaced(model: Any, rule: Rule) -> Any:
    """Returns a model with its norms replaced by a rule."""
    if system_of(rule.name, model) == "linen":
        return replaced_in_linen(model, rule)
    return replaced_in_nnx(model, rule)


def with_known(
    name: str, model: Any, kinds: Mapping[type, str | None] | None, **fields: Any
) -> Any:
    """Returns a model with normjax's batch norms for those of a user's own classes.

    ``fields`` are those of norms whose class has no such field.
    """
    kinds = checked_kinds(name, kinds)
    if "BatchNorm" not in kinds.values():
        return model
    return replaced(model, Rule(name, "batch", "known", ("*",), fields, kinds))


def find_dropped(before: Any, after: Any) -> list[str]:
    """Finds the variables of a model that another one has not.

    Args:
      before: an nnx module, or a tree of arrays.
      after: the same, after a replacement.

    Returns:
      The paths of what is only in the first, ``["encoder/norm/bias"]``.

    Example:
      >>> from flax import nnx
      >>> from normjax import tools
      >>> model = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
      >>> tools.find_dropped(model, tools.replace(model, "layer", "rms"))
      ['bias']
    """
    old, new = (leaves(variables_of(tree)) for tree in (before, after))
    return ["/".join(path) for path in old if path not in new]
