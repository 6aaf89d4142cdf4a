"""Where a preference dataset comes from: the Hugging Face Hub, a data file, a folder of them, or a saved dataset."""

from __future__ import annotations

from pathlib import Path

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.exceptions import DatasetGenerationError

from dpo_fast.errors import InputError

FILE_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES = ", ".join(FILE_FORMATS)
AnyDataset = Dataset | DatasetDict | IterableDataset | IterableDatasetDict


def load_preference_dataset(
    name_or_path: str, *, config_name: str | None = None, split: str | None = None, streaming: bool = False
) -> AnyDataset:
    """Loads a dataset; no code that comes with a dataset is ever run.

    Args:
        name_or_path: an existing path (a json, jsonl, csv, parquet or arrow file, a folder of such files, or a folder
            written by `save_to_disk`), else the name of a dataset on the Hugging Face Hub.
        config_name: configuration of a dataset on the Hub.
        split: a split, `datasets` slices included (`train[:1000]`). None loads all splits; a lone file is `train`.
        streaming: read rows when they are asked for, as an `IterableDataset`; splits are whole ones then.

    Raises:
        ValueError: nothing is there, it holds no rows, it cannot be read, or it lacks the split.
    """
    path = Path(name_or_path).expanduser()
    if not path.exists():
        if looks_local(name_or_path):
            raise InputError(f"name_or_path: {name_or_path!r} does not exist; give a valid path or a name on the Hub")
        return _load(name_or_path, name_or_path, config_name, split=split, streaming=streaming)
    if path.is_dir():
        return _load_folder(path, config_name, split, streaming)
    if path.suffix not in FILE_FORMATS:
        raise InputError(f"name_or_path: {name_or_path!r} ends in {path.suffix!r}; the file formats are {SUFFIXES}")
    if path.stat().st_size == 0:
        raise InputError(f"name_or_path: {name_or_path!r} is an empty file; it must hold at least one row")
    return _load(name_or_path, FILE_FORMATS[path.suffix], data_files=str(path), split=split, streaming=streaming)


def looks_local(name: str) -> bool:
    """Whether `name` can only be meant as a path: hub names are `owner/name`."""
    return name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1 or Path(name).suffix in FILE_FORMATS


def _load_folder(path: Path, config_name: str | None, split: str | None, streaming: bool) -> AnyDataset:
    if any((path / marker).exists() for marker in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        splits = list(saved) if isinstance(saved, DatasetDict) else ["train"]
        if split is not None and split not in splits:
            raise InputError(f"split: {split!r} is not in the dataset saved at '{path}'; it has {', '.join(splits)}")
        chosen = saved[split] if split is not None and isinstance(saved, DatasetDict) else saved
        if not streaming:
            return chosen
        if isinstance(chosen, Dataset):
            return chosen.to_iterable_dataset()
        return IterableDatasetDict({name: part.to_iterable_dataset() for name, part in chosen.items()})
    if not any(file.suffix in FILE_FORMATS for file in path.rglob("*")):
        raise InputError(f"name_or_path: the folder '{path}' holds no data file; the file formats are {SUFFIXES}")
    return _load(str(path), str(path), config_name, split=split, streaming=streaming)


def _load(shown: str, *args, **kwargs) -> AnyDataset:
    """`datasets.load_dataset`, with errors that name the argument and say what to do."""
    try:
        loaded = datasets.load_dataset(*args, **kwargs)
    except DatasetGenerationError as error:
        raise InputError(f"name_or_path: {shown!r} cannot be read: {error.__cause__ or error}") from error
    except (FileNotFoundError, ConnectionError) as error:
        raise InputError(
            f"name_or_path: {shown!r} is not a local path and was not loaded from the Hugging Face Hub ({error}); "
            "check the spelling, the network, and that you have access (`hf auth login`)"
        ) from error
    except ValueError as error:
        raise InputError(f"name_or_path: {shown!r} was not loaded: {error}") from error
    if kwargs["streaming"]:
        return loaded
    if sum(map(len, loaded.values())) == 0 if isinstance(loaded, DatasetDict) else len(loaded) == 0:
        raise InputError(f"name_or_path: {shown!r} holds no rows")
    return loaded
