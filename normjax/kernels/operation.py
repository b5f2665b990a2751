"""Operations whose rules all follow from a body in `jax.numpy`, but for how they run.

Each is a primitive of JAX. The body is its definition: the operation's derivatives, its
form on machines that have no other, and what other forms are tested against.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import DropVar, Primitive, Var
from jax.interpreters import ad, batching, mlir, partial_eval

from normjax.kernels import choice

# What policies of `jax.checkpoint` know named values by.
_NAME = jax.make_jaxpr(lambda a: checkpoint_name(a, ""))(0.0).eqns[0].primitive


class Native(NamedTuple):
    """How an operation runs on a CPU by a library.

    Attributes:
      why_not: ``why_not(how, *operands) -> str or None``, why the library does not
        serve operands of these shapes and dtypes; None where it does.
      call: ``call(how, *operands) -> results``.
    """

    why_not: Callable[..., str | None]
    call: Callable[..., tuple]


class Operation:
    """A function of arrays, of one rank, that broadcast to the first.

    Args:
      name: of the primitive.
      body: ``body(how, *operands) -> results``, tuples of arrays; operands may be None.
        ``how`` is hashable; ``how.batched()`` is how for operands that have one more
        axis, the first.
      results: ``results(how, *operands) -> shapes and dtypes``, those of the results.
      native: how it runs on a CPU by a library; if None, by the body.
      bodies: the body for some platforms, where their compilers make more of another
        than the definition.
      parameters: the numbers of operands that may stay of size 1 along an axis of
        `jax.vmap`, all alike.
    """

    def __init__(
        self,
        name: str,
        body: Callable,
        results: Callable,
        native: Native | None = None,
        parameters: tuple[int, ...] = (),
        bodies: dict[str, Callable] | None = None,
    ):
        self.primitive = p = Primitive(name)
        self._body, self._results, self._native = body, results, native
        self._parameters = parameters
        p.multiple_results = True
        self._compiled = jax.jit(p.bind, static_argnames=("how", "there"))
        p.def_impl(self._impl)
        p.def_abstract_eval(self._abstract_eval)
        ad.primitive_jvps[p] = self._jvp
        batching.primitive_batchers[p] = self._batched
        mlir.register_lowering(p, self._elsewhere)
        for platform, of_platform in (bodies or {}).items():
            rule = functools.partial(self._elsewhere, body=of_platform)
            mlir.register_lowering(p, rule, platform=platform)
        if native is not None:
            mlir.register_lowering(p, self._on_cpu, platform="cpu")

    def __call__(self, how: Any, *operands: jax.Array | None) -> list:
        """Applies the operation."""
        there = tuple(a is not None for a in operands)
        arrays = _varying_alike([a for a in operands if a is not None])
        return self.primitive.bind(*arrays, how=how, there=there)

    def derivative(self, rule: Callable) -> None:
        """Sets ``rule(how, operands, tangents) -> results, tangents``.

        Tangents are arrays, or None for those of operands that are None.
        """

        def jvp(primals, tangents, how, there):
            tangents = map(ad.instantiate_zeros, tangents)
            return rule(how, spread(primals, there), spread(tangents, there))

        ad.primitive_jvps[self.primitive] = jvp

    def transposition(self, rule: Callable) -> None:
        """Sets ``rule(how, operands, cotangents) -> cotangents``.

        Operands are None where the operation is transposed by them, or where they are
        None; cotangents are None where they are zero.
        """

        def transpose(cts, *arrays, how, there):
            known = [None if ad.is_undefined_primal(a) else a for a in arrays]
            cts = [None if isinstance(ct, ad.Zero) else ct for ct in cts]
            results = rule(how, spread(known, there), cts)
            results = [
                r for r, is_there in zip(results, there, strict=True) if is_there
            ]
            return [
                r if ad.is_undefined_primal(a) else None
                for a, r in zip(arrays, results, strict=True)
            ]

        ad.primitive_transposes[self.primitive] = transpose

    def recomputation(self, name: str, kept: int, again: "Operation") -> None:
        """Sets how a checkpoint that keeps values of a name computes results anew.

        Where its policy keeps what ``jax.ad_checkpoint.checkpoint_name`` gives the
        name, so many results after the first are kept, and
        ``again(how, *operands, *kept)`` computes the first; else all are computed anew.
        """
        rule = functools.partial(_split, name, kept, again.primitive)
        partial_eval.partial_eval_jaxpr_custom_rules[self.primitive] = rule

    def _plain(self, *arrays, how, there):
        return _spread_to(self._body, *arrays, how=how, there=there)

    def _impl(self, *arrays, how, there):
        # Operation by operation, as JAX then looks for what is not finite.
        one_by_one = jax.config.jax_debug_nans or jax.config.jax_debug_infs
        if jax.config.jax_disable_jit or one_by_one:
            return self._plain(*arrays, how=how, there=there)
        return self._compiled(*arrays, how=how, there=there)

    def _abstract_eval(self, *avals, how, there):
        like = avals[0]
        return [
            like.update(shape=shape, dtype=dtype, weak_type=False)
            for shape, dtype in self._results(how, *spread(avals, there))
        ]

    def _jvp(self, primals, tangents, **params):
        """The derivative of the body, by the operands that have one."""
        live = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

        def of_live(*arrays):
            full = list(primals)
            for i, a in zip(live, arrays, strict=True):
                full[i] = a
            return list(self._plain(*full, **params))

        of = [primals[i] for i in live], [tangents[i] for i in live]
        return jax.jvp(of_live, *of)

    def _batched(self, arrays, dims, how, there):
        first, *_ = dims
        if first is None:
            # All others would be as large, if the first were repeated.
            plain = functools.partial(self._plain, how=how, there=there)
            axes = list(dims)
            results = jax.vmap(lambda *a: list(plain(*a)), axes)(*arrays)
            return results, [0] * len(results)
        size = arrays[0].shape[first]
        numbers = [i for i, is_there in enumerate(there) if is_there]
        mapped = {i for i, d in zip(numbers, dims, strict=True) if d is not None}
        alike = not mapped & set(self._parameters)
        moved = []
        for i, a, d in zip(numbers, arrays, dims, strict=True):
            if i in mapped:
                a = jnp.moveaxis(a, d, 0)
            elif i in self._parameters and alike:
                a = a[None]
            else:
                a = jnp.broadcast_to(a, (size, *a.shape))
            moved.append(a)
        results = self.primitive.bind(*moved, how=how.batched(), there=there)
        return results, [0] * len(results)

    def _elsewhere(self, ctx, *values, how, there, body=None):
        if how.implementation == "native" and self._native is not None:
            platforms = ", ".join(ctx.platforms or ctx.module_context.platforms)
            raise choice.refused("native", f"a program for {platforms}")
        exported = ctx.module_context.lowering_parameters.for_export
        how = how.here(_are_whole(ctx) and not exported)
        call = functools.partial(_spread_to, body or self._body)
        return mlir.lower_fun(call)(ctx, *values, how=how, there=there)

    def _on_cpu(self, ctx, *values, how, there):
        assert self._native is not None
        avals = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in ctx.avals_in]
        why_not = _why_not_here(ctx) or self._native.why_not(how, *spread(avals, there))
        if why_not is not None and how.implementation == "native":
            raise choice.refused("native", why_not)
        use_native = why_not is None and how.implementation != "xla"
        body = self._native.call if use_native else self._body
        call = functools.partial(_spread_to, body)
        return mlir.lower_fun(call)(ctx, *values, how=how, there=there)


def _split(name, number, again, saveable, unknown, there_anew, eqn):
    """The rule of `Operation.recomputation`: what is known, and what is taken anew.

    Returns an equation for each, which results are unknown and which are computed
    anew, and what of the known program the other needs.
    """
    results = len(eqn.outvars)
    needed = [
        v
        for v, is_there in zip(eqn.invars, there_anew, strict=True)
        if isinstance(v, Var) and not is_there
    ]
    if any(unknown):
        return None, eqn, [True] * results, [True] * results, needed
    avals = [v.aval for v in eqn.invars]
    if _is_kept(saveable(eqn.primitive, *avals, **eqn.params)):
        kept = [v for v in eqn.outvars if not _is_dropped(v)]
        return eqn, None, [False] * results, [False] * results, kept
    if not _is_kept(saveable(_NAME, eqn.outvars[1].aval, name=name)):
        return eqn, eqn, [False] * results, [True] * results, needed
    first, *others = (Var(v.aval) if _is_dropped(v) else v for v in eqn.outvars)
    kept = others[:number]
    params = {**eqn.params, "there": (*eqn.params["there"], *[True] * number)}
    anew = eqn.replace(
        primitive=again, invars=[*eqn.invars, *kept], outvars=[first], params=params
    )
    known = eqn.replace(outvars=[first, *others])
    made = [True, *[False] * len(others)]
    return known, anew, [False] * results, made, [*needed, *kept]


def _is_kept(answer: Any) -> bool:
    """Whether a policy keeps a value; what it would offload, moments, is kept, too."""
    return answer is not False and type(answer).__name__ != "RecomputeType"


def _is_dropped(v: Any) -> bool:
    return isinstance(v, DropVar)


def spread(arrays: Sequence, there: tuple[bool, ...]) -> list:
    """Puts None where an operand is not there."""
    rest = iter(arrays)
    return [next(rest) if is_there else None for is_there in there]


def _spread_to(body: Callable, *arrays, how, there) -> tuple:
    return body(how, *spread(arrays, there))


def _varying_alike(arrays: list) -> list:
    """Marks all arrays as varying over each device axis that one of them varies over.

    What `jax.shard_map` checks; a gradient is then added up over the axes.
    """
    over = [_varying(a) for a in arrays]
    names = frozenset().union(*over)
    return [
        lax.pcast(a, tuple(names - own), to="varying") if names - own else a
        for a, own in zip(arrays, over, strict=True)
    ]


def _varying(a: jax.Array) -> frozenset:
    return jax.typeof(a).manual_axis_type.varying


def _are_whole(ctx: Any) -> bool:
    """Whether arrays are no pieces that XLA is to divide among devices."""
    context = ctx.module_context.axis_context
    if hasattr(context, "manual_axes"):
        return set(context.manual_axes) == set(context.mesh.axis_names)
    return getattr(context, "num_devices", 1) == 1


def _why_not_here(ctx: Any) -> str | None:
    """Why a program that is being lowered can't call a library of this process.

    The arrays that it sees must be whole, and the program for this process, not for
    export.
    """
    module = ctx.module_context
    if len(module.platforms) > 1:
        return "the program is lowered for several platforms"
    if module.lowering_parameters.for_export:
        return "the program is exported"
    return None if _are_whole(ctx) else "XLA divides the arrays among devices"
