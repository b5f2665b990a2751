"""The command line: ``python -m normjax doctor CHECKPOINT``."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from normjax import tools
from normjax.tools import checkpoints


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
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except (ValueError, TypeError, ImportError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _add_doctor(commands: Any) -> None:
    words = "looks for what goes wrong with norms; exit status 1 where something does"
    parser = commands.add_parser("doctor", help=words, description=words)
    parser.add_argument(
        "checkpoint", help="a folder of orbax, a file of msgpack or npz"
    )
    parser.add_argument("--steps", type=int, help="training steps there were")
    parser.add_argument(
        "--momentum", type=float, help="of its batch norms, the OLD value's part"
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail, too")
    parser.add_argument("--json", action="store_true", help="prints JSON instead")
    parser.set_defaults(run=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    tree = checkpoints.load(args.checkpoint)
    report = tools.doctor(tree, steps=args.steps, momentum=args.momentum)
    if args.json:
        findings = [f._asdict() for f in report.findings]
        print(json.dumps({**report._asdict(), "findings": findings}, indent=1))
    else:
        report.show()
    return int(report.failed(args.strict))


if __name__ == "__main__":
    sys.exit(main())
