"""A file that cannot be read is one line that names the file, what is wrong and the cure; text is read as written."""

from __future__ import annotations

import errno
import re
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
from datasets import Dataset, DatasetDict

from bad_files import BAD_FILES, GOOD_FILES, LINE, ROW
from dpo_fast.data import loading
from dpo_fast.data.loading import load_preference_dataset
from dpo_fast.data.prepare import prepare
from dpo_fast.errors import InputError
from dpo_fast.training.stream_batches import StreamBatches
from tiny_tokenizers import byte_tokenizer

TOKENIZER = byte_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def written(folder: Path, name: str, content: str | bytes) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(folder / name)


def groups_of(path: str, streaming: bool = False, **options) -> list[dict]:
    dataset = load_preference_dataset(path, split="train", streaming=streaming, **options)
    groups, _ = prepare(dataset, TOKENIZER, max_length=None, vocab_size=len(TOKENIZER))
    alone = SimpleNamespace(process_index=0, num_processes=1)
    return list(chain(*StreamBatches(groups, 8, lambda *lengths: 1, alone))) if streaming else list(groups)


def texts(group: dict) -> tuple[str, str, str]:
    prompt, *sides = (TOKENIZER.decode(ids) for ids in (group["prompt_ids"], *group["completion_ids"]))
    return prompt, *(side.removesuffix("</s>") for side in sides)


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_bad_files_are_refused_by_name(tmp_path, streaming):
    wrong = []
    for name, (content, words) in BAD_FILES.items():
        path = written(tmp_path, name, content)
        try:
            groups_of(path, streaming)
        except InputError as error:
            message = str(error)
            named = any(word in message for word in (name, "train", "stream", "dataset: found the columns"))
            if not (re.search(words, message) and named and "\n" not in message):
                wrong.append((name, message))
        else:
            wrong.append((name, "accepted"))
    assert not wrong, "\n".join(map(str, wrong))


@pytest.mark.parametrize("streaming", [False, True], ids=["dataset", "stream"])
def test_text_is_read_as_written(tmp_path, streaming):
    for name, (content, expected) in GOOD_FILES.items():
        if not (streaming and name == "packed.csv"):
            found = [texts(group) for group in groups_of(written(tmp_path, name, content), streaming)]
            assert found == expected, name


def test_numbers_of_a_csv_file_are_numbers_under_any_name(tmp_path):
    path = written(tmp_path, "rows.csv", "prompt,better,rejected,how much\n1,2,3,4\n1,2,3,0.5\n")
    dataset = load_preference_dataset(path, split="train", columns={"weight": "how much", "chosen": "better"})
    assert dataset.to_list() == [
        {"prompt": "1", "better": "2", "rejected": "3", "how much": much} for much in (4.0, 0.5)
    ]


def folder_of(tmp_path: Path, files: dict[str, str]) -> str:
    folder = tmp_path / "folder"
    folder.mkdir()
    for name, content in files.items():
        written(folder, name, content)
    return str(folder)


CSV = "prompt,chosen,rejected\nNA,b,c\n"
FOLDERS = {
    "two formats": ({"a.csv": CSV, "b.jsonl": LINE}, r"several formats \(csv, json\)"),
    "a list beside": ({"a.csv": CSV, "b.json": f"[{LINE}]"}, r"several formats \(csv, json\)"),
    "columns differ": (
        {"a.csv": CSV, "b.csv": "prompt,chosen\na,b\n"},
        "'.*b.csv' has the columns prompt, chosen, and",
    ),
    "schemas differ": ({"a.jsonl": LINE, "b.jsonl": '{"x": 1}\n'}, "'rejected'|columns"),
    "one is cut": ({"a.jsonl": LINE, "b.jsonl": LINE[:9]}, "JSON parse error"),
    "one is empty": ({"a.jsonl": LINE, "b.jsonl": ""}, "b.jsonl' is an empty file"),
    "nothing": ({"readme.md": "x"}, "holds no data file"),
}


@pytest.mark.parametrize(("files", "words"), FOLDERS.values(), ids=FOLDERS)
def test_bad_folders_are_refused(tmp_path, files, words):
    with pytest.raises(InputError, match=words):
        groups_of(folder_of(tmp_path, files))


def test_folders_of_one_format_load_whole(tmp_path):
    found = groups_of(folder_of(tmp_path, {"a.csv": CSV, "b.csv": CSV.replace("NA", "7"), "meta.json": '{"by": "me"}'}))
    assert sorted(map(texts, found)) == [("7", "b", "c"), ("NA", "b", "c")]


def test_a_saved_dataset_that_lacks_a_file_is_refused(tmp_path):
    for kind, dataset in {
        "one": Dataset.from_list([ROW]),
        "splits": DatasetDict(train=Dataset.from_list([ROW])),
    }.items():
        dataset.save_to_disk(tmp_path / kind)
        next((tmp_path / kind).rglob("*.arrow")).unlink()
        with pytest.raises(InputError, match=f"^name_or_path='.*{kind}' cannot be read .*arrow.*; give a whole"):
            load_preference_dataset(str(tmp_path / kind))
    Dataset.from_list([ROW]).select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(InputError, match="none' holds no rows|none' cannot be read"):
        load_preference_dataset(str(tmp_path / "none"))
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(InputError, match=r"^name_or_path='.*one' cannot be read \(JSONDecodeError"):
        load_preference_dataset(str(tmp_path / "one"))


DISKS = {errno.ENOSPC: "free space on that disk", errno.EACCES: "permission", errno.EROFS: "HF_DATASETS_CACHE"}


@pytest.mark.parametrize(("number", "cure"), DISKS.items())
def test_a_disk_that_is_full_or_forbidden_is_named(tmp_path, monkeypatch, number, cure):
    def fail(*args, **kwargs):
        raise OSError(number, "the disk says no")

    path = written(tmp_path, "rows.jsonl", LINE)
    rows = load_preference_dataset(path, split="train")
    with monkeypatch.context() as patch:
        patch.setattr(loading.datasets, "load_dataset", fail)
        with pytest.raises(InputError, match=f"^name_or_path='{path}' cannot be read .*the disk says no.*; .*{cure}"):
            load_preference_dataset(path)
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_batch", fail)
    monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "write_table", fail)
    with pytest.raises(InputError, match=f"^dataset='eval' cannot be read .*the disk says no.*; .*{cure}"):
        prepare(rows, TOKENIZER, max_length=None, name="eval")


def test_two_processes_give_the_message_of_one():
    rows = [{"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3 if k < 7 else 2**31]} for k in range(8)]
    messages = []
    for processes in (None, 2):
        with pytest.raises(InputError) as error:
            prepare(Dataset.from_list(rows), TOKENIZER, max_length=None, num_proc=processes)
        messages.append(str(error.value))
    assert messages[0] == messages[1] and "row 7: column 'rejected_ids'" in messages[0]
