"""The programs that compiled.py compiles: a norm's three, synced ones, whole steps.

A norm has a program for each mode:

    forward   y, and a batch norm's moments
    training  the same, and all that the backward pass keeps
    backward  the gradients, from what was kept and the cotangent of y

The last two are programs of their own, as in a real step, where a whole network lies
between them.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import networks
import numpy as np
import peers
import steps
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import normjax

MODES = ("forward", "training", "backward")
PEERS = ("normjax", "flax", "flax, safe")
_EPSILON = 1e-5


class Case(NamedTuple):
    """A norm and the shape of its input, whose last axis is the features.

    Attributes:
      norm: batch, layer, rms, group, instance, add_layer or add_rms.
      shape: of x.
      num_groups: of group norm.
      masked: whether a mask without features says which positions count.
      synced: over four devices that share the batch, "jit" or "shard_map"; else "".
      model: where the shape is from.
    """

    norm: str
    shape: tuple[int, ...]
    num_groups: int = 0
    masked: bool = False
    synced: str = ""
    model: str = ""

    @property
    def name(self) -> str:
        """As tables and reports have it."""
        parts = [f"{self.norm} {list(self.shape)}"]
        parts += ["masked"] if self.masked else []
        return ", ".join(parts + ([self.synced] if self.synced else []))

    @property
    def group(self) -> str:
        """The key of `CASES` under which it stands."""
        return next(name for name, group in CASES.items() if self in group)

    @property
    def fused(self) -> bool:
        """Whether a residual is added first."""
        return self.norm.startswith("add")

    @property
    def rows(self) -> bool:
        """Whether what shares its moments is one row of memory."""
        return self.norm in ("layer", "rms", "add_layer", "add_rms")

    def x_bytes(self, dtype: Any) -> int:
        """The bytes of x on each device."""
        devices = 4 if self.synced else 1
        return math.prod(self.shape) * jnp.dtype(dtype).itemsize // devices

    def least(self, mode: str) -> int:
        """The least bytes that a program moves, in units of the bytes of x.

        Forward a norm reads x and writes y, backward it reads x and dy and writes dx.
        Where what shares its moments is no row, x is read once more for its moments,
        and x and dy for their sums. With a residual the sum is a result too, and
        backward its cotangent is read.
        """
        if self.fused:
            return 4
        least = (2, 2, 3) if self.rows else (3, 3, 5)
        return least[MODES.index(mode)]


_BERT, _7B, _UNET = (16, 512, 768), (4, 2048, 4096), (16, 32, 32, 256)
_RESNET, _STYLE = (64, 56, 56, 64), (8, 64, 64, 64)
CASES = {
    "main": [
        Case("layer", _BERT, model="BERT-B"),
        Case("layer", _7B, model="7B decoder"),
        Case("rms", _BERT, model="T5-B"),
        Case("rms", _7B, model="7B decoder"),
        Case("batch", _RESNET, model="ResNet-50"),
        Case("batch", (32, 28, 28, 256), model="ResNet-50"),
        Case("group", _UNET, 32, model="diffusion U-Net"),
        Case("instance", _STYLE, model="style transfer"),
    ],
    "more": [
        Case("add_layer", _BERT, model="BERT-B"),
        Case("add_rms", _7B, model="7B decoder"),
        Case("layer", _BERT, masked=True, model="BERT-B"),
        Case("rms", _BERT, masked=True, model="T5-B"),
        Case("batch", _RESNET, masked=True, model="ResNet-50"),
        Case("group", _UNET, 32, masked=True, model="diffusion U-Net"),
        Case("instance", _STYLE, masked=True, model="style transfer"),
    ],
    "shapes": [
        Case("layer", (16, 197, 768), model="ViT-B"),
        Case("batch", (16, 14, 14, 1024), model="ResNet-50"),
        Case("batch", (16, 7, 7, 2048), model="ResNet-50"),
        Case("group", (2, 64, 64, 320), 32, model="diffusion U-Net"),
        Case("group", (2, 16, 16, 1280), 32, model="diffusion U-Net"),
        Case("instance", (4, 128, 128, 64), model="style transfer"),
    ],
    "small": [
        Case("layer", (8, 64), model="small"),
        Case("rms", (1, 1, 4096), model="one token, 7B decoder"),
        Case("batch", (64, 32), model="small"),
        Case("batch", (4, 8, 8, 32), model="small"),
        Case("group", (2, 4, 4, 128), 32, model="small"),
        Case("instance", (2, 8, 8, 32), model="small"),
    ],
    "synced": [
        Case("batch", _RESNET, synced="jit", model="ResNet-50"),
        Case("batch", _RESNET, synced="shard_map", model="ResNet-50"),
    ],
}
QUICK = [CASES["main"][i] for i in (0, 3, 4, 6, 7)] + CASES["synced"][1:]
NETWORKS = networks.NETWORKS


class Inputs(NamedTuple):
    """What a program takes.

    Attributes:
      arrays: to differentiate by: x, a residual, scale, bias, those that a norm has.
      where: a mask, or None.
    """

    arrays: tuple[Any, ...]
    where: Any


def inputs_of(case: Case, dtype: Any, devices: list[Any]) -> Inputs:
    """Describes a case's arrays, on the first device or, synced, over all of them."""
    mesh = Mesh(np.array(devices if case.synced else devices[:1]), ("data",))
    vector = jax.ShapeDtypeStruct(
        case.shape[-1:], jnp.float32, sharding=NamedSharding(mesh, P())
    )
    over = NamedSharding(mesh, P("data"))
    x = jax.ShapeDtypeStruct(case.shape, dtype, sharding=over)
    arrays = [x, x] if case.fused else [x]
    arrays += [vector] if case.norm.endswith("rms") else [vector, vector]
    if not case.masked:
        return Inputs(tuple(arrays), None)
    shape = (*case.shape[:-1], 1)
    return Inputs(tuple(arrays), jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=over))


def _ours(case: Case, dtype: Any) -> Callable:
    norm = getattr(normjax, f"{case.norm}_norm")
    fields = {"epsilon": _EPSILON, "dtype": dtype}
    if case.num_groups:
        fields["num_groups"] = case.num_groups
    if case.synced == "shard_map":
        fields["axis_name"] = "data"

    def f(arrays, where):
        result = norm(*arrays, where=where, **fields)
        return result if case.norm == "batch" else (result, None)

    return f


def _flax(case: Case, dtype: Any, fast: bool) -> Callable:
    norm = case.norm.removeprefix("add_")
    name = "RMSNorm" if norm == "rms" else f"{norm.capitalize()}Norm"
    fields = {"epsilon": _EPSILON, "dtype": dtype}
    if norm != "rms":
        fields["use_fast_variance"] = fast
    if norm == "batch":
        fields["use_running_average"] = False
        fields["axis_name"] = "data" if case.synced == "shard_map" else None
    if case.num_groups:
        fields["num_groups"] = case.num_groups
    module = getattr(nn, name)(**fields)

    def f(arrays, where):
        x, *parameters = arrays
        if case.fused:
            x = x + parameters.pop(0)
        params = dict(zip(("scale", "bias"), parameters, strict=False))
        if where is not None and case.num_groups:  # Flax's takes no other mask
            where = jnp.broadcast_to(where, x.shape)
        options = {} if where is None else {"mask": where}
        if norm == "batch":
            running = {"mean": jnp.zeros(x.shape[-1]), "var": jnp.ones(x.shape[-1])}
            variables = {"params": params, "batch_stats": running}
            return module.apply(variables, x, mutable=["batch_stats"], **options)
        y = module.apply({"params": params}, x, **options)
        return ((y, x) if case.fused else y), None

    return f


def function(peer: str, case: Case, dtype: Any, devices: list[Any]) -> Callable | None:
    """A peer's norm as a function of `Inputs` that returns what trains and the rest.

    Returns:
      None where the peer has no such norm: uncentered, Flax's fast variance is the
      only one.
    """
    if peer == "flax, safe" and case.norm.endswith("rms"):
        return None
    f = _ours(case, dtype)
    if peer != "normjax":
        f = _flax(case, dtype, fast=peer == "flax")
    if case.synced != "shard_map":
        return f
    mesh = Mesh(np.array(devices), ("data",))
    over = (P("data"), P(), P())
    out = (P("data"), P())
    return jax.shard_map(f, mesh=mesh, in_specs=(over, P()), out_specs=out)


def _kept(traced: Any, shardings: list[Any]) -> int:
    """The bytes on each device that training keeps for backward, x among them."""
    y, pull, _ = traced.out_info
    first = len(jax.tree.leaves(y))
    # What is kept twice is one variable; a number written in the program is none.
    arrays = {
        variable: (variable.aval.dtype.itemsize, sharding.shard_shape(info.shape))
        for variable, info, sharding in zip(
            traced.jaxpr.jaxpr.outvars[first : first + len(jax.tree.leaves(pull))],
            jax.tree.leaves(pull),
            shardings,
            strict=True,
        )
        if not hasattr(variable, "val")
    }
    return sum(itemsize * math.prod(shape) for itemsize, shape in arrays.values())


def compiled(f: Callable, inputs: Inputs) -> Iterator[tuple[str, Any, int | None]]:
    """Compiles a norm's programs, one after the other.

    Args:
      f: of `function`.
      inputs: of `inputs_of`.

    Yields:
      The mode, the compiled program, and for training the bytes kept for backward.
    """
    yield "forward", jax.jit(f).trace(*inputs).lower().compile(), None

    def training(arrays, where):
        return jax.vjp(lambda a: f(a, where), arrays, has_aux=True)

    traced = jax.jit(training).trace(*inputs)
    program = traced.lower().compile()
    y, pull, _ = traced.out_info
    shardings = program.output_shardings[:2]
    yield "training", program, _kept(traced, jax.tree.leaves(shardings[1]))
    # The backward pass takes arrays that lie over devices as training left them.
    dy, pull = jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        (y, pull),
        shardings,
    )
    backward = jax.jit(lambda pull, dy: pull(dy)).trace(pull, dy)
    yield "backward", backward.lower().compile(), None


# A GPU's compiler takes a kernel of Triton or of cuBLAS for a product of matrices by
# timing both. Where no GPU is, its choice of Triton's may be one that it cannot build.
_STEP_OPTIONS = {"gpu": {"xla_gpu_enable_triton_gemm": False}}


def step(peer: str, name: str, platform: str, device: Any) -> Any:
    """Compiles a training step of a network, with the norms of a peer."""
    make, shape = networks.NETWORKS[name]
    library = peers.NORMJAX if peer == "normjax" else peers.PEERS["flax"]
    model = make(library, jnp.bfloat16)
    optimizer, run = steps.step_of(model)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    state = jax.eval_shape(optimizer.init, variables["params"])
    sharding = jax.sharding.SingleDeviceSharding(device)
    arguments = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding),
        (variables, state, x),
    )
    lowered = jax.jit(run).trace(*arguments).lower()
    return lowered.compile(compiler_options=_STEP_OPTIONS.get(platform))
