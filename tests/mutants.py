"""Puts one small fault at a time into normjax/ and runs the tests that run its line.

    python tests/mutants.py --minutes 20               # a sample; make mutants
    python tests/mutants.py --all normjax/_axes.py     # every fault of a file, by hand
    python tests/mutants.py --only 'normjax/_axes.py:43:22 a - b'   # one again

First the tests run once, to learn which of them runs which line and how long it
takes (`--map` does only that; the map is kept in .mutants/ until a text changes).
Then each fault goes into a copy of the tree, and a process that is forked after jax is
imported runs the tests that run its line, the quickest first, until one fails.
A fault that no test sees has survived: a test is missing, or the code is not needed.
"""

import argparse
import ast
import collections
import contextlib
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
KEPT = ROOT / ".mutants"
# Tests that run whole programs, or look at text alone.
LEFT_OUT = (
    "test_benchmarks test_compare_norms test_docs test_examples test_fuzz"
    " test_multihost test_mutants test_notebooks test_processes test_train_digits"
    " test_types"
).split()
SECONDS = 120  # of tests for each fault, as the map says
SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Arguments of no effect but on the words of help.
WORDS = {"help", "metavar", "prog", "description"}


# The faults.


class Fault:
    """One piece of a file's text, and what stands there instead."""

    def __init__(self, path, node, text, lines):
        self.path = path
        self.start = (node.lineno, node.col_offset)
        self.end = (node.end_lineno, node.end_col_offset)
        self.text = text
        self.lines = lines  # of its statement

    def __str__(self):
        line, column = self.start
        return f"{self.path}:{line}:{column} {' '.join(self.text.split())}"

    def told(self, source: str) -> str:
        """The lines before and after, by which a fault is found when others move."""
        first, last = self.start[0] - 1, self.end[0]
        before, after = source.splitlines(), self.put(source).splitlines()
        more = len(after) - len(before)
        old, new = before[first:last], after[first : last + more]
        old, new = (" ".join(" ".join(lines).split()) for lines in (old, new))
        return f"{self.path}: {old} => {new}"

    def put(self, source: str) -> str:
        """The file's text with the fault in it."""
        lines = [line.encode() for line in source.splitlines(keepends=True)]
        starts = [0]
        for line in lines:
            starts.append(starts[-1] + len(line))
        whole = b"".join(lines)
        first, last = (starts[n - 1] + c for n, c in (self.start, self.end))
        return (whole[:first] + self.text.encode() + whole[last:]).decode()


def changes(node):
    """What could stand instead of an expression: a list of expressions."""
    found = []
    if isinstance(node, ast.BinOp):
        # One side alone, as when a correction is forgotten.
        found.append(node.left)
        if isinstance(node.op, (ast.Add, ast.Mult)):
            found += [node.right]
        if type(node.op) in SWAPS:
            found.append(ast.BinOp(node.left, SWAPS[type(node.op)](), node.right))
    elif isinstance(node, ast.BoolOp):
        found += node.values
        found.append(ast.BoolOp(SWAPS[type(node.op)](), node.values))
    elif isinstance(node, ast.UnaryOp):
        found.append(node.operand)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        swap = SWAPS[type(node.ops[0])]()
        found.append(ast.Compare(node.left, [swap], node.comparators))
    elif isinstance(node, ast.IfExp):
        found += [node.body, node.orelse]
    elif isinstance(node, ast.Call):
        if node.args and not isinstance(node.args[0], (ast.Starred, ast.Constant)):
            found.append(node.args[0])
        for i, k in enumerate(node.keywords):
            if k.arg is not None and k.arg not in WORDS:
                rest = node.keywords[:i] + node.keywords[i + 1 :]
                found.append(ast.Call(node.func, node.args, rest))
        words = getattr(node.func, "value", None)
        if isinstance(words, ast.Constant) and isinstance(words.value, str):
            each = words.value.split()
            for i in range(len(each)):
                fewer = ast.Constant(" ".join(each[:i] + each[i + 1 :]))
                func = ast.Attribute(fewer, node.func.attr, ast.Load())
                found.append(ast.Call(func, node.args, node.keywords))
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            found.append(ast.Constant(not node.value))
        elif isinstance(node.value, int):
            found.append(ast.Constant(node.value + 1))
        elif isinstance(node.value, float):
            found.append(ast.Constant(node.value * 2 if node.value else 1.0))
    return found


def is_strict(keyword) -> bool:
    return keyword.arg == "strict" and getattr(keyword.value, "value", None) is True


class Finder(ast.NodeVisitor):
    """Collects the faults of a file, with the lines of the statement of each."""

    def __init__(self, path):
        self.path, self.lines, self.faults = path, (1, 1), []

    def add(self, node, text):
        self.faults.append(Fault(self.path, node, text, self.lines))

    def visit(self, node):
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)  # of what has one, the lines before it
            last = max(node.lineno, body[0].lineno - 1) if body else node.end_lineno
            self.lines = (node.lineno, last)
        super().visit(node)

    def visit_FunctionDef(self, node):
        for default in (*node.args.defaults, *node.args.kw_defaults):
            if default is not None:
                self.visit(default)
        for statement in node.body:
            self.visit(statement)

    def visit_ClassDef(self, node):
        for statement in node.body:
            self.visit(statement)

    def visit_Raise(self, node):
        self.add(node, "pass")  # and leave its words alone

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_Import(self, node):
        pass

    visit_ImportFrom = visit_Import

    def visit_Expr(self, node):
        if not isinstance(node.value, ast.Constant):  # a docstring
            self.add(node, "pass")
            self.visit(node.value)

    def visit_Assign(self, node):
        names = {n.id for t in node.targets for n in ast.walk(t) if hasattr(n, "id")}
        used = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        if names <= used and names:  # x = f(x)
            self.add(node, "pass")
        if not names & {"__all__", "__version__"}:
            self.visit(node.value)

    def visit_AugAssign(self, node):
        self.add(node, "pass")
        self.visit(node.value)

    def visit_If(self, node):
        self.add(node.test, "True")
        self.add(node.test, "False")
        self.generic_visit(node)

    def visit_JoinedStr(self, node):
        pass

    def visit_Call(self, node):
        if (
            getattr(node.func, "id", "") == "zip"
        ):  # strict=True looks for what cannot be
            node.keywords = [k for k in node.keywords if not is_strict(k)]
        self.generic_visit(node)

    def generic_visit(self, node):
        if isinstance(node, ast.expr):
            for changed in changes(node):
                self.add(node, f"({ast.unparse(ast.fix_missing_locations(changed))})")
        super().generic_visit(node)


def faults_of(path: str) -> list:
    finder = Finder(path)
    finder.visit(ast.parse((ROOT / path).read_text()))
    return list({str(f): f for f in finder.faults}.values())


# Which tests run which line.


class Recorder:
    """A plugin of pytest that notes which lines of normjax/ each test runs."""

    def __init__(self, out):
        coverage = __import__("coverage")
        self.out, self.tests, self.file = out, {}, None
        self.cov = coverage.Coverage(
            data_file=None, config_file=False, source=[str(ROOT / "normjax")]
        )
        self.cov.start()  # before normjax is imported: those lines are of no test

    def pytest_runtest_protocol(self, item, nextitem):
        import jax

        if item.path != self.file:  # what an earlier file traced is not traced again
            jax.clear_caches()
            self.file = item.path
        self.cov.switch_context(item.nodeid)

    def pytest_runtest_logreport(self, report):
        seconds, passed = self.tests.get(report.nodeid, (0.0, True))
        passed = passed and report.outcome == "passed"
        self.tests[report.nodeid] = (seconds + report.duration, passed)

    def pytest_sessionfinish(self):
        self.cov.stop()
        names = sorted(k for k, (_, passed) in self.tests.items() if passed)
        number, ran = {name: i for i, name in enumerate(names)}, {}
        data = self.cov.get_data()
        for path in sorted(data.measured_files()):
            by_line = ran[str(pathlib.Path(path).relative_to(ROOT))] = {}
            for line, contexts in sorted(data.contexts_by_lineno(path).items()):
                by_line[line] = sorted(number[c] for c in contexts if c in number)
        tests = [[name, round(self.tests[name][0], 3)] for name in names]
        unused = sorted(self.tests.keys() - set(names))  # failed, or skipped
        found = {"tests": tests, "ran": ran, "unused": unused}
        self.out.write_text(json.dumps(found))


def test_files() -> list:
    found = sorted((ROOT / "tests").glob("test_*.py"))
    return [f"tests/{p.name}" for p in found if p.stem not in LEFT_OUT]


def _kept(file) -> pathlib.Path:
    """Where the map of a test file is kept, by the text of it and of normjax/."""
    digest = hashlib.sha256((ROOT / file).read_bytes())
    for path in sorted((ROOT / "normjax").rglob("*.py")):
        digest.update(path.read_bytes())
    return KEPT / f"{pathlib.Path(file).stem}-{digest.hexdigest()[:12]}.json"


def test_map(workers: int, files: list) -> dict:
    """Which tests run which line, and their seconds; made where there is none."""
    KEPT.mkdir(exist_ok=True)
    kept = {file: _kept(file) for file in files}
    running = []
    for file, out in kept.items():
        if out.exists():
            continue
        for old in KEPT.glob(f"{pathlib.Path(file).stem}-*.json"):
            old.unlink()
        while sum(child.is_alive() for child in running) >= workers:
            time.sleep(0.2)
        _preload()
        running.append(multiprocessing.Process(target=_record, args=(file, out)))
        running[-1].start()
    for child in running:
        child.join()
    lines = collections.defaultdict(lambda: collections.defaultdict(list))
    merged = {"tests": {}, "ran": lines, "unused": []}
    for file, out in kept.items():
        if not out.exists():
            merged["unused"].append(f"{file}: its process died")
            continue
        part = json.loads(out.read_text())
        merged["tests"] |= dict(part["tests"])
        merged["unused"] += part["unused"]
        for path, by_line in part["ran"].items():
            for line, tests in by_line.items():
                lines[path][int(line)] += [part["tests"][i][0] for i in tests]
    return merged


def _record(file, out):
    with _quiet():
        sys.path.insert(0, str(ROOT))
        os.chdir(ROOT)
        pytest = __import__("pytest")
        pytest.main(["-q", "-p", "no:cacheprovider", file], plugins=[Recorder(out)])
    os._exit(0)


@contextlib.contextmanager
def _quiet():
    with open(os.devnull, "w") as nothing:
        for stream in (1, 2):
            os.dup2(nothing.fileno(), stream)
        yield


# One fault.


class First:
    """A plugin of pytest that keeps the first test that fails."""

    failed = None

    def pytest_runtest_logreport(self, report):
        if report.failed and self.failed is None:
            self.failed = report.nodeid

    def pytest_collectreport(self, report):
        if report.failed and self.failed is None:
            self.failed = f"{report.nodeid} (is not even collected)"


def tests_for(fault, known) -> list:
    """The tests to run: those that run its lines, and then the others of their files,
    which may use what these have traced. Of each function of tests one comes first,
    the quickest before the others, since its other cases mostly see the same."""
    seconds, lines = known["tests"], known["ran"].get(fault.path, {})
    first, last = fault.lines
    within = set().union(*(lines.get(n, ()) for n in range(first, last + 1)))
    if not within and any(n in lines for n in range(first, last + 1)):
        within = set().union(*lines.values())  # it runs on import
    files = {t.partition("::")[0] for t in within}
    others = {t for t in seconds if t.partition("::")[0] in files} - within
    chosen, total = [], 0.0
    for group in (within, others):
        turn = collections.Counter()
        by_turn = []
        for test in sorted(group, key=lambda t: (seconds[t], t)):
            name = test.partition("[")[0]
            by_turn.append((turn[name], seconds[test], test))
            turn[name] += 1
        for _, needed, test in sorted(by_turn):
            if total + needed <= SECONDS:
                total += needed
                chosen.append(test)
    return chosen


def _child(tree, tests, pipe):
    os.setsid()
    with _quiet():
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        sys.dont_write_bytecode = True
        pytest, first = __import__("pytest"), First()
        code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [first])
    pipe.send(first.failed or (None if code in (0, 5) else f"pytest: exit {code}"))
    pipe.close()
    os._exit(0)


def run(fault, tree, known) -> dict:
    """Puts a fault into a tree, runs tests, and takes it out: what came of it."""
    source, start = (ROOT / fault.path).read_text(), time.monotonic()
    tests, told = tests_for(fault, known), fault.told(source)
    result = {"fault": str(fault), "told": told, "tests": len(tests), "seconds": 0}
    if not tests:
        return {**result, "outcome": "no test runs it"}
    (tree / fault.path).write_text(fault.put(source))
    limit = 60 + 3 * sum(known["tests"][t] for t in tests)
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.Process(target=_child, args=(tree, tests, there))
    child.start()
    there.close()
    try:
        killer = here.recv() if here.poll(limit) else "the limit of time"
    except EOFError:
        killer = "the end of the process"
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, 9)
    child.join()
    (tree / fault.path).write_text(source)
    outcome = "survived" if killer is None else f"killed by {killer}"
    return {**result, "outcome": outcome, "seconds": round(time.monotonic() - start, 1)}


def _preload():
    """Imports what every child needs, once; no device is touched before a fork."""
    for name in ("jax", "jax.numpy", "flax.linen", "flax.nnx", "optax", "pytest"):
        __import__(name)


def _worker(tasks, results, known, until):
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        tree = pathlib.Path(folder) / "tree"
        shutil.copytree(
            ROOT, tree, ignore=shutil.ignore_patterns(".*", "__pycache__", "site")
        )
        while time.monotonic() < until:
            fault = tasks.get()
            if fault is None:
                break
            results.put(run(fault, tree, known))
    results.put(None)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="of normjax/; all where left out")
    parser.add_argument("--minutes", type=float, default=20, help="of a sample, in all")
    parser.add_argument("--all", action="store_true", help="every fault")
    parser.add_argument("--only", help="one fault, as it is printed")
    parser.add_argument("--map", action="store_true", help="only learn what tests run")
    parser.add_argument("--tests", nargs="*", help="test files to use; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, help="faults of the sample, not minutes")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    start = time.monotonic()

    def say(text):
        print(text, flush=True)

    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # Half of the time of tests goes into compiling, mostly what no fault has changed.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(KEPT / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
    say("Which tests run which line; running those that changed.")
    known = test_map(options.workers, options.tests or test_files())
    say(f"{len(known['tests'])} tests; it took {time.monotonic() - start:.0f} s.")
    for name in known["unused"]:
        say(f"  not used, since it does not pass: {name}")
    if options.map:
        return 0
    every = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "normjax").rglob("*.py"))
    faults = [f for path in options.files or every for f in faults_of(path)]
    if options.only:
        faults = [f for f in faults if str(f) == options.only]
    random.Random(options.seed).shuffle(faults)
    # Learning what tests run counts, too, but leaves a quarter of the time.
    until = max(start + 60 * options.minutes, time.monotonic() + 15 * options.minutes)
    if options.count is not None:
        faults = faults[: options.count]
    if options.all or options.only or options.count is not None:
        until = float("inf")
    tasks, results = multiprocessing.Queue(), multiprocessing.Queue()
    for fault in (*faults, *(None for _ in range(options.workers))):
        tasks.put(fault)
    arguments = (tasks, results, known, until)
    workers = [
        multiprocessing.Process(target=_worker, args=arguments)
        for _ in range(min(options.workers, len(faults)))
    ]
    for worker in workers:
        worker.start()
    found, left = [], len(workers)
    while left:
        result = results.get()
        if result is None:
            left -= 1
            continue
        found.append(result)
        say(f"{result['seconds']:6.1f} s  {result['outcome']}  {result['fault']}")
    tasks.cancel_join_thread()
    KEPT.mkdir(exist_ok=True)
    (KEPT / "report.json").write_text(json.dumps(found, indent=1))
    return report(found, len(faults), say)


def report(found, of, say) -> int:
    """Says what was killed of each file, and each fault that was not."""
    by_file = collections.defaultdict(list)
    for result in found:
        path = result["fault"].partition(":")[0]
        part = "tools" if path.startswith("normjax/tools/") else "core"
        for name in (path, f"of the {part}"):
            by_file[name].append(result["outcome"].partition(" ")[0])
    say(f"\n{len(found)} of {of} faults")
    for name, outcomes in sorted(by_file.items()):
        killed, of = outcomes.count("killed"), len(outcomes)
        say(f"  {100 * killed / of:5.0f} %  {killed}/{of}  {name}")
    alive = [r for r in found if r["outcome"] in ("survived", "no test runs it")]
    say(f"{len(alive)} alive:")
    for result in sorted(alive, key=lambda r: r["fault"]):
        say(f"  {result['outcome']}: {result['fault']}\n    {result['told']}")
    return 0


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    sys.exit(main())
