"""Nnx models with other norms in place of some."""

import functools
import inspect
import math
from collections.abc import Mapping
from typing import Any, cast

from normjax import _check
from normjax.tools.kinds import is_registered, registered, warn_of
from normjax.tools.models import Norm, nnx_norms, nnx_replaced
from normjax.tools.replace_rules import (
    SWITCHES,
    Rule,
    adds,
    arguments,
    at,
    check_found,
    check_groups,
    fields_of,
    flags_of,
    has_own_call,
    held,
    holds,
    made,
    no_module,
    no_norm,
    switches,
)


def replaced_in_nnx(model: Any, rule: Rule) -> Any:
    """A copy of an nnx model with its norms replaced by a rule."""
    with registered(rule.name, rule.kinds):
        norms, left = nnx_norms(model)
        warn_of(rule.name, check_found(rule, norms, left=left))
        return with_rule(model, rule, norms, ())


def with_rule(model: Any, rule: Rule, norms: list[Norm], within: tuple) -> Any:
    """A copy of an nnx model, at a path within another, with some norms replaced."""
    places = {
        norm.path: norm
        for norm in norms
        if rule.wants(norm) and rule.matches((*within, *norm.path))
    }
    _check_places(rule, places)

    def swap(path: tuple, module: Any) -> Any:
        norm = places.get(tuple(map(str, path)))
        return None if norm is None else _new(rule, norm._replace(module=module))

    return nnx_replaced(model, swap, rule.name)


def _check_places(rule: Rule, places: Mapping[tuple, Norm]) -> None:
    """Refuses what can not be replaced, before anything is."""
    import flax.linen as nn

    import normjax.nnx

    for norm in places.values():
        if isinstance(norm.module, nn.Module):
            raise _check.error(
                TypeError,
                rule.name,
                "a linen norm in an nnx model, by Flax's bridge, stays as it is",
                f"a {type(norm.module).__name__} at {at(norm)}",
                "Leave it out by paths, or replace it before ToNNX is given it",
            )
    if rule.new == "group":
        check_groups(
            rule,
            {
                path: (made(rule, norm, normjax.nnx)[1], _features(rule, norm))
                for path, norm in places.items()
            },
        )


def _features(rule: Rule, norm: Norm) -> int:
    """How many features a norm has."""
    old = norm.module
    if getattr(old, "num_features", None) is not None:
        return old.num_features
    if hasattr(old, "group_size"):  # of Flax's group norm
        return old.num_groups * old.group_size
    named = (getattr(old, n, None) for n in ("scale", "bias", "mean", "var"))
    sizes = [math.prod(a.shape) for a in named if a is not None]
    if not sizes:
        raise _check.error(
            ValueError,
            rule.name,
            "a norm of your own must say how many features it has",
            f"a {type(old).__name__} without num_features or parameters at {at(norm)}",
            "Give it num_features",
        )
    return sizes[0]


def _new(rule: Rule, norm: Norm) -> Any:
    """What comes in place of a norm, with the variables that both have."""
    import flax.linen as nn
    from flax import nnx

    import normjax.nnx

    old, old_class = norm.module, cast(Any, type(norm.module))
    if not isinstance(rule.new, str):
        is_module = isinstance(rule.new, (nn.Module, nnx.Module))
        new = rule.new if is_module else rule.new(norm)
        if is_module or not isinstance(new, (nnx.Module, type(None))):
            wanted = "an nnx module of its own, made by a function of the norm"
            raise no_module(rule, norm, new, wanted)
        return new
    if rule.new == "none":
        return _nnx_no_norm()(adds(old), getattr(old, "activation", None))
    if holds(rule, norm):
        return _held(rule, norm)
    thawed = getattr(old, "thawed", SWITCHES["unfrozen"])
    if rule.new == "unfrozen" and isinstance(thawed, type):
        old.__class__ = thawed
        return old
    of, fields = made(rule, norm, normjax.nnx)
    if is_registered(old):  # which may have no such fields
        for name in ({"use_scale", "use_bias"} & set(fields_of(of))) - set(rule.fields):
            there = _has(old, name.removeprefix("use_"))
            fields[name] = getattr(old, name, there)
    if rule.new == "unfrozen":
        fields |= thawed
    takes = [inspect.signature(c.__call__).parameters for c in (type(old), of)]
    if rule.new == "known":
        pass  # what holds the new norm translates its calls
    elif has_own_call(old) or takes[0].keys() - takes[1].keys():
        of = called_as(of, old_class, rule.name, norm.path)
    new = of(_features(rule, norm), **fields, rngs=nnx.Rngs(0))
    if switches(new) == SWITCHES["frozen"]:  # and may be as it was again
        is_new = switches(old) != SWITCHES["frozen"]
        new.thawed = switches(old) if is_new else thawed
    shapes = []
    for name in ("scale", "bias", "mean", "var", "count", "skipped"):
        if getattr(new, name, None) is not None:
            if getattr(old, name, None) is not None:
                setattr(new, name, getattr(old, name))
            shapes.append((name, getattr(new, name).shape))
    if len({shape for _, shape in shapes}) > 1:  # of modules stacked by nnx.vmap
        raise _check.error(
            ValueError,
            rule.name,
            "a new norm in a stack can only have variables that the old one has",
            ", ".join(f"{name} of shape {shape}" for name, shape in shapes)
            + f" for {at(norm)}",
            "Replace the norms before they are stacked, or leave such fields out",
        )
    if rule.new == "known":
        return _translating()(new, old_class, rule.name, norm.path)
    return new


def known_fields(name: str, norm: Norm) -> dict[str, Any]:
    """The fields of normjax's batch norm in place of one of a user's own."""
    import normjax.nnx

    rule = Rule(name, "batch", "known", ("*",), {}, {})
    fields = made(rule, norm, normjax.nnx)[1]
    return {
        **{f"use_{n}": _has(norm.module, n) for n in ("scale", "bias")},
        **fields,
        "num_features": _features(rule, norm),
    }


def _has(module: Any, name: str) -> bool:
    return getattr(module, name, None) is not None


def _held(rule: Rule, norm: Norm) -> Any:
    """A batch norm of a user's own, of a copy of the model, with frozen statistics."""
    flags_of(rule, norm)
    of: Any = type(norm.module)
    norm.module.__class__ = held(of)
    norm.module.thawed = of
    return norm.module


@functools.cache
def called_as(of: Any, old: Any, name: str, path: tuple[str, ...]) -> Any:
    """A class of norms that may be called with all that another one is called with."""

    class Norm(of):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            operands, options = arguments(
                name, path, (old.__call__, of.__call__), (self, *args), kwargs
            )
            return super().__call__(*operands, **options)

    call: Any = Norm.__call__
    call.__signature__ = inspect.signature(old.__call__)
    Norm.__name__ = Norm.__qualname__ = of.__name__
    return Norm


@functools.cache
def _translating() -> Any:
    """The class of what holds a norm that is called as one of another class."""
    from flax import nnx

    import normjax.nnx

    class Translating(nnx.Module):
        """Calls its norm, as a tool knows it, with what another one is called with."""

        def __init__(self, norm: Any, old: Any, name: str, path: tuple[str, ...]):
            self.norm = norm
            self.old, self.name, self.path = old, name, path

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            # A tool may have put another class there, which takes anything.
            calls = self.old.__call__, normjax.nnx.BatchNorm.__call__
            operands, options = arguments(
                self.name, self.path, calls, (self, *args), kwargs
            )
            return self.norm(*operands, **options)

    return Translating


@functools.cache
def _nnx_no_norm() -> Any:
    """The class of what stands in place of a norm where there is to be none."""
    from flax import nnx

    class NoNorm(nnx.Module):
        """Returns its input, or for a norm that adds a residual, the sum."""

        def __init__(self, adds: bool, activation: Any):
            self.adds = adds
            self.activation = activation

        def __call__(self, x: Any, *others: Any, residual: Any = None, **_: Any) -> Any:
            if self.adds and others:
                residual = others[0]
            return no_norm(x, residual, activation=self.activation)

    return NoNorm
