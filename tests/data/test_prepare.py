"""Rows of every format become the same groups, truncation and merging keep their laws, and what is lost is counted.

The tokenizers are byte-level, so ids can be written as text: `text(ids)` reads them back.
"""

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.data.columns import COLUMNS, with_defaults
from dpo_fast.data.formats import comparisons_from_scores
from dpo_fast.data.loading import load_preference_dataset
from dpo_fast.data.prepare import DataSummary, prepare_dataset
from dpo_fast.data.tokenization import TokenizeRows
from dpo_fast.data.truncation import truncate
from tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()
PAIR = {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}


def prepare(rows, tokenizer=TOKENIZER, *, max_length=None, **options):
    dataset = rows if isinstance(rows, Dataset) else Dataset.from_list(rows)
    return prepare_dataset(dataset, tokenizer, max_length=max_length, **options)


def text(ids):
    return TOKENIZER.decode(ids)


def texts(row):
    return text(row["prompt_ids"]), [text(ids) for ids in row["completion_ids"]]


def say(role, content):
    return {"role": role, "content": content}


def tokenized(prompt, chosen, rejected, **more):
    return {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected, **more}


# Formats


def test_plain_text_gets_the_end_of_sequence_once():
    rows, _ = prepare([PAIR, {**PAIR, "chosen": " blue.</s>"}])
    assert [texts(row) for row in rows] == [("The sky is", [" blue.</s>", " green.</s>"])] * 2
    assert rows[0]["completion_ids"][0][-1] == TOKENIZER.eos_token_id


def test_an_implicit_text_prompt_ends_before_the_space():
    rows, _ = prepare([{"chosen": "The sky is blue.", "rejected": "The sky is green."}])
    assert texts(rows[0]) == ("The sky is", [" blue.</s>", " green.</s>"])


def test_an_implicit_prompt_may_be_absent():
    rows, _ = prepare([{"chosen": "yes ", "rejected": "no"}])
    assert texts(rows[0]) == ("", ["yes </s>", "no</s>"])


QUESTION, YES, NO = say("user", "Is it?"), say("assistant", "Yes."), say("assistant", "No.")
SYSTEM = say("system", "Be brief.")
CONVERSATIONS = {
    "explicit": {"prompt": [SYSTEM, QUESTION], "chosen": [YES], "rejected": [NO]},
    "implicit": {"chosen": [SYSTEM, QUESTION, YES], "rejected": [SYSTEM, QUESTION, NO]},
    "single messages": {"prompt": [SYSTEM, QUESTION], "chosen": YES, "rejected": NO},
    "text answers": {"prompt": [SYSTEM, QUESTION], "chosen": "Yes.", "rejected": "No."},
    "prompt repeated as text": {
        "prompt": "Is it?",
        "chosen": [SYSTEM, QUESTION, YES],
        "rejected": [SYSTEM, QUESTION, NO],
    },
    "ShareGPT": {
        "conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Is it?"}],
        "chosen": {"from": "gpt", "value": "Yes."},
        "rejected": {"from": "gpt", "value": "No."},
    },
    "ShareGPT with text and a system column": {
        "conversations": [{"from": "human", "value": "Is it?"}],
        "system": "Be brief.",
        "tools": "",
        "chosen": "Yes.",
        "rejected": "No.",
    },
    "scores": {"prompt": [SYSTEM, QUESTION], "completions": [[YES], [NO]], "scores": [0.5, -1.0]},
    "ranks": {"prompt": [SYSTEM, QUESTION], "completions": ["Yes.", "No."], "ranks": [1, 2]},
}


@pytest.mark.parametrize("row", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_every_spelling_of_a_conversation_gives_the_same_group(row):
    rows, _ = prepare([row])
    assert texts(rows[0]) == (
        "<|system|>Be brief.</s>\n<|user|>Is it?</s>\n<|assistant|>",
        ["Yes.</s>\n", "No.</s>\n"],
    )
    assert rows[0]["comparisons"] == [[0, 1]]


def test_a_text_prompt_of_assistant_messages_is_the_user_speaking():
    rows, _ = prepare([{"prompt": "Is it?", "chosen": [YES], "rejected": [NO]}])
    assert texts(rows[0])[0] == "<|user|>Is it?</s>\n<|assistant|>"


def test_sharegpt_roles():
    turns = [("human", "1+1?"), ("function_call", "add"), ("observation", "2")]
    row = {
        "conversations": [{"from": speaker, "value": value} for speaker, value in turns],
        "chosen": {"from": "gpt", "value": "Two"},
        "rejected": {"from": "gpt", "value": "Three"},
    }
    rows, _ = prepare([row])
    assert texts(rows[0])[0] == "<|user|>1+1?</s>\n<|assistant|>add</s>\n<|tool|>2</s>\n<|assistant|>"


def test_keys_that_arrow_fills_with_none_do_not_reach_the_template():
    row = {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]}
    # keys in the order of the alphabet, which older releases of Arrow put them into
    tool_call = {"role": "assistant", "content": "", "tool_calls": [{"arguments": {"where": "up"}, "name": "look"}]}
    dataset = Dataset.from_list(
        [
            {**row, "tools": [{"name": "a", "x": 1}], "chat_template_kwargs": {"style": "terse"}},
            {
                **row,
                "prompt": [QUESTION, tool_call],
                "tools": [{"name": "b"}],
                "chat_template_kwargs": {"thinking": True},
            },
            {**row, "tools": None, "chat_template_kwargs": None},
        ]
    )
    assert dataset[1]["chat_template_kwargs"]["style"] is None, "the case under test"
    rows, _ = prepare(dataset)
    assert [texts(row)[0] for row in rows] == [
        '<tools>[{"name": "a", "x": 1}]</tools><style>terse</style><|user|>Is it?</s>\n<|assistant|>',
        '<tools>[{"name": "b"}]</tools><|user|>Is it?</s>\n'
        '<|assistant|>[{"arguments": {"where": "up"}, "name": "look"}]</s>\n<|assistant|>',
        "<|user|>Is it?</s>\n<|assistant|>",
    ]


def test_a_ranked_row_gives_all_comparisons_without_ties():
    row = {"prompt": "Q", "completions": ["a", "b", "c", "d"], "scores": [1.0, 3.0, 1.0, 2.0]}
    rows, summary = prepare([row])
    assert texts(rows[0]) == ("Q", ["a</s>", "b</s>", "c</s>", "d</s>"])
    assert sorted(map(tuple, rows[0]["comparisons"])) == [(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]
    assert (summary.completions, summary.comparisons) == (4, 5)


@given(st.lists(st.integers(-3, 3), min_size=2, max_size=7))
def test_comparisons_are_exactly_the_unequal_pairs_higher_first(scores):
    pairs = comparisons_from_scores(scores)
    expected = {(i, j) for i in range(len(scores)) for j in range(len(scores)) if scores[i] > scores[j]}
    assert set(pairs) == expected and len(pairs) == len(expected)


# Boundary


def test_a_token_that_merges_over_the_boundary_belongs_to_the_completions(caplog):
    tokenizer = byte_tokenizer(merges=("ab",))
    rows, _ = prepare([{"prompt": "a", "chosen": "b", "rejected": "c"}, PAIR, {**PAIR, "prompt": "a"}], tokenizer)
    merged = tokenizer.convert_tokens_to_ids("ab")
    assert rows[0]["prompt_ids"] == [] and rows[0]["completion_ids"][0][0] == merged
    assert text(rows[1]["prompt_ids"]) == "The sky is"
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1 and "in 1 of 3 rows" in warnings[0] and "'a'" in warnings[0]


def test_the_end_of_a_generation_prompt_that_the_conversation_drops_is_left_out(caplog):
    row = {"prompt": [QUESTION], "chosen": [YES], "rejected": [NO], "chat_template_kwargs": {"thinking": False}}
    rows, _ = prepare([row])
    assert texts(rows[0]) == ("<|user|>Is it?</s>\n<|assistant|>", ["Yes.</s>\n", "No.</s>\n"])
    assert "<none>" in caplog.text


# Truncation

ids = st.lists(st.integers(0, 255), min_size=1, max_size=12)


@st.composite
def groups(draw):
    prompt = draw(st.lists(st.integers(0, 255), max_size=12))
    completions = draw(st.lists(ids, min_size=2, max_size=4))
    contexts = [draw(st.integers(0, len(completion) - 1)) for completion in completions]
    contexts = draw(st.sampled_from([None, contexts]))
    return with_defaults(
        {"prompt_ids": prompt, "completion_ids": completions, "comparisons": [(0, 1)], "context_lengths": contexts}
    )


def sequences(group):
    """(tokens, index of the first completion token) of every completion, whatever way the group stores them."""
    start = len(group["prompt_ids"])
    pairs = zip(group["completion_ids"], group["context_lengths"], strict=True)
    return [([*group["prompt_ids"], *ids], start + context) for ids, context in pairs]


@given(groups(), st.integers(2, 30))
def test_keep_end_keeps_the_last_tokens_of_every_sequence(group, max_length):
    cut = truncate(group, max_length, "keep_end")
    for (whole, start), (kept, kept_start) in zip(sequences(group), sequences(cut), strict=True):
        assert kept == whole[-max_length:]
        assert kept_start == max(0, start - (len(whole) - len(kept)))
    assert truncate(cut, max_length, "keep_end") == cut
    lengths = {min(max_length, len(whole)) - len(whole) for whole, _ in sequences(group)}
    if len(lengths) == 1 and -min(lengths) < len(group["prompt_ids"]):
        assert cut["prompt_ids"], "equal cuts leave a prompt to share"


@given(groups(), st.integers(2, 30))
def test_keep_start_keeps_the_first_tokens_of_every_sequence(group, max_length):
    if len(group["prompt_ids"]) >= max_length:
        return
    cut = truncate(group, max_length, "keep_start")
    expected = [(whole[:max_length], start) for whole, start in sequences(group)]
    assert sequences(cut) == expected and cut["prompt_ids"] == group["prompt_ids"]


def test_truncation_is_counted_and_so_is_a_lost_end_of_sequence():
    rows, summary = prepare([{"prompt": "0123", "chosen": "45", "rejected": "6789"}, PAIR], max_length=7)
    assert [texts(row) for row in rows] == [("0123", ["45</s>", "678"])]
    assert (summary.truncated, summary.lost_eos) == (1, 1)
    assert summary.dropped == {"prompt fills max_length": 1}
    assert str(summary) == (
        "2 rows → 1 groups, 2 completions, 1 comparisons; dropped: 1 × prompt fills max_length\n"
        "1 completions cut to max_length, 1 of them lost their EOS token"
    )


def test_keep_end_gives_each_completion_what_is_left_of_the_prompt():
    row = {"prompt": "0123", "chosen": "45", "rejected": "6789"}
    rows, summary = prepare([row], max_length=6, truncation_mode="keep_end")
    assert texts(rows[0]) == ("", ["12345</s>", "36789</s>"])
    assert rows[0]["context_lengths"] == [3, 1]
    assert (summary.truncated, summary.lost_eos) == (2, 0)
    shared, _ = prepare([{**row, "chosen": "abcd"}], max_length=6, truncation_mode="keep_end")
    assert texts(shared[0]) == ("3", ["abcd</s>", "6789</s>"]) and shared[0]["context_lengths"] == [0, 0]


# Drops


def test_rows_without_signal_are_dropped_and_counted():
    rows, summary = prepare(
        [
            tokenized([1], [2], [3]),
            tokenized([1], [], [3]),
            tokenized([1], [2, 3], [2, 3]),
            tokenized([], [2], [3, 4]),  # nothing predicts the 2
            tokenized([1] * 5, [2], [3]),
            tokenized([1], [2, 3, 4, 5, 6], [2, 3, 4, 5, 7]),  # equal once they are cut
        ],
        max_length=5,
    )
    assert len(rows) == 1 and rows[0]["completion_ids"] == [[2], [3]]
    assert summary.dropped == {"empty completion": 2, "identical completions": 2, "prompt fills max_length": 1}
    assert (summary.rows, summary.groups, summary.truncated) == (6, 1, 0)


def test_ties_and_conversations_without_a_prompt_are_counted():
    ties = {"prompt": "Q", "completions": ["a", "b"], "scores": [1.0, 1.0]}
    _, summary = prepare([ties, {**ties, "scores": [1.0, 0.0]}])
    assert summary.dropped == {"all ties": 1} and summary.groups == 1
    _, summary = prepare([{"chosen": [QUESTION, YES], "rejected": [QUESTION, NO]}, {"chosen": [YES], "rejected": [NO]}])
    assert summary.dropped == {"no prompt": 1} and summary.groups == 1


def test_a_larger_group_loses_only_the_comparisons_that_teach_nothing():
    row = {"prompt": "Q", "completions": ["same", "same", "other"], "scores": [3, 2, 1]}
    rows, summary = prepare([row])
    assert rows[0]["comparisons"] == [[0, 2], [1, 2]]
    assert summary.dropped == {"identical completions, in a group that stays": 1}
    prepared = {"prompt_ids": [1], "completion_ids": [[2], [], [3]], "comparisons": [[0, 1], [2, 0], [1, 2]]}
    rows, summary = prepare([prepared])
    assert rows[0]["completion_ids"] == [[2], [3]] and rows[0]["comparisons"] == [[1, 0]]
    assert summary.dropped == {"empty completion, in a group that stays": 2}


# Groups by prompt


def test_pairs_of_a_prompt_become_one_group_and_repeats_add_weight():
    rows, summary = prepare(
        [
            tokenized([1], [2], [3]),
            tokenized([9], [2], [3]),
            tokenized([1], [2], [4]),
            tokenized([1], [2], [3]),
            tokenized([1], [3], [2]),
        ],
        group_by_prompt=True,
    )
    assert rows["prompt_ids"][:] == [[1], [9]]
    assert rows[0]["completion_ids"] == [[2], [3], [4]]
    assert rows[0]["comparisons"] == [[0, 1], [0, 2], [1, 0]]
    assert rows[0]["comparison_weights"] == [2.0, 1.0, 1.0]
    assert (summary.rows, summary.groups, summary.completions, summary.comparisons) == (5, 2, 5, 4)


def test_prompts_merge_whole_before_they_are_cut():
    pairs = [tokenized([1, 2, 3, 4], [5, 6], [7]), tokenized([9, 2, 3, 4], [5, 6], [8])]
    rows, _ = prepare(pairs, group_by_prompt=True, max_length=4, truncation_mode="keep_end")
    assert len(rows) == 2
    rows, _ = prepare([pairs[0], pairs[0]], group_by_prompt=True, max_length=4, truncation_mode="keep_end")
    assert len(rows) == 1 and rows[0]["comparison_weights"] == [2.0] and rows[0]["context_lengths"] == [2, 3]


def test_rows_without_a_prompt_stay_apart():
    rows, _ = prepare([tokenized([], [2, 3], [3, 4])] * 2, group_by_prompt=True)
    assert len(rows) == 2


def test_a_row_of_ties_adds_nothing_to_the_group_of_its_prompt():
    ties = {"prompt": "Q", "completions": ["x", "y"], "scores": [1.0, 1.0]}
    rows, summary = prepare([ties, {**ties, "completions": ["a", "b"], "scores": [2.0, 1.0]}], group_by_prompt=True)
    assert texts(rows[0]) == ("Q", ["a</s>", "b</s>"]) and summary.dropped == {"all ties": 1}


short = st.lists(st.integers(0, 2), min_size=1, max_size=2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.builds(tokenized, short, short, short), min_size=1, max_size=8))
def test_merging_conserves_what_is_compared(pairs):
    def weighted(rows):
        """Total weight of every (prompt, winner, loser)."""
        total = {}
        for row in rows:
            for (winner, loser), weight in zip(row["comparisons"], row["comparison_weights"], strict=True):
                completions = row["completion_ids"]
                key = tuple(map(tuple, (row["prompt_ids"], completions[winner], completions[loser])))
                total[key] = total.get(key, 0.0) + weight
        return total

    pairs = [tokenized([7], [8], [9]), *pairs]  # at least one usable row
    apart, _ = prepare(pairs)
    merged, summary = prepare(pairs, group_by_prompt=True)
    assert weighted(merged) == weighted(apart)
    assert sum(weighted(apart).values()) == sum(pair["chosen_ids"] != pair["rejected_ids"] for pair in pairs)
    prompts = [tuple(row["prompt_ids"]) for row in merged]
    appearance = dict.fromkeys(tuple(pair["prompt_ids"]) for pair in pairs)
    assert prompts == [prompt for prompt in appearance if prompt in prompts] and summary.groups == len(prompts)
    for row in merged:
        assert len(set(map(tuple, row["completion_ids"]))) == len(row["completion_ids"])


# Reference log-probs

REFERENCE = {"ref_chosen_logps": -1.5, "ref_rejected_logps": -2.5}


def test_supplied_reference_logps_are_kept():
    rows, _ = prepare([{**PAIR, **REFERENCE}], max_length=100)
    assert rows[0]["ref_logps"] == [-1.5, -2.5]
    rows, _ = prepare([tokenized([1], [2], [3], **REFERENCE)], group_by_prompt=True)
    assert rows[0]["ref_logps"] == [-1.5, -2.5]


def test_reference_logps_of_cut_or_merged_rows_are_not_used(caplog):
    rows, _ = prepare([{**PAIR, **REFERENCE}], max_length=14)
    assert "ref_logps" not in rows.column_names and "2 completions were cut" in caplog.text
    caplog.clear()
    rows, _ = prepare([{**PAIR, **REFERENCE}, {**PAIR, **REFERENCE}], group_by_prompt=True)
    assert "ref_logps" not in rows.column_names and "merged by prompt" in caplog.text


# Prepared datasets and the output


def test_the_columns_are_the_fields_of_a_group():
    rows, _ = prepare([PAIR])
    assert rows.column_names == [name for name, column in COLUMNS.items() if not column.optional]
    group = PreferenceGroup.from_row(rows[0])
    assert group.comparisons == [[0, 1]] and group.comparison_weights == [1.0] and group.contexts == [0, 0]


@pytest.mark.parametrize("truncation_mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("group_by_prompt", [False, True])
def test_a_prepared_dataset_passes_through(truncation_mode, group_by_prompt):
    pairs = [PAIR, {**PAIR, "chosen": " white"}, {"prompt": "Q", "chosen": "a long answer", "rejected": "b"}]
    options = {"max_length": 14, "truncation_mode": truncation_mode, "group_by_prompt": group_by_prompt}
    once, _ = prepare(pairs, **options)
    twice, summary = prepare(once, **options)
    assert twice.to_list() == once.to_list() and twice.features == once.features
    assert summary.truncated == 0 and summary.dropped == {} and summary.rows == summary.groups == len(once)


@pytest.mark.parametrize(
    "pairs",
    [[tokenized([1, k % 2], [2], [3 + k]) for k in range(4)], [{**PAIR, "rejected": f" {k}"} for k in range(4)]],
    ids=["tokenized", "text"],
)
def test_the_format_of_the_dataset_and_the_number_of_processes_change_nothing(pairs):
    dataset = Dataset.from_list(pairs)
    expected, expected_summary = prepare(dataset, group_by_prompt=True)
    for other in (dataset.with_format("numpy"), dataset.add_column("note", ["x"] * 4)):
        rows, summary = prepare(other, num_proc=2, group_by_prompt=True)
        assert rows.to_list() == expected.to_list() and summary == expected_summary


def test_another_max_length_reuses_the_tokens(tmp_path, monkeypatch):
    Dataset.from_list([PAIR]).save_to_disk(tmp_path)
    dataset = load_preference_dataset(str(tmp_path))
    expected, _ = prepare(dataset, max_length=100)
    monkeypatch.setattr(TokenizeRows, "__call__", None)
    again, summary = prepare(dataset, max_length=14)
    assert summary.truncated == 2 and again[0]["prompt_ids"] == expected[0]["prompt_ids"]


# Errors


def errors():
    pair = tokenized([1], [2], [3])
    ranked = {"prompt": "Q", "completions": ["a", "b"], "scores": [1.0, 2.0]}
    conversation = CONVERSATIONS["explicit"]
    no_eos, no_template = byte_tokenizer(eos=False), byte_tokenizer(chat_template=None)
    strict = byte_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    yield (
        "unknown columns",
        [{"text": "a"}],
        {},
        "columns text(.|\n)*ranked by score: prompt, completions, scores",
    )
    yield "unpaired", [{"prompt": "a", "completion": "b", "label": True}], {}, "unpaired preference data.*not supported"
    yield "neither scores nor ranks", [{"prompt": "a", "completions": ["b", "c"]}], {}, "found the columns"
    yield "scores and ranks", [{**ranked, "ranks": [2, 1]}], {}, "either scores or ranks"
    yield "images", [{**PAIR, "images": "x.png"}], {}, "images are not supported"
    yield "one reference", [{**PAIR, "ref_chosen_logps": -1.0}], {}, "give both of ref_chosen_logps"
    yield "missing reference", [{**PAIR, **REFERENCE, "ref_chosen_logps": None}], {}, "row 0: .*expected finite"
    yield "no EOS", [PAIR], {"tokenizer": no_eos}, "tokenizer: it has no eos_token"
    yield "no template", [conversation], {"tokenizer": no_template}, "tokenizer: it has no chat_template"
    yield "template refuses", [conversation], {"tokenizer": strict}, "row 0: the chat template failed: roles must"
    yield "vocabulary", [pair, tokenized([1], [99], [3])], {"vocab_size": 99}, "row 1: token id 99 .* 99 entries"
    yield "negative id", [tokenized([1], [-2], [3])], {}, "row 0: token id -2"
    yield "fewer scores", [ranked, {**ranked, "scores": [1.0]}], {}, "row 1: column 'scores': .* 2 completions, got 1"
    yield "one completion", [{**ranked, "completions": ["a"], "scores": [1.0]}], {}, "at least two"
    yield "score nan", [{**ranked, "scores": [1.0, float("nan")]}], {}, "column 'scores': expected finite"
    yield "score missing", [{**ranked, "scores": [1.0, None]}], {}, "column 'scores': expected finite"
    yield "not text", [{**PAIR, "chosen": 3}], {}, "column 'chosen': expected text .* got int 3"
    yield "missing text", [PAIR, {**PAIR, "rejected": None}], {}, "row 1: column 'rejected'"
    yield "not a message", [{**conversation, "chosen": [{"text": "a"}]}], {}, "column 'chosen': .* is not a message"
    yield "speaker", [{**conversation, "chosen": {"from": "bot", "value": "a"}}], {}, "speaker 'bot' is unknown"
    yield "tools", [{**conversation, "tools": "[not json"}], {}, "column 'tools': not valid JSON"
    yield "other prompt", [{**CONVERSATIONS["implicit"], "prompt": "Else?"}], {}, "column 'prompt' is text"
    yield "mode", [pair], {"truncation_mode": "middle"}, "truncation_mode: 'middle' .* keep_start, keep_end"
    yield "length", [pair], {"max_length": 1}, "max_length: 1 .* 2 or more"
    yield "all dropped", [tokenized([1], [2], [2])], {}, r"none of the 1 rows .*1 × identical completions"
    group = {"prompt_ids": [1], "completion_ids": [[2], [3]], "comparisons": [[0, 1]]}
    yield "index", [{**group, "comparisons": [[0, 2]]}], {}, "row 0: comparisons .* indices of the 2 completions"
    yield "weights", [{**group, "comparison_weights": [1.0, 1.0]}], {}, "'comparison_weights' holds 2 for 1"
    yield "contexts", [{**group, "context_lengths": [0]}], {}, "'context_lengths' holds 1 for 2"


ERRORS = {name: case for name, *case in errors()}


@pytest.mark.parametrize(("rows", "options", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(rows, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(rows, **options)


def test_the_row_that_a_template_refuses_is_named():
    picky = byte_tokenizer(
        chat_template="{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}{{ messages }}"
    )
    rows = [{"prompt": [QUESTION], "chosen": [YES], "rejected": [NO]} for _ in range(3)]
    rows[1]["prompt"] = [SYSTEM]
    with pytest.raises(ValueError, match="eval dataset, row 1: the chat template failed: user first"):
        prepare(rows, picky, name="eval")


def test_only_one_map_style_split_is_accepted():
    dataset = Dataset.from_list([PAIR])
    with pytest.raises(ValueError, match="is a stream .*prepare"):
        prepare_dataset(dataset.to_iterable_dataset(), TOKENIZER, max_length=None)
    with pytest.raises(ValueError, match="got DatasetDict with the splits train, test; choose one"):
        prepare_dataset(DatasetDict(train=dataset, test=dataset), TOKENIZER, max_length=None)
    with pytest.raises(ValueError, match="no rows"):
        prepare_dataset(dataset.select([]), TOKENIZER, max_length=None)


def test_a_summary_without_losses_is_one_line():
    assert str(DataSummary(3, 3, 6, 3, {}, 0, 0)) == "3 rows → 3 groups, 6 completions, 3 comparisons"
