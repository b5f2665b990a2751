"""Types of arguments, for the signatures."""

from collections.abc import Sequence
from typing import Any, Literal, Protocol

import jax


class OfNumPy(Protocol):
    """An array of another library, that NumPy can read."""

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns it as an array of NumPy."""
        ...


class OfJax(Protocol):
    """What holds an array of JAX: a variable of Flax, say."""

    def __jax_array__(self) -> Any:
        """Returns the array."""
        ...


# What is read as an array: also numbers, and lists of them in lists.
ArrayLike = jax.typing.ArrayLike | OfNumPy | OfJax | list[Any] | tuple[Any, ...]
# A number, or an array of one.
Scalar = jax.typing.ArrayLike
DTypeLike = jax.typing.DTypeLike
# Axes of an array, one or several.
Axes = int | Sequence[int]
# Device axes, one or several, and lists of device numbers along them.
AxisNames = str | Sequence[str]
Groups = Sequence[Sequence[int]]
# Forms of an operation that a call may ask for by name.
Implementation = Literal["xla", "native"]
