"""DPO with PyTorch Lightning, on one device.

    python examples/lightning_loop.py --max_steps 20        # the model and the data of `dpo-fast demo`

The reference pass runs under accelerate, before Lightning takes over.
"""

import argparse
from importlib.resources import files

import lightning
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import dpo_fast
from dpo_fast.commands.demo.model import demo_model


class PreferenceModule(lightning.LightningModule):
    def __init__(self, model: PreTrainedModel, beta: float, learning_rate: float):
        super().__init__()
        self.model, self.learning_rate = model, learning_rate
        self.objective = dpo_fast.Objective({"sigmoid": 1.0}, dpo_fast.LossParameters(beta=beta))
        self.loss = dpo_fast.SequenceLoss(self.objective, self.objective.statistics)

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        (packed,), totals = batch["packs"], batch["totals"]
        inputs = self.objective.inputs(packed, totals)
        output = self.model(packed=packed, loss=self.loss, loss_inputs=inputs)
        compared = self.objective.compare(output.logps, *inputs)
        right = (compared.winner_ratios > compared.loser_ratios) * compared.weights
        accuracy = right.sum() / totals[0]
        self.log_dict({"loss": output.loss, "reward_accuracy": accuracy}, batch_size=1)
        self.print(f"step {self.global_step + 1}  loss {output.loss.item():.6f}  reward accuracy {accuracy.item():.4f}")
        return output.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.model.parameters(), lr=self.learning_rate, weight_decay=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name on the Hub")
    parser.add_argument("--dataset", default=str(files("dpo_fast") / "commands" / "demo" / "train.jsonl"))
    parser.add_argument("--max_steps", type=int, default=20)
    parser.add_argument("--output_dir", default="lightning-dpo")
    options = parser.parse_args()

    config = dpo_fast.DPOConfig(options.output_dir)  # bf16 on a GPU that has it
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")  # for the reference pass
    name = options.model or str(demo_model())
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).to(accelerator.device)
    dpo_fast.disable_dropout(model)
    dpo_fast.add_dpo_forward(model)  # model(packed=…)
    dpo_fast.use_shared_prefix(model)  # one copy of a prompt serves all of its completions
    rows = dpo_fast.load_preference_dataset(options.dataset, split="train").shuffle(seed=0)
    groups, summary = dpo_fast.prepare_dataset(rows, tokenizer, max_length=config.max_length)
    print(summary)
    reference = dpo_fast.Reference(model, accelerator, layout="shared")
    groups = reference.with_logps(groups, "train")  # kept on disk: the second run computes nothing

    trainer = lightning.Trainer(
        max_steps=options.max_steps,
        devices=1,
        precision="bf16-mixed" if config.bf16 else "32-true",
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=options.output_dir,
    )
    loader = DataLoader(groups, batch_size=4, collate_fn=dpo_fast.DPOCollator())
    trainer.fit(PreferenceModule(model.train(), beta=config.beta, learning_rate=3e-5), loader)
    model.save_pretrained(options.output_dir)
    tokenizer.save_pretrained(options.output_dir)


if __name__ == "__main__":
    main()
