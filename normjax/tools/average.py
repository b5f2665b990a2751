"""Running averages of a model's variables, weights and statistics alike."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from normjax import _check
from normjax.tools.models import leaves, path_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningVariables:
    """An exponential average of a model's variables, without the bias of its start.

    After t updates with variables v_1 ... v_t it is ``sum_i(w_i * v_i) / sum_i(w_i)``
    with ``w_i = (1 - momentum) * momentum**(t - i)``, as of ``optax.ema``: reading
    after one update gives exactly that update. Running statistics are averaged along
    with the weights that they belong to, as in timm's ``ModelEma``; they are not quite
    those that the averaged weights have. What is no quantity to average, such as
    integers, booleans, random keys and the count of a batch norm, is that of the last
    update. A frozen pytree: `update` returns a new one.

    Attributes:
      values: the tree of averages, in at least float32: in half precision what a
        momentum near 1 adds would be lost.
      weight: sum of the weights so far, from 0 before any update towards 1.
      dtypes: of the variables, in the order of ``jax.tree.leaves``.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> variables = {"params": {"scale": jnp.array([1.0])}}
      >>> running = tools.RunningVariables.init(variables)
      >>> running = running.update(variables, momentum=0.9)
      >>> running.read()
      {'params': {'scale': Array([1.], dtype=float32)}}
    """

    values: Any
    weight: Any
    dtypes: tuple[Any, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def init(cls, variables: Any) -> "RunningVariables":
        """Returns an average that has seen nothing.

        Args:
          variables: a tree of arrays: linen's variables, ``nnx.state(model)``.

        Example:
          >>> import jax.numpy as jnp
          >>> from normjax import tools
          >>> tools.RunningVariables.init({"scale": jnp.ones(2)}).weight
          Array(0., dtype=float32)
        """
        arrays = jax.tree.map(jnp.asarray, variables)
        averaged = _averaged(arrays)
        values = jax.tree.map(
            lambda a, of: jnp.zeros(a.shape, _wide(a.dtype)) if of else jnp.copy(a),
            arrays,
            averaged,
        )
        dtypes = tuple(a.dtype for a in jax.tree.leaves(arrays))
        return cls(values, jnp.zeros(()), dtypes)

    def update(self, variables: Any, momentum: Any = 0.999) -> "RunningVariables":
        """Returns the average after one more update.

        Args:
          variables: a tree like that of `init`.
          momentum: the part of the OLD value that is kept, in [0, 1], which timm and
            optax call decay. It may differ from call to call.

        Returns:
          A new average; this one does not change.

        Raises:
          ValueError: if the trees differ, or a concrete momentum is outside [0, 1].

        Example:
          >>> import jax.numpy as jnp
          >>> from normjax import tools
          >>> running = tools.RunningVariables.init({"scale": jnp.ones(1)})
          >>> running = running.update({"scale": jnp.array([1.0])}, momentum=0.5)
          >>> running = running.update({"scale": jnp.array([4.0])}, momentum=0.5)
          >>> running.read()["scale"]
          Array([3.], dtype=float32)
        """
        momentum = _check.momentum("RunningVariables.update", momentum)
        _check_like(self.values, variables)
        momentum = jnp.asarray(momentum, self.weight.dtype)
        weight = momentum * self.weight + (1 - momentum)
        # The new value's part of the new total: 1 at the first update, which then
        # replaces the zeros of the start exactly.
        part = (1 - momentum) / jnp.where(weight > 0, weight, 1)

        def blend(old: jax.Array, new: Any, of: bool) -> jax.Array:
            new = jnp.asarray(new)
            if not of:
                return jnp.copy(new)
            real = jnp.finfo(old.dtype).dtype
            return old + part.astype(real) * (new.astype(old.dtype) - old)

        values = jax.tree.map(blend, self.values, variables, _averaged(self.values))
        return RunningVariables(values, weight, self.dtypes)

    def read(self) -> Any:
        """Returns the averaged variables, in their own dtypes.

        Raises:
          ValueError: if there was no update yet; under jit that cannot be seen.

        Example:
          >>> import jax.numpy as jnp
          >>> from normjax import tools
          >>> variables = {"scale": jnp.ones(1, jnp.bfloat16)}
          >>> running = tools.RunningVariables.init(variables)
          >>> running.update(variables).read()["scale"]
          Array([1], dtype=bfloat16)
        """
        if _check.is_concrete(self.weight) and not self.weight:
            raise _check.error(
                ValueError,
                "RunningVariables.read",
                "there must be an update before there is an average",
                "none so far",
                "Call update with the variables of a step",
            )
        arrays, structure = jax.tree.flatten(self.values)
        own = [
            a if a.dtype == of else a.astype(of)
            for a, of in zip(arrays, self.dtypes, strict=True)
        ]
        return jax.tree.unflatten(structure, own)


def _wide(dtype: Any) -> Any:
    return jnp.promote_types(dtype, jnp.float32)


def _averaged(tree: Any) -> Any:
    """Whether each array is a quantity to average, as a tree of booleans."""
    names = {path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)}

    def averaged(keys: tuple, a: jax.Array) -> bool:
        path = path_of(keys)
        counts = any(  # a count beside a mean and a var, in nnx of variables
            path[i:][:1] in (("count",), ("skipped",))
            and {(*path[:i], n, *path[i:][1:]) for n in ("mean", "var")} <= names
            for i in (-1, -2)
        )
        return jnp.issubdtype(a.dtype, jnp.inexact) and not counts

    return jax.tree_util.tree_map_with_path(averaged, tree)


def _check_like(values: Any, variables: Any) -> None:
    """Refuses variables that are not those of the average."""
    ours, theirs = (
        {"/".join(path): jnp.shape(a) for path, a in leaves(tree).items()}
        for tree in (values, variables)
    )
    facts = [
        f"{path} of shape {shape} in the average, {theirs.get(path, 'none')} given"
        for path, shape in ours.items()
        if theirs.get(path) != shape
    ]
    facts += [f"{path}, not in the average" for path in theirs if path not in ours]
    structures = {jax.tree.structure(tree) for tree in (values, variables)}
    if facts or len(structures) > 1:
        raise _check.error(
            ValueError,
            "RunningVariables.update",
            "variables must be those that the average began with",
            facts[0] if facts else f"a {type(variables).__name__} of another structure",
            "Pass the whole tree each time, or begin anew with RunningVariables.init",
        )
