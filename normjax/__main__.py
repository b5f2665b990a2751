"""The command line: ``python -m normjax inspect CHECKPOINT``."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from typing import Any

from normjax import _check
from normjax.tools import checkpoints, plots, tables


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Example:
      >>> from normjax.__main__ import main
      >>> main(["inspect", "no/such/place"])
      2
    """
    parser = argparse.ArgumentParser(
        prog="python -m normjax", description="Tools for the norms of trained models."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_inspect(commands)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _add_inspect(commands: Any) -> None:
    words = "prints the table of the norms of a checkpoint"
    parser = commands.add_parser("inspect", help=words, description=words)
    parser.add_argument("checkpoint", help="a checkpoint's folder")
    parser.add_argument("--plot", metavar="PNG", help="draws it, too")
    parser.add_argument("--json", action="store_true", help="prints JSON instead")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    rows = tables.norm_table(checkpoints.load(args.checkpoint))
    if args.plot:
        plots.plot_table(rows, path=args.plot)
    if args.json:
        plain = [_plain({**row._asdict(), "path": row.name}) for row in rows]
        print(json.dumps(plain, indent=1, allow_nan=False))
        return 0
    table = tables.rich_table(rows)
    console = _check.needed("inspect", "rich", "rich.console").Console
    # Lines as long as the table is wide: a number that is cut short would mislead.
    wide = console(width=10_000)
    console(width=max(console().width, wide.measure(table).maximum)).print(table)
    return 0


def _plain(value: Any) -> Any:
    """What JSON has a word for: null in place of NaN and infinities."""
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
