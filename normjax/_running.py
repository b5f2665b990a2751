"""Running moments: a weighted average of moments over time."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _axes, _check, _trees
from normjax._moments import Moments, uniform
from normjax._numbers import added, by_parts, product, widened
from normjax._numbers import counted as zeroed
from normjax._types import Axes, DTypeLike, Scalar


# Compiled, so that a call outside of jit is one program, and inlined in one inside.
@functools.partial(jax.jit, inline=True)
def blend(old: jax.Array, new: jax.Array, part: Any, counted: jax.Array) -> jax.Array:
    """``(1 - part) * old + part * new`` where ``counted``, and else old.

    In the dtype of old, which a complex new value makes complex. A new value that is
    not counted leaves no trace, NaN neither.
    """
    dtype = jnp.promote_types(jnp.finfo(old.dtype).dtype, jnp.finfo(new.dtype).dtype)
    part = jnp.asarray(part, dtype) * counted.astype(dtype)
    kept = 1 - part
    lost = (1 - kept) - part  # since kept is rounded to the digits of 1
    wide = widened(old, dtype)
    new = product(part, widened(zeroed(new, counted), dtype))
    # Infinity is kept, not multiplied by nothing.
    rest = product(lost, zeroed(wide, jnp.isfinite(wide)))
    blended = added(product(kept, wide), added(rest, new))
    if jnp.iscomplexobj(blended) != jnp.iscomplexobj(old):
        return blended
    return blended.astype(old.dtype)


def part_of_new(name: str, momentum: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns ``1 - momentum``, which may be less than the digits of 1 can tell."""
    momentum = _check.momentum(name, momentum)
    of = jnp.shape(momentum)
    if len(of) > len(shape) or any(
        n not in (1, size) for n, size in zip(of[::-1], shape[::-1], strict=False)
    ):
        raise _check.error(
            ValueError,
            name,
            "momentum must be one number, or one for each channel",
            f"momentum of shape {of}, statistics of shape {shape}",
            f"Pass a float, or an array of shape {shape}",
        )
    if isinstance(momentum, jax.Array):
        return 1 - momentum.astype(dtype)
    return jnp.asarray(1 - np.asarray(momentum, np.float64), dtype)


def is_counted(count: jax.Array) -> jax.Array:
    """Whether an update counted something; NaN, which must not be lost, is so, too."""
    return ~(count <= 0)


def one_more(count: jax.Array, where: jax.Array) -> jax.Array:
    """Counts on where something was counted, up to what the dtype can count."""
    if jnp.issubdtype(count.dtype, jnp.integer):
        where = where & (count != count.dtype.type(jnp.iinfo(count.dtype).max))
    return count + where.astype(count.dtype)


def are_finite(m: Moments, mean: jax.Array, var: jax.Array) -> jax.Array:
    """Whether moments are finite, in the dtypes of running ones as well."""

    def fits(new: jax.Array, old: jax.Array) -> jax.Array:
        dtype = jnp.finfo(old.dtype).dtype
        return jnp.isfinite(by_parts(lambda part: part.astype(dtype), new))

    return fits(m.mean, mean) & fits(m.var, var) & jnp.isfinite(m.count)


@_trees.tree
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
      skipped: how many updates were left out with ``skip_nonfinite``, of each channel.

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
    skipped: jax.Array | float = 0.0

    def __post_init__(self):
        _trees.tell_flax()
        # Left out, it becomes an array like the others, as in Moments.
        if isinstance(self.skipped, float) and hasattr(self.weight, "dtype"):
            object.__setattr__(self, "skipped", jnp.zeros_like(self.weight))

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
        return cls(zeros, zeros.astype(dtype), zeros, zeros, zeros)

    def update(
        self, m: Moments, momentum: Scalar = 0.99, *, skip_nonfinite: bool = False
    ) -> "RunningMoments":
        """Returns the running moments after one more update.

        Args:
          m: moments of the same shape. Where their count is 0, nothing moves.
          momentum: the part of the OLD value that is kept, in [0, 1], as in Flax;
            PyTorch's is one minus it. It may differ from call to call, and from channel
            to channel.
          skip_nonfinite: whether to leave out, channel by channel, an update that is
            infinite or NaN, and to count it in ``skipped``. Otherwise it makes the
            running moments of its channel infinite or NaN for good, as in Flax.

        Returns:
          New running moments; these do not change.

        Raises:
          TypeError: if ``m`` is no `Moments`, ``momentum`` no number, or the mean of
            ``m`` complex and the running one not.
          ValueError: if shapes do not fit or a concrete momentum is outside [0, 1].

        Example:
          >>> import jax.numpy as jnp, normjax
          >>> m = normjax.Moments(jnp.ones(1), jnp.array([4.0]), jnp.array([2.0]))
          >>> normjax.RunningMoments.init((1,)).update(m, momentum=0.9).mean
          Array([4.], dtype=float32)
        """
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
        part = part_of_new(
            "RunningMoments.update", momentum, self.mean.shape, self.weight.dtype
        )
        skip = _check.flag("RunningMoments.update", "skip_nonfinite", skip_nonfinite)
        return _updated(self, m, part, skip)

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
        weight = np.asarray(self.weight) if _check.is_concrete(self.weight) else None
        if weight is not None and weight.size and not np.any(weight > 0):
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


@functools.partial(jax.jit, static_argnums=3, inline=True)
def _updated(
    running: RunningMoments, m: Moments, part: jax.Array, skip: bool
) -> RunningMoments:
    """`RunningMoments.update`, with the part of the new moments."""
    counted, skipped = is_counted(m.count), jnp.asarray(running.skipped)
    if skip:
        finite = are_finite(m, running.mean, running.var)
        skipped = one_more(skipped, counted & ~finite)
        counted = counted & finite
    weight = blend(running.weight, jnp.ones_like(running.weight), part, counted)
    # The new value's part of the new total: 1 at the first update, which then
    # replaces the zeros of the start exactly.
    part = part / jnp.where(weight > 0, weight, 1)
    return RunningMoments(
        count=blend(running.count, m.count, part, counted),
        mean=blend(running.mean, m.mean, part, counted),
        var=blend(running.var, m.var, part, counted),
        weight=weight,
        skipped=skipped,
    )
