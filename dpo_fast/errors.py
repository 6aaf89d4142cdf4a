"""Mistakes in the input, and the end of a run that diverged: one line at the command line, and no traceback."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


@contextmanager
def input_of(what: str, cure: str) -> Iterator[None]:
    """Turn whatever a library raises about something that the user gave into an `InputError`.

    Args:
        what: names the argument, and its value where one is known.
        cure: what to do about it.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # libraries raise every kind for a wrong value
        raise InputError(f"{what}: {error}; {cure}") from error


def check_writable(
    argument: str, path: str | os.PathLike[str], *, is_folder: bool = False, may_be_read_only: bool = False
) -> None:
    """Refuse a place that nothing can be written to; a file or folder that is not there yet is not made.

    Raises:
        InputError: naming `argument`, the place, and what is in the way.
    """
    cure = "give another place, or make room and write permission there"
    try:
        target = Path(path).expanduser().absolute()
        with suppress(FileNotFoundError):
            os.stat(target)  # raises for names that no file can have
        if target.exists() and target.is_dir() != is_folder:
            raise InputError(f"{argument}={str(path)!r} is a {'file' if is_folder else 'folder'}; {cure}")
        place = target if is_folder else target.parent
        while not place.exists():
            place = place.parent
        if not may_be_read_only:
            with tempfile.TemporaryFile(dir=place) as file:
                file.write(b"\0" * 4096)
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{argument}={str(path)!r} cannot be written: {error}; {cure}") from error


class TrainingDiverged(RuntimeError):
    """Losses or weights are no longer finite, and training ended; the message says since when, why and what to do.

    Attributes:
        step: the optimizer step in which it was seen first.
        first: what was not finite first: "loss", "gradient norm" or "weights".
        checkpoint: folder of the last one with finite weights; None for none.
    """

    def __init__(self, message: str, *, step: int, first: str, checkpoint: str | None) -> None:
        super().__init__(message)
        self.step, self.first, self.checkpoint = step, first, checkpoint


_WITHOUT_CAUSE = (InputError, ImportError, MemoryError)  # say all themselves, or are no matter of what is read
# As PyTorch's and safetensors' writers say it, which raise no OSError.
_FULL = re.compile(r"No space left on device|os error 28|Disk quota exceeded|PytorchStreamWriter failed writing file")
_LONGEST = 300  # characters of another library's message that are shown
_CURES = {
    errno.ENOSPC: "free space on that disk, or have caches elsewhere (HF_HOME, HF_DATASETS_CACHE, TMPDIR)",
    errno.EDQUOT: "free space within your quota, or have caches elsewhere (HF_HOME, HF_DATASETS_CACHE, TMPDIR)",
    errno.EACCES: "give this user permission to read it, and to write where caches are (HF_HOME, HF_DATASETS_CACHE)",
    errno.EPERM: "give this user permission to read it, and to write where caches are (HF_HOME, HF_DATASETS_CACHE)",
    errno.EROFS: "have caches where files can be written (HF_HOME, HF_DATASETS_CACHE, TMPDIR)",
}


@contextmanager
def reading(
    argument: str, value: object, cure: str, errors: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn what a library raises on what the user gave into an `InputError` of one line.

    Libraries raise exceptions of any class on broken files. So the block holds calls of them alone, or `errors` keeps
    to classes that no mistake in dpo_fast raises.

    Args:
        argument: what the user gave the value as.
        value: path or name that is read.
        cure: what to do where the error does not say it by itself, as a full disk does.
        errors: classes that are turned.
    """
    try:
        yield
    except errors as error:
        if isinstance(error, _WITHOUT_CAUSE) or type(error).__name__ == "OutOfMemoryError":
            raise
        cure = _CURES.get(getattr(error, "errno", None), cure)
        said = " ".join(str(error).split())
        said = f"{said[:_LONGEST]}…" if len(said) > _LONGEST else said
        raise InputError(f"{argument}={value!r} cannot be read ({type(error).__name__}: {said}); {cure}") from error


@contextmanager
def writing(argument: str, path: str) -> Iterator[None]:
    """Turn the errors of a full disk, whichever library meets it, into an `InputError` of one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or _FULL.search(str(error))
        if not full:
            raise
        raise InputError(f"{argument}={path!r}: the disk is full ({error}); free space, and resume") from error
