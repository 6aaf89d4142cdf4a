"""Patching TRL: in place and back, around any program, refused for other versions. What runs TRL's own path is as it
was and says so. TRL's other trainers get the same numbers from our head."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from math import isnan
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from families import VOCAB, tiny_model, tiny_tokenizer
from preferences import pairs

trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

from test_integration_trl import TOLERANCE, assert_same_log, compared, make, trained  # noqa: E402
from trl import DPOTrainer as ImportedBefore  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402
from trl.trainer import utils  # noqa: E402

import dpo_fast  # noqa: E402
from dpo_fast.commands import run as run  # noqa: E402
from dpo_fast.integrations.trl import DPOTrainer, patch_trl, unpatch_trl  # noqa: E402
from dpo_fast.integrations.trl.batches import CannotPackError, pair_groups  # noqa: E402
from dpo_fast.integrations.trl.kernel import LinearLogProbs  # noqa: E402
from dpo_fast.integrations.trl.trainer import ADDED, STOCK  # noqa: E402
from dpo_fast_kernels.head import tiles  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tiny_model("llama").save_pretrained(folder / "llama")
    return folder


# ---- patching ----


def test_patching_and_unpatching_restore_the_class_exactly():
    before, kernel = dict(vars(ImportedBefore)), utils._ChunkedLogProbFunction
    try:
        patch_trl()
        patch_trl()
        changed = {name for name, value in vars(ImportedBefore).items() if value is not before.get(name, patch_trl)}
        assert changed == {*STOCK, *ADDED}
        assert utils._ChunkedLogProbFunction is LinearLogProbs
        assert trl.DPOTrainer is ImportedBefore, "what was imported before is patched too"
    finally:
        unpatch_trl()
    unpatch_trl()
    assert dict(vars(ImportedBefore)) == before
    assert list(vars(ImportedBefore)) == list(before)
    assert utils._ChunkedLogProbFunction is kernel


def test_a_trainer_made_before_goes_on_training(folder):
    plain, _ = trained(trl.DPOTrainer, folder)
    trainer = make(trl.DPOTrainer, folder)
    patch_trl()
    try:
        trainer.train()
        trainer.evaluate()
    finally:
        unpatch_trl()
    assert_same_log(trainer, plain)


@pytest.mark.parametrize(("found", "fits"), [("1.15.2", False), ("1.16.3", True), ("1.17.0", False), ("2.0.0", False)])
def test_other_versions_are_refused(monkeypatch, found, fits):
    monkeypatch.setattr("dpo_fast.integrations.trl.version", lambda name: found)
    if fits:
        patch_trl()
        unpatch_trl()
        return
    with pytest.raises(ValueError, match=rf"trl: version {found} is installed.*trl==1\.16\.\*"):
        patch_trl()
    assert utils._ChunkedLogProbFunction is ChunkedLogProbFunction


def test_another_version_is_refused_before_anything_is_taken_from_it():
    code = """
import importlib.metadata, sys
importlib.metadata.version = lambda name: "1.9.0"
try:
    import dpo_fast.integrations.trl
except ValueError as error:
    print("version 1.9.0" in str(error), "trl" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd="/", capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


# ---- the wrapper ----

PROGRAM = """
import importlib.util, subprocess, sys
if "child" not in sys.argv:  # as a launcher does
    raise SystemExit(subprocess.run([sys.executable, __file__, "child", *sys.argv[1:]]).returncode)
assert "torch" not in sys.modules
assert importlib.util.find_spec("trl") is not None  # many only ask whether it is there
from trl import DPOTrainer
import trl.trainer.utils
print(DPOTrainer.__init__.__code__.co_filename, trl.trainer.utils._ChunkedLogProbFunction.__name__, sys.argv[2:])
import user_site
print(user_site.seen)
raise SystemExit(3)
"""


def test_a_program_that_imports_trl_itself_runs_patched(tmp_path):
    """In a process that the program starts, too; a sitecustomize that was there before still runs. `python` is the one
    of this environment, activated or not."""
    (tmp_path / "program.py").write_text(PROGRAM)
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import user_site\nuser_site.seen = 'seen'\n")
    (site / "user_site.py").write_text("seen = ''\n")
    command = [sys.executable, "-m", "dpo_fast.cli", "run", "--", "python", "program.py", "--flag", "a b"]
    path = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PATH": os.defpath}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    first, second = done.stdout.splitlines()
    assert first.endswith("trl/trainer.py LinearLogProbs ['--flag', 'a b']")
    assert second == "seen"


def test_the_variable_switches_the_patch_off(tmp_path):
    """The folder stays on PYTHONPATH; the variable decides."""
    code = "import sys; print(any(type(finder).__name__ == '_PatchOnImport' for finder in sys.meta_path))"
    for value, expected in (("1", "True"), ("0", "False")):
        environment = {**run.patching_environment(os.environ), run.PATCH_VARIABLE: value}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected


def test_the_environment_keeps_what_was_on_the_path():
    once = run.patching_environment({"PYTHONPATH": "/a:/b", "HOME": "/root"})
    assert once == {"PYTHONPATH": f"{run.STARTUP}:/a:/b", "HOME": "/root", "DPO_FAST_PATCH_TRL": "1"}
    assert run.patching_environment(once) == once
    assert [path.name for path in Path(run.STARTUP).glob("*.py")] == ["sitecustomize.py"], "all of it shadows modules"


@pytest.mark.parametrize(("argv", "message"), [([], "none given"), (["--", "no-such-program"], "'no-such-program'")])
def test_a_program_that_is_not_there_is_refused(argv, message):
    with pytest.raises(ValueError, match=rf"program: .*{message}"):
        run.main(argv)


# ---- runs that diverge ----


class Diverge(TrainerCallback):
    """Spoils a weight ahead of the third step."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.get_input_embeddings().weight.fill_(torch.nan)


def test_a_run_that_diverges_goes_on_and_logs_what_trls_does(folder, monkeypatch):
    """Also where the head takes several tiles, whose coefficients are compared with those of the whole batch."""
    monkeypatch.setattr(tiles, "CPU_GROUP_ROWS", 6)
    logs = []
    for trainer_class in (trl.DPOTrainer, DPOTrainer):
        trainer = make(trainer_class, folder, max_steps=4, logging_nan_inf_filter=False)
        trainer.add_callback(Diverge())
        trainer.train()
        trainer.evaluate()
        logs.append(trainer.state.log_history)
    for theirs, mine in zip(*logs, strict=True):
        assert {name for name in mine if isnan(mine[name])} == {name for name in theirs if isnan(theirs[name])}
    assert [isnan(row["loss"]) for row in logs[1][:4]] == [False, False, True, True]
    assert isnan(logs[1][-1]["eval_loss"])


# ---- TRL's own path ----


def test_a_prompt_learning_adapter_runs_trls_own_path_and_says_so_once(folder, caplog):
    def prompt_tuned(trainer_class):
        torch.manual_seed(0)
        config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
        trainer = make(trainer_class, folder, _peft_config=config)
        trainer.train()
        trainer.evaluate()
        return trainer

    theirs = prompt_tuned(trl.DPOTrainer)
    with caplog.at_level(logging.WARNING):
        mine = prompt_tuned(DPOTrainer)
    said = [record.message for record in caplog.records if "TRL's own path" in record.message]
    assert len(said) == 1 and "PromptTuningConfig" in said[0]
    for row, other in zip(mine.state.log_history, theirs.state.log_history, strict=True):
        assert row.get("loss") == other.get("loss") and row.get("eval_loss") == other.get("eval_loss")


def left_padded(collator):
    """A collator of one's own: rows padded on the left."""

    def collate(examples):
        batch = collator(examples)
        shifts = batch["attention_mask"].shape[1] - batch["attention_mask"].sum(dim=1)
        for name in ("input_ids", "attention_mask", "completion_mask"):
            rows = zip(batch[name], shifts.tolist(), strict=True)
            batch[name] = torch.stack([row.roll(shift) for row, shift in rows])
        return batch

    return collate


def test_batches_that_cannot_be_packed_run_trls_own_path_and_say_so_once(folder, caplog):
    logs = []
    for trainer_class in (trl.DPOTrainer, DPOTrainer):
        for precompute in (False, True):
            trainer = make(
                trainer_class,
                folder,
                precompute_ref_log_probs=precompute,
                _collator=left_padded(trl.trainer.dpo_trainer.DataCollatorForPreference(pad_token_id=0, max_length=20)),
            )
            trainer.train()
            trainer.evaluate()
            logs.append(trainer)
    assert_same_log(logs[2], logs[0])
    assert_same_log(logs[3], logs[1])
    said = [record.message for record in caplog.records if "TRL's own path" in record.message]
    assert len(said) == 3, "training twice, precomputing once"
    assert all("padded on the right" in message for message in said)


def test_metrics_of_the_logits_are_trls(folder):
    def compute_metrics(prediction):
        return {"mean": float(prediction.predictions.mean())}

    theirs, mine = (
        make(trainer_class, folder, _compute_metrics=compute_metrics) for trainer_class in (trl.DPOTrainer, DPOTrainer)
    )
    for trainer in (theirs, mine):
        trainer.train()
        trainer.evaluate()
    assert "eval_mean" in mine.state.log_history[-1]
    assert_same_log(mine, theirs)


def test_a_batch_reads_nothing_back(folder, monkeypatch):
    """TRL reads a dozen numbers a batch; here all are read when they are logged. Kernels are tested on their own."""
    readers = []
    for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu"):
        original = getattr(torch.Tensor, name)

        def read(self, *args, original=original):
            readers.append(sys._getframe(1).f_code.co_filename)
            return original(self, *args)

        monkeypatch.setattr(torch.Tensor, name, read)
    for trainer_class, package in ((trl.DPOTrainer, trl), (DPOTrainer, dpo_fast)):
        trainer = make(trainer_class, folder)
        batch = next(iter(trainer.get_train_dataloader()))
        readers.clear()
        trainer.compute_loss(trainer.model.train(), batch)
        count = sum(Path(package.__file__).parent in Path(reader).parents for reader in readers)
        assert count >= 12 if package is trl else count == 0
    trainer.log({})
    assert len(readers) > 0, "the guard sees what is read"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pixel_values": torch.zeros(4, 1)}, "pixel_values"),
        ({"completion_mask": torch.tensor([[0, 1, 0, 1]] * 4)}, "not pairs"),
        ({"completion_mask": torch.tensor([[0, 0, 1, 1]] * 3 + [[0, 0, 0, 0]])}, "no token that is scored"),
    ],
)
def test_a_batch_that_is_none_of_pairs_is_named(changes, reason):
    batch = {
        "input_ids": torch.arange(16).view(4, 4),
        "attention_mask": torch.ones(4, 4, dtype=torch.int64),
        "completion_mask": torch.tensor([[0, 0, 1, 1]] * 4),
    }
    assert len(pair_groups(batch)) == 2
    with pytest.raises(CannotPackError, match=reason):
        pair_groups({**batch, **changes})


# ---- the kernel of TRL's other trainers ----


@pytest.mark.parametrize("rows", [0, 1, 37])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("temperature", "softcap", "scale"), [(1.0, None, 1.0), (0.7, 5.0, 0.25)])
def test_log_probs_and_gradients_equal_trls(rows, bias, temperature, softcap, scale):
    """Those of entropies too, which a bonus on entropy asks for."""
    generator = torch.Generator().manual_seed(rows)
    leaves = [torch.randn(shape, generator=generator).requires_grad_() for shape in ((rows, 32), (VOCAB, 32), (VOCAB,))]
    hidden, weight, offset = leaves if bias else (*leaves[:2], None)
    targets = torch.randint(0, VOCAB, (rows,), generator=generator)
    weights = torch.randn(2, rows, generator=generator)

    def results(function):
        found = function.apply(hidden, weight, offset, targets, temperature, 64, softcap, scale)
        used = [leaf for leaf in (hidden, weight, offset) if leaf is not None]
        total = (found[0] * weights[0]).sum() + (found[1] * weights[1]).sum()
        alone = torch.autograd.grad((found[0] * weights[0]).sum(), used, retain_graph=True)
        return [*found[:4], found[4].float(), *alone, *torch.autograd.grad(total, used)]

    theirs, mine = results(ChunkedLogProbFunction), results(LinearLogProbs)
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a.dtype == b.dtype
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), f"result {number} differs by {(a - b).abs().max():.1e}"


@pytest.mark.parametrize("mixed", [False, True], ids=["autocast", "a head in another dtype"])
def test_log_probs_in_bf16_are_nearer_to_the_truth_than_trls(mixed):
    generator = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(50, 32, generator=generator), torch.randn(VOCAB, 32, generator=generator)
    targets = torch.randint(0, VOCAB, (50,), generator=generator)
    truth = (hidden.double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    given = weight.bfloat16() if mixed else weight
    with torch.autocast("cpu", torch.bfloat16, enabled=not mixed):
        mine, theirs = (
            f.apply(hidden, given, None, targets, 1.0, 64)[0] for f in (LinearLogProbs, ChunkedLogProbFunction)
        )
    errors = [(found.double() - truth).abs().mean() for found in (mine, theirs)]
    assert errors[0] <= 1.01 * errors[1]


def test_outputs_that_are_not_asked_for_are_none():
    hidden, weight, targets = torch.randn(3, 8), torch.randn(VOCAB, 8), torch.tensor([1, 2, 3])
    found = LinearLogProbs.apply(hidden, weight, None, targets, 1.0, 64, None, 1.0, ("log_probs", "mean_logits"))
    assert [value is None for value in found] == [False, True, True, False, True]


def kto_rows() -> Dataset:
    rows = pairs(16)
    return Dataset.from_dict(
        {
            "prompt": [*rows["prompt"], *rows["prompt"]],
            "completion": [*rows["chosen"], *rows["rejected"]],
            "label": [True] * len(rows) + [False] * len(rows),
        }
    )


@pytest.mark.parametrize("method", ["KTO", "SFT"])
def test_trls_other_trainers_train_as_before(folder, tmp_path, method, monkeypatch):
    def steps():
        trainer = getattr(trl, f"{method}Trainer")(
            model=str(folder / "llama"),
            args=getattr(trl, f"{method}Config")(
                output_dir=str(tmp_path / method), use_cpu=True, bf16=False, report_to=[], max_steps=4,
                per_device_train_batch_size=4, learning_rate=3e-4, logging_steps=1, save_strategy="no",
                disable_tqdm=True, max_length=20,
            ),  # fmt: skip
            train_dataset=kto_rows() if method == "KTO" else pairs(16).remove_columns(["rejected"]).rename_column(
                "chosen", "completion"
            ),
            processing_class=tiny_tokenizer(),
        )  # fmt: skip
        trainer.train()
        return [row for row in trainer.state.log_history if "loss" in row]

    theirs, calls, stock = steps(), [], LinearLogProbs.apply
    monkeypatch.setattr(LinearLogProbs, "apply", staticmethod(lambda *args: (calls.append(1), stock(*args))[1]))
    patch_trl()
    try:
        mine = steps()
    finally:
        unpatch_trl()
    assert len(calls) >= 4
    for row, other in zip(mine, theirs, strict=True):
        for name in ("loss", "grad_norm"):
            assert row[name] == pytest.approx(other[name], rel=1e-4), name


# ---- launchers ----

TRAIN = """
import json, sys
import trl
from trl import DPOTrainer
from datasets import load_dataset

model, rows, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
args = trl.DPOConfig(
    use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2, learning_rate=3e-4, logging_steps=2,
    save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, max_length=20, max_steps=6, **options
)
train = load_dataset("json", data_files=rows, split="train")
trainer = DPOTrainer(model=model, args=args, train_dataset=train, eval_dataset=train.select(range(6)))
trainer.train()
trainer.evaluate()
if trainer.accelerator.is_main_process:
    log = {"processes": trainer.accelerator.num_processes, "by": DPOTrainer.__init__.__code__.co_filename}
    print("LOG", json.dumps([log, *trainer.state.log_history]))
trainer.accelerator.end_training()  # else gloo's threads may outlive the process group
"""
WRAPPER = [sys.executable, "-m", "dpo_fast.cli", "run", "--"]


@pytest.fixture
def files(folder, tmp_path):
    """A folder with a program, rows, and the model with its tokenizer."""
    (tmp_path / "train.py").write_text(TRAIN)
    pairs(42).to_json(tmp_path / "rows.json")
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path


def output_of(command, folder) -> str:
    caches = {"HF_DATASETS_CACHE": str(folder / "datasets"), "DPO_FAST_CACHE": str(folder / "cache")}
    environment = {**os.environ, **caches, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": ["sft", "aot"], "gradient_accumulation_steps": 2},
        {"precompute_ref_log_probs": True, "ld_alpha": 0.4},
        {"accelerator_config": {"dispatch_batches": True}, "pad_to_multiple_of": 32},
    ],
    ids=["live", "precomputed", "dispatched"],
)
def test_two_processes_equal_trl(files, options):
    """Also the rounds of an epoch's end, which 42 rows reach unevenly."""
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    logs = []
    for number, wrapper in enumerate(([], WRAPPER)):
        arguments = ["model", "rows.json", json.dumps({**options, "output_dir": f"out{number}"})]
        command = [*wrapper, torchrun, "--standalone", "--nproc-per-node=2", "train.py", *arguments]
        (line,) = (line for line in output_of(command, files).splitlines() if line.startswith("LOG "))
        about, *log = json.loads(line.removeprefix("LOG "))
        assert about["processes"] == 2
        assert about["by"].endswith("trl_trainer.py") == bool(wrapper)
        logs.append(log)
    assert len(logs[0]) == len(logs[1]) == 5
    for theirs, mine in zip(*logs, strict=True):
        assert mine.keys() == theirs.keys()
        for name in compared(theirs, logs[0][0]):
            assert mine[name] == pytest.approx(theirs[name], rel=TOLERANCE, abs=1e-5), name


@pytest.mark.slow
def test_trl_dpo_on_the_command_line(files):
    """It trains in a process that accelerate starts; the reference log-probs are in our store then."""
    flags = {
        "model_name_or_path": "model", "dataset_name": "data", "output_dir": "out", "use_cpu": "true",
        "bf16": "false", "max_steps": 3, "logging_steps": 1, "report_to": "none", "learning_rate": 3e-4,
        "disable_tqdm": "true", "max_length": 20, "precompute_ref_log_probs": "true",
    }  # fmt: skip
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    (files / "data").mkdir()
    (files / "rows.json").rename(files / "data" / "train.json")
    losses = []
    for wrapper in ([], WRAPPER):
        output = output_of([*wrapper, str(Path(sys.executable).with_name("trl")), "dpo", *arguments], files)
        losses.append([float(row.split("'")[3]) for row in output.splitlines() if row.startswith("{'loss'")])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=TOLERANCE)
    assert list((files / "cache").rglob("*.parquet"))
