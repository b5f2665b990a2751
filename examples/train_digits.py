"""Trains a small residual network on scikit-learn's handwritten digits.

    python examples/train_digits.py

The network is Flax, its norms are normjax's, and the statistics of its batch norm are
synced over all devices: the accelerators, or else 8 simulated CPU devices. It ends with
the accuracy on held-out digits, a checkpoint, and one picture. Ctrl-C leaves a
checkpoint, too, and

    python examples/train_digits.py --resume

goes on from the last one: on CPU devices, with the losses of an uninterrupted run bit
for bit. `--norm group` trains with another norm, `--parallel pmap` in another way over
the devices, and `--help` lists the rest.
"""

import argparse
import contextlib
import functools
import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tqdm import tqdm

from normjax import linen

# What options can change.
OUT = Path("out/digits")
NORM = "batch"
STEPS = 300
BATCH_SIZE = 96  # a multiple of 1, 2, 3, 4, 6 and 8 devices
LEARNING_RATE = 0.1
SEED = 0
SIMULATED_DEVICES = 8  # where there is no accelerator

# What they cannot.
STAGES = ((16, 1), (32, 2), (64, 2))  # width and stride
BLOCKS = 2  # in a stage
MOMENTUM = 0.9  # of the optimizer, and of the running statistics
WEIGHT_DECAY = 5e-4
WARMUP = 0.1  # part of the steps
SHIFT = 1  # a training image moves by up to this many pixels
HELD_OUT = 0.2  # part of the images
EVALUATE_EVERY = 25  # steps
SAVE_EVERY = 100  # steps

NORMS = ("batch", "local-batch", "layer", "rms", "group", "instance", "none")
AXIS = "devices"
MARK = "train_digits.json"  # a run's settings; the folder that has it is this demo's
PICTURE = "train_digits.png"
BEFORE = ", before training"


# The network: a residual network whose every convolution is followed by a norm.


def normalized(x: jax.Array, norm: str, train: bool, axis_name: str | None, dtype: Any):
    """Applies the norm of that name as a part of the module that is calling."""
    image = {"reduction_axes": (1, 2, 3), "feature_axes": -1}  # one image, all of it
    match norm:
        case "batch" | "local-batch":  # batch and space
            layer = linen.BatchNorm(
                use_running_average=not train,
                momentum=MOMENTUM,
                axis_name=axis_name if norm == "batch" else None,
                param_dtype=dtype,
                force_float32_reductions=False,  # store what param_dtype says
            )
        case "layer":
            layer = linen.LayerNorm(param_dtype=dtype, **image)
        case "rms":
            layer = linen.RMSNorm(param_dtype=dtype, **image)
        case "group":  # one image, 8 groups of its features
            layer = linen.GroupNorm(8, param_dtype=dtype)
        case "instance":  # one image, one feature
            layer = linen.InstanceNorm(param_dtype=dtype)
        case "none":
            return x
    return layer(x)


class ConvNorm(nn.Module):
    """A convolution and the norm of its output."""

    width: int
    size: int
    stride: int
    norm: str
    axis_name: str | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns [N, H / stride, W / stride, width]."""
        x = nn.Conv(
            self.width,
            (self.size, self.size),
            self.stride,
            use_bias=self.norm == "none",  # a norm has a bias of its own
            kernel_init=nn.initializers.he_normal(),
            param_dtype=self.dtype,
        )(x)
        return normalized(x, self.norm, train, self.axis_name, self.dtype)


class ResNet(nn.Module):
    """A residual network, with a smooth activation.

    A ReLU's derivative jumps, and one unit that rounding moves across zero would part
    the three parallel ways. SiLU's does not: they stay together to rounding.
    """

    norm: str
    axis_name: str | None  # device axis to sync batch norm over, if it has a name
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Returns logits [N, 10] for images [N, 8, 8, 1]."""

        def layer(x, width, size=3, stride=1):
            layer = ConvNorm(width, size, stride, self.norm, self.axis_name, self.dtype)
            return layer(x, train)

        x = nn.silu(layer(x, STAGES[0][0]))  # [N, 8, 8, 16]
        for width, first_stride in STAGES:
            for block in range(BLOCKS):
                stride = 1 if block else first_stride
                y = nn.silu(layer(x, width, stride=stride))
                y = layer(y, width)
                if x.shape != y.shape:
                    x = layer(x, width, size=1, stride=stride)
                x = nn.silu(x + y)  # [N, 8, 8, 16], [N, 4, 4, 32], [N, 2, 2, 64]
        x = x.mean((1, 2))  # [N, 64]
        return nn.Dense(10, param_dtype=self.dtype)(x)  # [N, 10]


# The data: 1797 real images of 8x8 pixels.


class Digits(NamedTuple):
    """Images [N, 8, 8, 1] in [0, 1] and their labels [N]."""

    images: np.ndarray
    labels: np.ndarray


@functools.cache
def digits(dtype: str) -> tuple[Digits, Digits]:
    """Returns the images to train on and those held out, the same ones always."""
    # Imported here, since what only launches processes need not wait for them.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.images[..., None] / 16).astype(dtype)
    labels = data.target.astype(np.int32)
    train, held_out = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    return Digits(images[train], labels[train]), Digits(
        images[held_out], labels[held_out]
    )


def batch(data: Digits, size: int, seed: int, step: int) -> Digits:
    """Returns the batch of a step: of the step and the seed alone, for exact resume."""
    rng = np.random.default_rng((seed, step))
    chosen = rng.choice(len(data.labels), size, replace=False)
    edge = (SHIFT, SHIFT)
    padded = np.pad(data.images[chosen], ((0, 0), edge, edge, (0, 0)))
    rows, columns = rng.integers(2 * SHIFT + 1, size=(2, size, 1)) + np.arange(8)
    n = np.arange(size)[:, None, None]
    shifted = padded[n, rows[:, :, None], columns[:, None, :]]  # [N, 8, 8, 1]
    return Digits(shifted, data.labels[chosen])


# Training: one step, three ways over the devices.


class Trainer(NamedTuple):
    """How to train: a step, and how what it takes comes onto the devices and back."""

    step: Callable  # (state, batch) -> (state, loss)
    put_state: Callable
    put_batch: Callable
    get_state: Callable


def make_model(args: argparse.Namespace) -> ResNet:
    """Returns the network; jit over sharded arrays has no name for its devices."""
    axis_name = None if args.parallel == "jit" else AXIS
    return ResNet(args.norm, axis_name, jnp.dtype(args.dtype))


def make_optimizer(args: argparse.Namespace) -> optax.GradientTransformation:
    """Returns SGD with momentum and a cosine schedule."""
    warmup = math.ceil(WARMUP * args.steps)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.learning_rate, warmup, args.steps + 1
    )
    return optax.chain(
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.sgd(schedule, MOMENTUM, nesterov=True),
    )


def initial_variables(args: argparse.Namespace, norm: str) -> dict:
    """Returns the variables of a network with that norm before any training."""
    key = jax.random.key(args.seed, impl="rbg")  # compiles in less time
    images = jnp.zeros((2, 8, 8, 1), args.dtype)
    return make_model(args).clone(norm=norm).init(key, images, train=True)


def initial_state(args: argparse.Namespace) -> dict:
    """Returns parameters, running statistics and the optimizer's state, on the host."""
    stats = initial_variables(args, args.norm)
    params = stats.pop("params")
    optimizer = make_optimizer(args).init(params)
    return jax.device_get({"params": params, "stats": stats, "optimizer": optimizer})


def make_step(args: argparse.Namespace) -> Callable:
    """Returns the step of one device, or of all of them under jit."""
    model, optimizer, parallel = make_model(args), make_optimizer(args), args.parallel

    def loss_of(params, stats, data):
        variables = {"params": params, **stats}
        logits, stats = model.apply(
            variables, data.images, train=True, mutable=["batch_stats"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, data.labels)
        loss = loss.mean()
        if parallel == "shard_map":  # sums the gradients itself: average before
            loss = lax.pmean(loss, AXIS)
        return loss, stats

    def step(state, data):
        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state["params"], state["stats"], data
        )
        if parallel == "pmap":  # leaves each device its own gradients: average after
            loss, grads = lax.pmean((loss, grads), AXIS)
        if args.norm == "local-batch":  # the only statistics that differ by device
            stats = lax.pmean(stats, AXIS)
        updates, inner = optimizer.update(grads, state["optimizer"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "stats": stats, "optimizer": inner}, loss

    return step


def make_trainer(args: argparse.Namespace, devices: list) -> Trainer:
    """Returns the step over all devices, in the way that the options name."""
    step, n = make_step(args), len(devices)
    mesh = jax.make_mesh((n,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)
    shared, divided = PartitionSpec(), PartitionSpec(AXIS)
    on_all, by_rows = NamedSharding(mesh, shared), NamedSharding(mesh, divided)

    put_state = functools.partial(jax.device_put, device=on_all)
    put_batch = functools.partial(jax.device_put, device=by_rows)
    if args.parallel == "jit":
        over_all = jax.jit(step, out_shardings=on_all)
        return Trainer(over_all, put_state, put_batch, jax.device_get)
    if args.parallel == "shard_map":
        over_all = jax.shard_map(
            step, mesh=mesh, in_specs=(shared, divided), out_specs=shared
        )
        return Trainer(jax.jit(over_all), put_state, put_batch, jax.device_get)

    def copies(a):  # [...] -> [devices, ...]
        return jax.device_put(np.broadcast_to(a, (n, *np.shape(a))), by_rows)

    def rows(a):  # [N, ...] -> [devices, N / devices, ...]
        return jax.device_put(a.reshape(n, -1, *a.shape[1:]), by_rows)

    return Trainer(
        jax.pmap(step, AXIS, out_axes=(0, None), devices=devices),
        put_state=lambda state: jax.tree.map(copies, state),
        put_batch=lambda data: jax.tree.map(rows, data),
        get_state=lambda state: jax.tree.map(lambda a: np.asarray(a)[0], state),
    )


def make_evaluate(args: argparse.Namespace, held_out: Digits) -> Callable:
    """Returns a function from a state on the host to the accuracy held out."""
    model = make_model(args).clone(axis_name=None)  # one device evaluates

    @jax.jit
    def correct(params, stats):
        logits = model.apply({"params": params, **stats}, held_out.images, train=False)
        return (logits.argmax(-1) == held_out.labels).mean()

    return lambda state: float(correct(state["params"], state["stats"]))


@contextlib.contextmanager
def ctrl_c_noted() -> Iterator[threading.Event]:
    """Notes the first Ctrl-C instead of raising it; a second one raises as ever."""
    noted = threading.Event()

    def note(*_):
        noted.set()
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    args: argparse.Namespace,
    devices: list,
    state: dict,
    history: dict,
    keep: Callable = lambda step, state, history: None,
) -> dict:
    """Trains from the last step in the history on, until the end or Ctrl-C.

    Args:
      args: the options.
      devices: to train on.
      state: on the host, as `initial_state` or a checkpoint gives it.
      history: losses so far, one for each step, and accuracies with their steps, which
        is added to.
      keep: called as ``keep(step, state, history)`` now and then, and at the end.

    Returns:
      The state after the last step, on the host.
    """
    trainer = make_trainer(args, devices)
    data, held_out = digits(args.dtype)
    evaluate = make_evaluate(args, held_out)
    steps = range(len(history["loss"]) + 1, args.steps + 1)
    bar = tqdm(steps, initial=steps.start - 1, total=args.steps, unit="step")
    on_devices = trainer.put_state(state)
    with ctrl_c_noted() as stop, bar:
        for step in bar:
            now = trainer.put_batch(batch(data, args.batch_size, args.seed, step))
            # Blocks: simulated devices can deadlock with many steps under way.
            on_devices, loss = jax.block_until_ready(trainer.step(on_devices, now))
            history["loss"].append(float(loss))
            bar.set_postfix(loss=f"{history['loss'][-1]:.4f}", refresh=False)
            stopping = stop.is_set()  # asked once, since it can change at any time
            evaluating = step % EVALUATE_EVERY == 0 or step == args.steps
            saving = step % SAVE_EVERY == 0 or step == args.steps or stopping
            if evaluating or saving:
                state = trainer.get_state(on_devices)
            if evaluating:
                history["accuracy"].append([step, evaluate(state)])
            if saving:
                keep(step, state, history)
            if stopping:
                break
    return state


# Checkpoints: the state by orbax, and beside it the history in JSON.


def settings_of(args: argparse.Namespace, devices: list) -> dict:
    """Returns all that the losses depend on."""
    same = {k: v for k, v in vars(args).items() if k not in ("out", "resume")}
    return {**same, "devices": f"{len(devices)} {devices[0].platform}"}


def open_checkpoints(out: Path) -> ocp.CheckpointManager:
    """Returns what keeps the last two checkpoints of the run in a folder."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False
    )
    return ocp.CheckpointManager((out / "checkpoints").resolve(), options=options)


def save(manager: ocp.CheckpointManager, step: int, state: dict, history: dict) -> None:
    """Saves what training goes on from after that step."""
    args = ocp.args.Composite(
        state=ocp.args.StandardSave(state), history=ocp.args.JsonSave(history)
    )
    manager.save(step, args=args)


def restore(manager: ocp.CheckpointManager, like: dict) -> tuple[dict, dict]:
    """Returns the last state and history, the state shaped like the one given."""
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(like), history=ocp.args.JsonRestore()
    )
    found = manager.restore(manager.latest_step(), args=args)
    return found.state, found.history


def start_afresh(out: Path, settings: dict, refuse: Callable) -> None:
    """Clears the folder of an earlier run of this demo; touches no one else's."""
    if out.exists() and not out.is_dir():
        refuse(f"--out must be a folder. Got the file {out}. Pass another one.")
    if out.exists() and any(out.iterdir()) and not (out / MARK).exists():
        refuse(
            f"--out must be new, empty, or of an earlier run of this demo. Got {out},"
            f" which has files but no {MARK}. Pass another folder."
        )
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    (out / PICTURE).unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(json.dumps(settings, indent=2) + "\n")


def check_resume(out: Path, settings: dict, refuse: Callable) -> None:
    """Refuses to resume where nothing is, or where it was trained in another way."""
    steps = [p for p in (out / "checkpoints").glob("*") if p.name.isdigit()]
    if not (out / MARK).exists() or not steps:
        refuse(
            f"--resume needs a checkpoint. Got {out}, where there is none."
            " Leave out --resume, or pass the --out of the run to resume."
        )
    saved = json.loads((out / MARK).read_text())
    names = [k for k in settings if saved.get(k) != settings[k]]
    if names:
        now = ", ".join(f"--{k.replace('_', '-')} {settings[k]}" for k in names)
        was = ", ".join(f"--{k.replace('_', '-')} {saved.get(k)}" for k in names)
        refuse(
            f"--resume needs the settings of the checkpoint. Got {now}; the checkpoint"
            f" in {out} has {was}. Pass those, or another --out to train anew."
        )


# The picture.


def spread(model: ResNet, variables: dict, images: np.ndarray, train: bool) -> list:
    """Returns the std of each feature [C] after each layer, over batch and space."""

    @jax.jit
    def stds(variables):
        _, seen = model.apply(
            variables,
            images,
            train=train,
            mutable=["batch_stats", "intermediates"],
            capture_intermediates=lambda module, _: isinstance(module, ConvNorm),
        )
        layers = seen["intermediates"]
        return [
            layers[f"ConvNorm_{i}"]["__call__"][0].std((0, 1, 2))
            for i in range(sum(name.startswith("ConvNorm") for name in layers))
        ]

    return jax.device_get(stds(variables))


def spreads(args: argparse.Namespace, state: dict) -> dict[str, list]:
    """Returns the spread by layer, on the held-out images, of what is to be compared.

    Before training a norm takes its statistics from these images, since running
    statistics have seen nothing; the trained network uses its running statistics.
    """
    images = digits(args.dtype)[1].images
    model = make_model(args).clone(axis_name=None)
    named = "no norm" if args.norm == "none" else f"{args.norm} norm"
    found = {}
    for name, norm in (("no norm", "none"), (named, args.norm)):
        fresh = initial_variables(args, norm)
        found[name + BEFORE] = spread(model.clone(norm=norm), fresh, images, True)
    trained = {"params": state["params"], **state["stats"]}
    found[f"{named}, trained"] = spread(model, trained, images, False)
    return found


def draw(path: Path, history: dict, by_layer: dict[str, list]) -> None:
    """Saves the picture of a run: its training, and its spread by layer."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplot_mosaic([["loss", "spread"], ["accuracy", "spread"]])
    draw_training(panels["loss"], panels["accuracy"], history)
    draw_spread(panels["spread"], by_layer)
    figure.savefig(path, dpi=120)


def draw_training(top: Any, bottom: Any, history: dict) -> None:
    """Draws the loss over the accuracy held out, over steps."""
    steps, accuracy = np.array(history["accuracy"]).T
    top.plot(np.arange(1, len(history["loss"]) + 1), history["loss"], lw=1)
    top.set(yscale="log", ylabel="training loss")
    top.set_title(
        f"{accuracy[-1]:.1%} of the held-out digits right after {steps[-1]:.0f} steps"
    )
    top.tick_params(labelbottom=False)
    bottom.plot(steps, 100 * accuracy, "o-", ms=4, color="tab:green")
    bottom.set(xlabel="training step", ylabel="held-out accuracy, %")
    bottom.sharex(top)
    top.yaxis.set_major_formatter("{x:g}")
    for panel in (top, bottom):
        panel.grid(alpha=0.3)


def draw_spread(panel: Any, by_layer: dict[str, list]) -> None:
    """Draws the median feature's std, layer by layer, in a band of all features."""
    colors = ["tab:orange", "tab:gray", "tab:blue"][-len(by_layer) :]
    at_the_end = []
    for (name, stds), color in zip(by_layer.items(), colors, strict=True):
        layers = np.arange(1, len(stds) + 1)
        low, middle, high = np.array([np.quantile(s, (0, 0.5, 1)) for s in stds]).T
        panel.plot(layers, middle, "o-", ms=4, color=color, label=name)
        panel.fill_between(layers, low, high, color=color, alpha=0.2, lw=0)
        if name.endswith(BEFORE):
            at_the_end.append(f"{middle[-1]:.2f} with {name.removesuffix(BEFORE)}")
    panel.set_title(
        f"Before training, the last layer's spread is\n{', '.join(at_the_end)}"
    )
    panel.set(yscale="log", xlabel="layer", xticks=layers)
    panel.set_ylabel("spread: std of the features, their median and range")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.legend()
    panel.grid(alpha=0.3)


# The command.


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser of the options."""
    parser = argparse.ArgumentParser(
        description="Trains a small residual network on handwritten digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--norm", choices=NORMS, default=NORM, help="batch is synced over devices")
    add(
        "--parallel",
        choices=("jit", "shard_map", "pmap"),
        help="how to use the devices; None: jit, and shard_map for local-batch",
    )
    add("--devices", type=int, help="how many; None: all accelerators, or 8 CPU ones")
    add("--steps", type=int, default=STEPS, help="batches to train on")
    add("--batch-size", type=int, default=BATCH_SIZE, help="images, of all devices")
    add("--learning-rate", type=float, default=LEARNING_RATE, help="at its highest")
    add("--seed", type=int, default=SEED, help="of the parameters and the batches")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of all")
    add("--out", type=Path, default=OUT, help="folder; an earlier run's is replaced")
    add("--resume", action="store_true", help="go on from the last checkpoint in it")
    return parser


def choose_devices(count: int | None, refuse: Callable) -> list:
    """Returns that many accelerators, or else simulated CPU devices."""
    # Once a backend is in use the number of CPU devices stays as it is.
    with contextlib.suppress(RuntimeError):
        jax.config.update("jax_num_cpu_devices", count or SIMULATED_DEVICES)
    devices = jax.devices()
    if count is not None and count > len(devices):
        refuse(
            "--devices must not be more than there are. Got"
            f" --devices {count}, {len(devices)} {devices[0].platform} devices."
            f" Pass {len(devices)} or fewer."
        )
    return devices[:count]


def check_options(args: argparse.Namespace, refuse: Callable) -> None:
    """Refuses numbers that no training has."""
    for name in ("devices", "steps", "batch_size", "learning_rate", "seed"):
        value = getattr(args, name)
        least = 0 if name in ("seed", "learning_rate") else 1
        if value is not None and not least <= value < math.inf:
            option = f"--{name.replace('_', '-')}"
            refuse(f"{option} must be {least} or more. Got {option} {value}.")
    if args.norm == "local-batch" and args.parallel == "jit":
        refuse(
            "--norm local-batch needs devices that know of themselves. Got"
            " --parallel jit, under which statistics are always synced."
            " Pass --parallel shard_map or pmap."
        )


def check_batch_size(args: argparse.Namespace, devices: list, refuse: Callable) -> None:
    """Refuses a batch that devices cannot share evenly."""
    size, n, most = args.batch_size, len(devices), len(digits(args.dtype)[0].labels)
    if size % n or size > most:
        below = max(min(size, most) // n * n, n)
        above = below + n
        refuse(
            "--batch-size must be a multiple of the number of devices, and"
            f" at most {most}, the images to train on. Got --batch-size {size},"
            f" {n} {devices[0].platform} devices. Nearest: {below}"
            + (f" or {above}." if above <= most else ".")
        )


def read_options(
    parser: argparse.ArgumentParser, argv: list[str] | None
) -> tuple[argparse.Namespace, list]:
    """Returns options that fit each other, and the devices to train on."""
    args = parser.parse_args(argv)
    if args.parallel is None:
        args.parallel = "shard_map" if args.norm == "local-batch" else "jit"
    check_options(args, parser.error)
    devices = choose_devices(args.devices, parser.error)
    check_batch_size(args, devices, parser.error)
    return args, devices


def main(argv: list[str] | None = None) -> int:
    """Trains, saves and reports; returns the exit status."""
    parser = make_parser()
    args, devices = read_options(parser, argv)
    settings = settings_of(args, devices)
    if args.resume:
        check_resume(args.out, settings, parser.error)
    else:
        start_afresh(args.out, settings, parser.error)
    with jax.enable_x64(args.dtype == "float64"):
        return run(args, devices)


def run(args: argparse.Namespace, devices: list) -> int:
    """Trains from the start or the last checkpoint, and reports."""
    state, history = initial_state(args), {"loss": [], "accuracy": []}
    with open_checkpoints(args.out) as manager:
        if args.resume:
            state, history = restore(manager, state)
        keep = functools.partial(save, manager)
        state = train(args, devices, state, history, keep)
    done = len(history["loss"])
    place = args.out / "checkpoints" / str(done)
    if done < args.steps:
        print(f"Stopped after step {done} of {args.steps}; checkpoint: {place}")
        print("To go on, add --resume to the same command.")
        return 130  # as after Ctrl-C
    draw(args.out / PICTURE, history, spreads(args, state))
    print(
        f"Accuracy: {history['accuracy'][-1][1]:.2%} of the held-out digits, after"
        f" {done} steps on {len(devices)} {devices[0].platform} devices"
    )
    print(f"Checkpoint: {place}")
    print(f"Picture: {args.out / PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
