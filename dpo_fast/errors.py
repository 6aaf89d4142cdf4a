"""Mistakes in the input: what the command line reports in one line, and does not show a traceback for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

# The extra of dpo-fast that installs an optional module.
EXTRAS = {
    "peft": "peft",
    "trl": "trl",
    "flash_attn": "flash",
    "matplotlib": "plot",
    "gguf": "demo",
    "vaderSentiment": "demo",
}


class InputError(ValueError):
    """Something that the user gave cannot be used; the message names it, and says what is allowed and what to do."""


@contextmanager
def refusing_input() -> Iterator[None]:
    """Turn what stops the preparation of a run into an `InputError`.

    Before anything is computed, a wrong value, a missing file or a missing package is a mistake in the input, whichever
    library finds it. A module of dpo_fast that is missing is a bug, and stays one.
    """
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError, ImportError) as error:
        module = (getattr(error, "name", None) or "").split(".")[0] if isinstance(error, ImportError) else ""
        if module == "dpo_fast":
            raise
        cure = f'; install it with: pip install "dpo-fast[{EXTRAS[module]}]"' if module in EXTRAS else ""
        raise InputError(f"{error}{cure}") from error
