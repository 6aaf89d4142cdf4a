"""Block sizes of the shared-prefix attention kernels.

A table's key is (head size padded to a power of two, at least 64; bytes of an element), its rows go by major compute
capability. Chosen so that nothing spills, with Triton 3.6 and 3.7, and several loads are in flight, on paper; times are
open, and `DPO_FAST_AUTOTUNE=1` prints what is fastest. Rows 8 and 12 hold for the small chips of their kind too (99 KiB
of shared memory a program). fp32 is multiplied without tensor cores, in blocks that fit the registers.
"""

from __future__ import annotations

from dpo_fast_kernels._triton import Config

Table = dict[tuple[int, int], dict[int, Config]]


def _blocks(block_q: int, block_k: int, num_warps: int, num_stages: int) -> Config:
    return {"BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": num_stages}


def _rows(small: Config, hopper: Config, blackwell: Config) -> dict[int, Config]:
    return {8: small, 9: hopper, 10: blackwell, 12: small}


def _everywhere(config: Config) -> dict[int, Config]:
    return _rows(config, config, config)


FWD: Table = {
    (64, 2): _rows(_blocks(128, 64, 8, 3), _blocks(128, 128, 8, 3), _blocks(128, 128, 8, 3)),
    (128, 2): _rows(_blocks(128, 32, 8, 3), _blocks(128, 64, 8, 3), _blocks(128, 64, 8, 3)),
    (256, 2): _rows(_blocks(64, 32, 8, 2), _blocks(128, 32, 8, 3), _blocks(128, 32, 8, 3)),
    (64, 4): _rows(_blocks(32, 32, 8, 2), _blocks(32, 32, 4, 2), _blocks(32, 32, 4, 2)),
    (128, 4): _rows(_blocks(32, 16, 8, 2), _blocks(16, 32, 8, 2), _blocks(16, 16, 4, 2)),
    (256, 4): _everywhere(_blocks(16, 16, 4, 2)),
}
DQ: Table = {
    (64, 2): _rows(_blocks(128, 64, 8, 2), _blocks(128, 64, 8, 3), _blocks(128, 64, 8, 3)),
    (128, 2): _rows(_blocks(64, 64, 8, 2), _blocks(128, 64, 8, 2), _blocks(128, 64, 8, 2)),
    (256, 2): _rows(_blocks(64, 16, 8, 2), _blocks(128, 32, 8, 2), _blocks(128, 32, 8, 2)),
    (64, 4): _everywhere(_blocks(32, 32, 8, 2)),
    (128, 4): _everywhere(_blocks(16, 32, 8, 2)),
    (256, 4): _everywhere(_blocks(16, 16, 4, 2)),
}
DKV: Table = {
    (64, 2): _rows(_blocks(32, 128, 8, 2), _blocks(64, 128, 8, 3), _blocks(64, 128, 8, 2)),
    (128, 2): _rows(_blocks(32, 64, 8, 2), _blocks(64, 128, 8, 2), _blocks(64, 128, 8, 2)),
    (256, 2): _rows(_blocks(32, 32, 8, 2), _blocks(32, 64, 8, 2), _blocks(32, 64, 8, 2)),
    (64, 4): _everywhere(_blocks(32, 32, 8, 2)),
    (128, 4): _everywhere(_blocks(16, 32, 8, 2)),
    (256, 4): _everywhere(_blocks(16, 16, 8, 2)),
}
# A softcap's tanh and a window's positions take registers of their own.
FWD_SOFTCAP: Table = FWD | {
    (64, 2): _rows(_blocks(128, 64, 8, 3), _blocks(128, 128, 8, 3), _blocks(128, 64, 8, 3)),
}
DKV_WINDOW: Table = DKV | {
    (128, 2): _rows(_blocks(32, 64, 8, 2), _blocks(64, 64, 8, 2), _blocks(64, 128, 8, 2)),
}
DKV_SOFTCAP: Table = DKV | {
    (64, 2): _rows(_blocks(16, 128, 8, 2), _blocks(32, 128, 8, 3), _blocks(32, 128, 8, 3)),
    (128, 2): _rows(_blocks(32, 64, 8, 2), _blocks(32, 128, 8, 2), _blocks(32, 128, 8, 2)),
    (256, 2): _rows(_blocks(32, 32, 8, 2), _blocks(32, 32, 8, 2), _blocks(32, 64, 8, 2)),
}


def fwd_table(softcap: float | None) -> Table:
    return FWD_SOFTCAP if softcap else FWD


def dkv_table(window: int | None, softcap: float | None) -> Table:
    return DKV_SOFTCAP if softcap else DKV_WINDOW if window else DKV


_SIZES = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128))
CANDIDATES: list[Config] = [
    _blocks(block_q, block_k, warps, stages) for block_q, block_k in _SIZES for warps in (4, 8) for stages in (2, 3)
]
