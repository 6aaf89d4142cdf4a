"""`dpo-fast train --help` is short and there at once; `--help_all` has the rest; both say what the parser does."""

import resource
import subprocess
import sys

import pytest

from dpo_fast import cli
from dpo_fast.commands.arguments import _train_parser
from dpo_fast.commands.train_help import GROUPS, TRAINER_OPTIONS, own_options, short_parser

NAMES = [name for names in GROUPS.values() for name in names.split()]


@pytest.fixture(scope="module")
def full_parser():
    return _train_parser()


def test_help_comes_at_once_because_it_imports_nothing_heavy():
    code = (
        "import sys; from dpo_fast.cli import main; status = main(['train', '--help'])\n"
        "print('heavy:', sorted({'torch', 'transformers', 'accelerate', 'datasets'} & set(sys.modules)), status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert "--learning_rate" in done.stdout and "heavy: [] 0" in done.stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2  # seconds, whoever else computes


def test_the_short_help_is_short_and_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert 24 <= len(NAMES) <= 30 and len(text.splitlines()) < 110
    assert "--help_all" in text and "--config" in text
    *_, groups = text.partition("\nmodel:\n")
    for title, following in zip(GROUPS, [*list(GROUPS)[1:], "Flags of"], strict=True):
        lines, _, groups = groups.partition(f"\n{following}")
        flags = [line.split()[0] for line in lines.splitlines() if line.startswith("  --")]
        shortest = [f"--{(own_options() | TRAINER_OPTIONS)[name].flag}" for name in GROUPS[title].split()]
        assert flags == shortest, title


@pytest.mark.parametrize("name", NAMES)
def test_a_flag_of_the_short_help_is_the_parsers(full_parser, name):
    option = (own_options() | TRAINER_OPTIONS)[name]
    action = full_parser._option_string_actions[f"--{option.flag}"]
    assert action.dest == name and full_parser.get_default(name) == option.default
    assert name in TRAINER_OPTIONS or option.text == action.help
    shown = short_parser()._option_string_actions[f"--{option.flag}"]
    takes_no_value = shown.nargs == 0
    assert not takes_no_value or action.nargs == "?", "the flag alone has to be allowed"


def test_all_flags_are_in_the_long_help(full_parser, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--help_all"])
    assert stop.value.code == 0
    words = set(capsys.readouterr().out.replace(",", " ").split())
    assert {f"--{name}" for name in NAMES} | {"--adam_beta1", "--ld_alpha", "--fsdp", "--help_all"} <= words
    assert "--ref_model_sync_steps" not in words, "a flag that asks for nothing here"


def test_defaults_are_printed_as_flags_take_them():
    text = " ".join(short_parser().format_help().split())
    assert "(default: sigmoid)" in text and "%(" not in text and "['sigmoid']" not in text
