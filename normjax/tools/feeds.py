"""Which module of a model feeds which, read from the program that it traces to.

Names say nothing here, and neither does the order of calls: what a module takes and
returns, and each of its variables, is marked in the trace, and found there again.
"""

import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from normjax.tools.models import (
    arrays_of,
    nnx_modules,
    told_mutable,
    with_statistics,
)

_MARK = "normjax.feeds"
# Programs within a program that are one with it; others, loops, stay apart.
_INLINED = {
    "jit",
    "pjit",
    "closed_call",
    "core_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}
_STACKED = "a loop over layers"


class Mark(NamedTuple):
    """What a call takes ("in"), returns ("out"), or one of its variables."""

    call: int
    what: str


class Call(NamedTuple):
    """A call of a module, as it was traced.

    Attributes:
      path: of the module, from the model down to it.
      module: with its fields; for linen bound to no variables.
      x: shape and dtype of what it takes.
      y: shape and dtype of what it returns.
      options: what else it was called with, by name.
      variables: the shapes of its variables by name, as it reads them.
    """

    path: tuple[str, ...]
    module: Any
    x: jax.ShapeDtypeStruct
    y: jax.ShapeDtypeStruct
    options: dict[str, Any]
    variables: dict[str, tuple[int, ...]]


class Feeds:
    """Who feeds whom.

    Attributes:
      calls: the calls that are in the program, by number. A module that is called twice
        is there twice; a call that is in a program twice is there once.
      leaves: the arrays of the variables.
    """

    def __init__(self, calls: Sequence[Call], leaves: list, program: Any):
        graph = _Graph()
        kinds: list[Any] = [("leaf", i) for i in range(len(leaves))]
        kinds += ["the model's input"] * (len(program.jaxpr.invars) - len(leaves))
        outputs = graph.walk(program.jaxpr, [graph.new(k) for k in kinds])
        for value in outputs:
            graph.readers[value].append("the model's output")
        self._graph, self.leaves = graph, leaves
        self._readings = graph.readings(outputs)
        self.calls = {i: c for i, c in enumerate(calls) if Mark(i, "in") in graph.marks}

    def sources(self, call: int) -> list[Any]:
        """Who made what a call takes: a `Mark`, or a word; one for each time."""
        return [self._graph.maker[v][0] for v, _ in self._graph.marks[Mark(call, "in")]]

    def readers(self, call: int) -> list[list[Any]]:
        """Who reads what a call returns: a `Mark`, or a word; a list for each time."""
        marked = self._graph.marks[Mark(call, "out")]
        return [self._graph.readers[made] for _, made in marked]

    def leaf(self, call: int, name: str) -> int | None:
        """The leaf that is a variable of a call; None where it is computed from some.

        The leaf can have axes of layers or replicas before those of the variable.
        """
        found = {self._origin(v) for v, _ in self._graph.marks[Mark(call, name)]}
        return found.pop() if len(found) == 1 else None

    def beside(self, leaf: int, path: tuple[str, ...]) -> list[Any]:
        """Who reads a leaf on the way to an output, outside the calls of a module."""
        own = {i for i, call in self.calls.items() if call.path == path}
        return [by for by, within in self._readings[leaf] if own.isdisjoint(within)]

    def _origin(self, value: int) -> int | None:
        (reshaped,) = self._graph.maker[value][1]
        return self._graph.leaf(reshaped)


class _Graph:
    """The values of a program: who made each, who reads it."""

    def __init__(self) -> None:
        self.maker: list[tuple[Any, list[int]]] = []
        self.within: list[tuple[int, ...]] = []  # which calls it was made
        self.readers: list[list[Any]] = []
        self.marks: dict[Mark, list[tuple[int, int]]] = defaultdict(list)
        self._calls: tuple[int, ...] = ()  # in which the walk is

    def new(self, label: Any, read: Sequence[int] = ()) -> int:
        self.maker.append((label, list(read)))
        self.within.append(self._calls)
        self.readers.append([])
        return len(self.maker) - 1

    def leaf(self, value: int) -> int | None:
        """The leaf that a value is, or is a slice of along an axis of layers."""
        label, read = self.maker[value]
        while label == _STACKED:
            label, read = self.maker[read[0]]
        return label[1] if isinstance(label, tuple) and label[0] == "leaf" else None

    def readings(self, outputs: Sequence[int]) -> dict[int, list[tuple]]:
        """By leaf who reads it on the way to an output, and within which calls."""
        found: dict[int, list[tuple]] = defaultdict(list)
        readings: list[tuple] = [("the model's output", (), v) for v in outputs]
        reached: set[int] = set()
        while readings:
            by, within, value = readings.pop()
            leaf = self.leaf(value)
            if leaf is not None:
                found[leaf].append((by, within))
            elif value not in reached:
                reached.add(value)
                label, read = self.maker[value]
                readings += [(label, self.within[value], v) for v in read]
        return found

    def walk(self, jaxpr: Any, given: Sequence[int]) -> list[int]:
        """Adds the values of a program; returns those that it returns."""
        values = dict(zip(jaxpr.invars, given, strict=True))
        values |= {v: self.new("a constant") for v in jaxpr.constvars}

        def value(v: Any) -> int:
            return self.new("a constant") if hasattr(v, "val") else values[v]

        ends = {mark for e in jaxpr.eqns if (mark := _mark_of(e))}
        for equation in jaxpr.eqns:
            made = self._equation(equation, [value(v) for v in equation.invars])
            values.update(zip(equation.outvars, made, strict=True))
            mark = _mark_of(equation)
            if mark and mark.what == "in" and Mark(mark.call, "out") in ends:
                self._calls += (mark.call,)
            elif mark and mark.what == "out":
                self._calls = tuple(c for c in self._calls if c != mark.call)
        return [value(v) for v in jaxpr.outvars]

    def _equation(self, equation: Any, read: list[int]) -> list[int]:
        name = equation.primitive.name
        inner = [j for p in equation.params.values() for j in _programs(p)]
        if name in _INLINED and len(inner) == 1:
            return self.walk(inner[0], read)
        mark = _mark_of(equation)
        if name == "sharding_constraint" or (name == "name" and mark is None):
            return read
        label = mark or f"`{name}`"
        for value in read:
            self.readers[value].append(label)
        returned = [read] * len(equation.outvars)
        for program in inner:
            given = self._given(equation, program, read)
            ends = self.walk(program, given)
            for value in ends:
                self.readers[value].append(f"the end of `{name}`")
            if name == "scan":  # each is what one end was, of the last turn or of all
                returned = [[end] for end in ends]
                carried = [v for v in given if self.maker[v][0] == label]
                for value, end in zip(carried, ends, strict=False):
                    self.maker[value][1].append(end)
        made = [self.new(label, values) for values in returned]
        if mark is not None:
            self.marks[mark].append((read[0], made[0]))
        return made

    def _given(self, equation: Any, program: Any, read: list[int]) -> list[int]:
        """What a program within takes; of a scan it is known where it comes from.

        A scan takes constants, then what it carries, then slices of stacks. Stacks have
        an axis more outside of it than inside, and what is carried has none.
        """
        name = equation.primitive.name
        if name != "scan":
            return [self.new(f"`{name}`") for _ in program.invars]
        stacks = _with_an_axis_less(equation.invars, program.invars)
        carried = _with_an_axis_less(equation.outvars, program.outvars).count(False)
        end = stacks.count(False)
        return [
            self.new(f"`{name}`", [value])
            if end - carried <= i < end
            else self.new(_STACKED, [value])
            for i, value in enumerate(read)
        ]


def _with_an_axis_less(outside: Sequence, inside: Sequence) -> list[bool]:
    """Of which values a program sees a slice."""
    return [a.aval.ndim > b.aval.ndim for a, b in zip(outside, inside, strict=True)]


def _programs(parameter: Any) -> list[Any]:
    """The programs in a parameter of an equation."""
    several = parameter if isinstance(parameter, (tuple, list)) else (parameter,)
    return [getattr(p, "jaxpr", p) for p in several if hasattr(p, "eqns")]


def _mark_of(equation: Any) -> Mark | None:
    name = equation.params.get("name")
    if equation.primitive.name != "name" or not name.startswith(_MARK):
        return None
    _, call, what = name.split("/")
    return Mark(int(call), what)


class _Recorder:
    """Marks what modules take and return while they are traced."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def call(
        self, path: tuple, module: Any, variables: dict, run: Callable, *args, **kwargs
    ) -> Any:
        """Returns what ``run`` does, with all of it marked."""
        number = len(self.calls)

        def marked(a: Any, what: str) -> jax.Array:
            return checkpoint_name(a, f"{_MARK}/{number}/{what}")

        signature = inspect.signature(type(module).__call__)
        bound = signature.bind(module, *args, **kwargs)
        _, first, *others = bound.arguments
        x = bound.arguments[first] = marked(jnp.asarray(bound.arguments[first]), "in")
        options = {name: bound.arguments[name] for name in others}
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        self.calls.append(Call(path, module, shape, shape, options, {}))
        for name, a in variables.items():
            # A reshape brings axes that vmap added to the front, or leaves them there.
            marked(jnp.reshape(a, (1, *jnp.shape(a))), name)
        y = marked(run(*bound.args[1:], **bound.kwargs), "out")
        self.calls[number] = Call(  # any within have come after it
            path,
            module,
            shape,
            jax.ShapeDtypeStruct(y.shape, y.dtype),
            options,
            {name: jnp.shape(a) for name, a in variables.items()},
        )
        return y


def of_linen(
    chosen: Callable[[Any], bool],
    model: Any,
    variables: Any,
    args: tuple,
    kwargs: dict,
    mutable: Any = False,
) -> Feeds:
    """Traces the call of a linen model; marks the modules that are chosen.

    ``mutable`` is what the model is told of.
    """
    import flax.linen as nn

    recorder, written = _Recorder(), with_statistics(mutable)

    def interceptor(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__" or not chosen(module):
            return call(*args, **kwargs)
        own: Mapping = nn.meta.unbox(module.variables)
        named = {k: a for c in ("params", "batch_stats") for k, a in _of(own, c)}
        fields = module.clone(parent=None)
        return recorder.call(module.path, fields, named, call, *args, **kwargs)

    def run(variables: Any, arrays: list) -> Any:
        args, kwargs = rebuilt(arrays)
        with nn.intercept_methods(interceptor), told_mutable(mutable):
            # What a norm that trains writes is not what the model returns.
            y, _ = model.apply(variables, *args, mutable=written, **kwargs)
        return arrays_of(y)[0]

    arrays, rebuilt = arrays_of((args, kwargs))
    program = jax.make_jaxpr(run)(variables, arrays)
    return Feeds(recorder.calls, jax.tree.leaves(variables), program)


def _of(variables: Mapping, collection: str) -> Any:
    return variables.get(collection, {}).items()


def of_nnx(
    chosen: Callable[[Any], bool], model: Any, args: tuple, kwargs: dict
) -> Feeds:
    """Traces the call of an nnx model, of a copy; marks the modules that are chosen."""
    from flax import nnx

    recorder = _Recorder()
    graphdef, state = nnx.split(model)

    def run(state: Any, arrays: list) -> Any:
        args, kwargs = rebuilt(arrays)
        copy = nnx.merge(graphdef, state)
        originals = dict(nnx_modules(model))
        for path, module in list(nnx_modules(copy)):
            if chosen(module):
                # A class of its own for each: it goes where the module goes, into the
                # copies that nnx.jit, nnx.scan and nnx.vmap make of it, too.
                module.__class__ = _marking(path, originals[path], recorder)
        return arrays_of(copy(*args, **kwargs))[0]

    arrays, rebuilt = arrays_of((args, kwargs))
    program = jax.make_jaxpr(run)(state, arrays)
    return Feeds(recorder.calls, jax.tree.leaves(state), program)


def _marking(path: tuple, module: Any, recorder: _Recorder) -> Any:
    """The class of a module, but its calls are marked."""
    from flax import nnx

    kind: Any = type(module)

    class Marking(kind):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            named = {
                name: value[...]
                for name, value in vars(self).items()
                if isinstance(value, nnx.Variable)
            }
            names = tuple(map(str, path))
            return recorder.call(
                names, module, named, super().__call__, *args, **kwargs
            )

    return Marking
