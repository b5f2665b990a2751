"""Flax Linen modules that replace ``flax.linen``'s own by a change of import.

Fields, defaults, call arguments, collections and the names, shapes and dtypes of
variables are Flax's. What differs is deliberate: the variance is always the safe one,
devices are weighted by what they count, outputs and gradients are zero under the mask.
"""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Axes, Dtype, Initializer

from normjax import _axes, _check, _fused, _module, _norms, _trees
from normjax._types import ArrayLike, AxisNames, Groups, Implementation, Scalar

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "BatchNorm",
    "GroupNorm",
    "InstanceNorm",
    "LayerNorm",
    "RMSNorm",
]

_trees.tell_flax()
_ones = nn.initializers.ones
_zeros = nn.initializers.zeros


def _arguments(module: nn.Module, x: Any, axes: tuple[int, ...], mask: Any) -> dict:
    """The arguments of a norm that all modules have; creates scale and bias.

    Parameters lie along ``axes`` of x, with the rank of x.
    """
    name = type(module).__name__
    _module.check_fields(name, vars(module))
    shape = tuple(x.shape[a] for a in axes)
    parameters = {}
    if module.use_scale:
        parameters["scale"] = module.param(
            "scale", module.scale_init, shape, module.param_dtype
        )
    if getattr(module, "use_bias", False):
        parameters["bias"] = module.param(
            "bias", module.bias_init, shape, module.param_dtype
        )
    dtype = _module.flax_dtype(name, module.dtype, x, *parameters.values())
    return {
        **{k: _axes.lay(name, k, v, axes, x.shape) for k, v in parameters.items()},
        "epsilon": module.epsilon,
        "where": _module.flax_mask(name, mask, x.shape, module.mask_is_weight),
        "dtype": dtype,
        "activation": module.activation,
        "implementation": module.implementation,
        **_module.devices(module, module.is_initializing()),
    }


def _statistics(module: nn.Module, x: Any, axes: tuple[int, ...]) -> dict:
    """The variables of the running statistics; creates them while initializing."""
    features = [x.shape[a] for a in axes]
    dtype = jnp.float32 if module.force_float32_reductions else module.param_dtype
    of_mean = jnp.promote_types(dtype, jnp.complex64) if jnp.iscomplexobj(x) else dtype
    start = {"mean": (jnp.zeros, of_mean), "var": (jnp.ones, dtype)}
    start |= {name: (jnp.zeros, jnp.float32) for name in _module.counters(module)}
    if not module.is_initializing():
        missing = [k for k in start if not module.has_variable("batch_stats", k)]
        if missing and {"mean", "var"} & {*missing}:
            raise _module.missing_statistics(module.path, missing[0])
        if missing:
            raise _module.missing_counter(module.path, missing[0], features)
    variables = {
        name: module.variable("batch_stats", name, create, features, of)
        for name, (create, of) in start.items()
    }
    values = _module.Statistics(**{k: v.value for k, v in variables.items()})
    _module.check_statistics(values, features)
    return variables


class BatchNorm(nn.Module):
    """Batch normalization, https://arxiv.org/abs/1502.03167.

    Normalizes each feature over the batch and space, while training by the moments of
    the batch, else by running statistics in the collection ``batch_stats``. Replaces
    ``flax.linen.BatchNorm``. See `normjax.batch_norm`.

    Attributes:
      use_running_average: whether to normalize by the running statistics, and leave
        them as they are. None: say it in the call.
      axis: the axes, one or several, that own the parameters.
      momentum: the part of the OLD running statistics that is kept at an update
        (PyTorch's momentum is one minus it). None: the cumulative average, of all
        updates alike. It and ``debias`` add ``batch_stats/count``.
      epsilon: added to the variance; above zero. It may be traced.
      dtype: of the output; None for that of x with the parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      axis_name: device axes, one or several, over which statistics are synced. Under
        jit over sharded arrays they are synced without it.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      use_fast_variance: accepted, and changes nothing: the variance is always safe.
      force_float32_reductions: whether running statistics are stored in float32, or in
        ``param_dtype``. Sums are taken in at least float32 always.
      normalize_with: "batch" or "running", the statistics that normalize, whatever
        ``use_running_average`` says. None: what that says.
      update_statistics: whether the running statistics are updated. None: where
        ``use_running_average`` is False, as in Flax.
      debias: whether to take the part of their start, 0 and 1, off the running
        statistics, so that the first update is what they are after it; exact where
        ``momentum`` is the same in all calls.
      running_variance: "biased", as in Flax, or "unbiased", as in PyTorch: whether the
        running variance is an average of ``var`` or of `Moments.unbiased_var`.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      virtual_batch_size: how many neighbouring samples are normalized by moments of
        their own, while the running statistics follow all of them: ghost batches,
        https://arxiv.org/abs/1705.08741. None: the whole batch together.
      skip_nonfinite: whether to leave out, channel by channel, an update of the running
        statistics that is infinite or NaN, and to count it in ``batch_stats/skipped``,
        which this adds. Otherwise one such batch ruins them for good, as in Flax.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> norm = linen.BatchNorm(use_running_average=False, momentum=0.9)
      >>> x = jnp.array([[1.0], [3.0]])
      >>> variables = norm.init(jax.random.key(0), x)
      >>> y, updates = norm.apply(variables, x, mutable=["batch_stats"])
      >>> updates["batch_stats"]["mean"].round(3)
      Array([0.2], dtype=float32)
    """

    use_running_average: bool | None = None
    axis: Axes = -1
    momentum: float | None = 0.99
    epsilon: Scalar = 1e-5
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = _zeros
    scale_init: Initializer = _ones
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    normalize_with: Literal["batch", "running"] | None = None
    update_statistics: bool | None = None
    debias: bool = False
    running_variance: Literal["biased", "unbiased"] = "biased"
    missing_axis: Literal["raise", "ignore"] = "raise"
    mask_is_weight: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    virtual_batch_size: int | None = None
    skip_nonfinite: bool = False
    implementation: Implementation | None = None

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        momentum: Scalar | None = None,
    ) -> jax.Array:
        """Normalizes ``x``, and updates the running statistics while training.

        Args:
          x: ``[N, ..., C]``, floating or complex.
          use_running_average: the field of the same name, for this call.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.
          momentum: the field of the same name, for this call; it may be traced.

        Returns:
          The output, of the shape of ``x``.

        Raises:
          ValueError: if ``batch_stats`` or a count of it is not among the variables,
            outside of init, fields contradict each other, or shapes do not fit.
        """
        if self.use_running_average is not None or use_running_average is not None:
            use_running_average = nn.merge_param(
                "use_running_average", self.use_running_average, use_running_average
            )
        _module.check_fields(type(self).__name__, vars(self))
        with_running, update = _module.switches(self, use_running_average)
        x = _check.inexact("BatchNorm", x)
        axes = _module.flax_axes("BatchNorm", self.axis, x.ndim, "axis")
        variables = _statistics(self, x, axes)
        running = _module.Statistics(**{k: v.value for k, v in variables.items()})
        if not self.is_initializing():
            _module.check_updated(running, with_running)

        arguments = _arguments(self, x, axes, mask)
        if not self.is_initializing():  # which may be with a smaller batch
            arguments["virtual_batch_size"] = self.virtual_batch_size
        y, m = _module.batch_norm(
            x, running, with_running, update, feature_axis=axes, **arguments
        )
        if update and not self.is_initializing():
            running = _module.update(self, running, m, momentum)
            for name, variable in variables.items():
                variable.value = getattr(running, name)
        return y


class LayerNorm(nn.Module):
    """Layer normalization, https://arxiv.org/abs/1607.06450.

    Normalizes each sample over its features. Replaces ``flax.linen.LayerNorm``. See
    `normjax.layer_norm`.

    Attributes:
      epsilon: added to the variance; above zero. It may be traced.
      dtype: of the output; None for that of x with the parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes reduced.
      feature_axes: the axes that own the parameters.
      axis_name: device axes over which the reduced axes are divided, if they are.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      use_fast_variance: accepted, and changes nothing: the variance is always safe.
      force_float32_reductions: accepted; sums are taken in at least float32 always.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> x = jnp.array([[1.0, 3.0]])
      >>> y, variables = linen.LayerNorm().init_with_output(jax.random.key(0), x)
      >>> y.round(3)
      Array([[-1.,  1.]], dtype=float32)
    """

    epsilon: Scalar = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = _zeros
    scale_init: Initializer = _ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    missing_axis: Literal["raise", "ignore"] = "raise"
    mask_is_weight: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[..., C]``, floating.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.
        """
        x = _check.inexact("LayerNorm", x)
        axes = _module.flax_axes("LayerNorm", self.feature_axes, x.ndim, "feature_axes")
        return _norms.layer_norm(
            x,
            axis=_module.flax_axes(
                "LayerNorm", self.reduction_axes, x.ndim, "reduction_axes"
            ),
            **_arguments(self, x, axes, mask),
        )


class AddLayerNorm(LayerNorm):
    """Adds a residual, and normalizes the sum, as a LayerNorm does.

    Fields and variables are those of `LayerNorm`. See `normjax.add_layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> x, residual = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, -2.0]])
      >>> norm = linen.AddLayerNorm()
      >>> (y, h), variables = norm.init_with_output(jax.random.key(0), x, residual)
      >>> h
      Array([[ 2., -2.]], dtype=float32)
    """

    # An argument and a result more than the class it builds on, by intent.
    def __call__(  # type: ignore[override]
        self, x: ArrayLike, residual: ArrayLike, *, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Adds ``residual`` to ``x``, and normalizes the sum.

        Args:
          x: ``[..., C]``, floating or complex: what a block returned.
          residual: of the shape of ``x``: what it is added to.
          mask: as in `LayerNorm`; the sum is taken everywhere.

        Returns:
          The output, and the sum, the residual of the next block.

        Raises:
          ValueError: if the shapes of x and residual differ.
        """
        h = _fused.total("AddLayerNorm", x, residual)
        return super().__call__(h, mask=mask), h


class RMSNorm(nn.Module):
    """Root mean square layer normalization, https://arxiv.org/abs/1910.07467.

    Divides each sample by the root of the mean square of its features. Replaces
    ``flax.linen.RMSNorm``. See `normjax.rms_norm`.

    Attributes:
      epsilon: added to the mean square; above zero. It may be traced.
      dtype: of the output; None for that of x with the parameters.
      param_dtype: of the parameters.
      use_scale: whether there is a scale.
      scale_init: initializer of the scale.
      reduction_axes: the axes reduced.
      feature_axes: the axes that own the parameters.
      axis_name: device axes over which the reduced axes are divided, if they are.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      use_fast_variance: accepted, and changes nothing: the variance is always safe.
      force_float32_reductions: accepted; sums are taken in at least float32 always.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> x = jnp.array([[1.0, -1.0]])
      >>> y, variables = linen.RMSNorm().init_with_output(jax.random.key(0), x)
      >>> y.round(3)
      Array([[ 1., -1.]], dtype=float32)
    """

    epsilon: Scalar = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_scale: bool = True
    scale_init: Initializer = _ones
    reduction_axes: Axes = -1
    feature_axes: Axes = -1
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    missing_axis: Literal["raise", "ignore"] = "raise"
    mask_is_weight: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[..., C]``, floating.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.
        """
        x = _check.inexact("RMSNorm", x)
        axes = _module.flax_axes("RMSNorm", self.feature_axes, x.ndim, "feature_axes")
        return _norms.rms_norm(
            x,
            axis=_module.flax_axes(
                "RMSNorm", self.reduction_axes, x.ndim, "reduction_axes"
            ),
            **_arguments(self, x, axes, mask),
        )


class AddRMSNorm(RMSNorm):
    """Adds a residual, and normalizes the sum, as an RMSNorm does.

    Fields and variables are those of `RMSNorm`. See `normjax.add_rms_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> x, residual = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, -2.0]])
      >>> norm = linen.AddRMSNorm()
      >>> (y, h), variables = norm.init_with_output(jax.random.key(0), x, residual)
      >>> h
      Array([[ 2., -2.]], dtype=float32)
    """

    # An argument and a result more than the class it builds on, by intent.
    def __call__(  # type: ignore[override]
        self, x: ArrayLike, residual: ArrayLike, *, mask: ArrayLike | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Adds ``residual`` to ``x``, and normalizes the sum.

        Args:
          x: ``[..., C]``, floating or complex: what a block returned.
          residual: of the shape of ``x``: what it is added to.
          mask: as in `RMSNorm`; the sum is taken everywhere.

        Returns:
          The output, and the sum, the residual of the next block.

        Raises:
          ValueError: if the shapes of x and residual differ.
        """
        h = _fused.total("AddRMSNorm", x, residual)
        return super().__call__(h, mask=mask), h


class GroupNorm(nn.Module):
    """Group normalization, https://arxiv.org/abs/1803.08494.

    Normalizes each sample over space and over groups of its features. Replaces
    ``flax.linen.GroupNorm``. See `normjax.group_norm`.

    Attributes:
      num_groups: how many groups; None if group_size is set.
      group_size: how many features in a group; None if num_groups is set.
      epsilon: added to the variance; above zero. It may be traced.
      dtype: of the output; None for that of x with the parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      reduction_axes: the axes reduced, the last one, of the features, among them. None:
        all but the first.
      axis_name: device axes over which space or features are divided, if they are.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      use_fast_variance: accepted, and changes nothing: the variance is always safe.
      force_float32_reductions: accepted; sums are taken in at least float32 always.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> x = jnp.array([[1.0, 3.0, 2.0, 6.0]])
      >>> y, variables = linen.GroupNorm(2).init_with_output(jax.random.key(0), x)
      >>> y.shape
      (1, 4)
    """

    num_groups: int | None = 32
    group_size: int | None = None
    epsilon: Scalar = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = _zeros
    scale_init: Initializer = _ones
    reduction_axes: Axes | None = None
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    missing_axis: Literal["raise", "ignore"] = "raise"
    mask_is_weight: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[N, ..., C]``, floating.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.

        Raises:
          ValueError: if the groups do not divide the features, or ``reduction_axes``
            leaves out the last axis.
        """
        x = _check.inexact("GroupNorm", x)
        return _norms.group_norm(
            x,
            num_groups=_module.flax_groups(self.num_groups, self.group_size, x.shape),
            axis=_module.flax_space(self.reduction_axes, x.ndim),
            **_arguments(self, x, (x.ndim - 1,), mask),
        )


class InstanceNorm(nn.Module):
    """Instance normalization, https://arxiv.org/abs/1607.08022.

    Normalizes each feature of each sample over space. Replaces
    ``flax.linen.InstanceNorm``. See `normjax.instance_norm`.

    Attributes:
      epsilon: added to the variance; above zero. It may be traced.
      dtype: of the output; None for that of x with the parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes that own the parameters; not the first, which is the batch.
      axis_name: device axes over which space is divided, if it is.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      use_fast_variance: accepted, and changes nothing: the variance is always safe.
      force_float32_reductions: accepted; sums are taken in at least float32 always.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # [N, S, C]
      >>> y, variables = linen.InstanceNorm().init_with_output(jax.random.key(0), x)
      >>> y.round(3)
      Array([[[-1., -1.],
              [ 1.,  1.]]], dtype=float32)
    """

    epsilon: Scalar = 1e-6
    dtype: Dtype | None = None
    param_dtype: Dtype = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Initializer = _zeros
    scale_init: Initializer = _ones
    feature_axes: Axes = -1
    axis_name: AxisNames | None = None
    axis_index_groups: Groups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    missing_axis: Literal["raise", "ignore"] = "raise"
    mask_is_weight: bool = False
    activation: Callable[[jax.Array], jax.Array] | None = None
    implementation: Implementation | None = None

    @nn.compact
    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[N, ..., C]``, floating.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.

        Raises:
          ValueError: if ``feature_axes`` contains the first axis.
        """
        x = _check.inexact("InstanceNorm", x)
        axes = _module.flax_features(self.feature_axes, x.ndim)
        return _norms.instance_norm(
            x,
            axis=_axes.others((0, *axes), x.ndim),
            feature_axis=axes,
            **_arguments(self, x, axes, mask),
        )
