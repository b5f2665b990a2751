"""Whole training steps, in which the norm is swapped and nothing else.

    python benchmarks/steps.py
    python benchmarks/steps.py --quick

A ResNet-18, a vision transformer, a small decoder and a block of a diffusion U-Net: the
loss, the gradients and an update by SGD, one program. Then a network of fifty norms,
ten of each, for what it takes to trace and to compile. `run.py` has them in its table.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import peers
import timing

import normjax.linen
from normjax.kernels import library

ALLOWANCE = 12.0  # seconds of rounds for one model


class Norm(nn.Module):
    """A norm of any peer, as a module with Flax's parameters and statistics."""

    peer: peers.Peer
    norm: str
    num_groups: int = 0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # [N, *S, C]
        """Normalizes x, and updates the running statistics."""
        axes = {"batch": range(x.ndim - 1), "instance": range(1, x.ndim - 1)}
        axes |= {"group": (*range(1, x.ndim - 1), x.ndim)}
        over = tuple(axes.get(self.norm, (x.ndim - 1,)))
        case = cases.Case(self.norm, x.shape, over, self.num_groups)
        shape = (case.features,)
        params = {"scale": self.param("scale", nn.initializers.ones, shape)}
        if self.norm != "rms":
            params["bias"] = self.param("bias", nn.initializers.zeros, shape)
        running = {}
        if self.norm == "batch":
            running = {
                "mean": self.variable("batch_stats", "mean", jnp.zeros, shape),
                "var": self.variable("batch_stats", "var", jnp.ones, shape),
            }
        f = self.peer.build(case, x.dtype)
        if f is None:
            raise TypeError(f"it has no {self.norm} norm")
        before = {name: variable.value for name, variable in running.items()}
        y, after = f(params, before, x, True)
        if not self.is_initializing():
            for name, variable in running.items():
                variable.value = after[name]
        return y


class ResNetBlock(nn.Module):
    """Two convolutions and what goes past them."""

    peer: peers.Peer
    features: int
    strides: int

    @nn.compact
    def __call__(self, x):
        """Adds to x, or to a projection of it."""
        y = nn.Conv(self.features, (3, 3), self.strides, use_bias=False)(x)
        y = nn.relu(Norm(self.peer, "batch")(y))
        y = nn.Conv(self.features, (3, 3), use_bias=False)(y)
        y = Norm(self.peer, "batch")(y)
        if x.shape != y.shape:
            x = nn.Conv(self.features, (1, 1), self.strides, use_bias=False)(x)
            x = Norm(self.peer, "batch")(x)
        return nn.relu(x + y)


def rematted(block: type, policy: Any) -> type:
    """A block that keeps for its backward pass what a policy says, if there is one."""
    return block if policy is None else nn.remat(block, policy=policy)


class ResNet18(nn.Module):
    """A ResNet-18, https://arxiv.org/abs/1512.03385.

    On images of 32 by 32 it starts with a small convolution and no pooling, as there.
    """

    peer: peers.Peer
    policy: Any = None

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 10]."""
        block = rematted(ResNetBlock, self.policy)
        small = x.shape[1] <= 32
        x = nn.Conv(64, (3, 3) if small else (7, 7), 1 if small else 2, use_bias=False)(
            x
        )
        x = nn.relu(Norm(self.peer, "batch")(x))
        if not small:
            x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for i, features in enumerate((64, 128, 256, 512)):
            x = block(self.peer, features, 1 if i == 0 else 2)(x)
            x = block(self.peer, features, 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class ViT(nn.Module):
    """Four layers of a small vision transformer, https://arxiv.org/abs/2010.11929."""

    peer: peers.Peer

    @nn.compact
    def __call__(self, x):  # [N, H, W, 3]
        """Returns logits [N, 10]."""
        x = nn.Conv(384, (16, 16), 16)(x).reshape(x.shape[0], -1, 384)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])[None]
        for _ in range(4):
            y = Norm(self.peer, "layer")(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=6)(y)
            y = nn.gelu(nn.Dense(4 * 384)(Norm(self.peer, "layer")(x)))
            x = x + nn.Dense(384)(y)
        return nn.Dense(10)(Norm(self.peer, "layer")(x).mean(1))


class DecoderBlock(nn.Module):
    """A layer of a decoder."""

    peer: peers.Peer

    @nn.compact
    def __call__(self, x, mask):  # [N, T, C]
        """Adds attention to x, and a gated unit."""
        y = Norm(self.peer, "rms")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=6, use_bias=False)(
            y, mask=mask
        )
        y = Norm(self.peer, "rms")(x)
        y = nn.silu(nn.Dense(1024, use_bias=False)(y)) * nn.Dense(1024)(y)
        return x + nn.Dense(384, use_bias=False)(y)


class Decoder(nn.Module):
    """Four layers of a decoder of rms norms and gated units."""

    peer: peers.Peer
    policy: Any = None

    @nn.compact
    def __call__(self, tokens):  # [N, T]
        """Returns logits [N, T, 1024]."""
        x = nn.Embed(1024, 384)(tokens)
        mask = nn.make_causal_mask(tokens)
        for _ in range(4):
            x = rematted(DecoderBlock, self.policy)(self.peer)(x, mask)
        return nn.Dense(1024, use_bias=False)(Norm(self.peer, "rms")(x))


class UNetBlock(nn.Module):
    """Two residual blocks of a diffusion U-Net, https://arxiv.org/abs/2006.11239."""

    peer: peers.Peer

    @nn.compact
    def __call__(self, x):  # [N, H, W, C]
        """Returns an array of the shape of x."""
        for _ in range(2):
            y = nn.silu(Norm(self.peer, "group", 32)(x))
            y = nn.Conv(x.shape[-1], (3, 3))(y)
            y = nn.silu(Norm(self.peer, "group", 32)(y))
            x = x + nn.Conv(x.shape[-1], (3, 3))(y)
        return x


# The model, and the shape of its input; integers of shape [N, T] are tokens.
MODELS = {
    "ResNet-18": (ResNet18, (8, 112, 112, 3)),
    "decoder": (Decoder, (2, 256)),
    "ViT": (ViT, (2, 224, 224, 3)),
    "U-Net block": (UNetBlock, (2, 32, 32, 192)),
}
QUICK = ("ResNet-18", "decoder")
# Batches whose activations, and not the parameters, are what a step needs memory for.
# They are compiled and not run.
NEED_MEMORY = {"ResNet-18": (64, 32, 32, 3), "decoder": (8, 256)}
STEP_PEERS = ("flax", "haiku", "equinox", "keras", "jax.nn")


def step_of(model: nn.Module) -> Any:
    """A training step, as a function of (variables, optimizer state, x)."""
    optimizer = optax.sgd(1e-2, momentum=0.9)

    def loss_of(params, statistics, x):
        y, new = model.apply({"params": params, **statistics}, x, mutable=[*statistics])
        # Towards a target that is the same for all: the next token, or a constant.
        if x.ndim == 2:
            loss = optax.softmax_cross_entropy_with_integer_labels(y[:, :-1], x[:, 1:])
        else:
            loss = jnp.square(y - 1)
        return loss.mean(), new

    def step(variables, state, x):
        statistics = {k: v for k, v in variables.items() if k != "params"}
        (loss, new), grads = jax.value_and_grad(loss_of, has_aux=True)(
            variables["params"], statistics, x
        )
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(variables["params"], updates)
        return loss, {"params": params, **new}, state

    return optimizer, step


def _program(model: nn.Module, variables: Any, x: jax.Array) -> timing.Program:
    optimizer, step = step_of(model)
    return timing.compiled(step, variables, optimizer.init(variables["params"]), x)


def _start(model: nn.Module, shape: tuple[int, ...]) -> tuple[Any, jax.Array]:
    """Draws variables, the same numbers whatever the peer, and an input."""
    key = jax.random.key(0)
    tokens = len(shape) == 2
    x = jax.random.randint(key, shape, 0, 1024) if tokens else None
    x = jax.random.normal(key, shape) if x is None else x
    return jax.jit(model.init)(key, x), x


def memory() -> list[dict]:
    """The temporaries of a step, in bytes: Flax's, normjax's, and with its policy."""
    rows = []
    for title, shape in NEED_MEMORY.items():
        model, _ = MODELS[title]
        flax = peers.PEERS["flax"]
        of = {
            "flax": model(flax),
            "normjax": model(peers.NORMJAX),
            "flax, remat_policy": model(flax, normjax.remat_policy),
            "normjax, remat_policy": model(peers.NORMJAX, normjax.remat_policy),
        }
        found = {n: _program(m, *_start(m, shape)).temporary for n, m in of.items()}
        if None not in found.values():  # XLA says it
            rows.append({"case": f"{title} {list(shape)}", "of": found})
    return rows


def memory_table(rows: list[dict]) -> str:
    """Writes what `memory` found, in MiB and over Flax's."""
    if not rows:
        return "temporaries of a step: not known on this device"
    names = list(rows[0]["of"])
    lines = [
        [
            row["case"],
            *(f"{row['of'][n] / 2**20:.1f}" for n in names),
            *(f"{row['of'][n] / row['of']['flax']:.2f}" for n in names[1:]),
        ]
        for row in rows
    ]
    header = ["temporaries of a step, MiB", *names, *(f"{n} / flax" for n in names[1:])]
    return cases.table(header, lines)


def differs(got: Any, want: Any) -> str:
    """Names how far a step of a peer is from normjax's, or nothing.

    The loss and the new parameters, to many roundings: a step goes through tens of
    layers. Running statistics are not compared, which each library keeps its own way.
    """
    params = got[1]["params"], want[1]["params"]
    for name, g, w in (("loss", got[0], want[0]), ("update", *params)):
        g, w = (
            jnp.concatenate([a.ravel() for a in jax.tree.leaves(v)]) for v in (g, w)
        )
        error = float(jnp.linalg.norm(g - w) / jnp.linalg.norm(w))
        if not error <= 1e-4:
            return f"{name} is off by {error:.0e}, bar 1e-04"
    return ""


def measure(quick: bool) -> tuple[list[dict], list[str]]:
    """Measures every model; returns rows as run.py's, and who was left out and why."""
    names = ("flax",) if quick else STEP_PEERS
    contenders = {"normjax": peers.NORMJAX}
    if library.missing() is None:
        contenders["normjax, native"] = peers.NATIVE
    contenders |= {name: peers.PEERS[name] for name in names if name in peers.PEERS}
    rows, left_out = [], []
    for title in QUICK if quick else MODELS:
        model, shape = MODELS[title]
        variables, x = _start(model(peers.NORMJAX), shape)
        programs, want = {}, None
        for name, peer in contenders.items():
            if peer.channels_first and title in ("ResNet-18", "U-Net block"):
                left_out.append(f"{name}, {title}: its features are the second axis")
                continue
            try:
                program = _program(model(peer), variables, x)
                got = program.call()
            except Exception as error:  # a peer that breaks must not end the others
                if name == "normjax":
                    raise
                why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
            else:
                want = got if want is None else want
                why = differs(got, want)
            if why:
                left_out.append(f"{name}, {title}: {why}")
            else:
                programs[name] = program
        calls = {name: program.call for name, program in programs.items()}
        times = timing.interleaved(
            calls, 5 if quick else 15, ALLOWANCE / (3 if quick else 1)
        )
        row = {"case": f"{title} {list(shape)}", "dtype": "float32", "pass": "step"}
        row |= {"norm": "", "shape": shape, "model": title, "small": False}
        row |= {"rounds": len(times["normjax"]), "ratios": timing.ratios(times)}
        row["of"] = {n: timing.figures(programs[n], times[n]) for n in programs}
        rows.append(row)
        print(".", end="", file=sys.stderr, flush=True)
    return rows, left_out


class Fifty(nn.Module):
    """Fifty norms of a library of Flax modules, ten of each."""

    library: Any

    @nn.compact
    def __call__(self, x):  # [N, H, W, C]
        """Returns an array of the shape of x."""
        for _ in range(10):
            x = nn.Dense(x.shape[-1])(self.library.LayerNorm()(x))
            x = nn.Dense(x.shape[-1])(self.library.RMSNorm()(x))
            x = nn.Dense(x.shape[-1])(self.library.GroupNorm(4)(x))
            x = nn.Dense(x.shape[-1])(self.library.InstanceNorm()(x))
            x = nn.Dense(x.shape[-1])(self.library.BatchNorm(False)(x))
        return x


def networks(rounds: int) -> dict[str, dict]:
    """What it takes to trace and to compile fifty norms, the caches emptied each time.

    Returns:
      For normjax and flax the seconds, round by round, and the ratios.
    """
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 32))
    libraries = {"normjax": normjax.linen, "flax": nn}
    variables = jax.jit(Fifty(nn).init)(jax.random.key(0), x)
    found = {"trace": {n: [] for n in libraries}, "compile": {n: [] for n in libraries}}
    for i in range(rounds):
        for name in sorted(libraries, reverse=bool(i % 2)):
            jax.clear_caches()
            program = _program(Fifty(libraries[name]), variables, x)
            found["trace"][name].append(program.trace_ms / 1e3)
            found["compile"][name].append(program.compile_ms / 1e3)
    return {
        what: {"seconds": times, "ratio": timing.ratios(times)["flax"]["median"]}
        for what, times in found.items()
    }


def network_line(found: dict[str, dict]) -> str:
    """Writes what `networks` found."""
    parts = [
        f"{what} {statistics.median(of['seconds']['normjax']):.2f} s, "
        f"flax {statistics.median(of['seconds']['flax']):.2f} s"
        for what, of in found.items()
    ]
    return "a training step of fifty norms: " + "; ".join(parts)


def bars(report: dict) -> list[dict]:
    """How memory, tracing and compiling stand to the bars."""
    found = []
    for row in report["memory"]:
        for ours in ("normjax", "normjax, remat_policy"):
            value = row["of"][ours] / row["of"]["flax"]
            name = f"{row['case']} step, temporaries, {ours} / flax"
            found.append({"name": name, "value": value, "bar": 0.6})
    for what, of in report["networks"].items():
        name = f"fifty norms, {what} / flax"
        found.append({"name": name, "value": of["ratio"], "bar": 1.1})
    return [bar | {"ok": bool(bar["value"] <= bar["bar"])} for bar in found]


def main() -> None:
    """Measures, and prints a table of the steps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two models, flax alone")
    args = parser.parse_args()
    start = time.perf_counter()
    rows, left_out = measure(args.quick)
    found, of_memory = networks(2 if args.quick else 5), memory()
    print(cases.versions("jax", *peers.PACKAGES))
    print(*(f"- not timed: {line}" for line in left_out), sep="\n")
    header = ["step", "of", "ms", "normjax / it", "temporaries, MiB", "compile s"]
    lines = [
        [
            row["case"],
            name,
            f"{of['ms']:.1f}",
            f"{row['ratios'].get(name, {}).get('median', 1):.2f}",
            f"{(of['temporary'] or 0) / 2**20:.1f}",
            f"{of['compile_ms'] / 1e3:.1f}",
        ]
        for row in rows
        for name, of in row["of"].items()
    ]
    tables = cases.table(header, lines), memory_table(of_memory), network_line(found)
    print(*tables, sep="\n\n")
    print(f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    timing.use_allocator("keep")
    main()
