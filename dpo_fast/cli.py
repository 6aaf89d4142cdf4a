"""The command line: `dpo-fast train | cache | score | bench | run | demo | doctor`.

A mistake in the input ends with status 2 and one line on stderr; a traceback means a bug. Everything that can be seen
to be wrong before a model is loaded is reported before.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from dpo_fast.errors import InputError

COMMANDS = {
    "train": "train a model on preferences; flags are those of `trl dpo`",
    "cache": "compute reference log-probs ahead, or look after those kept",
    "score": "the rewards that a trained model gives to preferences",
    "bench": "what training on these data costs, and the settings to take",
    "run": "run a program with TRL accelerated: dpo-fast run -- trl dpo …",
    "demo": "train a small model on the preferences in this package and show the change",
    "doctor": "what is installed, which backends will be used, and what is missing",
}


def _parser() -> argparse.ArgumentParser:
    """Return a parser that picks the command, whose own parser reads the rest."""
    parser = argparse.ArgumentParser(
        prog="dpo-fast",
        description="Direct Preference Optimization, fast.",
        epilog="dpo-fast COMMAND --help explains a command.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for name, purpose in COMMANDS.items():
        commands.add_parser(name, add_help=False, help=purpose)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit status: 0, or 2 after one line on stderr about a mistake in the input."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in COMMANDS:
        parser = _parser()
        if parser.parse_args(argv).version:
            from dpo_fast import __version__

            print(f"dpo-fast {__version__}")
            return 0
        parser.error(f"choose a command: {', '.join(COMMANDS)}")
    try:
        return importlib.import_module(f"dpo_fast.commands.{argv[0]}").main(argv[1:])
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"dpo-fast: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
