"""The sequences and the scored tokens of our groups are those that TRL 1.16 prepares, for every format that it has."""

import copy
import json
from types import SimpleNamespace

import pytest
from datasets import Dataset

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.data.prepare import prepare_dataset
from tiny_tokenizers import byte_tokenizer

trl = pytest.importorskip("trl")
from trl.trainer.dpo_trainer import DataCollatorForPreference  # noqa: E402

TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}


def say(role, content):
    return {"role": role, "content": content}


QUESTION = [say("system", "Be brief."), say("user", "What is the tallest mountain, and where is it?")]
GOOD, BAD = [say("assistant", "Everest, in Nepal.")], [say("assistant", "I would rather not say, sorry.")]
TURNS = [say("assistant", "Which planet?"), say("user", "Mars."), say("assistant", "Olympus Mons.")]

STANDARD = [
    {"prompt": "The sky is", "chosen": " blue.", "rejected": " green, I think."},
    {"prompt": "", "chosen": "No prompt at all", "rejected": "None"},
    {"prompt": "A prompt that is longer than every limit of these tests", "chosen": " yes", "rejected": " no"},
    {"prompt": "Ends in a", "chosen": "b</s>", "rejected": "c"},
    {"prompt": "Equal excess:", "chosen": " 1234567890", "rejected": " 0987654321"},
]
STANDARD_IMPLICIT = [
    {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    {"chosen": "One is a prefix", "rejected": "One is a prefix of the other, which goes on"},
    {"chosen": "nothing shared", "rejected": "at all"},
    {
        "chosen": "A beginning that is longer than the limits, x",
        "rejected": "A beginning that is longer than the limits, y",
    },
]
CONVERSATIONAL = [
    {"prompt": QUESTION, "chosen": GOOD, "rejected": BAD},
    {"prompt": [say("user", "Hi")], "chosen": TURNS, "rejected": BAD},
    {"prompt": [say("user", "Hi"), say("assistant", "So")], "chosen": GOOD, "rejected": BAD},
]
CONVERSATIONAL_IMPLICIT = [
    {"chosen": QUESTION + GOOD, "rejected": QUESTION + BAD},
    {"chosen": QUESTION + TURNS, "rejected": QUESTION + TURNS + [say("user", "Thanks")]},
]
FORMATS = {
    "standard": STANDARD,
    "standard, implicit prompt": STANDARD_IMPLICIT,
    "conversational": CONVERSATIONAL,
    "conversational, implicit prompt": CONVERSATIONAL_IMPLICIT,
    "tools": [{**row, "tools": [TOOL]} for row in CONVERSATIONAL],
    "tools as JSON": [{**row, "tools": json.dumps([TOOL])} for row in CONVERSATIONAL],
    "template arguments": [
        {**row, "chat_template_kwargs": {"style": style, "thinking": style == "terse"}}
        for row, style in zip(CONVERSATIONAL, ["terse", "formal", "terse"], strict=True)
    ],
}
TOKENIZERS = {
    "plain": byte_tokenizer(),
    "bos": byte_tokenizer(bos=True),
    "merging over the boundary": byte_tokenizer(merges=("ab", "ĠĠ", "sĠ", "|>")),
}


def trl_sequences(rows, tokenizer, max_length, truncation_mode):
    """(token ids, positions of the scored tokens) of the chosen and the rejected sequence of each row.

    A pair that is cut to twice the same sequence teaches nothing: TRL trains on it, we drop it.
    """
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode=truncation_mode)
    dataset = trl.DPOTrainer._prepare_dataset(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(copy.deepcopy(rows)), tokenizer, args, "train"
    )
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length, truncation_mode=truncation_mode)
    sequences = []
    for row in dataset:
        batch = collate([row])
        if batch["input_ids"][0].equal(batch["input_ids"][1]):
            continue
        for ids, tokens, scored in zip(
            batch["input_ids"].tolist(),
            batch["attention_mask"].tolist(),
            batch["completion_mask"].tolist(),
            strict=True,
        ):
            # The model's first token is predicted by nothing: TRL shifts it away.
            sequences.append((ids[: sum(tokens)], [t for t, mask in enumerate(scored) if mask and t > 0]))
    return sequences


def our_sequences(rows, tokenizer, max_length, truncation_mode):
    dataset, _ = prepare_dataset(
        Dataset.from_list(rows), tokenizer, max_length=max_length, truncation_mode=truncation_mode
    )
    sequences = []
    for row in dataset:
        assert row["comparisons"] == [[0, 1]]
        batch = pack([PreferenceGroup.from_row(row)], layout="padded")
        width = batch.input_ids.shape[1]
        score_rows, starts = batch.score_rows.index.tolist(), batch.cu_scores.tolist()
        for k, ids in enumerate(batch.input_ids.tolist()):
            scored = [index - k * width + 1 for index in score_rows[starts[k] : starts[k + 1]]]
            assert [ids[t] for t in scored] == batch.targets[starts[k] : starts[k + 1]].tolist()
            sequences.append((ids[: int(batch.attention_mask[k].sum())], scored))
    return sequences


@pytest.mark.parametrize("max_length", [None, 72, 30, 12])
@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
@pytest.mark.parametrize("rows", FORMATS.values(), ids=FORMATS)
def test_sequences_and_scored_tokens_are_trls(rows, tokenizer, truncation_mode, max_length):
    expected = trl_sequences(rows, tokenizer, max_length, truncation_mode)
    if not expected:
        with pytest.raises(ValueError, match="none of the .* rows"):
            our_sequences(rows, tokenizer, max_length, truncation_mode)
        return
    assert our_sequences(rows, tokenizer, max_length, truncation_mode) == expected
