"""Checkpoints on disk, as trees of numpy arrays."""

import os
import pathlib
from typing import Any

import numpy as np

from normjax import _check


def load(path: str | os.PathLike) -> Any:
    """Reads an orbax checkpoint into nested dictionaries of numpy arrays."""
    place = pathlib.Path(path).absolute()
    if not place.is_dir():
        raise _check.error(
            ValueError,
            "load",
            "a checkpoint is a folder that orbax wrote",
            f"{path}, which is no folder",
            "Pass the folder that was given to save",
        )
    ocp = _check.needed("load", "orbax-checkpoint", "orbax.checkpoint")
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(place).item_metadata.tree
        as_numpy = _map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        return checkpointer.restore(place, restore_args=as_numpy)


def _map(f: Any, tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _map(f, value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_map(f, value) for value in tree]
    return f(tree)
