"""Flax NNX modules that replace ``flax.nnx``'s own by a change of import.

Arguments, defaults, attributes and state are Flax's. What differs is deliberate: the
variance is always the safe one, devices are weighted by what they count, outputs and
gradients are zero under the mask.
"""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import Axes, Dtype, Initializer, PromoteDtypeFn

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
_NO_METADATA: Mapping[str, Any] = MappingProxyType({})
# Fields that may be given as lists, which nnx would take for state.
_STATIC = {"axis", "axis_name", "axis_index_groups", "reduction_axes", "feature_axes"}
_promote = promote_dtype
_ones = nnx.initializers.ones_init()
_zeros = nnx.initializers.zeros_init()


class _Norm(nnx.Module):
    """What the modules share: fields, parameters, and the arguments of a norm."""

    num_features: int
    epsilon: Scalar
    dtype: Dtype | None
    param_dtype: Dtype
    scale: nnx.Param[jax.Array] | None
    axis_name: AxisNames | None
    axis_index_groups: Groups | None
    promote_dtype: PromoteDtypeFn
    missing_axis: str
    mask_is_weight: bool
    activation: Callable[[jax.Array], jax.Array] | None
    implementation: str | None

    def _create(
        self, *, num_features: int, rngs: nnx.Rngs, param_dtype: Dtype, **fields: Any
    ) -> None:
        """Keeps the fields by name; creates a scale and a bias where they are used."""
        self.num_features, self.param_dtype = num_features, param_dtype
        _module.check_fields(type(self).__name__, locals() | fields)
        for name in ("scale", "bias"):
            init = fields.pop(f"{name}_init", None)
            metadata = fields.pop(f"{name}_metadata", _NO_METADATA)
            if init is None:  # of rms norm, which has no bias
                continue
            parameter = nnx.data(None)
            if fields[f"use_{name}"]:
                value = init(rngs.params(), (num_features,), param_dtype)
                parameter = nnx.Param(value, **metadata)
            setattr(self, name, parameter)
        for name, value in fields.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field; refuses what only says at construction what is created."""
        _module.check_fields(type(self).__name__, {name: value})
        parameter = name.removeprefix("use_")
        if name in ("use_scale", "use_bias") and hasattr(self, parameter):
            there = getattr(self, parameter) is not None
            if there != bool(value):
                raise _module.set_too_late(self, name, value)
        super().__setattr__(name, _module.frozen(value) if name in _STATIC else value)

    def _arguments(
        self, x: jax.Array, axes: tuple[int, ...], mask: Any, *statistics: jax.Array
    ) -> dict[str, Any]:
        """The arguments of a norm that all modules have.

        Parameters lie along ``axes`` of x, with the rank of x. The dtype of y is what
        ``promote_dtype`` makes of all operands; x is not cast before its moments.
        """
        name = type(self).__name__
        _module.check_features(self, x.shape, axes, *statistics)
        variables = {k: getattr(self, k) for k in ("scale", "bias") if hasattr(self, k)}
        parameters = {k: None if v is None else v[...] for k, v in variables.items()}

        def like_y(x, *others):
            x, *others = self.promote_dtype((x, *others), dtype=self.dtype)
            operands = (x, *others[len(statistics) :])
            return jnp.zeros((), canonicalize_dtype(*operands, dtype=self.dtype))

        if self.dtype is None:
            todo = "Pass dtype=jnp.bfloat16, say, to the module"
            _check.promotion(name, todo, x, *statistics, *parameters.values())
        with jax.numpy_dtype_promotion("standard"):
            y = jax.eval_shape(like_y, x, *statistics, *parameters.values())
        along = [x.shape[a] for a in axes]
        for k, v in parameters.items():
            if v is not None and v.size == math.prod(along):
                v = v.reshape(along)
            parameters[k] = _axes.lay(name, k, v, axes, x.shape)
        return {
            **parameters,
            "epsilon": self.epsilon,
            "where": _module.flax_mask(name, mask, x.shape, self.mask_is_weight),
            "dtype": y.dtype,
            "activation": self.activation,
            "implementation": self.implementation,
            **_module.devices(self),
        }


def _store(variable: nnx.Variable, value: jax.Array) -> None:
    """Gives a variable a new value, in its shape, and changes no array of others."""
    value = jax.lax.stop_gradient(value.reshape(variable.shape))
    # Not in its place: a NumPy array, which would be written to, and the first complex
    # mean, whose imaginary part has no place yet.
    is_numpy = isinstance(variable.get_raw_value(), np.ndarray)
    if is_numpy or value.dtype != variable.dtype:
        variable.set_value(value)
    else:
        variable[...] = value


class BatchNorm(_Norm):
    """Batch normalization, https://arxiv.org/abs/1502.03167.

    Normalizes each feature over the batch and space, while training by the moments of
    the batch, else by running statistics in ``nnx.BatchStat`` state. Replaces
    ``flax.nnx.BatchNorm``. See `normjax.batch_norm`.

    Args:
      num_features: number of features; the parameters have shape ``[num_features]``.
      use_running_average: whether to normalize by the running statistics, and leave
        them as they are; ``train()`` and ``eval()`` set it.
      axis: the axes, one or several, that own the parameters.
      momentum: the part of the OLD running statistics that is kept at an update
        (PyTorch's momentum is one minus it). None: the cumulative average, of all
        updates alike. It and ``debias`` add the state ``count``.
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
      promote_dtype: what Flax would promote the operands with; it says the dtype of the
        output, and x itself is not cast.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias, ``out_sharding`` say.
      scale_metadata: metadata of the scale.
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
        statistics that is infinite or NaN, and to count it in the state ``skipped``,
        which this adds. Otherwise one such batch ruins them for good, as in Flax.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import normjax.nnx
      >>> norm = normjax.nnx.BatchNorm(1, momentum=0.9, rngs=nnx.Rngs(0))
      >>> y = norm(jnp.array([[1.0], [3.0]]))
      >>> norm.mean[...].round(3)
      Array([0.2], dtype=float32)
    """

    mean: nnx.BatchStat[jax.Array]
    var: nnx.BatchStat[jax.Array]
    count: nnx.BatchStat[jax.Array] | None
    skipped: nnx.BatchStat[jax.Array] | None
    bias: nnx.Param[jax.Array] | None
    use_running_average: bool | None
    axis: Axes
    momentum: float | None
    normalize_with: str | None
    update_statistics: bool | None
    debias: bool
    running_variance: str
    virtual_batch_size: int | None
    skip_nonfinite: bool

    def __init__(
        self,
        num_features: int,
        *,
        use_running_average: bool | None = False,
        axis: Axes = -1,
        momentum: float | None = 0.99,
        epsilon: Scalar = 1e-5,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _zeros,
        scale_init: Initializer = _ones,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        normalize_with: Literal["batch", "running"] | None = None,
        update_statistics: bool | None = None,
        debias: bool = False,
        running_variance: Literal["biased", "unbiased"] = "biased",
        missing_axis: Literal["raise", "ignore"] = "raise",
        mask_is_weight: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        virtual_batch_size: int | None = None,
        skip_nonfinite: bool = False,
        implementation: Implementation | None = None,
    ):
        self._create(**{k: v for k, v in locals().items() if k != "self"})
        self.mean = nnx.BatchStat(jnp.zeros((num_features,), jnp.float32))
        self.var = nnx.BatchStat(jnp.ones((num_features,), jnp.float32))
        self.count = nnx.data(None)
        self.skipped = nnx.data(None)
        self._add_counters()

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field, and adds the counters that it asks for."""
        super().__setattr__(name, value)
        fields = ("momentum", "debias", "skip_nonfinite")
        if name in fields and hasattr(self, "skipped"):
            self._add_counters()

    def _add_counters(self) -> None:
        for name in _module.counters(self):
            if getattr(self, name) is None:
                zeros = jnp.zeros(self.mean.shape, jnp.float32)
                setattr(self, name, nnx.BatchStat(zeros))

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
          ValueError: if fields contradict each other, the statistics that are to
            normalize were never updated, or shapes do not fit.
        """
        if use_running_average is None:
            use_running_average = self.use_running_average
        with_running, update = _module.switches(self, use_running_average)
        x = _check.inexact("BatchNorm", x)
        axes = _module.flax_axes("BatchNorm", self.axis, x.ndim, "axis")
        self._add_counters()
        variables = [getattr(self, name) for name in _module.Statistics._fields]
        running = _module.Statistics(
            *(None if v is None else v[...] for v in variables)
        )
        if "count" in _module.counters(self):
            _module.check_updated(running, with_running)

        arguments = self._arguments(x, axes, mask, running.mean, running.var)
        arguments["virtual_batch_size"] = self.virtual_batch_size
        running = _module.along(running, [x.shape[a] for a in axes])
        y, m = _module.batch_norm(
            x, running, with_running, update, feature_axis=axes, **arguments
        )
        if update:
            running = _module.update(self, running, m, momentum)
            for variable, value in zip(variables, running, strict=True):
                if variable is not None:
                    _store(variable, value)
        return y

    def set_view(
        self,
        use_running_average: bool | None = None,
        normalize_with: Literal["batch", "running"] | None = None,
        update_statistics: bool | None = None,
    ) -> None:
        """Sets fields for ``nnx.view``; None leaves one as it is.

        Args:
          use_running_average: whether to normalize by the running statistics, and leave
            them as they are.
          normalize_with: the statistics that normalize, "batch" or "running".
          update_statistics: whether the running statistics are updated.

        Example:
          >>> from flax import nnx
          >>> import normjax.nnx
          >>> norm = normjax.nnx.BatchNorm(2, rngs=nnx.Rngs(0))
          >>> nnx.view(norm, use_running_average=True).use_running_average
          True
        """
        fields = {k: v for k, v in locals().items() if k != "self" and v is not None}
        for name, value in fields.items():
            setattr(self, name, value)


class LayerNorm(_Norm):
    """Layer normalization, https://arxiv.org/abs/1607.06450.

    Normalizes each sample over its features. Replaces
    ``flax.nnx.LayerNorm``. See `normjax.layer_norm`.

    Args:
      num_features: number of features; the parameters have shape ``[num_features]``.
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
      promote_dtype: what Flax would promote the operands with; it says the dtype of the
        output, and x itself is not cast.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias, ``out_sharding`` say.
      scale_metadata: metadata of the scale.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import normjax.nnx
      >>> norm = normjax.nnx.LayerNorm(2, rngs=nnx.Rngs(0))
      >>> norm(jnp.array([[1.0, 3.0]])).round(3)
      Array([[-1.,  1.]], dtype=float32)
    """

    bias: nnx.Param[jax.Array] | None
    reduction_axes: Axes
    feature_axes: Axes

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: Scalar = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _zeros,
        scale_init: Initializer = _ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        missing_axis: Literal["raise", "ignore"] = "raise",
        mask_is_weight: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: Implementation | None = None,
    ):
        self._create(**{k: v for k, v in locals().items() if k != "self"})

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[..., C]``, floating or complex.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.
        """
        x = _check.inexact("LayerNorm", x)
        axes = _module.flax_axes("LayerNorm", self.feature_axes, x.ndim, "feature_axes")
        reduced = _module.flax_axes(
            "LayerNorm", self.reduction_axes, x.ndim, "reduction_axes"
        )
        return _norms.layer_norm(x, axis=reduced, **self._arguments(x, axes, mask))


class AddLayerNorm(LayerNorm):
    """Adds a residual, and normalizes the sum, as a LayerNorm does.

    Fields and variables are those of `LayerNorm`. See `normjax.add_layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import nnx
      >>> x, residual = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, -2.0]])
      >>> from flax.nnx import Rngs
      >>> y, h = nnx.AddLayerNorm(2, rngs=Rngs(0))(x, residual)
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


class RMSNorm(_Norm):
    """Root mean square layer normalization, https://arxiv.org/abs/1910.07467.

    Divides each sample by the root of the mean square of its features. Replaces
    ``flax.nnx.RMSNorm``. See `normjax.rms_norm`.

    Args:
      num_features: number of features; the parameters have shape ``[num_features]``.
      epsilon: added to the variance; above zero. It may be traced.
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
      promote_dtype: what Flax would promote the operands with; it says the dtype of the
        output, and x itself is not cast.
      rngs: random keys for the initializers.
      scale_metadata: metadata of the scale.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import normjax.nnx
      >>> norm = normjax.nnx.RMSNorm(2, rngs=nnx.Rngs(0))
      >>> norm(jnp.array([[1.0, -1.0]])).round(3)
      Array([[ 1., -1.]], dtype=float32)
    """

    reduction_axes: Axes
    feature_axes: Axes

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: Scalar = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_scale: bool = True,
        scale_init: Initializer = _ones,
        reduction_axes: Axes = -1,
        feature_axes: Axes = -1,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = _promote,
        rngs: nnx.Rngs,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        missing_axis: Literal["raise", "ignore"] = "raise",
        mask_is_weight: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: Implementation | None = None,
    ):
        self._create(**{k: v for k, v in locals().items() if k != "self"})

    def __call__(self, x: ArrayLike, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[..., C]``, floating or complex.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.
        """
        x = _check.inexact("RMSNorm", x)
        axes = _module.flax_axes("RMSNorm", self.feature_axes, x.ndim, "feature_axes")
        reduced = _module.flax_axes(
            "RMSNorm", self.reduction_axes, x.ndim, "reduction_axes"
        )
        return _norms.rms_norm(x, axis=reduced, **self._arguments(x, axes, mask))


class AddRMSNorm(RMSNorm):
    """Adds a residual, and normalizes the sum, as an RMSNorm does.

    Fields and variables are those of `RMSNorm`. See `normjax.add_rms_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from normjax import nnx
      >>> x, residual = jnp.array([[1.0, 0.0]]), jnp.array([[1.0, -2.0]])
      >>> from flax.nnx import Rngs
      >>> y, h = nnx.AddRMSNorm(2, rngs=Rngs(0))(x, residual)
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


class GroupNorm(_Norm):
    """Group normalization, https://arxiv.org/abs/1803.08494.

    Normalizes each sample over space and over groups of its features. Replaces
    ``flax.nnx.GroupNorm``. See `normjax.group_norm`.

    Args:
      num_features: number of features; the parameters have shape ``[num_features]``.
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
      promote_dtype: what Flax would promote the operands with; it says the dtype of the
        output, and x itself is not cast.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias, ``out_sharding`` say.
      scale_metadata: metadata of the scale.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import normjax.nnx
      >>> norm = normjax.nnx.GroupNorm(4, num_groups=2, rngs=nnx.Rngs(0))
      >>> norm(jnp.array([[1.0, 3.0, 2.0, 6.0]])).round(3)
      Array([[-1.,  1., -1.,  1.]], dtype=float32)
    """

    bias: nnx.Param[jax.Array] | None
    num_groups: int
    group_size: int
    reduction_axes: Axes | None

    def __init__(
        self,
        num_features: int,
        num_groups: int | None = 32,
        group_size: int | None = None,
        *,
        epsilon: Scalar = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _zeros,
        scale_init: Initializer = _ones,
        reduction_axes: Axes | None = None,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        missing_axis: Literal["raise", "ignore"] = "raise",
        mask_is_weight: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: Implementation | None = None,
    ):
        _module.check_fields("GroupNorm", {"num_features": num_features})
        num_groups = _module.flax_groups(num_groups, group_size, (num_features,))
        num_groups = _axes.divisor(
            "GroupNorm", "num_groups", num_groups, (0,), "features", (num_features,)
        )
        group_size = num_features // num_groups
        self._create(**{k: v for k, v in locals().items() if k != "self"})
        self.feature_axis = -1

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets a field; num_groups and group_size follow one another."""
        if name not in ("num_groups", "group_size") or value is None:
            return super().__setattr__(name, value)
        of, features = "GroupNorm", (self.num_features,)
        if name == "group_size":
            value = _module.flax_groups(None, value, features)
        value = _axes.divisor(of, "num_groups", value, (0,), "features", features)
        super().__setattr__("num_groups", value)
        super().__setattr__("group_size", self.num_features // value)

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[N, ..., C]``, floating or complex.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.
        """
        x = _check.inexact("GroupNorm", x)
        return _norms.group_norm(
            x,
            num_groups=self.num_groups,
            axis=_module.flax_space(self.reduction_axes, x.ndim),
            **self._arguments(x, (x.ndim - 1,), mask),
        )


class InstanceNorm(_Norm):
    """Instance normalization, https://arxiv.org/abs/1607.08022.

    Normalizes each feature of each sample over space. Replaces
    ``flax.nnx.InstanceNorm``. See `normjax.instance_norm`.

    Args:
      num_features: number of features; the parameters have shape ``[num_features]``.
      epsilon: added to the variance; above zero. It may be traced.
      dtype: of the output; None for that of x with the parameters.
      param_dtype: of the parameters.
      use_bias: whether there is a bias.
      use_scale: whether there is a scale.
      bias_init: initializer of the bias.
      scale_init: initializer of the scale.
      feature_axes: the axes that own the parameters.
      axis_name: device axes over which space is divided, if it is.
      axis_index_groups: lists of device numbers along ``axis_name``, of any sizes, that
        sync each their own. None: all devices together.
      use_fast_variance: accepted, and changes nothing: the variance is always safe.
      promote_dtype: what Flax would promote the operands with; it says the dtype of the
        output, and x itself is not cast.
      rngs: random keys for the initializers.
      bias_metadata: metadata of the bias, ``out_sharding`` say.
      scale_metadata: metadata of the scale.
      missing_axis: what to do where ``axis_name`` is bound nowhere: "raise", or
        "ignore" it, so that one model serves one device and many.
      mask_is_weight: whether ``mask`` is the weight with which each value counts,
        instead of being read as boolean.
      activation: applied to the output, element by element, ``jax.nn.silu``, say. What
        it is applied to is not kept for the backward pass, but computed again.
      implementation: "xla", or "native", kernels for CPUs; a name that can't serve
        raises. If None, what serves best: see `normjax.set_implementation`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import normjax.nnx
      >>> norm = normjax.nnx.InstanceNorm(2, rngs=nnx.Rngs(0))
      >>> x = jnp.array([[[1.0, 2.0], [3.0, 6.0]]])  # [N, S, C]
      >>> norm(x).round(3)
      Array([[[-1., -1.],
              [ 1.,  1.]]], dtype=float32)
    """

    bias: nnx.Param[jax.Array] | None
    feature_axes: Axes

    def __init__(
        self,
        num_features: int,
        *,
        epsilon: Scalar = 1e-6,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Initializer = _zeros,
        scale_init: Initializer = _ones,
        feature_axes: Axes = -1,
        axis_name: AxisNames | None = None,
        axis_index_groups: Groups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = _promote,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        scale_metadata: Mapping[str, Any] = _NO_METADATA,
        missing_axis: Literal["raise", "ignore"] = "raise",
        mask_is_weight: bool = False,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        implementation: Implementation | None = None,
    ):
        self._create(**{k: v for k, v in locals().items() if k != "self"})

    def __call__(self, x: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
        """Normalizes ``x``.

        Args:
          x: ``[N, ..., C]``, floating or complex.
          mask: broadcasts to ``x``: which values count, or with ``mask_is_weight``, how
            much. The output is zero where nothing does.

        Returns:
          The output, of the shape of ``x``.
        """
        x = _check.inexact("InstanceNorm", x)
        axes = _module.flax_features(self.feature_axes, x.ndim)
        return _norms.instance_norm(
            x,
            axis=_axes.others((0, *axes), x.ndim),
            feature_axis=axes,
            **self._arguments(x, axes, mask),
        )
