"""What syncing batch norm costs: collectives, bytes, time on 8 devices, and beyond.

    python benchmarks/sync.py
    python benchmarks/sync.py --plot docs/sync.png

The collectives and their bytes are read from compiled programs for 8 simulated devices,
in which a step synced by normjax and by Flax are timed in turns. For more devices a
model of latency and bandwidth says what these collectives take, and where one
all-reduce, whose buffer has a row for each device, should give way to two.
"""

import argparse
import math
import pathlib
import re
import statistics
from typing import Any, NamedTuple

import cases
import flax.linen as nn
import jax
import jax.numpy as jnp
import timing
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normjax.linen
from normjax import _devices

DEVICES = 8
CHANNELS = (64, 256, 1024, 2048)
OTHER_LIMITS = (256 << 10, 1536 << 10)  # of one all-reduce, for comparison
SCALES = tuple(2**k for k in range(3, 13))  # 8 to 4096 devices


class Network(NamedTuple):
    """What collectives go over.

    Attributes:
      name: what kind.
      latency: seconds that a message takes, however small.
      bandwidth: bytes a second that leave a device.
    """

    name: str
    latency: float
    bandwidth: float


# Orders of magnitude, stated so that others can be put in their place.
NETWORKS = (
    Network("GPUs, 400 Gb/s each", 5e-6, 50e9),
    Network("TPUs, 100 GB/s each", 1e-6, 100e9),
)


def all_reduce(network: Network, devices: int, size: float) -> float:
    """Seconds of an all-reduce of so many bytes: a ring, or a tree, what is faster."""
    bytes_over = 2 * size / network.bandwidth
    ring = 2 * (devices - 1) * network.latency + bytes_over * (devices - 1) / devices
    tree = 2 * math.ceil(math.log2(devices)) * network.latency + bytes_over
    return min(ring, tree)


def buffers(channels: int, devices: int, one: bool) -> list[int]:
    """The bytes of each all-reduce of a forward pass, of shards of one size.

    One buffer with a row of mean, its rest and var for each device; or first the sums,
    then the rests, and the spreads in two units.
    """
    row = 4 * channels
    return [3 * row * devices] if one else [row, 3 * row]


def seconds(network: Network, channels: int, devices: int, one: bool) -> float:
    """What the all-reduces of a forward pass take by the model."""
    sizes = buffers(channels, devices, one)
    return sum(all_reduce(network, devices, size) for size in sizes)


def collectives(program: Any) -> list[int]:
    """The bytes of each all-reduce in a compiled program."""
    found = []
    for line in program.as_text().splitlines():
        if re.search(r" all-reduce(-start)?\(", line):
            shapes = re.findall(r"f32\[([\d,]*)\]", re.split(" all-reduce", line)[0])
            found.append(
                sum(4 * math.prod(int(n) for n in s.split(",") if n) for s in shapes)
            )
    return found


def programs(channels: int, library: Any, what: str) -> tuple[Any, tuple]:
    """A synced norm on 8 devices, forward or with its gradients, and its arguments."""
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (64, 8, 8, channels))
    norm = library.BatchNorm(use_running_average=False, axis_name="data")
    variables = library.BatchNorm(use_running_average=False).init(
        jax.random.key(0), x[:1]
    )

    def forward(variables, x):
        return norm.apply(variables, x, mutable=["batch_stats"])

    def both(variables, x):
        def loss(params, x):
            y, new = forward({**variables, "params": params}, x)
            return jnp.sin(y).sum(), new

        grads, new = jax.grad(loss, (0, 1), has_aux=True)(variables["params"], x)
        return grads[1], (jax.lax.psum(grads[0], "data"), new)

    out = (P("data"), P())
    f = jax.shard_map(
        forward if what == "forward" else both,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=out,
        check_vma=False,
    )
    return jax.jit(f).lower(variables, x).compile(), (variables, x)


def measured(rounds: int) -> list[list[str]]:
    """Rows of collectives, bytes and times, of normjax and of Flax."""
    rows = []
    for channels in CHANNELS:
        for what in ("forward", "both"):
            found, calls = {}, {}
            for name, library in (("normjax", normjax.linen), ("flax", nn)):
                program, arguments = programs(channels, library, what)
                found[name] = collectives(program)
                calls[name] = lambda p=program, a=arguments: p(*a)
            times = timing.interleaved(calls, rounds)
            ratio = timing.ratios(times)["flax"]["median"]
            took = {n: 1e3 * statistics.median(t) for n, t in times.items()}
            rows.append(
                [
                    str(channels),
                    what,
                    *(f"{len(found[n])}: {sum(found[n])}" for n in found),
                    *(f"{took[n]:.2f}" for n in took),
                    f"{ratio:.2f}",
                ]
            )
    return rows


def one_is_faster(network: Network, channels: int, devices: int) -> bool:
    """Whether one all-reduce is faster than two, by the model."""
    one, two = (seconds(network, channels, devices, b) for b in (True, False))
    return one <= two


def taken(channels: int, devices: int, limit: int | None = None) -> bool:
    """Whether normjax takes one all-reduce; or would, up to so many bytes."""
    (size,) = buffers(channels, devices, True)
    return size <= (_devices.ONE_ALL_REDUCE_BYTES if limit is None else limit)


def worst(limit: int | None = None) -> tuple[float, int, int]:
    """How far what is taken is from the faster, at most; its channels and devices."""
    found = []
    for network in NETWORKS:
        for channels in (2**k for k in range(4, 13)):
            for devices in range(2, SCALES[-1] + 1):
                one, two = (
                    seconds(network, channels, devices, b) for b in (True, False)
                )
                choice = one if taken(channels, devices, limit) else two
                found.append((choice / min(one, two), channels, devices))
    return max(found)


def modelled() -> list[list[str]]:
    """Rows of what one and two all-reduces take by the model, and which is taken."""
    rows = []
    for network in NETWORKS:
        for channels in (64, 1024):
            for devices in SCALES[::3]:
                one, two = (
                    1e6 * seconds(network, channels, devices, b) for b in (True, False)
                )
                choice = one if taken(channels, devices) else two
                rows.append(
                    [
                        network.name,
                        str(channels),
                        str(devices),
                        f"{one:.0f}",
                        f"{two:.0f}",
                        "one" if taken(channels, devices) else "two",
                        f"{choice / min(one, two):.2f}",
                    ]
                )
    return rows


def draw(path: pathlib.Path) -> None:
    """Draws the model: microseconds over devices, one line for each form."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    panels = figure.subplots(1, len(NETWORKS), sharey=True)
    for panel, network in zip(panels, NETWORKS, strict=True):
        for color, channels in zip(("C0", "C1", "C2"), (64, 256, 2048), strict=True):
            for one, style in ((True, "--"), (False, ":")):
                times = [1e6 * seconds(network, channels, n, one) for n in SCALES]
                label = f"{channels} channels, {'one' if one else 'two'}"
                panel.plot(SCALES, times, style, color=color, label=label)
            default = [
                1e6 * seconds(network, channels, n, taken(channels, n)) for n in SCALES
            ]
            panel.plot(SCALES, default, color=color, lw=3, alpha=0.4)
        panel.set(xscale="log", yscale="log", title=network.name, xlabel="devices")
        panel.set_xticks(SCALES, [str(n) for n in SCALES], minor=False)
        panel.minorticks_off()
        panel.tick_params(axis="x", rotation=60)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("µs for the moments of one batch norm")
    panels[-1].legend(fontsize=8, title="all-reduces; thick: what is taken")
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measures, models, and prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=pathlib.Path, help="also draw the model, a PNG")
    parser.add_argument("--rounds", type=int, default=21)
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    header = ["channels", "pass", "all-reduces: bytes", "flax's", "ms", "flax's"]
    print(cases.versions("jax", "flax"), f"{DEVICES} simulated devices", sep="; ")
    print()
    print(cases.table([*header, "normjax / flax"], measured(args.rounds)))
    print()
    header = ["network", "channels", "devices", "one, µs", "two, µs"]
    print(cases.table([*header, "taken", "over the faster"], modelled()))
    print()
    for limit in (_devices.ONE_ALL_REDUCE_BYTES, *OTHER_LIMITS):
        ratio, channels, devices = worst(limit)
        where = f"{channels} channels on {devices} devices"
        print(f"One up to {limit >> 10} KiB: {ratio:.2f} times the faster, at {where}")
    if args.plot:
        draw(args.plot)


if __name__ == "__main__":
    main()
