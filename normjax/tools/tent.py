"""Tent: adaptation while testing, of the norms' parameters alone."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from normjax import _check, _numbers
from normjax.tools.models import Norm, path_of


def entropy(logits: Any) -> jax.Array:
    """Returns the entropy of predictions, in nats.

    ``-sum(p * log(p))`` with ``p = softmax(logits)``: the loss of tent,
    https://arxiv.org/abs/2006.10726. It needs no labels.

    Args:
      logits: ``[..., classes]``, floating and real.

    Returns:
      ``[...]``, in at least float32: from 0, where one class is certain, to
      ``log(classes)``.

    Raises:
      TypeError: if logits are integers or complex.
      ValueError: if logits have no axis.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> tools.entropy(jnp.array([[0.0, 0.0], [0.0, 100.0]])).round(3)
      Array([0.693, 0.   ], dtype=float32)
    """
    logits = jnp.asarray(logits)
    if not jnp.issubdtype(logits.dtype, jnp.floating) or not logits.ndim:
        kind = ValueError if logits.ndim == 0 else TypeError
        raise _check.error(
            kind,
            "entropy",
            "logits must be real and floating, with classes along the last axis",
            f"logits of {logits.dtype}, shape {logits.shape}",
            "Pass what the model returns before softmax",
        )
    log_p = jax.nn.log_softmax(logits.astype(_numbers.statistics_dtype(logits)))
    p = jnp.exp(log_p)  # 0 for a class whose logit is -inf
    return (p * jnp.where(p > 0, -log_p, 0)).sum(-1)


def tent(optimizer: Any, params: Any, norms: Iterable[Norm]) -> Any:
    """Returns an optimizer of the norms' scales and biases, which leaves all else.

    Tent, https://arxiv.org/abs/2006.10726: while testing on data of another domain,
    normalize by the statistics of the batch, and step by step make the predictions more
    certain, with `entropy` as the loss, by scales and biases alone. The optimizer keeps
    state for those alone, too.

    Args:
      optimizer: an ``optax.GradientTransformation`` for them; the paper's are SGD with
        momentum 0.9 and Adam, of a small learning rate.
      params: the parameters ``variables["params"]``, or for nnx
        ``nnx.state(model, nnx.Param)``.
      norms: what `find_norms` found; leave out those that are to stay.

    Returns:
      An ``optax.GradientTransformation`` for all of ``params``, the updates of which
      are zero but for the norms.

    Raises:
      ValueError: if a norm has no scale and no bias in ``params``.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp, optax
      >>> from normjax import linen, tools
      >>> model = nn.Sequential([nn.Dense(2), linen.BatchNorm(normalize_with="batch")])
      >>> x = jnp.arange(8.0).reshape(4, 2)
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> optimizer = tools.tent(optax.sgd(0.1), params, tools.find_norms(model, x))
      >>> ones = jax.tree.map(jnp.ones_like, params)
      >>> updates, _ = optimizer.update(ones, optimizer.init(params))
      >>> updates["layers_0"]["bias"], updates["layers_1"]["bias"]
      (Array([0., 0.], dtype=float32), Array([-0.1, -0.1], dtype=float32))
    """
    import optax

    paths = {tuple(map(str, norm.path)) for norm in norms}

    def is_of_norm(path: Any) -> bool:
        return path[:-1] in paths and path[-1] in ("scale", "bias")

    def labels(
        tree: Any,
    ) -> Any:  # of parameters, or of what an optimizer makes of them
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "norm" if is_of_norm(path_of(path)) else "rest", tree
        )

    leaves = jax.tree_util.tree_leaves_with_path(params)
    found = {path_of(path)[:-1] for path, _ in leaves if is_of_norm(path_of(path))}
    missing = sorted("/".join(path) for path in paths - found)
    if missing or not paths:
        raise _check.error(
            ValueError,
            "tent",
            "params must have the scale or the bias of each norm",
            f"none of {', '.join(missing)}" if missing else "no norms",
            'Pass variables["params"] or nnx.state(model, nnx.Param), and the norms of'
            " find_norms that have either",
        )
    return optax.multi_transform(
        {"norm": optimizer, "rest": optax.set_to_zero()}, labels
    )
