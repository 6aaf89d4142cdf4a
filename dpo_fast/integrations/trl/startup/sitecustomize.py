"""Imported by Python when it starts, where `dpo-fast run` has put this folder on PYTHONPATH: patches TRL on its import.

Every Python process of a run comes by here, so it loads nothing but the standard library before TRL itself is loaded.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys


class _PatchOnImport(importlib.abc.MetaPathFinder):
    """Lets others find TRL, and patches it once it is loaded."""

    def find_spec(self, name, path=None, target=None):
        if name != "trl":
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)  # many only ask whether TRL is there
        if spec is not None:
            _patch_after_loading(spec.loader)
        return spec


def _patch_after_loading(loader) -> None:
    load = loader.exec_module

    def exec_module(module) -> None:
        del loader.exec_module
        load(module)
        from dpo_fast.integrations.trl import patch_trl

        patch_trl()

    loader.exec_module = exec_module


def _run_the_one_behind() -> None:
    """Python stops at the first sitecustomize: another one, of the system or the user, would be lost."""
    here = os.path.dirname(os.path.abspath(__file__))
    others = [path for path in sys.path if os.path.abspath(path) != here]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if spec is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


if os.environ.get("DPO_FAST_PATCH_TRL") == "1":
    sys.meta_path.insert(0, _PatchOnImport())
_run_the_one_behind()
