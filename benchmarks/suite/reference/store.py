"""How long does a store of millions of reference log-probs take to open and to answer, and in how much memory?

    python benchmarks/run.py store --rows 1000000 10000000 50000000 --out DIR

Makes synthetic stores in a temporary folder, parts of 10 000 completions of four tokens, and removes them. Of each
size, in fresh processes: the first opening, which verifies every part and makes the index; openings after that, with a
lookup of 100 000 keys, half of them present; and an opening that finds ten parts which the index does not cover. Every
answer is checked before a time is reported. Peak memory is that of the process, mapped pages included.

Also the second pass over 50 000 tokenised pairs of about 850 tokens whose log-probs are all known: keys of the 100 000
completions, lookup, and the column of the dataset.

The last line printed is one JSON object; the same goes to --out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dpo_fast.machine import process_memory
from dpo_fast.reference.store.files import Folder, is_index
from dpo_fast.reference.store.parts import sequence_logp, write_part
from dpo_fast.reference.store.store import ReferenceStore

RUN = Path(__file__).parents[2] / "run.py"
DESCRIPTION = {"question": "bench_store"}
ROWS_PER_PART = 10_000
TOKENS = 4
ASKED = 100_000
NEW_PARTS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000_000, 2_000_000, 5_000_000, 10_000_000, 50_000_000]
    )
    parser.add_argument("--repeats", type=int, default=5, help="of the opening with an index")
    parser.add_argument("--out", type=Path, help="benchmarks/results when left out")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)  # root and rows, in a process of its own
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return

    from suite.harness.results import (  # imports torch, which a measured process must not
        RESULTS,
        environment,
        spread,
        write_result,
    )

    sizes = {rows: measure_size(rows, options.repeats, spread) for rows in options.rows}
    second = second_pass(options.repeats)
    lines = [
        f"{'rows':>12}{'open':>10}{'lookup':>10}{'peak':>10}{'first open':>13}{'peak':>10}{'new parts':>12}{'peak':>10}"
    ]
    for rows, size in sizes.items():
        lines.append(
            f"{rows:12,}{size['open_seconds']['median']:8.3f} s{size['lookup_seconds']['median']:8.3f} s"
            f"{size['peak_mib']:6.0f} MiB{size['first_open_seconds']:11.2f} s{size['first_peak_mib']:6.0f} MiB"
            f"{size['new_parts_seconds']:10.2f} s{size['new_parts_peak_mib']:6.0f} MiB"
        )
    lines.append(
        f"second pass over {second['completions']:,} completions, {second['tokens']:,} tokens: "
        f"{spread(second['seconds'])['median']:.3f} s"
    )
    result = {
        "question": "seconds and memory to open a store of reference log-probs and look 100 000 keys up",
        "sizes": {str(rows): size for rows, size in sizes.items()},
        "second_pass": {**second, "seconds": spread(second["seconds"])},
        "summary": lines,
        "settings": {"rows": options.rows, "repeats": options.repeats, "asked": ASKED, "tokens": TOKENS},
        "environment": environment(),
    }
    path = write_result("store", result, options.out or RESULTS)
    print("\n".join(lines))
    largest = sizes[max(sizes)]
    seconds = largest["open_seconds"]["median"] + largest["lookup_seconds"]["median"]
    print(json.dumps({"rows": max(sizes), "seconds": seconds, "peak_mib": largest["peak_mib"], "file": str(path)}))


def measure_size(rows: int, repeats: int, spread: Any) -> dict[str, Any]:
    """Make a store, measure it in fresh processes and remove it."""
    root = tempfile.mkdtemp(prefix="bench_store-")
    try:
        folder = Folder(ReferenceStore(root, DESCRIPTION).folder)
        add_parts(folder, 0, rows // ROWS_PER_PART)
        first = in_process(root, rows)
        opened = [in_process(root, rows) for _ in range(repeats)]
        (index,) = filter(is_index, folder.list())
        size = folder.list()[index].size
        add_parts(folder, rows // ROWS_PER_PART, NEW_PARTS)
        new = in_process(root, rows + NEW_PARTS * ROWS_PER_PART)
    finally:
        shutil.rmtree(root)
    return {
        "open_seconds": spread([run["open"] for run in opened]),
        "lookup_seconds": spread([run["lookup"] for run in opened]),
        "peak_mib": max(run["peak_mib"] for run in opened),
        "imports_mib": opened[0]["imports_mib"],
        "index_bytes_per_row": size / rows,
        "first_open_seconds": first["open"],
        "first_peak_mib": first["peak_mib"],
        "new_parts_seconds": new["open"],
        "new_parts_peak_mib": new["peak_mib"],
    }


def second_pass(repeats: int) -> dict[str, Any]:
    """Return the seconds of a pass whose store has all: opening it, keys of the rows, lookup, the new column."""
    import pyarrow as pa
    from datasets import Dataset

    from dpo_fast.data.columns import token_tables
    from dpo_fast.reference.compute import ReferencePass, with_reference_logps
    from dpo_fast.reference.store.keys import CompletionKeys

    generator = np.random.default_rng(0)

    def lists(lengths: np.ndarray) -> pa.ListArray:
        ids = generator.integers(0, 49_152, lengths.sum(), np.int32)
        return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *lengths]), pa.int32()), ids)

    pairs = ASKED // 2
    lengths = generator.integers(50, 600, 2 * pairs)
    completions = pa.ListArray.from_arrays(pa.array(range(0, 2 * pairs + 1, 2), pa.int32()), lists(lengths))
    rows = pa.table({"prompt_ids": lists(generator.integers(50, 350, pairs)), "completion_ids": completions})
    seconds = []
    with tempfile.TemporaryDirectory(prefix="bench_store-") as root:
        Dataset(rows).save_to_disk(f"{root}/rows")
        dataset = Dataset.load_from_disk(f"{root}/rows")  # mapped, as what a run prepares is
        known = [np.full(1, -float(number), np.float32) for number in range(2 * pairs)]
        with ReferenceStore(root, DESCRIPTION) as store:
            store.add(CompletionKeys.of_tables(token_tables(dataset)).values, known)
        for _ in range(repeats):
            began = time.perf_counter()
            store, keys = ReferenceStore(root, DESCRIPTION), CompletionKeys.of_tables(token_tables(dataset))
            ReferencePass(store, score=_nothing_to_score, layout="shared").over(dataset, keys, "train")
            found = with_reference_logps(dataset, keys, store)
            seconds.append(time.perf_counter() - began)
            values = found.with_format("numpy")["ref_logps"][:]
            if not np.array_equal(np.concatenate(list(values)), np.concatenate(known)):
                raise SystemExit("the second pass did not find what the store was given")
    tokens = sum(column.nbytes for column in rows.columns) // 4
    return {"completions": 2 * pairs, "tokens": tokens, "seconds": seconds}


def _nothing_to_score(packed: Any) -> Any:
    raise SystemExit("the second pass computes something")


def part_content(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Return keys, uint64 [n, 2], and token log-probs, fp32 [n, 4], of a part."""
    generator = np.random.default_rng(number)
    keys = generator.integers(0, 2**64, (ROWS_PER_PART, 2), np.uint64)
    return keys, -generator.exponential(1.0, (ROWS_PER_PART, TOKENS)).astype(np.float32)


def add_parts(folder: Folder, first: int, count: int) -> None:
    for number in range(first, first + count):
        keys, values = part_content(number)
        write_part(folder, keys, list(values))


def in_process(root: str, rows: int) -> dict[str, float]:
    command = [sys.executable, str(RUN), "store", "--measure", root, str(rows)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(root: str, rows: int) -> dict[str, float]:
    """Open a store and look keys up, half of them present; refuse to time wrong answers."""
    parts = rows // ROWS_PER_PART
    asked = [part_content(number) for number in np.linspace(0, parts - 1, ASKED // 2 // ROWS_PER_PART).astype(int)]
    absent = np.random.default_rng(2**40).integers(0, 2**64, (ASKED // 2, 2), np.uint64)
    keys = np.concatenate([*(keys for keys, _ in asked), absent])
    keys = keys[np.random.default_rng(0).permutation(len(keys))]
    present = ((tuple(key), row) for part, values in asked for key, row in zip(part.tolist(), values, strict=True))
    known = {key: sequence_logp(row) for key, row in present}
    expected = [known.get(tuple(key)) for key in keys.tolist()]
    imports = peak_mib()

    began = time.perf_counter()
    store = ReferenceStore(root, DESCRIPTION)
    opened = time.perf_counter()
    found, logps, _ = store.lookup(keys)
    ended = time.perf_counter()

    answers = zip(expected, logps, found, strict=True)
    right = [value == logp if there else value is None for value, logp, there in answers]
    if not all(right) or store.num_rows != rows or int(found.sum()) != ASKED // 2:
        raise SystemExit(
            f"{len(right) - sum(right)} of {len(right)} answers are wrong, {store.num_rows} rows of {rows}"
        )
    return {"open": opened - began, "lookup": ended - opened, "peak_mib": peak_mib(), "imports_mib": imports}


def peak_mib() -> float:
    """Return the peak of this process since it began; getrusage would count what the process that started it had."""
    return process_memory("VmHWM") / 2**20
