"""A `trl dpo` command line works unchanged; a mistake costs one line and status 2, before any model is loaded."""

import json
import os
import subprocess
import sys
import types

import pytest
from datasets import Dataset, DatasetDict

from dpo_fast import cli
from dpo_fast.commands.launch import LAUNCHED_MARKS

ROWS = [{"prompt": "a", "chosen": "b", "rejected": "c"}]


@pytest.fixture(autouse=True)
def plain_surroundings(no_launcher, monkeypatch):
    monkeypatch.setenv("DPO_FAST_TEST_VARIABLE", "")


@pytest.fixture
def library(monkeypatch):
    """Stands in for the trainer and the data: records what the command line asks of them."""
    record = types.SimpleNamespace(calls=[], dataset=DatasetDict(train=Dataset.from_list(ROWS)), fails={})

    def load_preference_dataset(name, *, config_name=None, split=None, streaming=False, columns=None):
        record.calls.append(("load", name, config_name, split))
        return record.dataset

    class DPOTrainer:
        def __init__(self, **arguments):
            record.arguments, self.args = arguments, arguments["args"]
            record.calls.append("init")
            if "init" in record.fails:
                raise record.fails["init"]

        def train(self, resume_from_checkpoint=None):
            record.calls.append(("train", resume_from_checkpoint))
            if "train" in record.fails:
                raise record.fails["train"]

        def save_model(self, output_dir):
            record.calls.append(("save", output_dir))

        def push_to_hub(self):
            record.calls.append("push")

        data_summaries = {"train": "3 rows → 2 groups"}

        def is_world_process_zero(self):
            return True

        def end(self):
            record.calls.append("end")

    monkeypatch.setattr("dpo_fast.data.loading.load_preference_dataset", load_preference_dataset)
    monkeypatch.setattr("dpo_fast.trainer.DPOTrainer", DPOTrainer)
    return record


def run(*flags, model="acme/tiny", dataset="acme/pairs"):
    return cli.main(["train", "--model", model, "--dataset", dataset, "--report_to", "none", *flags])


def refused(capsys, *words):
    """Asserts one line on stderr, that holds every word."""
    out, err = capsys.readouterr()
    assert err.startswith("dpo-fast: error: ") and err.count("\n") == 1 and "Traceback" not in out + err, err
    for word in words:
        assert word in err


def test_train_hands_everything_to_the_library(library, capsys):
    assert run("--dataset_config", "en", "--beta", "0.2", "--loss_type", "sigmoid", "sft") == 0
    assert library.calls == [("load", "acme/pairs", "en", None), "init", ("train", None), ("save", "tiny-DPO"), "end"]
    given = library.arguments
    assert given["model"] == "acme/tiny" and given["train_dataset"].to_list() == ROWS and given["eval_dataset"] is None
    assert given["peft_config"] is None and given["quantization_config"] is None
    config = given["args"]
    assert (config.beta, config.loss_type, config.output_dir) == (0.2, ["sigmoid", "sft"], "tiny-DPO")
    assert config.model_init_kwargs == {"revision": "main", "dtype": "float32"}
    assert "Saved the model to tiny-DPO." in capsys.readouterr().out


def test_a_command_line_of_trl_works_unchanged(library):
    library.dataset["test"] = Dataset.from_list(ROWS * 2)
    flags = """--dataset_name trl-lib/ultrafeedback_binarized --model_name_or_path Qwen/Qwen2-0.5B-Instruct
        --learning_rate 5.0e-6 --num_train_epochs 1 --per_device_train_batch_size 2 --max_steps 1000
        --gradient_accumulation_steps 8 --eval_strategy steps --eval_steps 50 --output_dir Qwen2-0.5B-DPO
        --no_remove_unused_columns --no_logging_nan_inf_filter --no_gradient_checkpointing --use_cpu --bf16 True
        --use_peft --lora_r 32 --lora_alpha 16 --lora_target_modules q_proj v_proj --precompute_ref_log_probs
        --padding_free --attn_implementation sdpa --torch_dtype bfloat16 --model_revision v2
        --f_divergence_type reverse_kl --discopop_tau 5e-2 --use_weighting False --ref_model_sync_steps 512"""
    assert cli.main(["train", *flags.split(), "--report_to", "none"]) == 0
    given, config = library.arguments, library.arguments["args"]
    assert given["model"] == "Qwen/Qwen2-0.5B-Instruct" and len(given["eval_dataset"]) == 2
    assert (config.learning_rate, config.max_steps, config.eval_steps, config.bf16) == (5e-6, 1000, 50, True)
    assert not config.gradient_checkpointing and not config.logging_nan_inf_filter
    assert config.model_init_kwargs == {"revision": "v2", "dtype": "bfloat16", "attn_implementation": "sdpa"}
    peft = given["peft_config"]
    assert (peft.r, peft.lora_alpha, set(peft.target_modules)) == (32, 16, {"q_proj", "v_proj"})
    assert (peft.lora_dropout, peft.task_type, peft.bias) == (0.05, "CAUSAL_LM", "none")


def test_every_flag_of_trl_is_known():
    scripts = pytest.importorskip("trl.scripts.dpo")
    from dpo_fast.commands.arguments import _train_parser

    flags = set(scripts.make_parser()._option_string_actions)
    assert flags - set(_train_parser()._option_string_actions) == set()


def test_flags_win_over_the_configuration_file(library, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: acme/from-file\ndataset_name: acme/file-pairs\nbeta: 0.7\nlearning_rate: 3e-6\nuse_peft: true\n"
        "lora_target_modules: all-linear\nloss_type: hinge\nmax_length: null\ngradient_checkpointing: false\n"
        "env:\n  DPO_FAST_TEST_VARIABLE: 3\n"
    )
    assert cli.main(["train", "--config", "run.yaml", "--beta", "0.9", "--report_to", "none"]) == 0
    given, config = library.arguments, library.arguments["args"]
    assert given["model"] == "acme/from-file" and library.calls[0][1] == "acme/file-pairs"
    assert (config.beta, config.learning_rate, config.loss_type) == (0.9, 3e-6, ["hinge"])
    assert config.max_length is None and config.gradient_checkpointing is False
    assert given["peft_config"].target_modules == "all-linear"
    assert os.environ["DPO_FAST_TEST_VARIABLE"] == "3"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rte: 1.0\n", ["unknown key 'learning_rte'", "did you mean learning_rate"]),
        ("config: other.yaml\n", ["unknown key 'config'"]),
        ("beta: [1\n", ["run.yaml is not valid YAML", "line"]),
        ("- beta\n", ["must hold a mapping"]),
        ("", ["must hold a mapping"]),
        ("env: yes\n", ["env=True", "must map names"]),
        ("beta: much\n", ["beta='much' must be a finite number", "default is 0.1"]),
        ("dtype: fp8\n", ["dtype='fp8' must be one of", "bfloat16"]),
        ("sync_ref_model: true\n", ["sync_ref_model=True is not implemented"]),
        ("datasets:\n  - path: acme/pairs\n", ["datasets=", "not implemented"]),
    ],
)
def test_a_bad_configuration_file_is_refused(library, tmp_path, capsys, text, words):
    (tmp_path / "run.yaml").write_text(text)
    assert run("--config", "run.yaml") == 2
    refused(capsys, *words)
    assert library.calls == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--config", "absent.yaml"], ["--config absent.yaml: no such file"]),
        (["--config"], ["--config", "expected one argument"]),
        (["--learnin_rate", "1"], ["unknown flag --learnin_rate", "--learning_rate"]),
        (["--beta", "-1"], ["beta=-1 must be a finite number above 0"]),
        (["--loss_type", "dop"], ["loss_type='dop'", "sigmoid"]),
        (["--layout", "packed"], ["layout='packed' must be one of", "did you mean 'padded'?"]),
        (["--max_length", "long"], ["max_length='long' must be an integer of at least 2"]),
        (["--ld_alpha", "1.5"], ["ld_alpha='1.5' must be a finite number of at least 0 and of at most 1"]),
        (["--f_divergence_type", "js"], ["f_divergence_type", "js"]),
        (["--load_in_4bit"], ["quantized weights", "--use_peft"]),
        (["--load_in_4bit", "--load_in_8bit", "--use_peft"], ["exclude each other"]),
        (["--resume_from_checkpoint", "run/checkpoint-7"], ["resume_from_checkpoint=", "run/checkpoint-7"]),
        (["--resume_from_checkpoint", "true"], ["resume_from_checkpoint is True", "tiny-DPO"]),
        (["--accelerate_config", "absent"], ["--accelerate_config absent"]),
    ],
)
def test_a_bad_flag_is_refused(library, capsys, flags, words):
    assert run(*flags) == 2
    refused(capsys, *words)
    assert library.calls == []


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dataset", "acme/pairs"], ["no model given", "--model"]),
        (["--model", "acme/tiny"], ["no dataset given", "--dataset"]),
        (["acme/tiny"], ["unexpected argument 'acme/tiny'"]),
        (["--model", "./absent", "--dataset", "acme/pairs"], ["./absent", "does not exist", "owner/name"]),
        (["--model", "a/b/c", "--dataset", "acme/pairs"], ["a/b/c", "does not exist"]),
        (["--model", ".", "--dataset", "acme/pairs"], ["holds no config.json"]),
        (["--model", "acme/tiny", "--dataset", "absent.jsonl"], ["--dataset absent.jsonl: no such file"]),
        (["--model", "acme/tiny", "--dataset", "/absent/folder"], ["--dataset /absent/folder: no such file"]),
    ],
)
def test_what_is_missing_is_reported_before_anything_loads(library, capsys, argv, words):
    assert cli.main(["train", *argv, "--report_to", "none"]) == 2
    refused(capsys, *words)
    assert library.calls == []


def test_a_dataset_without_preferences_is_refused_before_a_model_is_loaded(library, capsys):
    library.dataset = Dataset.from_list([{"text": "a"}])
    assert run() == 2
    refused(capsys, "found the columns text")
    assert "init" not in library.calls


def test_folders_and_files_that_exist_are_taken(library, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "pairs.jsonl").write_text(json.dumps(ROWS[0]))
    assert run("--max_length", "none", model="./model", dataset="pairs.jsonl") == 0
    assert library.arguments["args"].output_dir == "model-DPO" and library.arguments["args"].max_length is None


@pytest.mark.parametrize(
    ("package", "flags", "cure"),
    [("peft", ["--use_peft"], "dpo-fast[peft]"), ("bitsandbytes", ["--use_peft", "--load_in_8bit"], "bitsandbytes")],
)
def test_a_missing_extra_is_named_with_its_cure(library, monkeypatch, capsys, package, flags, cure):
    monkeypatch.setattr(
        "dpo_fast.commands.arguments.find_spec", lambda name: None if name == package else types.SimpleNamespace()
    )
    assert run(*flags) == 2
    refused(capsys, f"{package} is not installed", "pip install", cure)


def test_quantization_follows_the_flags(library, monkeypatch):
    monkeypatch.setattr("dpo_fast.commands.arguments.find_spec", lambda name: types.SimpleNamespace())
    assert run("--use_peft", "--load_in_4bit", "--use_bnb_nested_quant", "--dtype", "bfloat16") == 0
    quantization = library.arguments["quantization_config"]
    assert quantization.load_in_4bit and quantization.bnb_4bit_use_double_quant
    assert (quantization.bnb_4bit_quant_type, str(quantization.bnb_4bit_compute_dtype)) == ("nf4", "torch.bfloat16")


@pytest.mark.parametrize("flags", [["--resume_from_checkpoint"], ["--resume_from_checkpoint", "True"]])
def test_resume_true_takes_the_latest_checkpoint(library, tmp_path, flags):
    (tmp_path / "tiny-DPO" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "tiny-DPO" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    assert run(*flags) == 0
    assert ("train", True) in library.calls


def test_resume_takes_a_path(library, tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "trainer_state.json").write_text("{}")
    assert run("--resume_from_checkpoint", "old", "--push_to_hub") == 0
    assert ("train", "old") in library.calls and "push" in library.calls


def test_evaluation_needs_its_split(library, capsys):
    assert run("--eval_strategy", "epoch") == 2
    refused(capsys, "--dataset_test_split test", "['train']", "--eval_strategy")
    assert "init" not in library.calls


def test_a_dataset_without_splits_is_the_training_split(library, capsys):
    library.dataset = Dataset.from_list(ROWS)
    assert run() == 0 and library.arguments["train_dataset"].to_list() == ROWS
    assert run("--dataset_train_split", "dev") == 2
    refused(capsys, "--dataset_train_split dev", "['train']")


@pytest.mark.parametrize(
    "error", [OSError("acme/tiny is not\na model"), ValueError("no chat template"), ImportError("x")]
)
def test_what_stops_the_preparation_costs_one_line(library, capsys, error):
    library.fails["init"] = error
    assert run() == 2
    refused(capsys, " ".join(str(error).split()))


@pytest.mark.parametrize(
    ("stage", "error"),
    [
        ("init", TypeError("bug")),
        ("init", ImportError("cannot import", name="dpo_fast.batches.groups")),
        ("train", ValueError("bug in a library")),
        ("train", OSError("disk full")),
        ("train", RuntimeError("bug")),
    ],
)
def test_a_bug_keeps_its_traceback(library, stage, error):
    library.fails[stage] = error
    with pytest.raises(type(error), match=str(error)):
        run()


def test_what_dpo_fast_refuses_during_training_costs_one_line(library, capsys, monkeypatch):
    from dpo_fast.training.checkpoints import find_checkpoint

    monkeypatch.setattr(
        "dpo_fast.trainer.DPOTrainer.train", lambda self, resume_from_checkpoint: find_checkpoint("gone", "out")
    )
    assert run() == 2
    refused(capsys, "resume_from_checkpoint", "gone")


class Replaced(Exception):
    """Raised in place of handing the process over to accelerate."""


@pytest.fixture
def launched(monkeypatch):
    record = types.SimpleNamespace()

    def execve(path, command, environment):
        record.command, record.environment = command, environment
        raise Replaced

    monkeypatch.setattr(os, "execve", execve)
    return record


def test_flags_of_accelerate_start_it(library, launched, tmp_path):
    (tmp_path / "run.yaml").write_text("num_processes: 2\nmulti_gpu: true\nuse_fsdp: false\n")
    with pytest.raises(Replaced):
        run("--config", "run.yaml", "--mixed_precision", "bf16", "--accelerate_config", "run.yaml")
    where = launched.command.index("--module")
    assert launched.command[1:3] == ["-m", "accelerate.commands.launch"]
    assert launched.command[3:where] == (
        ["--num_processes", "2", "--multi_gpu", "--mixed_precision", "bf16", "--config_file", "run.yaml"]
    )
    assert launched.command[where + 1 : where + 4] == ["dpo_fast.cli", "train", "--model"]
    assert launched.environment["PYTHONSAFEPATH"] == "1" and library.calls == []

    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(launched.command[3:])
    assert (parsed.training_script, parsed.num_processes, parsed.module) == ("dpo_fast.cli", 2, True)
    assert parsed.training_script_args[0] == "train"


def test_configurations_that_trl_ships_are_found_by_name(library, launched):
    pytest.importorskip("trl")
    with pytest.raises(Replaced):
        run("--accelerate_config", "zero3")
    path = launched.command[launched.command.index("--config_file") + 1]
    assert path.endswith("zero3.yaml") and os.path.isfile(path)


def test_several_gpus_start_accelerate(library, launched, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(Replaced):
        run()
    assert run("--use_cpu") == 0


@pytest.mark.parametrize("mark", LAUNCHED_MARKS)
def test_a_launched_process_trains(library, launched, monkeypatch, mark):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    # A rank without the rest of a launcher's variables would make accelerate wait for its peers.
    monkeypatch.setattr("dpo_fast.config.DPOConfig.__post_init__", lambda self: None)
    monkeypatch.setenv(mark, "0")
    assert run("--num_processes", "2") == 0
    assert ("train", None) in library.calls


def test_demo_gets_its_options(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("dpo_fast.commands.demo.command.run", lambda options: seen.update(vars(options)) or 0)
    assert cli.main(["demo", "--seed", "3", "--model", "m"]) == 0
    assert (seen["seed"], seen["model"], seen["output_dir"]) == (3, "m", "runs/demo")

    def without_extra(options):
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")

    monkeypatch.setattr("dpo_fast.commands.demo.command.run", without_extra)
    assert cli.main(["demo"]) == 2
    refused(capsys, "gguf", 'pip install "dpo-fast[demo]"')


def test_doctor_judges_the_machine_and_a_model(tmp_path, monkeypatch, capsys):
    from importlib.metadata import version

    from transformers import LlamaConfig, MambaConfig

    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path / "store"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    sizes = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1}
    LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=16).save_pretrained("llama")
    MambaConfig(**sizes).save_pretrained("mamba")

    assert cli.main(["doctor", "--model", "llama"]) == 0
    text = capsys.readouterr().out
    assert version("torch") in text and str(tmp_path / "store") in text.replace("\n", "")
    assert rows(text)["layout"][0] == "shared" and rows(text)["attention"][0] == "flash-cpu"
    assert rows(text)["mixed precision"][0] == "fp32" and rows(text)["LM head"][0] == "torch"

    assert cli.main(["doctor", "--model", "mamba"]) == 0
    assert rows(capsys.readouterr().out)["layout"][0] == "padded"
    assert cli.main(["doctor", "--model", "./absent"]) == 2
    refused(capsys, "absent")


def test_doctor_shows_the_flash_attention_behind_pytorch(monkeypatch):
    import torch
    from torch.nn.attention import _registry

    from dpo_fast.commands.doctor import _flash
    from dpo_fast_kernels.attention import flash_implementations

    cuda, what = torch.device("cuda"), "FlashAttention in PyTorch"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    monkeypatch.setattr(flash_implementations, "installed_flash_implementations", lambda: ["FA3", "FA4"])
    assert _flash(torch.device("cpu")) == []
    built_in, no, could = _flash(cuda)
    assert built_in == (what, "FlashAttention-2", "built in")
    assert no == ("FlashAttention-3", "no", "FlashAttention-3 needs compute capability 9.0, this GPU has 10.0")
    assert could[:2] == ("FlashAttention-4", "installed") and 'activate_flash_attention_impl("FA4")' in could[2]
    monkeypatch.setattr(_registry, "_FLASH_ATTENTION_ACTIVE", ("FA4", None))
    assert _flash(cuda) == [(what, "FlashAttention-4", "activated")]


def test_doctor_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("dpo_fast.commands.doctor._version", lambda name: None if name in ("peft", "torch") else "1")
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert 'LoRA adapters: pip install "dpo-fast[peft]"' in text and 'torch is required: pip install "torch"' in text
    assert "dpo-fast[trl]" not in text


def rows(text):
    """The cells of a printed table, by the first one of each row."""
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]
    return {first: rest for first, *rest in cells}


def test_help_is_fast_because_it_imports_nothing_heavy():
    code = (
        "import sys; from dpo_fast.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('heavy:', sorted({'torch', 'transformers', 'yaml', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "train" in done.stdout and "doctor" in done.stdout and "heavy: []" in done.stdout


def test_unknown_commands_and_help_end_as_usual(capsys):
    assert cli.main(["trian"]) == 2
    refused(capsys, "command 'trian' is not known; did you mean 'train'?")
    with pytest.raises(SystemExit) as stop:
        cli.main(["score", "--help"])
    assert stop.value.code == 0
    assert "--ref_model" in capsys.readouterr().out


def test_what_became_of_the_rows_is_printed(library, capsys):
    assert run() == 0
    assert "train: 3 rows → 2 groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("variables", "who"),
    [({"RANK": "5"}, "dpo-fast"), ({"RANK": "5", "WORLD_SIZE": "8"}, "dpo-fast, rank 5")],
)
def test_every_rank_says_what_it_meets(monkeypatch, capsys, variables, who):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert run("--beta", "much") == 2
    assert capsys.readouterr().err.startswith(f"{who}: error: beta='much' must be")
