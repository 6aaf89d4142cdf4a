"""Hidden rows × LM head → log-prob of every target in one kernel: logits exist in registers only.

    logp_n = x_n[t_n] − logΣ_v exp(x_n[v])        x = transform(X·Wᵀ + b)

N rows, H hidden, V vocabulary. One program takes BLOCK_N rows and a *split*, a run of consecutive blocks of BLOCK_V
words. For each block it multiplies over H into an fp32 accumulator, and folds that into a running maximum m, the sum
Σe^(x−m) and, where asked for, Σe^(x−m)·(x−m), Σe^(2(x−m)) and Σx of every row. A second kernel merges the splits in
a fixed order. No atomics: runs are bitwise equal. Importing this module imports Triton.

Inside the kernels logits are x·log₂e, so that e^x is one exp2; the merge multiplies by ln 2.

Order of the programs, for the L2 cache: hidden rows come in groups that fill a quarter of it; within a group row blocks
run fastest, then splits. So the programs at work at one time are a rectangle of row blocks × splits: each weight block
is read from memory once for the whole group, and the group's rows stay in the cache for all its splits.

FLOP 2·NHV. Bytes from memory: N·H·itemsize + groups·V·H·itemsize, groups = 4·N·H·itemsize / L2 rounded up, and
splits·N·8 for the partial sums (12 more with all statistics), written and read. Bytes from the L2 cache:
N·V·H·itemsize·(1/BLOCK_N + 1/BLOCK_V).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dpo_fast_kernels._triton import Config, major_capability, pick_config
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform, check_statistics


def _config(rows: int, words: int, hidden: int, warps: int, stages: int, flatten: bool = True) -> Config:
    blocks = {"BLOCK_N": rows, "BLOCK_V": words, "BLOCK_H": hidden}
    return {**blocks, "FLATTEN": flatten, "num_warps": warps, "num_stages": stages}


# Major compute capability → configuration for bf16 and fp16 in rows that begin at multiples of 16 bytes. The log-probs
# must not depend on which statistics are asked for, so one configuration holds for all. Rows 8 and 12 also fit the
# 99 KiB of shared memory that sm_86, sm_89 and sm_120 have. Never measured.
_CONFIGS = {
    8: _config(128, 128, 64, 8, 4),
    9: _config(128, 256, 64, 8, 4),
    10: _config(128, 256, 64, 8, 4),
    12: _config(128, 128, 64, 8, 3),
}
_CANDIDATES = (
    _config(128, 256, 64, 8, 3),
    _config(128, 256, 64, 8, 4, flatten=False),
    _config(128, 128, 64, 8, 3),  # two programs share a multiprocessor: one multiplies while the other sums
    _config(128, 128, 64, 8, 4),
    _config(128, 128, 64, 4, 3),
    _config(128, 128, 32, 8, 4),
)
# fp32, which is multiplied without tensor cores, and rows at other addresses, whose elements pass through registers.
_SMALL_CONFIGS = {8: _config(64, 128, 32, 8, 3)}
_SMALL_CANDIDATES = (_config(64, 64, 32, 4, 3), _config(64, 128, 32, 8, 3, flatten=False))

_MERGED_ROWS, _MERGED_SPLITS = 32, 32  # block of the merging kernel

_INTERPRETED_DEVICE = (132, 50 * 2**20)  # multiprocessors and bytes of L2 cache, where there is no GPU to ask


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns the left and the right half of a matrix."""
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["N", "V", "splits", "blocks_per_split", "group_size"])
def _linear_logps_fused_kernel(
    hidden,  # descriptor of blocks [BLOCK_N, BLOCK_H], or pointer
    weight,  # descriptor of blocks [BLOCK_V, BLOCK_H], or pointer
    bias_ptr,
    targets_ptr,
    target_logit_ptr,
    peak_ptr,
    total_ptr,
    moment_ptr,
    square_ptr,
    logit_sum_ptr,
    N,
    V,
    stride_xn,
    stride_xh,
    stride_wv,
    stride_wh,
    splits,
    blocks_per_split,
    group_size,  # row blocks
    inner,
    outer,
    H: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    inner = tl.cast(inner, tl.float32)
    outer = tl.cast(outer, tl.float32)
    pid = tl.program_id(0)
    group = pid // (group_size * splits)
    first_row_block = group * group_size
    place = pid - first_row_block * splits
    row_blocks = tl.minimum(tl.cdiv(N, BLOCK_N) - first_row_block, group_size)
    pid_n = first_row_block + place % row_blocks
    split = place // row_blocks
    first_block = split * blocks_per_split
    last_block = tl.minimum(first_block + blocks_per_split, tl.cdiv(V, BLOCK_V))

    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    # A target outside [0, V) may be one inside in 32 bits. What is stored for it then, the merge passes over.
    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1).to(tl.int32)
    if not DESCRIPTORS:  # rows beyond the last repeat it, so that only the columns need a mask
        rows = hidden + tl.minimum(offs_n, N - 1).to(tl.int64)[:, None] * stride_xn

    peak = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)  # Σ exp2(x − peak)
    moment = tl.zeros([BLOCK_N], tl.float32)  # Σ exp2(x − peak)·(x − peak)
    square = tl.zeros([BLOCK_N], tl.float32)  # Σ exp2(x − peak)²
    logit_sum = tl.zeros([BLOCK_N], tl.float32)
    target_logit = tl.zeros([BLOCK_N], tl.float32)
    # Flattened with the loop over H, this is one pipeline: the next block's tiles are loaded while this one is summed.
    # Triton flattens a nest of two loops and no deeper one, which is why no third loop runs over items of work: the
    # hardware hands them out as programs, in the same order.
    for block in tl.range(first_block, last_block, flatten=FLATTEN):
        acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        if not DESCRIPTORS:
            words = tl.minimum(block * BLOCK_V + tl.arange(0, BLOCK_V), V - 1).to(tl.int64)
            columns = weight + words[None, :] * stride_wv
        for start_h in tl.range(0, H, BLOCK_H):
            if DESCRIPTORS:
                x = hidden.load([pid_n * BLOCK_N, start_h])
                w = weight.load([block * BLOCK_V, start_h]).T
            else:
                offs_h = start_h + tl.arange(0, BLOCK_H)
                x = tl.load(rows + offs_h[None, :] * stride_xh, mask=offs_h[None, :] < H, other=0.0)
                w = tl.load(columns + offs_h[:, None] * stride_wh, mask=offs_h[:, None] < H, other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")

        # A part at a time: what is made from all at once would not fit the registers beside the accumulator. Rows of
        # one block have no loop over H, and spill nowhere in halves.
        PARTS: tl.constexpr = 4 if BLOCK_V >= 256 and H > BLOCK_H else 2
        left, right = _halves(acc, BLOCK_N, BLOCK_V)
        for part in tl.static_range(PARTS):
            z = left if part < PARTS // 2 else right
            if PARTS == 4:
                first, second = _halves(z, BLOCK_N, BLOCK_V // 2)
                z = first if part % 2 == 0 else second
            offs_v = block * BLOCK_V + part * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
            mask_v = offs_v < V
            if bias_ptr is not None:
                z += tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)[None, :]
            if HAS_SOFTCAP:  # tanh; a logit needs no more than this one's absolute accuracy
                z = 1.0 - 2.0 / (1.0 + tl.exp2(z * inner))
            z *= outer
            target_logit += tl.sum(tl.where(offs_v[None, :] == target[:, None], z, 0.0), 1)
            if logit_sum_ptr is not None:
                logit_sum += tl.sum(tl.where(mask_v[None, :], z, 0.0), 1)
            z = tl.where(mask_v[None, :], z, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(z, 1))
            shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)  # −inf − (−inf) would be NaN
            decay = tl.exp2(peak - shift)
            z -= shift[:, None]
            weights = tl.exp2(z)
            if moment_ptr is not None:
                moved = tl.where(total > 0, total * (peak - shift), 0.0)
                moment = decay * (moment + moved) + tl.sum(tl.where(weights > 0, weights * z, 0.0), 1)
            if square_ptr is not None:
                square = square * decay * decay + tl.sum(weights * weights, 1)
            total = total * decay + tl.sum(weights, 1)
            peak = new_peak

    offs = split.to(tl.int64) * N + offs_n
    tl.store(peak_ptr + offs, peak, mask=mask_n)
    tl.store(total_ptr + offs, total, mask=mask_n)
    if moment_ptr is not None:
        tl.store(moment_ptr + offs, moment, mask=mask_n)
    if square_ptr is not None:
        tl.store(square_ptr + offs, square, mask=mask_n)
    if logit_sum_ptr is not None:
        tl.store(logit_sum_ptr + offs, logit_sum, mask=mask_n)
    owned = (target >= first_block * BLOCK_V) & (target < last_block * BLOCK_V)
    tl.store(target_logit_ptr + offs_n, target_logit, mask=mask_n & owned)


@triton.jit(do_not_specialize=["N", "V", "splits"])
def _merge_splits_kernel(
    targets_ptr,
    target_logit_ptr,
    peak_ptr,
    total_ptr,
    moment_ptr,
    square_ptr,
    logit_sum_ptr,
    logps_ptr,
    lse_ptr,
    entropy_ptr,
    mean_logit_ptr,
    is_top1_ptr,
    log_sum_sq_probs_ptr,
    N,
    V,
    splits,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    LN2: tl.constexpr = 0.6931471805599453
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    peak = tl.full([BLOCK_N], -float("inf"), tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < splits)[:, None] & mask_n[None, :]
        offs = offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        peak = tl.maximum(peak, tl.max(tl.load(peak_ptr + offs, mask=mask, other=-float("inf")), 0))

    total = tl.zeros([BLOCK_N], tl.float32)
    moment = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    logit_sum = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, splits, BLOCK_S):
        offs_s = start + tl.arange(0, BLOCK_S)
        mask = (offs_s < splits)[:, None] & mask_n[None, :]
        offs = offs_s.to(tl.int64)[:, None] * N + offs_n[None, :]
        distance = tl.load(peak_ptr + offs, mask=mask, other=-float("inf")) - peak[None, :]
        decay = tl.exp2(distance)
        part = tl.load(total_ptr + offs, mask=mask, other=0.0)
        total += tl.sum(part * decay, 0)
        if moment_ptr is not None:
            moved = tl.where(part > 0, part * distance, 0.0)
            moment += tl.sum((tl.load(moment_ptr + offs, mask=mask, other=0.0) + moved) * decay, 0)
        if square_ptr is not None:
            square += tl.sum(tl.load(square_ptr + offs, mask=mask, other=0.0) * decay * decay, 0)
        if logit_sum_ptr is not None:
            logit_sum += tl.sum(tl.load(logit_sum_ptr + offs, mask=mask, other=0.0), 0)

    target = tl.load(targets_ptr + offs_n, mask=mask_n, other=-1)
    valid = (target >= 0) & (target < V)
    target_logit = tl.load(target_logit_ptr + offs_n, mask=mask_n & valid, other=float("nan"))
    log_total = tl.log2(total)
    tl.store(logps_ptr + offs_n, (target_logit - peak - log_total) * LN2, mask=mask_n)
    tl.store(lse_ptr + offs_n, (peak + log_total) * LN2, mask=mask_n)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + offs_n, (log_total - moment / total) * LN2, mask=mask_n)
    if mean_logit_ptr is not None:
        tl.store(mean_logit_ptr + offs_n, logit_sum / V * LN2, mask=mask_n)
    if is_top1_ptr is not None:
        tl.store(is_top1_ptr + offs_n, ((target_logit >= peak) & (total == total)).to(tl.float32), mask=mask_n)
    if log_sum_sq_probs_ptr is not None:
        tl.store(log_sum_sq_probs_ptr + offs_n, (tl.log2(square) - 2.0 * log_total) * LN2, mask=mask_n)


def _device_limits(device: torch.device) -> tuple[int, int]:
    """Returns the number of multiprocessors and the bytes of L2 cache."""
    if device.type != "cuda":
        return _INTERPRETED_DEVICE
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size


@lru_cache(maxsize=4096)
def _blocks_per_split(row_blocks: int, vocabulary_blocks: int, multiprocessors: int) -> int:
    """Returns how many vocabulary blocks a split has: those with which the last multiprocessor is done first.

    A program costs its blocks and a quarter of one more, to start and to write. There are at least an eighth as many
    splits as multiprocessors, so that programs at work at one time need eight row blocks and not all of them.
    """

    def time(blocks: int) -> int:
        programs = row_blocks * triton.cdiv(vocabulary_blocks, blocks)
        return triton.cdiv(programs, multiprocessors) * (4 * blocks + 1)

    return min(range(max(1, 8 * vocabulary_blocks // multiprocessors), 0, -1), key=time)


def _group_size(row_blocks: int, bytes_per_row_block: int, l2_bytes: int) -> int:
    """Returns how many row blocks share the L2 cache: a quarter of it, as each half of a chip may hold a copy."""
    fitting = max(1, l2_bytes // 4 // bytes_per_row_block)
    return triton.cdiv(row_blocks, triton.cdiv(row_blocks, fitting))


def _rows_start_at(multiple: int, *matrices: Tensor) -> bool:
    """Whether rows are contiguous and apart, the first at a multiple of 16 bytes, the others `multiple` elements on."""
    return all(
        m.data_ptr() % 16 == 0 and m.stride(1) == 1 and m.stride(0) % multiple == 0 and m.stride(0) >= m.shape[1]
        for m in matrices
    )


def _launch(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H]
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    transform: LogitTransform,
    statistics: Mapping[str, Tensor],
    descriptors: bool,
    config: Config,
) -> tuple[Tensor, Tensor]:
    (num_rows, num_hidden), vocabulary = hidden.shape, weight.shape[0]
    config = dict(config)
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    multiprocessors, l2_bytes = _device_limits(hidden.device)
    row_blocks = triton.cdiv(num_rows, config["BLOCK_N"])
    vocabulary_blocks = triton.cdiv(vocabulary, config["BLOCK_V"])
    blocks_per_split = _blocks_per_split(row_blocks, vocabulary_blocks, multiprocessors)
    splits = triton.cdiv(vocabulary_blocks, blocks_per_split)
    bytes_per_row_block = config["BLOCK_N"] * num_hidden * hidden.element_size()

    def fp32(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=hidden.device)

    logps, lse, target_logit = fp32(num_rows), fp32(num_rows), fp32(num_rows)
    peak, total = fp32(splits, num_rows), fp32(splits, num_rows)
    moment, square, logit_sum = (
        fp32(splits, num_rows) if name in statistics else None for name in ("entropy", "log_sum_sq_probs", "mean_logit")
    )
    x, w = hidden, weight
    if descriptors:
        x = TensorDescriptor.from_tensor(hidden, [config["BLOCK_N"], config["BLOCK_H"]])
        w = TensorDescriptor.from_tensor(weight, [config["BLOCK_V"], config["BLOCK_H"]])
    with torch.cuda.device_of(hidden):  # Triton launches on the current device
        _linear_logps_fused_kernel[(row_blocks * splits,)](
            x,
            w,
            bias,
            targets,
            target_logit,
            peak,
            total,
            moment,
            square,
            logit_sum,
            num_rows,
            vocabulary,
            hidden.stride(0),
            hidden.stride(1),
            weight.stride(0),
            weight.stride(1),
            splits,
            blocks_per_split,
            _group_size(row_blocks, bytes_per_row_block, l2_bytes),
            2 * transform.inner * math.log2(math.e),
            transform.outer * math.log2(math.e),
            H=num_hidden,
            HAS_SOFTCAP=transform.softcap is not None,
            DESCRIPTORS=descriptors,
            **config,
            **options,
        )
        _merge_splits_kernel[(triton.cdiv(num_rows, _MERGED_ROWS),)](
            targets,
            target_logit,
            peak,
            total,
            moment,
            square,
            logit_sum,
            logps,
            lse,
            **{f"{name}_ptr": statistics.get(name) for name in STATISTICS},
            N=num_rows,
            V=vocabulary,
            splits=splits,
            BLOCK_N=_MERGED_ROWS,
            BLOCK_S=_MERGED_SPLITS,
        )
    return logps, lse


def linear_logps_fused(
    hidden: Tensor,  # [N, H]
    weight: Tensor,  # [V, H], in hidden's dtype
    targets: Tensor,  # int64 [N]
    bias: Tensor | None,  # [V]
    *,
    transform: LogitTransform,
    statistics: Mapping[str, Tensor],  # name → fp32 [N] to fill
) -> tuple[Tensor, Tensor]:
    """Returns the log-prob of every target and the log-sum-exp of every row in nat, fp32 [N] each.

    The number of splits follows from N, V and the device, so equal inputs give bitwise equal results. A target outside
    [0, V) gives NaN, and so does NaN in hidden. A bias of −inf takes a word out of the vocabulary.

    Args:
        hidden: bf16, fp16 or fp32, any strides. Rows that begin at multiples of 16 bytes are fastest.
        weight: the LM head, likewise.
        targets: int64 [N].
        bias: bias of the head, any of the dtypes; None for none.
        transform: scale, softcap and temperature of the logits.
        statistics: what else to compute, any of `STATISTICS`: "entropy" in nat, "mean_logit" over the vocabulary,
            "is_top1" (1 where no logit is larger than the target's, else 0), "log_sum_sq_probs", log Σ_v p_v².

    Raises:
        ValueError: `statistics` has a name that is not in `STATISTICS`.
    """
    check_statistics(statistics)
    for name, tensor in statistics.items():
        assert tensor.dtype == torch.float32 and tensor.is_contiguous() and tensor.shape == targets.shape, name
    if hidden.shape[0] == 0:
        return tuple(torch.empty(0, dtype=torch.float32, device=hidden.device) for _ in range(2))

    bias, targets = None if bias is None else bias.contiguous(), targets.contiguous()
    half = hidden.element_size() == 2
    descriptors = half and major_capability(hidden.device) >= 9 and _rows_start_at(8, hidden, weight)
    # Without descriptors, Triton loads 16 bytes at a time only where strides are multiples of 16 elements.
    aligned = descriptors or (half and _rows_start_at(16, hidden, weight))
    config = pick_config(
        "linear_logps_fused",
        (hidden.dtype, hidden.shape[1], weight.shape[0], aligned),
        _CONFIGS if aligned else _SMALL_CONFIGS,
        _CANDIDATES if aligned else _SMALL_CANDIDATES,
        hidden.device,
        lambda config: _launch(hidden, weight, targets, bias, transform, {}, descriptors, config),
    )
    return _launch(hidden, weight, targets, bias, transform, statistics, descriptors, config)
