"""Makes the data of `dpo-fast demo`: controlled sentiment, as in section 6.1 of the DPO paper (arXiv 2305.18290).

    python examples/demo_data/make_demo_data.py --out dpo_fast/commands/demo

For every line of `demo_prompts.txt` the demo model samples `CANDIDATES` continuations of plain text (temperature 0.8,
top-p 0.95, no chat template). A continuation is cut after its last full sentence, because the trainer ends it with the
EOS token and the policy should learn to stop there, not in mid-sentence. One without a full sentence, one that goes on
inside the prompt's last word (its tokens would be others when prompt and completion are read as one text), one with
broken characters or a swear word, and duplicates are dropped. Its score is
`dpo_fast.commands.demo.samples.sentiment` of the continuation alone.

Four candidates are kept: those with the lowest and the highest score, and those nearest to one third and two thirds of
the way between them, in alphabetical order. They span what the model writes after this prompt, so nearly every
comparison has a clear winner; a prompt whose candidates lie closer together than `MIN_SPREAD` is left out. The held-out
prompts are treated alike: accuracy on them is accuracy on well separated pairs. The demo's other figure, the reward of
fresh samples, is not selected in any way.

Rows are `{"prompt": str, "completions": [4 strings], "scores": [4 floats]}`; completions keep their leading space. The
output depends on this file, the prompts, the model, the versions of torch and transformers and, where rounding decides
between two tokens, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import torch
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from dpo_fast.commands.demo.model import demo_model
from dpo_fast.commands.demo.samples import sentiment

PROMPTS = Path(__file__).with_name("demo_prompts.txt")
CANDIDATES = 8
KEPT = 4
MIN_SPREAD = 0.3
MAX_NEW_TOKENS = 40
PROMPTS_PER_BATCH = 12
SEED = 20231218

# The end of a sentence: not the point of a number, an initial or a title, and with the quote that closes after it.
SENTENCE_END = re.compile(r"(?<![0-9A-Z])(?<!Mr|Ms|Dr|St)(?<!Mrs)[.!?][\"')”’]*(?=\s|$)")

SWEAR_WORD = re.compile(r"shit|fuck|bitch|bastard|whore", re.IGNORECASE)


def read_prompts(path: Path) -> dict[str, list[str]]:
    """The prompts under each `# name` heading of the file, one a line."""
    sections: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            prompts = sections.setdefault(line[2:], [])
        elif line:
            prompts.append(line)
    return sections


@torch.no_grad()
def sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], seed: int
) -> list[list[str]]:
    """`CANDIDATES` raw continuations of each prompt."""
    torch.manual_seed(seed)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    sampled = model.generate(
        **inputs,
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
        top_k=0,
        num_return_sequences=CANDIDATES,
    )
    texts = tokenizer.batch_decode(sampled[:, inputs["input_ids"].shape[1] :])
    return [texts[start : start + CANDIDATES] for start in range(0, len(texts), CANDIDATES)]


def tidy(text: str) -> str | None:
    """The full sentences of the continuation's first paragraph; None where it is to be dropped."""
    text = re.split(r"\n|<\|", text)[0]  # what follows a special token is another document
    ends = [match.end() for match in SENTENCE_END.finditer(text)]
    if (
        not ends
        or text[0].isalnum()
        or not text.isprintable()
        or re.search("[<\ufffd]", text)
        or SWEAR_WORD.search(text)
    ):
        return None
    text = text[: ends[-1]]
    return text if len(text.split()) >= 3 else None


def select(completions: list[str]) -> tuple[list[str], list[float]]:
    """The `KEPT` completions that span the range of scores most evenly, in alphabetical order, and their scores."""
    scores = sentiment(completions)
    low, high = min(scores), max(scores)
    kept: list[int] = []
    for target in (low, high, low + (high - low) / 3, high - (high - low) / 3):
        remaining = [index for index in range(len(scores)) if index not in kept]
        kept.append(min(remaining, key=lambda index: abs(scores[index] - target)))
    kept.sort(key=completions.__getitem__)
    return [completions[index] for index in kept], [scores[index] for index in kept]


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the preference data of `dpo-fast demo`.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and eval.jsonl")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    folder = demo_model()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sections = read_prompts(PROMPTS)
    with Progress() as progress:
        task = progress.add_task("sampling", total=sum(map(len, sections.values())))
        for seed, (name, prompts) in enumerate(sections.items(), start=SEED):
            rows = []
            for start in range(0, len(prompts), PROMPTS_PER_BATCH):
                batch = prompts[start : start + PROMPTS_PER_BATCH]
                for prompt, texts in zip(batch, sample(model, tokenizer, batch, seed * 1000 + start), strict=True):
                    candidates = list(dict.fromkeys(filter(None, map(tidy, texts))))
                    if len(candidates) < KEPT:
                        progress.console.print(f"left out, only {len(candidates)} candidates: {prompt!r}")
                        continue
                    completions, scores = select(candidates)
                    if max(scores) - min(scores) < MIN_SPREAD:
                        progress.console.print(f"left out, candidates too much alike: {prompt!r}")
                        continue
                    rows.append({"prompt": prompt, "completions": completions, "scores": scores})
                progress.advance(task, len(batch))
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (args.out / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
