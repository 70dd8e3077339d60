"""Closed forms against two players of the same programs: one that knows no contention, and the simulator."""

import math
from collections import defaultdict
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms
from windtunnel.collectives.costs import overhead_seconds, priced, seconds
from windtunnel.collectives.program import Algorithm, Program, Send
from windtunnel.collectives.tiers import Tier
from windtunnel.sim.program import play
from windtunnel.sim.topology import of_tiers

ROUNDING = 1e-9
"""Relative: sums of up to some thousand floats in different orders."""


def one_tier(latency_s: float, bytes_per_s: float) -> list[Tier]:
    return [Tier(name="switch", ranks=64, latency_s=latency_s, bytes_per_s=bytes_per_s)]


def followed(programs: Sequence[Program], chunk_bytes: float, tier: Tier) -> float:
    """Seconds of programs on one tier where nobody is in anybody's way.

    All that a rank sends in a step leaves together. The step ends when it has left and what is awaited has arrived,
    a latency after it left its sender; messages from one rank to another come in order.
    """
    now, done = [0.0] * len(programs), [0] * len(programs)
    arrivals: dict[tuple[int, int], list[float]] = defaultdict(list)
    posted: set[tuple[int, int]] = set()
    moved = True
    while moved:
        moved = False
        for rank, program in enumerate(programs):
            while done[rank] < len(program):
                step = program[done[rank]]
                sends = [op for op in step if isinstance(op, Send)]
                left = now[rank] + sum(op.count for op in sends) * chunk_bytes / tier.bytes_per_s
                if (rank, done[rank]) not in posted:
                    posted.add((rank, done[rank]))
                    moved = True
                    for op in sends:
                        arrivals[rank, op.peer].append(left + tier.latency_s)
                awaited = [op.peer for op in step if not isinstance(op, Send)]
                if any(len(arrivals[peer, rank]) < awaited.count(peer) for peer in awaited):
                    break
                came = [arrivals[peer, rank].pop(0) for peer in awaited]
                now[rank], done[rank], moved = max([left, *came]), done[rank] + 1, True
    assert all(steps == len(program) for steps, program in zip(done, programs, strict=True))
    return max(now)


def power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


def exact(used: Algorithm, sizes: Sequence[int]) -> bool:
    """Whether the closed form claims to be exact on one tier: always, or for powers of two (of a world, of a grid)."""
    family, *options = used.name.split("/")
    if used.kind == "all_to_all" and family != "direct":
        return all(size % 2 == 0 for size in sizes)
    match family:
        case "ring" | "bidirectional_ring" | "chain" | "direct":
            return True
        case "halving_doubling" | "recursive_doubling" | "binomial_tree":
            return used.kind == "broadcast" or all(map(power_of_two, sizes))
        case "hierarchical":
            return len(options) == 1 and (used.kind != "reduce" or all(map(power_of_two, sizes)))
        case _:
            return False


def sizes_of(used: Algorithm, world: int) -> list[int]:
    family, *options = used.name.split("/")
    return list(map(int, options[0].split("x"))) if family == "hierarchical" else [world]


def check(used: Algorithm, world: int, nbytes: float, tiers: Sequence[Tier], taken_s: float, is_exact: bool) -> None:
    price = seconds(used.kind, used.name, nbytes, world, tiers)
    if is_exact:
        assert price == pytest.approx(taken_s, rel=ROUNDING, abs=1e-300), used
    else:
        assert price >= taken_s * (1 - ROUNDING), used


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(
    world=st.integers(1, 17), nbytes=st.floats(0, 1e9), latency_s=st.floats(0, 1e-3), bytes_per_s=st.floats(1e6, 1e12)
)
def test_one_tier_without_contention(
    kind: str, world: int, nbytes: float, latency_s: float, bytes_per_s: float
) -> None:
    tiers = one_tier(latency_s, bytes_per_s)
    for used in algorithms(kind, world):
        chunk_bytes = nbytes / math.prod(used.cut(world))
        taken_s = followed(used.programs(world), chunk_bytes, tiers[0])
        check(used, world, nbytes, tiers, taken_s, exact(used, sizes_of(used, world)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("latency_s", [0.0, 0.3, 5.0])
def test_one_tier_with_contention(kind: str, latency_s: float) -> None:
    # Where ranks that are a step ahead get in others' way, the closed form is still an upper bound.
    for world in (2, 3, 5, 8, 11, 12, 16, 17):
        for used in algorithms(kind, world):
            taken_s = play(used, world, 48.0, of_tiers(one_tier(latency_s, 1.0)))
            sure = exact(used, sizes_of(used, world))
            check(used, world, 48.0, one_tier(latency_s, 1.0), taken_s, sure)


def tiers_of(grid: Sequence[int], latencies_s: Sequence[float], rates: Sequence[float]) -> list[Tier]:
    ranks = [math.prod(grid[: level + 1]) for level in range(len(grid))]
    return [
        Tier(name=f"tier {level}", ranks=joined, latency_s=latency_s, bytes_per_s=rate)
        for level, (joined, latency_s, rate) in enumerate(zip(ranks, latencies_s, rates, strict=True))
    ]


ON_POWERS_OF_TWO = {
    "chain",
    "direct",
    "recursive_doubling",
    "binomial_tree",
    "ring",
    "hierarchical",
    "halving_doubling",
}
SPEEDS = [
    ((1.0, 3.0, 4.0), (5.0, 1.0, 0.7)),
    ((3.0, 1.0, 0.1), (0.5, 6.0, 9.0)),
    ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
]


@pytest.mark.parametrize("speeds", SPEEDS)
@pytest.mark.parametrize("grid", [(2, 2), (4, 2), (2, 8), (4, 4), (2, 2, 2), (2, 4, 2)])
def test_tiers_that_are_powers_of_two(grid: tuple[int, ...], speeds: tuple[Sequence[float], Sequence[float]]) -> None:
    world = math.prod(grid)
    tiers = tiers_of(grid, speeds[0][: len(grid)], speeds[1][: len(grid)])
    own_grid = "hierarchical/" + "x".join(map(str, grid))
    for kind in KINDS:
        for used in algorithms(kind, world):
            family = used.name.partition("/")[0]
            sure = exact(used, sizes_of(used, world)) and family in ON_POWERS_OF_TWO
            sure &= family != "hierarchical" or used.name == own_grid
            sure &= family != "ring" or len(grid) == 2
            sure &= (family, kind) != ("halving_doubling", "broadcast")
            sure &= kind != "all_to_all" or family == "direct"
            check(used, world, 48.0, tiers, play(used, world, 48.0, of_tiers(tiers)), sure)


@pytest.mark.parametrize("grid", [(3, 2), (2, 3), (3, 4), (6, 2), (5, 3)])
def test_tiers_that_the_group_fills(grid: tuple[int, ...]) -> None:
    world, tiers = math.prod(grid), tiers_of(grid, (1.0, 3.0), (5.0, 1.0))
    own_grid = "hierarchical/" + "x".join(map(str, grid))
    for kind in KINDS:
        for used in algorithms(kind, world):
            family = used.name.partition("/")[0]
            if family == "hierarchical" and not used.name.startswith(own_grid):
                continue  # an estimate: its groups and the tiers' blocks do not nest
            sure = exact(used, sizes_of(used, world)) and family in {"chain", "direct", "ring", "hierarchical"}
            check(
                used,
                world,
                48.0,
                tiers,
                play(used, world, 48.0, of_tiers(tiers)),
                sure and (kind != "all_to_all" or family == "direct"),
            )


@pytest.mark.parametrize(("world", "per_node"), [(7, 4), (11, 4), (13, 8), (5, 2)])
def test_chains_and_single_steps_where_the_last_node_is_not_full(world: int, per_node: int) -> None:
    tiers = tiers_of((per_node, 8), (1.0, 3.0), (5.0, 1.0))
    for kind in KINDS:
        for used in algorithms(kind, world):
            if used.name.partition("/")[0] in {"chain", "direct"}:
                taken_s = play(used, world, 48.0, of_tiers(tiers))
                check(used, world, 48.0, tiers, taken_s, True)


def test_by_hand() -> None:
    # 8 ranks, 800 bytes, a latency of 1 s, 100 bytes/s
    tiers = one_tier(1.0, 100.0)
    price = {name: seconds("all_reduce", name, 800.0, 8, tiers) for name in ("ring", "halving_doubling", "direct")}
    assert price == pytest.approx({"ring": 14 * 2, "halving_doubling": 2 * (3 + 7), "direct": 1 + 56})
    assert seconds("all_reduce", "recursive_doubling", 800.0, 8, tiers) == pytest.approx(3 * 9)
    assert seconds("broadcast", "chain/4", 800.0, 8, tiers) == pytest.approx(7 * (1 + 2) + 3 * 2)
    assert seconds("broadcast", "binomial_tree", 800.0, 8, tiers) == pytest.approx(3 * 9)


@given(nbytes=st.floats(0, 1e12), group=st.integers(2, 64), start_s=st.floats(0, 1), rate=st.floats(1e6, 1e12))
def test_start_and_local_memory_come_once(nbytes: float, group: int, start_s: float, rate: float) -> None:
    [plain] = one_tier(1e-6, 1e9)
    tier = Tier(name="t", ranks=64, latency_s=1e-6, bytes_per_s=1e9, start_s=start_s, local_bytes_per_s=rate)
    for kind, share in {"all_reduce": 2, "all_gather": 1 + 1 / group, "reduce_scatter": 1 + 1 / group}.items():
        extra = start_s + share * nbytes / rate
        assert overhead_seconds(kind, nbytes, group, [tier]) == pytest.approx(extra)
        without = seconds(kind, "ring", nbytes, group, [plain])
        assert seconds(kind, "ring", nbytes, group, [tier]) == pytest.approx(without + extra)
    assert overhead_seconds("all_reduce", nbytes, group, [plain]) == 0.0
    assert seconds("all_reduce", "ring", nbytes, 1, [tier]) == overhead_seconds("all_reduce", nbytes, 1, [tier]) == 0.0


def test_a_price_for_every_algorithm_and_no_other() -> None:
    for kind in KINDS:
        families = {used.name.partition("/")[0] for used in algorithms(kind, 8)}
        assert set(priced(kind)) == families
    with pytest.raises(ValueError, match="algorithm = 'chain/4' has no price for all_reduce; priced: ring, "):
        seconds("all_reduce", "chain/4", 1.0, 4, one_tier(0, 1))
    with pytest.raises(ValueError, match="a grid of 8x4 is for 32 ranks, not for 16"):
        seconds("all_reduce", "hierarchical/8x4", 1.0, 16, one_tier(0, 1))
    with pytest.raises(ValueError, match="group = 65 ranks, but the tiers join at most 64"):
        seconds("all_reduce", "ring", 1.0, 65, one_tier(0, 1))


def test_a_thousand_nodes_have_a_price() -> None:
    # By hand: 8 x 2048 GPUs; 7 steps in, 2 * 2047 steps between nodes in 8 lanes, 7 steps out.
    tiers = tiers_of((8, 2048), (2e-6, 5e-6), (3e11, 1e11))
    lane = 4094 * (5e-6 + 2**30 / 16384 * 8 / 1e11)
    inside = 14 * (2e-6 + 2**30 / 8 / 3e11)
    price = seconds("all_reduce", "hierarchical/8x2048", 2**30, 16384, tiers)
    assert price == pytest.approx(lane + inside)
    assert algorithm("all_reduce", "hierarchical/8x2048").name == "hierarchical/8x2048"
