"""The steps of a call on a GPU: what runs, in which order, and how many seconds each may take.

`first` proves and measures what every claim waits for. `more` holds what is left, the most telling first. Both have a
rehearsal: the same steps on a CPU at toy sizes, Triton kernels in Triton's interpreter. None of its figures counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[3]
SECONDS = 480  # of one call, whatever its steps add up to
LARGE = "32_bits or to_the_31 or far_rows or large_on_gpu"  # tens of GB
SLOW = "every_candidate"  # compiles for minutes
_INTERPRETED = {"TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Step:
    """One process of a call.

    Attributes:
        name: name of the step, of its log, and of the line in the summary.
        seconds: seconds after which the process is ended.
        command: its arguments, Python's own; OUT stands for the folder of results.
        environment: what it sets.
    """

    name: str
    seconds: float
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


def _ask(line: str) -> list[str]:
    """Return the command of a question of `run.py`."""
    return [str(ROOT / "benchmarks" / "run.py"), *line.split(), "--out", "OUT"]


def gpu_tests() -> list[str]:
    """Return the test files with a test of a GPU: whoever collects all files spends most of the step on it."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "pytest.mark.gpu" in path.read_text(encoding="utf-8")]


def _pytest(files: Sequence[str], *options: str) -> list[str]:
    return ["-Pm", "pytest", "-v", "--tb=short", "--durations=10", "-p", "no:cacheprovider", *options, *files]


def _workers(count: int) -> list[str]:
    return ["--numprocesses", str(count), "--dist", "worksteal"]


_SPEED = "speed --synthetic ultrafeedback --precision bf16 --max_length 2048"
_1B, _8B = "--model llama-3.2-1b --batch_size 8", "--model llama-3-8b --lora --batch_size 4 --checkpointing"
_HEADS = "head --shapes smollm2-135m qwen2.5-1.5b qwen3-4b gemma-2-2b --rows 8192"


def first() -> list[Step]:
    """Return the steps of `make gpu`."""
    return [
        Step("smoke", 50, _ask("smoke")),  # begins with the ceilings
        Step("tests", 125, _pytest(gpu_tests(), "-m", "gpu", "-k", f"not ({LARGE} or {SLOW})", *_workers(14))),
        Step("training", 105, _ask(f"{_SPEED} {_1B} --against trl")),
        Step(
            "head",
            70,
            _ask(
                "head --shapes llama-3-8b --rows 8192 16384 --seconds 50 --providers"
                " preference kept recomputed forward fused trl plain untiled"
            ),
        ),
        Step("kernels", 25, _ask("kernels")),
        Step("attention", 30, _ask("attention --models llama-3-8b --backends triton varlen --seconds 10")),
        Step(
            "rows",
            15,
            _ask(
                "rows --shapes llama-3-8b --dtypes fp32 bf16 --seconds 4 --providers triton torch sequence-triton plain"
            ),
        ),
        Step("layout", 45, _ask("layout --steps 10")),
    ]


def more() -> list[Step]:
    """Return the steps of `make gpu-more`."""
    alone = f"{_SPEED} {_1B} --steps 4 --against"
    return [
        Step("layers compiled", 45, _ask(f"{alone} --compile")),
        Step("layers liger", 30, _ask(f"{alone} --layer_kernels liger")),
        Step("lora", 95, _ask(f"{_SPEED} {_8B} --steps 4")),
        Step("best", 175, _ask(f"{_SPEED} --model llama-3.2-1b --best --global_batch 8 --steps 3")),
        Step("large tests", 40, _pytest(gpu_tests(), "-m", "gpu", "-k", LARGE)),
        Step("other heads", 50, _ask(f"{_HEADS} --seconds 40")),
        Step("liger", 35, _ask("liger --seconds 15")),
    ]


def first_rehearsed() -> list[Step]:
    """Return the steps of `make gpu` for a CPU: collected for a GPU, and one file's tests for a CPU in their place."""
    interpreted = str(ROOT / "tests" / "kernels" / "test_gather_rows.py")
    alike = ["-k", f"not ({LARGE} or {SLOW})"]
    return [
        Step("smoke", 50, _ask("smoke"), _INTERPRETED),
        Step("collected tests", 35, _pytest(gpu_tests(), "-m", "gpu", *alike, "--collect-only", "-q")),
        Step("tests", 75, _pytest([interpreted], "-k", f"not ({LARGE} or {SLOW} or compiles)", *_workers(2))),
        Step(
            "training",
            105,
            _ask("speed --synthetic ultrafeedback --model tiny --max_length 64 --batch_size 2 --steps 2 --against trl"),
        ),
        Step(
            "head",
            70,
            _ask(
                "head --shapes tiny --rows 24 --dtype fp32 --repeats 1 --seconds 30 --providers"
                " preference kept recomputed forward fused trl plain untiled"
            ),
            _INTERPRETED,
        ),
        Step("kernels", 30, _ask("kernels --model tiny --max_length 64 --batch_size 2")),
        Step("attention", 30, _ask("attention --backends triton sdpa --seconds 1"), _INTERPRETED),
        Step(
            "rows",
            30,
            _ask("rows --shapes tiny --rows 8 --dtypes fp32 --seconds 4 --repeats 1 --providers triton torch"),
            _INTERPRETED,
        ),
        Step("layout", 45, _ask("layout --size tiny --steps 3 --max_length 200")),
    ]


def more_rehearsed() -> list[Step]:
    """Return the steps of `make gpu-more` for a CPU."""
    alone = "speed --synthetic ultrafeedback --model tiny --max_length 64 --batch_size 2 --steps 1 --against"
    best = "speed --synthetic hh --model tiny --max_length 64 --best --global_batch 1 --steps 1 --against trl"
    return [
        Step("layers compiled", 90, _ask(f"{alone} --compile")),
        Step("layers liger", 45, _ask(f"{alone} --layer_kernels none")),  # Liger's kernels need a GPU
        Step("lora", 55, _ask(f"{alone} --lora --checkpointing")),
        Step("best", 135, _ask(best)),
        Step("large tests", 50, _pytest(gpu_tests(), "-m", "gpu", "-k", LARGE, "--collect-only", "-q")),
        Step("other heads", 40, _ask("head --shapes tiny --rows 40 --dtype fp32 --repeats 1 --seconds 5")),
        Step("liger", 45, _ask("liger --shapes tiny --rows 40 --repeats 1 --seconds 5")),
    ]
