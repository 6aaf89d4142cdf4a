"""Messages of conversations in the spellings that people have, as `{"role", "content"}`, and what they may hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dpo_fast.data.values import shown
from dpo_fast.errors import InputError

Message = dict[str, Any]

# Speakers of ShareGPT → roles.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}
# Roles that templates take for one of these, or have of their own; others must stand in the template's text.
KNOWN_ROLES = {*ROLES.values(), "developer", "function", "ipython"}
_RESULTS = {"tool", "function", "ipython"}  # roles whose content may be data
_TEXT_PARTS = ("text", "thinking")
_MEDIA = ("image", "audio", "video", "file", "document")
# What a message may consist of beside, or in place of, its content.
_INSTEAD = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


def is_conversation(value: Any) -> bool:
    """Return whether a value is a message, or a list of messages."""
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(item, dict) for item in value))


def messages_of(value: Any, column: str, role: str = "assistant") -> list[Message]:
    """Return a message, a list of messages, or text that `role` said, as a list of messages.

    Raises:
        InputError: the value is none of these, or a message holds what is no text.
    """
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not is_conversation(value):
        raise InputError(
            f"column {column!r}: {shown(value)} is neither text, nor a message, nor a list of messages; give it in "
            "every row, or leave the row out"
        )
    return [_message(item, column) for item in (value if isinstance(value, list) else [value])]


def unknown_role(messages: list[Message], template: Any) -> str | None:
    """Return a role that is neither usual nor in the text of the chat template."""
    others = {message["role"] for message in messages} - KNOWN_ROLES
    return next((role for role in sorted(others) if role not in str(template)), None)


def in_parts(message: Message) -> bool:
    """Return whether the content of a message that somebody says is a list of parts."""
    return isinstance(message.get("content"), list) and message["role"] not in _RESULTS


def _message(value: Mapping[str, Any], column: str) -> Message:
    if value.get("role") is not None:
        role = value["role"]
        if not isinstance(role, str) or not role.strip():
            raise InputError(f"column {column!r}: role {shown(role)} is unknown; use one of {_listed(KNOWN_ROLES)}")
        _check_content(value, column)
        return value
    if value.get("from") is not None:
        speaker, text = value["from"], value.get("value")
        if not isinstance(speaker, str) or speaker not in ROLES:
            raise InputError(f"column {column!r}: speaker {speaker!r} is unknown; use one of {_listed(ROLES)}")
        if not isinstance(text, str):
            raise InputError(f"column {column!r}: 'value' of {shown(value)} is not text; give what {speaker!r} says")
        return {"role": ROLES[speaker], "content": text}
    raise InputError(
        f"column {column!r}: {shown(value)} is not a message; a message has the keys 'role' and 'content' "
        "(or 'from' and 'value')"
    )


def _check_content(message: Message, column: str) -> None:
    """Refuse a content that is neither text nor parts of text, and calls of tools that are no list of dicts."""
    content, calls, is_result = message.get("content"), message.get("tool_calls"), message["role"] in _RESULTS
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise InputError(f"column {column!r}: 'tool_calls' is {shown(calls)}; give a list of dicts")
    if content is None and any(message.get(key) for key in _INSTEAD):
        return
    parts = content if isinstance(content, list) else [content] if isinstance(content, dict) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(kind, str) and any(media in kind for media in _MEDIA):
            raise InputError(
                f"column {column!r}: a message holds a part of type {kind!r}, and images, audio, video and files are "
                "not supported; leave such rows out to train on text"
            )
        if not is_result and (kind not in _TEXT_PARTS or not isinstance(part.get(kind), str)):
            raise InputError(
                f"column {column!r}: a message holds the part {shown(part)}; give parts as "
                "{'type': 'text', 'text': …}, or the content as text"
            )
    if not isinstance(content, str | list) and not (is_result and isinstance(content, dict)):
        raise InputError(
            f"column {column!r}: the content of a message of {message['role']!r} is {shown(content)}; give text"
        )


def _listed(names: Any) -> str:
    return ", ".join(sorted(names))
