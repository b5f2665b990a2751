"""The norms of a model: which of its modules they are, and others in their place."""

import contextlib
import contextvars
import fnmatch
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from normjax import _check
from normjax.tools.kinds import Left, left_of, names_of, registered, warn_of
from normjax.tools.kinds import kind_of as kind_of

# Of each `substituted` around a call: what calls a module, and whom it is calling.
_substitutions: contextvars.ContextVar[tuple] = contextvars.ContextVar(
    "substitutions", default=()
)


class Norm(NamedTuple):
    """A norm of a model.

    Attributes:
      path: names from the model down to it, as in its variables.
      kind: "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm" or "InstanceNorm".
      module: the module itself, of Flax or of normjax; for linen with its fields alone,
        bound to no variables.

    Example:
      >>> from normjax import linen, tools
      >>> tools.Norm(("norm",), "LayerNorm", linen.LayerNorm()).path
      ('norm',)
    """

    path: tuple[str, ...]
    kind: str
    module: Any


def find_norms(
    model: Any,
    *args: Any,
    kinds: Mapping[type, str | None] | None = None,
    **kwargs: Any,
) -> list[Norm]:
    """Finds the norms of a model, by what its modules are and not by their names.

    A linen model is called once on shapes alone: nothing is computed. What it shows are
    the norms that such a call reaches. An nnx model is walked through. In a linen model
    the norms of nnx modules are found, too, which Flax's bridge makes a part of it.

    A class of your own that only looks like a norm is not among them, and a warning
    names it: the name of the class has "norm" in it and its parameters are vectors, or
    it has a mean and a var in ``batch_stats``.

    Args:
      model: a linen or nnx module, or what `replace` returned.
      *args: for linen: arguments of the model's call; arrays or
        ``jax.ShapeDtypeStruct``. What is neither is passed on as it is.
      kinds: which norms classes of your own are: ``{MyNorm: "RMSNorm"}``; None in place
        of a kind for a class that is none. It holds for subclasses, too.
      **kwargs: the same as ``*args``, by name; for linen also ``rngs`` and
        ``method``, as ``model.apply`` has them.

    Returns:
      The norms of Flax's classes, of normjax's and of ``kinds``, in the order of their
      first call, or for nnx of their paths; one that is called often is there once.

    Raises:
      TypeError: if model is neither a linen nor an nnx module, a linen model's call
        needs arguments and there are none, or kinds is no dictionary of classes.
      ValueError: if kinds has a word that is no kind.

    Example:
      >>> import flax.linen as nn
      >>> import jax.numpy as jnp
      >>> from normjax import linen, tools
      >>> model = nn.Sequential([nn.Dense(4), linen.LayerNorm(), nn.Dense(2)])
      >>> [(n.path, n.kind) for n in tools.find_norms(model, jnp.ones((1, 3)))]
      [(('layers_1',), 'LayerNorm')]
    """
    with registered("find_norms", kinds):
        if system_of("find_norms", model) == "nnx":
            norms, left = nnx_norms(model)
            _warn_of_linen(model)
        else:
            if not args and not kwargs:
                _check_call(model)
            norms, left = _linen_norms(model, args, kwargs)
        warn_of("find_norms", left)
    return norms


def _linen_norms(model: Any, args: tuple, kwargs: dict) -> tuple[list[Norm], "Left"]:
    """The norms that a call of a linen model reaches, and what only looks like one."""
    found: dict[tuple[str, ...], list[Norm]] = {}
    others: dict[tuple[str, ...], type] = {}

    def note(module: Any) -> None:
        path = module.path
        if path in found:
            return
        if kind := kind_of(module):
            found[path] = [Norm(path, kind, module.clone(parent=None))]
        elif is_bridge(module):
            found[path] = [n._replace(path=path + n.path) for n in bridged(module)]
        else:
            others[path] = type(module)

    with substituted(note):
        variables = abstract_init(model, *args, **kwargs)
    norms = [norm for norms in found.values() for norm in norms]
    return norms, left_of(others, names_of(variables))


def _check_call(model: Any) -> None:
    """Refuses a linen model whose call needs arguments, of which there are none."""
    call = inspect.signature(type(model).__call__)
    needed = [
        p.name
        for p in list(call.parameters.values())[1:]
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if needed:
        raise _check.error(
            TypeError,
            "find_norms",
            "a linen model is called once, to see which norms that reaches",
            f"no arguments, and {type(model).__name__} needs {', '.join(needed)}",
            "Pass them after the model, arrays or jax.ShapeDtypeStruct",
        )


def system_of(name: str, model: Any) -> str:
    """Returns "linen" or "nnx"; refuses what is a module of neither."""
    for system in ("linen", "nnx"):
        module = getattr(sys.modules.get(f"flax.{system}"), "Module", None)
        if module is not None and isinstance(model, module):
            return system
    raise _check.error(
        TypeError,
        name,
        "model must be a module of flax.linen or flax.nnx",
        f"{type(model).__name__}",
        "Pass the model itself, not its variables or its apply",
    )


# Flax's bridge between linen and nnx.


def is_bridge(module: Any) -> bool:
    """Whether a linen module makes an nnx module a part of a linen model."""
    of = getattr(sys.modules.get("flax.nnx.bridge"), "ToLinen", None)
    return of is not None and isinstance(module, of)


def bridged(module: Any) -> list[Norm]:
    """The norms of the nnx module that a bridge holds, by their paths in it."""
    from flax import nnx

    def made() -> Any:
        rngs = {} if module.skip_rng else {"rngs": nnx.Rngs(0)}
        return module.nnx_class(*module.args, **{**module.kwargs, **rngs})

    inner = nnx.eval_shape(made)
    return nnx_norms(inner)[0]


def nnx_norms(model: Any) -> tuple[list[Norm], Left]:
    """The norms of an nnx model, and what only looks like one."""
    norms: list[Norm] = []
    others: dict[tuple[str, ...], type] = {}
    own: dict[tuple, dict[str, int]] = {}
    for path, module in nnx_modules(model):
        place = tuple(map(str, path))
        inner = of_linen(module)
        if kind := kind_of(module if inner is None else inner):
            norms.append(Norm(place, kind, module if inner is None else inner))
        elif inner is None:
            others[place] = type(module)
            own[place] = _nnx_names(module)
    return norms, left_of(others, own)


def of_linen(module: Any) -> Any:
    """The linen module that a bridge makes a part of an nnx model; else None."""
    bridge = getattr(sys.modules.get("flax.nnx.bridge"), "ToNNX", None)
    is_bridge = bridge is not None and isinstance(module, bridge)
    return module.to_nnx__module if is_bridge else None


def _warn_of_linen(model: Any) -> None:
    """Warns of linen modules in an nnx model that may hold norms, which none sees."""
    from flax import nnx

    hidden = []
    for path, module in nnx_modules(model):
        inner = of_linen(module)
        if inner is None or kind_of(inner) or _is_layer(inner):
            continue
        own = leaves(nnx.state(module, nnx.Not(nnx.RngState)))
        if not own or any(p[-1] in ("scale", "mean") for p in own):
            hidden.append(f"{type(inner).__name__} at {'/'.join(map(str, path))}")
    if hidden:
        warning: Any = _check.error(
            UserWarning,
            "find_norms",
            "the norms of a linen module in an nnx model show in a call of that module"
            " alone",
            ", ".join(hidden),
            "Pass the linen module and the arguments of its call to tools.find_norms as"
            " well",
        )
        warnings.warn(warning, stacklevel=3)


def _is_layer(module: Any) -> bool:
    """Whether a linen module is one of Flax's layers that hold no other module."""
    return type(module).__module__ in ("flax.linen.linear", "flax.linen.stochastic")


def _nnx_names(module: Any) -> dict[str, int]:
    """The variables of one module of nnx, as of `names_of`."""
    from flax import nnx

    collections = {nnx.Param: "params", nnx.BatchStat: "batch_stats"}
    return {
        f"{collection}/{name}": np.ndim(value.get_value())
        for name, value in vars(module).items()
        for of, collection in collections.items()
        if isinstance(value, of)
    }


def devices_of(norm: Any) -> dict[str, Any]:
    """The named axes of a norm that are there where it is called, as arguments.

    Of a ``vmap`` within the model; those of the devices around its call are not.
    """
    names = getattr(norm, "axis_name", None)
    names = names if isinstance(names, (tuple, list)) else (names,)
    bound = tuple(n for n in names if n is not None and _check.is_bound(n))
    groups = norm.axis_index_groups if bound and len(bound) == len(names) else None
    return {"axis_name": bound or None, "axis_index_groups": groups}


def axes_of(kind: str | None, module: Any) -> Any:
    """The field of a norm that says its axes, those of features or those reduced.

    A class of a user's own may not have it, and is what its kind is by default.
    """
    name = {"BatchNorm": "axis", "InstanceNorm": "feature_axes"}
    usual = None if kind == "GroupNorm" else -1
    return getattr(module, name.get(kind or "", "reduction_axes"), usual)


def groups_of(module: Any, features: int) -> int | None:
    """The groups of a group norm; None where a class of a user's own hides them."""
    size = getattr(module, "group_size", None)
    return getattr(module, "num_groups", None) if size is None else features // size


def operand(call: Callable, args: tuple, kwargs: dict) -> str | None:
    """The name of what a norm normalizes, where its call has it by name, else None."""
    return None if args else next(iter(inspect.signature(call).parameters))


def patterns(name: str, paths: Any) -> tuple[str, ...]:
    """Returns one pattern of paths or several as a tuple."""
    found = (paths,) if isinstance(paths, str) else paths
    if not isinstance(found, (tuple, list)) or not all(
        isinstance(p, str) for p in found
    ):
        raise _check.error(
            TypeError,
            name,
            "paths must be a pattern of paths, or several",
            f"paths={paths!r}",
            'Pass "encoder/*", say',
        )
    if not found:
        raise _check.error(
            ValueError,
            name,
            "paths must have one pattern at least",
            f"paths={paths!r}",
            'Pass "*" for all, or leave it out for none',
        )
    return tuple(found)


def matches(pattern: str, path: tuple[str, ...]) -> bool:
    """Whether a pattern matches a path, or that of a module which it lies in.

    ``*`` stands for any characters, the slash among them, ``?`` for one, and ``[ab]``
    for one of those.
    """
    above = ("/".join(path[: i + 1]) for i in range(max(len(path), 1)))
    return any(fnmatch.fnmatchcase(one, pattern) for one in above)


def path_of(keys: tuple) -> tuple[str, ...]:
    """The path in a tree, of keys as JAX has them, as words.

    Without the last step into what boxes an array: a variable of nnx, a partitioned
    parameter of linen.
    """
    if len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value"):
        keys = keys[:-1]
    words = (getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))) for k in keys)
    return tuple(map(str, words))


def variables_of(tree: Any) -> Any:
    """The state of an nnx module; what is none is a tree already."""
    nnx = sys.modules.get("flax.nnx")
    return nnx.state(tree) if nnx and isinstance(tree, nnx.Module) else tree


def is_linen(model: Any) -> bool:
    """Whether something is a module of linen."""
    of = getattr(sys.modules.get("flax.linen"), "Module", None)
    return of is not None and isinstance(model, of)


def leaves(tree: Any) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree by their paths; a variable of nnx counts as its array."""
    found = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable)
    return {path_of(keys): leaf for keys, leaf in found}


def is_variable(value: Any) -> bool:
    """Whether a value is a variable of nnx."""
    of = getattr(sys.modules.get("flax.nnx"), "Variable", None)
    return of is not None and isinstance(value, of)


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """The arrays of a tree by their paths, be they boxed, as in a checkpoint of nnx."""
    found = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = path_of(keys)
        boxed = len(names) > 1 and names[-1] == "value"
        found[names[:-1] if boxed else names] = leaf
    return found


def initialized(
    model: Any,
    key: jax.Array,
    *args: Any,
    rngs: Any = None,
    mutable: Any = None,
    **kwargs: Any,
) -> Any:
    """Returns the variables of a linen model, given what its ``apply`` takes.

    The streams of ``rngs`` are there beside that of the parameters, which is ``key``;
    ``mutable`` says nothing of an ``init``, which returns all.
    """
    streams = rngs if isinstance(rngs, Mapping) else {}
    return model.init({**streams, "params": key}, *args, **kwargs)


def abstract_init(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns the shapes of what `initialized` returns; computes nothing."""
    arrays, rebuilt = arrays_of((args, kwargs))

    def init(key: jax.Array, arrays: list) -> Any:
        args, kwargs = rebuilt(arrays)
        return initialized(model, key, *args, **kwargs)

    return jax.eval_shape(init, jax.random.key(0), arrays)


def arrays_of(tree: Any) -> tuple[list, Callable[[list], Any]]:
    """Returns the arrays of a tree, and what puts others of them in their place.

    What is no array, a flag say, is what it was, and never traced.
    """
    leaves, structure = jax.tree.flatten(tree)
    is_of = [is_array(a) for a in leaves]

    def rebuilt(arrays: list) -> Any:
        left = iter(arrays)
        whole = [next(left) if of else a for a, of in zip(leaves, is_of, strict=True)]
        return jax.tree.unflatten(structure, whole)

    return [a for a, of in zip(leaves, is_of, strict=True) if of], rebuilt


def is_array(value: Any) -> bool:
    """Whether a value is an array; a flag of NumPy is a flag."""
    shaped = hasattr(value, "shape") and hasattr(value, "dtype")
    return shaped and not isinstance(value, np.bool_)


@contextlib.contextmanager
def substituted(
    swap: Callable[[Any], Any], first: Callable[[Any], Any] | None = None
) -> Iterator[list]:
    """Within it, other linen modules are called in place of some of a model.

    Args:
      swap: takes the bound module whose ``__call__`` is at hand, and returns what to
        call with its arguments instead, a function or a module made with
        ``parent=module.scope.rewound()``, so that it finds the same variables; or None
        for the module itself.
      first: the same, for what is to be swapped for a module that ``swap`` knows, which
        is then asked about that one. None: nothing is.

    Yields:
      The paths of the modules that were swapped, in order of their calls; a program
      that was compiled before, and is not traced again, adds none.
    """
    import flax.linen as nn

    swapped: list[tuple[str, ...]] = []
    inside: list[Any] = []  # a call within a call of the same variables is not swapped
    outer = _substitutions.get()

    def called(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        """Calls what is swapped for a module; else what the ones around would swap."""
        module = context.module
        place = (module.scope.root, module.path)
        if any(place == p for p in inside):
            return call(*args, **kwargs)
        other = swap(module)
        if other is not None:
            swapped.append(module.path)
        inside.append(place)
        try:
            if other is not None:
                return other(*args, **kwargs)
            if outer:
                return outer[-1][0](call, args, kwargs, context)
            return call(*args, **kwargs)
        finally:
            inside.pop()

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or module.scope is None:
            return call(*args, **kwargs)
        # Those within come first, and this one sees what they have made of a module:
        # of a replaced model, the norms that it has now.
        place = (module.scope.root, module.path)
        within = _substitutions.get()[len(outer) + 1 :]
        if any(place not in calling for _, calling in within):
            return call(*args, **kwargs)
        known = first(module) if first is not None else None
        if known is not None:
            return known(*args, **kwargs)
        return called(call, args, kwargs, context)

    token = _substitutions.set((*outer, (called, inside)))
    try:
        with nn.intercept_methods(interceptor):
            yield swapped
    finally:
        _substitutions.reset(token)


def check_concrete(name: str, tree: Any) -> None:
    """Refuses what is traced: a tool reads values, and compiles what it needs."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not _check.is_concrete(leaf):
            raise _check.error(
                TypeError,
                name,
                "what it is given must have values, which it reads",
                f"a traced array{jax.tree_util.keystr(keys)}, as within jit, vmap or"
                " grad",
                "Call it outside of them; it compiles the model itself",
            )


@contextlib.contextmanager
def told_mutable(mutable: Any) -> Iterator[None]:
    """Within it, linen modules that ask what is mutable hear of ``mutable`` alone.

    What a tool sees leaves a model as variables do, and more collections must be
    mutable for that than the model is called with. A model that asks, to know whether
    it trains or is initialized, is to do what it does without the tool.

    Args:
      mutable: as ``apply`` takes it.
    """
    import flax.linen as nn
    from flax.core.scope import in_filter

    answer = functools.partial(in_filter, mutable)

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        # Of the bound module, which is gone after the call.
        object.__setattr__(context.module, "is_mutable_collection", answer)
        return call(*args, **kwargs)

    with nn.intercept_methods(interceptor):
        yield


def with_statistics(mutable: Any) -> Any:
    """What is mutable, and running statistics too, which a norm may write."""
    from flax.core.scope import union_filters

    return union_filters(mutable, "batch_stats")


def nnx_modules(model: Any) -> Iterator[tuple[tuple, Any]]:
    """The modules of an nnx model with their paths, each once; the model comes last."""
    from flax import nnx

    return (
        (path, value)
        for path, value in nnx.iter_graph(model)
        if isinstance(value, nnx.Module)
    )


def nnx_copy(model: Any) -> Any:
    """A copy of an nnx model that can be changed, and shares nothing that could be.

    Flax's modules write into NumPy arrays, of restored state, in their place.
    """
    from flax import nnx

    def own(a: Any) -> Any:
        return a.copy() if isinstance(a, np.ndarray) else a

    graph, state = nnx.split(model)
    return nnx.merge(graph, jax.tree.map(own, state), copy=True)


def nnx_replaced(
    model: Any, swap: Callable[[tuple, Any], Any], name: str = "replace"
) -> Any:
    """A copy of an nnx model, with other modules in place of some.

    Args:
      model: the module, which stays as it is.
      swap: takes a path and the module of the copy that is there, and returns what to
        put in all the places where that module is, or None for the module itself.
      name: of the public function, for its errors.
    """
    from flax import nnx

    model = nnx_copy(model)
    modules = list(nnx_modules(model))
    others = {id(m): other for path, m in modules if (other := swap(path, m))}
    placed = {id(model)}
    holders = [v for _, v in nnx.iter_graph(model) if isinstance(v, nnx.Pytree)]
    holder: Any
    for holder in holders:
        for key, value in list(nnx.iter_children(holder)):
            if id(value) not in others:
                continue
            placed.add(id(value))
            if isinstance(key, int):  # of a list
                holder[key] = others[id(value)]
            else:
                setattr(holder, str(key), others[id(value)])
        for key, value in list(vars(holder).items()):
            # Of plain containers, which are values and are made anew.
            if _is_nnx(value):
                continue
            held = jax.tree.leaves(value, is_leaf=_is_nnx)
            if any(id(v) in others for v in held):
                placed |= {id(v) for v in held}
                new = [others.get(id(v), v) for v in held]
                structure = jax.tree.structure(value, is_leaf=_is_nnx)
                setattr(holder, key, nnx.data(jax.tree.unflatten(structure, new)))
    for path, module in modules:
        if id(module) in others and id(module) not in placed:
            raise _check.error(
                TypeError,
                name,
                "what holds a norm must be an nnx.Pytree, such as an nnx.Module, or a"
                " pytree in one",
                f"{type(module).__name__} at {'/'.join(map(str, path))} in something"
                " else",
                "Let its class inherit from nnx.Pytree",
            )
    return others.get(id(model), model)


def _is_nnx(value: Any) -> bool:
    """Whether a value is a node or a variable of nnx, and not a plain container."""
    from flax import nnx

    return isinstance(value, (nnx.Pytree, nnx.Variable))
