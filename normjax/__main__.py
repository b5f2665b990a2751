"""The command line: ``python -m normjax doctor`` and ``inspect`` of a checkpoint, and
``env``, what this installation has.
"""

import argparse
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Sequence
from typing import Any

from normjax import _check, tools
from normjax.kernels import library
from normjax.tools import checkpoints
from normjax.tools.tables import rich_table


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 2 where it has nothing to read.

    Example:
      >>> from normjax.__main__ import main
      >>> main(["doctor", "no/such/place"])
      2
    """
    parser = argparse.ArgumentParser(
        prog="python -m normjax", description="Tools for the norms of trained models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_inspect(commands)
    _add_env(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(_printable(str(error)), file=sys.stderr)
        return 2


def _add_doctor(commands: Any) -> None:
    words = "looks for what goes wrong with norms; exit status 1 where something does"
    parser = commands.add_parser("doctor", help=words, description=words)
    _add_checkpoint(parser)
    parser.add_argument("--steps", type=int, help="training steps there were")
    parser.add_argument(
        "--momentum", type=float, help="of its batch norms, the OLD value's part"
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail, too")
    parser.add_argument("--json", action="store_true", help="prints JSON instead")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    report = tools.doctor(_loaded(args), steps=args.steps, momentum=args.momentum)
    if args.json:
        findings = [f._asdict() for f in report.findings]
        print(json.dumps({**report._asdict(), "findings": findings}, indent=1))
    else:
        report.show()
    return int(report.failed(args.strict))


def _add_inspect(commands: Any) -> None:
    words = "prints the table of the norms of a checkpoint"
    parser = commands.add_parser("inspect", help=words, description=words)
    _add_checkpoint(parser)
    parser.add_argument("--plot", metavar="PNG", help="draws it, too")
    parser.add_argument("--json", action="store_true", help="prints JSON instead")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    rows = tools.norm_table(_loaded(args))
    if args.json:
        plain = [_plain({**row._asdict(), "path": row.name}) for row in rows]
        print(json.dumps(plain, indent=1, allow_nan=False))
    else:
        table = rich_table(rows)
        console = _check.needed("inspect", "rich", "rich.console").Console
        # Lines as long as the table is wide: a number cut short would mislead.
        wide = console(width=10_000)
        console(width=max(console().width, wide.measure(table).maximum)).print(table)
    if args.plot:
        tools.plot_table(rows, path=args.plot)
    return 0


def _add_env(commands: Any) -> None:
    words = "prints versions, and whether there are native kernels, and if not, why"
    parser = commands.add_parser("env", help=words, description=words)
    parser.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    for package in ("normjax", "jax", "jaxlib", "flax", "optax"):
        print(f"{package:16} {importlib.metadata.version(package)}")
    print(f"{'python':16} {platform.python_version()}, {platform.machine()}")
    missing = library.missing()
    has = "there" if missing is None else f"missing: {_printable(missing)}"
    print(f"{'native kernels':16} {has}")
    return 0


def _add_checkpoint(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        help="a folder of orbax, a file of msgpack, npz or .safetensors, or the"
        " .safetensors.index.json of several",
    )
    parser.add_argument(
        "--max-bytes",
        type=int,
        metavar="N",
        help="of memory that reading may take; else 200 MB, or twice the file",
    )


def _loaded(args: argparse.Namespace) -> Any:
    """The tree of the checkpoint, with names that do nothing where they are printed.

    JSON has its own way to write them.
    """
    tree = checkpoints.load(args.checkpoint, max_bytes=args.max_bytes)
    return tree if args.json else _named(tree)


def _named(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    return {_printable(name, "\\"): _named(value) for name, value in tree.items()}


def _printable(text: str, marks: str = "") -> str:
    """The text with what does not print, and ``marks``, as it is written in Python.

    A name can hold what moves a terminal's cursor, or turns the text around.
    """
    return "".join(
        c if c.isprintable() and c not in marks else ascii(c)[1:-1] for c in text
    )


def _plain(value: Any) -> Any:
    """What JSON has a word for: null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
