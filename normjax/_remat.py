"""What to keep for the backward pass, and what to compute again."""

from typing import Any

from normjax._formula import MOMENTS

# Operations on single elements, and of shape: XLA makes them part of what uses them.
# One that a later JAX adds is kept until it stands here. From its moments, which are
# kept, a norm is one, too.
_CHEAP = frozenset(
    """
    abs add add_any and bitcast_convert_type broadcast_in_dim ceil clamp complex
    concatenate conj convert_element_type copy cos div eq erf exp exp2 expand_dims expm1
    floor ge gt imag integer_pow iota is_finite le log log1p logistic lt max min mul ne
    neg norm not one_minus_square optimization_barrier or own pad pow real
    reduce_precision rem reshape rev round rsqrt select_n sign sin slice split sqrt
    square squeeze stop_gradient sub tanh transpose xor
    """.split()
)
# Calls of functions, such as jax.nn.relu, and the parameter that has what they do.
_CALLS = {"custom_jvp_call": "call_jaxpr", "jit": "jaxpr", "pjit": "jaxpr"}


def remat_policy(prim: Any, *avals: Any, **params: Any) -> bool:
    """Computes outputs of norms and activations again, and keeps what is costly.

    A policy for `jax.checkpoint`, ``flax.linen.remat`` and ``flax.nnx.remat``. Much of
    what a network keeps for its backward pass are outputs of norms and activations on
    their way to the next convolution or matrix product. They follow, element by
    element, from what is kept anyway and from the moments, which this policy keeps by
    their name, ``norm_moments``: no sum is taken twice, and nothing is sent between
    devices twice. Wrap a block of the network with it, rather than the whole.

    Args:
      prim: the operation whose result may be kept.
      *avals: what it is applied to.
      **params: parameters of the operation.

    Returns:
      Whether to keep it: False for operations on single elements and of shape.

    Example:
      >>> import jax, jax.numpy as jnp, normjax
      >>> def layer(w, x):
      ...     return jax.nn.relu(normjax.layer_norm(x @ w))
      >>> layer = jax.checkpoint(layer, policy=normjax.remat_policy)
      >>> jax.grad(lambda w: layer(w, jnp.ones((4, 2))).sum())(jnp.eye(2)).shape
      (2, 2)
    """
    if prim.name == "name":
        return params["name"] == MOMENTS
    return not _is_cheap(prim, params)


def _is_cheap(prim: Any, params: dict[str, Any]) -> bool:
    """Whether an operation, or all those that a call is of, work on single elements.

    A reduction by them is none.
    """
    if prim.name not in _CALLS:
        return prim.name in _CHEAP
    inner = params[_CALLS[prim.name]]
    return all(_is_cheap(e.primitive, e.params) for e in inner.eqns)
