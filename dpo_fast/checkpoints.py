"""Does a checkpoint fit the model that is to go on from it? Asked before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers.trainer_utils import get_last_checkpoint


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str) -> str | None:
    """The folder to resume from: the one given, or for True the last in `output_dir`.

    Raises:
        ValueError: there is none.
    """
    if not resume_from_checkpoint:
        return None
    if resume_from_checkpoint is True:
        folder = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
        if folder is None:
            raise ValueError(f"resume_from_checkpoint is True, but {output_dir!r} holds no checkpoint-… folder")
        return folder
    if not Path(resume_from_checkpoint, "trainer_state.json").is_file():
        raise ValueError(
            f"resume_from_checkpoint={str(resume_from_checkpoint)!r} holds no trainer_state.json; give a checkpoint-… "
            "folder that a trainer wrote, not a saved model"
        )
    return str(resume_from_checkpoint)


def check_checkpoint(model: nn.Module, folder: str) -> None:
    """Compares names and shapes of the weights in `folder` with those of `model`; reads headers only.

    Sharded checkpoints of an engine, which hold no safetensors file, are left to the engine.

    Raises:
        ValueError: a weight is unknown to the model or has another shape, or the checkpoint is an adapter and the model
            has none, or the other way round.
    """
    adapter, files = Path(folder, "adapter_model.safetensors"), sorted(Path(folder).glob("model*.safetensors"))
    if hasattr(model, "peft_config") and files and not adapter.exists():
        raise ValueError(f"checkpoint {folder!r} holds a whole model, but an adapter is trained: leave out peft_config")
    if not hasattr(model, "peft_config") and adapter.exists():
        raise ValueError(f"checkpoint {folder!r} holds an adapter, but the whole model is trained: pass peft_config")
    if adapter.exists():
        from peft import get_peft_model_state_dict

        expected, files = get_peft_model_state_dict(model), [adapter]
    else:
        expected = model.state_dict()
    for name, shape in _saved_shapes(files):
        if name not in expected:
            raise ValueError(f"checkpoint {folder!r} has a weight {name!r} that the model lacks: it is another model's")
        if list(expected[name].shape) != shape:
            raise ValueError(
                f"checkpoint {folder!r} has {name!r} of shape {shape}, the model {list(expected[name].shape)}; resume "
                "with the model and adapter configuration that the run began with"
            )


def _saved_shapes(files: list[Path]) -> Iterator[tuple[str, list[int]]]:
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                yield name, tensors.get_slice(name).get_shape()
