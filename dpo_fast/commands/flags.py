"""Command lines whose mistakes are one line: the flag, what was given, and the flag that was probably meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from dpo_fast.config.types import nearest
from dpo_fast.errors import InputError


class CommandParser(argparse.ArgumentParser):
    """A parser of whole flags that raises `InputError` where argparse prints its usage and exits."""

    def __init__(self, **options: object) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help explains the flags")

    def parse_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        values, rest = self.parse_known_args(args, namespace)
        if rest:
            refuse_unknown(rest[0], spellings(self), self.prog)
        return values


def spellings(parser: argparse.ArgumentParser) -> list[str]:
    """Return one spelling of each flag: transformers also adds every flag with hyphens."""
    return [flag for flag in parser._option_string_actions if "-" not in flag.removeprefix("--")]


def refuse_unknown(word: str, known: Iterable[str], command: str) -> NoReturn:
    """Refuse an argument that is none of a command's flags, and name those that are spelled like it.

    Raises:
        InputError: always.
    """
    if not word.startswith("-"):
        raise InputError(f"unexpected argument {word!r}; values follow a flag, as in --model {word}")
    flag = word.split("=")[0]
    near = nearest(flag.replace("-", "_").replace("__", "--", 1), known, "did you mean {}?").replace("'", "")
    raise InputError(f"unknown flag {flag}; {near or f'{command} --help lists what there is'}")
