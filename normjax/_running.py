"""Running moments: a weighted average of moments over time."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _axes, _check
from normjax._moments import Moments, added, product, uniform, widened
from normjax._types import Axes, DTypeLike, Scalar


def blend(old: jax.Array, new: jax.Array, momentum: Any, count: jax.Array) -> jax.Array:
    """``momentum * old + (1 - momentum) * new``, and old where nothing was counted.

    In the dtype of old, which a complex new value makes complex.
    """
    part = (1 - momentum) * (count > 0).astype(count.dtype)
    kept = product(1 - part, widened(old, count.dtype))
    blended = added(kept, product(part, widened(new, count.dtype)))
    if jnp.iscomplexobj(blended) != jnp.iscomplexobj(old):
        return blended
    return blended.astype(old.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RunningMoments:
    """An exponential average of moments, without the bias of its start.

    After t updates with moments m_1 ... m_t, each of mean, var and count is
    ``sum_i(w_i * m_i) / sum_i(w_i)`` with ``w_i = (1 - momentum) * momentum**(t - i)``,
    the average of Adam's bias correction (https://arxiv.org/abs/1412.6980). Reading
    after one update gives exactly the count, mean and var of that update. A frozen
    pytree: `update` returns a new one.

    Attributes:
      count: average number of values in an update.
      mean: average mean.
      var: average variance.
      weight: sum of the weights so far, from 0 before any update towards 1.

    Example:
      >>> import jax.numpy as jnp, normjax
      >>> running = normjax.RunningMoments.init((2,))
      >>> x = jnp.array([[1.0, 2.0], [3.0, 6.0]])
      >>> y, m = normjax.batch_norm(x)
      >>> running = running.update(m, momentum=0.9)
      >>> running.read().mean
      Array([2., 4.], dtype=float32)
    """

    count: jax.Array
    mean: jax.Array
    var: jax.Array
    weight: jax.Array

    @classmethod
    def init(cls, shape: Axes, dtype: DTypeLike = jnp.float32) -> "RunningMoments":
        """Returns running moments that have seen nothing.

        Args:
          shape: of the moments, ``[C]`` for those of `batch_norm`.
          dtype: of the statistics, at least float32; complex for a complex mean.

        Raises:
          TypeError: if ``dtype`` is an integer or holds less than float32, or ``shape``
            is no shape.
          ValueError: if ``shape`` has a negative size.

        Example:
          >>> import normjax
          >>> normjax.RunningMoments.init((3,)).weight
          Array([0., 0., 0.], dtype=float32)
        """
        shape = _axes.shape("RunningMoments.init", shape)
        dtype = _check.statistics_dtype("RunningMoments.init", dtype)
        zeros = jnp.zeros(shape, jnp.finfo(dtype).dtype)
        return cls(zeros, zeros.astype(dtype), zeros, zeros)

    def update(self, m: Moments, momentum: Scalar = 0.99) -> "RunningMoments":
        """Returns the running moments after one more update.

        Args:
          m: moments of the same shape. Where their count is 0, nothing moves.
          momentum: the part of the OLD value that is kept, in [0, 1], as in Flax;
            PyTorch's is one minus it. It may differ from call to call.

        Returns:
          New running moments; these do not change.

        Raises:
          TypeError: if ``m`` is no `Moments`, ``momentum`` no number, or the mean of
            ``m`` complex and the running one not.
          ValueError: if the shapes differ or a concrete momentum is outside [0, 1].

        Example:
          >>> import jax.numpy as jnp, normjax
          >>> m = normjax.Moments(jnp.ones(1), jnp.array([4.0]), jnp.array([2.0]))
          >>> normjax.RunningMoments.init((1,)).update(m, momentum=0.9).mean
          Array([4.], dtype=float32)
        """
        momentum = _check.momentum("RunningMoments.update", momentum)
        m = uniform("RunningMoments.update", m)
        if m.shape != self.mean.shape:
            raise _check.error(
                ValueError,
                "RunningMoments.update",
                "moments must have the shape of the running moments",
                f"moments of shape {m.shape}, running moments of shape"
                f" {self.mean.shape}",
                "Pass what batch_norm returns, or drop the axes of size 1 that moments"
                " keeps",
            )
        if jnp.iscomplexobj(m.mean) and not jnp.iscomplexobj(self.mean):
            raise _check.error(
                TypeError,
                "RunningMoments.update",
                "running moments of complex values must be complex",
                f"moments.mean.dtype={m.mean.dtype}, running mean.dtype"
                f"={self.mean.dtype}",
                "Start with RunningMoments.init(shape, jnp.complex64)",
            )
        momentum = jnp.asarray(momentum, self.weight.dtype)
        weight = blend(self.weight, jnp.ones_like(self.weight), momentum, m.count)
        # The new value's part of the new total: 1 at the first update, which then
        # replaces the zeros of the start exactly.
        part = (1 - momentum) / jnp.where(weight > 0, weight, 1)
        return RunningMoments(
            count=blend(self.count, m.count, 1 - part, m.count),
            mean=blend(self.mean, m.mean, 1 - part, m.count),
            var=blend(self.var, m.var, 1 - part, m.count),
            weight=weight,
        )

    def read(self) -> Moments:
        """Returns the average so far, as `Moments`.

        A channel in which nothing was counted yet reads count 0, mean 0, var 1.

        Raises:
          ValueError: if no update counted anything yet in any channel, checked where
            the values are concrete; under jit the caller sees to it.

        Example:
          >>> import jax.numpy as jnp, normjax
          >>> m = normjax.Moments(jnp.ones(1), jnp.array([4.0]), jnp.array([2.0]))
          >>> normjax.RunningMoments.init((1,)).update(m).read().var
          Array([2.], dtype=float32)
        """
        if _check.is_concrete(self.weight) and not np.any(np.asarray(self.weight) > 0):
            raise _check.error(
                ValueError,
                "RunningMoments.read",
                "running moments must be updated before they are read",
                "no update yet",
                "Call running = running.update(m) with the moments that batch_norm"
                " returns",
            )
        var = self.var + (self.weight == 0).astype(self.var.dtype)
        return Moments(self.count, self.mean, var)
