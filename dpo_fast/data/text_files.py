"""Text files of rows, looked at before `datasets` reads them: it takes some for something else, and says nothing.

pandas, which reads CSV files for `datasets`, renames a column whose name occurs twice, takes the first cell of a longer
row for an index, fills up a shorter one, and reads `NA`, `42` and `True` as what they look like. Arrow crashes on a
JSON file that begins with null, and lets bytes pass that are no text.
"""

from __future__ import annotations

import codecs
import csv
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Features, Value

from dpo_fast.data.values import beginning
from dpo_fast.errors import InputError

# What files of the usual compressions begin with; `datasets` unpacks them, whatever their names.
_COMPRESSED = (b"\x1f\x8b", b"PK\x03\x04", b"\xfd7zXZ", b"BZh", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")
_CHUNK = 1 << 24
_SEPARATORS = ";\t|"
_FIRST_ROWS = 10_000  # of a CSV file that is read as a stream


def check_json_file(path: Path) -> None:
    """Refuse a file that holds something else than objects or a list of them, or bytes that are not UTF-8.

    Raises:
        InputError: on what it begins with, or a row that is no object.
        ValueError: on a list that is no JSON, or an object that has a key twice.
        UnicodeDecodeError: on its encoding.
    """
    with path.open("rb") as file:
        start = file.read(_CHUNK)
        if start.startswith(_COMPRESSED):
            return
        decoder = codecs.getincrementaldecoder("utf-8-sig")()
        text = decoder.decode(start).lstrip()
        if not text:
            raise InputError(f"name_or_path: '{path}' holds no rows")
        if text[0] not in "{[":
            raise InputError(
                f"name_or_path: '{path}' begins with {text[:20]!r}, which is no row; give one JSON object per line, "
                "or one list of objects"
            )
        while chunk := file.read(_CHUNK):
            decoder.decode(chunk)
        decoder.decode(b"", final=True)
    if text[0] == "[":
        rows = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once_each)
        for index, row in enumerate(rows):
            if not isinstance(row, dict):
                raise InputError(
                    f"name_or_path: '{path}', row {index}: expected a JSON object, got {beginning(row)}; give one "
                    "per row"
                )


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; Arrow refuses one that holds a key twice, but what reads lists takes the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} is specified twice in {beginning(found)}")
    return found


def csv_options(paths: Sequence[Path], numbers: Collection[str], streaming: bool) -> dict[str, Any]:
    """Return the arguments with which `datasets` reads every cell as it is written, and those of `numbers` as numbers.

    Args:
        paths: files with the same columns.
        numbers: names of the columns that hold numbers.
        streaming: whether only the first rows are looked at.

    Raises:
        InputError: the files have no rows, differ in their columns, or a column or a row of one is not as described.
        UnicodeDecodeError: one is not UTF-8.
    """
    options: dict[str, Any] = {"keep_default_na": False, "na_filter": False}
    headers: dict[Path, list[str]] = {}
    for path in paths:
        with path.open("rb") as file:
            if file.read(8).startswith(_COMPRESSED):
                return options
        headers[path] = _checked_columns(path, numbers, _FIRST_ROWS if streaming else None)
    first = paths[0]
    for path, names in headers.items():
        if names != headers[first]:
            raise InputError(
                f"name_or_path: '{path}' has the columns {', '.join(names)}, and '{first}' has "
                f"{', '.join(headers[first])}; give files with the same columns in the same order"
            )
    types: Mapping[str, Value] = {name: Value("float64") for name in numbers}
    features = {name: types.get(name, Value("string")) for name in headers[first]}
    return {**options, "features": Features(features)}


def _checked_columns(path: Path, numbers: Collection[str], most: int | None) -> list[str]:
    """Return the names of a CSV file's columns as pandas gives them; its rows, `most` of them, have a cell for each."""
    with path.open(encoding="utf-8-sig", newline="") as file, _cells_of_any_size():
        rows = (row for row in csv.reader(file) if row)
        names = next(rows, [])
        separator = next((mark for mark in _SEPARATORS if mark in names[0]), None) if len(names) == 1 else None
        if separator is not None:
            raise InputError(
                f"name_or_path: '{path}' has one column, {names[0]!r}; separate columns by commas, as in "
                f"pandas.read_csv(path, sep={separator!r}).to_csv(path, index=False)"
            )
        twice = [name for name in dict.fromkeys(names) if name and names.count(name) > 1]
        if twice:
            raise InputError(
                f"name_or_path: '{path}' has {names.count(twice[0])} columns named {twice[0]!r}; remove or rename all "
                "but one"
            )
        index = -1
        for index, row in enumerate(islice(rows, most)):
            _check_cells(dict(zip(names, row, strict=False)), numbers, f"'{path}', row {index}")
            if len(row) != len(names):
                raise InputError(
                    f"name_or_path: '{path}', row {index}: it has {len(row)} cells for the {len(names)} columns "
                    f"{', '.join(names)}, and begins with {row[0][:60]!r}; give one for each, in double quotes where "
                    "a text holds a comma, a quote (doubled) or a line's end"
                )
    if index < 0:
        raise InputError(f"name_or_path: '{path}' holds no rows")
    return [name or f"Unnamed: {index}" for index, name in enumerate(names)]


def _check_cells(cells: Mapping[str, str], numbers: Collection[str], where: str) -> None:
    for name in cells.keys() & set(numbers):
        try:
            float(cells[name])
        except ValueError as error:
            raise InputError(
                f"name_or_path: {where}: column {name!r}: expected a number, got {cells[name]!r}; give one in every "
                "row, or leave the column out"
            ) from error


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
