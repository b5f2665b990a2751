"""What the norms of a model see in a batch, and how far a step turns its weights."""

import collections
import contextvars
import functools
import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from normjax import _check, _devices, _measure, _module, _moments
from normjax._moments import Moments
from normjax.tools.kinds import registered_kinds, takes_kinds
from normjax.tools.models import (
    check_concrete,
    devices_of,
    flat,
    groups_of,
    kind_of,
    nnx_copy,
    nnx_modules,
    operand,
    substituted,
    system_of,
    told_mutable,
)

# Names of a variable that a model is given, and of a collection that it never has.
_SEEN = "normjax_seen"
_NOWHERE = "normjax_nowhere"
# A spread below this part of the layer's largest is none.
_STILL = 1e-3


class _Trace(NamedTuple):
    """While a model is traced: numbers for the calls of norms, and who was called."""

    order: Iterator[int]
    called: set[tuple[str, ...]]


_trace: contextvars.ContextVar[_Trace] = contextvars.ContextVar("trace")


class Look(NamedTuple):
    """What a norm sees in a batch, and makes of it.

    Spreads are standard deviations over the batch and space. A channel is an entry of
    ``scale``; one that is masked out in part counts by what is left.

    Attributes:
      path: names from the model down to the norm, as in its variables.
      kind: "BatchNorm", "LayerNorm", "RMSNorm", "GroupNorm" or "InstanceNorm".
      layer: which layer of an ``nn.scan`` or ``nn.vmap``; None outside of one.
      call: which call of the norm, from 0.
      values: how many values each of its statistics is of; those under a mask are left
        out of batch norm's alone. NaN for a group norm of your own without num_groups.
      mean: of the input, over all channels.
      std: of the input, over all channels.
      output_mean: of the output.
      output_std: of the output.
      shift: batch norm: ``(batch mean - running mean) / running std``, its root mean
        square over the channels; None for others.
      ratio: batch norm: ``batch std / running std``, its geometric mean; None for
        others.
      scale: the mean of its size; None without one.
      still: part of the channels whose output does not change, with a spread below a
        thousandth of the largest one's.
      negative: part of the channels whose output is nowhere above zero: what a ReLU
        behind it makes dead.
      channels: ``[C]`` each: mean, std, output_mean, output_std, output_max, and where
        there are such running_mean, running_std, shift, ratio, scale, bias.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax import tools
      >>> norm = nnx.BatchNorm(1, rngs=nnx.Rngs(0))
      >>> (seen,) = tools.look(norm, jnp.array([[1.0], [3.0]]))
      >>> seen.kind, seen.values, seen.mean, round(seen.shift, 4)
      ('BatchNorm', 2.0, 2.0, 2.0)
    """

    path: tuple[str, ...]
    kind: str
    layer: int | None
    call: int
    values: float
    mean: float
    std: float
    output_mean: float
    output_std: float
    shift: float | None
    ratio: float | None
    scale: float | None
    still: float
    negative: float
    channels: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """The path with the layer of a scan, and with the call from the second on.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from normjax import tools
          >>> model = nnx.Sequential(nnx.RMSNorm(2, rngs=nnx.Rngs(0)))
          >>> [seen.name for seen in tools.look(model, jnp.ones((1, 2)))]
          ['layers/0']
        """
        layer = "" if self.layer is None else f"[{self.layer}]"
        name = "/".join(self.path) or self.kind
        return name + layer + (f"#{self.call}" if self.call else "")

    def __str__(self) -> str:
        """Shows the figures of the layer as a table of one line."""
        return str(Looks([self]))


class Looks(list[Look]):
    """A list of `Look`, which prints as a table, a line for each.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from normjax import tools
      >>> norm = nnx.RMSNorm(2, rngs=nnx.Rngs(0))
      >>> looks = tools.look(norm, jnp.array([[3.0, 1.0], [1.0, 3.0]]))
      >>> [line[:35] for line in str(looks).splitlines()]
      ['norm     kind     values  mean  std', 'RMSNorm  RMSNorm       2     2    1']
    """

    def __str__(self) -> str:
        """Shows the figures of the layers, without those of the channels."""
        words = (
            *("values", "mean", "std", "output_mean", "output_std"),
            *("shift", "ratio", "scale", "still", "negative"),
        )
        there = [w for w in words if any(getattr(one, w) is not None for one in self)]
        rows = [["norm", "kind", *(w.replace("_", " ") for w in there)]]
        for one in self:
            found = [getattr(one, word) for word in there]
            figures = ["" if a is None else f"{a:.3g}" for a in found]
            rows.append([one.name, one.kind, *figures])
        return aligned(rows, left=2)

    __repr__ = __str__


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table in columns, of which the first ones are aligned at their left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


class Rate(NamedTuple):
    """How far an update moves an array of weights, as a norm behind it sees it.

    Attributes:
      path: of the array in the tree.
      weight: ``|w|``, the root of the sum of squares.
      update: ``|u|``.
      relative: ``|u| / |w|``; for a small u at a right angle to w it is the angle, in
        radians, by which w turns.
      cosine: of the angle between u and w: 0 for a plain gradient step on weights whose
        size a norm takes away, since the gradient is at a right angle to them.
      effective: ``learning_rate / |w|**2``; None where no learning rate was given.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> w, u = {"w": jnp.array([[3.0, 4.0]])}, {"w": jnp.array([[0.4, -0.3]])}
      >>> (rate,) = tools.effective_rates(w, u, learning_rate=0.1)
      >>> rate.name, rate.weight, round(rate.relative, 6), round(rate.effective, 6)
      ('w', 5.0, 0.1, 0.004)
    """

    path: tuple[str, ...]
    weight: float
    update: float
    relative: float
    cosine: float
    effective: float | None

    @property
    def name(self) -> str:
        """The path in one word.

        Example:
          >>> from normjax import tools
          >>> tools.Rate(("conv", "kernel"), 1.0, 0.1, 0.1, 0.0, None).name
          'conv/kernel'
        """
        return "/".join(self.path)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["rows"], meta_fields=["kind"]
)
class _Seen:
    """Rows ``[1, 1, 1, K, 1]``: a scan stacks them along any of its axes but K."""

    def __init__(self, kind: str, rows: dict[str, Any]):
        self.kind, self.rows = kind, rows


@takes_kinds
def look(
    model: Any,
    *args: Any,
    kinds: Mapping[type, str | None] | None = None,
    **kwargs: Any,
) -> Looks:
    """Looks at every norm of a model in one compiled forward.

    Norms are found by what they are, of Flax's classes and normjax's, in a model that
    stays as it is: nothing is added to it, and none of its variables changes.

    Args:
      model: a linen or nnx module.
      *args: for linen what ``model.apply`` takes, the variables first; for nnx what the
        model takes. What is not an array is part of the compiled program.
      kinds: which norms classes of your own are, as of `find_norms`.
      **kwargs: the same, by name, such as ``rngs``, ``method`` and ``mutable``. What
        the model asks is mutable is that alone, although more is, for what is seen.

    Returns:
      A list that prints as a table: one `Look` for each call of a norm, in the order of
      the calls; for a norm within a scan one for each layer. Modules that share a
      program of ``nn.jit`` have their norms side by side, by their place in it.

    Raises:
      TypeError: if model is neither a linen nor an nnx module, or a norm's input is
        complex.
      ValueError: if the model calls no norm, or one within a transform that lets no
        array out: of linen those whose collections are all broadcast or carried, of
        nnx those that are jax's own.

    Example:
      >>> import flax.linen as nn
      >>> import jax, jax.numpy as jnp
      >>> from normjax import linen, tools
      >>> model = nn.Sequential([nn.Dense(4), linen.LayerNorm(), nn.Dense(2)])
      >>> x = jnp.ones((1, 3))
      >>> variables = model.init(jax.random.key(0), x)
      >>> [(seen.name, seen.values) for seen in tools.look(model, variables, x)]
      [('layers_1', 4.0)]
    """
    check_concrete("look", (args, kwargs))
    if system_of("look", model) == "linen":
        mutable = kwargs.pop("mutable", False)  # what it returns changed is not used
        seen = _compiled(model, _Mutable(mutable), args, kwargs)
    else:
        from flax import nnx

        tapped, state = nnx.split(_with_taps(model))
        graphs = (tapped, nnx.graphdef(model))
        seen = _compiled(model, graphs, (state, *args), kwargs)
    if not seen:
        raise _check.error(
            ValueError,
            "look",
            "the model must call a norm of flax or normjax",
            f"{type(model).__name__}, whose call reaches none",
            "Pass the model that has them, and method= if it is not its __call__",
        )
    looks = [
        look
        for path, calls in jax.device_get(seen).items()
        for call, of in enumerate(calls)
        for look in _looks(path, call, of)
    ]
    return _in_order(looks)


class _Mutable(NamedTuple):
    """What a linen model is told is mutable."""

    collections: Any


# The compiled programs of each model, by the id of one that is still there.
_programs: dict[int, dict] = {}


def _program(model: Any, graphs: Any, structure: Any, static: tuple) -> Any:
    """What calls a model compiled, and does not keep it alive, nor what it holds."""
    if id(model) not in _programs:
        _programs[id(model)] = {}
        weakref.finalize(model, _programs.pop, id(model), None)
    # A static argument of jit would live on in its caches.
    call = jax.jit(
        functools.partial(_call, weakref.ref(model), graphs, structure, static)
    )
    key = (*_parts(graphs), structure, *map(_hashable, static), registered_kinds())
    return _programs[id(model)].setdefault(key, call)


def _parts(graphs: Any) -> list[Any]:
    """What is static in a model of nnx, or said of one of linen, as parts of a key."""
    if isinstance(graphs, _Mutable):
        return [repr(graphs)]
    return [_hashable(a) for of in graphs for a in (*of.nodes, *of.attributes)]


def _hashable(value: Any) -> Any:
    """A value; for one without a hash, which may change in place, what it shows now."""
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value


def _compiled(model: Any, graphs: Any, args: tuple, kwargs: dict) -> Any:
    """Returns what norms see, compiled; what is not an array is static."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    arrays = [a if _is_array(a) else None for a in leaves]
    static = tuple(None if _is_array(a) else a for a in leaves)
    try:
        return _program(model, graphs, structure, static)(arrays)
    except _HiddenError as hidden:
        raise _check.error(
            ValueError,
            "look",
            "what a norm sees must have a way out of the transforms around it",
            hidden.got,
            "Let nn.scan or nn.vmap have variable_axes for a collection, such as"
            ' {"intermediates": 0}; take nnx.scan, nnx.vmap or nnx.remat in place of'
            " jax's",
        ) from hidden.__cause__


def _is_array(a: Any) -> bool:
    return hasattr(a, "shape") and hasattr(a, "dtype")


def _call(model: Any, graphs: Any, structure: Any, static: tuple, arrays: list) -> dict:
    """What the norms see of a weak reference to a model, or of the graphs of nnx."""
    pairs = zip(static, arrays, strict=True)
    leaves = [a if a is not None else s for s, a in pairs]
    args, kwargs = jax.tree.unflatten(structure, leaves)
    token = _trace.set(_Trace(itertools.count(), set()))
    try:
        if isinstance(graphs, _Mutable):
            seen = _see_linen(model(), graphs.collections, args, kwargs)
        else:
            seen = _see_nnx(graphs, args, kwargs)
        if lost := _trace.get().called - set(seen):
            names = ", ".join(sorted(map("/".join, lost)))
            raise _HiddenError(f"{names} where nothing that is kept comes out")
        return seen
    finally:
        _trace.reset(token)


class _HiddenError(Exception):
    """A norm whose statistics cannot leave the transforms around it."""

    def __init__(self, got: str):
        self.got = got


def _see_linen(model: Any, mutable: Any, args: tuple, kwargs: dict) -> dict:
    """Returns {path: what each call saw}, by variables that the norms write."""
    from flax.core import DenyList

    # All that a scan gives back may be written. As no program of the user's denies this
    # name, none that nn.jit has kept is taken for one with taps, or the reverse.
    nowhere = DenyList((f"{_NOWHERE} {mutable!r}",))

    def call() -> Any:
        with told_mutable(mutable):
            return model.apply(*args, mutable=nowhere, **kwargs)

    def with_taps() -> Any:
        with substituted(_linen_tap):
            return call()[1]

    variables = _let_out(with_taps, call)
    seen: dict = {}
    for collection in variables.values():
        _collect(collection, (), seen)
    return seen


def _collect(tree: Any, path: tuple, seen: dict) -> None:
    """Gathers what norms wrote in a collection."""
    for name, value in tree.items():
        if name == _SEEN:
            seen[path] = value
        elif isinstance(value, dict):
            _collect(value, (*path, name), seen)


def _linen_tap(module: Any) -> Any:
    """What to call in place of a linen norm: itself, with a look at it."""
    kind = kind_of(module)
    if kind is None:
        return None

    def call(*args: Any, **kwargs: Any) -> Any:
        from flax.core import meta

        def value(collection, name):
            return meta.unbox(module.get_variable(collection, name))

        running = [value("batch_stats", name) for name in ("mean", "var")]
        y = module(*args, **kwargs)
        parameters = {k: value("params", k) for k in ("scale", "bias")}
        x, mask = _operands(module.__call__, args, kwargs)
        seen = _see(kind, module, x, mask, y, running, parameters)
        _trace.get().called.add(module.path)
        for name in (_SEEN, "intermediates", "batch_stats", "params", *_other(module)):
            if module.scope.is_mutable_collection(name):
                before = module.get_variable(name, _SEEN, ())
                module.put_variable(name, _SEEN, (*before, seen))
                break
        return y

    return call


def _other(module: Any) -> list:
    """Collections of the model's own, last where nothing says what becomes of them."""
    return sorted(module.scope.root._variables)


def _with_taps(model: Any) -> Any:
    """A copy of an nnx model whose norms also keep what they see."""
    model = nnx_copy(model)
    for path, module in list(nnx_modules(model)):
        if kind := kind_of(module):
            module.normjax_path = tuple(map(str, path))
            of: Any = type(module)
            module.__class__ = _tapped(of, kind)
    return model


@functools.cache
def _tapped(norm: Any, kind: str) -> Any:
    """A class of nnx norms that keep what they see: the norm itself otherwise."""
    from flax import nnx

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        variables = {
            k: v
            for k in ("mean", "var", "scale", "bias")
            if (v := getattr(self, k, None)) is not None
        }
        before = {k: v[...] for k, v in variables.items()}
        y = norm.__call__(self, *args, **kwargs)
        running = [before.get(k) for k in ("mean", "var")]
        own = functools.partial(norm.__call__, self)
        seen = _see(kind, self, *_operands(own, args, kwargs), y, running, before)
        _trace.get().called.add(self.normjax_path)
        # Of the type of its other variables, a scan stacks it like them.
        kept = next(map(type, variables.values()), nnx.Intermediate)
        calls = getattr(self, _SEEN).get_value() if hasattr(self, _SEEN) else ()
        setattr(self, _SEEN, kept((*calls, seen)))
        return y

    return type(norm)(norm.__name__, (norm,), {"__call__": call})


def _see_nnx(graphs: tuple, args: tuple, kwargs: dict) -> dict:
    """Returns {path: what each call saw}, by variables that the norms keep."""
    from flax import nnx

    state, *of_model = args
    model, plain = (nnx.merge(graph, state) for graph in graphs)
    _let_out(lambda: model(*of_model, **kwargs), lambda: plain(*of_model, **kwargs))
    return {
        module.normjax_path: getattr(module, _SEEN).get_value()
        for _, module in nnx_modules(model)
        if hasattr(module, _SEEN)
    }


def _let_out(with_taps: Any, without: Any) -> Any:
    """Calls the model with taps; says so if it is they that a transform refuses."""
    try:
        return with_taps()
    except Exception as error:
        if str(error).startswith("look: "):
            raise
        without()  # which raises what is wrong with the model or its arguments
        raise _HiddenError(f"{type(error).__name__} where their values go") from error


def _operands(call: Callable, args: tuple, kwargs: dict) -> tuple[Any, Any]:
    """What a norm is called with: its input, whatever its name, and its mask."""
    name = operand(call, args, kwargs)
    return args[0] if name is None else kwargs[name], kwargs.get("mask")


def _see(
    kind: str, module: Any, x: Any, mask: Any, y: Any, running: list, own: dict
) -> _Seen:
    """Takes the statistics of a norm's input and output, channel by channel."""
    x = jnp.asarray(x)
    if isinstance(y, tuple):  # of a norm that adds first: what it normalized is beside
        y, x = y
    if jnp.iscomplexobj(x):
        raise _check.error(
            TypeError,
            "look",
            "norms must have real inputs",
            f"x.dtype={x.dtype} in {kind}",
            "Look at the real part and at the imaginary part in models of their own",
        )
    name = "axis" if kind == "BatchNorm" else "feature_axes"
    features = _module.flax_axes(kind, getattr(module, name, -1), x.ndim, name)
    others = tuple(a for a in range(x.ndim) if a not in features)
    is_weight = getattr(module, "mask_is_weight", False)
    where = _module.flax_mask(kind, mask, x.shape, is_weight)

    # Of all that a batch norm takes as one batch.
    devices = devices_of(module) if kind == "BatchNorm" else {}
    m = _measure.moments(x, others, where=where, **devices)
    n = _measure.moments(y, others, where=where, **devices)
    largest = jnp.max(
        y, others, initial=-jnp.inf, where=None if where is None else where > 0
    )
    if names := devices.get("axis_name"):
        largest = _devices.gathered(largest, names).max(0)
    rows = {
        "mean": m.mean,
        "std": jnp.sqrt(m.var),
        "output_mean": n.mean,
        "output_std": jnp.sqrt(n.var),
        "output_max": largest,
        **{k: own[k] for k in ("scale", "bias") if own.get(k) is not None},
        **_against(module, m, *running),
        "layer": jnp.stack([*_whole(m), *_whole(n)]),
        "values": _values(kind, module, x.shape, features, m.count),
        "order": jnp.asarray(next(_trace.get().order)),
    }
    return _Seen(kind, {k: a.reshape(1, 1, 1, -1, 1) for k, a in rows.items()})


def _whole(m: Moments) -> tuple[jax.Array, jax.Array]:
    """Mean and spread over all channels."""
    m = _moments.merge(jax.tree.map(jnp.ravel, _moments.uniform("look", m)), 0)
    return m.mean[0], jnp.sqrt(m.var[0])


def _against(module: Any, m: Moments, mean: Any, var: Any) -> dict[str, jax.Array]:
    """The running statistics of a batch norm, and those of the batch against them."""
    if mean is None:
        return {}
    new = m.var.ravel()
    if getattr(module, "running_variance", "biased") == "unbiased":
        new = _moments.unbiased(m)[0].ravel()
    mean, var = (jnp.asarray(a, new.dtype).ravel() for a in (mean, var))
    epsilon = getattr(module, "epsilon", 1e-5)  # which a class of a user's may hide
    old = var + epsilon
    return {
        "running_mean": mean,
        "running_std": jnp.sqrt(var),
        "shift": (m.mean.ravel() - mean) / jnp.sqrt(old),
        "ratio": jnp.sqrt((new + epsilon) / old),
    }


def _values(
    kind: str, module: Any, shape: tuple, features: tuple, count: jax.Array
) -> jax.Array:
    """How many values each statistic of a norm is of."""
    if kind == "BatchNorm":
        virtual = getattr(module, "virtual_batch_size", None)
        return jnp.min(count) * ((virtual or shape[0]) / shape[0])
    if kind == "InstanceNorm":
        axes = [a for a in range(1, len(shape)) if a not in features]
    elif kind == "GroupNorm" and getattr(module, "reduction_axes", None) is None:
        axes = list(range(1, len(shape)))
    else:
        reduced = getattr(module, "reduction_axes", -1)
        axes = list(_module.flax_axes(kind, reduced, len(shape), "axes"))
    groups: float = 1
    if kind == "GroupNorm":
        groups = groups_of(module, shape[-1]) or math.nan
    return jnp.asarray(math.prod(shape[a] for a in axes) / groups, count.dtype)


def _looks(path: tuple, call: int, seen: _Seen) -> list[tuple[int, Look]]:
    """What one call of a norm saw, once for each layer of a scan, with its order."""
    rows, one = {}, seen.rows["order"].shape  # 1 where others have K channels
    for name, a in seen.rows.items():
        channels = [
            i for i, (k, n) in enumerate(zip(a.shape, one, strict=True)) if k > n
        ]
        last = np.moveaxis(a, channels, [-1] * len(channels))
        rows[name] = last.reshape(-1, a.shape[channels[0]] if channels else 1)
    is_stacked = seen.rows["order"].ndim > 5
    return [
        (
            int(order),
            _summary(
                {k: row[i] for k, row in rows.items() if k != "order"},
                path=path,
                kind=seen.kind,
                layer=i if is_stacked else None,
                call=call,
            ),
        )
        for i, (order,) in enumerate(rows["order"])
    ]


@np.errstate(all="ignore")  # what is not finite is told, and not warned of
def _summary(channels: dict[str, np.ndarray], **where: Any) -> Look:
    """A `Look` with the figures of a layer, from those of its channels."""
    layer, values = channels.pop("layer"), channels.pop("values")
    mean, std, output_mean, output_std = map(float, layer)
    spread, largest = channels["output_std"], channels["output_max"]
    shift = ratio = scale = None
    if "shift" in channels:
        shift = float(np.sqrt(np.mean(np.square(channels["shift"]))))
        ratio = float(np.exp(np.mean(np.log(channels["ratio"]))))
    if "scale" in channels:
        scale = float(np.mean(np.abs(channels["scale"])))
    return Look(
        **where,
        values=float(values[0]),
        mean=mean,
        std=std,
        output_mean=output_mean,
        output_std=output_std,
        shift=shift,
        ratio=ratio,
        scale=scale,
        still=float(np.mean(spread <= _STILL * np.max(spread))),
        negative=float(np.mean(largest <= 0)),
        channels=channels,
    )


def _in_order(looks: list[tuple[int, Look]]) -> Looks:
    """Sorts by call; of a scan its first layer first, and not its first norm."""
    looks = sorted(looks, key=lambda pair: pair[0])
    sizes = collections.Counter(order for order, _ in looks)

    def scan(pair: tuple[int, Look]) -> tuple:
        return sizes[pair[0]], pair[1].layer is None, pair[1].path[:1]

    ordered = []
    for _, together in itertools.groupby(looks, scan):
        ordered += sorted(together, key=lambda pair: pair[1].layer or 0)
    return Looks(look for _, look in ordered)


def effective_rates(
    params: Any, updates: Any, learning_rate: float | None = None
) -> list[Rate]:
    """Tells how far an update turns the weights of each layer.

    A norm behind weights takes their size away, so that a step of length ``|u|`` moves
    what the layer computes by ``|u| / |w|``, and plain gradient steps act as on weights
    of size 1 with the learning rate ``learning_rate / |w|**2``
    (https://arxiv.org/abs/1706.05350, https://arxiv.org/abs/1803.01814).

    Args:
      params: a tree of arrays, floating; those of rank 2 and more are taken, kernels
        and not scales or biases. A stack of layers counts as one array.
      updates: the same tree of what is added to them: of optax, what ``update``
        returns.
      learning_rate: the one of the step, for ``effective``.

    Returns:
      One `Rate` for each array, in the order of the tree.

    Raises:
      ValueError: if the trees or the shapes of their arrays differ, or there is no
        array of rank 2.

    Example:
      >>> import jax.numpy as jnp
      >>> from normjax import tools
      >>> params = {"kernel": jnp.full((2, 2), 3.0), "bias": jnp.zeros(2)}
      >>> updates = {"kernel": jnp.full((2, 2), -0.3), "bias": jnp.zeros(2)}
      >>> (rate,) = tools.effective_rates(params, updates)
      >>> rate.name, round(rate.relative, 6)
      ('kernel', 0.1)
    """
    weights, others = flat(params), flat(updates)
    for path in [*weights, *others]:
        shapes = [
            np.shape(of[path]) if path in of else None for of in (weights, others)
        ]
        if shapes[0] != shapes[1]:
            raise _check.error(
                ValueError,
                "effective_rates",
                "updates must be a tree like params",
                f"{'/'.join(path)} of shape {shapes[0]} in params, {shapes[1]} in"
                " updates",
                "Pass what optax's update returned for these params",
            )
    kernels = [path for path, w in weights.items() if np.ndim(w) > 1]
    if not kernels:
        raise _check.error(
            ValueError,
            "effective_rates",
            "params must have an array of rank 2 or more, the weights of a layer",
            f"{len(weights)} arrays of lower rank",
            "Pass the params of the whole model",
        )
    sums = jax.device_get(_sums([(weights[path], others[path]) for path in kernels]))
    return [
        _rate(path, float(of[0]), float(of[1]), float(of[2]), learning_rate)
        for path, of in zip(kernels, sums, strict=True)
    ]


def _rate(path: tuple, ww: float, uu: float, wu: float, learning_rate: Any) -> Rate:
    """A `Rate` from |w|**2, |u|**2 and <w, u>; NaN where one is divided by nothing."""
    weight, update, nan = math.sqrt(ww), math.sqrt(uu), math.nan
    return Rate(
        path,
        weight,
        update,
        relative=update / weight if weight else nan,
        cosine=wu / (weight * update) if weight * update else nan,
        effective=(
            None if learning_rate is None else learning_rate / ww if ww else nan
        ),
    )


@jax.jit
def _sums(pairs: list) -> list:
    """|w|**2, |u|**2 and <w, u>, in at least float32."""

    def wide(a):
        return a.astype(jnp.promote_types(a.dtype, jnp.float32)).ravel()

    return [
        jnp.stack([jnp.vdot(a, b) for a, b in ((w, w), (u, u), (w, u))])
        for w, u in ((wide(w), wide(u)) for w, u in pairs)
    ]


def scalars(seen: Sequence[Look | Rate], prefix: str = "norms/") -> dict[str, float]:
    """Returns the figures of looks or rates as floats by name, as TensorBoard has them.

    Args:
      seen: what `look` or `effective_rates` returned.
      prefix: what the names begin with.

    Returns:
      ``{prefix + name + "/" + figure: float}``, for each figure that is there.

    Example:
      >>> from normjax import tools
      >>> rate = tools.Rate(("conv", "kernel"), 2.0, 0.1, 0.05, 0.0, None)
      >>> found = tools.scalars([rate], prefix="rates/")
      >>> found["rates/conv/kernel/relative"], len(found)
      (0.05, 4)
    """
    return {
        f"{prefix}{one.name}/{figure}": value
        for one in seen
        for figure, value in one._asdict().items()
        if isinstance(value, float)
    }
