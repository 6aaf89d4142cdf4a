"""`dpo-fast bench` counts token positions exactly, in the order in which training would see the groups."""

from __future__ import annotations

import pytest
from datasets import Dataset

from dpo_fast.batches.groups import PreferenceGroup
from dpo_fast.batches.packing import pack
from dpo_fast.commands.bench.positions import count_positions, epoch_batches, first_steps, lengths_only
from dpo_fast.data.prepare import prepare_dataset
from families import tiny_tokenizer
from preferences import make_trainer, pairs

# A pair, a pair of the same prompt, four completions of which one is never compared twice, an empty prompt.
GROUPS = [
    {"prompt_ids": [5, 6, 7], "completion_ids": [[8, 9], [10]], "comparisons": [[0, 1]]},
    {"prompt_ids": [5, 6, 7], "completion_ids": [[8, 9], [11, 12, 13, 14]], "comparisons": [[1, 0]]},
    {
        "prompt_ids": [20] * 6,
        "completion_ids": [[1], [2, 3], [4, 5, 6], [7] * 9],
        "comparisons": [[0, 1], [0, 2], [3, 1]],
    },
    {"prompt_ids": [], "completion_ids": [[30, 31], [32, 33, 34]], "comparisons": [[0, 1]]},
    {"prompt_ids": [5, 6], "completion_ids": [[8, 9], [10]], "comparisons": [[0, 1]]},
]


def prepared(rows: list[dict], **options) -> Dataset:
    return prepare_dataset(Dataset.from_list(rows), tiny_tokenizer(), max_length=None, **options)[0]


def by_brute_force(rows: list[dict], batches: list[list[int]]) -> dict[str, int]:
    """Makes the padded rows and marks every position with what it holds."""
    found = dict.fromkeys(("usual", "padding", "repeated_prompts", "repeated_completions", "packed"), 0)
    for batch in batches:
        table = [
            [("prompt", g, i) for i in range(len(rows[g]["prompt_ids"]))]
            + [("completion", g, side, i) for i in range(len(rows[g]["completion_ids"][side]))]
            for g in batch
            for pair in rows[g]["comparisons"]
            for side in pair
        ]
        width = max(map(len, table))
        seen = set()
        for row in table:
            found["usual"] += width
            found["padding"] += width - len(row)
            for position in row:
                if position in seen:
                    found[f"repeated_{position[0]}s"] += 1
                seen.add(position)
        found["packed"] += pack([PreferenceGroup.from_row(rows[g]) for g in batch]).input_ids.numel()
    return found


@pytest.mark.parametrize("batches", [[[0, 1], [2, 3], [4]], [[4, 2, 0, 1, 3]], [[3], [2], [1], [0], [4]]])
def test_positions_are_those_of_the_rows_themselves(batches):
    rows = prepared([{**row, "comparison_weights": [1.0] * len(row["comparisons"])} for row in GROUPS])
    counted = count_positions(rows, lengths_only(rows), batches)
    expected = by_brute_force(rows.to_list(), batches)
    assert {name: getattr(counted, name) for name in expected} == expected
    assert (counted.groups, counted.completions, counted.comparisons) == (5, 12, 7)
    assert counted.usual == counted.packed + counted.repeated_prompts + counted.repeated_completions + counted.padding
    assert counted.prompts == (3, 6, 6) and counted.completion_lengths == (2, 4, 9)


def test_merging_prompts_is_foretold():
    rows = [{"prompt": "w5 w6 w7", "chosen": f" w{9 + i % 3}", "rejected": " w20 w21"} for i in range(4)]
    rows += [{"prompt": "w5 w6", "chosen": " w9", "rejected": " w20 w21"}]
    apart, merged = prepared(rows), prepared(rows, group_by_prompt=True)
    shared = count_positions(apart, lengths_only(apart), [[0, 1, 2, 3, 4]]).shared_prompts
    assert (shared.groups, shared.merged_groups) == (4, len(merged)) == (4, 2)
    assert shared.merged_positions == sum(group.num_tokens() for group in lengths_only(merged))


def test_completions_that_lost_different_parts_of_their_prompt_share_none():
    row = {"prompt_ids": [1, 2, 3, 4], "chosen_ids": [5, 6], "rejected_ids": [7, 8, 9]}
    cut, _ = prepare_dataset(Dataset.from_list([row] * 2), tiny_tokenizer(), max_length=5, truncation_mode="keep_end")
    counted = count_positions(cut, lengths_only(cut), [[0, 1]])
    assert counted.usual == counted.packed == 20 and counted.shared_prompts.groups == 0
    assert counted.prompts.longest == 3 and counted.completion_lengths.longest == 3


@pytest.mark.parametrize("strategy", ["random", "sequential"])
def test_the_order_is_that_of_training(tmp_path, strategy):
    options = {"train_sampling_strategy": strategy, "per_device_train_batch_size": 3, "seed": 7}
    trainer = make_trainer(tmp_path, pairs(11), num_train_epochs=1, max_steps=-1, **options)
    place = {tuple(row): index for index, row in enumerate(trainer.train_dataset["prompt_ids"])}
    batches, collate = [], trainer.data_collator

    def watch(rows):
        batches.append([place[tuple(row["prompt_ids"])] for row in rows])
        return collate(rows)

    trainer.data_collator = watch
    trainer.train()
    assert epoch_batches(11, trainer.args) == batches and sorted(sum(batches, [])) == list(range(11))
    assert (batches == sorted(batches)) == (strategy == "sequential")


def test_a_small_dataset_starts_over():
    assert first_steps([[2, 0], [1]], 2, 3) == [[2, 0], [1, 2], [0, 1]]
