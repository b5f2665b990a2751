"""What users write: every public call, with the types that the docs show.

mypy and pyright read it (`make types`); test_types.py runs it.
"""

import functools
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx as flax_nnx
from flax import serialization
from jax.sharding import NamedSharding, PartitionSpec

import normjax
import normjax.linen
import normjax.nnx
from normjax import linen, nnx, tools
from normjax.__main__ import main

Array = jax.Array


def functions(x: Array, scale: Array, bias: Array, mask: Array) -> None:
    """x is [N, S, C], the parameters [C]."""
    y: Array = normjax.layer_norm(x, scale, bias)
    y = normjax.layer_norm(x, axis=(1, 2), epsilon=1e-5, where=mask, dtype=jnp.bfloat16)
    y = normjax.layer_norm(x, activation=jax.nn.silu, dtype="float32")
    y = normjax.layer_norm([[1.0, 3.0]], [1.0, 1.0], epsilon=jnp.float32(1e-5))
    y = normjax.layer_norm(np.ones((2, 4), ">f4"), np.ones(4), dtype=np.float32)
    y = normjax.rms_norm(x, scale, axis=[-1], where=np.ones((1, 1, 1), bool))
    y = normjax.rms_norm(x, flax_nnx.Param(scale), activation=lambda y: y * 2)
    y = normjax.group_norm(x, scale, bias, num_groups=2, axis=1, feature_axis=-1)
    y = normjax.group_norm(x, num_groups=2, where=1.0, dtype=x.dtype)
    y = normjax.instance_norm(x, scale, bias, axis=(1,), feature_axis=(2,))

    total: Array
    y, total = normjax.add_layer_norm(x, x, scale, bias, where=mask)
    y, total = normjax.add_rms_norm(total, x, scale, axis=(-1,))
    print(y, total)

    m: normjax.Moments
    y, m = normjax.batch_norm(x, scale, bias, where=mask, feature_axis=(2,))
    y, m = normjax.batch_norm(x, virtual_batch_size=1)
    y, _ = normjax.batch_norm(x, moments=m)
    y = normjax.normalize(x, m, scale, bias, epsilon=1e-5, feature_axis=2, where=mask)

    by_channel = normjax.moments(x, (0, 1), where=mask)
    m = normjax.merge(by_channel, 2).merge(normjax.merge(by_channel, axis=-1))
    m = normjax.Moments(jnp.ones(4), jnp.zeros(4), var=jnp.ones(4))
    start: normjax.Moments = normjax.Moments.empty((1, 1, 4), jnp.float32)
    m = normjax.Moments.empty(4)
    shape: tuple[int, ...] = start.shape
    unbiased: Array = m.var * m.count / (m.count - 1)

    running = normjax.RunningMoments.init((4,), dtype=jnp.float32)
    running = running.update(m, momentum=0.9).update(m, jnp.full(4, 0.9)).update(m)
    y = running.weight + unbiased.sum() + sum(shape)
    _, m = normjax.batch_norm(x)
    y, _ = normjax.batch_norm(x, moments=running.update(m).read())
    print(y)


def devices(x: Array) -> None:
    @functools.partial(jax.vmap, axis_name="data")
    def synced(x: Array) -> Array:
        y, _ = normjax.batch_norm(x, axis_name="data", axis_index_groups=[[0], [1]])
        m = normjax.moments(x, 0, axis_name=("data",), axis_index_groups=((0, 1),))
        return y + m.mean

    synced(x[:2])


def derivatives(x: Array, scale: Array) -> None:
    def loss(x: Array, epsilon: Array) -> Array:
        return normjax.rms_norm(x, scale, epsilon=epsilon).sum()

    normjax.set_implementation("xla")
    normjax.set_implementation(None)
    kept = jax.checkpoint(loss, policy=normjax.remat_policy)
    jax.grad(kept, argnums=(0, 1))(x, jnp.float32(1e-5))


class LinenNet(nn.Module):
    """All modules of linen, with the fields that have several types."""

    dtype: jax.typing.DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self, x: Array, train: bool = False, mask: Array | None = None
    ) -> Array:
        x = nn.Dense(4)(x)
        x = linen.BatchNorm(axis=(-1,), momentum=0.9, dtype=self.dtype)(
            x, use_running_average=not train, mask=mask, momentum=0.5
        )
        x = linen.BatchNorm(
            use_running_average=not train,
            axis=2,
            axis_name=("data", "model"),
            axis_index_groups=[[0, 1]],
            momentum=None,
            missing_axis="ignore",
            running_variance="unbiased",
            normalize_with="batch",
            update_statistics=False,
            activation=nn.relu,
            virtual_batch_size=None,
        )(x)
        x = linen.LayerNorm(
            epsilon=1e-5, reduction_axes=(1, 2), feature_axes=-1, use_bias=False
        )(x, mask=mask)
        x = linen.RMSNorm(scale_init=nn.initializers.zeros, param_dtype=jnp.float32)(x)
        x = linen.GroupNorm(num_groups=None, group_size=2, reduction_axes=[1, 2])(x)
        x = linen.InstanceNorm(feature_axes=[-1], axis_name=None, mask_is_weight=True)(
            x
        )
        x, residual = linen.AddLayerNorm()(x, x, mask=mask)
        x, residual = linen.AddRMSNorm(epsilon=jnp.float32(1e-6))(x, residual)
        return x.mean(1)


class NnxNet(flax_nnx.Module):
    """All modules of nnx, likewise."""

    def __init__(self, rngs: flax_nnx.Rngs):
        self.dense = flax_nnx.Linear(4, 4, rngs=rngs)
        self.batch = nnx.BatchNorm(4, axis=(2,), momentum=None, debias=False, rngs=rngs)
        self.synced = normjax.nnx.BatchNorm(
            4,
            axis_name=("data", "model"),
            axis_index_groups=((0, 1),),
            missing_axis="ignore",
            rngs=rngs,
        )
        self.layer = nnx.LayerNorm(4, reduction_axes=(1, 2), feature_axes=2, rngs=rngs)
        self.rms = nnx.RMSNorm(4, epsilon=1e-5, dtype=jnp.float32, rngs=rngs)
        self.group = nnx.GroupNorm(4, num_groups=2, reduction_axes=[1, 2], rngs=rngs)
        self.instance = nnx.InstanceNorm(4, feature_axes=(-1,), rngs=rngs)
        self.add_layer = nnx.AddLayerNorm(4, activation=jax.nn.silu, rngs=rngs)
        self.add_rms = nnx.AddRMSNorm(4, scale_init=nn.initializers.ones, rngs=rngs)

    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        x = self.synced(self.batch(self.dense(x), mask=mask))
        x = self.instance(self.group(self.rms(self.layer(x, mask=mask))))
        x, residual = self.add_layer(x, x)
        x, residual = self.add_rms(x, residual, mask=mask)
        return x.mean(1)


def modules(x: Array, mask: Array) -> None:
    model = LinenNet(dtype=jnp.bfloat16)
    variables = model.init(jax.random.key(0), x, train=True)
    y: Any = model.apply(variables, x, True, mask, mutable=["batch_stats"])
    renamed = normjax.linen.BatchNorm(use_running_average=True)
    y = renamed.apply(renamed.init(jax.random.key(0), x), x)

    other = NnxNet(flax_nnx.Rngs(0))
    y = other(x, mask)
    other.eval()
    other.batch.set_view(use_running_average=True, normalize_with="running")
    momentum: float | None = other.batch.momentum
    mean: Array = other.batch.mean[...]
    print(y, momentum, mean)


def small() -> tuple[nn.Module, dict[str, Any], Array]:
    model = nn.Sequential([nn.Dense(4), linen.BatchNorm(False), nn.Dense(4)])
    x = jnp.sin(jnp.arange(32.0)).reshape(8, 4)
    return model, dict(model.init(jax.random.key(0), x)), x


def statistics() -> None:
    model, variables, x = small()

    def apply(variables: dict[str, Any], x: Array) -> Any:
        return model.apply(variables, x, mutable=["batch_stats"])

    def batches() -> Iterator[Array]:
        yield from (x[:4], x[4:])

    found: tools.Recalibrated = tools.recalibrate(
        apply, variables, batches(), prior=16.0, normalize_with="batch", progress=False
    )
    moved: list[tools.Moved] = found.moved
    print(found.table(), moved[0].path)

    average = tools.RunningVariables.init(variables).update(variables, momentum=0.9)
    ema: dict[str, Any] = average.update(variables).read()

    padded: tuple[dict[str, Any], np.ndarray] = tools.pad_batch({"x": x[:3]}, 8)
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    tools.global_batch(padded[0], NamedSharding(mesh, PartitionSpec("data")))

    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), ema["batch_stats"])
    drift: list[tools.Drift] = tools.find_drift(stacked, stacked=True)
    merged: dict[str, Any] = tools.merge_replicas(stacked)
    bits: Array = tools.checksum(merged)
    print(drift, bits)


def structure() -> None:
    model, variables, x = small()
    norms: list[tools.Norm] = tools.find_norms(model, x)
    frozen = tools.freeze(model, "layers_1*")
    thawed = tools.unfreeze(frozen, ["layers_1*"])
    replaced = tools.replace(thawed, "batch", "group", paths="*", num_groups=2)
    assert isinstance(replaced, tools.Replaced)
    converted, dropped = replaced.convert(variables, x)
    y = replaced.apply(converted, x)
    again = replaced.init(jax.random.key(0), x)
    y, again = replaced.init_with_output(jax.random.key(0), x)
    dropped = tools.find_dropped(
        flax_nnx.LayerNorm(4, rngs=flax_nnx.Rngs(0)),
        nnx.RMSNorm(4, rngs=flax_nnx.Rngs(0)),
    )
    print(dropped, y, again)

    trained = nn.Sequential([nn.Dense(4), linen.BatchNorm(True)])
    variables = dict(trained.init(jax.random.key(0), x))
    variables["batch_stats"] = {"layers_1": {"mean": jnp.ones(4), "var": jnp.ones(4)}}
    folded: tools.Folded = tools.fold(trained, variables, x)
    report: tools.FoldReport = folded.report
    print(folded.apply(folded.variables, x).shape, report.speedup)

    params = variables["params"]
    mask = tools.decay_mask(params, norms, biases=False)
    named = tools.labels(params, {"norm": norms, "first": ["layers_0*"]}, other="rest")
    transforms: Any = {k: optax.adam(1e-3) for k in ("norm", "first", "rest")}
    optimizer = optax.chain(
        optax.adamw(1e-3, mask=mask), optax.multi_transform(transforms, named)
    )
    optimizer.init(params)
    adapting = linen.BatchNorm(normalize_with="batch")
    params = adapting.init(jax.random.key(0), x)["params"]
    tools.tent(optax.sgd(0.1), params, tools.find_norms(adapting, x)).init(params)
    confidence: Array = tools.entropy(x)
    print(confidence)


def diagnosis(folder: pathlib.Path) -> None:
    model, variables, x = small()
    seen: list[tools.Look] = tools.look(model, variables, x, mutable=["batch_stats"])
    updates = jax.tree.map(lambda a: -0.1 * a, variables["params"])
    rates: list[tools.Rate] = tools.effective_rates(
        variables["params"], updates, learning_rate=0.1
    )
    words: dict[str, float] = tools.scalars(seen) | tools.scalars(
        rates, prefix="rates/"
    )
    tools.plot({0: seen, 1: seen}, rates, path=folder / "look.png")
    rows: list[tools.Row] = tools.norm_table(variables)
    tools.plot_table(rows, path=str(folder / "table.png"))
    print(words, seen[0].name, rates[0].name, rows[0].name)

    report: tools.Report = tools.doctor(
        model, x, variables=variables, optimizer=optax.sgd(0.1), steps=1
    )
    tools.doctor(variables, momentum=0.9, stacked=False)
    findings: tuple[tools.Finding, ...] = report.findings
    report.show()
    print(findings, report.failed(strict=True))

    (folder / "a.msgpack").write_bytes(serialization.to_bytes(variables))
    status: int = main(["inspect", str(folder / "a.msgpack"), "--json"])
    print(status)


def conversion(folder: pathlib.Path) -> None:
    norm = linen.BatchNorm(**tools.preset("torch", "BatchNorm"))
    variables = norm.init(jax.random.key(0), jnp.ones((4, 2)), True)
    weights: dict[str, np.ndarray] = tools.to_torch(variables, names={"": "bn"})
    tools.write_weights(folder / "a.safetensors", weights)
    weights = tools.read_weights(folder / "a.safetensors")
    variables = tools.from_torch(weights, variables, names={"": "bn"})

    fc: dict[str, Any] = {"params": {"fc": {"kernel": jnp.ones((2, 3))}}}
    torch_names = {"fc": "fc"}
    fc = tools.from_equinox(
        tools.to_equinox(fc, ({"fc": {"weight": jnp.zeros((3, 2))}}, None)), fc
    )
    params, state = tools.to_haiku(fc, ({"fc": {"w": jnp.zeros((2, 3))}}, {}))
    fc = tools.from_haiku((params, state), fc, names=lambda path: torch_names[path])
    fc = tools.from_keras(tools.to_keras(fc), fc)


def keras_weights(model: Any) -> None:
    """Of a model of Keras, which is read here and not run: Keras may not be there."""
    paths: Mapping[str, Any] = tools.keras_names(model)
    assert paths


def run(folder: pathlib.Path) -> None:
    """Calls it all."""
    x = jnp.sin(jnp.arange(32.0)).reshape(2, 4, 4)
    mask = jnp.arange(4)[None, :, None] < 3
    functions(x, jnp.ones(4), jnp.zeros(4), mask)
    devices(x)
    derivatives(x, jnp.ones(4))
    modules(x, mask)
    statistics()
    structure()
    diagnosis(folder)
    conversion(folder)
