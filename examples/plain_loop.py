"""DPO in a loop of your own, with accelerate and without a trainer.

    python examples/plain_loop.py --max_steps 20        # the model and the data of `dpo-fast demo`
    accelerate launch examples/plain_loop.py --model M --dataset D

A step is cut into packs of at most MAX_TOKENS tokens; its gradient is that of the whole step.
"""

import argparse
from contextlib import nullcontext
from importlib.resources import files
from itertools import chain, islice, repeat

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

import dpo_fast
from dpo_fast.commands.demo.model import demo_model

BETA, LEARNING_RATE, GROUPS_PER_BATCH, MAX_LENGTH, MAX_TOKENS = 0.1, 3e-5, 4, 1024, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name on the Hub")
    parser.add_argument("--dataset", default=str(files("dpo_fast") / "commands" / "demo" / "train.jsonl"))
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="plain-loop-dpo")
    options = parser.parse_args()

    config = dpo_fast.DPOConfig(options.output_dir)  # bf16 on a GPU that has it
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
    name = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(accelerator.device)
    dpo_fast.disable_dropout(model)
    dpo_fast.add_dpo_forward(model)  # model(packed=…)
    dpo_fast.use_shared_prefix(model)  # one copy of a prompt serves all of its completions

    rows = dpo_fast.load_preference_dataset(options.dataset, split="train").shuffle(seed=0)
    groups, summary = dpo_fast.prepare_dataset(rows, tokenizer, max_length=MAX_LENGTH)
    accelerator.print(summary)
    reference = dpo_fast.Reference(model, accelerator, layout="shared")
    groups = reference.with_logps(groups, "train")  # kept on disk: the second run computes nothing

    objective = dpo_fast.Objective({"sigmoid": 1.0}, dpo_fast.LossParameters(beta=BETA))
    loss = dpo_fast.SequenceLoss(objective, objective.statistics)  # the head makes its gradients in the forward
    collator = dpo_fast.DPOCollator(max_tokens=MAX_TOKENS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(groups, batch_size=GROUPS_PER_BATCH, collate_fn=collator)
    )

    model.train()
    for step, batch in enumerate(islice(chain.from_iterable(repeat(loader)), options.max_steps), start=1):
        totals = accelerator.reduce(batch["totals"], "sum")  # of the comparisons of all ranks
        report = torch.zeros(2, device=accelerator.device)  # loss, reward accuracy
        for packed in batch["packs"]:
            inputs = objective.inputs(packed, totals)
            with nullcontext() if packed is batch["packs"][-1] else accelerator.no_sync(model):
                output = model(packed=packed, loss=loss, loss_inputs=inputs)
                accelerator.backward(output.loss * accelerator.num_processes)  # ranks are averaged, and should add up
            compared = objective.compare(output.logps, *inputs)
            right = (compared.winner_ratios > compared.loser_ratios) * compared.weights
            report += torch.stack([output.loss.detach(), right.sum() / totals[0]])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss, accuracy = accelerator.reduce(report, "sum").tolist()
        accelerator.print(f"step {step}  loss {mean_loss:.6f}  reward accuracy {accuracy:.4f}")

    accelerator.unwrap_model(model).save_pretrained(options.output_dir, is_main_process=accelerator.is_main_process)
    tokenizer.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
