"""The defaults of other libraries, as fields of the modules here."""

from typing import Any

from normjax import _check

# Fields of batch norm: momentum is the part of the OLD value, in all of them.
_BATCH: dict[str, dict[str, Any]] = {
    "flax": {"momentum": 0.99, "epsilon": 1e-5},
    "torch": {"momentum": 0.9, "epsilon": 1e-5, "running_variance": "unbiased"},
    "keras": {"momentum": 0.99, "epsilon": 1e-3},
    "haiku": {"epsilon": 1e-5, "debias": True},  # decay_rate has no default there
}
# Epsilon of layer, RMS, group and instance norm. Of torch's RMSNorm it is that of the
# dtype which is computed in, float32 for half precision.
_EPSILON = {
    "flax": (1e-6, 1e-6, 1e-6, 1e-6),
    "torch": (1e-5, 2.0**-23, 1e-5, 1e-5),
    "keras": (1e-3, 1e-6, 1e-3, 1e-3),
    "haiku": (1e-5, 1e-5, 1e-5, 1e-5),
}
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")


def preset(library: str, norm: str) -> dict[str, Any]:
    """Returns the fields that give a module the defaults of another library.

    Of batch norm these are momentum (the part of the OLD value; PyTorch's is one minus
    it), epsilon, Bessel's correction of the running variance, and debiasing; of the
    others epsilon, and of PyTorch's InstanceNorm that it has no parameters. Axes, sizes
    and dtypes stay those of Flax: features are last. Haiku has no default momentum, and
    Keras's instance norm is its ``GroupNormalization(groups=-1)``.

    Args:
      library: "flax", "torch", "keras" or "haiku".
      norm: "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm" or "InstanceNorm".

    Returns:
      Fields by name, for the module of ``normjax.linen`` or ``normjax.nnx``.

    Raises:
      ValueError: if library or norm is another.

    Example:
      >>> from normjax import linen, tools
      >>> norm = linen.BatchNorm(**tools.preset("torch", "BatchNorm"))
      >>> norm.momentum, norm.running_variance
      (0.9, 'unbiased')
    """
    if library not in tuple(_BATCH) or norm not in ("BatchNorm", *_NORMS):
        raise _check.error(
            ValueError,
            "preset",
            f"library must be one of {', '.join(_BATCH)}, and norm one of BatchNorm,"
            f" {', '.join(_NORMS)}",
            f"library={library!r}, norm={norm!r}",
            "Pass library='torch', norm='BatchNorm', say",
        )
    if norm == "BatchNorm":
        return {"running_variance": "biased", "debias": False} | _BATCH[library]
    fields: dict[str, Any] = {"epsilon": _EPSILON[library][_NORMS.index(norm)]}
    if (library, norm) == ("torch", "InstanceNorm"):
        fields |= {"use_scale": False, "use_bias": False}
    return fields
