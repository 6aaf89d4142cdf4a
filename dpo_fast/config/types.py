"""Types of options, checked once for flags, YAML files and Python alike.

The annotation of a dataclass's field says what its value may be. Text that stands for a number or for true and false
becomes one, as flags and YAML give it. A truth value is no number, and a number is no truth value.
"""

from __future__ import annotations

import difflib
import functools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, BeforeValidator, Field, InstanceOf, TypeAdapter, ValidationError

from dpo_fast.errors import InputError

_INDEX = Lt(2**31)  # what loops and lists of libraries take
Count = Annotated[int, Ge(1), _INDEX]
WholeNumber = Annotated[int, Ge(0), _INDEX]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
Share = Annotated[float, Ge(0), Lt(1)]  # 1 is not one
_INFINITE_TOO = object()
NotNegativeOrInfinite = Annotated[float, Ge(0), _INFINITE_TOO]


def check_types(options: Any, narrower: Mapping[str, Any] | None = None) -> None:
    """Replace the values of a dataclass, in place, by what they stand for; defaults are not looked at.

    Args:
        options: an instance of any dataclass.
        narrower: types of fields whose own annotation allows more than is of use.

    Raises:
        InputError: a value is of another type or out of its range. The message names field, value and what is allowed.
    """
    kinds = {**_annotations(type(options)), **(narrower or {})}
    for field in fields(options):
        value, default = getattr(options, field.name), _default(field)
        if field.init and not (type(value) is type(default) and value == default):
            setattr(options, field.name, checked(field.name, value, kinds[field.name], default))


def checked(name: str, value: Any, kind: Any, default: Any = None) -> Any:
    """Return what `value` stands for as an option of type `kind`.

    Raises:
        InputError: it stands for nothing of that type.
    """
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]
        shown = "'…'" if name.endswith("_token") and isinstance(value, str) else _shown(value)
        if isinstance(cause := reason.get("ctx", {}).get("error"), InputError):
            raise InputError(f"{name}={shown} {cause}; the default is {default!r}") from None
        near = nearest(str(value), _choices(kind), "; did you mean {}?")
        raise InputError(f"{name}={shown} must be {_described(kind)}{near}; the default is {default!r}") from None


def nearest(word: str, known: Iterable[str], text: str) -> str:
    """Return `text` with those of `known` that are spelled like `word` in it, or nothing where none is."""
    matches = difflib.get_close_matches(word, list(known), n=2)
    return text.format(" or ".join(map(repr, matches))) if matches else ""


def _default(field: Any) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


@functools.cache
def _annotations(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


# ---- what a type accepts ----


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a truth value")
    return value


def _truth(value: Any) -> Any:
    if not isinstance(value, bool | str) and value not in (0, 1):
        raise ValueError("no truth value")
    return value


def _as_text(value: Any) -> Any:
    """YAML reads a name like 2024 as a number; Python has paths."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _none(value: Any) -> Any:
    return None if isinstance(value, str) and value.lower() in ("none", "null") else value


def _no(value: Any) -> Any:
    return "no" if value is False else value  # as YAML reads the word


def _mapping(value: Any) -> Any:
    """A mapping by names, which JSON text becomes, or the name of a file that holds one."""
    if value is None or isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, str) and not value.lstrip().startswith("{") and Path(value).expanduser().is_file():
        text = Path(value).expanduser().read_bytes()
    elif isinstance(value, str):
        text = value
    else:
        raise InputError("is not a mapping of names to values")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"is not a mapping, and neither JSON of one nor a file of JSON ({error})") from None
    if not isinstance(content, dict):
        raise InputError(f"is not a mapping: its JSON is a {type(content).__name__}")
    return content if text is value else value


_PLAIN = {
    int: Annotated[int, BeforeValidator(_number)],
    float: Annotated[int | Annotated[float, Field(allow_inf_nan=False)], BeforeValidator(_number)],
    bool: Annotated[bool, BeforeValidator(_truth)],
    str: Annotated[str, BeforeValidator(_as_text)],
    None: None,
    NoneType: None,
}


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    return TypeAdapter(_accepted(kind))


def _accepted(kind: Any) -> Any:
    """What pydantic checks for an annotation: as it says, but for kinds that only the program knows."""
    if kind in _PLAIN:
        return _PLAIN[kind]
    origin, parts = get_origin(kind), get_args(kind)
    if _is_mapping(kind):
        others = tuple(part for part in parts if part not in (str, NoneType) and isinstance(part, type))
        return Annotated[Any, AfterValidator(lambda value: value if isinstance(value, others) else _mapping(value))]
    if origin is Annotated and kind.__metadata__[-1] is _INFINITE_TOO:
        return Annotated[int | float, BeforeValidator(_number), *kind.__metadata__[:-1]]
    if origin is Annotated:
        return Annotated[_accepted(parts[0]), *kind.__metadata__]
    if origin in (Union, UnionType):
        members = tuple(_accepted(part) for part in parts if not (_is_closed(kind) and part is str))
        union = Union[members]  # noqa: UP007 (a tuple)
        return Annotated[union, BeforeValidator(_none)] if _is_closed(kind) or str not in parts else union
    if origin is list:
        return list[_accepted(parts[0])]
    if _is_enum(kind):
        return Annotated[kind, BeforeValidator(_no)] if "no" in _choices(kind) else kind
    return kind if origin is Literal or kind is Any else InstanceOf[kind]


def _is_enum(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Enum)


def _is_closed(kind: Any) -> bool:
    """Whether there are no other values than those that an enumeration, or literals without text, have."""
    return str not in get_args(kind) or any(map(_is_enum, get_args(kind)))


def _is_mapping(kind: Any) -> bool:
    return any(part is dict or get_origin(part) is dict for part in (kind, *get_args(kind)))


# ---- what is said of it ----

_NAMES = {
    int: "an integer",
    float: "a finite number",
    bool: "true or false",
    str: "text",
    dict: "a mapping",
    NoneType: "None",
}
_BOUNDS = {Ge: "of at least {0.ge}", Gt: "above {0.gt}", Le: "of at most {0.le}", Lt: "below {0.lt}"}


def _choices(kind: Any) -> list[str]:
    if get_origin(kind) is Literal:
        return [str(choice) for choice in get_args(kind)]
    if _is_enum(kind):
        return [str(choice.value) for choice in kind]
    return [choice for part in get_args(kind) for choice in _choices(part)] if get_origin(kind) else []


def _described(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if (plain := origin or kind) in _NAMES:
        return _NAMES[plain]
    if (choices := _choices(kind)) and _is_closed(kind):
        return f"one of {choices}" + (" or None" if NoneType in parts else "")
    if origin is Annotated:
        bounds = [_BOUNDS[type(bound)].format(bound) for bound in kind.__metadata__ if type(bound) in _BOUNDS]
        return f"{_described(parts[0])} {' and '.join(bounds)}"
    if origin in (Union, UnionType):
        return " or ".join(_described(part) for part in parts)
    return f"a list, each {_described(parts[0])}" if origin is list else str(kind)
