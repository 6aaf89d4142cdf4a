"""What a log of `pytest -v` says, whole or cut off: how many tests passed, and which did not."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

_WORDS = "PASSED|FAILED|ERROR|SKIPPED"
_IN_WORKERS = re.compile(rf"^\[gw\d+\].*? ({_WORDS}) (\S+::.+?)\s*$")
_ALONE = re.compile(rf"^(\S+::.+?) ({_WORDS})\b")
_REASON = re.compile(r"^(?:FAILED|ERROR) (\S+::.+?) - (.*)$")
_COLLECTED = re.compile(r"^=* ?(\d\S* tests? collected.*?) ?=*$")
_CRASHED = re.compile(r"^\[gw\d+\].*(?:node down|worker .* crashed)", re.IGNORECASE)


def outcome_lines(log: Path) -> list[str]:
    """Return a line of counts, and a line per test that failed, with its reason where the log has one."""
    outcomes: dict[str, str] = {}
    reasons: dict[str, str] = {}
    others: list[str] = []
    for line in log.read_text(errors="replace").splitlines():
        if found := _IN_WORKERS.match(line):
            outcomes[found[2]] = found[1]
        elif found := _ALONE.match(line):
            outcomes[found[1]] = found[2]
        elif found := _REASON.match(line):
            reasons[found[1]] = found[2]
        elif found := _COLLECTED.match(line):
            others.append(f"  {found[1]}")
        elif _CRASHED.match(line):
            others.append(f"  {line.strip()}")
    counts = Counter(outcomes.values())
    counted = ", ".join(f"{counts[word]} {word.lower()}" for word in _WORDS.split("|") if counts[word])
    failed = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    lines = [f"{log.stem}: {counted}", *others]
    return lines + [f"  {outcomes[name]} {_short(name)}: {reasons.get(name, '')[:120]}" for name in failed]


def _short(name: str) -> str:
    return name.rpartition("/")[2]
