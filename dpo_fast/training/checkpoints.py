"""Which checkpoint a run goes on from: one that was written to its end and that fits. Asked before anything is loaded.

A process may be killed while it writes. trainer_state.json comes last, when all ranks have written their parts
(`DPOTrainer`), and is taken away before a folder is written again (`reopen_checkpoint`): where it can be read, the rest
is there. A machine that loses power may still leave files that end too early, which their headers show.
"""

from __future__ import annotations

import json
import logging
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainerState

from dpo_fast.errors import InputError

STATE_FILE = "trainer_state.json"
_TORCH_FILES = (".pt", ".pth", ".bin")
_NAME = re.compile(r"checkpoint-(\d+)")
_ZERO_PART = re.compile(r"zero_pp_rank_(\d+)_.*optim_states\.pt")

logger = logging.getLogger(__name__)


def reopen_checkpoint(folder: str | Path) -> None:
    """Makes what an earlier run left in `folder` incomplete, before one of its files is written again."""
    Path(folder, STATE_FILE).unlink(missing_ok=True)


def unfinished(folder: Path) -> str | None:
    """Return what a checkpoint holds that was not written to its end; reads no more than headers."""
    part = _unfinished_part(folder)
    return None if part is None else f"no complete {part}"


def find_checkpoint(
    resume_from_checkpoint: str | bool | None,
    output_dir: str,
    problem_of: Callable[[Path], str | None] = unfinished,
) -> str | None:
    """The folder to resume from: the one given, or for True the last good one in `output_dir`.

    Later ones, as of a killed run that did not finish them, are named in a warning and left as they are.

    Args:
        resume_from_checkpoint: folder, or True.
        output_dir: where to look for True.
        problem_of: what a folder holds that is no good; None for nothing.

    Raises:
        ValueError: there is none.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is not True:
        if (problem := problem_of(Path(resume_from_checkpoint))) is not None:
            raise InputError(
                f"resume_from_checkpoint={str(resume_from_checkpoint)!r} holds {problem}; give a checkpoint-… folder "
                "that a trainer wrote to its end, not a saved model, or True for the last one in output_dir; weights "
                "alone begin a new run, with model=… that folder and ref_model=… the model before training"
            )
        return str(resume_from_checkpoint)
    numbered = {int(name[1]): path for path in Path(output_dir).glob("*") if (name := _NAME.fullmatch(path.name))}
    for _, folder in sorted(numbered.items(), reverse=True):
        if (problem := problem_of(folder)) is None:
            return str(folder)
        logger.warning("%s holds %s; trying the one before", folder, problem)
    raise InputError(
        f"resume_from_checkpoint is True, but {output_dir!r} holds no checkpoint-… folder"
        + (f" that is complete, of {len(numbered)}; leave resume_from_checkpoint out to begin anew" if numbered else "")
    )


def _unfinished_part(folder: Path) -> str | None:
    """The file of a checkpoint that is missing or not written to its end; None for a complete checkpoint."""
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return STATE_FILE
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and _ends_too_early(file))
    return next((str(file.relative_to(folder)) for file in files), None)


def useless(folder: Path) -> str | None:
    """Return what a checkpoint that was written to its end lacks for going on, or holds that is no good."""
    names = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    engine = any(name.startswith("global_step") for name in names)  # DeepSpeed's parts hold optimizer and schedule
    parts = {
        "optimizer": engine or any(name.startswith("optimizer") for name in names),
        "scheduler.pt": engine or "scheduler.pt" in names,
        "rng_state": any(name.startswith("rng_state") for name in names),
    }
    if not any(parts.values()):
        return "weights alone, as save_only_model=True keeps them: optimizer and schedule cannot go on"
    if lacking := [part for part, there in parts.items() if not there]:
        return f"no {' and no '.join(lacking)}, without which training cannot go on"
    try:
        TrainerState.load_from_json(str(folder / STATE_FILE))
    except TypeError as error:
        return f"a {STATE_FILE} that cannot be read ({error})"
    broken = (name for name in sorted(names) if name.endswith(".safetensors") and not _holds_finite(folder / name))
    return next((f"weights that are not finite in {name}" for name in broken), None)


def is_finite(weight: Tensor) -> bool:
    """Return whether all numbers are finite, without temporaries of the tensor's size."""
    if weight.numel() == 0 or not weight.is_floating_point():
        return True
    weight = weight.float() if weight.itemsize == 1 else weight  # there are no minima of 8 bits
    return all(bool(value.isfinite()) for value in torch.aminmax(weight))  # both are NaN where one number is


def _holds_finite(file: Path) -> bool:
    with safe_open(file, framework="pt") as tensors:
        return all(is_finite(tensors.get_tensor(name)) for name in tensors.keys())  # noqa: SIM118


def _ends_too_early(file: Path) -> bool:
    """Reads no more than headers."""
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt"):
                return False
        except SafetensorError:
            return True
    if file.suffix not in _TORCH_FILES:
        return False
    with file.open("rb") as opened:
        return opened.read(2) in (b"", b"PK") and not zipfile.is_zipfile(opened)  # torch.save writes zip archives


def check_checkpoint(model: nn.Module, folder: str, accelerator: Accelerator) -> None:
    """Compares names and shapes of the weights in `folder` with those of `model`; reads headers only.

    Sharded checkpoints of an engine, which hold no safetensors file, are left to the engine.

    Raises:
        ValueError: a weight is unknown to the model or has another shape, or the checkpoint is an adapter and the model
            has none, or the other way round, or ZeRO cut it for another number of ranks, or for DeepSpeed and there is
            none.
    """
    model = accelerator.unwrap_model(model)
    _check_zero(folder, accelerator)
    adapter, files = Path(folder, "adapter_model.safetensors"), sorted(Path(folder).glob("model*.safetensors"))
    if hasattr(model, "peft_config") and files and not adapter.exists():
        raise InputError(f"checkpoint {folder!r} holds a whole model, but an adapter is trained: leave out peft_config")
    if not hasattr(model, "peft_config") and adapter.exists():
        raise InputError(f"checkpoint {folder!r} holds an adapter, but the whole model is trained: pass peft_config")
    expected = model.state_dict(keep_vars=True)
    if adapter.exists():
        from peft import get_peft_model_state_dict

        expected, files = get_peft_model_state_dict(model, expected), [adapter]
    expected = {name: getattr(weight, "ds_shape", weight.shape) for name, weight in expected.items()}  # whole in ZeRO-3
    for name, shape in _saved_shapes(files):
        if name not in expected:
            raise InputError(f"checkpoint {folder!r} has a weight {name!r} that the model lacks: it is another model's")
        if list(expected[name]) != shape:
            raise InputError(
                f"checkpoint {folder!r} has {name!r} of shape {shape}, the model {list(expected[name])}; resume "
                "with the model and adapter configuration that the run began with"
            )


def _saved_shapes(files: list[Path]) -> Iterator[tuple[str, list[int]]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_slice(name).get_shape()


def _check_zero(folder: str, accelerator: Accelerator) -> None:
    """ZeRO's parts are for DeepSpeed alone, and for as many ranks, unless its own tool made them universal."""
    parts = (_ZERO_PART.search(file.name) for file in Path(folder).glob("global_step*/*"))
    saved, ranks = max((int(part[1]) + 1 for part in parts if part), default=0), accelerator.num_processes
    anew = f"begin a new run with model={folder!r} and ref_model the model that this run began with"
    if saved and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise InputError(
            f"resume_from_checkpoint={folder!r} holds what only DeepSpeed's ZeRO can read, and this run is without; "
            f"resume with the configuration of accelerate that it was saved under, or {anew}"
        )
    if saved not in (0, ranks) and not Path(folder, "latest_universal").exists():
        raise InputError(
            f"resume_from_checkpoint={folder!r} holds what DeepSpeed's ZeRO cut for {saved} ranks, and this run has "
            f"{ranks}; resume with {saved}, or {anew}"
        )
