"""`dpo-fast cache`: fill the reference store ahead of training, and look after it.

Filling takes the flags of `dpo-fast train`, so that it finds the very folder that training will look into. Job arrays
share the prompts out with --num_shards and --shard; processes under `torchrun` or `accelerate launch` do so by
themselves.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from dpo_fast.commands.flags import CommandParser, spellings
from dpo_fast.commands.launch import launch_if_needed
from dpo_fast.commands.train import make_trainer, print_summaries, read_arguments, scratch_output
from dpo_fast.config.types import nearest
from dpo_fast.errors import InputError, check_writable, refusing_input
from dpo_fast.machine import cache_dir


def parser() -> argparse.ArgumentParser:
    """The flags that `cache` has besides those of `train`."""
    parser = CommandParser(
        prog="dpo-fast cache",
        usage="dpo-fast cache --model MODEL --dataset DATASET [options of dpo-fast train]\n"
        "       dpo-fast cache {--info | --verify | --prune DAYS | --export FILE} [--reference_cache_dir DIR]",
        description="Compute reference log-probs ahead of training, or look after those that are kept.",
    )
    parser.add_argument("--num_shards", type=int, default=1, help="jobs that share the prompts out (default: 1)")
    parser.add_argument("--shard", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--info", action="store_true", help="list the stores: model, rows, size, last use")
    parser.add_argument("--verify", action="store_true", help="read everything; what is damaged is set aside")
    parser.add_argument(
        "--prune", type=float, metavar="DAYS", help="remove stores unused for so many days; none in use"
    )
    parser.add_argument("--dry_run", action="store_true", help="with --prune: only say what would go")
    parser.add_argument("--export", metavar="FILE", help="write a store's rows to a .parquet or .jsonl file")
    parser.add_argument("--store", metavar="NAME", help="the store to verify or export, as --info names it")
    parser.add_argument("--reference_cache_dir", help="where the stores are; unset, the user's cache folder")
    return parser


def main(argv: list[str]) -> int:
    with refusing_input():
        options, rest = parser().parse_known_args(argv)
        values = {name: getattr(options, name) for name in ("info", "verify", "prune", "export")}
        chosen = [name for name, value in values.items() if value is not None and value is not False]
        if len(chosen) > 1:
            raise InputError(f"--{chosen[0]} and --{chosen[1]} exclude each other; give one.")
        if not chosen:
            return _fill(argv, options, rest)
        if rest:
            near = nearest(rest[0], spellings(parser()), "; did you mean {}?")
            raise InputError(f"unexpected argument {rest[0]!r} beside --{chosen[0]}{near or '; leave it out'}")
        root = options.reference_cache_dir or str(cache_dir() / "reference")
        return {"info": _info, "verify": _verify, "prune": _prune, "export": _export}[chosen[0]](root, options)


def _fill(argv: list[str], options: argparse.Namespace, train_flags: list[str]) -> int:
    """Compute what the store lacks, or this job's share of it."""
    if not 0 <= options.shard < options.num_shards:
        raise InputError(
            f"--shard {options.shard} must lie in [0, {options.num_shards}), below --num_shards; count from 0."
        )
    where = ["--reference_cache_dir", options.reference_cache_dir] if options.reference_cache_dir else []
    arguments = read_arguments([*train_flags, *where, *scratch_output()], parser())
    launch_if_needed(arguments, ("cache", *argv))
    trainer = make_trainer(arguments, _caching_trainer(options.shard, options.num_shards))
    print_summaries(trainer)
    store = trainer.reference.store
    store.close()
    if trainer.is_world_process_zero():
        print(f"{store.computed} reference log-probs computed, in {store.folder}")
    return 0


def _info(root: str, options: argparse.Namespace) -> int:
    from dpo_fast.reference.store.maintenance import info

    stores = info(root)
    for store in stores:
        about = store.description
        used = "" if store.modified is None else time.strftime("%F", time.gmtime(store.modified))
        print(
            f"{Path(store.folder).name}  {store.rows:>10} rows  {store.bytes / 2**20:8.1f} MiB  {store.parts} parts  "
            f"last used {used}  {about.get('architecture')} {about.get('dtype')} {about.get('attention')}"
        )
    print(f"{len(stores)} stores, {sum(store.bytes for store in stores) / 2**20:.1f} MiB, in {root}")
    return 0


def _folders(root: str, options: argparse.Namespace) -> list[str]:
    from dpo_fast.reference.store.maintenance import info

    folders = {Path(store.folder).name: store.folder for store in info(root)}
    if options.store is not None and options.store not in folders:
        raise InputError(f"--store {options.store}: {root} has no such store, only {sorted(folders)}.")
    return [folders[options.store]] if options.store else list(folders.values())


def _verify(root: str, options: argparse.Namespace) -> int:
    from dpo_fast.reference.store.maintenance import verify

    damaged = 0
    for folder in _folders(root, options):
        found = verify(folder)
        damaged += len(found.damaged)
        print(f"{folder}: {found.rows} rows in {found.parts} parts are whole, {found.bytes / 2**20:.1f} MiB")
        for what in ("damaged", "missing", "foreign"):
            for name in getattr(found, what):
                print(f"  {what}: {name}", *([f"({found.reasons[name]})"] if what == "damaged" else []))
        if found.unnamed:
            print(f"  {len(found.unnamed)} parts do not name their store; the next run checks them")
    return 1 if damaged else 0


def _prune(root: str, options: argparse.Namespace) -> int:
    from dpo_fast.reference.store.maintenance import prune, stores_in_use

    for folder in stores_in_use(root):
        print(f"in use, left alone: {folder} (a run has opened it in the last hours and not closed it)")
    removed, size = prune(root, options.prune, options.dry_run)
    for path in removed:
        print(path)
    print(
        f"{'would remove' if options.dry_run else 'removed'} {len(removed)} files, {size / 2**20:.1f} MiB, from {root}"
    )
    return 0


def _export(root: str, options: argparse.Namespace) -> int:
    from dpo_fast.reference.store.maintenance import export

    folders = _folders(root, options)
    if len(folders) != 1:
        names = sorted(Path(folder).name for folder in folders)
        raise InputError(f"--export writes one store, and {root} has {len(folders)}; choose with --store from {names}.")
    check_writable("--export", options.export)
    export(folders[0], options.export)
    print(f"wrote {options.export}")
    return 0


def _caching_trainer(shard: int, shards: int) -> type:
    """A trainer class that computes reference log-probs when it is made, and does nothing else with them."""
    from accelerate import PartialState

    from dpo_fast.reference.compute import Shard
    from dpo_fast.trainer import DPOTrainer
    from dpo_fast.training.datasets import PreferenceDatasets

    state = PartialState()

    class ComputingDatasets(PreferenceDatasets):
        def with_reference(self, dataset, name):
            if self.reference is None:
                raise InputError("loss_type: the loss looks at no reference log-prob; there is nothing to compute.")
            self.reference.compute(dataset, name)
            return dataset

    class CachingTrainer(DPOTrainer):
        _datasets_class = ComputingDatasets
        _shard = Shard(shard * state.num_processes + state.process_index, shards * state.num_processes)

    return CachingTrainer
