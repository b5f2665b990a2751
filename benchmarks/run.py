"""How long the norms take, beside those of other libraries, and what memory they need.

    python benchmarks/run.py
    python benchmarks/run.py --quick --norm layer
    python benchmarks/run.py --dtype bfloat16 --json speed.json
    python benchmarks/run.py --allocator default
    python benchmarks/run.py --compare speed.json

Single norms of real models' shapes, then whole training steps (steps.py). All libraries
run in turns, in one process: each round times every one of them once, and a ratio is
the median over the rounds of the ratio within a round. So what slows the machine down
for a while slows all. A copy of x runs in the same rounds, and is the ceiling of what
can be moved.

`both` is the forward pass together with the gradients of x and of the parameters;
`backward` the gradients alone, from what forward kept. Inference is a pass of its own
for batch norm alone; for the others it is forward.

Nothing is timed that is not accurate: normjax by the bars of accuracy.py, the others by
what normjax returns for the same input. Timings say whether a bar is missed, and never
fail.
"""

import argparse
import json
import math
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import accuracy
import cases
import jax
import jax.numpy as jnp
import numpy as np
import peers
import steps
import timing

import normjax

DATA = ("1", "1e3", "1e5", "1e3, one value 0")  # rows of the accuracy table
IMPORT = "import time, jax; t = time.perf_counter(); import normjax; "
IMPORT += "print(time.perf_counter() - t)"
PASSES = ("inference", "forward", "backward", "both")
# At most of Flax's time, in the mean over models' shapes of each norm; in the mean over
# small shapes; in each case; and of torch's, in the mean over all cases.
BARS: dict[str, tuple[dict[str, float], float, float, float]] = {
    "forward": (
        {"layer": 0.6, "rms": 0.6, "batch": 0.8, "group": 0.25, "instance": 0.7},
        0.3,
        1.0,
        0.85,
    ),
    "both": (
        {"layer": 0.28, "rms": 0.28, "batch": 0.55, "group": 0.35, "instance": 0.5},
        0.35,
        0.85,
        0.85,
    ),
}
TORCH = 1.15  # at most of torch's time in each case
ALLOWANCE = 2.0  # seconds of rounds for one row of the table


def arguments_of(case: cases.Case, dtype: Any) -> tuple:
    """Draws the parameters, the running moments, x and the cotangent of y."""
    rng, c = np.random.default_rng(0), case.features
    params = {"scale": rng.uniform(0.5, 1.5, c), "bias": rng.uniform(-1, 1, c)}
    running = {"mean": rng.uniform(-1, 1, c), "var": rng.uniform(0.5, 1.5, c)}
    if case.norm == "rms":
        del params["bias"]
    if case.norm != "batch":
        running = {}
    params, running = jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float32), (params, running)
    )
    x, dy = jax.random.normal(jax.random.key(0), (2, *case.shape)).astype(dtype)
    return params, running, x, dy


def pulled(f: Callable) -> Callable:
    """The derivative of f in training, as a function of what f is given."""

    def pull(params, running, x):
        def of(params, x):
            return f(params, running, x, True)

        return jax.vjp(of, params, x, has_aux=True)  # y, pull, running

    return pull


def functions(f: Callable) -> dict[str, Callable]:
    """What is timed of f, as functions of (params, running, x, dy)."""

    def both(params, running, x, dy):
        y, pull, new = pulled(f)(params, running, x)
        return y, pull(dy), new

    return {
        "inference": lambda params, running, x, dy: f(params, running, x, False)[0],
        "forward": lambda params, running, x, dy: f(params, running, x, True),
        "both": both,
    }


def kept(f: Callable, arguments: tuple) -> int:
    """The bytes that forward keeps for backward, x itself among them."""
    found = jax.make_jaxpr(lambda *a: pulled(f)(*a)[1])(*arguments[:3])
    # What is kept twice is one variable; a number written in the program is none.
    arrays = {v: v.aval for v in found.jaxpr.outvars if not hasattr(v, "val")}
    return sum(a.size * a.dtype.itemsize for a in arrays.values())


def of_jax(f: Callable, arguments: tuple, what: list[str]) -> dict[str, Any]:
    """Compiles what is timed of a library of JAX."""
    programs = {}
    for name, function in functions(f).items():
        if name in what:
            programs[name] = timing.compiled(function, *arguments)
    if "backward" in what:
        pull = jax.jit(lambda *a: pulled(f)(*a)[1])(*arguments[:3])
        programs["backward"] = timing.compiled(
            lambda pull, dy: pull(dy), pull, arguments[3]
        )
    return programs


def _to_torch(a: jax.Array) -> Any:
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    tensor = torch.from_numpy(np.array(a, np.float32)).to(device)
    return tensor.to(torch.bfloat16) if a.dtype == jnp.bfloat16 else tensor


def of_torch(f: Callable, arguments: tuple, what: list[str]) -> tuple[dict, int]:
    """What is timed of torch, which compiles in a first call; and the bytes kept."""
    import torch

    torch.set_num_threads(len(timing.cores()))
    params, running, x, dy = jax.tree.map(_to_torch, arguments)
    inputs = [*params.values(), x]

    def synced(call):
        def run():
            result = call()
            if x.is_cuda:
                torch.cuda.synchronize()
            return result

        return run

    def without_gradients(train):
        def call():
            with torch.no_grad():
                return f(params, running, x, train)

        return call

    def gradients(y, **options):
        *of_params, dx = torch.autograd.grad(y, inputs, dy, **options)
        return dict(zip(params, of_params, strict=True)), dx

    def both():
        y, new = f(params, running, x, True)
        return y, gradients(y), new

    calls = {
        "inference": lambda: without_gradients(False)()[0],
        "forward": without_gradients(True),
        "both": both,
    }
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    for tensor in inputs:
        tensor.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = f(params, running, x, True)[0]
    calls["backward"] = lambda: gradients(y, retain_graph=True)
    programs = {}
    for name in what:
        start = time.perf_counter()
        calls[name]()
        took = 1e3 * (time.perf_counter() - start)
        programs[name] = timing.Program(synced(calls[name]), compile_ms=took)
    return programs, sum(s.nbytes() for s in storages.values())


def _array(a: Any) -> np.ndarray:
    """An array of jax or of torch, in float64."""
    if hasattr(a, "detach"):
        a = a.detach().float().cpu().numpy()
    return np.asarray(a, np.float64)


def values(peer: peers.Peer, case: cases.Case, program: timing.Program) -> dict:
    """What `both` computes: y and the gradients, laid out as normjax's."""
    y, (of_params, dx), _ = program.call()
    found = {"y": peers.laid_back(peer, case, _array(y))}
    found["dx"] = peers.laid_back(peer, case, _array(dx))
    return found | {f"d{name}": _array(a) for name, a in of_params.items()}


def disagreement(got: dict, want: dict, case: cases.Case, dtype: Any) -> str:
    """Names what differs by more than rounding, or nothing.

    A few roundings of the result, and those of float32 sums, which grow with the root
    of how many values are added up.
    """
    count = math.prod(case.shape) / case.features
    eps = jnp.finfo(jnp.float32).eps
    most = 4 * float(jnp.finfo(dtype).eps) + eps * (16 + math.sqrt(count))
    for name in want:
        size = np.abs(want[name]).max()
        error = np.abs(got[name] - want[name]).max() / size
        if not error <= most:
            return f"{name} is off by {error:.0e} of its largest, bar {most:.0e}"
    return ""


def inaccurate(norm: str, data: tuple[str, ...] = DATA) -> list[str]:
    """Lists where normjax misses a bar of the accuracy table."""
    rows = [accuracy.Row(norm, d, "normjax", accuracy.errors(norm, d)) for d in data]
    return accuracy.missed(rows)


def measure(
    case: cases.Case, dtype: Any, rounds: int, with_compiled: bool = True
) -> tuple[list[dict], dict[str, str]]:
    """Measures a case.

    Returns:
      A row of figures for each pass, and why peers that are there are not in them.
    """
    what = [name for name in PASSES if name != "inference" or case.norm == "batch"]
    arguments = arguments_of(case, dtype)
    params, running, x, dy = arguments
    programs, keeps, left_out, want = {}, {}, {}, {}
    for name, peer in {"normjax": peers.NORMJAX, **peers.PEERS}.items():
        if name == "torch compiled" and not with_compiled:
            continue
        try:
            if (f := peer.build(case, dtype)) is None:
                continue
            own = (params, running, *(peers.laid_out(peer, case, a) for a in (x, dy)))
            if peer.kind == "torch":
                programs[name], keeps[name] = of_torch(f, own, what)
            else:
                programs[name] = of_jax(f, own, what)
                keeps[name] = kept(f, own)
            got = values(peer, case, programs[name]["both"])
        except Exception as error:  # a peer that breaks must not end the others
            if name == "normjax":
                raise
            why = f"{type(error).__name__}: {error}".splitlines()[0][:100]
        else:
            want = want or got
            why = disagreement(got, want, case, dtype)
        if why:
            left_out[name] = why
            programs.pop(name, None)
    copy = timing.compiled(lambda x: -x, x)
    rows = []
    for name in what:
        mine = {who: own[name] for who, own in programs.items()} | {"copy": copy}
        calls = {who: program.call for who, program in mine.items()}
        times = timing.interleaved(calls, rounds, ALLOWANCE)
        row = {"case": f"{case.norm} {list(case.shape)}"}
        row |= {"dtype": jnp.dtype(dtype).name, "pass": name}
        row |= {"norm": case.norm, "shape": case.shape, "num_groups": case.num_groups}
        row |= {"model": case.model, "small": case.small, "rounds": len(times["copy"])}
        row |= {"x_bytes": x.nbytes, "least_x": case.passes(name, x.dtype.itemsize)}
        row["ratios"] = timing.ratios(times)
        parts = timing.ratios(times, "copy")
        row["of"] = {}
        for who in mine:
            row["of"][who] = timing.figures(mine[who], times[who])
            of_copy = (
                1.0 if who == "copy" else parts[who]["median"] * row["least_x"] / 2
            )
            moved = x.nbytes * (2 if who == "copy" else row["least_x"])
            row["of"][who] |= {
                "kept": keeps.get(who),
                "gb_s": moved / row["of"][who]["ms"] / 1e6,
                "of_copy": of_copy,
            }
        del row["ratios"]["copy"]
        rows.append(row)
    return rows, left_out


def import_seconds(rounds: int) -> float:
    """How long normjax takes to import where jax is imported already."""
    command = [sys.executable, "-c", IMPORT]
    root = pathlib.Path(normjax.__file__).parents[1]
    run = (
        subprocess.run(command, capture_output=True, check=True, text=True, cwd=root)
        for _ in range(rounds)
    )
    return statistics.median(float(done.stdout) for done in run)


def _geometric(found: list[float]) -> float | None:
    return statistics.geometric_mean(found) if found else None


def bars(report: dict) -> list[dict]:
    """How the figures stand to the bars, which are for float32 on two cores.

    A mean is the geometric one, over the shapes of models and not the small ones, which
    cost about a call; the bar of single cases has those too.
    """
    rows = [row for row in report["rows"] if row["dtype"] == "float32"]
    models = [row for row in rows if not row.get("small")]
    found = []

    def add(name, value, bar):
        if value is not None:
            ok = bool(value <= bar)
            found.append({"name": name, "value": value, "bar": bar, "ok": ok})

    def ratio(row, peer="flax"):
        return row["ratios"].get(peer, {}).get("median")

    def mean(of, peer="flax"):
        return _geometric([r for row in of if (r := ratio(row, peer)) is not None])

    def of(norm, what):
        return [row for row in models if (row["norm"], row["pass"]) == (norm, what)]

    for what, (means, small_bar, case_bar, torch_bar) in BARS.items():
        for norm, bar in means.items():
            add(f"{norm}, {what} / flax, mean", mean(of(norm, what)), bar)
        mine = [row for row in rows if row["norm"] and row["pass"] == what]
        small = [row for row in mine if row.get("small")]
        add(f"small shapes, {what} / flax, mean", mean(small), small_bar)
        for row in mine:
            if (ratio(row) or 0) > case_bar:
                add(
                    f"no case beyond, {what}: {row['case']} / flax",
                    ratio(row),
                    case_bar,
                )
            if (ratio(row, "torch") or 0) > TORCH:
                name = f"no case beyond, {what}: {row['case']} / torch eager"
                add(name, ratio(row, "torch"), TORCH)
        add(f"all cases, {what} / torch eager, mean", mean(mine, "torch"), torch_bar)
    return found + steps.bars(report) + _import_bar(report)


def _import_bar(report: dict) -> list[dict]:
    took = report.get("import_seconds")
    if took is None:
        return []
    name = "import normjax after jax, s"
    return [{"name": name, "value": took, "bar": 0.1, "ok": took <= 0.1}]


def slower(old: dict, new: dict) -> list[str]:
    """Names what got slower beside Flax, by more than the spread of both runs.

    Times of two runs say nothing, the machine may have been busy in one; the ratios to
    a peer of the same run do. The peer is Flax, or else the first that both runs have.
    """

    def keyed(report):
        return {(r["case"], r["dtype"], r["pass"]): r["ratios"] for r in report["rows"]}

    before, found = keyed(old), []
    for key, ratios in keyed(new).items():
        shared = [name for name in ratios if name in before.get(key, {})]
        if not shared:
            continue
        peer = "flax" if "flax" in shared else shared[0]
        was, now = before[key][peer], ratios[peer]
        if now["median"] > 1.05 * was["median"] and now["low"] > was["high"]:
            change = f"{was['median']:.2f} to {now['median']:.2f}"
            found.append(f"{', '.join(key)}: {change} of {peer}'s time")
    return found


def _cell(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)


def cells(row: dict, names: list[str]) -> list[str]:
    """Writes a row of figures as cells of the table."""
    ours, flax = row["of"]["normjax"], row["of"].get("flax", {})
    result = [row["case"], row["dtype"], row["pass"]]
    result.append(f"{ours['ms']:.3g} ({ours['low']:.3g} to {ours['high']:.3g})")
    for name in names:
        r = row["ratios"].get(name)
        spread = f" ({r['low']:.2f} to {r['high']:.2f})" if r and name == "flax" else ""
        result.append(_cell(r and r["median"]) + spread)
    result += [_cell(ours.get("gb_s"), ".1f"), _cell(ours.get("of_copy"))]
    for figure in ("temporary", "kept"):
        for of in (ours, flax):
            size = of.get(figure)
            result.append(_cell(None if size is None else size / 2**20))
    for figure in ("trace_ms", "compile_ms"):
        result += [_cell(of.get(figure), ".0f") for of in (ours, flax)]
    return result


def text(report: dict) -> str:
    """Writes a report: the table, and how the figures stand to the bars."""
    names = [n for n in peers.NAMES if any(n in r["ratios"] for r in report["rows"])]
    first = ["case", "dtype", "pass", "ms (quartiles)"]
    first += [f"/ {name}" + " (quartiles)" * (name == "flax") for name in names]
    first += ["GB/s", "of a copy's", "temporaries, MiB", "flax's", "kept, MiB"]
    first += ["flax's", "trace ms", "flax's", "compile ms", "flax's"]
    parts = [report["about"]]
    parts += [f"- absent: {name}: {why}" for name, why in report["absent"].items()]
    parts += [f"- not timed: {line}" for line in report["left_out"]]
    if not names:
        parts += ["- no peer is here, and without one a benchmark does not count"]
    parts += ["", cases.table(first, [cells(r, names) for r in report["rows"]]), ""]
    if report["networks"]:
        parts += [steps.memory_table(report["memory"]), ""]
        parts += [steps.network_line(report["networks"]), ""]
    lines = [
        [b["name"], f"{b['value']:.2f}", f"{b['bar']}", "met" if b["ok"] else "MISSED"]
        for b in bars(report)
    ]
    return "\n".join([*parts, cases.table(["bar", "value", "at most", ""], lines)])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    norms = sorted({case.norm for case in cases.SPEED})
    parser.add_argument(
        "--norm", action="append", choices=norms, help="these alone, without the steps"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="all cases in it; default: all in float32, some in bfloat16",
    )
    parser.add_argument(
        "--allocator",
        default="keep",
        choices=timing.ALLOCATORS,
        help="keep all memory; set glibc's two thresholds; or set nothing",
    )
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--quick", action="store_true", help="few cases, 7 rounds")
    parser.add_argument("--json", type=pathlib.Path, help="also write figures there")
    parser.add_argument("--plot", type=pathlib.Path, help="also draw them there, a PNG")
    parser.add_argument("--compare", type=pathlib.Path, help="name what got slower")
    return parser.parse_args(argv)


def _planned(args: argparse.Namespace) -> list[tuple[cases.Case, str]]:
    every = cases.QUICK if args.quick else cases.SPEED
    if args.dtype:
        plan = [(case, args.dtype) for case in every]
    else:
        plan = [(case, "float32") for case in every]
        plan += [] if args.quick else [(case, "bfloat16") for case in cases.BFLOAT16]
    return [(case, d) for case, d in plan if not args.norm or case.norm in args.norm]


def main(argv: list[str] | None = None) -> dict:
    """Measures, prints a table, and writes the figures where they are asked for."""
    args = parse(argv)
    start = time.perf_counter()
    rounds = min(7, args.rounds) if args.quick else args.rounds
    plan = _planned(args)
    left_out = []
    for norm in dict.fromkeys(case.norm for case, _ in plan):
        if lines := inaccurate(norm, DATA[1:2] if args.quick else DATA):
            print(*lines, sep="\n")
            plan = [(case, d) for case, d in plan if case.norm != norm]
            left_out.append(f"{norm}: normjax misses a bar of the accuracy table")
    rows = []
    for case, dtype in plan:
        # The compiler of torch takes many seconds a case.
        with_compiled = not args.quick and dtype == "float32" and case in cases.COMPILED
        found, why = measure(case, jnp.dtype(dtype), rounds, with_compiled)
        rows += found
        title = f"{case.norm} {list(case.shape)}, {dtype}"
        left_out += [f"{name}, {title}: {reason}" for name, reason in why.items()]
        print(".", end="", file=sys.stderr, flush=True)
    networks, memory = {}, []
    if not args.norm:
        step_rows, why = steps.measure(args.quick)
        rows += step_rows
        left_out += why
        networks, memory = steps.networks(2 if args.quick else 5), steps.memory()
    print(file=sys.stderr)
    minutes = (time.perf_counter() - start) / 60
    about = cases.versions("jax", *peers.PACKAGES)
    about += f"; {jax.devices()[0].device_kind}, {len(timing.cores())} cores"
    about += f"; up to {rounds} rounds; allocator: {timing.allocator()}"
    report = {
        "about": f"{about}; {minutes:.1f} minutes",
        "absent": peers.ABSENT,
        "left_out": left_out,
        "import_seconds": import_seconds(3 if args.quick else 7),
        "networks": networks,
        "memory": memory,
        "rows": rows,
    }
    report["bars"] = bars(report)
    print(text(report))
    if args.json:
        args.json.write_text(json.dumps(report, indent=2) + "\n")
    if args.plot:
        import plot

        plot.draw(report, args.plot)
    if args.compare:
        lines = slower(json.loads(args.compare.read_text()), report)
        print(f"\nslower than in {args.compare}: " + ("" if lines else "nothing"))
        print(*(f"- {line}" for line in lines), sep="\n")
    return report


if __name__ == "__main__":
    timing.use_allocator(parse().allocator)
    main()
