"""Which form of an operation runs: by name in a call, or for a whole program."""

import os
from typing import Any

from normjax import _check

NAMES = ("xla", "native")
_VARIABLE = "NORMJAX_IMPLEMENTATION"
_program: str | None = None


def set_implementation(implementation: str | None) -> None:
    """Chooses the implementation of all norms that name none, in this process.

    It holds for what is traced afterwards: a function that `jax.jit` has compiled
    stays as it is. ``NORMJAX_IMPLEMENTATION=xla`` in the environment does the same.

    Args:
      implementation: "xla", what XLA makes of the formula, or "native", kernels for
        CPUs where they serve, and XLA's form elsewhere. If None, as "native".

    Raises:
      ValueError: if there is no such implementation.

    Example:
      >>> import normjax
      >>> normjax.set_implementation("xla")
      >>> normjax.set_implementation(None)
    """
    global _program
    _program = _named("set_implementation", implementation)


def program() -> str | None:
    """What `set_implementation` or the environment has chosen."""
    return _program


def chosen(name: str, implementation: Any) -> str | None:
    """What a call of the function ``name`` asks for: a name, or None for what serves.

    An implementation for the whole program is no demand of a call.
    """
    implementation = _named(name, implementation)
    if implementation is None and _program == "xla":
        return "xla"
    return implementation


def _named(name: str, implementation: Any) -> str | None:
    if implementation is None or (
        isinstance(implementation, str) and implementation in NAMES
    ):
        return implementation
    raise _check.error(
        ValueError,
        name,
        f"implementation must be {' or '.join(map(repr, NAMES))}, or None",
        _check.shown("implementation", implementation),
        "Pass implementation=None for what serves best",
    )


def refused(implementation: str, why_not: str) -> Exception:
    """The error of an implementation that is asked for by name and does not serve."""
    return _check.error(
        ValueError,
        "normjax",
        f"implementation={implementation!r} must be able to serve the call",
        why_not,
        "Pass implementation=None for what serves best, or 'xla'",
    )


_program = _named(_VARIABLE, os.environ.get(_VARIABLE) or None)
