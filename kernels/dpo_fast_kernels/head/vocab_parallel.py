"""The LM head with its vocabulary shared out over the ranks of a process group: tensor parallel.

Rank r holds V_r words of the V, rows of W and entries of b, and makes their logits. All ranks have the same hidden rows
and targets. What the work on rows finds on a shard, marked r, combines in the order of ranks, to equal bits on all:

    lse = logΣ_r e^{lse_r}        logp = logp_o + lse_o − lse,  o the rank of the target        w_r = e^{lse_r − lse}
    entropy = Σ_r w_r·(entropy_r + lse − lse_r)        logΣp² = logΣ_r w_r²·(Σp²)_r        mean = Σ_r V_r/V·mean_r

With lse and logp of the whole, a shard's columns of D are what they always are. dW and db of a shard are its rank's
own; dX = Σ_r g ⊙ (D_r·W_r).

Collectives of a call, the same on every rank, none of them with logits:

    all-gather, [2 + number of statistics, rows] fp32 a rank (one more for is_top1)    one a tile of logits
    all-reduce, dX [N, H] in fp32, added in the backend's order, which is fixed        one, if hidden needs a gradient

A backward that makes tiles again knows lse and gathers nothing. The tiles of all ranks are those of the largest shard.
N rows, H hidden, V vocabulary, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from dpo_fast_kernels.head.logits import LogitTransform

_PEAK_ROWS = 128  # rows whose sum with the bias is held at a time


@dataclass(frozen=True)
class VocabularyShards:
    """How the words of a head lie on the ranks of a process group, one after another in the order of ranks.

    Attributes:
        sizes: how many words each rank holds.
        group: the process group; None where one process holds all words.

    Raises:
        ValueError: a rank holds no word, or `sizes` and `group` differ in the number of ranks.
    """

    sizes: tuple[int, ...]
    group: dist.ProcessGroup | None = None

    def __post_init__(self):
        ranks = 1 if self.group is None else self.group.size()
        if len(self.sizes) != ranks:
            raise ValueError(f"sizes must have one entry for each of the {ranks} ranks of group, got {self.sizes}")
        if self.group is not None and min(self.sizes) < 1:
            raise ValueError(f"sizes must be 1 or more on every rank, got {self.sizes}; use a smaller group")

    @classmethod
    def even(cls, vocabulary: int, group: dist.ProcessGroup) -> VocabularyShards:
        """Returns the shards that `torch.chunk` and DTensor's Shard(0) make: equal, the last ones smaller."""
        step = -(-vocabulary // group.size())
        return cls(tuple(min(step, max(0, vocabulary - step * r)) for r in range(group.size())), group)

    @classmethod
    def of(cls, weight: Tensor) -> VocabularyShards:
        """Returns the shards of a DTensor weight, [V, H] in Shard(0) on a mesh of one dimension.

        It cannot tell whose shards they are. FSDP places weights in the same way over ranks that have different hidden
        rows; there the weight has to be gathered, as inside the root module's forward.

        Raises:
            ValueError: the weight is no DTensor, or placed otherwise.
        """
        from torch.distributed.tensor import DTensor, Shard

        if not isinstance(weight, DTensor) or tuple(weight.placements) != (Shard(0),):
            found = weight.placements if isinstance(weight, DTensor) else f"a {type(weight).__name__}"
            raise ValueError(
                f"weight must be a DTensor in Shard(0) on a mesh of one dimension, got {found}; for a plain shard give "
                "VocabularyShards the sizes and the group"
            )
        return cls.even(weight.shape[0], weight.device_mesh.get_group())

    @classmethod
    def named(cls, group: str | None, sizes: Sequence[int] | None, weight: Tensor) -> VocabularyShards:
        """Returns what `arguments` says, inside an op; where it says nothing, that the weight is whole."""
        if group is None:
            return cls((weight.shape[0],))
        return cls(tuple(sizes), dist.distributed_c10d._resolve_process_group(group))

    @property
    def arguments(self) -> tuple[str | None, list[int] | None]:
        """Group and sizes as an op of `torch.library` takes them, for `named`."""
        return (None, None) if self.group is None else (self.group.group_name, list(self.sizes))

    @property
    def vocabulary(self) -> int:
        return sum(self.sizes)

    @property
    def largest(self) -> int:
        return max(self.sizes)

    @property
    def starts(self) -> tuple[int, ...]:
        """The first word of every rank."""
        return tuple(accumulate(self.sizes[:-1], initial=0))

    def owners(self, targets: Tensor) -> Tensor:
        """Returns the rank that holds each target, without asking or telling the device anything."""
        return sum(((targets >= start).long() for start in self.starts[1:]), torch.zeros_like(targets))

    def row_operations(self, row_ops: ModuleType) -> ModuleType | ShardedRows:
        """Returns row operations that take a shard's logits and say what the whole rows say."""
        return row_ops if self.group is None else ShardedRows(row_ops, self)

    def part_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Returns what a rank's part of dX is held in: it is rounded once, when the parts are summed."""
        return dtype if self.group is None else torch.promote_types(dtype, torch.float32)

    def add_up_(self, dhidden: Tensor) -> Tensor:
        """Sums over the ranks, in place."""
        if self.group is not None:
            dist.all_reduce(dhidden, group=self.group)
        return dhidden


class ShardedRows:
    """The functions of `row_logps` on a tile of one shard's logits; targets and results are the whole vocabulary's."""

    def __init__(self, row_ops: ModuleType, shards: VocabularyShards):
        self._row_ops, self._shards = row_ops, shards
        self._rank = shards.group.rank()
        self.sequence_sums = row_ops.sequence_sums

    def row_logps_fwd(
        self,
        z: Tensor,  # [N, V_r]
        targets: Tensor,  # int64 [N]
        bias: Tensor | None,  # [V_r]
        *,
        transform: LogitTransform,
        statistics: Mapping[str, Tensor],  # fp32 [N] each, filled in
    ) -> tuple[Tensor, Tensor]:  # log-probs fp32 [N], log-sum-exp fp32 [N]
        own = self._own(targets).clamp(0, z.shape[1] - 1)  # where the target is another rank's, any word will do
        logps, lse = self._row_ops.row_logps_fwd(z, own, bias, transform=transform, statistics=statistics)
        if z.shape[0] == 0:
            return logps, lse
        if "mean_logit" in statistics:
            statistics["mean_logit"].mul_(z.shape[1] / self._shards.vocabulary)
        found = {"logps": logps, "lse": lse, **statistics}
        if "is_top1" in statistics:
            found["peak"] = _peak(z, bias, transform)
        return self._combine(found, targets, statistics)

    def _combine(
        self,
        found: Mapping[str, Tensor],  # [N] each, of this shard
        targets: Tensor,  # int64 [N]
        statistics: Mapping[str, Tensor],  # [N] each, filled in
    ) -> tuple[Tensor, Tensor]:
        gathered = self._gather(torch.stack(list(found.values())))
        shard = dict(zip(found, gathered.unbind(1), strict=True))  # [R, N] each
        owners = self._shards.owners(targets)[None]

        def owned(values: Tensor) -> Tensor:
            return values.gather(0, owners)[0]

        top = shard["lse"].amax(0)
        rest = (shard["lse"] - top).exp().sum(0).log()
        lse = top + rest
        logps = owned(shard["logps"]) + (owned(shard["lse"]) - top) - rest
        known = (targets >= 0) & (targets < self._shards.vocabulary)
        logps = torch.where(known, logps, torch.nan)  # as in `row_logps`; on a CPU they were refused before

        log_share = shard["lse"] - lse
        share = log_share.exp()
        masked = shard["lse"] == -torch.inf  # all words of the shard are: it has no distribution
        if "entropy" in statistics:
            parts = torch.where(masked, 0, share * (shard["entropy"] - log_share))
            torch.sum(parts, 0, out=statistics["entropy"])
        if "mean_logit" in statistics:
            torch.sum(shard["mean_logit"], 0, out=statistics["mean_logit"])
        if "is_top1" in statistics:  # the owner says whether the target is the shard's peak, which it then equals
            top1 = (owned(shard["is_top1"]) > 0) & (owned(shard["peak"]) >= shard["peak"].amax(0))
            statistics["is_top1"].copy_(top1)
        if "log_sum_sq_probs" in statistics:
            parts = torch.where(masked, -torch.inf, shard["log_sum_sq_probs"] + 2 * log_share)
            torch.logsumexp(parts, 0, out=statistics["log_sum_sq_probs"])
        return logps, lse

    def _gather(self, values: Tensor) -> Tensor:
        """Returns every rank's `values` [F, N], [R, F, N]."""
        gathered = values.new_empty(len(self._shards.sizes), *values.shape)
        dist.all_gather(list(gathered), values, group=self._shards.group)
        return gathered

    def row_logps_bwd(
        self,
        z: Tensor,  # [N, V_r]
        targets: Tensor,  # int64 [N]
        bias: Tensor | None,  # [V_r]
        logps: Tensor,  # fp32 [N]
        lse: Tensor,  # fp32 [N]
        *,
        transform: LogitTransform,
        out: Tensor,  # [N, V_r], may be z
    ) -> None:
        """Writes this shard's columns of D to `out`; spoils z."""
        own = self._own(targets)
        own = torch.where((own >= 0) & (own < z.shape[1]), own, -1)
        self._row_ops.row_logps_bwd(z, own, bias, logps, lse, transform=transform, out=out)

    def row_logps_fwd_bwd(
        self,
        z: Tensor,  # [N, V_r]
        targets: Tensor,  # int64 [N]
        bias: Tensor | None,  # [V_r]
        *,
        transform: LogitTransform,
        statistics: Mapping[str, Tensor],
        out: Tensor,  # [N, V_r], may be z
    ) -> Tensor:
        """Both of the above; returns the log-probs."""
        logps, lse = self.row_logps_fwd(z, targets, bias, transform=transform, statistics=statistics)
        self.row_logps_bwd(z, targets, bias, logps, lse, transform=transform, out=out)
        return logps

    def _own(self, targets: Tensor) -> Tensor:
        """Returns the targets counted from this shard's first word."""
        return targets - self._shards.starts[self._rank]


def _peak(z: Tensor, bias: Tensor | None, transform: LogitTransform) -> Tensor:
    """Returns the largest logit of each row: logits rise with z, or fall with it."""
    highest = torch.amax if transform.scale > 0 else torch.amin
    if bias is None:
        return transform(highest(z, 1))
    return transform(torch.cat([highest(rows + bias, 1) for rows in z.split(_PEAK_ROWS)]))


def local_head(
    weight: Tensor,  # [V, H] DTensor, or [V_r, H]
    bias: Tensor | None,  # [V] DTensor, or [V_r]
    shards: VocabularyShards | None,
) -> tuple[Tensor, Tensor | None]:
    """Returns this rank's part of a head, differentiable; a head that is whole, as it is.

    Raises:
        ValueError: a DTensor without `shards`, placed otherwise than they say, or a shard of another size.
    """
    if shards is None:
        if hasattr(weight, "to_local"):
            raise ValueError(
                "weight must not be a DTensor without shards: pass shards=VocabularyShards.of(weight) where all ranks "
                "of its mesh have the same hidden rows (tensor parallel), otherwise weight.full_tensor()"
            )
        return weight, bias
    if hasattr(weight, "to_local"):
        if VocabularyShards.of(weight).sizes != shards.sizes:
            raise ValueError(f"shards must be VocabularyShards.of(weight), got sizes {shards.sizes}")
        weight = weight.to_local()
    size = shards.sizes[0 if shards.group is None else shards.group.rank()]
    if weight.ndim == 2 and weight.shape[0] != size:
        raise ValueError(f"weight must have the {size} rows that shards gives this rank, got {tuple(weight.shape)}")
    return weight, bias.to_local() if hasattr(bias, "to_local") else bias
