"""Reference stores with rows that are known by their number."""

from __future__ import annotations

import numpy as np

from dpo_fast.reference.store.files import Folder
from dpo_fast.reference.store.keys import completion_key, key_array
from dpo_fast.reference.store.parts import sequence_logp
from dpo_fast.reference.store.store import ReferenceStore

DESCRIPTION = {"weights": "abc", "dtype": "float32"}


def key(number: int) -> bytes:
    return completion_key([number, 7], [number + 1, 5])


def values(number: int) -> np.ndarray:
    return np.cos(np.arange(1 + number % 5) + number).astype(np.float32)


def rows(*numbers: int) -> tuple[np.ndarray, list[np.ndarray]]:
    return key_array([key(i) for i in numbers]), [values(i) for i in numbers]


def filled(root, count: int, part: int = 50, description=DESCRIPTION) -> ReferenceStore:
    """A closed store with rows 0 … count − 1, a part every so many."""
    with ReferenceStore(root, description) as store:
        for start in range(0, count, part):
            store.add(*rows(*range(start, min(start + part, count))))
            store.flush()
    return store


def assert_serves(store: ReferenceStore, count: int, extra: int = 5) -> None:
    """Every row below count, bitwise, one by one and in bulk, and no row beyond."""
    keys, expected = rows(*range(count + extra))
    found, logps, num_tokens = store.lookup(keys)
    assert found.tolist() == [True] * count + [False] * extra
    assert logps[:count].tobytes() == np.array([sequence_logp(v) for v in expected[:count]], np.float32).tobytes()
    assert np.isnan(logps[count:]).all()
    assert num_tokens.tolist() == [len(v) for v in expected[:count]] + [0] * extra
    served = store.token_logps(keys[:count])
    assert [v.tobytes() for v in served] == [v.tobytes() for v in expected[:count]]
    assert store.num_rows == count


def names(store: ReferenceStore) -> list[str]:
    return sorted(Folder(store.folder).list())
