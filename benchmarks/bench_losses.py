"""What share of a training step is the loss itself, of every type, and where does the rest of the step go?

    python benchmarks/bench_losses.py --model NAME --batch_size 4 --steps 3 --out DIR

The step is a forward and backward of a packed batch of pairs with random tokens (prompt 120, completions 200 and 220),
with the loss inside the head's op, as the trainer runs it. The loss is timed alone, value and gradient, on the sequence
log-probs of that batch. A profile of one step, by operator, goes into the result as well.

The last line printed is one JSON object; the same is written to --out.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, environment, spread, write_result
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM

from dpo_fast import PreferenceGroup, add_dpo_forward, pack, use_shared_prefix
from dpo_fast.losses import LOSSES, SMOOTHED, LossParameters
from dpo_fast.losses.objective import Objective
from dpo_fast_kernels import SequenceLoss

PROMPT, CHOSEN, REJECTED = 120, 200, 220
# Operators of a profile → the part of the step that they are. The first name that begins an operator's name counts.
PARTS = {
    "dpo_fast::linear": "head",
    "dpo_fast::prefix_attention": "attention",
    "dpo_fast::gather": "gather score rows",
    "dpo_fast::sum": "gather score rows",
    "aten::mm": "products of the body",
    "aten::addmm": "products of the body",
    "aten::bmm": "products of the body",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name or path; the demo's model when left out")
    parser.add_argument("--batch_size", type=int, default=4, help="pairs")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=50, help="of each loss")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.model is None:
        from dpo_fast.commands.demo.model import demo_model

        options.model = str(demo_model())

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(device).train()
    add_dpo_forward(model)
    use_shared_prefix(model)
    step = Step(model, options.batch_size)

    step.run("sigmoid")  # warms up
    seconds = [timed(lambda: step.run("sigmoid")) for _ in range(options.steps)]
    median = spread(seconds)["median"]
    losses = {}
    for name in LOSSES:
        step.loss(name)
        took = spread([timed(functools.partial(step.loss, name)) for _ in range(options.repeats)])
        losses[name] = {
            "ms": 1e3 * took["median"],
            "ms_p80": 1e3 * took["p80"],
            "percent": 100 * took["median"] / median,
        }
    parts = profiled(lambda: step.run("sigmoid"), device)

    worst = max(losses, key=lambda name: losses[name]["percent"])
    lines = [
        f"  step {median:.3f} s; dearest loss {worst}: {losses[worst]['ms']:.3f} ms, {losses[worst]['percent']:.3f} %"
    ]
    lines += [f"  {share:5.1f} %  {part}" for part, share in parts.items()]
    result = {
        "question": "what share of a training step is the loss, and where does the rest go",
        "largest_percent": losses[worst]["percent"],
        "seconds_per_step": spread(seconds),
        "losses": losses,
        "parts_percent": parts,
        "summary": lines,
        "settings": {**vars(options), "out": str(options.out), "model": Path(options.model).name, "dtype": str(dtype)},
        "environment": environment(),
    }
    path = write_result(f"losses-b{options.batch_size}", result, options.out)
    print("\n".join(lines))
    print(json.dumps({"largest_percent": result["largest_percent"], "loss": worst, "file": str(path)}))


class Step:
    """A packed batch, and a step of the model on it under any loss."""

    def __init__(self, model, batch_size: int):
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.get_input_embeddings().weight.shape[0]

        def ids(count: int) -> list[int]:
            return torch.randint(vocabulary, (count,), generator=generator).tolist()

        groups = [
            PreferenceGroup(ids(PROMPT), [ids(CHOSEN), ids(REJECTED)], ref_logps=[-10.0 * CHOSEN, -10.0 * REJECTED])
            for _ in range(batch_size)
        ]
        self._model, self._packed = model, pack(groups).to(model.device)
        packed, weights = self._packed, self._packed.comparison_weights
        totals = torch.stack([weights.sum(), weights.sum() * CHOSEN])
        self._inputs = Objective({}).inputs(packed, totals)
        self._logps = packed.ref_logps + torch.randn(packed.ref_logps.shape, generator=generator).to(model.device)
        self._losses = {name: self._sequence_loss(name) for name in LOSSES}

    @staticmethod
    def _sequence_loss(name: str) -> SequenceLoss:
        parameters = LossParameters(label_smoothing=0.1 if name in SMOOTHED else 0.0)
        return SequenceLoss(Objective({name: 1.0}, parameters))

    def run(self, name: str) -> None:
        self._model.zero_grad()
        self._model(packed=self._packed, loss=self._losses[name], loss_inputs=self._inputs).loss.backward()

    def loss(self, name: str) -> None:
        self._losses[name].value_and_gradient(self._logps, self._inputs)


def timed(function) -> float:
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def profiled(function, device: torch.device) -> dict[str, float]:
    """Percent of a step by part: the time of outermost operators, ours with all that they call."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as record:
        function()
        synchronize()
    parts: dict[str, float] = {}
    for event in record.events():
        if not event.name.startswith(("aten::", "dpo_fast::")) or any(_is_ours(parent) for parent in _parents(event)):
            continue
        if _is_ours(event):
            took = event.device_time_total if cuda else event.cpu_time_total
        else:
            took = event.self_device_time_total if cuda else event.self_cpu_time_total
        part = next((part for name, part in PARTS.items() if event.name.startswith(name)), "elementwise, norms, copies")
        parts[part] = parts.get(part, 0.0) + took
    total = sum(parts.values())
    return {part: 100 * took / total for part, took in sorted(parts.items(), key=lambda item: -item[1])}


def _is_ours(event: Any) -> bool:
    return event.name.startswith("dpo_fast::")


def _parents(event: Any):
    while event.cpu_parent is not None:
        event = event.cpu_parent
        yield event


if __name__ == "__main__":
    main()
