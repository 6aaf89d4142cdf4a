"""One call on a GPU ends in time, whatever its steps do; what was written before survives; its summary can be read.

The steps are stand-ins here. `test_rehearsal` (slow) runs the real ones on a CPU, at toy sizes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

import run
from repository import BENCHMARKS, ROOT
from suite.gpu import call as gpu_call
from suite.gpu import plan, smoke, smoke_checks
from suite.gpu.call import MOST_CHARACTERS, Call, bounded
from suite.gpu.plan import Step
from suite.gpu.tests_log import outcome_lines
from suite.harness import summary

WRITES = "import sys; open(sys.argv[1] + '/2026-01-01_nvidia-h200_{name}.json', 'w').write('{text}')"


def writes(name: str, **result) -> list[str]:
    return ["-c", WRITES.format(name=name, text=json.dumps(result)), "OUT"]


def parsed(lines: list[str]) -> dict[str, tuple[str, float, float]]:
    """Returns status, seconds and bound of every step in a summary."""
    row = re.compile(r"^  (.{16})(.{14}) *([\d.]+) of (\d+) s$")
    return {
        found[1].strip(): (found[2].strip(), float(found[3]), float(found[4]))
        for line in lines
        if (found := row.match(line))
    }


def packed(archive: Path) -> dict[str, str]:
    with tarfile.open(archive) as file:
        return {Path(each.name).name: file.extractfile(each).read().decode() for each in file if each.isfile()}


class TestCall:
    @pytest.fixture
    def folders(self, tmp_path) -> tuple[Path, Path]:
        (tmp_path / "work").mkdir()
        return tmp_path / "work", tmp_path / "out"

    def test_no_step_stops_another(self, folders, capsys):
        steps = [
            Step("good", 20, writes("one", summary=["a line"])),
            Step("bad", 20, ["-c", "print('why'); raise SystemExit(3)"]),
            Step("endless", 1, ["-c", "import time; print('here', flush=True); time.sleep(60)"]),
            Step("last", 20, writes("two", figure=7.5, disagrees=True)),
        ]
        call = Call("gpu", steps, *folders, seconds=60)
        call.run()
        printed = capsys.readouterr().out
        lines = printed[printed.index("gpu: ") :].splitlines()
        found = parsed(lines)
        statuses = {name: status for name, (status, *_) in found.items()}
        assert statuses == {"good": "done", "bad": "failed (3)", "endless": "out of time", "last": "done"}
        assert found["endless"][1] < 1 + gpu_call._GRACE + 2 and found["endless"][2] == 1
        assert "out of time: endless" in lines and {"a line", "  figure: 7.5"} <= set(lines)
        (archive,) = folders[1].iterdir()
        inside = packed(archive)
        assert inside["summary.txt"].splitlines() == lines[: len(inside["summary.txt"].splitlines())]
        assert inside["bad.log"] == "why\n" and inside["endless.log"].startswith("here\n")
        assert json.loads(inside["2026-01-01_nvidia-h200_two.json"])["disagrees"]

    def test_steps_for_which_no_time_is_left_are_named(self, folders):
        steps = [Step(name, 60, ["-c", "import time; time.sleep(60)"]) for name in ("first", "second")]
        call = Call("gpu", steps, *folders, seconds=gpu_call._LAST_SECONDS + gpu_call._LEAST_SECONDS + 0.5)
        began = time.monotonic()
        call.run()
        assert [outcome.status for outcome in call.outcomes] == ["out of time", "left out"]
        assert "out of time: first, second" in call.summary() and time.monotonic() - began < 15

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_what_is_written_survives_the_end_of_the_call(self, folders, number):
        """The archive holds a file of the step that was running; asked to end, the call prints its summary too."""
        work, out = folders
        program = f"""if True:
            import signal, time
            from pathlib import Path
            from suite.gpu import call as gpu_call
            from suite.gpu.plan import Step
            gpu_call._PACK_SECONDS = 0.2
            signal.signal(signal.SIGTERM, gpu_call._stop)
            text = "import sys, time; open(sys.argv[1] + '/part', 'w').write('kept'); time.sleep(120)"
            steps = [Step("running", 100, ["-c", text, "OUT"]), Step("next", 100, ["-c", ""])]
            gpu_call.Call("gpu", steps, Path({str(work)!r}), Path({str(out)!r}), 200).run()
        """
        path = {**os.environ, "PYTHONPATH": os.pathsep.join([str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])}
        call = subprocess.Popen([sys.executable, "-c", program], env=path, stdout=subprocess.PIPE, text=True)
        archive, deadline = out / "gpu.tar.gz", time.monotonic() + 60
        while not (archive.exists() and "part" in packed(archive)):
            assert time.monotonic() < deadline and call.poll() is None
            time.sleep(0.1)
        (child,) = map(int, Path(f"/proc/{call.pid}/task/{call.pid}/children").read_text().split())
        call.send_signal(number)
        printed, _ = call.communicate(timeout=30)
        if number == signal.SIGKILL:
            os.kill(child, signal.SIGKILL)
        assert packed(archive)["part"] == "kept" and not list(out.glob("*.new"))
        if number == signal.SIGTERM:
            assert call.returncode == 128 + signal.SIGTERM and not Path(f"/proc/{child}/cmdline").exists()
            found = parsed(printed.splitlines())
            assert {name: status for name, (status, *_) in found.items()} == {
                "running": "interrupted",
                "next": "left out",
            }

    def test_a_summary_fits_what_comes_back(self):
        sections = [["short"], [f"{index:3} {'x' * 90}" for index in range(300)], ["y" * 50] * 40]
        lines = bounded(sections, 12_000)
        assert sum(len(line) + 1 for line in lines) <= 12_000 and MOST_CHARACTERS < 12_000
        assert "short" in lines and lines.count("y" * 50) == 40, "the longest loses its lines"
        assert any(re.fullmatch(r"  … \d+ more lines in the archive", line) for line in lines)


class TestPlan:
    def test_the_first_call_has_its_steps_in_order_and_fits(self):
        names = ["smoke", "tests", "training", "head", "kernels", "attention", "rows", "layout"]
        assert [step.name for step in plan.first()] == names
        for steps in (plan.first(), plan.more(), plan.first_rehearsed(), plan.more_rehearsed()):
            assert sum(step.seconds for step in steps) <= plan.SECONDS - gpu_call._LAST_SECONDS, steps

    def test_a_rehearsal_reaches_every_step(self):
        for steps, rehearsed in ((plan.first, plan.first_rehearsed), (plan.more, plan.more_rehearsed)):
            names = [step.name for step in rehearsed() if step.name != "collected tests"]
            assert names == [step.name for step in steps()]

    @pytest.mark.parametrize("make", [plan.first, plan.more, plan.first_rehearsed, plan.more_rehearsed])
    def test_every_question_understands_its_options(self, make, monkeypatch):
        """A misspelt option of a GPU's steps would be found on the GPU alone."""

        class Understood(Exception):
            pass

        parse_args = argparse.ArgumentParser.parse_args

        def parse_only(*args, **kwargs):
            parse_args(*args, **kwargs)
            raise Understood

        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        asked = [step.command for step in make() if step.command[0].endswith("run.py")]
        assert len(asked) >= 5
        for _, *arguments in asked:
            monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
            with pytest.raises(Understood):
                run.main()

    def test_files_with_tests_of_a_gpu_are_named(self):
        files = {Path(name).relative_to(ROOT / "tests").as_posix() for name in plan.gpu_tests()}
        assert {"kernels/test_head_rows.py", "training/test_host_syncs.py", "integrations/test_liger.py"} <= files
        assert len(files) < 15, "more cost every worker seconds"

    def test_large_and_slow_tests_exist(self):
        text = "\n".join(Path(name).read_text() for name in plan.gpu_tests())
        for word in [*plan.LARGE.split(" or "), plan.SLOW]:
            assert word in text


class TestLog:
    def test_of_workers_cut_off(self, tmp_path):
        log = tmp_path / "tests.log"
        log.write_text(
            "[gw0] [  1%] PASSED tests/a/test_a.py::test_one[x y] \n"
            "[gw1] [  2%] FAILED tests/a/test_a.py::test_two[1-torch.float32] \n"
            "[gw1] [  3%] SKIPPED tests/a/test_b.py::test_three \n"
            "tests/a/test_b.py::test_four \n"
        )
        assert outcome_lines(log) == [
            "tests: 1 passed, 1 failed, 1 skipped",
            "  FAILED test_a.py::test_two[1-torch.float32]: ",
        ]
        log.write_text(log.read_text() + "FAILED tests/a/test_a.py::test_two[1-torch.float32] - assert 1 == 2\n")
        assert outcome_lines(log)[1:] == ["  FAILED test_a.py::test_two[1-torch.float32]: assert 1 == 2"]

    def test_of_one_process(self, tmp_path):
        log = tmp_path / "large-tests.log"
        log.write_text("tests/a/test_a.py::test_one PASSED [ 50%]\ntests/a/test_a.py::test_two ERROR [100%]\n")
        assert outcome_lines(log) == ["large-tests: 1 passed, 1 error", "  ERROR test_a.py::test_two: "]
        log.write_text("============= 619/1726 tests collected (1107 deselected) in 13.58s =============\n")
        assert outcome_lines(log)[1:] == ["  619/1726 tests collected (1107 deselected) in 13.58s"]


class TestSmoke:
    def test_lines(self):
        def wrong(device):
            smoke_checks.near({"x": torch.tensor([1.1])}, {"x": torch.tensor([1.0])}, 1e-3)

        def absent(device):
            raise smoke_checks.NotHere("no GPU")

        device = torch.device("cpu")
        assert smoke.run(wrong, device) == ("FAIL", "AssertionError: errors {'x': '1.0e-01'} above 1e-03")
        assert smoke.run(absent, device) == ("SKIP", "no GPU") and smoke.run(lambda device: None, device) == (
            "PASS",
            "",
        )
        nan = {"x": torch.tensor([float("nan")])}
        with pytest.raises(AssertionError, match="nan"):
            smoke_checks.near(nan, {"x": torch.tensor([1.0])}, 1.0)

    def test_bits_that_change_are_found(self):
        draws = iter((torch.zeros(2), torch.ones(2)))
        with pytest.raises(AssertionError, match=r"\['x'\] differ"):
            smoke_checks.repeats_without_waiting(lambda: {"x": next(draws)}, torch.device("cpu"))

    @pytest.mark.parametrize("name", ["products in bf16 with padded rows", "preference loss, split groups", "gather"])
    def test_a_check_passes_here(self, name):
        assert smoke.run(smoke_checks.CHECKS[name], torch.device("cpu"))[0] == "PASS"


class TestPredictions:
    @pytest.fixture
    def predictions(self) -> dict:
        return json.loads(summary.PREDICTIONS.read_text())

    def test_are_what_is_counted_and_what_the_readme_says(self, predictions):
        predict = importlib.import_module("suite.gpu.predict")
        counted = [list(vars(each).values()) for each in predict.predictions()]
        written = [list(each.values()) for each in predictions["figures"]]
        assert [name for name, *_ in written] == [name for name, *_ in counted]
        assert [each[1:] for each in written] == [pytest.approx(each[1:], rel=1e-2) for each in counted]
        table = "\n".join(summary.prediction_table(predictions, {}))
        assert table in (BENCHMARKS / "README.md").read_text(), "run.py predict --write, and paste its table"

    def test_follow_from_flop_and_bytes(self, predictions):
        for each in predictions["figures"]:
            assert each["ms_flop"] == pytest.approx(each["tflop"] / predictions["flops"] * 1e15, rel=1e-2)
            assert each["ms_bytes"] == pytest.approx(each["gb"] / predictions["bytes"] * 1e12, rel=1e-2)
            assert each["expected_ms"] >= 0.999 * (each["ms_flop"] + each["ms_bytes"])

    def test_stand_beside_what_was_measured(self, predictions, tmp_path):
        assert summary.prediction_lines(tmp_path) == [
            f"{len(predictions['figures'])} predictions, none measured yet; run.py predict prints them"
        ]
        row = {"provider": "preference", "mode": "trainable", "ms": {"median": 80.0}, "disagrees": True}
        head = {"problems": [{"shape": "llama-3-8b", "rows": 16384, "table": [row]}]}
        ceilings = {"product_ms": 1.5, "copy_ms": 4.0}
        for question, result in (("head-bf16", head), ("ceilings", ceilings)):
            (tmp_path / f"2026-01-01_nvidia-h200_{question}.json").write_text(json.dumps(result))
            (tmp_path / f"2026-01-02_cpu-2_{question}.json").write_text(json.dumps(result))
        _, *lines = summary.prediction_lines(tmp_path)
        assert [line.split("  ")[0] for line in lines] == [
            "ceilings, product", "ceilings, copy", "head, llama-3-8b 16384, trainable preference",
        ]  # fmt: skip
        expected = {each["figure"]: each["expected_ms"] for each in predictions["figures"]}[lines[-1][:53].rstrip()]
        assert lines[-1].endswith(f"80.00{80 / expected:7.2f}≠") and not lines[0].endswith("≠")


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
@pytest.mark.parametrize(("target", "flag"), [("gpu", ""), ("gpu-more", "--more ")])
def test_make_asks_for_one_call(target, flag, tmp_path):
    """With a Python that only says what it is asked to run."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "run $*"\n')
    python.chmod(0o755)
    wheel = tmp_path / "build" / "wheels" / "one.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    command = ["make", "-C", str(tmp_path), target, f"PYTHON={python}", "RESULTS=here", "PLATFORM=cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    pip, asked = [line for line in done.stdout.splitlines() if line.startswith("run ")]
    assert done.returncode == 0 and "pip install" in pip
    assert " ".join(asked.split()) == f"run benchmarks/run.py gpu {flag}--seconds 480 --out here"


@pytest.mark.slow  # minutes: every step of the call, on a CPU
@pytest.mark.parametrize("kill", [None, 60])
def test_rehearsal(tmp_path, kill):
    """All steps are reached within the seconds of a call; ended after a minute, the archive is there all the same."""
    command = [sys.executable, str(BENCHMARKS / "run.py"), "gpu", "--rehearse", "--out", str(tmp_path)]
    began = time.monotonic()
    call = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        printed, _ = call.communicate(timeout=kill)
    except subprocess.TimeoutExpired:
        call.terminate()
        printed, _ = call.communicate(timeout=30)
    found = parsed(printed.splitlines())
    assert list(found) == [step.name for step in plan.first_rehearsed()]
    assert time.monotonic() - began <= plan.SECONDS
    inside = packed(tmp_path / "gpu-rehearsal.tar.gz")
    assert "smoke.log" in inside and "summary.txt" in inside
    if kill is None:
        assert {status for status, *_ in found.values()} == {"done"}, found
