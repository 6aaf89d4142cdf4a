"""Rows of every format, and what can be wrong in them: the values of a table, each with what its message must say."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]


def say(role: Any, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


ASK, YES, NO = say("user", "Is it?"), say("assistant", "Yes."), say("assistant", "No.")
REFERENCE = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}
# A good row of each format.
GOOD: dict[str, Row] = {
    "text": {"prompt": "Is it", "chosen": " so?", "rejected": " not?", "weight": 2.0, "offset": 0.5, **REFERENCE},
    "implicit": {"chosen": "It is.", "rejected": "It was."},
    "messages": {"prompt": [ASK], "chosen": [YES], "rejected": [NO]},
    "system": {"prompt": [ASK], "chosen": "Yes.", "rejected": "No.", "system": "Be brief."},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "Is it?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "tools": {"prompt": [ASK], "chosen": [YES], "rejected": [NO], "tools": [{"name": "look"}]}
    | {"chat_template_kwargs": {"style": "terse"}},
    "ranked": {"prompt": "Q", "completions": ["a", "b", "c"], "scores": [1.0, 3.0, 2.0], "weight": 1.0},
    "ranks": {"prompt": "Q", "completions": ["a", "b"], "ranks": [2, 1]},
    "compared": {"prompt": "Q", "completions": ["a", "b"], "comparisons": [[1, 0]], "weights": [2.0]},
    "tokens": {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5], "weight": 1.0, "offset": 0.0}
    | REFERENCE,
    "groups": {
        "prompt_ids": [1, 2],
        "completion_ids": [[3, 4], [5], [6, 7, 8]],
        "comparisons": [[0, 1], [2, 1]],
        "comparison_weights": [1.0, 2.0],
        "context_lengths": [0, 0, 1],
        "ref_logps": [-1.0, -2.0, -3.0],
        "ref_token_logps": [[-1.0, -0.5], [-2.0], [-1.0, -2.0]],
        "comparison_offsets": [0.0, 0.5],
        "completion_scores": [3.0, 1.0, 2.0],
    },
}
NAN = math.nan
# No token ids, and how a message writes what is wrong.
NO_IDS = (
    (None, "None"),
    (5, "int 5"),
    ("abc", "str 'abc'"),
    ({"a": 1}, "dict {'a': 1}"),
    (1.5, "float 1.5"),
    (True, "bool True"),
    ([None], "None"),
    ([1, None], "None"),
    ([[1]], "[1]"),
    ([1.5], "1.5"),
    ([2.0], "2.0"),
    ([1, NAN], "nan"),
    ([True], "True"),
    (["7"], "'7'"),
    ([1, {"a": 1}], "{'a': 1}"),
    ([2**31], "2147483648"),
    ([1, 2**70], "1180591620717411303424"),
    ([-1], "token id -1"),
    ([300], "token id 300"),
)
NO_NUMBER = ((None, "None"), ("-1.5", "'-1.5'"), (NAN, "nan"), (math.inf, "inf"), (True, "True"), ([-1.5], "[-1.5]"))
NO_TEXT = ((None, "None"), (3, "3"), (2.5, "2.5"), (True, "True"), ([1], "[1]"), (["a"], "['a']"))
NO_CONTENT = (
    *(
        (None, "NoneType None"),
        (3, "int 3"),
        (True, "bool True"),
        (2.5, "float 2.5"),
        ([3], "int 3"),
        ({"a": 1}, "'a'"),
    ),
    *(
        ([{"type": "image", "url": "x"}], "'image'"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "'image_url'"),
    ),
    *(([{"type": "input_audio", "input_audio": {}}], "'input_audio'"), ([{"type": "video", "video": 1}], "'video'")),
    *(([{"type": "text", "text": "a"}, {"type": "image"}], "'image'"), ([{"type": "text"}], "{'type': 'text'}")),
    *(([{"type": "text", "text": 3}], "'text': 3"), ([{"text": "a"}], "'text': 'a'"), ([{"type": 3}], "'type': 3")),
    ([{"type": "text", "text": "a"}], "as it is"),  # the template of these tests writes no parts
)
NO_ARGUMENT = {
    "tokenize": False,
    "return_dict": False,
    "return_tensors": "pt",
    "padding": True,
    "truncation": True,
    "max_length": 3,
    "add_generation_prompt": True,
    "continue_final_message": True,
    "return_assistant_tokens_mask": True,
    "conversation": "x",
    "tokenizer_kwargs": {"a": 1},
}


def bad_rows() -> Iterator[tuple[str, str, Row, tuple[str, ...]]]:
    """Yield what is wrong, the format, the row, and words of the message."""

    def case(form: str, column: str, value: Any, *words: str, **more: Any) -> tuple[str, str, Row, tuple[str, ...]]:
        return f"{form}: {column} = {value!r:.50}", form, {**GOOD[form], column: value, **more}, (column, *words)

    for column in ("prompt_ids", "chosen_ids", "rejected_ids"):
        yield from (case("tokens", column, value, said) for value, said in NO_IDS)
    yield from (case("groups", "prompt_ids", value, said) for value, said in NO_IDS)
    for value, said in NO_IDS:
        yield case("groups", "completion_ids", [[3, 4], value, [6, 7, 8]], said)
    for form, columns in {"text": ("chosen", "rejected", "prompt"), "implicit": ("chosen", "rejected")}.items():
        yield from (case(form, column, value, said) for column in columns for value, said in NO_TEXT)
    for form, numbers in {"text": ("weight", "offset", *REFERENCE), "tokens": ("weight", "offset", *REFERENCE)}.items():
        yield from (case(form, column, value, said) for column in numbers for value, said in NO_NUMBER)
    for column in REFERENCE:
        yield from (case("tokens", column, value, f"{value} is above 0") for value in (0.5, 17, 1e9))
    yield case("text", "weight", -1.0, "-1.0", "0 or more")

    numbers = ("ref_logps", "completion_scores")
    yield from (case("groups", column, [-1.0, value, -3.0], said) for column in numbers for value, said in NO_NUMBER)
    numbers = ("comparison_weights", "comparison_offsets")
    yield from (case("groups", column, [1.0, value], said) for column in numbers for value, said in NO_NUMBER)
    for value, said in NO_NUMBER:
        yield case("groups", "ref_token_logps", [[-1.0, value], [-2.0], [-1.0, -2.0]], said)
    for column in ("comparisons", "comparison_weights", "context_lengths", "ref_logps", "comparison_offsets"):
        yield from (case("groups", column, value, said) for value, said in ((7, "int 7"), ("x", "str 'x'"), ({}, "{}")))
    yield case("groups", "comparisons", None, "missing")
    yield case("groups", "ref_logps", None, "missing")
    yield case("groups", "ref_logps", [-1.0, 2.0, -3.0], "2.0 is above 0")
    yield case("groups", "ref_token_logps", [[-1.0, 0.5], [-2.0], [-1.0, -2.0]], "0.5 is above 0")
    yield case("groups", "ref_token_logps", [[-1.0], [-2.0, -0.5], [-1.0, -2.0]], "1 numbers for the 2 scored tokens")
    yield case("groups", "ref_token_logps", [[-1.0, -0.5], [-2.0]], "holds 2 for 3 completions")
    yield case("groups", "comparison_weights", [1.0, 2.0, 3.0], "holds 3 for 2 comparisons")
    yield case("groups", "comparison_weights", [1.0, -2.0], "-2.0", "0 or more")
    yield case("groups", "comparison_offsets", [], "holds 0 for 2 comparisons")
    yield case("groups", "completion_scores", [1.0], "holds 1 for 3 completions")
    yield case("groups", "context_lengths", [0, 0], "holds 2 for 3 completions")
    yield case("groups", "context_lengths", [0, -1, 1], "-1 is not from 0 to the 1 tokens of completion 1")
    yield case("groups", "context_lengths", [0, 2, 1], "2 is not from 0 to the 1 tokens of completion 1")
    yield case("groups", "context_lengths", [0, 0.5, 1], "0.5")
    for pair in ([0, 3], [-1, 0], [1, 1], [0], [0, 1, 2], []):
        yield case("groups", "comparisons", [[0, 1], pair], f"{pair} is not")
    for pair, said in (
        ([0, None], "None"),
        ([0, "1"], "'1'"),
        ([True, False], "True"),
        ([0.0, 1.0], "0.0"),
        (1, "int 1"),
    ):
        yield case("groups", "comparisons", [[0, 1], pair], said)
        yield case("compared", "comparisons", [pair], said.removeprefix("int "))
    for pair in ([0, 2], [-1, 0], [1, 1], [0], [0, 1, 0]):
        yield case("compared", "comparisons", [pair], f"{pair} is not")
    yield case("compared", "comparisons", [[0, 1], [1, 0]], "contradict", weights=[1.0, 1.0])
    yield case("compared", "comparisons", None, "None")
    yield case("compared", "weights", [1.0, 2.0], "2")
    yield from (case("compared", "weights", [value], said) for value, said in NO_NUMBER)

    yield from (case("ranked", "scores", [1.0, value, 0.0], said) for value, said in NO_NUMBER if value is not True)
    yield from (case("ranks", "ranks", [1, value], said) for value, said in NO_NUMBER)
    for value, said in ((None, "None"), ([], "0"), ([1.0], "1"), ("abc", "'abc'"), (3, "int 3")):
        yield case("ranked", "scores", value, said, "3 completions")
    for value, said in ((None, "None"), ("ab", "'ab'"), (["a"], "['a']"), ([], "[]")):
        yield case("ranked", "completions", value, said)
    yield from (case("ranked", "completions", ["a", value, "c"], said) for value, said in NO_TEXT[:4])

    for value, said in NO_CONTENT:
        yield (
            case("messages", "prompt", [say("user", value)], said)
            if said != "as it is"
            else (
                "parts as they are",
                "messages",
                {**GOOD["messages"], "prompt": [say("user", value)]},
                ("messages", said),
            )
        )
        if said != "as it is":
            yield case("messages", "chosen", [say("assistant", value)], said)
    for role, said in ((3, "int 3"), (True, "bool True"), ("", "str ''"), ([], "list []")):
        yield case("messages", "prompt", [say(role, "a")], f"role {said}")
    for role in ("usr", "human", "Assistant"):
        yield (
            f"role {role}",
            "messages",
            {**GOOD["messages"], "prompt": [say(role, "a")]},
            ("messages", f"role '{role}'"),
        )
    for message in ({"role": "user"}, {"content": "a"}, {"text": "a"}, {}, {"role": None, "content": "a"}):
        yield case("messages", "prompt", [message], "content")
    yield case("messages", "rejected", [say("assistant", "", tool_calls="look()")], "tool_calls", "str 'look()'")
    yield case("messages", "rejected", [say("assistant", "", tool_calls=[1])], "tool_calls", "[1]")
    for value, said in (
        (None, "None"),
        (3, "int 3"),
        ([1], "[1]"),
        ([[ASK]], "[[{"),
        ([ASK, "b"], "'b'"),
        ([None], "None"),
    ):
        yield case("messages", "chosen", value, said)
        yield case("messages", "prompt", value, said)
    for message, said in (
        ({"from": "bot", "value": "a"}, "speaker 'bot'"),
        ({"from": 3, "value": "a"}, "speaker 3"),
        ({"from": "gpt"}, "'value'"),
        ({"from": "gpt", "value": None}, "'value'"),
        ({"from": "gpt", "value": 3}, "'value': 3"),
        ({"from": "gpt", "value": ["a"]}, "'value': ['a']"),
    ):
        yield case("sharegpt", "chosen", message, said)
        yield case("sharegpt", "conversations", [message], said)
    yield from (case("system", "system", value, said) for value, said in ((3, "int 3"), ([1], "[1]"), (True, "True")))

    for value, said in (
        (3, "int 3"),
        ("[", "JSON"),
        ("42", "int 42"),
        ('{"a": 1}', "dict"),
        ("[1]", "[1]"),
        ([1], "[1]"),
        (["look"], "['look']"),
        ("[" * 5000, "JSON"),
        ({"a": 1}, "dict"),
        (True, "bool True"),
    ):
        yield case("tools", "tools", value, said)
    for value, said in (("x", "str 'x'"), ([1], "[1]"), (3, "int 3"), ({1: 2}, "{1: 2}"), (False, "bool False")):
        yield case("tools", "chat_template_kwargs", value, said)
    for name, value in NO_ARGUMENT.items():
        yield case("tools", "chat_template_kwargs", {name: value}, f"'{name}' ({value!r})")
    other = {**GOOD["tools"], "chat_template_kwargs": {"tools": "x"}}
    yield "tools among the arguments", "tools", other, ("'tools'", "str 'x'")
    broken = {**GOOD["tools"], "chat_template_kwargs": {"chat_template": "{% if"}}
    yield "a broken template", "tools", broken, ("chat template failed",)
