"""``python -m normjax``: what is to be known of a checkpoint, without its model."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from normjax import tools
from normjax.tools import checkpoints


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder of orbax, or file of msgpack or npz")
    parser.add_argument("--steps", type=int, help="training steps there were")
    parser.add_argument(
        "--momentum", type=float, help="of its batch norms, the old value's part"
    )
    parser.add_argument("--strict", action="store_true", help="warnings fail, too")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _doctor(options: argparse.Namespace) -> int:
    """Exit status 1 where the doctor found an error."""
    tree = checkpoints.load(options.checkpoint)
    report = tools.doctor(tree, steps=options.steps, momentum=options.momentum)
    if options.json:
        findings = [f._asdict() for f in report.findings]
        print(json.dumps({**report._asdict(), "findings": findings}, indent=2))
    else:
        report.show()
    return int(report.failed(options.strict))


# By name: what it does, its arguments, and what runs and returns the exit status.
COMMANDS: dict[str, tuple[str, Callable, Callable]] = {
    "doctor": (
        "look for what goes wrong with norms; exit status 1 where something does",
        _doctor_arguments,
        _doctor,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; exit status 2 where its checkpoint cannot be read."""
    parser = argparse.ArgumentParser("python -m normjax", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (does, add_arguments, _) in COMMANDS.items():
        add_arguments(commands.add_parser(name, help=does, description=does))
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command][2](options)
    except (OSError, ImportError, TypeError, ValueError) as fault:
        print(fault, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
