"""Compares norms: one small network, two batch sizes, two rates, two initializations.

    python examples/compare_norms.py

Batch norm synced over all devices, batch norm with the statistics of each device alone,
layer, group and instance norm, and none, on scikit-learn's handwritten digits: at 2 and
at 32 examples per device, at a small and a large learning rate, from a good and a bad
initialization, over 3 seeds. It ends with a table of the accuracies on held-out images,
one picture, and all results in JSON. `--norms batch layer` compares some, `--quick` is
a smoke run, and `--help` lists the rest.

The budget is a number of examples: at 2 per device a training takes 16 times as many
steps as at 32, and sees the same examples in the same order. A training whose loss or
logits stop being finite has diverged: it counts as an accuracy of 0, and the table and
the picture say how many did.

The devices are the accelerators where there are several, or else 8 simulated CPU
devices. Local batch norm has running statistics on each device, and each device
evaluates its share of the held-out images with its own: the accuracy is what the
devices' copies of the network reach on average.

    python examples/compare_norms.py --data cifar10 --data-dir cifar-10-batches-bin

trains on CIFAR-10 instead, from the files of its binary version, unpacked:
https://www.cs.toronto.edu/~kriz/cifar.html. Give it more `--steps`, and more time.
"""

import argparse
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from matplotlib import colormaps
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm
from train_digits import choose_devices, digits, normalized

# What options can change.
OUT = Path("out/compare")
STEPS = 64  # at the largest batch; the smaller takes more, to see as many examples
QUICK_STEPS = 2

# What they cannot.
NORMS = {
    "batch": "synced batch",
    "local-batch": "local batch",
    "layer": "layer",
    "group": "group",
    "instance": "instance",
    "none": "none",
}
PER_DEVICE = (2, 32)  # examples
RATES = {"small": 0.05, "large": 1.0}
INITS = {"good": 1.0, "bad": 4.0}  # times as large is every initial kernel
SEEDS = 3
STAGES = ((16, 2), (32, 2))  # width and stride, of one residual block
MOMENTUM = 0.9  # of the optimizer
CALL = 16  # steps in one call, at most
EVALUATE = 32  # images of one device at a time

AXIS = "devices"
PICTURE = "compare_norms.png"
RESULTS = "compare_norms.json"
CIFAR_FILES = (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin")
CIFAR_RECORD = 1 + 3 * 32 * 32  # bytes: the label, then red, green and blue
CIFAR_RECORDS = 10_000  # in a published file
CIFAR_PAGE = "https://www.cs.toronto.edu/~kriz/cifar.html"


# The data: images [N, H, W, C], floats in [0, 1] or bytes, and their labels [N].


class Images(NamedTuple):
    """Images [N, H, W, C], floats in [0, 1] or bytes, and their labels [N]."""

    images: np.ndarray
    labels: np.ndarray


def read_cifar10(folder: Path) -> tuple[Images, Images]:
    """Returns CIFAR-10's images to train on and those held out, [N, 32, 32, 3].

    Args:
      folder: with the six files of the binary version.

    Raises:
      FileNotFoundError: if a file is missing.
      ValueError: if a file is not whole records, or a label is not one of ten.
    """
    missing = [name for name in CIFAR_FILES if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            "read_cifar10: the folder must have the six files of the binary version."
            f" Got {folder} without {', '.join(missing)}. Unpack"
            f" cifar-10-binary.tar.gz from {CIFAR_PAGE}, and pass the folder with"
            " data_batch_1.bin in it."
        )
    *train, held_out = [read_cifar10_file(folder / name) for name in CIFAR_FILES]
    return Images(*map(np.concatenate, zip(*train, strict=True))), held_out


def read_cifar10_file(path: Path) -> Images:
    """Returns the images [N, 32, 32, 3] of one file, and says so if N is unusual."""
    again = f"Get cifar-10-binary.tar.gz from {CIFAR_PAGE} again."
    size = path.stat().st_size
    records, rest = divmod(size, CIFAR_RECORD)
    if rest or not records:
        raise ValueError(
            f"read_cifar10: a file must be one or more whole records of {CIFAR_RECORD}"
            f" bytes; a published one has {CIFAR_RECORDS * CIFAR_RECORD} bytes. Got"
            f" {path} of {size} bytes: {records} records and {rest} bytes. {again}"
        )
    data = np.fromfile(path, np.uint8).reshape(records, CIFAR_RECORD)
    labels = data[:, 0].astype(np.int32)
    if labels.max() > 9:
        wrong = int((labels > 9).argmax())
        raise ValueError(
            "read_cifar10: the first byte of a record is its label and must be 0 to 9."
            f" Got {labels[wrong]} in record {wrong} of {path}. {again}"
        )
    if records != CIFAR_RECORDS:
        print(
            f"Note: {path} has {records} records, a published file {CIFAR_RECORDS}.",
            file=sys.stderr,
        )
    images = data[:, 1:].reshape(records, 3, 32, 32)  # [N, C, H, W]
    return Images(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), labels)


def order(count: int, examples: int, seed: int) -> np.ndarray:
    """Returns which of ``count`` images to see: all of them, shuffled, then again."""
    rng = np.random.default_rng(seed)
    epochs = math.ceil(examples / count)
    shuffled = [rng.permutation(count) for _ in range(epochs)]
    return np.concatenate(shuffled)[:examples]


# The network: residual, its every convolution followed by a norm.


def convolve(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Returns the convolution of x [N, H, W, C] with a kernel [S, S, C, D], S odd.

    It is a product of matrices: networks under one vmap have each their own kernels,
    and a convolution would become one of groups, on CPUs several times as slow.
    """
    size, _, _, width = kernel.shape
    _, height, w, _ = x.shape
    edge = (size // 2, size // 2)
    x = jnp.pad(x, ((0, 0), edge, edge, (0, 0)))
    shifts = itertools.product(range(size), repeat=2)
    patches = [x[:, i : i + height : stride, j : j + w : stride] for i, j in shifts]
    return jnp.concatenate(patches, -1) @ kernel.reshape(-1, width)


class ConvNorm(nn.Module):
    """A convolution and the norm of its output."""

    width: int
    size: int
    stride: int
    norm: str
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns [N, H / stride, W / stride, width]."""
        shape = (self.size, self.size, x.shape[-1], self.width)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        x = convolve(x, kernel, self.stride)
        if self.norm == "none":  # a norm has a bias of its own
            x += self.param("bias", nn.initializers.zeros, (self.width,))
        return normalized(x, self.norm, train, self.axis_name, jnp.float32)


class Network(nn.Module):
    """A residual network of one block in a stage."""

    norm: str
    axis_name: str | None = AXIS  # device axis to sync batch norm over

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns logits [N, 10] for images [N, H, W, C], floats or bytes."""

        def layer(x, width, size=3, stride=1):
            return ConvNorm(width, size, stride, self.norm, self.axis_name)(x, train)

        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / 255
        x = nn.silu(layer(x, STAGES[0][0]))  # [N, 8, 8, 16] for digits
        for width, stride in STAGES:
            y = nn.silu(layer(x, width, stride=stride))
            y = layer(y, width)
            if x.shape != y.shape:
                x = layer(x, width, size=1, stride=stride)
            x = nn.silu(x + y)  # [N, 4, 4, 16], [N, 2, 2, 32]
        return nn.Dense(10)(x.mean((1, 2)))  # [N, 10]


# Training: all rates, initializations and seeds of a network in one program.


class Members(NamedTuple):
    """What differs between the networks of one program, [M] each."""

    rate: np.ndarray
    scale: np.ndarray  # of the initial kernels
    seed: np.ndarray

    @classmethod
    def all(cls) -> "Members":
        """Returns every rate with every initialization with every seed."""
        every = itertools.product(RATES.values(), INITS.values(), range(SEEDS))
        rate, scale, seed = zip(*every, strict=True)
        return cls(np.float32(rate), np.float32(scale), np.int32(seed))


class State(NamedTuple):
    """What training changes, of all members: every leaf is [M, ...]."""

    params: Any
    stats: Any
    optimizer: Any


class Outcome(NamedTuple):
    """What became of each member, [M] each."""

    accuracy: np.ndarray  # on the held-out images; 0 where diverged
    diverged: np.ndarray
    loss: np.ndarray  # of the last step


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """Returns SGD with momentum, for a rate of 1 that falls to 0 as a cosine."""
    return optax.sgd(optax.cosine_decay_schedule(1.0, steps), MOMENTUM, nesterov=True)


@functools.partial(jax.jit, static_argnums=(0, 1))
def make_state(norm: str, shape: tuple, members: Members) -> State:
    """Returns the state of all members before training, for images of that shape."""

    def init(member):
        key = jax.random.key(member.seed, impl="rbg")  # compiles in less time
        stats = Network(norm).init(key, jnp.zeros((2, *shape)), train=True)
        params = jax.tree_util.tree_map_with_path(
            lambda path, a: a * member.scale if path[-1].key == "kernel" else a,
            stats.pop("params"),
        )
        optimizer = make_optimizer(1).init(params)  # the same for any number of steps
        return State(params, stats, optimizer)

    # One by one: under vmap such a key would draw other numbers in other company.
    return lax.map(init, members)


def make_calls(norm: str, steps: int) -> tuple[Callable, Callable]:
    """Returns what trains and what evaluates all members, on each of the devices."""
    model, optimizer = Network(norm), make_optimizer(steps)

    def step(state, rate, images, labels):  # of one member
        def loss_of(params):
            variables = {"params": params, **state.stats}
            logits, stats = model.apply(
                variables, images, train=True, mutable=["batch_stats"]
            )
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return lax.pmean(loss.mean(), AXIS), stats  # shard_map sums the gradients

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state.params)
        updates, inner = optimizer.update(grads, state.optimizer, state.params)
        # SGD is linear in the rate: that of one member comes after that of the step.
        updates = jax.tree.map(lambda update: rate * update, updates)
        params = optax.apply_updates(state.params, updates)
        return State(params, stats, inner), loss

    def train(state, rates, seeds, images, labels):
        """Takes K batches of every seed, [K, seeds, N, ...]; returns losses [K, M].

        Rates are arguments, no constants: all of them share one program.
        """

        def one(state, batch):
            images, labels = batch
            return jax.vmap(step)(state, rates, images[seeds], labels[seeds])

        return lax.scan(one, state, (images, labels))

    def evaluate(state, images, labels):
        """Takes blocks [B, N, ...]; returns how many are right and not finite, [M].

        A label of -1 is that of an image which only fills up a block.
        """

        def of_member(params, stats, images, labels):
            logits = model.apply({"params": params, **stats}, images, train=False)
            right = (logits.argmax(-1) == labels).sum()
            broken = (~jnp.isfinite(logits).all(-1) & (labels >= 0)).sum()
            return right, broken

        def of_block(block):
            of_all = jax.vmap(of_member, in_axes=(0, 0, None, None))
            return of_all(state.params, state.stats, *block)

        right, broken = lax.map(of_block, (images, labels))  # [B, M]
        return lax.psum((right.sum(0), broken.sum(0)), AXIS)

    return train, evaluate


def compare(
    norm: str,
    per_device: int,
    devices: list,
    data: Images,
    held_out: Images,
    steps: int,
    bar: Any,
    members: Members | None = None,
) -> Outcome:
    """Trains and evaluates all members of one norm at one batch size.

    Args:
      norm: a key of NORMS.
      per_device: examples of one device in one step.
      devices: to train on.
      data: to train on.
      held_out: to evaluate on.
      steps: to take.
      bar: of the progress; is updated by the examples seen.
      members: rates, initial scales and seeds; None: every one with every other.
    """
    members = members or Members.all()
    n = len(devices)
    size = n * per_device
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    shared, by_device = PartitionSpec(), PartitionSpec(AXIS)
    in_blocks, by_rows = PartitionSpec(None, AXIS), PartitionSpec(None, None, AXIS)

    # Devices alone keep statistics of their own: theirs lie one after the other.
    local = norm == "local-batch"
    specs = State(shared, by_device if local else shared, shared)
    state = make_state(norm, data.images.shape[1:], members)
    if local:
        copies = jax.tree.map(lambda a: jnp.concatenate([a] * n), state.stats)
        state = state._replace(stats=copies)  # [devices * M, ...]

    def put(tree, spec):
        return jax.device_put(tree, NamedSharding(mesh, spec))

    state = State(*map(put, state, specs))
    train, evaluate = make_calls(norm, steps)
    train = jax.jit(
        jax.shard_map(
            train,
            mesh=mesh,
            in_specs=(specs, shared, shared, by_rows, by_rows),
            out_specs=(specs, shared),
        )
    )
    evaluate = jax.jit(
        jax.shard_map(
            evaluate,
            mesh=mesh,
            in_specs=(specs, in_blocks, in_blocks),
            out_specs=shared,
        )
    )

    seeds, of_member = np.unique(members.seed, return_inverse=True)
    seen = [order(len(data.labels), steps * size, int(seed)) for seed in seeds]
    seen = np.stack(seen).reshape(len(seeds), steps, size).swapaxes(0, 1)
    call = max(k for k in range(1, CALL + 1) if steps % k == 0)  # compiles once
    of_members = put((members.rate, np.int32(of_member)), shared)
    losses = []
    for rows in np.split(seen, steps // call):  # [K, seeds, N]
        batch = put((data.images[rows], data.labels[rows]), by_rows)
        # Blocks: simulated devices can deadlock with many calls under way.
        state, loss = jax.block_until_ready(train(state, *of_members, *batch))
        losses.append(np.asarray(loss))
        bar.update(rows.size * len(members.seed) // len(seeds))
    losses = np.concatenate(losses)  # [steps, M]

    count, block = len(held_out.labels), n * EVALUATE
    more = -count % block
    images = np.pad(held_out.images, ((0, more), (0, 0), (0, 0), (0, 0)))
    labels = np.pad(held_out.labels, (0, more), constant_values=-1)
    blocks = [a.reshape(-1, block, *a.shape[1:]) for a in (images, labels)]
    right, broken = jax.device_get(
        jax.block_until_ready(evaluate(state, *put(blocks, in_blocks)))
    )
    diverged = ~np.isfinite(losses).all(0) | (broken > 0)
    accuracy = np.where(diverged, 0.0, right / count)
    return Outcome(accuracy, diverged, losses[-1])


# The results: one for each training, and cells of the table over their seeds.


class Cell(NamedTuple):
    """The accuracies over the seeds of one setting, in percent."""

    median: float
    low: float
    high: float
    diverged: int
    seeds: int

    @property
    def lost(self) -> bool:
        """Whether most of the trainings diverged."""
        return 2 * self.diverged > self.seeds

    def lines(self) -> tuple[str, str]:
        """Returns what to read first, and the spread."""
        failed = f"{self.diverged}/{self.seeds}"
        if self.diverged == self.seeds:
            return "diverged", failed
        if self.lost:
            return "diverged", f"{failed}, best {self.high:.1f}"
        spread = f"{self.low:.1f}–{self.high:.1f}"
        return f"{self.median:.1f}", f"{failed} diverged" if self.diverged else spread


def records(norm: str, per_device: int, outcome: Outcome) -> list[dict]:
    """Returns the results of all members, ready for JSON."""
    every = itertools.product(RATES, INITS, range(SEEDS))
    return [
        {
            "norm": norm,
            "per_device": per_device,
            "rate": rate,
            "init": init,
            "seed": seed,
            "accuracy": float(accuracy),
            "diverged": bool(diverged),
            "loss": float(loss) if np.isfinite(loss) else None,  # JSON has no NaN
        }
        for (rate, init, seed), accuracy, diverged, loss in zip(
            every, *outcome, strict=True
        )
    ]


def cells(results: list[dict]) -> dict[tuple, Cell]:
    """Returns the cell of every norm, examples per device, rate and initialization."""
    settings = {}
    for r in results:
        setting = (r["norm"], r["per_device"], r["rate"], r["init"])
        settings.setdefault(setting, []).append(r)
    return {setting: cell(of_seeds) for setting, of_seeds in settings.items()}


def cell(of_seeds: list[dict]) -> Cell:
    """Returns the cell of the results that differ in their seeds alone."""
    percent = [100 * r["accuracy"] for r in of_seeds]
    diverged = sum(r["diverged"] for r in of_seeds)
    middle = float(np.median(percent))
    return Cell(middle, min(percent), max(percent), diverged, len(percent))


def finding(table: dict[tuple, Cell]) -> str:
    """Returns which norm does best in its worst setting, and what it reaches there.

    It names every norm whose range over the seeds reaches that of the best: these
    seeds do not tell them apart.
    """
    norms = list(dict.fromkeys(norm for norm, *_ in table))
    worst = {n: min(c for s, c in table.items() if s[0] == n) for n in norms}
    best = max(worst.values())
    near = {NORMS[n]: c.median for n, c in worst.items() if c.high >= best.low}
    settings = len(table) // len(norms)
    near = sorted(near.items(), key=lambda item: -item[1])
    reached = ", ".join(f"{name} {median:.1f} %" for name, median in near)
    return f"Best in its worst of {settings} settings: {reached}"


def column(rate: str, init: str) -> str:
    """Returns the two lines above the cells of a rate and an initialization."""
    return f"rate {RATES[rate]:g}\n{init} init"


def text(cell: Cell) -> Text:
    """Returns a cell for the terminal: red if a training of it diverged."""
    first, second = cell.lines()
    color = "red" if cell.diverged else ""
    return Text.assemble((first, f"bold {color}"), "\n", (second, color))


def show(table: dict[tuple, Cell], console: Console) -> None:
    """Prints the cells, a table for each number of examples per device."""
    conditions = list(itertools.product(RATES, INITS))
    for per_device in PER_DEVICE:
        lines = Table(
            title=f"{per_device} examples per device",
            box=box.SIMPLE_HEAD,
            title_style="bold",
        )
        lines.add_column("norm", no_wrap=True)
        for condition in conditions:
            lines.add_column(column(*condition), justify="right")
        for norm in dict.fromkeys(norm for norm, *_ in table):
            row = [table[norm, per_device, *condition] for condition in conditions]
            lines.add_row(NORMS[norm], *[text(c) for c in row])
        console.print(lines)


# The picture: a map of the cells, colored by their error.


def draw(path: Path, table: dict[tuple, Cell], caption: str) -> None:
    """Saves the picture: the table, colored by error, and gray where it diverged."""
    norms = list(dict.fromkeys(norm for norm, *_ in table))
    conditions = list(itertools.product(RATES, INITS))
    figure = Figure(figsize=(12, 1.9 + 0.75 * len(norms)), layout="constrained")
    panels = figure.subplots(1, len(PER_DEVICE), sharey=True)
    # In the error, a factor is what a difference in accuracy is near its end.
    colors = LogNorm(1, 90, clip=True)
    shades = colormaps["viridis_r"].with_extremes(bad="lightgray")
    for panel, per_device in zip(panels, PER_DEVICE, strict=True):
        grid = [[table[n, per_device, *c] for c in conditions] for n in norms]
        errors = [[math.nan if c.lost else 100 - c.median for c in row] for row in grid]
        image = panel.imshow(errors, cmap=shades, norm=colors, aspect="auto")
        for i, row in enumerate(grid):
            for j, c in enumerate(row):
                dark = not c.lost and colors(errors[i][j]) > 0.45
                draw_cell(panel, j, i, c, "white" if dark else "black")
        panel.set_title(f"{per_device} examples per device", fontsize=12)
        panel.set_xticks(range(len(conditions)), [column(*c) for c in conditions])
        panel.set_yticks(range(len(norms)), [NORMS[n] for n in norms])
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panels, label="error, %", pad=0.01, aspect=30)
    bar.ax.set_yticks([1, 3, 10, 30, 90], ["1", "3", "10", "30", "90"], minor=False)
    bar.ax.minorticks_off()
    figure.suptitle(finding(table), fontsize=15, fontweight="bold")
    figure.supxlabel(caption, fontsize=10)
    figure.savefig(path, dpi=120)


def draw_cell(panel: Any, x: int, y: int, c: Cell, color: str) -> None:
    """Writes one cell: its median, and below it the spread over the seeds."""
    first, second = c.lines()
    panel.text(x, y - 0.13, first, ha="center", va="center", color=color, fontsize=12)
    panel.text(x, y + 0.22, second, ha="center", va="center", color=color, fontsize=8)


# The command.


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(
        description="Compares norms by training one small network with each.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--norms", nargs="+", choices=NORMS, default=list(NORMS), help="to compare")
    add("--data", choices=("digits", "cifar10"), default="digits", help="to train on")
    add("--data-dir", type=Path, help="folder of CIFAR-10's binary version, unpacked")
    add(
        "--steps",
        type=int,
        default=STEPS,
        help=f"batches of {max(PER_DEVICE)} examples per device; smaller ones take"
        " more, to see as many examples",
    )
    add("--quick", action="store_true", help=f"smoke run: --steps {QUICK_STEPS}")
    add("--out", type=Path, default=OUT, help="folder of the picture and the results")
    return parser


def read_options(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> argparse.Namespace:
    """Returns options that fit each other."""
    args = parser.parse_args(argv)
    if args.quick:
        args.steps = QUICK_STEPS
    if args.steps < 1:
        parser.error(f"--steps must be 1 or more. Got --steps {args.steps}.")
    if (args.data == "cifar10") != (args.data_dir is not None):
        parser.error(
            "--data cifar10 and --data-dir go together. Got --data"
            f" {args.data}, --data-dir {args.data_dir}. Pass both, or neither."
        )
    if args.out.exists() and not args.out.is_dir():
        parser.error(
            f"--out must be a folder. Got {args.out}, a file. Pass another one."
        )
    args.norms = [norm for norm in NORMS if norm in args.norms]  # each once
    return args


def make_devices(refuse: Callable) -> list:
    """Returns the accelerators if there are several, or else simulated CPU devices."""
    devices = choose_devices(None, refuse)
    return devices if len(devices) > 1 else jax.devices("cpu")


def main(argv: list[str] | None = None) -> int:
    """Trains all, and reports; returns the exit status."""
    parser = make_parser()
    args = read_options(parser, argv)
    try:
        at = args.data_dir
        data = digits("float32") if args.data == "digits" else read_cifar10(at)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))
    devices = make_devices(parser.error)
    train, held_out = (Images(*part) for part in data)
    args.out.mkdir(parents=True, exist_ok=True)

    examples = args.steps * max(PER_DEVICE) * len(devices)
    pairs = list(itertools.product(args.norms, PER_DEVICE))
    total = len(pairs) * len(Members.all().seed) * examples
    results = []
    with tqdm(total=total, unit="example", unit_scale=True) as bar:
        for norm, per_device in pairs:
            bar.set_description(f"{NORMS[norm]}, {per_device} per device")
            steps = args.steps * max(PER_DEVICE) // per_device
            outcome = compare(norm, per_device, devices, train, held_out, steps, bar)
            results += records(norm, per_device, outcome)

    report(args, devices, examples, results, len(held_out.labels))
    return 0


def report(
    args: argparse.Namespace,
    devices: list,
    examples: int,
    results: list[dict],
    held_out: int,
) -> None:
    """Prints the table, and saves the picture and the results."""
    table = cells(results)
    caption = (
        f"Accuracy on {held_out} held-out images, %: the median over {SEEDS} seeds, and"
        f" their range.\nEach training saw {examples} examples, on {len(devices)}"
        f" {devices[0].platform} devices."
    )
    settings = {
        "data": args.data,
        "held_out": held_out,
        "examples": examples,
        "devices": f"{len(devices)} {devices[0].platform}",
        "rates": RATES,
        "inits": INITS,
        "jax": jax.__version__,
    }
    written = {"settings": settings, "results": results}
    (args.out / RESULTS).write_text(json.dumps(written, indent=1) + "\n")
    draw(args.out / PICTURE, table, caption)
    show(table, Console())
    print(f"{caption}\n{finding(table)}.")
    print(f"Picture: {args.out / PICTURE}")
    print(f"Results: {args.out / RESULTS}")


if __name__ == "__main__":
    sys.exit(main())
