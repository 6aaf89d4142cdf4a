"""Which comparisons K completions yield, and that weights, offsets and scores stay with what they belong to.

Strategies are checked against their definitions, and cutting, dropping and merging against one law: every comparison
that is left has the weight and the offset that it had, and every completion its score.
"""

from collections import Counter
from graphlib import CycleError, TopologicalSorter
from statistics import fmean

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prepare import CONVERSATIONS, PAIR, REFERENCE, TOKENIZER, prepare, text, texts, tokenized

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.config import DPOConfig
from dpo_fast.data.columns import with_defaults
from dpo_fast.data.formats import _cycle, comparisons_from_scores, detect_format
from dpo_fast.data.loading import load_preference_dataset
from dpo_fast.data.tokenization import TokenizeRows
from dpo_fast.data.truncation import COMPARISON_CHOICES, choose_comparisons, keep_signal, truncate
from dpo_fast.training.datasets import prepare_preferences

ANSWERS = ["a", "b", "c", "d"]
RANKED = {"prompt": "Q", "completions": ANSWERS, "scores": [1.0, 3.0, 0.5, 2.0]}
NO_PROMPT = {side: CONVERSATIONS["explicit"][side] for side in ("chosen", "rejected")}
COMPARED = {"prompt": "Q", "completions": ANSWERS, "comparisons": [[1, 0], [0, 2]]}


def named(row):
    """The comparisons of a row of answers of one letter, as pairs of letters."""
    letters = [text(ids)[0] for ids in row["completion_ids"]]
    return [letters[winner] + letters[loser] for winner, loser in row["comparisons"]]


def scored(scores):
    pairs = comparisons_from_scores(scores)
    ids = [[k] for k in range(len(scores))]
    group = {"prompt_ids": [9], "completion_ids": ids, "comparisons": pairs, "completion_scores": scores}
    return with_defaults(group)


# Strategies

scores_of_k = st.lists(st.integers(-3, 3), min_size=2, max_size=7)


@given(scores_of_k)
def test_the_number_of_comparisons(scores):
    count = Counter(scores)
    best, worst = count[max(scores)], count[min(scores)]
    expected = {
        "all_pairs": (len(scores) ** 2 - sum(n**2 for n in count.values())) // 2,
        "best_vs_rest": best * (len(scores) - best),
        "best_vs_worst": best * worst if len(count) > 1 else 0,
    }
    for choice in COMPARISON_CHOICES:
        assert len(choose_comparisons(scored(scores), choice)["comparisons"]) == expected[choice]


@given(scores_of_k, st.randoms())
def test_strategies_are_what_they_say_whatever_the_order_of_the_completions(scores, random):
    order = random.sample(range(len(scores)), len(scores))
    for choice in COMPARISON_CHOICES:
        pairs = set(choose_comparisons(scored(scores), choice)["comparisons"])
        shuffled = choose_comparisons(scored([scores[k] for k in order]), choice)["comparisons"]
        assert {(order[winner], order[loser]) for winner, loser in shuffled} == pairs
        for winner, loser in pairs:
            assert scores[winner] > scores[loser]
            assert choice == "all_pairs" or scores[winner] == max(scores)
            assert choice != "best_vs_worst" or scores[loser] == min(scores)


CHOSEN = {
    "all_pairs": ["ba", "ac", "da", "bc", "bd", "dc"],
    "best_vs_rest": ["ba", "bc", "bd"],
    "best_vs_worst": ["bc"],
}


@pytest.mark.parametrize("choice", COMPARISON_CHOICES)
@pytest.mark.parametrize("order", [{"scores": RANKED["scores"]}, {"ranks": [3, 1, 4, 2]}], ids=["scores", "ranks"])
def test_scores_and_ranks_yield_what_is_asked_for(choice, order):
    row = {"prompt": "Q", "completions": ANSWERS, **order}
    rows, summary = prepare([row], comparisons=choice)
    assert sorted(named(rows[0])) == sorted(CHOSEN[choice])
    used = sorted(set("".join(CHOSEN[choice])))
    assert texts(rows[0]) == ("Q", [f"{letter}</s>" for letter in used]), "what is not compared does not run"
    given = order.get("scores") or [-rank for rank in order["ranks"]]
    assert rows[0]["completion_scores"] == [given[ANSWERS.index(letter)] for letter in used]
    assert (summary.groups, summary.completions, summary.comparisons) == (1, len(used), len(CHOSEN[choice]))


def test_ties_are_dropped_and_those_for_the_best_all_win():
    tied = {**RANKED, "scores": [2.0, 0.0, 2.0, 1.0]}
    rows, summary = prepare([tied, {**tied, "scores": [1.0] * 4}], comparisons="best_vs_rest")
    assert sorted(named(rows[0])) == ["ab", "ad", "cb", "cd"] and summary.dropped == {"all ties": 1}


@pytest.mark.parametrize("choice", COMPARISON_CHOICES)
def test_pairs_and_listed_comparisons_and_prepared_groups_stay_as_given(choice):
    pairs = [{"prompt": "Q", "chosen": winner, "rejected": loser} for winner, loser in ("ab", "bc", "ac")]
    merged, _ = prepare(pairs, comparisons=choice, group_by_prompt=True)
    assert len(merged) == 1 and named(merged[0]) == ["ab", "bc", "ac"]
    assert named(prepare([COMPARED], comparisons=choice)[0][0]) == ["ba", "ac"]
    prepared, _ = prepare([RANKED])
    assert prepare(prepared, comparisons=choice)[0].to_list() == prepared.to_list()


def test_another_choice_of_comparisons_reuses_the_tokens(tmp_path, monkeypatch):
    Dataset.from_list([RANKED]).save_to_disk(tmp_path)
    dataset = load_preference_dataset(str(tmp_path))
    prepare(dataset)
    monkeypatch.setattr(TokenizeRows, "__call__", None)
    assert named(prepare(dataset, comparisons="best_vs_worst")[0][0]) == CHOSEN["best_vs_worst"]


def test_an_unknown_choice_is_refused_and_the_configuration_hands_on_a_known_one(tmp_path):
    with pytest.raises(ValueError, match="comparisons: 'best' is unknown; use one of all_pairs, best_vs_rest"):
        prepare([RANKED], comparisons="best")
    with pytest.raises(ValueError, match="comparisons='best' must be one of .*'best_vs_worst'"):
        DPOConfig(output_dir=str(tmp_path), report_to="none", comparisons="best")
    config = DPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, comparisons="best_vs_worst")
    groups, _ = prepare_preferences(Dataset.from_list([RANKED]), TOKENIZER, config, vocab_size=300, name="train")
    assert named(groups[0]) == ["bc"]


# Weights


def test_a_weight_goes_to_all_comparisons_of_its_row():
    rows, _ = prepare([{**PAIR, "weight": 0.5}, {**PAIR, "weight": 2}])
    assert rows["comparison_weights"][:] == [[0.5], [2.0]]
    assert prepare([tokenized([1], [2], [3], weight=3.0)])[0][0]["comparison_weights"] == [3.0]
    assert prepare([{**CONVERSATIONS["ShareGPT"], "weight": 4.0}])[0][0]["comparison_weights"] == [4.0]
    assert prepare([{**RANKED, "weight": 0.25}])[0][0]["comparison_weights"] == [0.25] * 6
    rows, _ = prepare([{**COMPARED, "weight": 0.5, "weights": [1.0, 3.0]}])
    assert (named(rows[0]), rows[0]["comparison_weights"]) == (["ba", "ac"], [0.5, 1.5])


def test_weight_zero_stays_only_beside_another():
    pairs = [tokenized([p], [2], [3], weight=weight) for p, weight in ((1, 0.0), (4, 0.0), (5, 1.0))]
    rows, summary = prepare([*pairs, tokenized([4], [2], [6], weight=1.0)])
    assert rows["prompt_ids"][:] == [[5], [4]] and summary.dropped == {"no weight": 2}
    rows, summary = prepare([*pairs, tokenized([4], [2], [6], weight=1.0)], group_by_prompt=True)
    assert rows["comparison_weights"][:] == [[0.0, 1.0], [1.0]] and summary.dropped == {"no weight": 1}
    rows, _ = prepare([{**COMPARED, "weights": [0.0, 2.0]}])
    assert (named(rows[0]), rows[0]["comparison_weights"]) == (["ba", "ac"], [0.0, 2.0])
    cut = {"prompt": "Q", "completions": ["aaab", "aaac", "d"], "comparisons": [[0, 1], [0, 2]], "weights": [1.0, 0.0]}
    _, summary = prepare([cut, {**COMPARED, "weights": [1.0, 1.0]}], max_length=4)
    assert summary.dropped == {"no weight": 1}, "what had weight is cut to twice the same"


# Offsets


def test_an_offset_stays_with_its_pair():
    pairs = [tokenized([1], [2, 2, 2], [3], offset=0.5), tokenized([1], [4], [4], offset=9.0)]
    pairs += [tokenized([1], [3], [4, 4, 4], offset=-1.5)]
    rows, _ = prepare(pairs, max_length=3)
    assert rows["comparison_offsets"][:] == [[0.5], [-1.5]] and "completion_scores" not in rows.column_names
    rows, _ = prepare([{**PAIR, "offset": 2}])
    assert rows[0]["comparison_offsets"] == [2.0]
    assert "comparison_offsets" not in prepare([PAIR])[0].column_names
    rows = [{**CONVERSATIONS["implicit"], "offset": 1.0, **REFERENCE}, {**NO_PROMPT, "offset": 2.0, **REFERENCE}]
    rows, summary = prepare(rows)
    assert rows["comparison_offsets"][:] == [[1.0]] and summary.dropped == {"no prompt": 1}


def test_equal_comparisons_merge_only_where_they_ask_for_the_same_margin():
    pairs = [tokenized([1], [2], [3], offset=offset) for offset in (0.5, 1.0, 0.5)]
    rows, _ = prepare(pairs, group_by_prompt=True)
    assert rows[0]["comparisons"] == [[0, 1], [0, 1]]
    assert (rows[0]["comparison_weights"], rows[0]["comparison_offsets"]) == ([2.0, 1.0], [0.5, 1.0])


# Scores


def test_a_dropped_completion_drops_its_score():
    row = {"prompt": "Q", "completions": ["aa", "b", "aaa", "c"], "scores": [4, 3, 2, 1]}
    rows, summary = prepare([row], max_length=3, comparisons="best_vs_rest")
    assert texts(rows[0])[1] == ["aa", "b</s>", "c</s>"] and rows[0]["completion_scores"] == [4.0, 3.0, 1.0]
    assert summary.dropped == {"identical completions, in a group that stays": 1}


def test_rows_without_a_prompt_have_no_scores():
    alone = {**CONVERSATIONS["scores"], "prompt": [], "scores": [2.0, 1.0]}
    rows, summary = prepare([CONVERSATIONS["scores"], alone])
    assert rows["completion_scores"][:] == [[0.5, -1.0]] and summary.dropped == {"no prompt": 1}


# Cutting and merging


@st.composite
def labelled_groups(draw, shortest=0):
    """Groups whose weight and offset of a comparison, and score of a completion, tell which one it was."""
    completions = draw(st.lists(st.lists(st.integers(1, 2), min_size=shortest, max_size=4), min_size=2, max_size=5))
    count = len(completions)
    pairs = draw(st.lists(st.permutations(range(count)).map(lambda order: tuple(order[:2])), max_size=6))
    labels = [1.0 + 10 * winner + loser for winner, loser in pairs]
    prompt = draw(st.lists(st.integers(1, 2), min_size=shortest, max_size=3))
    offsets, scores = [-label for label in labels], [float(k) for k in range(count)]
    return {
        "prompt_ids": prompt,
        "completion_ids": completions,
        "comparisons": pairs,
        "comparison_weights": labels,
        "context_lengths": [0] * count,
        "comparison_offsets": offsets,
        "completion_scores": scores,
    }


@given(labelled_groups(), st.integers(4, 7), st.sampled_from(["keep_start", "keep_end"]))
def test_cutting_keeps_weights_offsets_and_scores_in_place(whole, max_length, mode):
    cut = truncate(whole, max_length, mode)
    group, used, reasons = keep_signal(cut)
    scores, comparisons = group["completion_scores"], group["comparisons"]
    weights, offsets = group["comparison_weights"], group["comparison_offsets"]
    assert scores == used and len(comparisons) + len(reasons) == len(whole["comparisons"])
    assert group["completion_ids"] == [cut["completion_ids"][k] for k in used]
    assert len(weights) == len(offsets) == len(comparisons)
    for index, (winner, loser) in enumerate(comparisons):
        label = 1.0 + 10 * scores[winner] + scores[loser]
        assert weights[index] == label == -offsets[index]


letters = st.sampled_from("abcde")
ranked_rows = st.builds(
    lambda prompt, rated: {"prompt": prompt, "completions": list(rated), "scores": [float(s) for s in rated.values()]},
    st.sampled_from("PQ"),
    st.dictionaries(letters, st.integers(0, 3), min_size=2, max_size=4),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(ranked_rows, min_size=1, max_size=5), st.sampled_from(COMPARISON_CHOICES), st.randoms())
def test_merging_by_prompt_gives_the_union_of_what_the_rows_yield(ranked, choice, random):
    ranked = [{**RANKED, "prompt": "R", "weight": 2.0}, *({**row, "weight": 1.0} for row in ranked)]
    mixed = []
    for row in ranked:
        order = random.sample(range(len(row["scores"])), len(row["scores"]))
        mixed.append({**row, **{column: [row[column][k] for k in order] for column in ("completions", "scores")}})

    def total(rows):
        """Weight of every (prompt, winner, loser)."""
        weights = Counter()
        for row in rows:
            for pair, weight in zip(named(row), row["comparison_weights"], strict=True):
                weights[text(row["prompt_ids"]) + pair] += weight
        return weights

    merged, _ = prepare(ranked, comparisons=choice, group_by_prompt=True)
    assert total(merged) == total(prepare(mixed, comparisons=choice)[0])
    for row in merged:
        prompt, answers = texts(row)
        for answer, score in zip(answers, row["completion_scores"], strict=True):
            rated = [dict(zip(r["completions"], r["scores"], strict=True)) for r in ranked if r["prompt"] == prompt]
            # A row of ties is not merged.
            assert score == fmean(r[answer[0]] for r in rated if answer[0] in r and len(set(r.values())) > 1)


def test_prepared_groups_with_everything_pass_through():
    group = {
        "prompt_ids": [1],
        "completion_ids": [[2], [3], [4]],
        "comparisons": [[0, 1], [2, 1]],
        "comparison_weights": [1.0, 0.5],
        "context_lengths": [0, 0, 0],
        "ref_logps": [-1.0, -2.0, -3.0],
        "comparison_offsets": [0.0, 2.0],
        "completion_scores": [3.0, 1.0, 2.0],
    }
    for options in ({}, {"group_by_prompt": True}):
        rows, _ = prepare([group], **options)
        assert rows.to_list() == [group]


# Listed comparisons


def test_listed_comparisons_are_those_of_the_scores_they_follow():
    both = [prepare([{**RANKED, "scores": [3, 2, 1, 0]}])[0][0]]
    listed = {"prompt": "Q", "completions": ANSWERS, "comparisons": both[0]["comparisons"]}
    both.append(prepare([listed])[0][0])
    assert both[0].pop("completion_scores") == [3.0, 2.0, 1.0, 0.0] and both[0] == both[1]


def test_a_row_that_lists_no_comparison_is_counted():
    _, summary = prepare([COMPARED, {**COMPARED, "comparisons": []}])
    assert summary.dropped == {"all ties": 1} and summary.groups == 1


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(lambda pair: pair[0] != pair[1]), max_size=12))
def test_a_cycle_is_found_where_there_is_one(comparisons):
    cycle = _cycle(comparisons)
    graph = {winner: {loser for other, loser in comparisons if other == winner} for winner, _ in comparisons}
    try:
        TopologicalSorter(graph).prepare()
        assert cycle is None
    except CycleError:
        assert cycle[0] == cycle[-1] and len(set(cycle)) == len(cycle) - 1 > 1
        assert set(zip(cycle, cycle[1:], strict=False)) <= set(comparisons)


# Packing


@given(st.lists(st.tuples(labelled_groups(shortest=1), st.booleans()), min_size=1, max_size=4))
def test_packing_keeps_offsets_and_scores_beside_their_comparisons(drawn):
    groups = [
        PreferenceGroup.from_row(row if complete else {**row, "comparison_offsets": None, "completion_scores": None})
        for row, complete in drawn
    ]
    packed = pack(groups)
    owners, (winners, losers) = packed.completion_groups, packed.comparisons.unbind(1)
    assert owners.dtype == torch.int64 and owners[winners].equal(owners[losers])
    assert owners.tolist() == [k for k, group in enumerate(groups) for _ in group.completion_ids]
    if not any(complete for _, complete in drawn):
        assert packed.comparison_offsets is None and packed.completion_scores is None
        return
    assert packed.comparison_offsets.dtype == packed.completion_scores.dtype == torch.float32
    complete = torch.tensor([complete for _, complete in drawn])[owners]
    assert packed.completion_scores.isnan().equal(~complete)
    labels = 1 + 10 * packed.completion_scores[winners] + packed.completion_scores[losers]
    assert packed.comparison_offsets.equal(torch.where(complete[winners], -labels, 0))
    assert packed.comparison_weights[complete[winners]].equal(labels[complete[winners]])


@pytest.mark.parametrize("field", ["comparison_offsets", "completion_scores", "ref_logps"])
def test_packing_refuses_a_field_of_another_length(field):
    with pytest.raises(ValueError, match=f"groups: {field} of a group holds 3 numbers"):
        pack([PreferenceGroup([1], [[2], [3]], **{field: [0.0] * 3})])


# Errors


def errors():
    nan = float("nan")
    yield "weight nan", [{**PAIR, "weight": 1.0}, {**PAIR, "weight": nan}], "row 1: column 'weight': .* got nan"
    yield "weight infinite", [{**PAIR, "weight": 1e39}], "column 'weight': expected a finite number, 0 or more"
    yield "weight negative", [tokenized([1], [2], [3], weight=-1.0)], "row 0: column 'weight': .* got -1.0"
    yield "weight missing", [{**RANKED, "weight": 1.0}, {**RANKED, "weight": None}], "row 1: column 'weight': .* None"
    yield "weight is text", [{**PAIR, "weight": "high"}], "column 'weight': expected a finite number"
    yield "no weight at all", [{**PAIR, "weight": 0.0}] * 2, "none of the 2 rows .* × no weight.*weights above 0"
    yield "offset missing", [{**PAIR, "offset": 1.0}, PAIR], "row 1: column 'offset': .* None; give one in every row"
    yield "offset nan", [{**PAIR, "offset": nan}], "row 0: column 'offset': expected a finite number, got nan"
    yield "offset of a ranking", [{**RANKED, "offset": 1.0}], "offset is the margin of one comparison"
    yield "offset from scores", [{**RANKED, "offset": "scores"}], "offset is the margin of one comparison"
    yield "scores and comparisons", [{**RANKED, **COMPARED}], "either scores or ranks or comparisons"
    yield "one completion", [{**COMPARED, "completions": ["a"]}], "at least two, to be compared.*put the completions"
    yield "index", [{**COMPARED, "comparisons": [[0, 4]]}], r"\[0, 4\] is not .* from 0 to 3 of the 4 completions"
    yield "negative index", [{**COMPARED, "comparisons": [[0, -1]]}], r"\[0, -1\] is not \[winner, loser\]"
    yield "itself", [COMPARED, {**COMPARED, "comparisons": [[2, 2]]}], r"row 1: .*\[2, 2\] .* two different indices"
    yield "not a pair", [{**COMPARED, "comparisons": [[0, 1, 2]]}], r"\[0, 1, 2\] is not \[winner, loser\]"
    yield "fractions", [{**COMPARED, "comparisons": [[0.5, 1.0]]}], r"\[0.5, 1.0\] is not \[winner, loser\]"
    yield "no list", [{**COMPARED, "comparisons": "0>1"}], r"expected a list of \[winner, loser\], got str '0>1'"
    ring = {**COMPARED, "comparisons": [[3, 0], [0, 1], [1, 2], [2, 0]]}
    yield "cycle", [COMPARED, ring], "row 1: column 'comparisons': completions 0 > 1 > 2 > 0 contradict"
    yield "both ways", [{**COMPARED, "comparisons": [[0, 1], [1, 0]]}], "completions 0 > 1 > 0 contradict"
    yield "fewer weights", [{**COMPARED, "weights": [1.0]}], "'weights': .* each of the 2 comparisons, got 1"
    yield "weights nan", [{**COMPARED, "weights": [1.0, nan]}], "column 'weights': expected a finite number"
    group = {"prompt_ids": [1], "completion_ids": [[2], [3]], "comparisons": [[0, 1]]}
    yield "prepared weight", [{**group, "comparison_weights": [-1.0]}], "'comparison_weights': .* must be 0 or more"
    yield "prepared nan", [{**group, "completion_scores": [1.0, nan]}], "'completion_scores': expected finite numbers"
    yield "prepared offsets", [{**group, "comparison_offsets": [1.0, 2.0]}], "'comparison_offsets' holds 2 for 1 compar"
    yield (
        "prepared offset missing",
        [{**group, "comparison_offsets": [1.0]}, group],
        "row 1: column 'comparison_offsets' is missing; give it in every row",
    )
    unpaired = {"completion": "b", "label": True}
    message = "unpaired preference data.*not supported.*pairs .*ranked.*labels as scores.*KTO trainer"
    yield "unpaired", [unpaired], message
    yield "unpaired with a prompt", [{**unpaired, "prompt": "a"}], message


ERRORS = {name: case for name, *case in errors()}


@pytest.mark.parametrize(("rows", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_wrong(rows, message):
    for group_by_prompt in (False, True):
        with pytest.raises(ValueError, match=message):
            prepare(rows, group_by_prompt=group_by_prompt)


def test_columns_of_unpaired_data_beside_pairs_are_no_harm():
    assert detect_format(["prompt", "chosen", "rejected", "completion", "label"]).name == "pairs"
