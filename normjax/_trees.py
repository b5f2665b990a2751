"""Dataclasses of arrays: pytrees that JAX and Flax can write to bytes."""

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.export

from normjax import _check

T = TypeVar("T")

_unknown_to_flax: list[type] = []


def tree(cls: type[T]) -> type[T]:
    """Registers a dataclass whose fields are all arrays as a pytree, under its name.

    `jax.export` and ``flax.serialization`` can then write it to bytes.
    """
    jax.tree_util.register_dataclass(cls)
    jax.export.register_pytree_node_serialization(
        cls,
        serialized_name=f"normjax.{cls.__name__}",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
        from_children=lambda _, children: cls(*children),
    )
    _unknown_to_flax.append(cls)
    tell_flax()
    return cls


def tell_flax() -> None:
    """Registers the classes with ``flax.serialization``, once that is imported.

    normjax does not import it, and it may be imported later. So each new instance asks.
    """
    if not _unknown_to_flax:
        return
    serialization: Any = sys.modules.get("flax.serialization")
    if not hasattr(serialization, "register_serialization_state"):
        return
    while _unknown_to_flax:
        serialization.register_serialization_state(
            _unknown_to_flax.pop(), _state_dict, _from_state_dict
        )


def _state_dict(value: Any) -> dict[str, Any]:
    from flax import serialization

    names = [field.name for field in dataclasses.fields(value)]
    return {k: serialization.to_state_dict(getattr(value, k)) for k in names}


def _from_state_dict(value: Any, state: Any) -> Any:
    """A value of the class with the arrays of a state dict.

    A field with a default may be missing, in a file of before it was there.
    """
    from flax import serialization

    fields = {field.name: field for field in dataclasses.fields(value)}
    required = [k for k, f in fields.items() if f.default is dataclasses.MISSING]
    if isinstance(state, Mapping):
        missing = [k for k in required if k not in state]
        unknown = [k for k in state if k not in fields]
        fault = f"missing: {missing}, unknown: {unknown}" if missing or unknown else ""
    else:
        fault = f"a {type(state).__name__}"
    if fault:
        name = type(value).__name__
        raise _check.error(
            ValueError,
            name,
            f"a state dict must have the fields {', '.join(required)}",
            fault,
            f"Pass the state dict of {name}",
        )
    found = {
        k: serialization.from_state_dict(getattr(value, k), a, name=k)
        for k, a in state.items()
    }
    return type(value)(**found)
