"""The command line: `dpo-fast train | cache | score | bench | run | demo | doctor`.

A mistake in the input ends with status 2 and one line on stderr; a traceback means a bug. Everything that can be seen
to be wrong before a model is loaded is reported before.
"""

from __future__ import annotations

import importlib
import os
import sys

from dpo_fast.commands.flags import CommandParser
from dpo_fast.commands.streams import Stopped, keep_output_going, stopped_by_signals
from dpo_fast.config.types import nearest
from dpo_fast.errors import InputError, TrainingDiverged

COMMANDS = {
    "train": "train a model on preferences; flags are those of `trl dpo`",
    "cache": "compute reference log-probs ahead, or look after those kept",
    "score": "the rewards that a trained model gives to preferences",
    "bench": "what training on these data costs, and the settings to take",
    "run": "run a program with TRL accelerated: dpo-fast run -- trl dpo …",
    "demo": "train a small model on the preferences in this package and show the change",
    "doctor": "what is installed, which backends will be used, and what is missing",
}


def _parser() -> CommandParser:
    """Return a parser that picks the command, whose own parser reads the rest."""
    parser = CommandParser(
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
    """Run a command and return its exit status.

    Returns:
        0; 1 after a run that failed; 2 after one line on stderr about a mistake in the input; 128 and the number of
        the signal that ended it.
    """
    argv = sys.argv[1:] if argv is None else argv
    keep_output_going()
    try:
        with stopped_by_signals():
            return _run(argv)
    except InputError as error:
        _say(f"error: {error}")
        return 2
    except TrainingDiverged as error:
        _say(f"error: {error}")
        return 1
    except Stopped as stopped:
        _say(str(stopped))
        return 128 + stopped.number
    finally:
        sys.stdout.flush()


def _run(argv: list[str]) -> int:
    if argv and argv[0] in COMMANDS:
        return importlib.import_module(f"dpo_fast.commands.{argv[0]}").main(argv[1:])
    if argv and not argv[0].startswith("-"):
        near = nearest(argv[0], COMMANDS, "did you mean {}?") or f"choose from {', '.join(COMMANDS)}"
        raise InputError(f"command {argv[0]!r} is not known; {near}")
    parser = _parser()
    if not parser.parse_args(argv).version:
        raise InputError(f"no command given; choose from {', '.join(COMMANDS)}")
    from dpo_fast import __version__

    print(f"dpo-fast {__version__}")
    return 0


def _say(message: str) -> None:
    """Print one line. Of several ranks each says what it met, as only one may have met it."""
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    who = "dpo-fast" if ranks == "1" else f"dpo-fast, rank {rank}"
    print(f"{who}: {' '.join(message.split())}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
