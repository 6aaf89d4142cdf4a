"""A head whose vocabulary is shared out over ranks: what every rank finds is what the whole head finds.

Values, the gradient of hidden and this rank's rows of the weight's and the bias's gradient equal the whole head's
within 1e-5 of its largest entry, in fp32. They have the same bits on all ranks and again. Collectives are as few as
promised.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.distributed as dist
from test_linear_preference import TILE, TRAINS, TRANSFORMS, H, Problem, V, dpo
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from dpo_fast_kernels import SequenceLoss, VocabularyShards, linear_logps, linear_preference_loss
from dpo_fast_kernels.head import tiles
from dpo_fast_kernels.head.logits import STATISTICS, LogitTransform
from looking_inside import LargestTensor
from numerics import assert_close_to_truth

TOLERANCE = 1e-5  # of the largest entry
TRANSFORMS = {**TRANSFORMS, "negative": LogitTransform(scale=-0.8)}
UNEVEN = {2: (300, 207), 4: (1, 199, 8, 299)}
OWN = ("d weight", "d bias")  # gradients that are a rank's own
# Keeps D of some tiles only; the group of 111 rows must be split, for the largest shard, and need not for the others.
PART = 111_000
ROWS = 29  # of a tile of `linear_logps`, which need not hold whole groups


def assert_close(actual: Tensor, whole: Tensor, name: str, part: slice | None = None) -> None:
    expected = whole if part is None else whole[part]
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    error, largest = ((x.abs().max().item() if x.numel() else 0.0) for x in (actual - expected, whole))
    assert error <= TOLERANCE * largest, f"{name}: off by {error:.3e}, largest {largest:.3e}, rank {dist.get_rank()}"


def shard_of(problem: Problem, shards: VocabularyShards) -> slice:
    """Leaves this rank's words in the problem; returns which they are."""
    rank = shards.group.rank()
    words = slice(shards.starts[rank], shards.starts[rank] + shards.sizes[rank])
    problem.weight = problem.weight[words].clone()
    problem.bias = None if problem.bias is None else problem.bias[words].clone()
    return words


def logps_outside(problem: Problem, **options) -> Callable:
    """The problem solved by a loss of token log-probs."""

    def token_logps(hidden, weight, bias):
        return linear_logps(hidden, weight, problem.targets, bias, **options).logps

    return problem.outside(token_logps)


def assert_same_on_all_ranks(values: dict[str, Tensor], what: str) -> None:
    for name, value in values.items():
        others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
        dist.all_gather(others, value.contiguous())
        assert all(torch.equal(value, other) for other in others), f"{what}: {name} differs between ranks"


def check_solutions(
    sizes: tuple[int, ...], solve: Callable, what: str, trains=TRAINS["all"], **problem_options
) -> None:
    """Compares `solve(problem, **options)` on shards with the whole head, and with itself."""
    problem = Problem(**problem_options)
    whole = problem.solve(solve(problem), trains=trains)
    shards = VocabularyShards(sizes, dist.group.WORLD)
    words = shard_of(problem, shards)
    found, again = (problem.solve(solve(problem, shards=shards), trains=trains) for _ in range(2))
    assert found.keys() == whole.keys(), what
    for name in found:
        assert_close(found[name], whole[name], f"{what}: {name}", words if name in OWN else None)
        assert torch.equal(found[name], again[name]), f"{what}: {name} differs between runs"
    assert_same_on_all_ranks({k: v for k, v in found.items() if k not in OWN}, what)


def strategies(options: dict, budgets: tuple[int, ...] = (0, PART, 2**31)) -> dict[str, Callable]:
    """Ways to solve a problem: loss inside or outside, D kept or made again, groups whole or split."""
    found = {}
    for budget in budgets:
        found[f"loss inside, {budget} bytes"] = partial(Problem.ours, budget_bytes=budget, **options)
        found[f"loss outside, {budget} bytes"] = partial(logps_outside, budget_bytes=budget, **options)
    return found


def check_transforms_and_strategies(world: int) -> None:
    for name, transform in TRANSFORMS.items():
        for way, solve in strategies({"transform": transform}).items():
            check_solutions(UNEVEN[world], solve, f"{name}, {way}", biased=name != "plain")


def check_what_trains(world: int) -> None:
    for name, trains in TRAINS.items():
        for way, solve in strategies({"transform": TRANSFORMS["scaled"]}, budgets=(0, 2**31)).items():
            check_solutions(UNEVEN[world], solve, f"{name} trains, {way}", trains=trains)


def check_sizes(world: int) -> None:
    """Vocabularies that do not divide, as DTensor cuts them, down to one word a rank; a large and a peaked head."""
    for v in (world, 2 * world - 1, V):
        sizes = VocabularyShards.even(v, dist.group.WORLD).sizes
        assert sum(sizes) == v and len(sizes) == world
        for way, solve in strategies({}, budgets=(0,)).items():
            check_solutions(sizes, solve, f"{v} words, {way}", v=v)
    peaked = {"transform": LogitTransform(scale=6.0)}
    for way, solve in strategies(peaked, budgets=(PART,)).items():
        check_solutions(UNEVEN[world], solve, f"peaked, {way}")


def check_statistics(world: int) -> None:
    for (name, transform), biased, trains in (
        (item, biased, trains) for item in TRANSFORMS.items() for biased in (False, True) for trains in (False, True)
    ):
        problem = Problem(biased=biased)
        logits = transform(torch.nn.functional.linear(problem.hidden, problem.weight, problem.bias))
        problem.targets[::3] = logits.argmax(-1)[::3]  # random targets are hardly ever the most likely token
        problem.hidden.requires_grad_(trains)

        def rows_of(problem, **options):
            arguments = (problem.hidden, problem.weight, problem.targets, problem.bias)
            options = {**options, "cu_scores": problem.layout.cu_scores}
            return linear_logps(*arguments, transform=transform, statistics=STATISTICS, **options)  # noqa: B023

        whole = rows_of(problem)
        assert 0 < whole.is_top1.float().mean() < 1
        shards = VocabularyShards(UNEVEN[world], dist.group.WORLD)
        shard_of(problem, shards)
        found = rows_of(problem, shards=shards)
        inside = linear_preference_loss(
            problem.hidden, problem.weight, problem.targets, problem.layout, torch.sum, (), problem.bias,
            transform=transform, statistics=STATISTICS, shards=shards,
        ).rows  # fmt: skip
        for field in found._fields:
            expected = getattr(whole, field)
            for actual in (getattr(found, field), getattr(inside, field)):
                if field == "is_top1":
                    assert torch.equal(actual, expected), f"{name}: is_top1"
                else:
                    assert_close(actual.detach(), expected.detach(), f"{name}: {field}")
        assert_same_on_all_ranks({k: v.detach() for k, v in found._asdict().items() if k != "is_top1"}, name)


def check_masked_shard(world: int) -> None:
    """A bias of −inf takes all words of the last rank out of the vocabulary."""
    shards = VocabularyShards(UNEVEN[world], dist.group.WORLD)
    problem = Problem()
    problem.bias[shards.starts[-1] :] = -torch.inf
    problem.targets %= shards.starts[-1]
    options = {"statistics": [name for name in STATISTICS if name != "mean_logit"]}
    whole = linear_logps(problem.hidden, problem.weight, problem.targets, problem.bias, **options)
    shard_of(problem, shards)
    options["shards"] = shards
    found = linear_logps(problem.hidden, problem.weight, problem.targets, problem.bias, **options)
    for name in ("logps", "entropy", "log_sum_sq_probs"):
        assert_close(getattr(found, name), getattr(whole, name), name)
    solution = problem.solve(problem.ours(shards=shards))
    assert all(torch.isfinite(value).all() for value in solution.values())
    if dist.get_rank() == world - 1:
        assert torch.count_nonzero(solution["d weight"]) == 0


def placed(problem: Problem, mesh: DeviceMesh | None = None) -> VocabularyShards:
    """Makes the problem's weight and bias DTensors, on a mesh of all ranks by default; returns their shards."""
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    problem.weight, problem.bias = (distribute_tensor(x, mesh, [Shard(0)]) for x in (problem.weight, problem.bias))
    return VocabularyShards.of(problem.weight)


def whole_gradients(solution: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in OWN:
        assert isinstance(solution[name], DTensor) and tuple(solution[name].placements) == (Shard(0),), name
    return {name: value.full_tensor() if name in OWN else value for name, value in solution.items()}


def check_dtensor(world: int) -> None:
    """A weight in Shard(0): gradients come back placed as it is. On four ranks also two pairs that know nothing of each
    other, as where data are parallel beside the vocabulary."""
    whole = Problem()
    solution = whole.solve(whole.ours())
    pair = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "vocabulary"))["vocabulary"]
    for mesh in (pair, None):
        problem = Problem()
        shards = placed(problem, mesh)
        assert shards.vocabulary == V and len(shards.sizes) == (2 if mesh else world)
        for way in (Problem.ours, logps_outside):
            for name, value in whole_gradients(problem.solve(way(problem, shards=shards))).items():
                assert_close(value, solution[name], f"DTensor: {name}")
    with pytest.raises(ValueError, match="^weight must not be a DTensor without shards"):
        problem.ours()(problem.hidden, problem.weight, problem.bias)
    with pytest.raises(ValueError, match="^weight must be a DTensor in Shard"):
        VocabularyShards.of(distribute_tensor(whole.weight, problem.weight.device_mesh, [Replicate()]))
    with pytest.raises(ValueError, match=r"^shards must be VocabularyShards\.of\(weight\)"):
        other = VocabularyShards(UNEVEN[world], dist.group.WORLD)
        linear_logps(problem.hidden, problem.weight, problem.targets, shards=other)


def check_bf16(world: int) -> None:
    """By the project's tolerance: at most twice as far from float64 as eager PyTorch with the whole head."""
    problem, transform = Problem(torch.bfloat16), TRANSFORMS["capped"]
    usual = problem.solve(problem.eager(transform))
    true = problem.solve(problem.truth(transform), dtype=torch.float64)
    shards = placed(problem)
    for way, solve in strategies({"transform": transform}).items():
        for name, value in whole_gradients(problem.solve(solve(problem, shards=shards))).items():
            assert_close_to_truth(value, usual[name], true[name], f"{way}: {name}")


class Collectives(LargestTensor):
    """Counts collectives, in ops and outside, whoever calls them."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.count[function.name().removeprefix("c10d::").rstrip("_")] += 1
        return super().__torch_dispatch__(function, types, args, kwargs)


def check_collectives(world: int) -> None:
    """One all-gather a tile, also where a backward makes D again, and one all-reduce where hidden trains."""
    shards = VocabularyShards(UNEVEN[world], dist.group.WORLD)
    problem = Problem(groups=[(11, 9)] * 6)  # 120 rows: three tiles of two groups, or five tiles of 29 rows
    shard_of(problem, shards)
    for tiles.CPU_GROUP_ROWS, tiles.CPU_ROWS, inside, outside in ((10_000, 10_000, 1, 1), (TILE, ROWS, 3, 5)):
        for budget, trains in ((0, "all"), (0, "frozen"), (2**31, "all"), (2**31, "weight")):
            options = {"shards": shards, "budget_bytes": budget}
            for tiles_taken, solve in ((inside, problem.ours(**options)), (outside, logps_outside(problem, **options))):
                with Collectives() as seen:
                    problem.solve(solve, trains=TRAINS[trains])
                assert seen.count == Counter(allgather=tiles_taken, allreduce=int(trains != "weight")), (budget, trains)
        with Collectives() as seen, torch.no_grad():
            linear_logps(problem.hidden, problem.weight, problem.targets, statistics=STATISTICS, shards=shards)
        assert seen.count == Counter(allgather=outside)
    assert seen.elements < 120 * V, "logits were gathered, or the whole of them made"


def check_edges(world: int) -> None:
    """No rows at all, targets outside the vocabulary, shards of another size."""
    shards = VocabularyShards(UNEVEN[world], dist.group.WORLD)
    problem = Problem(groups=[])
    words = shard_of(problem, shards)
    weight, hidden = problem.weight.requires_grad_(), problem.hidden.requires_grad_()
    linear_logps(hidden, weight, problem.targets, shards=shards).logps.sum().backward()
    assert torch.count_nonzero(weight.grad) == 0 and hidden.grad.shape == (0, H)
    with pytest.raises(ValueError, match=rf"^targets must lie in \[0, {V}\)"):
        linear_logps(torch.zeros(1, H), weight, torch.tensor([V]), shards=shards)
    with pytest.raises(ValueError, match=rf"^weight must have the {words.stop - words.start} rows that shards gives"):
        linear_logps(torch.zeros(1, H), torch.zeros(V + 1, H), torch.tensor([0]), shards=shards)
    with pytest.raises(ValueError, match="^sizes must have one entry for each of the"):
        VocabularyShards((V,) * (world + 1), dist.group.WORLD)
    with pytest.raises(ValueError, match="^sizes must be 1 or more on every rank"):
        VocabularyShards.even(world - 1, dist.group.WORLD)
    with pytest.raises(ValueError, match="^weight must be a DTensor in Shard"):
        VocabularyShards.of(problem.weight)


CHECKS = (
    check_transforms_and_strategies,
    check_what_trains,
    check_sizes,
    check_statistics,
    check_masked_shard,
    check_dtensor,
    check_bf16,
    check_collectives,
    check_edges,
)


def start(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    tiles.CPU_GROUP_ROWS, tiles.CPU_ROWS = TILE, ROWS
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)


def on_a_rank(rank: int, world: int, rendezvous: str) -> None:
    start(rank, world, rendezvous)
    for check in CHECKS:
        check(world)
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_find_what_the_whole_head_finds(world, tmp_path):
    torch.multiprocessing.spawn(on_a_rank, (world, str(tmp_path / "rendezvous")), nprocs=world)


def on_a_rank_compiled(rank: int, world: int, rendezvous: str) -> None:
    start(rank, world, rendezvous)
    loss = SequenceLoss(dpo)
    for solve in (partial(Problem.ours, loss=loss), logps_outside):

        def compiled(problem, solve=solve, **options):
            torch._dynamo.reset()
            return torch.compile(solve(problem, **options), backend="aot_eager", fullgraph=True)

        check_solutions(UNEVEN[world], compiled, "compiled")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_compiled_step_has_no_break(tmp_path):
    torch.multiprocessing.spawn(on_a_rank_compiled, (2, str(tmp_path / "rendezvous")), nprocs=2)


def test_one_process_may_hold_all_words():
    problem = Problem()
    whole, found = (problem.solve(problem.ours(**options)) for options in ({}, {"shards": VocabularyShards((V,))}))
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    with pytest.raises(ValueError, match="^weight must have the 8 rows that shards gives this rank"):
        problem.ours(shards=VocabularyShards((8,)))(problem.hidden, problem.weight, problem.bias)


def on_a_rank_with_triton(rank: int, world: int, rendezvous: str) -> None:
    start(rank, world, rendezvous)
    assert os.environ["TRITON_INTERPRET"] == "1"
    problem_options = {"groups": [(1, 2), (3, 4)], "h": 3, "v": 37}
    options = {"transform": TRANSFORMS["capped"], "backend": "triton", "budget_bytes": 0}
    check_solutions((30, 7), partial(Problem.ours, **options), "triton, loss inside", **problem_options)
    check_solutions((30, 7), partial(logps_outside, **options), "triton, loss outside", **problem_options)
    with pytest.raises(ValueError, match="^backend must be 'auto', 'torch' or 'triton' with shards"):
        linear_logps(
            torch.zeros(1, 3), torch.zeros((30, 7)[rank], 3), torch.tensor([0]),
            backend="fused", shards=VocabularyShards((30, 7), dist.group.WORLD),
        )  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


def test_triton_kernels_interpreted(tmp_path, monkeypatch):
    """Shards on which a target lies and on which it does not."""
    pytest.importorskip("triton", reason="Triton does not exist on this platform")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    torch.multiprocessing.spawn(on_a_rank_with_triton, (2, str(tmp_path / "rendezvous")), nprocs=2)
