"""Text that brings along the BOS or EOS token that is added to it is trained as it is, as TRL does, and said once."""

from __future__ import annotations

import logging

import pytest
from datasets import Dataset

from dpo_fast.data.prepare import prepare
from tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer(bos=True)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
TURN_BOS = byte_tokenizer(
    bos=True,
    chat_template="{% for message in messages %}{% if message.role == 'user' %}<s>[{{ message.content }}]"
    "{% else %}{{ message.content }}</s>{% endif %}{% endfor %}",
)


def say(role, content):
    return {"role": role, "content": content}


def pair(prompt, chosen="yes", rejected="no"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def chat(prompt, chosen="yes", before=()):
    return pair([*before, say("user", prompt)], [say("assistant", chosen)], [say("assistant", "no")])


def ids(prompt, chosen):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": [5, EOS]}


TURNS = (say("user", "Hi"), say("assistant", "Yes?"))
# row, tokenizer, whether BOS and EOS occur twice
CASES = {
    "text": (pair("Go"), TOKENIZER, False, False),
    "text with BOS": (pair("<s>Go"), TOKENIZER, True, False),
    "text with BOS that nothing is added to": (pair("<s>Go"), byte_tokenizer(), False, False),
    "text with BOS in the middle": (pair("Write <s> here"), TOKENIZER, True, False),
    "text with EOS": (pair("Go", "yes</s>"), TOKENIZER, False, False),
    "text with EOS and a line": (pair("Go", "yes</s>\n"), TOKENIZER, False, True),
    "text with EOS twice": (pair("Go", "yes", "no</s></s>"), TOKENIZER, False, True),
    "the whole text": ({"chosen": "<s>Go yes", "rejected": "<s>Go no"}, TOKENIZER, True, False),
    "ranked text": (
        {"prompt": "Go", "completions": ["a", "b</s> ", "c"], "scores": [1.0, 2.0, 3.0]},
        TOKENIZER,
        False,
        True,
    ),
    "chat": (chat("Go"), TOKENIZER, False, False),
    "chat of turns": (chat("Go", before=TURNS), TURN_BOS, False, False),
    "chat with EOS": (chat("Go", "yes</s>"), TOKENIZER, False, True),
    "chat with BOS": (chat("<s>Go"), TURN_BOS, True, False),
    "chat of turns with BOS": (chat("<s>Go", before=TURNS), TURN_BOS, True, False),
    "tokens": (ids([BOS, 4], [6, EOS]), TOKENIZER, False, False),
    "tokens with BOS twice": (ids([BOS, BOS, 4], [6, EOS]), TOKENIZER, True, False),
    "tokens with EOS twice": (ids([BOS, 4], [6, EOS, EOS]), TOKENIZER, False, True),
    "tokens without a prompt": (ids([], [BOS, BOS, 6, EOS]), TOKENIZER, True, False),
}


@pytest.mark.parametrize(("row", "tokenizer", "bos", "eos"), CASES.values(), ids=CASES)
def test_a_token_that_occurs_twice_is_counted(row, tokenizer, bos, eos):
    groups, summary = prepare(Dataset.from_list([row, row]), tokenizer, max_length=None)
    assert (summary.repeated_bos, summary.repeated_eos) == (2 * bos, 2 * eos)
    assert summary.is_notable == (bos or eos)
    assert ("2 rows hold the BOS token more often" in str(summary)) == bos
    assert ("2 rows hold the EOS token more often" in str(summary)) == eos
    again = prepare(groups, tokenizer, max_length=None)[1]
    assert (again.repeated_bos, again.repeated_eos) == (2 * bos, 2 * eos), "prepared groups are looked at too"


def test_rows_that_train_are_counted_before_they_are_cut():
    rows = [pair("Go", "a long answer</s>\n"), pair("<s>" + "long" * 9), pair("Go")]
    _, summary = prepare(Dataset.from_list(rows), TOKENIZER, max_length=8)
    assert (summary.groups, summary.repeated_bos, summary.repeated_eos) == (2, 0, 1)


def test_a_tokenizer_whose_bos_is_its_eos_repeats_neither():
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.bos_token = "</s>"
    _, summary = prepare(Dataset.from_list([chat("Go</s>", before=TURNS)]), tokenizer, max_length=None)
    assert (summary.repeated_bos, summary.repeated_eos) == (0, 0)


def test_a_stream_says_it_once(caplog):
    rows = Dataset.from_list([pair("Go"), *[pair("<s>Go", "yes</s>\n")] * 100])
    with caplog.at_level(logging.WARNING):
        stream = prepare(rows.to_iterable_dataset(), TOKENIZER, max_length=None, name="held")[0]
        assert not caplog.records and len(list(stream)) == len(list(stream)) == 101
    (message,) = [record.getMessage() for record in caplog.records]
    assert "held stream: a row holds the BOS and the EOS token more often" in message
