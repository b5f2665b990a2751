"""What kind of norm a class is: of Flax's, of normjax's, or of a user's own."""

import contextlib
import contextvars
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import jax
import numpy as np

from normjax import _check

KINDS = ("BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm", "InstanceNorm")
# Which norms classes of a user's own are, as `registered` says.
_registered: contextvars.ContextVar[Mapping[type, str | None] | None] = (
    contextvars.ContextVar("registered", default=None)
)
# What the parameters of a norm are called, whatever their shapes.
_PARAMETERS = {"scale", "bias", "weight", "gamma", "beta", "offset"}
Public = TypeVar("Public", bound=Callable)
# Of modules that look like norms, by path: a class, and the kind that it looks like.
Left = dict[tuple[str, ...], tuple[str, str]]


def kind_of(module: Any) -> str | None:
    """Returns which norm a module is, by the nearest class that is known; else None.

    Known are those of Flax, of normjax, and what `registered` says.
    """
    known: dict[Any, str | None] = {}
    for library in ("normjax.linen", "flax.linen", "normjax.nnx", "flax.nnx"):
        # A module can only be of a class that somebody has imported.
        there = sys.modules.get(library)
        known |= {getattr(there, kind, None): kind for kind in KINDS}
    known |= _registered.get() or {}
    return next((known[base] for base in type(module).__mro__ if base in known), None)


def is_registered(module: Any) -> bool:
    """Whether a module is a norm because `registered` says so."""
    said = _registered.get() or {}
    return kind_of(module) is not None and any(b in said for b in type(module).__mro__)


def left_of(
    others: Mapping[tuple[str, ...], type], own: Mapping[tuple, dict[str, int]]
) -> Left:
    """Of modules that are no norms by their classes, those that look like one.

    Args:
      others: their classes, by path.
      own: as of `names_of`.
    """
    resembled = {p: (of, _resembled(of, own.get(p, {}))) for p, of in others.items()}
    return {p: (_own(of).__name__, k) for p, (of, k) in resembled.items() if k}


def names_of(variables: Mapping) -> dict[tuple[str, ...], dict[str, int]]:
    """The variables of linen's modules: by path the names, and how many axes each has.

    A name has that of its collection before it, ``params/scale``.
    """
    from flax.traverse_util import flatten_dict

    own: dict[tuple[str, ...], dict[str, int]] = {}
    for (collection, *path, name), a in flatten_dict(variables).items():
        of = own.setdefault(tuple(map(str, path)), {})
        (array, *_) = jax.tree.leaves(a) or [()]  # in the box of a partitioned one
        of[f"{collection}/{name}"] = np.ndim(array)
    return own


def _own(of: type) -> Any:
    """The first class that is not of Flax or normjax, among a class and its bases."""
    theirs = ("flax", "normjax", "builtins", "typing")
    return next(
        (b for b in of.__mro__ if b.__module__.split(".")[0] not in theirs), None
    )


def _resembled(of: type, own: Mapping[str, int]) -> str | None:
    """The kind of norm that a class looks like, by its variables; None: like none."""
    said = _registered.get() or {}
    if _own(of) is None or any(base in said for base in of.__mro__):
        return None
    if {"batch_stats/mean", "batch_stats/var"} <= set(own):
        return "BatchNorm"
    name = _own(of).__name__.lower()
    parameters = {n.split("/")[1]: ndim for n, ndim in own.items() if "params/" in n}
    vectors = all(d == 1 or n in _PARAMETERS for n, d in parameters.items())
    if "norm" not in name or not own or not vectors:
        return None
    if any(n.startswith("batch_stats/") for n in own):
        return "BatchNorm"
    centered = "LayerNorm" if len(parameters) > 1 else "RMSNorm"
    named = (k for k in KINDS if k.removesuffix("Norm").lower() in name)
    return next(named, centered)


def words_of(left: Left, most: int = 6) -> tuple[str, str]:
    """What only looks like a norm, in words, and ``kinds`` to type for it."""
    places = [
        f"{of} at {'/'.join(path) or 'the top'}" for path, (of, _) in left.items()
    ]
    more = [f"{len(places) - most} more"] if len(places) > most else []
    kinds = ", ".join(f'{of}: "{kind}"' for of, kind in sorted(set(left.values())))
    return ", ".join([*places[:most], *more]), f"kinds={{{kinds}}}"


def warn_of(name: str, left: Left) -> None:
    """Warns of modules that look like norms, and are not treated as such."""
    if not left:
        return
    places, kinds = words_of(left)
    warning: Any = _check.error(
        UserWarning,
        name,
        "norms are those of Flax's classes, of normjax's, and of the classes in kinds",
        f"{places}, which looks like a norm and is left as it is",
        f"Pass {kinds}, or None in place of a kind for a class that is none",
    )
    warnings.warn(warning, stacklevel=4)


@contextlib.contextmanager
def registered(name: str, kinds: Mapping[type, str | None] | None) -> Iterator[None]:
    """Within it, classes of a user's own are the norms that ``kinds`` says.

    All that asks for the kind of a module asks `kind_of`, which knows of it: a public
    function that takes ``kinds`` does its work within this.

    Args:
      name: of the public function, for its errors.
      kinds: from classes to kinds; None in place of a kind: no norm. None: nothing new.
    """
    token = _registered.set({**(_registered.get() or {}), **checked_kinds(name, kinds)})
    try:
        yield
    finally:
        _registered.reset(token)


def takes_kinds(public: Public) -> Public:
    """Makes a public function that has an argument ``kinds`` do its work within it."""

    @functools.wraps(public)
    def call(*args: Any, kinds: Any = None, **kwargs: Any) -> Any:
        with registered(public.__name__, kinds):
            return public(*args, **kwargs)

    return cast(Public, call)


def registered_kinds() -> tuple:
    """What `registered` says here, as a part of the key of what is kept."""
    return tuple((_registered.get() or {}).items())


def checked_kinds(
    name: str, kinds: Mapping[type, str | None] | None
) -> dict[type, str | None]:
    """Refuses what does not say which norms classes are."""
    kinds = {} if kinds is None else kinds
    if not isinstance(kinds, Mapping) or not all(isinstance(k, type) for k in kinds):
        raise _check.error(
            TypeError,
            name,
            "kinds must be a dictionary from classes to the norms that they are",
            f"kinds={kinds!r}",
            'Pass kinds={MyNorm: "LayerNorm"}, say',
        )
    wrong = [k for k in kinds.values() if k not in (*KINDS, None)]
    if wrong:
        raise _check.error(
            ValueError,
            name,
            f"each of kinds must be one of {', '.join(KINDS)}, or None for no norm",
            f"{wrong[0]!r}",
            'Pass kinds={MyNorm: "LayerNorm"}, say',
        )
    return dict(kinds)
