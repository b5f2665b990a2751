"""The moments of a whole sweep of data, merged batch by batch, and what a sweep is."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Container, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normjax import _axes, _check, _numbers
from normjax._moments import Moments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Merged:
    """What the batches so far had for values, along the features of one norm.

    Of count, mean and var there is also what their dtype could not hold. Without it the
    rounding of each batch adds up: in float32 var would be off by 3e-5 after 20,000.

    Attributes:
      count: how many values, with ``count_rest``.
      mean: their mean, with ``mean_rest``.
      var: their biased variance, with ``var_rest``; 0 where nothing was counted.
      squares: the sum of the squared weights, the count where all are 1.
      samples: of how many samples those values were.
      updates: how many calls of the norm had values that count.
      sweep: a number for each sweep. It is part of a program's signature, so that none
        is taken for another that was compiled outside of this sweep.
    """

    count: jax.Array
    count_rest: jax.Array
    mean: jax.Array
    mean_rest: jax.Array
    var: jax.Array
    var_rest: jax.Array
    squares: jax.Array
    samples: jax.Array
    updates: jax.Array
    sweep: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def empty(cls, mean: jax.Array, sweep: int) -> "Merged":
        """Nothing merged yet; of the shape of a running mean, and complex where it is.

        In float64 where JAX has it.
        """
        dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
        of_mean = _numbers.widened(jnp.zeros((), mean.dtype), dtype).dtype
        where = getattr(mean, "sharding", None)
        if not isinstance(where, jax.sharding.NamedSharding):
            where = None
        # Each field has an array of its own: they are donated.
        zeros = {
            f.name: jnp.zeros(
                jnp.shape(mean),
                of_mean if f.name.startswith("mean") else dtype,
                device=where,
            )
            for f in dataclasses.fields(cls)
            if f.name != "sweep"
        }
        return cls(**zeros, sweep=sweep)

    def add(self, m: Moments, values_per_sample: int) -> "Merged":
        """Merges the moments of one more batch, of the same number of features.

            share = m.count / count                     delta = m.mean - mean
            mean += share * delta
            var  += share * (m.var - var + (1 - share) * delta**2)

        Each sum is exact: what it rounds off is kept beside it. The products are not,
        and so the smaller part is merged into the larger: the share is half at most.
        """
        if jnp.iscomplexobj(m.mean) and not jnp.iscomplexobj(self.mean):
            raise _check.error(
                TypeError,
                "recalibrate",
                "the running mean of complex values must be complex",
                f"values of {m.mean.dtype}, a running mean that is real",
                "Update the statistics once in training mode, which makes it so",
            )
        dtype, of_mean = self.var.dtype, self.mean.dtype
        fields = (m.count, m.carry, m.squares, m.var, m.mean, m.rest)
        dtypes = (dtype, dtype, dtype, dtype, of_mean, of_mean)
        n, n_rest, squares, of_var, near, far = (
            _axes.sharded_like(
                jnp.asarray(a).astype(t).reshape(self.mean.shape), self.mean
            )
            for a, t in zip(fields, dtypes, strict=True)
        )

        count, lost = _numbers.exact_sum(self.count, n)
        count, count_rest = _numbers.exact_sum(count, lost + (self.count_rest + n_rest))
        is_less = n <= self.count
        share = _numbers.divided(jnp.where(is_less, n, self.count), count)
        old = (self.mean, self.mean_rest, self.var, self.var_rest)
        new = (near, far, of_var, jnp.zeros_like(of_var))
        both = [*zip(old, new, strict=True)]
        mean, mean_rest, var, var_rest = (jnp.where(is_less, a, b) for a, b in both)
        off, off_rest, more, more_rest = (
            jnp.where(is_less, b - a, a - b) for a, b in both
        )
        spread = (1 - share) * _numbers.squared(off + off_rest)
        mean, mean_rest = _added(mean, mean_rest, _numbers.product(share, off))
        var, var_rest = _added(var, var_rest, share * ((more + more_rest) + spread))
        return dataclasses.replace(
            self,
            count=count,
            count_rest=count_rest,
            mean=mean,
            mean_rest=mean_rest + _numbers.product(share, off_rest),
            var=var,
            var_rest=var_rest,
            squares=self.squares + squares,
            samples=self.samples + n / values_per_sample,
            updates=self.updates + (n > 0).astype(dtype),
        )


def _added(
    a: jax.Array, rest: jax.Array, more: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """``(a + rest) + more``, in two parts as it came."""
    # Fixed, or XLA contracts its product with the sum in some of the sum's uses.
    near = _numbers.fixed(more)
    total, lost = _numbers.exact_sum(a, near)
    return total, rest + (lost + (more - near))


def values_per_sample(shape: tuple[int, ...], feature_axes: tuple[int, ...]) -> int:
    """How many values of a feature a sample has; samples lie along the first axis."""
    others = [n for a, n in enumerate(shape) if a not in feature_axes]
    return math.prod(others[1:])


Path = tuple[Any, ...]


class Sweep(NamedTuple):
    """A model whose batch norms merge what they see.

    Attributes:
      context: within it ``step`` is traced.
      old: the running statistics that came in, by the paths of the norms.
      merged: nothing merged yet; a tree.
      rest: what else a step changes.
      fixed: what no step changes.
      step: ``(merged, rest, fixed, batch) -> (merged, rest)``.
      by_path: takes such a tree apart, into a `Merged` for each path of ``old``.
      called: the batch norms that were called so far, in order.
      rebuilt: takes new statistics by path, and returns the model with them.
    """

    context: Callable[[], contextlib.AbstractContextManager]
    old: dict[Path, Any]
    merged: Any
    rest: Any
    fixed: Any
    step: Callable
    by_path: Callable[[Any], dict[Path, Merged]]
    called: dict[Path, Any]
    rebuilt: Callable[[Mapping[Path, Any]], Any]


def check_called(
    name: str, old: Mapping[Path, Any], called: Mapping, others: Container[Path] = ()
) -> None:
    """Refuses a call of the model that left batch norms out, but not other modules."""
    left = ["/".join(map(str, p)) for p in old if p not in called and p not in others]
    there = ["/".join(map(str, path)) for path in called]
    if not there:
        raise _check.error(
            ValueError,
            name,
            "apply must call the model with the variables that it is given",
            "a call that reached no batch norm of Flax or normjax, of"
            f" {', '.join('/'.join(map(str, path)) for path in old)}",
            "Leave out what compiled it before for other variables, and use those that"
            " are passed in",
        )
    if left:
        raise _check.error(
            ValueError,
            name,
            "apply must call all batch norms that have statistics",
            f"{', '.join(there)} called, {', '.join(left)} not",
            "Call all of the model (train=True, say), or pass variables without the"
            " statistics of what is not called; if the model needs those, apply can put"
            " them back",
        )


def is_mapped(name: str, path: Path, got: str) -> Exception:
    """The error for a norm with moments of its own for each place of a vmap."""
    where = "/".join(map(str, path)) or "the model itself"
    return _check.error(
        ValueError,
        name,
        "under vmap a norm must have one set of moments for each of its statistics",
        f"{where}: {got}, and statistics that are not mapped",
        'Pass axis_name="batch" to vmap and to the norm, for the moments of all, and'
        " out_axes=(0, None), so that statistics are not mapped; or map the variables"
        " too, for statistics of each",
    )


def fields_of(
    name: str, path: Path, module: Any, names: Any, normalize_with: str
) -> dict[str, Any]:
    """The fields of a batch norm, for one that stands in for it.

    Refuses a class with a call of its own, which would be left out.
    """
    own = type(module)
    library = next(c for c in own.__mro__ if c.__module__.startswith(_LIBRARIES))
    if own.__call__ is not library.__call__:
        raise _check.error(
            TypeError,
            name,
            "a batch norm must be called as Flax's or normjax's own is",
            f"{'/'.join(map(str, path))}: {own.__name__}, a {library.__name__} with a"
            " __call__ of its own",
            "Make it a module that has a BatchNorm in it",
        )
    fields = {k: getattr(module, k) for k in names if hasattr(module, k)}
    # A device axis that is bound nowhere divides no batch.
    return fields | {"normalize_with": normalize_with, "missing_axis": "ignore"}


_LIBRARIES = ("flax.", "normjax.")
