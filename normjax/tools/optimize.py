"""What an optimizer is told about the norms of a model."""

from collections.abc import Mapping
from typing import Any

import jax

from normjax import _check
from normjax.tools.models import Norm, is_variable, leaves, matches, path_of, patterns


def labels(params: Any, groups: Mapping[str, Any], *, other: str = "other") -> Any:
    """Labels parameters by the norms they are of, or by their paths.

    They are what ``optax.multi_transform`` takes: with ``optax.set_to_zero()`` for a
    label its parameters stay as they are.

    Args:
      params: parameters: of linen ``variables["params"]``; of nnx
        ``nnx.state(model, nnx.Param)``.
      groups: for each label the norms, as `find_norms` finds them, or a pattern of
        paths, or several: ``"encoder/*"``. A pattern that matches a module stands for
        all in it; ``*`` stands for any characters, slashes too. Where several match,
        the first counts.
      other: the label of all other parameters.

    Returns:
      A tree like ``params`` with a label for each array.

    Raises:
      TypeError: if a group is neither norms nor patterns.
      ValueError: if a group is empty, or has no parameters here.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> from normjax import tools
      >>> model, x = nn.Sequential([nn.Dense(2), nn.LayerNorm()]), jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> labels = tools.labels(params, {"norm": tools.find_norms(model, x)})
      >>> labels["layers_0"]["kernel"], labels["layers_1"]["scale"]
      ('other', 'norm')
      >>> transforms = {"norm": optax.set_to_zero(), "other": optax.adamw(1e-3)}
      >>> optimizer = optax.multi_transform(transforms, labels)
    """
    found = {path: other for path in leaves(params)}
    for label, group in reversed([*groups.items()]):
        for path in _paths("labels", group, list(found)):
            found[path] = label
    return _by_path(found, params)


def decay_mask(params: Any, norms: list[Norm], *, biases: bool = True) -> Any:
    """Says which parameters weight decay is for: all but those of the norms.

    Args:
      params: parameters: of linen ``variables["params"]``; of nnx
        ``nnx.state(model, nnx.Param)``.
      norms: the norms, as `find_norms` finds them.
      biases: whether the biases of other layers decay, which Flax calls ``bias``.

    Returns:
      A tree like ``params`` of booleans, for the argument ``mask`` of ``optax.adamw``
      or of ``optax.add_decayed_weights``.

    Raises:
      ValueError: if there are no norms, or their parameters are not in ``params``.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> import optax
      >>> from normjax import tools
      >>> model, x = nn.Sequential([nn.Dense(2), nn.LayerNorm()]), jnp.ones((1, 3))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> mask = tools.decay_mask(params, tools.find_norms(model, x), biases=False)
      >>> mask["layers_0"]
      {'bias': False, 'kernel': True}
      >>> optimizer = optax.adamw(1e-3, weight_decay=0.1, mask=mask)
    """
    found = {path: biases or _name(path) != "bias" for path in leaves(params)}
    for path in _paths("decay_mask", norms, list(found)):
        found[path] = False
    return _by_path(found, params)


def _paths(name: str, group: Any, there: list[tuple]) -> list[tuple]:
    """The paths of the parameters of norms, or those that match patterns."""
    of_norms = isinstance(group, list) and all(isinstance(g, Norm) for g in group)
    if of_norms and not group:
        raise _check.error(
            ValueError,
            name,
            "norms must be those of the model",
            "none",
            "Pass tools.find_norms(model, ...), of a model that has some",
        )
    if of_norms:
        below = {
            "/".join(norm.path): [p for p in there if p[: len(norm.path)] == norm.path]
            for norm in group
            if _has_parameters(norm.module, there, norm.path)
        }
    else:
        below = {
            pattern: [p for p in there if matches(pattern, p)]
            for pattern in patterns(name, group)
        }
    for what, found in below.items():
        if not found:
            raise _check.error(
                ValueError,
                name,
                f"params must have parameters at {what or 'the norm'}",
                f"those at {_shortly(there)}",
                'Pass variables["params"] or nnx.state(model, nnx.Param) of this model,'
                " and patterns of their paths",
            )
    return [path for found in below.values() for path in found]


def _has_parameters(module: Any, there: list[tuple], path: tuple) -> bool:
    """Whether a norm has parameters; of a class without Flax's fields, those it has."""
    if not hasattr(module, "use_scale"):
        return any(p[: len(path)] == path for p in there)
    return module.use_scale or getattr(module, "use_bias", False)


def _name(path: tuple) -> str:
    """What an array is called, be it boxed, as in a file of partitioned parameters."""
    boxed = len(path) > 1 and path[-1] == "value"
    return path[-2 if boxed else -1]


def _shortly(paths: list[tuple], most: int = 12) -> str:
    """Paths in words, not all of very many."""
    words = ["/".join(path) for path in paths[:most]]
    more = len(paths) - len(words)
    return ", ".join([*words, *([f"{more} more"] if more else [])]) or "none"


def _by_path(found: dict, tree: Any) -> Any:
    """The tree with what was found for each path."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, _: found[path_of(keys)], tree, is_leaf=is_variable
    )
