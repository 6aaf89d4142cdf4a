"""A trainer takes datasets in every form, says once what became of their rows, and refuses others before all else."""

from __future__ import annotations

import json
import logging
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict, IterableDatasetDict

from dpo_fast import cli
from dpo_fast.config import DPOConfig
from dpo_fast.trainer import DPOTrainer
from families import tiny_model, tiny_tokenizer
from preferences import assert_same_weights, make_trainer, pairs, trained

LOGGER = "dpo_fast.training.datasets"
MISSING = "no/such/model"


@pytest.mark.parametrize("style", ["torch", "numpy"])
@pytest.mark.parametrize("stream", [False, True], ids=["dataset", "stream"])
def test_training_does_not_depend_on_the_format(tmp_path, style, stream):
    dataset = pairs(12)
    options = {"train_sampling_strategy": "sequential"}
    plain = dataset.to_iterable_dataset() if stream else dataset
    expected = trained(make_trainer(tmp_path, plain, **options))
    assert_same_weights(trained(make_trainer(tmp_path, plain.with_format(style), **options)), expected, 0.0)


@pytest.mark.parametrize("style", [None, "torch"])
def test_evaluation_sets_of_streams_report_by_their_names(tmp_path, style):
    held_out = DatasetDict(easy=pairs(6, seed=1), hard=pairs(6, seed=2))
    streams = {name: part.to_iterable_dataset().with_format(style) for name, part in held_out.items()}
    expected = make_trainer(tmp_path, eval_dataset=held_out).evaluate()
    for given in (streams, IterableDatasetDict(streams), {**held_out, "hard": streams["hard"]}):
        found = make_trainer(tmp_path, eval_dataset=given).evaluate()
        for name in ("eval_easy_loss", "eval_hard_loss", "eval_hard_rewards/margins"):
            assert found[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7)


def test_a_prepared_dataset_may_have_a_format(tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=pairs(4))
    formatted = trainer.evaluate(trainer.eval_dataset.with_format("torch"))
    assert formatted["eval_loss"] == trainer.evaluate()["eval_loss"]


SPLITS = DatasetDict(train=pairs(4), test=pairs(4))
STREAMS = IterableDatasetDict({name: part.to_iterable_dataset() for name, part in SPLITS.items()})


@pytest.mark.parametrize(
    ("train", "held_out", "message"),
    [
        (None, None, "train_dataset is None"),
        (SPLITS, None, r"train_dataset is a DatasetDict with the splits 'train', 'test'; .*splits\['train'\]"),
        (STREAMS, None, r"train_dataset is a IterableDatasetDict with the splits 'train', 'test'"),
        ({"a": SPLITS["train"]}, None, r"train_dataset is a dict with the splits 'a'; .*splits\['a'\]"),
        (pairs(4), {"en": SPLITS}, "eval_dataset 'en' is a DatasetDict with the splits 'train', 'test'"),
        (pairs(4).to_list(), None, "the train dataset is a list; .*Dataset.from_list"),
        (pairs(4), pairs(4).to_list(), "the eval dataset is a list"),
        (pairs(4), {"en": [1]}, "the en dataset is a list"),
        (Dataset.from_list([{"text": "a"}]), None, "found the columns text"),
        (pairs(4), Dataset.from_list([{"text": "a"}]), "found the columns text"),
        (pairs(4).add_column("context", ["Numbers."] * 4), None, "'context'"),
    ],
)
def test_what_cannot_be_used_is_refused_before_a_model_is_loaded(tmp_path, train, held_out, message):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[])
    with pytest.raises(ValueError, match=message):
        DPOTrainer(MISSING, args=args, train_dataset=train, eval_dataset=held_out)


def test_columns_are_those_of_all_datasets(tmp_path):
    columns = {"prompt": "asked", "chosen": "better", "rejected": "worse"}
    dataset = pairs(8).rename_columns({"prompt": "asked", "chosen": "better", "rejected": "worse"})
    expected = trained(make_trainer(tmp_path, pairs(8)))
    trainer = make_trainer(tmp_path, dataset, columns=columns, eval_dataset={"more": dataset}, loss_type="simpo")
    assert "eval_more_loss" in trainer.evaluate() and "eval_loss" in trainer.evaluate(dataset)
    assert "eval_loss" in trainer.evaluate(trainer.train_dataset), "groups have been read already"
    assert_same_weights(trained(make_trainer(tmp_path, dataset, columns=columns)), expected, 0.0)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        ({"prompt": "a"}, {"prompt": "a"}),
        (["prompt=a", "chosen=b=c"], {"prompt": "a", "chosen": "b=c"}),
        ("prompt=my question", {"prompt": "my question"}),
    ],
)
def test_columns_may_be_given_as_on_the_command_line(tmp_path, value, expected):
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], columns=value)
    assert args.columns == expected and json.loads(args.to_json_string())["columns"] == expected


@pytest.mark.parametrize("value", ["prompt", ["prompt"], {"prompt": None}, {"prompt": 3}, {"prompt": ""}, 3, ["=a"]])
def test_columns_of_another_kind_are_refused(tmp_path, value):
    with pytest.raises(ValueError, match="columns=.* --columns prompt=instruction"):
        DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to=[], columns=value)


# What is said

LONG = Dataset.from_list([*pairs(8).to_list(), {"prompt": "w3", "chosen": " w4" * 80, "rejected": " w5"}])


def said(caplog, level):
    return [r.getMessage() for r in caplog.records if r.name == LOGGER and r.levelno == level]


def test_what_became_of_the_rows_is_said_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger=LOGGER):
        trainer = make_trainer(tmp_path, LONG, eval_dataset=pairs(4))
        trainer.evaluate()
    assert said(caplog, logging.WARNING) == [f"train: {trainer.data_summaries['train']}"]
    assert "1 completions cut to max_length" in said(caplog, logging.WARNING)[0]
    assert said(caplog, logging.INFO) == [f"eval: {trainer.data_summaries['eval']}"], "nothing happened to these"


@pytest.mark.parametrize(
    ("rows", "stream", "words"),
    [
        (LONG, False, "cut to max_length"),
        pytest.param(
            *(pairs(4).rename_column("prompt", "question"), True, "column 'question' is read as 'prompt'"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["cut", "mapped"],
)
def test_a_program_without_logging_hears_of_it(tmp_path, rows, words, stream):
    rows.to_json(tmp_path / "rows.jsonl")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    code = f"""
from datasets import load_dataset
from dpo_fast import DPOConfig, DPOTrainer
rows = load_dataset("json", data_files={str(tmp_path / "rows.jsonl")!r}, split="train", streaming={stream})
args = DPOConfig(output_dir={str(tmp_path / "out")!r}, use_cpu=True, report_to=[], max_length=64, max_steps=1)
DPOTrainer({str(tmp_path / "model")!r}, args=args, train_dataset=rows)
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count(words) == 1


def test_the_command_line_says_it_once(tmp_path, capfd, monkeypatch):
    LONG.to_json(tmp_path / "rows.jsonl")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --dataset {tmp_path}/rows.jsonl --output_dir {tmp_path}/out --max_steps 1"
    flags += f" --max_length 64 --use_cpu --report_to none --reference_cache_dir {tmp_path}/reference"
    assert cli.main(["train", *flags.split()]) == 0
    out, err = capfd.readouterr()
    assert (out + err).count("cut to max_length") == 1 and "train: 9 rows" in out
    assert logging.getLogger(LOGGER).level == logging.NOTSET


def test_the_command_line_maps_columns(tmp_path, capfd):
    dataset = pairs(4).rename_columns({"prompt": "asked", "chosen": "better"})
    dataset.add_column("context", ["Numbers."] * 4).to_json(tmp_path / "rows.jsonl")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    flags = f"--model {tmp_path}/model --dataset {tmp_path}/rows.jsonl --output_dir {tmp_path}/out --max_steps 1"
    flags += f" --use_cpu --report_to none --reference_cache_dir {tmp_path}/reference"
    assert cli.main(["train", *flags.split()]) == 2
    assert "--columns chosen=better" in capfd.readouterr().err
    assert cli.main(["train", *flags.split(), "--columns", "prompt=asked", "chosen=better"]) == 0
    assert "columns that are not read: context" in capfd.readouterr().out
    (tmp_path / "run.yaml").write_text("columns:\n  prompt: asked\n  chosen: better\n")
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml"), *flags.split()]) == 0
