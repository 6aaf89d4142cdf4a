"""DPO with transformers.Trainer: a collator and a `compute_loss`.

    python examples/transformers_trainer.py --max_steps 20        # the model and the data of `dpo-fast demo`
    accelerate launch examples/transformers_trainer.py --model M --dataset D

The loss of a step is the mean over its micro-batches and ranks of the mean over their comparisons. dpo_fast.DPOTrainer
takes the mean over all comparisons of a step, bounds the tokens of a pass, evaluates, and logs more.
"""

import argparse
from importlib.resources import files

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

import dpo_fast
from dpo_fast.commands.demo.model import demo_model


class PreferenceTrainer(Trainer):
    loss_is_scaled_for_ga = False  # compute_loss returns the mean of its batch

    def __init__(self, *args, beta: float = 0.1, **options):
        super().__init__(*args, **options)
        self.objective = dpo_fast.Objective({"sigmoid": 1.0}, dpo_fast.LossParameters(beta=beta))
        self.preference_loss = dpo_fast.SequenceLoss(self.objective, self.objective.statistics)
        self.accuracies: list[torch.Tensor] = []

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        (packed,), totals = inputs["packs"], inputs["totals"]
        loss_inputs = self.objective.inputs(packed, totals)
        output = model(packed=packed, loss=self.preference_loss, loss_inputs=loss_inputs)
        compared = self.objective.compare(output.logps, *loss_inputs)
        right = (compared.winner_ratios > compared.loser_ratios) * compared.weights
        self.accuracies.append(right.sum() / totals[0])
        return (output.loss, output) if return_outputs else output.loss

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs["reward_accuracy"] = self.accelerator.gather(torch.stack(self.accuracies)).mean().item()
            self.accuracies.clear()
        super().log(logs, start_time)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name on the Hub")
    parser.add_argument("--dataset", default=str(files("dpo_fast") / "commands" / "demo" / "train.jsonl"))
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="transformers-trainer-dpo")
    options = parser.parse_args()

    args = dpo_fast.DPOConfig(  # TrainingArguments, and what preferences need
        options.output_dir,
        max_steps=options.max_steps,
        per_device_train_batch_size=4,
        learning_rate=3e-5,
        lr_scheduler_type="constant",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
    )
    name = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    dpo_fast.disable_dropout(model)
    dpo_fast.add_dpo_forward(model)  # model(packed=…)
    dpo_fast.use_shared_prefix(model)  # one copy of a prompt serves all of its completions
    rows = dpo_fast.load_preference_dataset(options.dataset, split="train").shuffle(seed=0)
    groups, summary = dpo_fast.prepare_dataset(rows, tokenizer, max_length=args.max_length)
    print(summary)

    trainer = PreferenceTrainer(
        model,
        args,
        dpo_fast.DPOCollator(),
        train_dataset=groups,
        processing_class=tokenizer,
        beta=args.beta,
    )
    reference = dpo_fast.Reference(model, trainer.accelerator, layout="shared")
    trainer.train_dataset = reference.with_logps(groups, "train")  # kept on disk: the second run computes nothing
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
