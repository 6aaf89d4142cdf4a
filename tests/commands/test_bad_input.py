"""Whatever is wrong ends with status 2 and one line that names it, before the reference pass, and leaves no file.

Rows of `bad_inputs.BAD_INPUTS` run in one process, with a real model and real data.
"""

from __future__ import annotations

import random
import string
from dataclasses import fields

import pytest
import yaml

from bad_inputs import BAD_INPUTS, FILES
from dpo_fast import cli
from dpo_fast.commands.arguments import DataArguments, ModelArguments
from dpo_fast.commands.train import read_arguments
from dpo_fast.config import DPOConfig
from dpo_fast.errors import InputError
from dpo_fast.reference.compute import ReferencePass
from families import tiny_model, tiny_tokenizer
from preferences import pairs

GOOD = ("--model", "{model}", "--dataset", "{rows}", "--use_cpu", "--max_length", "64", "--report_to", "none")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Path of every file of `FILES`, of a good model and of good rows, by name."""
    root = tmp_path_factory.mktemp("files")
    tiny_model("llama").save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    pairs(8).to_json(root / "rows.jsonl")
    for name, content in FILES.items():
        path = root / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    names = {*FILES, *(name.split("/")[0] for name in FILES), "model"}
    return {name: str(root / name) for name in names} | {"rows": str(root / "rows.jsonl")}


@pytest.fixture(autouse=True)
def no_pass(no_launcher, monkeypatch):
    """The reference pass must not run."""
    monkeypatch.setattr("dpo_fast.reference.compute.ReferencePass.run", _must_not_run)


_RUN = ReferencePass.run


def _must_not_run(*_: object) -> None:
    raise AssertionError("the reference pass has begun")


def _filled(words: tuple[str, ...], files: dict[str, str]) -> list[str]:
    return [_Names(files).fill(word) for word in words]


class _Names(dict):
    def fill(self, word: str) -> str:
        for name, path in self.items():
            word = word.replace(f"{{{name}}}", path)
        return word.replace("{{", "{").replace("}}", "}")


def test_there_are_three_hundred():
    assert len(set(BAD_INPUTS)) >= 300


@pytest.mark.parametrize("bad", BAD_INPUTS, ids=lambda bad: " ".join(bad.command)[:60])
def test_bad_input_costs_one_line(bad, files, tmp_path, capsys):
    command = bad.command if bad.is_complete else (bad.command[0], *GOOD, *bad.command[1:])
    status = cli.main(_filled(command, files))
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("dpo-fast: ")]
    assert status == 2 and len(lines) == 1 and "Traceback" not in out + err, err
    assert lines[0] == err.splitlines()[-1] and len(lines[0]) < 3000
    for word in _filled(bad.words, {}):
        assert word in lines[0], (word, lines[0])
    assert not list(tmp_path.iterdir()), "a file was written"


# ---- random values ----


def _random_value(generator: random.Random, depth: int = 0):
    text = "".join(generator.choices(string.printable + "äß→\u200b🙂", k=generator.randrange(12)))
    values = [
        *(None, True, False, 0, -1, 1, 2, 10**30, -(10**30), 0.0, 1e-30, 1e30, float("nan"), float("inf"), -0.5),
        *("", "none", "true", "auto", "1e-6", "0x10", "~", "/", "..", text, text * 50),
        generator.randrange(-5, 5000),
        generator.uniform(-2, 2),
    ]
    if depth < 2:
        values += [[_random_value(generator, depth + 1) for _ in range(generator.randrange(3))] for _ in range(3)]
        values += [{text: _random_value(generator, depth + 1)}, {"a": 1}]
    return generator.choice(values)


_NOT_TRIED = {"deepspeed", "output_dir"}  # the first is not installed; what the second may be called is everything


@pytest.mark.parametrize("seed", range(5))
def test_a_random_value_of_an_option_is_taken_or_refused(seed, files, tmp_path):
    generator, accepted = random.Random(seed), 0
    names = [option.name for kind in (DataArguments, ModelArguments, DPOConfig) for option in fields(kind)]
    names = [name for name in names if name not in _NOT_TRIED]
    for _ in range(100):
        values = {generator.choice(names): _random_value(generator)}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        flags = [flag for flag in _filled(GOOD, files)]
        try:
            read_arguments([*flags, "--config", "run.yaml"])
            accepted += 1
        except InputError as error:
            assert str(error), values
        except Exception as error:
            raise AssertionError(f"{values}: {type(error).__name__}: {error}") from error
    assert 5 < accepted < 95


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5, 10))
def test_a_random_value_of_an_option_trains_or_is_refused_before_the_pass(seed, files, tmp_path, monkeypatch, capsys):
    """Or it ends in weights that are not finite, and the command says so."""
    generator, passes, statuses = random.Random(seed), [], []
    names = [option.name for kind in (DataArguments, ModelArguments, DPOConfig) for option in fields(kind)]
    names = [name for name in names if name not in _NOT_TRIED]
    monkeypatch.setattr("dpo_fast.reference.compute.ReferencePass.run", lambda *args: (passes.append(1), _RUN(*args)))
    flags = [*_filled(GOOD, files), "--max_steps", "1", "--config", "run.yaml", "--output_dir", "out"]
    for _ in range(100):
        values = {generator.choice(names): _random_value(generator)}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(values, allow_unicode=True), encoding="utf-8")
        passes.clear()
        statuses.append(cli.main(["train", *flags]))
        assert not (statuses[-1] == 2 and passes), f"{values}: refused after the reference pass"
        assert (statuses[-1] == 1) == ("training diverged" in capsys.readouterr().err), values
    assert 10 < statuses.count(0) < 90
