"""How many preference pairs per second does a training step handle, against other trainers on the same rows?

    python benchmarks/run.py speed --dataset pairs.json --max_length 1024 --batch_size 4 --against trl plain
    python benchmarks/run.py speed --dataset pairs.json --max_length 1024 --best --global_batch 8
    python benchmarks/run.py speed --synthetic ultrafeedback --model llama-3.2-1b --precision bf16

Each side (`providers.py`) lives in a process of its own, so peak memory is its own. On a CPU the sides take
turns, a step each, while the others wait; on a GPU, whose memory they would share, one runs all its steps, then the
next, and the result is written after each. Token ids, order, seed, precision, optimizer and batch are the same.
Reference log-probs are computed before the clock starts. Losses and gradient norms of all steps are compared: where
they differ, the result is written with `disagrees`, and the exit status is 1. The first step of each side warms up and
does not count; after the timed ones another is watched for host syncs and time by part (`probe.py`) and does not count
either. A side that runs out of memory is reported as such.

same settings   the default: --batch_size groups in one micro-batch, times --accumulation, on every side
best against    --best: an optimizer step is --global_batch groups, and every side first tries micro-batches of 1, 2, 4
best            and 8 of its rows, one warm-up and one timed step each, with activation checkpointing where it does not
                fit without; then the fastest settings are timed as above

With --group_size K the rows are prompts with K ranked completions and no tie. A step is --batch_size such groups for
dpo_fast, and for the others the K·(K−1)/2 pairs of each of them.

    --grid max_length=512,1024 batch_size=1,2,4 lora=no,yes

runs all combinations one after the other, a result file each; a point that fails does not stop the others.

The last line printed is one JSON object (one a point of a grid); all of it is written to --out unless --no_result.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars

from dpo_fast.commands.bench.turns import Comparison, loss_tolerance
from suite.harness.results import RESULTS, environment, write_result
from suite.training.models import RANDOM_MODELS, model_config
from suite.training.providers import BETA
from suite.training.setting import PROVIDER_NAMES, Setting
from suite.training.side import measure
from suite.training.summary import GRADIENT_TOLERANCE, bare_gemm_rate, disagreements, figures, table
from suite.training.workloads import PUBLISHED, Group, dataset_groups, save_rows, synthetic_groups

MICRO_BATCHES = (1, 2, 4, 8)
GRID_CHOICES = {"lora": ("no", "yes"), "precision": tuple(GRADIENT_TOLERANCE), "synthetic": tuple(PUBLISHED)}
GRID_OPTIONS = ("max_length", "batch_size", "global_batch", "group_size", "model", *GRID_CHOICES)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    rows = parser.add_mutually_exclusive_group(required=True)
    rows.add_argument("--dataset", help="hub name, file or folder, in any format of dpo-fast train")
    rows.add_argument("--synthetic", choices=PUBLISHED, help="random tokens with the lengths of a published dataset")
    parser.add_argument("--model", help=f"folder, hub name or random {', '.join(RANDOM_MODELS)}; default the demo's")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=4, help="groups of a micro-batch, same settings")
    parser.add_argument("--accumulation", type=int, default=1, help="micro-batches of a step, same settings")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations, same settings")
    parser.add_argument("--compile", action="store_true", dest="compiled", help="torch.compile, on every side")
    parser.add_argument("--layer_kernels", help="compile, liger or none, in dpo_fast alone; default its own choice")
    parser.add_argument("--max_tokens", type=int, help="of a pack of dpo_fast; default what it takes by itself")
    parser.add_argument("--best", action="store_true", help="best against best, instead of same settings")
    parser.add_argument("--global_batch", type=int, default=8, help="groups of a step, best against best")
    parser.add_argument("--group_size", type=int, default=2, help="completions of a prompt")
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each side")
    parser.add_argument("--precision", choices=sorted(GRADIENT_TOLERANCE), default="fp32")
    parser.add_argument(
        "--ours", choices=PROVIDER_NAMES[:2], default="dpo_fast", help="whom the others are compared to"
    )
    parser.add_argument("--against", nargs="*", choices=PROVIDER_NAMES[1:], default=["trl"], help="none: alone")
    parser.add_argument("--lora", action="store_true", help="train a rank-16 adapter instead of all weights")
    parser.add_argument("--memory_gib", type=float, help="what a side may allocate; default what is free")
    parser.add_argument("--grid", nargs="+", metavar="OPTION=VALUE,…", help=f"of {', '.join(GRID_OPTIONS)}")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no_result", action="store_true", help="print only, write no file")
    options = parser.parse_args(argv)
    try:
        options.points = _points(options.grid)
    except ValueError as error:
        parser.error(str(error))
    return options


def _points(grid: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return all combinations of what --grid lists; a single empty one without --grid."""
    values: dict[str, list[Any]] = {}
    for part in grid or ():
        name, _, listed = part.partition("=")
        if name not in GRID_OPTIONS or not listed:
            raise ValueError(f"--grid: {part!r} is not known; write OPTION=VALUE,… with one of {list(GRID_OPTIONS)}")
        values[name] = [_value(name, text) for text in listed.split(",")]
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


def _value(name: str, text: str) -> Any:
    if name in GRID_CHOICES:
        if text not in GRID_CHOICES[name]:
            raise ValueError(f"--grid: {name}={text} is not known; choose from {list(GRID_CHOICES[name])}")
        return text == "yes" if name == "lora" else text
    if name == "model":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"--grid: {name}={text} must be a whole number of at least 1")
    return int(text)


def main() -> None:
    options = parse()
    disable_progress_bars()
    failed = 0
    for point in options.points:
        try:
            run(argparse.Namespace(**{**vars(options), **point}))
        except (SystemExit, ValueError) as error:
            if not options.grid:
                raise
            failed += 1
            print(f"{point}: {error}", flush=True)
    if failed:
        sys.exit(f"{failed} of {len(options.points)} points failed, see above")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Prepare the rows, run the sides, compare them, print and write the result; return it."""
    is_demo = options.model is None
    if is_demo:
        from dpo_fast.commands.demo.model import demo_model

        options.model = str(demo_model())
    settings = {name: _setting(options, name) for name in (options.ours, *options.against)}
    trials: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        groups = _groups(options, _groups_a_step(options) * settings[options.ours].all_steps)
        save_rows(groups, folder)
        if options.best:
            settings = {name: _fastest(setting, folder, trials) for name, setting in settings.items()}
        does_not_fit = {name: "at no micro-batch" for name, setting in settings.items() if setting is None}
        settings = {name: setting for name, setting in settings.items() if setting}
        gemm = bare_gemm_rate(options.model, options.precision)
        alone = torch.cuda.is_available()
        measured = Comparison({}, {}, in_turns=not alone)
        for part in [{name: each} for name, each in settings.items()] if alone else [settings]:
            found = measure(part, folder)
            measured = Comparison(
                measured.reports | found.reports, measured.failures | found.failures, found.in_turns and not alone
            )
            result = _result(options, is_demo, measured, settings, groups, gemm, does_not_fit, trials)
    print("\n".join(result["summary"]))
    rates = {name: side["pairs_per_second"] for name, side in result["sides"].items()}
    last = {"speedup": result.get("speedup"), "pairs_per_second": rates, "settings": result["settings"]}
    print(json.dumps(last), flush=True)
    if result["disagrees"]:
        sys.exit(f"what computes something else is not comparable: {'; '.join(result['disagreements'])}")
    return result


def _result(
    options: argparse.Namespace,
    is_demo: bool,
    measured: Comparison,
    settings: Mapping[str, Setting],
    groups: Sequence[Group],
    gemm: Mapping[str, Any],
    does_not_fit: Mapping[str, str],
    trials: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what the sides so far found, and write it."""
    does_not_fit = {**does_not_fit, **_reasons(measured)}
    if options.ours in does_not_fit:
        sys.exit(f"{options.ours} does not fit: {does_not_fit[options.ours]}; lower batch_size or max_length")
    groups_a_step = _groups_a_step(options)
    comparisons = groups_a_step * options.group_size * (options.group_size - 1) // 2
    tolerance = loss_tolerance(options.precision == "fp32", BETA, comparisons)
    differ = disagreements(measured.reports, tolerance, GRADIENT_TOLERANCE[options.precision])
    compared = figures(measured.reports, settings, groups, groups_a_step, gemm)
    result = {
        "question": "pairs per second of a training step, "
        + ("each side at its fastest setting" if options.best else "same settings on every side"),
        **next(iter(compared["against"].values()), {}),
        **compared,
        "disagrees": bool(differ),
        "disagreements": differ,
        "does_not_fit": does_not_fit,
        **({"trials": trials} if options.best else {}),
        "turns": "a step each" if measured.in_turns else "all steps of one side, then of the next",
        "settings": _recorded(options),
        "environment": environment(),
    }
    result["summary"] = table(result)
    if not options.no_result:
        print("written to", write_result(_question(options, is_demo), result, options.out), flush=True)
    return result


def _groups_a_step(options: argparse.Namespace) -> int:
    return options.global_batch if options.best else options.batch_size * options.accumulation


def _setting(options: argparse.Namespace, provider: str) -> Setting:
    return Setting(
        provider,
        options.model,
        micro_batch=_rows_of(options, provider, options.global_batch if options.best else options.batch_size),
        accumulation=1 if options.best else options.accumulation,
        checkpointing=options.checkpointing,
        compiled=options.compiled,
        layer_kernels=options.layer_kernels,
        precision=options.precision,
        lora=options.lora,
        max_length=options.max_length,
        max_tokens=options.max_tokens,
        steps=options.steps,
        memory_gib=options.memory_gib,
    )


def _rows_of(options: argparse.Namespace, provider: str, groups: int) -> int:
    """Return the number of a side's own rows that so many groups are."""
    return groups * (1 if provider == "dpo_fast" else options.group_size * (options.group_size - 1) // 2)


def _groups(options: argparse.Namespace, count: int) -> list[Group]:
    lengths = {"group_size": options.group_size, "max_length": options.max_length}
    vocab_size = model_config(options.model).get_text_config().vocab_size
    if options.synthetic:
        return synthetic_groups(options.synthetic, count, vocab_size=vocab_size, **lengths)
    from transformers import AutoTokenizer

    from dpo_fast.commands.demo.model import demo_model

    tokenizer = AutoTokenizer.from_pretrained(demo_model() if options.model in RANDOM_MODELS else options.model)
    return dataset_groups(options.dataset, count, tokenizer=tokenizer, vocab_size=vocab_size, **lengths)


def _fastest(setting: Setting, folder: str, trials: dict[str, list[dict[str, Any]]]) -> Setting | None:
    """Try the micro-batches that make up the setting's step; return the fastest, or None when none fits."""
    tried: dict[Setting, float] = {}
    too_large: set[bool] = set()  # with and without checkpointing
    for micro_batch in (size for size in MICRO_BATCHES if setting.rows % size == 0):
        for checkpointing in (False, True):
            if checkpointing in too_large:  # a smaller micro-batch did not fit
                continue
            trial = replace(
                setting, micro_batch=micro_batch, accumulation=setting.rows // micro_batch, checkpointing=checkpointing
            )
            record: dict[str, Any] = {"micro_batch": micro_batch, "checkpointing": checkpointing}
            trials.setdefault(setting.provider, []).append(record)
            found = measure({setting.provider: replace(trial, steps=1, watched=False)}, folder)
            if report := found.reports.get(setting.provider):
                (tried[trial],) = report.seconds
                record["seconds"], record["peak_memory_gib"] = tried[trial], report.peak_memory / 2**30
            else:
                too_large.add(checkpointing)
                record["does_not_fit"] = _reasons(found)[setting.provider]
            print(f"tried {setting.provider}: {record}", flush=True)
            if "seconds" in record:
                break  # computing activations again only takes longer
    return min(tried, key=tried.get) if tried else None


def _reasons(measured: Comparison) -> dict[str, str]:
    return {name: failure.message[:200] for name, failure in measured.failures.items()}


def _recorded(options: argparse.Namespace) -> dict[str, Any]:
    left_out = ("no_result", "out", "grid", "points")
    named = {name: Path(getattr(options, name)).name for name in ("dataset", "model") if getattr(options, name)}
    return {**{name: value for name, value in vars(options).items() if name not in left_out}, **named}


def _question(options: argparse.Namespace, is_demo: bool) -> str:
    """Return the name of the result file, which leaves defaults out."""
    batch = f"global{options.global_batch}" if options.best else f"b{options.batch_size}"
    parts = [
        "train-best" if options.best else "train",
        *([options.ours] if options.ours != "dpo_fast" else []),
        *([] if is_demo else [Path(options.model).name]),
        *([options.synthetic] if options.synthetic else []),
        "lora" if options.lora else "full",
        f"{options.precision}-len{options.max_length}-{batch}",
        *([f"x{options.accumulation}"] if options.accumulation > 1 and not options.best else []),
        *(["checkpointing"] if options.checkpointing and not options.best else []),
        *(["compiled"] if options.compiled else []),
        *([f"layers-{options.layer_kernels}"] if options.layer_kernels else []),
        *([f"packs{options.max_tokens}"] if options.max_tokens else []),
        *([f"k{options.group_size}"] if options.group_size > 2 else []),
        *([f"vs-{'-'.join(options.against)}"] if options.against else []),
    ]
    return "-".join(parts)
