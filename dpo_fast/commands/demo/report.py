"""What the demo shows: a table, completions before and after, and a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from dpo_fast.commands.demo.samples import Samples


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo measured; rewards are sentiment scores in [−1, 1], KL and margins are in nats."""

    accuracy: float
    margin: float
    before: Samples
    after: Samples
    sequence_kl: float
    pairs_per_second: float
    training_seconds: float
    reference_seconds: float
    computed_references: int
    all_references: int
    run_tokens: int
    usual_tokens: int
    log: Sequence[Mapping[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        """The figures, for a JSON file."""
        return {
            "held_out_reward_accuracy": self.accuracy,
            "held_out_reward_margin": self.margin,
            "mean_reward_before": self.before.mean_reward,
            "mean_reward_after": self.after.mean_reward,
            "sequence_kl": self.sequence_kl,
            "pairs_per_second": self.pairs_per_second,
            "training_seconds": self.training_seconds,
            "reference_seconds": self.reference_seconds,
            "computed_references": self.computed_references,
            "all_references": self.all_references,
            "run_tokens": self.run_tokens,
            "usual_tokens": self.usual_tokens,
        }


def print_report(result: DemoResult, console: Console) -> None:
    """Prints three completions before and after, then the table."""
    for index in _telling(result):
        console.print(
            Panel(
                f"[red]before {result.before.rewards[index]:+.2f}[/red] {_line(result.before.texts[index])}\n"
                f"[green]after  {result.after.rewards[index]:+.2f}[/green] {_line(result.after.texts[index])}",
                title=f"{result.before.prompts[index]} …",
                title_align="left",
            )
        )
    before, after = result.before.mean_reward, result.after.mean_reward
    reused = result.all_references - result.computed_references
    table = Table(title="dpo-fast demo: controlled sentiment", show_header=False)
    rows = [
        ("held-out reward accuracy", f"{result.accuracy:.3f}", "0.5 is chance"),
        ("held-out reward margin", f"{result.margin:+.3f}", "nats × β"),
        ("mean sentiment of fresh samples", f"{before:+.3f} → {after:+.3f}", f"{after - before:+.3f}"),
        ("sequence KL to the reference", f"{result.sequence_kl:.2f}", "nats"),
        ("pairs per second", f"{result.pairs_per_second:.2f}", f"training took {result.training_seconds:.0f} s"),
        (
            "reference log-probs",
            f"{result.computed_references} computed, {reused} reused",
            f"{result.reference_seconds:.0f} s",
        ),
        ("tokens run in an epoch", f"{result.run_tokens:,}", "one prompt a group, no padding"),
        (
            "the same as padded pairs",
            f"{result.usual_tokens:,}",
            f"{result.usual_tokens / result.run_tokens:.1f}× as many",
        ),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _line(text: str) -> str:
    return " ".join(text.split()).replace("[", r"\[")


def _telling(result: DemoResult) -> list[int]:
    """Three samples of different prompts whose change is nearest to the mean change: neither picked best nor worst."""
    mean = result.after.mean_reward - result.before.mean_reward
    changes = [after - before for before, after in zip(result.before.rewards, result.after.rewards, strict=True)]
    chosen: list[int] = []
    for index in sorted(range(len(changes)), key=lambda i: abs(changes[i] - mean)):
        if all(result.before.prompts[index] != result.before.prompts[other] for other in chosen):
            chosen.append(index)
        if len(chosen) == 3:
            break
    return chosen


def draw_picture(result: DemoResult, path: Path) -> None:
    """Writes loss, margin and accuracy over the steps, and the reward before and after, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    training = [row for row in result.log if "loss" in row]
    held_out = [row for row in result.log if "eval_loss" in row]
    figure, ((loss, margin), (accuracy, reward)) = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    panels = [
        (loss, "loss", "loss"),
        (margin, "rewards/margins", "reward margin"),
        (accuracy, "rewards/accuracies", "reward accuracy"),
    ]
    for axes, key, title in panels:
        axes.plot([row["step"] for row in training], [row[key] for row in training], color="#9db4c0", label="training")
        axes.plot(
            [row["step"] for row in held_out], [row[f"eval_{key}"] for row in held_out], "o-", color="#c1440e",
            label="held out",
        )  # fmt: skip
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
    loss.legend()
    bins = [i / 5 - 1 for i in range(11)]
    for samples, color, label in ((result.before, "#9db4c0", "before"), (result.after, "#c1440e", "after")):
        reward.hist(samples.rewards, bins, alpha=0.6, color=color, label=f"{label}, mean {samples.mean_reward:+.2f}")
    reward.set(title="sentiment of fresh samples", xlabel="VADER compound score", ylabel="samples")
    reward.legend()
    figure.suptitle("dpo-fast demo: SmolLM2-135M learns to write positively from ranked completions")
    figure.savefig(path, dpi=130)
    plt.close(figure)
