"""`dpo-fast cache` and `dpo-fast score`, as a user runs them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpo_fast import cli
from dpo_fast.reference.store.maintenance import info
from dpo_fast.scoring import _intervals
from families import tiny_tokenizer
from preferences import make_trainer, pairs, ranked, trained

FLAGS = ["--dataset", "rows.jsonl", "--use_cpu", "--max_length", "64", "--report_to", "none"]
MODEL = ["--model", "model", *FLAGS]


def test_cache_computes_what_training_needs(folder, capsys):
    assert cli.main(["cache", *MODEL]) == 0
    out = capsys.readouterr().out
    assert "30 groups" in out and "60 reference log-probs computed" in out
    assert cli.main(["cache", *MODEL]) == 0
    assert "\n0 reference log-probs computed" in capsys.readouterr().out
    (store,) = info("cache/reference")
    trainer = make_trainer(folder, pairs(30), reference_cache_dir="cache/reference")
    assert trainer.reference.store.computed == 0 and trainer.reference.store.folder == store.folder
    assert not (folder / "model-DPO").exists()


def test_shards_fill_the_store_together(folder, capsys):
    counts = []
    for shard in range(3):
        assert cli.main(["cache", *MODEL, "--num_shards", "3", "--shard", str(shard)]) == 0
        counts.append(int(capsys.readouterr().out.split("\n")[-2].split()[0]))
    assert sum(counts) == 60 and min(counts) > 5
    assert cli.main(["cache", *MODEL]) == 0 and "\n0 reference" in capsys.readouterr().out


def test_looking_after_the_store(folder, capsys):
    assert cli.main(["cache", *MODEL, "--reference_cache_dir", "store"]) == 0
    where = ["--reference_cache_dir", "store"]
    capsys.readouterr()
    assert cli.main(["cache", "--info", *where]) == 0
    out = capsys.readouterr().out
    assert "60 rows" in out and "LlamaForCausalLM float32 shared/" in out and "1 stores" in out
    assert cli.main(["cache", "--verify", *where]) == 0
    assert "60 rows in 1 parts are whole" in capsys.readouterr().out
    assert cli.main(["cache", "--export", "all.parquet", *where]) == 0
    table = pq.read_table("all.parquet")
    assert table.num_rows == 60 and len(table["key"][0].as_py()) == 32
    (part,) = (folder / "store").glob("*/part-*.parquet")
    data = bytearray(part.read_bytes())
    data[100] ^= 4
    part.write_bytes(data)
    capsys.readouterr()
    assert cli.main(["cache", "--verify", *where]) == 1
    assert f"damaged: {part.name}" in capsys.readouterr().out
    assert cli.main(["cache", "--prune", "0", "--dry_run", *where]) == 0
    assert "would remove" in capsys.readouterr().out and list((folder / "store").glob("*/*"))
    assert cli.main(["cache", "--prune", "0", *where]) == 0
    assert not list((folder / "store").glob("*/*"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--info", "--verify"], "--info and --verify exclude each other"),
        (["--info", "--beta", "1"], "unexpected argument '--beta' beside --info"),
        ([*MODEL, "--num_shards", "2", "--shard", "2"], "--shard 2 must lie in [0, 2)"),
        ([*MODEL, "--loss_type", "simpo"], "looks at no reference"),
        (["--dataset", "rows.jsonl"], "no model given"),
        (["--export", "all.csv"], "ends in .parquet or .jsonl"),
        (["--verify", "--store", "abc"], "has no such store"),
    ],
)
def test_mistakes_cost_one_line(folder, capsys, flags, words):
    cli.main(["cache", *MODEL])
    capsys.readouterr()
    assert cli.main(["cache", *flags]) == 2
    error = capsys.readouterr().err
    assert words in error and error.split("\n")[-2].startswith("dpo-fast: error:") and "Traceback" not in error


def test_score_says_what_training_has_made_of_the_model(folder, capsys):
    trainer = make_trainer(folder, pairs(30), beta=0.3, max_steps=6, eval_dataset=pairs(30))
    trained(trainer)
    expected = trainer.evaluate()
    trainer.save_model("trained")
    tiny_tokenizer().save_pretrained("trained")
    flags = ["score", "--model", "trained", "--ref_model", "model", *FLAGS, "--beta", "0.3"]
    assert cli.main([*flags, "--output", "rewards.jsonl"]) == 0
    out = capsys.readouterr().out
    accuracy, margin = (float(line.split()[1]) for line in out.strip().split("\n")[-2:])
    assert accuracy == pytest.approx(expected["eval_rewards/accuracies"], abs=0.05)  # batches of 8, 8, 8 and 6
    assert margin == pytest.approx(expected["eval_rewards/margins"], rel=0.05)
    rows = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    assert [row["row"] for row in rows] == list(range(30))
    margins = [row["margins"][0] for row in rows]
    assert np.mean(margins) == pytest.approx(margin, abs=1e-4) and np.mean(np.array(margins) > 0) == pytest.approx(
        accuracy, abs=1e-4
    )
    for row in rows:
        rewards = [0.3 * (logp - ref) for logp, ref in zip(row["logps"], row["ref_logps"], strict=True)]
        assert row["rewards"] == pytest.approx(rewards) and row["margins"] == pytest.approx([rewards[0] - rewards[1]])
    assert cli.main([*flags, "--output", "rewards.parquet"]) == 0
    assert pq.read_table("rewards.parquet").to_pylist() == rows


def test_score_takes_an_adapter_and_groups(folder, capsys):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make_trainer(folder, model="model", peft_config=config, learning_rate=1e-2, max_steps=4)
    trained(trainer)
    trainer.save_model("adapter")
    tiny_tokenizer().save_pretrained("adapter")
    ranked(6).to_json("groups.jsonl")
    groups = ["--dataset", "groups.jsonl", *FLAGS[2:]]
    assert cli.main(["score", "--model", "adapter", *groups, "--output", "rewards.jsonl"]) == 0
    assert "95 % confidence" in capsys.readouterr().out
    rows = [json.loads(line) for line in (folder / "rewards.jsonl").read_text().splitlines()]
    assert {len(row["rewards"]) for row in rows} <= {3, 4} and all(any(row["rewards"]) for row in rows)
    assert cli.main(["score", "--model", "model", *FLAGS]) == 2
    assert "ref_model is None, and model has no adapter" in capsys.readouterr().err
    assert cli.main(["score", "--model", "model", "--ref_model", "model", *FLAGS, "--output", "a.csv"]) == 2
    assert "ends in .jsonl or .parquet" in capsys.readouterr().err


def test_intervals_are_those_of_the_textbook():
    """Wilson: 8 of 10 are 0.8 (0.490 … 0.943). A group's comparisons count as one draw."""
    from datasets import Dataset

    def groups(margins, repeat=1):
        comparisons = {"comparisons": [[0, 1]] * repeat, "comparison_weights": [1.0] * repeat}
        return Dataset.from_list([{"rewards": [margin, 0.0], **comparisons} for margin in margins])

    for repeat in (1, 3):
        accuracy, margin = _intervals(groups([1.0] * 8 + [-1.0] * 2, repeat))
        assert accuracy.mean == pytest.approx(0.8)
        assert (accuracy.low, accuracy.high) == pytest.approx((0.4902, 0.9433), abs=1e-3)
        error = 1.96 * math.sqrt(0.64 * 10 / 9) / math.sqrt(10)
        assert (margin.mean, margin.low, margin.high) == pytest.approx((0.6, 0.6 - error, 0.6 + error))
    assert math.isinf(_intervals(groups([1.0]))[1].high)


@pytest.mark.slow
def test_cache_runs_under_torchrun(folder):
    """Every process computes a share, and what the first one prints is its own."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--no-python"]
    command = [*torchrun, sys.executable, "-m", "dpo_fast.cli", "cache", *MODEL]
    surroundings = {**os.environ, "PYTHONSAFEPATH": "1"}
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=surroundings)
    assert run.returncode == 0, run.stderr[-3000:]
    computed = int(run.stdout.split(" reference log-probs computed")[0].split()[-1])
    assert 10 < computed < 50, "one of two shares"
    assert sum(store.rows for store in info("cache/reference")) == 60
