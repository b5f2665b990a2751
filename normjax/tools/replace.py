"""Other norms in place of a model's, with the parameters that both have."""

import concurrent.futures
import contextlib
import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from normjax import _axes, _check, _fused
from normjax.tools.models import (
    Norm,
    abstract_init,
    find_norms,
    initialized,
    kind_of,
    leaves,
    matches,
    nnx_replaced,
    patterns,
    substituted,
    system_of,
    variables_of,
)

_CLASSES = {
    "batch": "BatchNorm",
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "group": "GroupNorm",
    "instance": "InstanceNorm",
}
# Batch norms, told apart by their fields.
_SWITCHES: dict[str, dict[str, Any]] = {
    "batch": {},
    "synced": {},
    "frozen": {"normalize_with": "running", "update_statistics": False},
    "unfrozen": {"normalize_with": None, "update_statistics": None},
}
_NEW = (*_CLASSES, "synced", "frozen", "none")
# What jit within a model has compiled is for one replaced model alone.
_compiled_for = jax.make_user_context(None)


class Rule(NamedTuple):
    """What comes in place of which norms.

    Attributes:
      name: of the public function, for its errors.
      old: "batch", "layer", "rms", "group", "instance" or "any".
      new: one of the same, "synced", "frozen", "unfrozen" or "none", a linen module, or
        a function of a norm.
      paths: patterns of the paths of the norms.
      fields: fields of the new norms, beside those of the old ones.
    """

    name: str
    old: str
    new: Any
    paths: tuple[str, ...]
    fields: Mapping[str, Any]

    def wants(self, norm: Norm) -> bool:
        """Whether it is about norms such as this one, wherever they are."""
        if not norm.kind or self.old not in ("any", _word(norm.kind)):
            return False
        return self.new != "unfrozen" or _switches(norm.module) == _SWITCHES["frozen"]

    def may_want(self, names: set[str]) -> bool:
        """Whether a module with variables of such names may be one that it is about."""
        if "batch_stats/mean" in names:
            return self.old in ("any", "batch")
        return self.old != "batch" and names <= {"params/scale", "params/bias"}

    def matches(self, path: tuple[str, ...]) -> bool:
        """Whether it is about norms at this path."""
        return any(matches(p, path) for p in self.paths)

    def is_for_all(self) -> bool:
        """Whether it treats norms alike wherever they are."""
        asks = callable(self.new) and not hasattr(self.new, "clone")
        return "*" in self.paths and not asks

    def __str__(self) -> str:
        """The norms that it is about, in words."""
        what = "norms" if self.old == "any" else f"{self.old} norms"
        return f"frozen {what}" if self.new == "unfrozen" else what


def replace(model: Any, old: str, new: Any, *, paths: Any = "*", **fields: Any) -> Any:
    """Puts other norms in place of a model's, without a change of its source.

    The new norms stand at the paths of the old ones, and have their fields and their
    parameters, as far as both have them: a batch norm that becomes a group norm keeps
    its scale, bias and epsilon, and has no statistics; a layer norm that becomes an RMS
    norm loses its bias; what an RMS norm becomes has none. ``axis_name`` of a batch
    norm, which divides the batch, is not that of the others, which divide space or
    features. The new norms are those of normjax: ``replace(model, "any", "same")`` puts
    them in place of Flax's, and changes nothing else.

    Args:
      model: a linen or nnx module, or what this function returned.
      old: which norms: "batch", "layer", "rms", "group", "instance" or "any".
      new: what to put there: one of the same words but "any"; "same", the norm of
        normjax of the same kind; "synced", a batch norm over the device axes that
        ``axis_name`` says; "frozen", as `freeze` does; "none", which returns its input;
        or, for all that has no word, a function of the `Norm` that returns a module, or
        None to leave it as it is. For linen also a module itself, and the function may
        return any function of ``x``.
      paths: a pattern of paths, or several: ``"encoder/*"``. A pattern that matches a
        module stands for all in it; ``*`` stands for any characters, slashes too.
      **fields: fields of the new norms: ``num_groups=8``, ``axis_name="batch"``.

    Returns:
      For nnx a copy of the model, whose variables are copies. For linen a `Replaced`,
      with ``init`` and ``apply`` as the model has them, and ``convert`` for variables
      that the model has already.

    Raises:
      TypeError: if model is no module, or a function returns none.
      ValueError: if nothing matches, a word is unknown, groups do not divide the
        features, or a replacement makes no sense, such as a layer norm with frozen
        statistics. For linen, where that depends on the call, in ``init`` and
        ``apply``.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import tools
      >>> model = nn.Sequential([nn.Dense(4), nn.BatchNorm(use_running_average=False)])
      >>> grouped = tools.replace(model, "batch", "group", num_groups=2)
      >>> variables = grouped.init(jax.random.key(0), jnp.ones((8, 3)))
      >>> list(variables), grouped.apply(variables, jnp.ones((8, 3))).shape
      (['params'], (8, 4))
    """
    return replaced(model, _rule("replace", old, new, paths, fields))


def replaced(model: Any, rule: Rule) -> Any:
    """Returns a model with its norms replaced by a rule."""
    if isinstance(model, Replaced):
        return Replaced(model.model, (*model.rules, rule))
    if system_of(rule.name, model) == "linen":
        return Replaced(model, (rule,))
    return _replaced_in_nnx(model, rule)


def _rule(name: str, old: str, new: Any, paths: Any, fields: dict) -> Rule:
    """Returns a rule; refuses what makes no sense whatever the norms are."""
    paths = patterns(name, paths)
    words = {"old": (old, (*_CLASSES, "any")), "new": (new, (*_NEW, "same"))}
    for what, (word, known) in words.items():
        if word not in known and (what == "old" or isinstance(word, str)):
            raise _check.error(
                ValueError,
                name,
                f"{what} must be one of {', '.join(map(repr, known))}"
                + (", a module or a function" if what == "new" else ""),
                f"{what}={word!r}",
                f"Pass {what}={known[0]!r}, say",
            )
    if isinstance(new, str) and new in _SWITCHES and old != "batch":
        raise _check.error(
            ValueError,
            name,
            "only a batch norm has running statistics, and a call that says whether to"
            f" use them, so that it can become {new!r}",
            f"old={old!r}",
            'Pass old="batch"',
        )
    if new == "synced" and fields.get("axis_name") is None:
        raise _check.error(
            ValueError,
            name,
            "a synced batch norm needs the name of the device axes",
            "no axis_name",
            'Pass axis_name="batch", or what the pmap or shard_map around the call has;'
            " under jit over sharded arrays statistics are synced without it",
        )
    if fields and (new == "none" or not isinstance(new, str)):
        raise _check.error(
            ValueError,
            name,
            "fields are those of norms that this function makes",
            f"{', '.join(fields)} for new={new!r}",
            "Give them to the module itself" if new != "none" else "Leave them out",
        )
    return Rule(name, old, new, paths, fields)


def _switches(module: Any) -> dict[str, Any]:
    """Those fields of a norm by which it uses its statistics, and moves them."""
    return {name: getattr(module, name, None) for name in _SWITCHES["frozen"]}


def _word(kind: str) -> str:
    """The word of a class of norms."""
    return next(word for word, of in _CLASSES.items() if of == kind)


def _made(rule: Rule, norm: Norm, library: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the class of normjax of a new norm, and its fields."""
    word = _word(norm.kind) if rule.new == "same" else rule.new
    kind = "BatchNorm" if word in _SWITCHES else _CLASSES[word]
    of = getattr(library, ("Add" if _adds(norm.module) else "") + kind, None)
    if of is None:
        raise _check.error(
            ValueError,
            rule.name,
            f"a norm that adds a residual first can become 'layer', 'rms' or 'none',"
            f" and not {word!r}",
            f"an {type(norm.module).__name__} at {_at(norm)}",
            "Leave it out by paths, or pass a function that makes a module",
        )
    _refuse_own_call(rule, norm)
    known = _fields_of(of)
    unknown = [f for f in rule.fields if f not in known]
    if unknown:
        raise _check.error(
            ValueError,
            rule.name,
            f"fields must be those of {of.__name__}",
            f"{', '.join(unknown)} for {_at(norm)}",
            f"Pass some of {', '.join(known)}",
        )
    carried = {f: getattr(norm.module, f) for f in known if hasattr(norm.module, f)}
    if norm.kind != kind:
        carried = _translated(rule, norm, kind, carried)
    fields = {**carried, **_SWITCHES.get(word, {}), **rule.fields}
    if kind == "GroupNorm" and fields.get("group_size") is not None:
        # The number of groups has a default, and nnx keeps both.
        by_size = "group_size" in rule.fields or fields.get("num_groups") is None
        fields |= {"num_groups": None} if by_size else {"group_size": None}
    return of, fields


def _adds(module: Any) -> bool:
    """Whether a norm adds a residual first."""
    names = {base.__name__ for base in type(module).__mro__}
    return bool(names & {"AddLayerNorm", "AddRMSNorm"})


def _translated(rule: Rule, norm: Norm, kind: str, fields: dict) -> dict:
    """The fields of a norm, as those of another kind."""
    axes = {"BatchNorm": "axis", "GroupNorm": None}
    theirs = axes.get(norm.kind, "feature_axes")
    features = getattr(norm.module, theirs) if theirs else -1
    for field in ("feature_axes", "reduction_axes"):
        if {norm.kind, kind} != {"LayerNorm", "RMSNorm"}:
            fields.pop(field, None)
    if norm.kind == "BatchNorm":  # which divides the batch, not what is reduced here
        fields = {k: v for k, v in fields.items() if not k.startswith("axis_")}
    if kind == "GroupNorm":
        if features not in (-1, (-1,), [-1]):
            raise _check.error(
                ValueError,
                rule.name,
                "a group norm has its features last",
                f"features along {features} in the {norm.kind} at {_at(norm)}",
                "Say axis=-1 in the model where they are last, or pass a function that"
                " makes a module",
            )
    else:
        fields.setdefault("feature_axes", features)
        if kind in ("LayerNorm", "RMSNorm"):
            fields.setdefault("reduction_axes", features)
    if kind != "RMSNorm" and not hasattr(norm.module, "use_bias"):
        fields["use_bias"] = False
    return fields


def _refuse_own_call(rule: Rule, norm: Norm) -> None:
    """Refuses a norm that does something else than its class of Flax or normjax."""
    for base in type(norm.module).__mro__:
        if "__call__" in vars(base):
            break
    if base.__module__.split(".")[0] in ("flax", "normjax"):
        return
    raise _check.error(
        ValueError,
        rule.name,
        "a norm with a __call__ of its own does what no norm of normjax would do in its"
        " place",
        f"a {type(norm.module).__name__}, which is a {norm.kind}, at {_at(norm)}",
        "Leave it out by paths, or pass a function that makes a module",
    )


def _fields_of(of: Any) -> list[str]:
    """The fields of a class of linen, or of nnx."""
    if dataclasses.is_dataclass(of):
        names = [f.name for f in dataclasses.fields(of)]
    else:
        names = list(inspect.signature(of.__init__).parameters)
    given = ("self", "parent", "name", "rngs", "num_features")
    return [n for n in names if n not in given]


def _at(norm: Norm) -> str:
    return "/".join(norm.path) or "the model itself"


def _check_groups(norm: Norm, fields: Mapping, shape: tuple[int, ...]) -> None:
    """Refuses groups that do not divide the features, and says where."""
    size = fields.get("group_size")
    what, value = "group_size", size
    if size is None:
        what, value = "num_groups", fields.get("num_groups", 32)
    of = f"features of {_at(norm)}"
    _axes.divisor("replace", what, value, (-1,), of, shape)


def _check_found(rule: Rule, norms: list[Norm], elsewhere: Any = ()) -> None:
    """Refuses a pattern that matches no norm, and says which norms there are.

    Nor one of the paths ``elsewhere``, of norms that a call has not reached.
    """
    wanted = [n for n in norms if rule.wants(n)]
    reached = {*elsewhere, *(n.path for n in wanted)}
    for pattern in rule.paths:
        if any(matches(pattern, path) for path in reached):
            continue
        got = ", ".join(map(_at, wanted)) or "none"
        if not wanted and norms:
            got += f", only norms of {', '.join(sorted({n.kind for n in norms}))}"
        raise _check.error(
            ValueError,
            rule.name,
            f"paths must match {rule} of the model",
            f"paths={pattern!r}, and the {rule} are: {got}",
            'Pass one of these paths, or "*" for all'
            if wanted
            else "Look at what tools.find_norms finds in the model",
        )


def _no_norm(
    x: Any, residual: Any = None, *, mask: Any = None, activation: Any = None
) -> Any:
    """In place of a norm: the input, or the sum that would be normalized."""
    h = x if residual is None else _fused.total("replace", x, residual)
    y = h if activation is None else activation(h)
    return y if residual is None else (y, h)


class Replaced:
    """A linen model with other norms in place of some, as `replace` returns it.

    Its methods do what those of the model do, under jit, grad, scan, remat and device
    axes too, and `find_norms` finds the norms that it has now. Variables have the paths
    that they have in the model.

    Attributes:
      model: the model, as it is.
      rules: what is replaced by what, in order.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import tools
      >>> model = nn.Sequential([nn.Dense(4), nn.LayerNorm()])
      >>> variables = model.init(jax.random.key(0), jnp.ones((2, 3)))
      >>> replaced = tools.replace(model, "layer", "rms")
      >>> variables, dropped = replaced.convert(variables, jnp.ones((2, 3)))
      >>> dropped
      ['params/layers_1/bias']
      >>> replaced.apply(variables, jnp.ones((2, 3))).shape
      (2, 4)
    """

    _system = "linen"

    def __init__(self, model: Any, rules: tuple[Rule, ...]):
        self.model = model
        self.rules = rules
        # The norms that were called, before and after each rule. They are kept, since
        # what is compiled is not called again.
        self._steps: dict[tuple[str, ...], list[Norm]] = {}

    def init(self, *args: Any, **kwargs: Any) -> Any:
        """As ``model.init``: initializes the variables that the new norms need.

        Args:
          *args: random keys, and arguments of the model's call.
          **kwargs: the same, by name.

        Returns:
          The variables.

        Raises:
          ValueError: if a pattern matches no norm, or a replacement makes no sense.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> from normjax import tools
          >>> none = tools.replace(nn.LayerNorm(), "any", "none")
          >>> none.init(jax.random.key(0), jnp.ones((2, 3)))
          {}
        """
        with self._in_place():
            variables = self.model.init(*args, **kwargs)
        self._check({})
        return variables

    def init_with_output(self, *args: Any, **kwargs: Any) -> Any:
        """As ``model.init_with_output``.

        Args:
          *args: as of `init`.
          **kwargs: as of `init`.

        Returns:
          The output and the variables.

        Raises:
          ValueError: as `init`.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> from normjax import tools
          >>> none = tools.replace(nn.LayerNorm(), "any", "none")
          >>> none.init_with_output(jax.random.key(0), jnp.ones(2))
          (Array([1., 1.], dtype=float32), {})
        """
        with self._in_place():
            returned = self.model.init_with_output(*args, **kwargs)
        self._check({})
        return returned

    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any:
        """As ``model.apply``, with ``rngs``, ``mutable``, ``method`` and all it takes.

        Args:
          variables: those of `init` or `convert`.
          *args: arguments of the model's call.
          **kwargs: the same, by name, and those of ``model.apply``.

        Returns:
          What the model returns; with ``mutable`` also the variables that may change.

        Raises:
          ValueError: as `init`.

        Example:
          >>> import flax.linen as nn
          >>> import jax, jax.numpy as jnp
          >>> from normjax import tools
          >>> none = tools.replace(nn.LayerNorm(), "any", "none")
          >>> none.apply({}, jnp.ones(2))
          Array([1., 1.], dtype=float32)
        """
        with self._in_place():
            returned = self.model.apply(variables, *args, **kwargs)
        self._check(variables)
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

        old = flatten_dict(abstract_init(self.model, *args, **kwargs))
        new = flatten_dict(abstract_init(self, *args, **kwargs))
        given = flatten_dict(variables, keep_empty_nodes=True)
        # Paths of what was replaced, and whether by a norm, which keeps parameters.
        changed = {
            path: steps[-1].kind != ""
            for path, steps in self._steps.items()
            if steps[0] is not steps[-1]
        }
        kept: dict[tuple[str, ...], Any] = {}
        dropped = []
        for name in old | new | given:
            at = next((p for p in changed if name[1 : 1 + len(p)] == p), None)
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
                dropped.append("/".join(name))
        fresh = [n for n in new if n not in kept and (n not in old or n in given)]
        if fresh:
            args, kwargs = jax.tree.map(_filled, (args, kwargs))
            key = jax.random.key(0)
            initial = flatten_dict(initialized(self, key, *args, **kwargs))
            kept |= {name: initial[name] for name in fresh}
        return unflatten_dict(kept), dropped

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        """Within it, calls of the model's norms are those of the new ones."""
        with _compiled_for(self), substituted(self._swap):
            yield

    def _swap(self, module: Any) -> Callable | None:
        kind = kind_of(module)
        if kind is None:
            return None
        norm = Norm(module.path, kind, module.clone(parent=None))
        if not all(rule.is_for_all() for rule in self.rules) and _is_within_nn_jit():
            raise _check.error(
                ValueError,
                self.rules[-1].name,
                "within nn.jit, which compiles equal modules once for all their paths,"
                " norms must be replaced alike",
                f"{_at(norm)} within nn.jit, and paths or a function that tell norms"
                " apart",
                'Pass paths="*" and no function, or take nn.jit out of the model and'
                " put jax.jit around apply",
            )
        self._steps[module.path] = steps = _steps_in_linen(self.rules, norm)
        new = steps[-1]
        return None if new is norm else functools.partial(_call, new, module)

    def _check(self, variables: Mapping) -> None:
        """Refuses patterns without a norm, be it one that this call has not reached."""
        from flax.traverse_util import flatten_dict

        own: dict[tuple, set[str]] = {}
        for collection, *path, name in flatten_dict(variables):
            own.setdefault(tuple(path), set()).add(f"{collection}/{name}")
        for i, rule in enumerate(self.rules):
            norms = [steps[i] for steps in self._steps.values() if steps[i].kind]
            others = {p for p, names in own.items() if rule.may_want(names)}
            _check_found(rule, norms, others - set(self._steps))


def _is_within_nn_jit() -> bool:
    """Whether a module is called, to be compiled, by the jit of Flax's linen."""
    frame = sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code.co_name == "jitted" and frame.f_globals["__name__"] == "flax.core.lift":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def _steps_in_linen(rules: tuple[Rule, ...], norm: Norm) -> list[Norm]:
    """A norm, and what it is after each rule."""
    steps = [norm]
    for i, rule in enumerate(rules):
        if rule.wants(norm) and rule.matches(norm.path):
            if rule.new == "unfrozen":  # as if nothing had frozen it
                others = tuple(r for r in rules[:i] if r.new != "frozen")
                norm = _steps_in_linen(others, steps[0])[-1]
            if rule.wants(norm):
                norm = _new_in_linen(rule, norm)
        steps.append(norm)
    return steps


def _new_in_linen(rule: Rule, norm: Norm) -> Norm:
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
        new = functools.partial(_no_norm, activation=activation)
    else:
        of, fields = _made(rule, norm, linen)
        new = of(**fields, parent=None)
    if not callable(new):
        raise _no_module(rule, norm, new, "a linen module or a function of x")
    return Norm(norm.path, kind_of(new) or "", new)


def _no_module(rule: Rule, norm: Norm, new: Any, wanted: str) -> Exception:
    return _check.error(
        TypeError,
        rule.name,
        f"what comes in place of a norm must be {wanted}",
        f"{type(new).__name__} for {_at(norm)}",
        "Return None to leave a norm as it is",
    )


def _call(norm: Norm, module: Any, *args: Any, **kwargs: Any) -> Any:
    """Calls what came in place of a module, with those arguments that it takes."""
    new: Any = norm.module
    given = inspect.signature(type(module).__call__).bind(module, *args, **kwargs)
    names = list(given.arguments)[1:]
    operands = [n for n in names if n == names[0] or n == "residual"]
    options = {n: given.arguments[n] for n in names if n not in operands}
    if norm.kind == "GroupNorm" and hasattr(new, "group_size"):
        fields = {"num_groups": new.num_groups, "group_size": new.group_size}
        _check_groups(norm, fields, jnp.shape(given.arguments[names[0]]))
    if hasattr(new, "clone"):
        new = new.clone(parent=module.scope.rewound())
    takes = inspect.signature(new).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        if options.get("mask") is not None and "mask" not in takes:
            raise _check.error(
                ValueError,
                "replace",
                "what comes in place of a norm that is called with a mask must take it",
                f"mask for {_at(norm)}, and {type(new).__name__} without it",
                "Give it an argument mask=None",
            )
        options = {n: v for n, v in options.items() if n in takes}
    return new(*(given.arguments[n] for n in operands), **options)


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


def find_dropped(before: Any, after: Any) -> list[str]:
    """Finds the variables of a model that another one has not.

    Args:
      before: an nnx module, or a tree of arrays.
      after: the same, after a replacement.

    Returns:
      The paths of what is only in the first, ``["encoder/norm/bias"]``.

    Example:
      >>> from flax import nnx
      >>> from normjax import tools
      >>> model = nnx.LayerNorm(4, rngs=nnx.Rngs(0))
      >>> tools.find_dropped(model, tools.replace(model, "layer", "rms"))
      ['bias']
    """
    old, new = (leaves(variables_of(tree)) for tree in (before, after))
    return ["/".join(path) for path in old if path not in new]


def _replaced_in_nnx(model: Any, rule: Rule) -> Any:
    norms = find_norms(model)
    _check_found(rule, norms)
    at = {norm.path: norm for norm in norms if rule.wants(norm)}

    def swap(path: tuple, module: Any) -> Any:
        words = tuple(map(str, path))
        if words not in at or not rule.matches(words):
            return None
        return _new_in_nnx(rule, at[words]._replace(module=module))

    return nnx_replaced(model, swap, rule.name)


def _new_in_nnx(rule: Rule, norm: Norm) -> Any:
    """What comes in place of a norm, with the variables that both have."""
    import flax.linen as nn
    from flax import nnx

    import normjax.nnx

    old = norm.module
    if not isinstance(rule.new, str):
        made = not isinstance(rule.new, (nn.Module, nnx.Module))
        new = rule.new(norm) if made else rule.new
        if not made or not isinstance(new, (nnx.Module, type(None))):
            wanted = "an nnx module of its own, made by a function of the norm"
            raise _no_module(rule, norm, new, wanted)
        return new
    if rule.new == "none":
        return _nnx_no_norm()(_adds(old), getattr(old, "activation", None))
    of, fields = _made(rule, norm, normjax.nnx)
    features = getattr(old, "num_features", None)
    if features is None:  # of Flax's group norm
        features = old.num_groups * old.group_size
    if of is normjax.nnx.GroupNorm:
        _check_groups(norm, fields, (features,))
    thawed = getattr(old, "thawed", _SWITCHES["unfrozen"])
    if rule.new == "unfrozen":
        fields |= thawed
    takes = inspect.signature(type(old).__call__).parameters
    if "use_running_average" in takes and of is not normjax.nnx.BatchNorm:
        of = _nnx_called_as_batch_norm(of)
    new = of(features, **fields, rngs=nnx.Rngs(0))
    if _switches(new) == _SWITCHES["frozen"]:  # and may be as it was again
        is_new = _switches(old) != _SWITCHES["frozen"]
        new.thawed = _switches(old) if is_new else thawed
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
            + f" for {_at(norm)}",
            "Replace the norms before they are stacked, or leave such fields out",
        )
    return new


@functools.cache
def _nnx_called_as_batch_norm(of: Any) -> Any:
    """A class of norms that may be called with all that a batch norm is called with."""

    class Norm(of):
        def __call__(
            self,
            x: Any,
            use_running_average: bool | None = None,
            *,
            mask: Any = None,
            momentum: Any = None,
        ) -> jax.Array:
            return super().__call__(x, mask=mask)

    Norm.__name__ = Norm.__qualname__ = of.__name__
    return Norm


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
            return _no_norm(x, residual, activation=self.activation)

    return NoNorm
