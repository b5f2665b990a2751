"""Linen models with other norms in place of some."""

import concurrent.futures
import contextlib
import contextvars
import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from normjax import _check
from normjax.tools.kinds import (
    Left,
    kind_of,
    left_of,
    names_of,
    registered,
    warn_of,
)
from normjax.tools.models import (
    Norm,
    abstract_init,
    bridged,
    initialized,
    is_bridge,
    nnx_norms,
    substituted,
)
from normjax.tools.replace_nnx import with_rule
from normjax.tools.replace_rules import (
    Rule,
    arguments,
    check_found,
    check_groups,
    divides,
    flags_of,
    held,
    holds,
    is_own,
    made,
    no_module,
    no_norm,
)

Path = tuple[str, ...]
# What jit within a model has compiled is for one replaced model alone.
_compiled_for = jax.make_user_context(None)


class _Seen:
    """What the calls of one replaced model have shown.

    It is kept, since what is compiled is not called again.

    Attributes:
      steps: the norms that were called, before and after each rule.
      others: the classes of all other modules that were called.
      groups: for each group norm its fields and its number of features.
    """

    def __init__(self) -> None:
        self.steps: dict[Path, list[Norm]] = {}
        self.others: dict[Path, type] = {}
        self.groups: dict[Path, tuple[Mapping, int]] = {}


class _Place(NamedTuple):
    """Where a replaced model, or a part of one, is called.

    Attributes:
      seen: of the model.
      path: of the module that is called, in the variables of the whole call.
      within: the path of that module in the replaced model; () for the model itself.
    """

    seen: _Seen
    path: Path
    within: Path

    def inside(self, path: Path) -> Path | None:
        """The path of a module in the replaced model; None where it is not in it."""
        n = len(self.path)
        return (*self.within, *path[n:]) if path[:n] == self.path else None


# The replaced models that are being called, within one another.
_active: contextvars.ContextVar[tuple[_Place, ...]] = contextvars.ContextVar(
    "active", default=()
)
# Whether attributes are those of the model, as Flax itself asks for them.
_as_they_are: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "as_they_are", default=False
)
_classes: weakref.WeakValueDictionary = weakref.WeakValueDictionary()


def replaced_in_linen(model: Any, rule: Rule) -> Any:
    """A linen model with its norms replaced by a rule, beside those it has."""
    within = getattr(model, "_normjax_within", ())
    if within:  # a part of a replaced model, whose patterns are of the whole
        above = "/".join(within)
        paths = tuple(p if p == "*" else f"{above}/{p}" for p in rule.paths)
        rule = rule._replace(paths=paths)
    rules = (*getattr(model, "_normjax_rules", ()), rule)
    # Within the setup or the call of another module, a model may be bound already.
    parent = None if model.scope is None else model.scope.rewound()
    new = _plain(model.clone(parent=parent))
    object.__setattr__(new, "_normjax_seen", _Seen())
    return _as(_class_of(type(new), rules, within), new)


def _plain_class(of: type) -> type:
    """The class of a model, of that of the replaced one."""
    return of.__mro__[2] if issubclass(of, Replaced) else of


def _class_of(of: type, rules: tuple[Rule, ...], within: Path) -> type:
    """A subclass of a model's class, whose calls are those of the replaced model.

    There is one for equal rules, so that equal models are equal. It has the name of the
    model's class, by which Flax names submodules.
    """
    key: Any = (of, _hashable(rules), within)
    try:
        found = _classes.get(key)
    except TypeError:  # fields without a hash: such a model equals none but itself
        key = found = None
    if found is None:
        # Of what is made anew for each class, that of the model.
        named = ("__module__", "__qualname__", "__doc__")
        kept = ("__init__", "__eq__", "__hash__", *named)
        own = {name: getattr(of, name) for name in kept}
        own |= {"convert": of.convert} if hasattr(of, "convert") else {}
        own |= {"_normjax_rules": rules, "_normjax_within": within}
        found = types.new_class(
            of.__name__, (Replaced, of), {}, lambda body: body.update(own)
        )
        if key is not None:
            _classes[key] = found
    return found


def _hashable(tree: Any) -> Any:
    """Dictionaries and lists as tuples."""
    if isinstance(tree, Mapping):
        return tuple((k, _hashable(v)) for k, v in tree.items())
    if isinstance(tree, (tuple, list)):
        return tuple(map(_hashable, tree))
    return tree


def _as(of: type, module: Any) -> Any:
    """A module that has become one of another class, with the same attributes."""
    object.__setattr__(module, "__class__", of)
    return module


def _remade(of: type, rules: tuple[Rule, ...], within: Path) -> Any:
    """A replaced model without attributes, which pickle or copy sets."""
    new: Any = object.__new__(_class_of(of, rules, within))
    object.__setattr__(new, "_normjax_seen", _Seen())
    return new


class Replaced:
    """A linen model with other norms in place of some, as `replace` returns it.

    It is a module of a subclass of the model's class: it has the attributes and methods
    of the model, is bound, cloned, tabulated and pickled as the model is, and may be a
    part of another module. All that it calls, calls the norms that it has now, under
    jit, grad, scan, remat and device axes too, and `find_norms` finds those. Variables
    have the paths that they have in the model. It has ``convert``, too; for a model
    that has a ``convert`` of its own, ``tools.Replaced.convert(model, ...)`` is that.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import tools
      >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> replaced = tools.replace(model, "layer", "rms")
      >>> isinstance(replaced, nn.Sequential), len(replaced.layers)
      (True, 2)
      >>> variables, dropped = replaced.convert(variables, jnp.ones((2, 3)))
      >>> dropped
      ['params/layers_1/bias']
      >>> replaced.apply(variables, jnp.ones((2, 3))).shape
      (2, 4)
    """

    _normjax_rules: tuple[Rule, ...] = ()
    _normjax_within: Path = ()
    _normjax_seen: _Seen

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's: initializes the variables that the new norms need.

        ``init`` and ``lazy_init`` go through it.

        Args:
          *args: random keys, and arguments of the model's call.
          **kwargs: the same, by name, and ``method``.

        Returns:
          The output and the variables.

        Raises:
          ValueError: if a pattern matches no norm, or a replacement makes no sense.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> from normjax import tools
          >>> none = tools.replace(nn.LayerNorm(), "any", "none")
          >>> none.init_with_output(jax.random.key(0), jnp.ones(2))
          (Array([1., 1.], dtype=float32), {})
        """
        with _in_place(self, ()):
            returned = super().init_with_output(*args, **kwargs)  # type: ignore[misc]
        _check_seen(self, returned[1], is_whole=True)
        return returned

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As the model's, with ``rngs``, ``mutable``, ``method`` and all it takes.

        Args:
          variables: those of ``init`` or `convert`.
          *args: arguments of the model's call.
          **kwargs: the same, by name, and those of the model's ``apply``.

        Returns:
          What the model returns; with ``mutable`` also the variables that may change.

        Raises:
          ValueError: as `init_with_output`.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> from normjax import tools
          >>> none = tools.replace(nn.LayerNorm(), "any", "none")
          >>> none.apply({}, jnp.ones(2))
          Array([1., 1.], dtype=float32)
        """
        with _in_place(self, ()):
            returned = super().apply(variables, *args, **kwargs)  # type: ignore[misc]
        _check_seen(self, variables)
        return returned

    def convert(
        self, variables: Mapping, *args: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], list[str]]:
        """Variables of the model, as those of the replaced one.

        What old and new norms both have is carried over, what only the new ones have is
        initialized, what only the old ones have is dropped. What comes in place of a
        norm and is none is initialized whole. All else stays as it is.

        Args:
          variables: those of the model.
          *args: arguments of the model's call: arrays or ``jax.ShapeDtypeStruct``.
          **kwargs: the same, by name; ``rngs`` as ``model.apply`` has them.

        Returns:
          The variables, and the paths of those that were dropped.

        Raises:
          ValueError: if a variable of a norm is missing, or of another shape.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> from normjax import tools
          >>> x = jnp.ones((2, 4))
          >>> model = nn.BatchNorm(use_running_average=False)
          >>> grouped = tools.replace(model, "batch", "group", num_groups=2)
          >>> grouped.convert(model.init(jax.random.key(0), x), x)[1]
          ['batch_stats/mean', 'batch_stats/var']
        """
        from flax.traverse_util import flatten_dict, unflatten_dict

        whole: Any = self
        model = _plain(whole.clone())
        old = flatten_dict(abstract_init(model, *args, **kwargs))
        new = flatten_dict(abstract_init(whole, *args, **kwargs))
        given = flatten_dict(variables, keep_empty_nodes=True)
        # Paths of what was replaced, and whether by a norm, which keeps parameters.
        changed = {
            path: steps[-1].kind != ""
            for path, steps in self._normjax_seen.steps.items()
            if steps[0] is not steps[-1]
        }
        kept: dict[tuple[str, ...], Any] = {}
        dropped = []
        for name in old | new | given:
            words = tuple(map(str, name[1:]))  # nnx has lists in its state, too
            at = next((p for p in changed if words[: len(p)] == p), None)
            if at is None:
                kept |= {name: given[name]} if name in given else {}
            elif name in old and name not in given:
                raise _check.error(
                    ValueError,
                    "convert",
                    "variables must be those of the model",
                    f"none at {'/'.join(name)}",
                    "Pass what the model's init or its training returned, whole",
                )
            elif name in given and name in new and changed[at]:
                kept[name] = _like(name, given[name], new[name])
            elif name in given:
                dropped.append("/".join(map(str, name)))
        fresh = [n for n in new if n not in kept and (n not in old or n in given)]
        if fresh:
            args, kwargs = jax.tree.map(_filled, (args, kwargs))
            key = jax.random.key(0)
            initial = flatten_dict(initialized(whole, key, *args, **kwargs))
            kept |= {name: initial[name] for name in fresh}
        return unflatten_dict(kept), dropped

    # How a module of linen is made, copied, asked and called.

    def __post_init__(self) -> None:
        if "_normjax_seen" not in vars(self):
            object.__setattr__(self, "_normjax_seen", _Seen())
        super().__post_init__()  # type: ignore[misc]

    def clone(self, **changes: Any) -> Any:
        """As the model's; what a copy's calls have shown is known to all copies.

        Args:
          **changes: fields, and ``parent``.

        Returns:
          A copy, bound to nothing but to ``parent``.

        Example:
          >>> import flax.linen as nn
          >>> from normjax import tools
          >>> tools.freeze(nn.BatchNorm()).clone(epsilon=1e-3).epsilon
          0.001
        """
        token = _as_they_are.set(True)
        try:
            new = super().clone(**changes)  # type: ignore[misc]
        finally:
            _as_they_are.reset(token)
        object.__setattr__(new, "_normjax_seen", self._normjax_seen)
        return new

    def __reduce_ex__(self, protocol: Any) -> Any:
        state = {k: v for k, v in vars(self).items() if k != "_normjax_seen"}
        made_of = _plain_class(type(self)), self._normjax_rules, self._normjax_within
        return _remade, made_of, state

    def __getattribute__(self, name: str) -> Any:
        return _attribute(self, name, super().__getattribute__(name))

    def __getattr__(self, name: str) -> Any:  # of what setup has yet to make
        return _attribute(self, name, super().__getattr__(name))  # type: ignore[misc]

    def _call_wrapped_method(self, method: Any, args: tuple, kwargs: dict) -> Any:
        """Calls any method, its ``setup`` too, with the new norms in place."""
        call = functools.partial(
            super()._call_wrapped_method,  # type: ignore[misc]
            method,
            args,
            kwargs,
        )
        place = _place(self)
        if place is None or _is_active(place):
            return call()
        bound: Any = self
        with _in_place(self, place.path):
            returned = call()
        if not bound.is_initializing() and getattr(method, "__name__", "") != "setup":
            _check_seen(self, _all_variables(bound.scope, self._normjax_within))
        return returned


# Containers in which a module may have others.
_HOLDERS = tuple | list | Mapping


def _module_class() -> Any:
    from flax import linen

    return linen.Module


def _place(module: Any) -> _Place | None:
    """Where a replaced model is; None where it is bound to no variables."""
    of = vars(module)
    if of.get("scope") is None:
        return None
    return _Place(of["_normjax_seen"], of["scope"].path, type(module)._normjax_within)


def _is_active(place: _Place) -> bool:
    """Whether a call of the same replaced model is under way."""
    return any(active.seen is place.seen for active in _active.get())


def _attribute(whole: Replaced, name: str, value: Any) -> Any:
    """An attribute; of a bound model the parts, too, call the norms there are now."""
    if not name.startswith("_") and isinstance(value, _HOLDERS | _module_class()):
        place = _place(whole)
        if place is not None and not _as_they_are.get() and not _is_active(place):
            _make_parts(whole, place, value)
    return value


def _make_parts(whole: Any, place: _Place, value: Any) -> None:
    """Makes the modules among a bound model's attributes parts of the replaced model.

    They are those of the bound model alone, since binding has cloned them.
    """
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for one in value:
            _make_parts(whole, place, one)
    elif isinstance(value, _module_class()) and not isinstance(value, Replaced):
        of: Any = value
        within = None if of.scope is None else place.inside(of.path)
        if within not in (None, place.within):
            object.__setattr__(of, "_normjax_seen", place.seen)
            _as(_class_of(type(of), whole._normjax_rules, within), of)


def _all_variables(scope: Any, within: Path) -> Any:
    """The variables of a whole replaced model, from the scope of a part of it."""
    for _ in within:
        if scope.parent is None:
            return None
        scope = scope.parent
    return scope.variables()


def _plain(module: Any) -> Any:
    """An unbound copy of a module as one of the model's class."""
    return _as(_plain_class(type(module)), module)


def _check_seen(model: Replaced, variables: Any, *, is_whole: bool = False) -> None:
    """Refuses groups that do not divide, and patterns that match no norm.

    Args:
      model: the replaced model.
      variables: its variables. None: those are not known, and nothing is checked.
      is_whole: whether the calls so far have reached all that the model has.
    """
    if variables is None:
        return
    rules, seen = model._normjax_rules, model._normjax_seen
    groups, seen.groups = seen.groups, {}
    check_groups(rules[-1], groups)
    told: Left = {}
    own = names_of(variables)
    with registered(rules[-1].name, _kinds(rules)):
        left = left_of(seen.others, own)
        for i, rule in enumerate(rules):
            norms = [steps[i] for steps in seen.steps.values() if steps[i].kind]
            may_be = {p for p, names in own.items() if rule.may_want(set(names))}
            elsewhere = () if is_whole else may_be - set(seen.steps) - set(seen.others)
            told |= check_found(rule, norms, elsewhere, left)
    warn_of(rules[-1].name, told)


# The calls.


@contextlib.contextmanager
def _in_place(model: Replaced, path: Path) -> Iterator[None]:
    """Within it, calls of the model's norms are those of the new ones."""
    rules, seen = model._normjax_rules, model._normjax_seen
    place = _Place(seen, path, model._normjax_within)
    token = _active.set((*_active.get(), place))
    try:
        swap = functools.partial(_swap, rules, place)
        with _compiled_for(seen), substituted(swap):
            yield
    finally:
        _active.reset(token)


def _swap(rules: tuple[Rule, ...], place: _Place, module: Any) -> Callable | None:
    """What is called in place of a module; None for the module itself."""
    path = place.inside(module.path)
    if path is None:
        return None
    with registered(rules[-1].name, _kinds(rules)):
        if is_bridge(module):
            return _bridge(rules, place.seen, path, module)
        kind = kind_of(module)
        if kind is None:
            place.seen.others[path] = type(module)
            return None
        norm = Norm(path, kind, _plain(module.clone(parent=None)))
        _tell_parameters(norm.module, module)
        if not all(rule.is_for_all() for rule in rules) and _is_within_nn_jit():
            raise _check.error(
                ValueError,
                rules[-1].name,
                "within nn.jit, which compiles equal modules once for all their paths,"
                " norms must be replaced alike",
                f"{'/'.join(path)} within nn.jit, and paths or a function that tell"
                " norms apart",
                'Pass paths="*" and no function, or take nn.jit out of the model and'
                " put jax.jit around apply",
            )
        place.seen.steps[path] = steps = _steps(rules, norm)
    new = steps[-1]
    if new is norm:
        return None
    return functools.partial(_call, rules[-1].name, place.seen, new, module)


def known(module: Any, **fields: Any) -> Callable | None:
    """What to call in place of a batch norm of a user's own: normjax's, so called.

    It has the fields, the variables and the place of it: what a tool does with batch
    norms, it does with this one. None for all other modules. ``fields`` are those of
    norms whose class has no such field.
    """
    from normjax import linen

    if not is_own(module) or kind_of(module) != "BatchNorm":
        return None
    rule = Rule("kinds", "batch", "known", ("*",), fields, {})
    norm = Norm(module.path, "BatchNorm", module.clone(parent=None))
    _tell_parameters(norm.module, module)
    of, fields = made(rule, norm, linen)
    new = norm._replace(module=of(**fields, parent=None))
    return functools.partial(_call, rule.name, _Seen(), new, module)


def _tell_parameters(plain: Any, module: Any) -> None:
    """Gives a copy of a user's own norm the fields that say which parameters it has."""
    if is_own(module) and not module.is_initializing():
        parameters = list(module.variables.get("params", {}))
        object.__setattr__(plain, "_normjax_parameters", parameters)
        for name in ("scale", "bias"):
            if not hasattr(plain, f"use_{name}"):
                there = module.has_variable("params", name)
                object.__setattr__(plain, f"use_{name}", there)


def _kinds(rules: tuple[Rule, ...]) -> dict[type, str | None]:
    """What all rules together say which norms classes are."""
    return {of: kind for rule in rules for of, kind in rule.kinds.items()}


def _bridge(
    rules: tuple[Rule, ...], seen: _Seen, path: Path, module: Any
) -> Callable | None:
    """What makes an nnx module a part of a linen model, with its norms replaced."""

    def with_rules(n: int) -> Any:
        def made_so(*args: Any, **kwargs: Any) -> Any:
            with registered(rules[-1].name, _kinds(rules)):
                model = module.nnx_class(*args, **kwargs)
                for rule in rules[:n]:
                    model = with_rule(model, rule, nnx_norms(model)[0], path)
            return model

        return module.clone(parent=module.scope.rewound(), nnx_class=made_so)

    stages = [
        {norm.path: norm for norm in bridged(with_rules(n))}
        for n in range(len(rules) + 1)
    ]
    steps = {}
    for at in stages[0]:
        none = Norm(at, "", None)
        whole = [s.get(at, none)._replace(path=(*path, *at)) for s in stages]
        steps[*path, *at] = whole
    seen.steps |= steps
    if any(
        rule.wants(norms[i]) and rule.matches(at)
        for at, norms in steps.items()
        for i, rule in enumerate(rules)
    ):
        return with_rules(len(rules))
    return None


def _is_within_nn_jit() -> bool:
    """Whether a module is called, to be compiled, by the jit of Flax's linen."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "jitted" and frame.f_globals["__name__"] == "flax.core.lift":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _steps(rules: tuple[Rule, ...], norm: Norm) -> list[Norm]:
    """A norm, and what it is after each rule."""
    steps = [norm]
    for i, rule in enumerate(rules):
        if rule.wants(norm) and rule.matches(norm.path):
            if rule.new == "unfrozen":  # as if nothing had frozen it
                others = tuple(r for r in rules[:i] if r.new != "frozen")
                norm = _steps(others, steps[0])[-1]
            if rule.wants(norm):
                norm = _new(rule, norm)
        steps.append(norm)
    return steps


def _new(rule: Rule, norm: Norm) -> Norm:
    """What comes in place of a norm, as a module bound to nothing, or a function."""
    import flax.linen as nn

    from normjax import linen

    if isinstance(rule.new, nn.Module):
        new: Any = rule.new
    elif callable(rule.new):
        # In another thread no module is being called, of which Flax would make what
        # the function returns a part.
        with concurrent.futures.ThreadPoolExecutor(1) as executor:
            new = executor.submit(rule.new, norm).result()
        if new is None:
            return norm
    elif rule.new == "none":
        activation = getattr(norm.module, "activation", None)
        new = functools.partial(no_norm, activation=activation)
    elif holds(rule, norm):
        new = norm.module.clone(**flags_of(rule, norm))
        of = type(new)
        new = _as(held(cast(Any, of)), new)
    else:
        of, fields = made(rule, norm, linen)
        new = of(**fields, parent=None)
    if not callable(new):
        raise no_module(rule, norm, new, "a linen module or a function of x")
    return Norm(norm.path, kind_of(new) or "", new)


def _call(
    name: str, seen: _Seen, norm: Norm, module: Any, *args: Any, **kwargs: Any
) -> Any:
    """Calls what came in place of a module, with those arguments that it takes."""
    new: Any = norm.module
    if hasattr(new, "clone"):
        new = new.clone(parent=module.scope.rewound())
    if getattr(new, "_normjax_held", False):
        return new(*args, **kwargs)
    calls = type(module).__call__, new
    operands, options = arguments(name, norm.path, calls, (module, *args), kwargs)
    if norm.kind == "GroupNorm" and hasattr(new, "group_size"):
        shape = jnp.shape(operands[0])
        fields = {"num_groups": new.num_groups, "group_size": new.group_size}
        seen.groups[norm.path] = fields, shape[-1] if shape else 1
        if not divides(*seen.groups[norm.path]):
            return operands[0]  # of all such norms the error tells after the call
    return new(*operands, **options)


def _filled(a: Any) -> Any:
    """An array for what has only its shape and dtype."""
    return jnp.zeros(a.shape, a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a


def _like(name: tuple[str, ...], given: Any, new: Any) -> Any:
    """A variable that is carried over; refuses one of another shape."""
    from flax.core import meta

    shapes = [jnp.shape(meta.unbox(a)) for a in (given, new)]
    if shapes[0] != shapes[1]:
        raise _check.error(
            ValueError,
            "convert",
            "a variable that is carried over must have the shape of the new norm's",
            f"{'/'.join(name)} of shape {shapes[0]}, in the new norm {shapes[1]}",
            "Pass the variables of this model, and a new norm with parameters like"
            " those of the old one",
        )
    return given
