"""docs/models.md: every causal language model of transformers, and how it trains here.

`python tests/model_table.py` writes the page; a test holds it to what the models do.
"""

from __future__ import annotations

import logging
import re

import transformers

from causal_lms import BUILDABLE, NEEDS, NOT_TEXT, causal_lm
from dpo_fast.model.agreement import settle_forward
from dpo_fast.model.dropout import disable_dropout
from repository import ROOT

PAGE = ROOT / "docs" / "models.md"
_HEAD = """# Models

Every causal language model of transformers {version}, built small with random weights, and what `layout="auto"` takes
for it. Before anything is computed, log-probs and gradients of packed batches are compared with the model's own logits.
What differs is not used. So a model that is not in this table trains right too, or is refused by name.

- **shared**: one copy of a prompt for all of its completions, no padding. **padded**: a row for every completion.
- **fused** logits: the head goes from hidden states to log-probs without whole logits. **own**: the model's forward
  makes them, which is slower and takes more memory.

The small models have windows, chunks and experts; a checkpoint without them may share prompts where the table says
padded. `python tests/model_table.py` writes this page.

| model type | layout | logits | why |
|---|---|---|---|
"""


class _Said(logging.Handler):
    def __init__(self):
        super().__init__()
        self.reasons: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.reasons.append(record.getMessage().partition("because ")[2])


def row_of(kind: str) -> str:
    """Return the line of a model type."""
    model, said, logger = causal_lm(kind), _Said(), logging.getLogger("dpo_fast.model.agreement")
    disable_dropout(model)
    logger.addHandler(said)
    try:
        layout = settle_forward(model, "auto", training=True, max_length=200)
    except ValueError as error:
        return f"| {kind} | refused | | {_short(re.sub(r'; set .*| .(?:Value|Runtime)Error:.*', '', str(error)))} |"
    finally:
        logger.removeHandler(said)
    reasons = "; ".join(map(_short, said.reasons))
    return f"| {kind} | {layout} | {'own' if model.dpo_fast.head_form is None else 'fused'} | {reasons} |"


def _short(reason: str) -> str:
    return re.sub(r"^model: (\w+(?= (looks|cannot|does))\s)?|up to [\d.e+-]+ nat ", "", reason)


def page() -> str:
    """Return the whole page."""
    rows = [row_of(kind) for kind in BUILDABLE]
    others = [f"| {kind} | not tried | | {reason} |" for kind, reason in {**NEEDS, **NOT_TEXT}.items()]
    return _HEAD.format(version=transformers.__version__) + "\n".join(sorted([*rows, *others])) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
