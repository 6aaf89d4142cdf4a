"""Where a preference dataset comes from: the Hugging Face Hub, a data file, a folder of them, or a saved dataset."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError

from dpo_fast.data.formats import NUMBER_COLUMNS
from dpo_fast.data.text_files import check_json_file, csv_options
from dpo_fast.errors import InputError, reading

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = ", ".join(FILE_FORMATS)
logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # says there what it raises too
AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict


def load_preference_dataset(
    name_or_path: str,
    *,
    config_name: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    columns: Mapping[str, str] | None = None,
) -> AnyDataset:
    """Loads a dataset; no code that comes with a dataset is ever run.

    Args:
        name_or_path: an existing path (a json, jsonl, csv, parquet or arrow file, a folder of such files, or a folder
            written by `save_to_disk`), else the name of a dataset on the Hugging Face Hub.
        config_name: configuration of a dataset on the Hub.
        split: a split, `datasets` slices included (`train[:1000]`). None loads all splits; a lone file is `train`.
        streaming: read rows when they are asked for, as an `IterableDataset`; splits are whole ones then.
        columns: our names of columns → those of the dataset, where they differ. A CSV file's other columns are text,
            whatever it looks like.

    Raises:
        InputError: nothing is there, it holds no rows, it cannot be read, or it lacks the split.
    """
    cure = f"give a whole file ({SUFFIXES}) of rows, in UTF-8 where it is text, or a folder of files with equal columns"
    with reading("name_or_path", name_or_path, cure):
        path = Path(name_or_path).expanduser()
        if path.exists():
            numbers = [(columns or {}).get(name, name) for name in NUMBER_COLUMNS]
            return _load_local(path, numbers, config_name, split=split, streaming=streaming)
        if looks_local(name_or_path):
            raise InputError(f"name_or_path: {name_or_path!r} does not exist; give a valid path or a name on the Hub")
        try:
            return _load(name_or_path, name_or_path, config_name, split=split, streaming=streaming)
        except (FileNotFoundError, ConnectionError) as error:
            raise InputError(
                f"name_or_path: {name_or_path!r} is not a local path and was not loaded from the Hugging Face Hub "
                f"({error}); check the spelling, the network, and that you have access (`hf auth login`)"
            ) from error


def looks_local(name: str) -> bool:
    """Whether `name` can only be meant as a path: hub names are `owner/name`."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or Path(name).suffix in FILE_FORMATS


def _load_local(path: Path, numbers: list[str], config_name: str | None, **options: Any) -> AnyDataset:
    if path.is_dir() and any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        return _load_saved(path, **options)
    files = _data_files(path) if path.is_dir() else [path]
    kinds = {FILE_FORMATS.get(file.suffix) for file in files}
    if None in kinds:
        raise InputError(f"name_or_path: '{path}' ends in {path.suffix!r}; the file formats are {SUFFIXES}")
    if len(kinds) > 1:
        raise InputError(
            f"name_or_path: the folder '{path}' holds files of several formats ({', '.join(sorted(kinds))}), of which "
            "one would be read; give a folder of files of one format"
        )
    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"name_or_path: '{file}' is an empty file; it must hold at least one row")
        if kinds == {"json"}:
            check_json_file(file)
    if kinds == {"csv"}:
        options |= csv_options(files, numbers, options["streaming"])
    if path.is_dir():
        return _load(str(path), str(path), config_name, **options)
    return _load(str(path), *kinds, data_files=str(path), **options)


def _data_files(folder: Path) -> list[Path]:
    """Return the data files of a folder; JSON beside another format is taken for data where it is a list or lines."""
    found = [
        file
        for file in sorted(folder.rglob("*"))
        if file.suffix in FILE_FORMATS and not any(p.startswith((".", "__")) for p in file.relative_to(folder).parts)
    ]
    if not found:
        raise InputError(f"name_or_path: the folder '{folder}' holds no data file; the file formats are {SUFFIXES}")
    rows = [file for file in found if file.suffix != ".json" or file.read_bytes()[:1] == b"["]
    return rows if any(file.suffix not in (".json", ".jsonl") for file in rows) else found


def _load_saved(path: Path, split: str | None, streaming: bool) -> AnyDataset:
    saved = datasets.load_from_disk(str(path))
    splits = list(saved) if isinstance(saved, DatasetDict) else ["train"]
    if split is not None and split not in splits:
        raise InputError(f"split: {split!r} is not in the dataset saved at '{path}'; it has {', '.join(splits)}")
    chosen = saved[split] if split is not None and isinstance(saved, DatasetDict) else saved
    _refuse_no_rows(chosen, str(path))
    if not streaming:
        return chosen
    if isinstance(chosen, Dataset):
        return chosen.to_iterable_dataset()
    return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in chosen.items()})


def _load(shown: str, *args: Any, **kwargs: Any) -> AnyDataset:
    """`datasets.load_dataset`, with what lies behind an error in its place."""
    try:
        loaded = datasets.load_dataset(*args, **kwargs)
    except DatasetGenerationError as error:
        raise (error.__cause__ or error) from error
    except ValueError as error:
        if "corresponds to no data" in str(error):
            raise InputError(f"name_or_path: {shown!r} holds no rows") from error
        if "Unknown split" in str(error):
            raise InputError(f"split: {kwargs['split']!r} is not in {shown!r}: {error}") from error
        raise
    if not kwargs["streaming"]:
        _refuse_no_rows(loaded, shown)
    return loaded


def _refuse_no_rows(loaded: Dataset | DatasetDict, shown: str) -> None:
    if sum(map(len, loaded.values())) == 0 if isinstance(loaded, DatasetDict) else len(loaded) == 0:
        raise InputError(f"name_or_path: {shown!r} holds no rows")
