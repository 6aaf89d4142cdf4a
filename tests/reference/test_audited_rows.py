"""Wrong rows that another process has left in the store are found wherever they would be served, and the advice cures.

Another process is a run whose reference is off by some nats, as with another kernel or device.
"""

from __future__ import annotations

import json
import shutil
import uuid
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from dpo_fast.config import DPOConfig
from dpo_fast.errors import InputError
from dpo_fast.reference.reference import Reference
from dpo_fast.reference.store.files import Folder, is_note
from dpo_fast.reference.store.store import ReferenceStore
from dpo_fast.scoring import implicit_rewards
from families import tiny_model, tiny_tokenizer
from preferences import make_trainer, pairs, trained

BAD, GOOD = pairs(8, seed=1), pairs(8, seed=2)
FOUND = "^reference_cache_dir: .* holds a reference log-prob of .* where the reference gives"


def lora():
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")


def train_rows(folder: Path) -> object:
    return make_trainer(folder, BAD)


def some_of_the_train_rows(folder: Path) -> object:
    return make_trainer(folder, concatenate_datasets([GOOD, BAD]))


def eval_rows(folder: Path) -> object:
    return make_trainer(folder, GOOD, eval_dataset=BAD)


def one_of_two_eval_datasets(folder: Path) -> object:
    return make_trainer(folder, GOOD, eval_dataset={"fine": pairs(4, seed=3), "other": BAD})


def rows_given_to_evaluate(folder: Path) -> object:
    return make_trainer(folder, GOOD).evaluate(BAD)


def rows_given_to_predict(folder: Path) -> object:
    return make_trainer(folder, GOOD).predict(BAD)


def rows_given_after_training_an_adapter(folder: Path) -> object:
    trainer = make_trainer(folder, GOOD, peft_config=lora())
    trained(trainer)
    return trainer.evaluate(BAD)


def a_stream(folder: Path) -> object:
    return trained(make_trainer(folder, BAD.to_iterable_dataset()))


def a_stream_to_evaluate_on(folder: Path) -> object:
    return make_trainer(folder, GOOD, eval_dataset=BAD.to_iterable_dataset()).evaluate()


def a_model_of_its_own(folder: Path) -> object:
    return make_trainer(folder, BAD, model=tiny_model("llama", seed=5), ref_model=tiny_model("llama"))


def scores(folder: Path) -> object:
    config = DPOConfig(
        output_dir=str(folder), reference_cache_dir=str(folder / "reference"), use_cpu=True, report_to=[], max_length=64
    )
    return implicit_rewards(tiny_model("llama", seed=5), BAD, tiny_tokenizer(), config, tiny_model("llama")).groups[
        "ref_logps"
    ][:]


def rows_of_trl(folder: Path) -> object:
    trl = pytest.importorskip("trl")
    from dpo_fast.integrations.trl import DPOTrainer

    args = trl.DPOConfig(
        output_dir=str(folder / "out"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_length=64,
        precompute_ref_log_probs=True,
        gradient_checkpointing=False,
        disable_tqdm=True,
    )
    model = tiny_model("llama")
    trainer = DPOTrainer(model=model, args=args, train_dataset=BAD, processing_class=tiny_tokenizer())
    trainer.get_train_dataloader()
    return trainer.train_dataset["ref_chosen_logps"][:]


USES = [
    *(train_rows, some_of_the_train_rows, eval_rows, one_of_two_eval_datasets, rows_given_to_evaluate),
    *(rows_given_to_predict, rows_given_after_training_an_adapter, a_stream, a_stream_to_evaluate_on),
    *(a_model_of_its_own, scores, rows_of_trl),
]


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("DPO_FAST_CACHE", str(tmp_path))  # where TRL's trainer has its stores
    return tmp_path


def leave_wrong(folder: Path, use=train_rows, off: float = 0.5) -> None:
    """Let a run whose reference is off fill the store."""
    with pytest.MonkeyPatch.context() as patch:
        original = Reference.score
        patch.setattr(Reference, "score", lambda self, packed: original(self, packed) - off)
        use(folder)
    for note in (path for path in folder.rglob("audited-*") if is_note(path.name)):
        note.unlink()  # it was made elsewhere


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_wrong_rows_are_found_before_they_are_served(root, use):
    leave_wrong(root, use if use in (scores, rows_of_trl) else train_rows)
    with pytest.raises(InputError, match=FOUND):
        use(root)


@pytest.mark.parametrize("use", [train_rows, eval_rows, scores, rows_of_trl], ids=lambda use: use.__name__)
def test_right_rows_of_others_are_served(root, use):
    leave_wrong(root, use, off=0.0)
    use(root)


def test_a_reference_that_is_gone_says_which_rows_it_could_not_audit(root, caplog):
    leave_wrong(root)
    trainer = make_trainer(root, GOOD)
    trained(trainer)
    trainer.evaluate(BAD)
    assert caplog.text.count("8 of 8 groups come from parts of") == 1
    trainer.evaluate(GOOD)
    assert caplog.text.count("that no audit has covered") == 1


def test_rows_that_an_earlier_audit_has_covered_are_served_without_a_word(root, caplog):
    make_trainer(root, BAD)
    trainer = make_trainer(root, GOOD)
    trained(trainer)
    trainer.evaluate(BAD)
    assert "that no audit has covered" not in caplog.text


# ---- the advice of the error ----


def truth(folder: Path, use) -> object:
    """What a run with nothing in its store finds."""
    return served(use(folder))


def served(result: object) -> object:
    return result if isinstance(result, list) else result.train_dataset["ref_logps"][:]


def advice(folder: Path, use=train_rows) -> str:
    with pytest.raises(InputError, match=FOUND) as error:
        use(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("use", [train_rows, scores], ids=lambda use: use.__name__)
def test_another_folder_cures(root, use):
    right = truth(root / "right", use)
    leave_wrong(root / "wrong", use)
    assert "Name another reference_cache_dir" in advice(root / "wrong", use)
    assert served(use(root / "another")) == right


def test_under_trl_another_cache_folder_cures(root, monkeypatch):
    monkeypatch.setenv("DPO_FAST_CACHE", str(root / "right"))
    right = rows_of_trl(root)
    monkeypatch.setenv("DPO_FAST_CACHE", str(root / "wrong"))
    leave_wrong(root, rows_of_trl)
    assert "under TRL, set the environment variable DPO_FAST_CACHE to another folder" in advice(root, rows_of_trl)
    monkeypatch.setenv("DPO_FAST_CACHE", str(root / "another"))
    assert rows_of_trl(root) == right


def test_removing_the_folder_cures_where_no_other_program_uses_it(root):
    right = truth(root / "right", train_rows)
    leave_wrong(root / "wrong")
    message = advice(root / "wrong")
    assert "Remove the folder instead only if no other program uses it" in message
    (folder,) = (path for path in (root / "wrong" / "reference").iterdir() if path.is_dir())
    assert str(folder) in message
    shutil.rmtree(folder)
    assert served(train_rows(root / "wrong")) == right


def test_the_same_at_a_remote_place(root):
    """Each of both cures."""
    right = truth(root, train_rows)
    wrong, another = (f"memory://audited-{uuid.uuid4().hex}" for _ in range(2))

    def remote(url: str):
        return lambda folder: make_trainer(folder, BAD, reference_cache_dir=url)

    leave_wrong(root, remote(wrong))
    message = advice(root, remote(wrong))
    assert served(remote(another)(root)) == right
    (name,) = Folder(wrong).list(folders=True)
    assert f"{wrong}/{name}" in message.replace("memory:///", "memory://")
    Folder(wrong).fs.rm(f"{wrong.removeprefix('memory:/')}/{name}", recursive=True)
    assert served(remote(wrong)(root)) == right


def test_a_store_that_another_program_shares_is_left_to_it(root):
    """The other program goes on to write what it has; the run in a folder of its own is right, now and later."""
    right = truth(root / "right", train_rows)
    leave_wrong(root / "shared")
    (folder,) = (path.name for path in (root / "shared" / "reference").iterdir() if path.is_dir())
    other = ReferenceStore(root / "shared" / "reference", description(root / "shared" / "reference" / folder))
    advice(root / "shared")
    before = {path.name for path in (root / "shared").rglob("part-*")}
    for _ in range(2):
        assert served(train_rows(root / "another")) == right
    other.close()
    assert {path.name for path in (root / "shared").rglob("part-*")} == before, "its rows are as they were"


def description(folder: Path) -> dict:

    return json.loads((folder / "reference.json").read_text())


def test_what_was_cured_stays_cured(root):
    """The next run audits what the cured one has left, and serves it."""
    leave_wrong(root / "wrong")
    advice(root / "wrong")
    first = served(train_rows(root / "another"))
    trainer = make_trainer(root / "another", Dataset.from_list([*BAD]))
    assert trainer.reference.store.computed == 0 and served(trainer) == first
