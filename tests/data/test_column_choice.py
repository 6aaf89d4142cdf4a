"""Every column that may belong to the prompt is read, or refused by name; what is left out is named.

The rows have the columns of datasets that people train on.
"""

from __future__ import annotations

import pytest
from datasets import Dataset, IterableDataset

from dpo_fast.data.formats import PREPARED
from dpo_fast.data.prepare import prepare
from tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


def say(role, content):
    return {"role": role, "content": content}


ANSWERS = {"chosen": " four", "rejected": " five"}
MESSAGES = {"chosen": [say("assistant", "four")], "rejected": [say("assistant", "five")]}
ASKED = [say("user", "2+2?")]
WHOLE = {"chosen": ASKED + MESSAGES["chosen"], "rejected": ASKED + MESSAGES["rejected"]}
TEXT = ("2+2?", [" four</s>", " five</s>"])
NINE = ("2+2?", [" four</s>", " nine</s>"])
CHAT = ("<|user|>2+2?</s>\n<|assistant|>", ["four</s>\n", "five</s>\n"])
BRIEF = ("<|system|>Be brief.</s>\n" + CHAT[0], CHAT[1])
SPOKEN = ("<|system|>Be brief.</s>\n" + CHAT[0], [" four</s>\n", " five</s>\n"])
RANKED = {"completions": [" four", " five"], "scores": [1.0, 0.0]}


def groups(rows, columns=None, stream=False):
    dataset = Dataset.from_list(rows)
    if stream:
        dataset = IterableDataset.from_generator(lambda: iter(rows))
    return prepare(dataset, TOKENIZER, max_length=None, columns=columns)


def texts(row):
    return TOKENIZER.decode(row["prompt_ids"]), [TOKENIZER.decode(ids) for ids in row["completion_ids"]]


# name: row, what is made of it, what is read as what, what is left out
READ = {
    "a question": ({"question": "2+2?", **ANSWERS}, TEXT, {"prompt": "question"}, ()),
    "an instruction": ({"instruction": "2+2?", **ANSWERS, "id": 7}, TEXT, {"prompt": "instruction"}, ("id",)),
    "a query": ({"query": "2+2?", **ANSWERS}, TEXT, {"prompt": "query"}, ()),
    "an input": ({"input": "2+2?", **ANSWERS, "status": "won"}, TEXT, {"prompt": "input"}, ("status",)),
    "a context": ({"context": "2+2?", **ANSWERS}, TEXT, {"prompt": "context"}, ()),
    "a question of ranked answers": ({"question": "2+2?", **RANKED}, TEXT, {"prompt": "question"}, ()),
    "a question of messages": ({"question": "2+2?", **MESSAGES}, CHAT, {"prompt": "question"}, ()),
    "distilabel math": (
        {"metadata": "m", "instruction": "2+2?", "chosen_response": " four", "chosen_rating": 5.0}
        | {"rejected_response": " five", "rejected_rating": 1.0},
        TEXT,
        {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"},
        ("metadata", "chosen_rating", "rejected_rating"),
    ),
    "HH-RLHF": ({"chosen": "2+2? four", "rejected": "2+2? nine"}, NINE, {}, ()),
    "HH-RLHF with the question beside it": (
        {"question": "2+2?", "chosen": "2+2? four", "rejected": "2+2? nine"},
        NINE,
        {},
        ("question",),
    ),
    "UltraFeedback": (
        {"prompt": "2+2?", "prompt_id": "x", **WHOLE, "messages": WHOLE["chosen"], "score_chosen": 8.0},
        CHAT,
        {},
        ("prompt_id", "messages", "score_chosen"),
    ),
    "a mix with its question twice": (
        {"source": "s", **WHOLE, "prompt": "2+2?", "question": "2+2?"},
        CHAT,
        {},
        ("source", "question"),
    ),
    "a prompt made of its parts": (
        {"prompt": "Task: 2+2?", "instruction": "2+2?", "input": "2+2", **ANSWERS},
        ("Task: 2+2?", TEXT[1]),
        {},
        ("instruction", "input"),
    ),
    "a system text beside messages": ({"system": "Be brief.", "question": "2+2?", **MESSAGES}, BRIEF)
    + ({"prompt": "question"}, ()),
    "a system text beside whole conversations": ({"system": "Be brief.", **WHOLE}, BRIEF, {}, ()),
    "a system text of another name": (
        {"system_prompt": "Be brief.", "prompt": ASKED, **MESSAGES},
        BRIEF,
        {"system": "system_prompt"},
        (),
    ),
    "a system text that the conversation has": (
        {"system": "Be brief.", "prompt": [say("system", "Be brief."), *ASKED], **MESSAGES},
        BRIEF,
        {},
        ("system",),
    ),
    "numbers of that name": ({"prompt": "2+2?", "input": 3, "context": [1.0], **ANSWERS}, TEXT, {})
    + (("input", "context"),),
    "names of no meaning": (
        {"prompt": "2+2?", **ANSWERS, "source": "web", "category": "math", "labelling_prompt": [say("user", "Rate")]},
        TEXT,
        {},
        ("source", "category", "labelling_prompt"),
    ),
    "tokens": ({"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3], "prompt": "a", "question": "b"},)
    + ((TOKENIZER.decode([1]), [TOKENIZER.decode([2]), TOKENIZER.decode([3])]), {})
    + (("prompt", "question"),),
}


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize(("row", "expected", "mapped", "ignored"), READ.values(), ids=READ)
def test_what_has_one_reading_is_read_so(row, expected, mapped, ignored, stream, caplog):
    with caplog.at_level("INFO"):
        rows, summary = groups([row, row], stream=stream)
    assert [texts(group) for group in rows] == [expected] * 2
    if summary is not None:
        assert (summary.mapped, set(summary.ignored)) == (mapped, set(ignored))
    told = str(summary) if summary is not None else caplog.text
    for ours, theirs in mapped.items():
        assert f"column {theirs!r} is read as {ours!r}" in told
    if ignored:
        assert told.count("columns that are not read: ") == 1
        assert set(told.split("columns that are not read: ")[1].splitlines()[0].split(", ")) == set(ignored)


# row, columns that the message names, a cure that it shows, what the cure makes of the row
REFUSED = {
    "Alpaca": (
        {"instruction": "2+2?", "input": "in base 3", "output": "o", **ANSWERS},
        ["'instruction'", "'input'"],
        {"prompt": "instruction"},
        TEXT,
    ),
    "a context beside a question": (
        {"context": "Numbers.", "question": "2+2?", **ANSWERS},
        ["'context'", "'question'"],
        {"prompt": "question"},
        TEXT,
    ),
    "a context beside a prompt": (
        {"context": "Numbers.", "prompt": "2+2?", **ANSWERS},
        ["'context'"],
        {"prompt": "prompt"},
        TEXT,
    ),
    "a history of turns": (
        {"history": [["Hi", "Hello"]], "instruction": "2+2?", **ANSWERS},
        ["'history'", "'instruction'"],
        {"prompt": "instruction"},
        TEXT,
    ),
    "Intel's Orca pairs": (
        {"system": "Be brief.", "question": "2+2?", **ANSWERS},
        ["'system'"],
        {"prompt": "question", "system": "system"},
        SPOKEN,
    ),
    "Intel's Orca pairs without the system text": (
        {"system": "Be brief.", "question": "2+2?", **ANSWERS},
        ["'system'"],
        {"prompt": "question"},
        TEXT,
    ),
    "truthy": (
        {"id": "1", "system": "Be brief.", "prompt": "2+2?", **ANSWERS},
        ["'system'"],
        {"prompt": "prompt", "system": "system"},
        SPOKEN,
    ),
    "two system texts": (
        {"system": "Be brief.", "system_prompt": "Be kind.", "prompt": ASKED, **MESSAGES},
        ["'system'", "'system_prompt'"],
        {"prompt": "prompt", "system": "system"},
        BRIEF,
    ),
    "a conversation, which may end in an answer": (
        {"messages": ASKED, **MESSAGES},
        ["'messages'"],
        {"prompt": "messages"},
        CHAT,
    ),
    "ranked": (
        {"prompt": "2+2?", "context": "Numbers.", **RANKED},
        ["'context'"],
        {"prompt": "prompt"},
        TEXT,
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+2?"}], "instruction": "Be kind.", **MESSAGES},
        ["'instruction'"],
        {"prompt": "conversations"},
        CHAT,
    ),
}


@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
@pytest.mark.parametrize(("row", "named", "cure", "expected"), REFUSED.values(), ids=REFUSED)
def test_what_has_several_readings_is_refused_with_a_cure_that_works(row, named, cure, expected, stream):
    with pytest.raises(ValueError, match="columns") as error:
        groups([row], stream=stream)
    message = str(error.value)
    assert all(name in message for name in named)
    assert "--columns " + " ".join(f"{ours}={theirs}" for ours, theirs in cure.items()) in message, message
    rows, _ = groups([row], cure, stream=stream)
    assert texts(next(iter(rows))) == expected


def test_given_columns_are_read_and_nothing_else():
    row = {"post": "2+2?", "response_j": " four", "response_k": " five", "prompt": "other", "sure": 0.5}
    columns = {"prompt": "post", "chosen": "response_j", "rejected": "response_k", "weight": "sure"}
    rows, summary = groups([row], columns)
    assert texts(rows[0]) == TEXT and rows[0]["comparison_weights"] == [0.5]
    assert summary.mapped == {} and summary.ignored == ("prompt",)
    swapped, _ = groups([{"prompt": "2+2?", **ANSWERS}], {"chosen": "rejected", "rejected": "chosen"})
    assert texts(swapped[0]) == ("2+2?", [" five</s>", " four</s>"])


def test_prepared_groups_have_been_read_already():
    prepared, _ = groups([{"question": "2+2?", **ANSWERS}])
    again, summary = groups(prepared.to_list(), {"prompt": "question"})
    assert again.to_list() == prepared.to_list() and set(prepared.column_names) <= set(PREPARED.columns)
    assert summary.ignored == ()


ROW = {"question": "2+2?", **ANSWERS}


@pytest.mark.parametrize(
    ("row", "columns", "message"),
    [
        (ROW, {"promt": "question"}, "columns: 'promt' is no column of any format; .*'prompt'"),
        (ROW, {"prompt": "questions"}, "columns: the train dataset has no column 'questions'.* chosen, question"),
        (ROW, {"prompt": "question", "system": "question"}, "columns: .* reads 'question' twice"),
        ({"system": "Be brief.", **ANSWERS}, {"system": "system"}, "system: .*no prompt"),
        ({"text": "a", "question": "b"}, None, "Rename the columns, .*--columns"),
    ],
)
def test_columns_that_cannot_be_given_are_refused(row, columns, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        groups([row], columns)


def test_a_column_that_is_empty_in_all_rows_is_left_out():
    empty = {"instruction": "2+2?", "input": " ", "history": [], "system": "", **ANSWERS}
    rows, summary = groups([empty] * 3)
    assert [texts(row) for row in rows] == [TEXT] * 3 and summary.ignored == ("input", "history", "system")
    with pytest.raises(ValueError, match="'input'"):
        groups([empty] * 200 + [{**empty, "input": "in base 3"}])


def test_a_first_row_without_text_hides_no_column():
    """A stream of unknown types shows its first row alone."""
    rows = [{"context": None, "prompt": "2+2?", **ANSWERS}, {"context": "Numbers.", "prompt": "2+2?", **ANSWERS}]
    for stream in (False, True):
        with pytest.raises(ValueError, match="'context'"):
            groups(rows, stream=stream)
