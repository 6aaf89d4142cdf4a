"""Datasets load from files, folders and the Hub alike, and what cannot be loaded is explained by name."""

import json

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from dpo_fast.data import loading
from dpo_fast.data.loading import load_preference_dataset

PAIRS = [{"prompt": prompt, "chosen": " blue.", "rejected": " green."} for prompt in ("The sky is", "The sea is")]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet", "arrow"])
def test_files_and_folders_of_every_format_load(tmp_path, suffix):
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / f"train.{suffix}"
    dataset = Dataset.from_list(PAIRS)
    if suffix == "json":
        file.write_text(json.dumps(PAIRS))
    elif suffix == "arrow":
        dataset.save_to_disk(tmp_path / "saved")
        next((tmp_path / "saved").glob("*.arrow")).rename(file)
    else:
        getattr(dataset, {"jsonl": "to_json", "csv": "to_csv", "parquet": "to_parquet"}[suffix])(file)
    for path in (file, file.parent):
        assert load_preference_dataset(str(path), split="train").to_list() == PAIRS
        assert load_preference_dataset(str(path))["train"].to_list() == PAIRS
    assert load_preference_dataset(str(file), split="train[:1]").to_list() == PAIRS[:1]


def test_saved_datasets_load(tmp_path):
    dataset = Dataset.from_list(PAIRS)
    dataset.save_to_disk(tmp_path / "one")
    DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(tmp_path / "splits")
    assert load_preference_dataset(str(tmp_path / "one")).to_list() == PAIRS
    assert load_preference_dataset(str(tmp_path / "splits"), split="test").to_list() == PAIRS[1:]
    assert set(load_preference_dataset(str(tmp_path / "splits"))) == {"train", "test"}
    with pytest.raises(ValueError, match="split: 'dev' is not in .* it has train, test"):
        load_preference_dataset(str(tmp_path / "splits"), split="dev")


FILES = {
    "broken.json": ('{"prompt": ', "cannot be read"),
    "empty.jsonl": ("", "is an empty file"),
    "none.json": ("[]", "was not loaded|holds no rows"),
    "header.csv": ("prompt,chosen,rejected\n", "was not loaded|holds no rows"),
    "notes.txt": ("hello", "ends in '.txt'; the file formats are .json, .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_files_that_hold_no_rows_are_refused(tmp_path, name):
    content, message = FILES[name]
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        load_preference_dataset(str(tmp_path / name))
    assert name in str(error.value)


@pytest.mark.parametrize("path", ["./rows.jsonl", "rows.parquet", "/no/such/folder", "~/no-such-folder", "a/b/c"])
def test_a_missing_path_is_not_looked_for_on_the_hub(monkeypatch, path):
    monkeypatch.setattr(loading.datasets, "load_dataset", None)
    with pytest.raises(ValueError, match="does not exist"):
        load_preference_dataset(path)


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no data file"):
        load_preference_dataset(str(tmp_path))


def test_a_name_on_the_hub_is_passed_on_and_its_absence_explained(monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        if args[0] == "org/missing":
            raise datasets.exceptions.DatasetNotFoundError("404")
        return Dataset.from_list(PAIRS)

    monkeypatch.setattr(loading.datasets, "load_dataset", load_dataset)
    assert load_preference_dataset("org/rows", config_name="en", split="train").to_list() == PAIRS
    assert calls == [(("org/rows", "en"), {"split": "train", "streaming": False})], "and no trust_remote_code"
    with pytest.raises(ValueError, match="'org/missing' is not a local path .* Hub .*404"):
        load_preference_dataset("org/missing")


def test_a_stream_reads_the_same_rows(tmp_path):
    """From a file, a folder of files and a saved dataset, with and without splits."""
    file = tmp_path / "rows.jsonl"
    Dataset.from_list(PAIRS).to_json(file)
    Dataset.from_list(PAIRS).save_to_disk(tmp_path / "one")
    DatasetDict(train=Dataset.from_list(PAIRS), test=Dataset.from_list(PAIRS[1:])).save_to_disk(tmp_path / "splits")
    for path in (file, tmp_path / "splits"):
        stream = load_preference_dataset(str(path), split="train", streaming=True)
        assert isinstance(stream, IterableDataset) and list(stream) == PAIRS
    assert list(load_preference_dataset(str(tmp_path / "one"), streaming=True)) == PAIRS
    assert list(load_preference_dataset(str(tmp_path / "splits"), streaming=True)["test"]) == PAIRS[1:]
