"""Trains the digits network in several processes at once, and goes on after a fault.

    python examples/multihost.py --processes 4

The processes are those of as many hosts, here on one machine: each has devices of its
own, gets its part of every batch, and batch norm is synced over all of them. A process
that dies, raises or hangs is noticed and named, all start again from the last
checkpoint, and the losses are those of a run that nothing befell. `--resume` goes on
where a run was left, by SIGTERM or for good.

`--fault kill:1:20` rehearses it: worker 1 is killed before step 20. The kinds are kill,
raise, hang, freeze, in which not even its heart beats, as of a machine that is lost,
term, and disk, which takes nothing more from then on. On a cluster each host runs one
worker, and the scheduler takes the place of the launcher:
`python examples/multihost.py --worker`, see docs/scaling.md.
"""

import argparse
import faulthandler
import json
import os
import queue
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import jax
import numpy as np
import orbax.checkpoint as ocp
import train_digits as digits
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from normjax import tools

OUT = Path("out/multihost")
STEPS = 100
SAVE_EVERY = 10
TELL_EVERY = 10
DRIFT_EVERY = 25  # steps between two looks for replicas that differ
FAULTS = ("kill", "raise", "hang", "freeze", "term", "disk")
LEFT = 75  # exit status of a worker that was told to leave, and did
FULL = 74  # of one that is done, but for a disk that has no room for the result
REFUSED = 2  # of one that cannot train with what it is given, however often it is tried
WELL = (0, LEFT, FULL)
HEARTBEAT = 10  # seconds without a sign of life after which JAX gives a process up
GRACE = 10  # seconds for those that fail to say why, once one of them has
LINGER = 1  # seconds that the coordinator stays: JAX aborts the others without it
LOSSES = "losses.json"


# A worker: what runs on each host.


class Refused(ValueError):
    """What is given cannot be trained with, and was not touched."""


def connect(args: argparse.Namespace) -> None:
    """Joins the other processes; on a cluster JAX finds them by itself."""
    if args.devices is not None:
        jax.config.update("jax_num_cpu_devices", args.devices)
    # What is started again does not compile again: JAX keeps what process 0 compiled,
    # which on accelerators serves all.
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(args.out / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    bounds = {
        "initialization_timeout": args.start_timeout,
        "heartbeat_timeout_seconds": HEARTBEAT,
        "shutdown_timeout_seconds": 10,
    }
    where = (args.address, args.processes, args.worker) if args.address else ()
    jax.distributed.initialize(*where, **bounds)


def bound(seconds: int) -> None:
    """Ends this process where its next word is later, and says where it hung.

    The launcher, where there is one, is first, and the coordinator last.
    """
    seconds += GRACE + (LINGER if jax.process_index() == 0 else 0)
    faulthandler.dump_traceback_later(seconds, exit=True)


def say(what: str, step: int, within: int | None = None, **facts: Any) -> None:
    """Tells the launcher how far this worker is, one line of JSON.

    `within`: seconds in which the next word follows, or this worker hangs.
    """
    if within is not None:
        bound(within)
        facts["within"] = within
    print(json.dumps({"what": what, "step": step, **facts}), flush=True)


def open_checkpoints(args: argparse.Namespace) -> ocp.CheckpointManager:
    """Saves while training goes on; a checkpoint is whole, or it is not there."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=3,
        enable_async_checkpointing=True,
        # One process that fails to save leaves the others waiting.
        async_options=ocp.AsyncOptions(timeout_secs=args.save_timeout),
    )
    return ocp.CheckpointManager((args.out / "checkpoints").resolve(), options=options)


def settings(args: argparse.Namespace) -> dict:
    """What the losses depend on; how many processes is part of their rounding."""
    keep = ("steps", "batch_size", "learning_rate", "norm", "seed", "dtype")
    return {k: getattr(args, k) for k in (*keep, "processes", "devices")}


def agree(args: argparse.Namespace) -> None:
    """Refuses checkpoints of another training, on every host, and marks its own."""

    def refuse(message):
        raise Refused(message)

    args.processes = jax.process_count()
    problem = None
    if any(p.name.isdigit() for p in (args.out / "checkpoints").glob("*")):
        try:
            digits.check_resume(args.out, settings(args), refuse)
        except Refused as error:
            problem = error
    elif jax.process_index() == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / digits.MARK).write_text(json.dumps(settings(args), indent=2) + "\n")
    multihost_utils.sync_global_devices("all have compared their settings")
    if problem is not None:
        raise problem


def restore(manager: ocp.CheckpointManager, state: dict) -> tuple[dict, list]:
    """Returns the newest state and losses that can be read, or those given.

    What cannot be read is set aside where an older checkpoint can. Where none can, it
    need not be their fault, and nothing is touched.
    """
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(state), losses=ocp.args.JsonRestore()
    )
    unreadable = {}
    for step in sorted(manager.all_steps(), reverse=True):
        why = "another process cannot"
        try:
            found = manager.restore(step, args=args)
        except Exception as error:  # whatever a file that was cut off leads to
            found, why = None, " ".join(f"{type(error).__name__}: {error}".split())
        if everywhere(found is not None):
            for other, reason in unreadable.items():
                say("unreadable", other, why=reason[:200])
                set_aside(manager, other)
            return found.state, found.losses
        unreadable[step] = why
    if unreadable:
        newest, why = next(iter(unreadable.items()))
        why = differs(manager, newest, state) or why[:400].rstrip(".")
        raise Refused(
            f"the model must be that of the checkpoints. Got {manager.directory}, of"
            f" whose checkpoints {sorted(unreadable)} none can be read: {why}. Restore"
            " the model that was trained, or pass another --out to train anew."
        )
    return state, []


def differs(manager: ocp.CheckpointManager, step: int, state: dict) -> str:
    """Says in which array first a checkpoint is of another model; empty if in none.

    Or why it cannot be asked, where what it says of itself is cut off too.
    """

    def shapes(tree):  # of named tuples the checkpoint has the names alone
        found = jax.tree_util.tree_leaves_with_path(tree)
        name = jax.tree_util.keystr
        return {name(path, simple=True, separator="/"): a.shape for path, a in found}

    saver = ocp.StandardCheckpointer()
    try:
        saved = saver.metadata(Path(manager.directory) / str(step) / "state")
    except Exception as error:  # whatever a file that was cut off leads to
        return f"{type(error).__name__}: {error}"[:400]
    there, here = shapes(saved.item_metadata.tree), shapes(state)
    for path in sorted({**there, **here}):
        if there.get(path) != here.get(path):
            was, now = (of.get(path, "absent") for of in (there, here))
            return f"{path} is {was} in checkpoint {step}, and {now} in the model"
    return ""


def everywhere(true: bool) -> bool:
    """Whether it is true on all processes."""
    return bool(multihost_utils.process_allgather(np.array(true)).all())


def set_aside(manager: ocp.CheckpointManager, step: int) -> None:
    """Moves a checkpoint out of the way of one to come, and deletes nothing."""
    folder = Path(manager.directory)
    if jax.process_index() == 0:
        to = folder.parent / f"unreadable-{step}-{time.time_ns()}"
        (folder / str(step)).rename(to)
    multihost_utils.sync_global_devices(f"checkpoint {step} set aside")
    manager.reload()


def has_room(args: argparse.Namespace, state: dict, step: int) -> bool:
    """Whether the disk has room for a checkpoint: the same on all processes."""
    needed = 2 * sum(a.nbytes for a in jax.tree.leaves(state))  # and what is about it
    free = shutil.disk_usage(args.out).free
    fits = bool(multihost_utils.broadcast_one_to_all(np.int32(free >= needed)))
    if not fits:
        say("full", step, free=free, needed=needed)
    return fits


def rehearse(fault: str | None, worker: int, step: int) -> None:
    """Does to this worker what --fault says, if it is the one and this the step."""
    if fault is None:
        return
    kind, number, when = fault.split(":")
    if (int(number), int(when)) != (worker, step):
        return
    if kind == "raise":
        raise RuntimeError("a fault that is rehearsed")
    if kind == "hang":
        time.sleep(10**6)
    if kind == "disk":  # writing fails, as it does where a disk is full or a quota used
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, hard))
        return
    signals = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "term": signal.SIGTERM}
    os.kill(os.getpid(), signals[kind])


def work(args: argparse.Namespace) -> int:
    """Trains, as one of all processes; returns the exit status."""
    connect(args)
    bound(args.start_timeout)
    agree(args)
    worker, processes = jax.process_index(), jax.process_count()
    mesh = jax.make_mesh(
        (jax.device_count(),), (digits.AXIS,), axis_types=(AxisType.Auto,)
    )
    same = NamedSharding(mesh, PartitionSpec())
    split = NamedSharding(mesh, PartitionSpec(digits.AXIS))
    data, held_out = digits.digits(args.dtype)
    mine = np.array_split(np.arange(args.batch_size), processes)[worker]

    def rows(step):  # of the batch, which is the same on all processes, its own
        now = digits.batch(data, args.batch_size, args.seed, step)
        return jax.tree.map(lambda a: a[mine], now)

    state = jax.jit(lambda: digits.initial_state(args), out_shardings=same)()
    # Compiled before the first step, whose time is then that of any other.
    one = jax.jit(digits.make_step(args), out_shardings=same)
    one = one.lower(state, tools.global_batch(rows(1), split)).compile()
    with open_checkpoints(args) as manager:
        state, losses = restore(manager, state)
        say("start", len(losses), within=args.hang_timeout)
        for step in range(len(losses) + 1, args.steps + 1):
            rehearse(args.fault, worker, step)
            own = rows(step)
            # From here on it waits for the others: who has not said so is behind.
            say("step", step, within=args.hang_timeout)
            manager.check_for_errors()  # of a save that is under way
            batch = tools.global_batch(own, split)
            state, loss = jax.block_until_ready(one(state, batch))
            losses.append(float(loss))
            if step % DRIFT_EVERY == 0:
                drift = [str(d) for d in tools.find_drift(state)]
                if drift:
                    raise RuntimeError(f"replicas differ: {drift[0]}")
            # All processes agree on the step after which a SIGTERM is obeyed.
            leave = multihost_utils.reached_preemption_sync_point(step)
            last = step == args.steps or leave
            due = last or step % args.save_every == 0
            if due:  # it may have to wait for the one before
                say("saving", step, within=args.save_timeout + GRACE)
            if due and has_room(args, state, step):
                save = ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    losses=ocp.args.JsonSave(losses),
                )
                manager.save(step, args=save, force=True)
                if not last:  # which is waited for, below
                    say("saved", step, within=args.hang_timeout)
            elif last:
                manager.wait_until_finished()
                return FULL
            if leave:
                manager.wait_until_finished()
                say("left", step)
                return LEFT
    say("saved", args.steps, within=args.hang_timeout)
    if worker == 0:
        (args.out / LOSSES).write_text(json.dumps(losses))
        evaluate = digits.make_evaluate(args, held_out)
        on_host = jax.tree.map(lambda a: np.asarray(a.addressable_data(0)), state)
        say("accuracy", args.steps, value=evaluate(on_host))
    say("done", args.steps)
    return 0


# What a process raises that waited in vain for another.
FOR_WANT = re.compile("Timed out|DEADLINE|UNAVAILABLE|Gloo|Connection|task died")
# TensorStore's settings, which its errors end with, and which are longer than they are.
SETTINGS = re.compile(r" \[[\w ]+='.*'\]")


def root(error: BaseException | None) -> tuple[str, bool]:
    """Returns what all else came of, and whether even that is want of another process.

    What was raised on the way out, by a save that was under way, is in the chain too.
    """
    reasons = []
    while error is not None:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        why = SETTINGS.sub("", why)
        if len(why) > 400 and not isinstance(error, Refused):
            why = f"{why[:200]} ... {why[-200:]}"
        reasons.append(why)
        error = error.__cause__ or error.__context__
    own = [why for why in reasons if not FOR_WANT.search(why)]
    return (own or reasons)[-1], not own


def work_and_leave(args: argparse.Namespace) -> None:
    """Works, and ends the process at once where that fails.

    Python's own way out would wait for the other processes, which wait for this one.
    """
    try:
        status = work(args)
    except BaseException as error:
        try:
            why, for_want = root(error)
            say("failed", -1, at=time.time(), why=why, for_want=for_want)
            traceback.print_exc()
            sys.stderr.flush()
            if args.worker < 1:  # the coordinator, or on a cluster any
                time.sleep(LINGER)
        finally:
            os._exit(REFUSED if isinstance(error, Refused) else 1)
    if status:
        os._exit(status)


# The launcher: starts the workers, watches them, and starts them again.


class End(NamedTuple):
    """How an attempt ended.

    Attributes:
      kind: "done", "left", "full", "refused", or "fault".
      why: in words, with the number of the worker.
      step: how far the workers were.
    """

    kind: str
    why: str
    step: int


class Fate(NamedTuple):
    """What became of a worker; the least of several is the first cause.

    Attributes:
      for_want: whether it failed for want of another.
      at: when, in seconds.
      why: in words, with the number of the worker.
    """

    for_want: bool
    at: float
    why: str


def free_address() -> str:
    """Returns an address at which the workers can meet."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return f"localhost:{s.getsockname()[1]}"


def start(args: argparse.Namespace, fault: str | None) -> list[subprocess.Popen]:
    """Starts all workers; what they say comes by pipe, their errors go to files."""
    command = [sys.executable, __file__, "--address", free_address(), *sys.argv[1:]]
    if fault is None:
        command.append("--no-fault")
    workers = []
    for number in range(args.processes):
        with (args.out / f"worker-{number}.log").open("a") as log:
            workers.append(
                subprocess.Popen(
                    [*command, "--worker", str(number)],
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            )
    return workers


def watch(args: argparse.Namespace, workers: list[subprocess.Popen]) -> End:
    """Listens to the workers until they are done, or one of them is not well."""
    said: queue.Queue = queue.Queue()

    def listen(number: int, pipe: TextIO) -> None:
        for line in pipe:
            if line.startswith("{"):
                said.put((number, json.loads(line)))

    listeners = [
        threading.Thread(target=listen, args=(number, worker.stdout), daemon=True)
        for number, worker in enumerate(workers)
    ]
    for listener in listeners:
        listener.start()
    nothing = {"what": "nothing", "step": -1}
    last = [nothing] * len(workers)  # of what each has said of how far it is
    fates: dict[int, Fate] = {}  # of those that are not well
    allowed = args.start_timeout  # seconds, since one of them was heard
    due = time.monotonic() + allowed
    while True:
        try:
            number, line = said.get(timeout=0.1)
        except queue.Empty:
            number, line = -1, {}
        if line:
            if line["what"] == "failed":
                why = f"worker {number} failed: {line['why']}"
                fates[number] = Fate(line["for_want"], line["at"], why)
            elif "within" in line:
                last[number] = line
                allowed = line["within"]
                due = time.monotonic() + allowed
            tell(number, line)
            continue
        step = max(line["step"] for line in last)
        ended = {i: w.poll() for i, w in enumerate(workers) if w.poll() is not None}
        if len(ended) == len(workers):
            for status, kind in {0: "done", LEFT: "left", FULL: "full"}.items():
                if set(ended.values()) == {status}:
                    return End(kind, "", step)
        bad = {i: status for i, status in ended.items() if status not in WELL}
        for number, status in bad.items():
            listeners[number].join(1)
            if said.empty() and number not in fates:
                fates[number] = fate(number, status)
        if bad and said.empty():  # what they said last has been heard
            alive = [i for i in range(len(workers)) if i not in ended]
            end = first_cause(fates, bad, alive, step)
            if end is not None:
                return end
        elif time.monotonic() > due:
            return End("fault", f"{hang(last)}, {allowed} s", step)


def first_cause(
    fates: dict[int, Fate], bad: dict[int, int], alive: list[int], step: int
) -> End | None:
    """Returns what all came of, or None while one may still say that it is the cause.

    One that failed for want of another need not be the first: it is waited for. But
    JAX aborts a process when a peer shows no sign of life, which will say nothing.
    """
    first = min(fates.values())
    waited = time.time() - min(f.at for f in fates.values())
    if set(bad.values()) == {-signal.SIGABRT} and alive:
        who = ", ".join(map(str, alive))
        why = f"worker {who} shows no sign of life, and JAX has ended those that wait"
        return End("fault", why, step) if waited > 2 * LINGER else None
    if waited > GRACE or not first.for_want or not alive:
        kind = "refused" if REFUSED in bad.values() else "fault"
        return End(kind, first.why, step)
    return None


def hang(last: list[dict]) -> str:
    """Says which workers are behind the others, and where."""
    behind = min(line["step"] for line in last)
    who = [i for i, line in enumerate(last) if line["step"] == behind]
    places = {
        "nothing": "before the first step",
        "saving": f"while it saves step {behind}",
        "saved": f"after it has saved step {behind}",
    }
    where = places.get(last[who[0]]["what"], f"before step {behind + 1}")
    return f"worker {', '.join(map(str, who))} hangs {where}"


def fate(number: int, status: int) -> Fate:
    """Says what became of a worker that ended without a word."""
    if status >= 0:
        why = f"worker {number} failed with status {status}, see its log"
        return Fate(False, time.time(), why)
    name = signal.Signals(-status).name
    # JAX's runtime aborts a process whose peer is gone.
    why = f"worker {number} was killed by {name}"
    return Fate(name == "SIGABRT", time.time(), why)


def tell(number: int, line: dict) -> None:
    """Prints what a person wants to know of what workers say."""
    if line["what"] == "unreadable" and number == 0:
        step, why = line["step"], line["why"]
        print(f"checkpoint {step} cannot be read, and is set aside: {why}", flush=True)
    if line["what"] == "start" and number == 0:
        print(f"training from step {line['step'] + 1}", flush=True)
    if line["what"] == "step" and number == 0 and line["step"] % TELL_EVERY == 0:
        print(f"step {line['step']}", flush=True)
    if line["what"] == "full" and number == 0:
        free, needed = line["free"] / 2**20, line["needed"] / 2**20
        print(
            f"step {line['step']}: no checkpoint, since it needs {needed:.1f} MiB and"
            f" {free:.1f} MiB are free",
            flush=True,
        )
    if line["what"] == "accuracy":
        print(f"Accuracy: {line['value']:.2%} of the held-out digits", flush=True)


def kill(workers: list[subprocess.Popen]) -> None:
    """Ends all workers for good: JAX takes SIGTERM as a mere notice."""
    for worker in workers:
        if worker.poll() is None:
            worker.send_signal(signal.SIGKILL)
        worker.wait(10)


def launch(args: argparse.Namespace) -> int:
    """Runs the workers until they are done; returns the exit status."""
    workers: list[subprocess.Popen] = []
    asked = threading.Event()  # to leave

    def pass_on(signum, frame):
        asked.set()
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        return attempts(args, workers, asked)
    finally:
        signal.signal(signal.SIGTERM, before)


def attempts(
    args: argparse.Namespace, workers: list[subprocess.Popen], asked: threading.Event
) -> int:
    """Starts the workers, and starts them again; returns the exit status."""
    for attempt in range(args.restarts + 1):
        began = time.monotonic()
        try:
            workers += start(args, args.fault if attempt == 0 else None)
            end = End("fault", "", -1)
            if not asked.is_set():
                end = watch(args, workers)
        finally:
            kill(workers)
            workers.clear()
        if end.kind == "done":
            print(f"Losses: {args.out / LOSSES}")
            return 0
        if end.kind == "left":
            print(f"Left after step {end.step}, as SIGTERM asked. Go on with --resume.")
            return LEFT
        if end.kind == "full":
            print(
                f"Done with step {end.step}, which the disk of {args.out} has no room"
                " for. Free some, and go on from the last checkpoint with --resume."
            )
            return 1
        if end.kind == "refused":
            print(end.why)
            return REFUSED
        if asked.is_set():  # before they could obey, or as one of them failed
            print(
                "Left, as SIGTERM asked, without another checkpoint. Go on with"
                " --resume if there is one."
            )
            return LEFT
        took = time.monotonic() - began
        print(f"{end.why}; noticed {took:.0f} s after the start", flush=True)
    print(
        f"Gave up after {args.restarts} restarts; see {args.out}/worker-*.log."
        " The last checkpoint is whole: go on with --resume."
    )
    return 1


# Options.


def make_parser() -> argparse.ArgumentParser:
    """Returns the parser: options of the demo, and those of several processes."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--processes", type=int, default=2, help="how many")
    add("--devices", type=int, default=1, help="CPU devices of each; 0: what it has")
    add("--steps", type=int, default=STEPS, help="batches to train on")
    add("--batch-size", type=int, default=digits.BATCH_SIZE, help="images, of all")
    add("--learning-rate", type=float, default=digits.LEARNING_RATE)
    add(
        "--norm", choices=digits.NORMS, default="batch", help="batch is synced over all"
    )
    add("--seed", type=int, default=0, help="of the parameters and the batches")
    add("--dtype", choices=("float32",), default="float32", help=argparse.SUPPRESS)
    add("--out", type=Path, default=OUT, help="folder; an earlier run's is replaced")
    add("--save-every", type=int, default=SAVE_EVERY, help="steps")
    add("--resume", action="store_true", help="go on from the last checkpoint in it")
    add("--restarts", type=int, default=3, help="after faults")
    add("--hang-timeout", type=int, default=60, help="seconds a step may take")
    add("--start-timeout", type=int, default=120, help="seconds until the first step")
    add("--save-timeout", type=int, default=60, help="seconds a checkpoint may take")
    add("--fault", help="kind:worker:step, to rehearse one")
    add("--no-fault", action="store_true", help=argparse.SUPPRESS)
    add("--address", help=argparse.SUPPRESS)
    add("--worker", nargs="?", type=int, const=-1, help="be a worker; see docs")
    return parser


def check(args: argparse.Namespace, refuse: Callable) -> None:
    """Refuses what cannot be trained, before anything is written."""
    if args.save_every < 1:
        refuse(f"--save-every must be 1 or more. Got --save-every {args.save_every}.")
    each = args.devices or 1
    devices = args.processes * each
    if args.processes < 1:
        refuse(f"--processes must be 1 or more. Got --processes {args.processes}.")
    if args.batch_size % devices:
        below = max(args.batch_size // devices * devices, devices)
        refuse(
            "--batch-size must be a multiple of the number of devices. Got --batch-size"
            f" {args.batch_size}, {args.processes} processes of {each} devices."
            f" Nearest: {below} or {below + devices}."
        )
    parts = (args.fault or "").split(":")
    if args.fault and not (
        len(parts) == 3
        and parts[0] in FAULTS
        and parts[1].isdigit()
        and parts[2].isdigit()
    ):
        refuse(
            f"--fault must be kind:worker:step, the kind one of {', '.join(FAULTS)}."
            f" Got --fault {args.fault}. Pass --fault kill:1:20, say."
        )


def main() -> int:
    """Launches workers, or is one; returns the exit status."""
    parser = make_parser()
    args = parser.parse_args()
    args.parallel = "jit"
    args.devices = args.devices or None
    if args.no_fault:
        args.fault = None
    if args.worker is not None:
        work_and_leave(args)
        return 0
    check(args, parser.error)
    begin = digits.check_resume if args.resume else digits.start_afresh
    begin(args.out, settings(args), parser.error)
    return launch(args)


if __name__ == "__main__":
    sys.exit(main())
