"""What comes in place of which norms: the words, the fields, what makes no sense."""

import dataclasses
import functools
import inspect
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from normjax import _check, _fused
from normjax.tools.kinds import Left, checked_kinds, is_registered, words_of
from normjax.tools.models import Norm, is_array, matches, patterns

CLASSES = {
    "batch": "BatchNorm",
    "layer": "LayerNorm",
    "rms": "RMSNorm",
    "group": "GroupNorm",
    "instance": "InstanceNorm",
}
# Batch norms, told apart by their fields.
SWITCHES: dict[str, dict[str, Any]] = {
    "batch": {},
    "synced": {},
    "frozen": {"normalize_with": "running", "update_statistics": False},
    "unfrozen": {"normalize_with": None, "update_statistics": None},
}
NEW = (*CLASSES, "synced", "frozen", "none")
# What calls and fields of batch norms say of running statistics, and how they say
# that those normalize.
FLAGS = {
    "use_running_average": True,
    "deterministic": True,
    "train": False,
    "training": False,
    "is_training": False,
}


class Rule(NamedTuple):
    """What comes in place of which norms.

    Attributes:
      name: of the public function, for its errors.
      old: "batch", "layer", "rms", "group", "instance" or "any".
      new: one of the same, "synced", "frozen", "unfrozen", "none", or "known", the norm
        of normjax for one of a user's own; a linen module, or a function of a norm.
      paths: patterns of the paths of the norms.
      fields: fields of the new norms, beside those of the old ones.
      kinds: which norms classes of a user's own are.
    """

    name: str
    old: str
    new: Any
    paths: tuple[str, ...]
    fields: Mapping[str, Any]
    kinds: Mapping[type, str | None]

    def wants(self, norm: Norm) -> bool:
        """Whether it is about norms such as this one, wherever they are."""
        if not norm.kind or self.old not in ("any", _word(norm.kind)):
            return False
        if self.new == "known" and not is_own(norm.module):
            return False
        return self.new != "unfrozen" or switches(norm.module) == SWITCHES["frozen"]

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


def rule_of(
    name: str, old: str, new: Any, paths: Any, fields: dict, kinds: Any
) -> Rule:
    """Returns a rule; refuses what makes no sense whatever the norms are."""
    paths = patterns(name, paths)
    words = {"old": (old, (*CLASSES, "any")), "new": (new, (*NEW, "same"))}
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
    if isinstance(new, str) and new in SWITCHES and old != "batch":
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
    return Rule(name, old, new, paths, fields, checked_kinds(name, kinds))


def switches(module: Any) -> dict[str, Any]:
    """Those fields of a norm by which it uses its statistics, and moves them."""
    return {name: getattr(module, name, None) for name in SWITCHES["frozen"]}


def _word(kind: str) -> str:
    """The word of a class of norms."""
    return next(word for word, of in CLASSES.items() if of == kind)


def made(rule: Rule, norm: Norm, library: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the class of normjax of a new norm, and its fields."""
    word = _word(norm.kind) if rule.new in ("same", "known") else rule.new
    kind = "BatchNorm" if word in SWITCHES else CLASSES[word]
    of = getattr(library, ("Add" if adds(norm.module) else "") + kind, None)
    if of is None:
        raise _check.error(
            ValueError,
            rule.name,
            f"a norm that adds a residual first can become 'layer', 'rms' or 'none',"
            f" and not {word!r}",
            f"an {type(norm.module).__name__} at {at(norm)}",
            "Leave it out by paths, or pass a function that makes a module",
        )
    _refuse_own_call(rule, norm)
    known = fields_of(of)
    unknown = [f for f in rule.fields if f not in known]
    if unknown:
        raise _check.error(
            ValueError,
            rule.name,
            f"fields must be those of {of.__name__}",
            f"{', '.join(unknown)} for {at(norm)}",
            f"Pass some of {', '.join(known)}",
        )
    carried = {f: getattr(norm.module, f) for f in known if hasattr(norm.module, f)}
    if is_own(norm.module):
        if hasattr(norm.module, "eps"):
            carried.setdefault("epsilon", norm.module.eps)
        _check_own(rule, norm, kind, carried)
    if norm.kind != kind:
        carried = _translated(rule, norm, kind, carried)
    if rule.new == "known":
        unsaid = [f for f in ("epsilon", "momentum") if f not in carried]
        of = _unsaid(of, tuple(unsaid)) if kind == "BatchNorm" and unsaid else of
        return of, {**rule.fields, **carried}
    fields = {**carried, **SWITCHES.get(word, {}), **rule.fields}
    if kind == "GroupNorm" and fields.get("group_size") is not None:
        # The number of groups has a default, and nnx keeps both.
        by_size = "group_size" in rule.fields or fields.get("num_groups") is None
        fields |= {"num_groups": None} if by_size else {"group_size": None}
    return of, fields


@functools.cache
def _unsaid(of: Any, names: tuple[str, ...]) -> Any:
    """A class of norms for one of a user's own, which has no fields of such names."""
    told = {k: getattr(of, k) for k in ("__module__", "__qualname__", "__doc__")}
    return type(of.__name__, (of,), {**told, "_normjax_unsaid": names})


def adds(module: Any) -> bool:
    """Whether a norm adds a residual first."""
    names = {base.__name__ for base in type(module).__mro__}
    return bool(names & {"AddLayerNorm", "AddRMSNorm"})


def _translated(rule: Rule, norm: Norm, kind: str, fields: dict) -> dict:
    """The fields of a norm, as those of another kind."""
    axes = {"BatchNorm": "axis", "GroupNorm": None}
    theirs = axes.get(norm.kind, "feature_axes")
    features = getattr(norm.module, theirs, -1) if theirs else -1
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
                f"features along {features} in the {norm.kind} at {at(norm)}",
                "Say axis=-1 in the model where they are last, or pass a function that"
                " makes a module",
            )
    else:
        fields.setdefault("feature_axes", features)
        if kind in ("LayerNorm", "RMSNorm"):
            fields.setdefault("reduction_axes", features)
    if norm.kind == "RMSNorm" and kind != "RMSNorm":
        fields["use_bias"] = False
    return fields


def has_own_call(module: Any) -> bool:
    """Whether a norm does something else than its class of Flax or normjax."""
    of = next(b for b in type(module).__mro__ if "__call__" in vars(b))
    return of.__module__.split(".")[0] not in ("flax", "normjax")


def is_own(module: Any) -> bool:
    """Whether a norm is of a class of a user's own, which only `registered` knows."""
    return is_registered(module) and has_own_call(module)


def _refuse_own_call(rule: Rule, norm: Norm) -> None:
    """Refuses a norm of another call than Flax's that nobody said is one."""
    if not has_own_call(norm.module) or is_registered(norm.module):
        return
    of = type(norm.module).__name__
    raise _check.error(
        ValueError,
        rule.name,
        "a norm with a __call__ of its own does what no norm of normjax would do in its"
        " place",
        f"a {of}, which is a {norm.kind}, at {at(norm)}",
        "Leave it out by paths, or pass a function that makes a module",
    )


def own_parameters(module: Any) -> list[str]:
    """The parameters of a user's own norm, by name, as far as they are known."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(module, nnx.Module):
        return [n for n, value in vars(module).items() if isinstance(value, nnx.Param)]
    return getattr(module, "_normjax_parameters", [])


def _check_own(rule: Rule, norm: Norm, kind: str, carried: Mapping) -> None:
    """Refuses a class of a user's own that does not say what the new norm needs."""
    others = [n for n in own_parameters(norm.module) if n not in ("scale", "bias")]
    if others:
        raise _check.error(
            ValueError,
            rule.name,
            "the parameters of a norm of your own must be scale and bias, as those of"
            " the new norm",
            f"{', '.join(others)} of a {type(norm.module).__name__} at {at(norm)}",
            "Leave it out by paths, or pass tools.replace a function that makes a"
            " module",
        )
    needed = ["epsilon"]
    if kind == norm.kind == "BatchNorm" and rule.new not in ("frozen", "known"):
        needed.append("momentum")
    missing = [n for n in needed if n not in carried and n not in rule.fields]
    if missing:
        raise _check.error(
            ValueError,
            rule.name,
            f"a norm of your own must have the field {missing[0]}, for the new norm",
            f"a {type(norm.module).__name__} without it at {at(norm)}",
            f"Pass {missing[0]}= to tools.replace",
        )


def holds(rule: Rule, norm: Norm) -> bool:
    """Whether a norm is to be frozen as it is, since its class is a user's own."""
    return rule.new == "frozen" and is_own(norm.module)


@functools.cache
def held(of: Any) -> Any:
    """A class of batch norms of a user's own, told to use running statistics."""
    call = inspect.signature(of.__call__)
    flag = next((f for f in FLAGS if f in call.parameters), None)

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        if flag is not None:
            given = call.bind_partial(self, *args, **kwargs)
            given.arguments[flag] = FLAGS[flag]
            return of.__call__(*given.args, **given.kwargs)
        if hasattr(of, "__dataclass_fields__"):  # of linen, whose fields say it
            return of.__call__(self, *args, **kwargs)
        fields = {f: getattr(self, f) for f in FLAGS if hasattr(self, f)}
        for name in fields:
            setattr(self, name, FLAGS[name])
        try:
            return of.__call__(self, *args, **kwargs)
        finally:
            for name, value in fields.items():
                setattr(self, name, value)

    told.__signature__ = call  # type: ignore[attr-defined]
    named = {k: getattr(of, k) for k in ("__module__", "__qualname__", "__doc__")}
    return type(
        of.__name__,
        (of,),
        {**named, "__call__": told, "_normjax_held": True, **SWITCHES["frozen"]},
    )


def flags_of(rule: Rule, norm: Norm) -> dict[str, Any]:
    """The fields by which a norm of a user's own is told to use running statistics.

    Where its call says which, the fields have nothing to say.
    """
    of = type(norm.module)
    called = [f for f in FLAGS if f in inspect.signature(of.__call__).parameters]
    fields = [f for f in FLAGS if hasattr(norm.module, f)]
    if not called and not fields:
        takes = ", ".join([*inspect.signature(of.__call__).parameters][1:])
        raise _check.error(
            ValueError,
            rule.name,
            "a field or an argument of a batch norm of your own must say which"
            f" statistics it uses: {', '.join(FLAGS)}",
            f"a {of.__name__} at {at(norm)}, which is called with {takes}",
            "Leave it out by paths, or pass tools.replace a function that makes a"
            " module",
        )
    return {f: None if called else FLAGS[f] for f in fields}


def fields_of(of: Any) -> list[str]:
    """The fields of a class of linen, or of nnx."""
    if dataclasses.is_dataclass(of):
        names = [f.name for f in dataclasses.fields(of)]
    else:
        names = list(inspect.signature(of.__init__).parameters)
    given = ("self", "parent", "name", "rngs", "num_features")
    return [n for n in names if n not in given]


def at(norm: Norm) -> str:
    return "/".join(norm.path) or "the model itself"


def divides(fields: Mapping, size: int) -> bool:
    """Whether the groups of a group norm with such fields divide the features."""
    what = "num_groups" if fields.get("group_size") is None else "group_size"
    value = fields.get(what, 32)
    return _check.is_integer(value) and value >= 1 and size % value == 0


def check_groups(rule: Rule, norms: Mapping[Any, tuple[Mapping, int]]) -> None:
    """Refuses groups that do not divide the features, and says of all norms where.

    Args:
      rule: for its name.
      norms: for each path the fields of its group norm, and its number of features.
    """
    faults: dict[tuple[str, int], list[str]] = {}
    sizes: dict[str, list[int]] = {}
    for path, (fields, size) in norms.items():
        what = "num_groups" if fields.get("group_size") is None else "group_size"
        value = fields.get(what, 32)
        if not _check.is_integer(value):
            raise _check.error(
                TypeError,
                rule.name,
                f"{what} must be an integer",
                f"{what}={value!r}",
                f"Pass {what}=8, say",
            )
        sizes.setdefault(what, []).append(size)
        if not divides(fields, size):
            place = "/".join(path) or "the model itself"
            faults.setdefault((what, value), []).append(f"{size} at {place}")
    for (what, value), places in faults.items():
        common = math.gcd(*sizes[what])
        all_of = max(
            d for d in range(1, common + 1) if common % d == 0 and d <= max(value, 1)
        )
        raise _check.error(
            ValueError,
            rule.name,
            f"{what} must divide the features of every norm",
            f"{what}={value}, and features {', '.join(places)}",
            f"Pass {what}={all_of}, which divides all that are"
            " replaced, or replace them by paths, each with its own",
        )


def check_found(
    rule: Rule, norms: list[Norm], elsewhere: Any = (), left: Left | None = None
) -> Left:
    """Refuses a pattern that matches no norm, and says which norms there are.

    Args:
      rule: the rule.
      norms: those of the model.
      elsewhere: paths of what may be norms, which a call has not reached.
      left: what only looks like a norm.

    Returns:
      Of what only looks like a norm that which the rule would be about.
    """
    wanted = [n for n in norms if rule.wants(n)]
    left = {
        path: (of, kind)
        for path, (of, kind) in (left or {}).items()
        if rule.old in ("any", _word(kind)) and rule.new != "unfrozen"
    }
    reached = {*elsewhere, *(n.path for n in wanted)}
    for pattern in rule.paths:
        if any(matches(pattern, path) for path in reached):
            continue
        got = ", ".join(map(at, wanted)) or "none"
        todo = "Look at what tools.find_norms finds in the model"
        if wanted:
            todo = 'Pass one of these paths, or "*" for all'
        elif left:
            places, kinds = words_of(left)
            got += f", but {places}, which looks like one"
            todo = f"Pass {kinds}"
        elif norms:
            got += f", only norms of {', '.join(sorted({n.kind for n in norms}))}"
        raise _check.error(
            ValueError,
            rule.name,
            f"paths must match {rule} of the model",
            f"paths={pattern!r}, and the {rule} are: {got}",
            todo,
        )
    return {path: of for path, of in left.items() if rule.matches(path)}


def arguments(
    name: str, path: tuple[str, ...], calls: tuple, args: tuple, kwargs: dict
) -> tuple[list, dict[str, Any]]:
    """What a new norm is called with, where the old one would be called.

    Args:
      name: of the public function, for its errors.
      path: where the norm is.
      calls: those of the old one, with the module first, and of the new one.
      args: those of the old one, with the module.
      kwargs: those of the old one, by name.
    """
    old, new = calls
    given = inspect.signature(old).bind(*args, **kwargs).arguments
    names = list(given)[1:]
    operands = [n for n in names if n == names[0] or n == "residual"]
    options = {n: given[n] for n in names if n not in operands}
    takes = inspect.signature(new).parameters
    if any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        return [given[n] for n in operands], options
    if "use_running_average" in takes and "use_running_average" not in options:
        said = [bool(options[f]) == FLAGS[f] for f in FLAGS if f in options]
        options |= {"use_running_average": said[0]} if said else {}
    for option in options.keys() - takes.keys() - FLAGS.keys():
        value = options[option]
        if is_array(value) or (option == "mask" and value is not None):
            got = (
                new.__qualname__.split(".")[0]
                if hasattr(new, "__qualname__")
                else type(new).__name__
            )
            place = "/".join(path) or "the model itself"
            raise _check.error(
                ValueError,
                name,
                f"what comes in place of a norm that is called with a {option} must"
                " take it",
                f"{option} for {place}, and {got} without it",
                f"Give it an argument {option}=None",
            )
    return [given[n] for n in operands], {
        n: v for n, v in options.items() if n in takes
    }


def no_norm(
    x: Any, residual: Any = None, *, mask: Any = None, activation: Any = None
) -> Any:
    """In place of a norm: the input, or the sum that would be normalized."""
    h = x if residual is None else _fused.total("replace", x, residual)
    y = h if activation is None else activation(h)
    return y if residual is None else (y, h)


def no_module(rule: Rule, norm: Norm, new: Any, wanted: str) -> Exception:
    return _check.error(
        TypeError,
        rule.name,
        f"what comes in place of a norm must be {wanted}",
        f"{type(new).__name__} for {at(norm)}",
        "Return None to leave a norm as it is",
    )
