"""What the files of Keras call the layers of a model."""

import os
import tempfile
import warnings
from typing import Any

from normjax import _check


def keras_names(model: Any) -> dict[str, str]:
    """Says where in its files a Keras 3 model has the weights of each layer.

    A file numbers layers by their classes, ``layers/conv2d_1``, whatever they are
    called. What this returns is what `from_keras` and `to_keras` take for ``names``, if
    the modules of the Flax model are called as the layers of the Keras model are. Of
    others the values are those to write: ``{"stem": names["conv1"]}``. Keras writes its
    weights to a temporary file for it.

    Args:
      model: a model of Keras 3, built.

    Returns:
      The path in the file for each layer that has weights of its own, by the names of
      the layers that it lies in: ``{"block/conv": "layers/functional/layers/conv2d"}``.
      A layer that several others share is there once, where the file has it.

    Raises:
      TypeError: if model is none of Keras, or has not been built.
      ValueError: if two layers with weights have the same names, or this version of
        Keras writes none.

    Example:
      >>> import importlib.util, os
      >>> from normjax import tools
      >>> if importlib.util.find_spec("keras"):
      ...     _ = os.environ.setdefault("KERAS_BACKEND", "jax")
      ...     import keras
      ...     layers = [keras.Input((3,)), keras.layers.Dense(2, name="fc")]
      ...     names = tools.keras_names(keras.Sequential(layers))
      ...     assert names == {"fc": "layers/dense"}
    """
    if not hasattr(model, "save_weights") or not getattr(model, "built", False):
        raise _check.error(
            TypeError,
            "keras_names",
            "model must be a model of Keras 3 that has been built",
            f"{type(model).__name__}",
            "Pass the keras.Model itself, after model.build(...) or a call",
        )
    h5py = _check.needed("keras_names", "h5py", "h5py")
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "names.weights.h5")
        with warnings.catch_warnings():  # of Keras's own dealings with numpy
            warnings.simplefilter("ignore", DeprecationWarning)
            model.save_weights(path)
        with h5py.File(path, "r") as file:
            called: dict[str, str] = {}  # by the path of each layer
            has_weights = []

            def visit(name: str, entry: Any) -> None:
                layer, _, last = f"/{name}".rpartition("/")
                if last == "vars" and "name" in entry.attrs:
                    called[layer] = entry.attrs["name"]
                if last == "vars" and len(entry):
                    has_weights.append(layer)

            file.visititems(visit)
    for layer in has_weights:
        _add(found, called, layer)
    return found


def _add(found: dict[str, str], called: dict[str, str], layer: str) -> None:
    """Adds a layer, by the names of those that it lies in, but for the model's."""
    parts = layer.split("/")
    above = ["/".join(parts[: n + 1]) for n in range(1, len(parts))]
    if layer not in called:
        raise _check.error(
            ValueError,
            "keras_names",
            "Keras must write the names of layers beside their weights",
            f"none at {layer.lstrip('/')!r}",
            "Update Keras: pip install -U keras",
        )
    name = "/".join(called[path] for path in above if path in called)
    if name in found:
        raise _check.error(
            ValueError,
            "keras_names",
            "layers with weights must have different names",
            f"{name!r} at {found[name]!r} and at {layer.lstrip('/')!r}",
            "Give them names: keras.layers.Dense(8, name=...)",
        )
    found[name] = layer.lstrip("/")
