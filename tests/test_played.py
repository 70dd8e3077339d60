"""Collectives with every message played: against a slow player in fractions, against themselves and closed forms."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from test_flows import rates_in_fractions
from test_topology import WIRINGS, fabric
from windtunnel.collectives.algorithms import KINDS, algorithm, algorithms
from windtunnel.collectives.costs import seconds
from windtunnel.collectives.program import Algorithm, Program, Recv, Reduce, Send, sent_elements
from windtunnel.collectives.ring import RING, ring_all_reduce
from windtunnel.collectives.tiers import Tier
from windtunnel.sim import messages as messages_module
from windtunnel.sim.hardware import Wiring
from windtunnel.sim.messages import messages_of
from windtunnel.sim.program import play, play_programs, played_ranks, playing
from windtunnel.sim.topology import Topology, of_tiers, topology

ROUNDING = 1e-9
"""A time is a sum of a few thousand figures, each rounded to 1e-16."""


def tiers(*ranks: int) -> tuple[Tier, ...]:
    """Slower and later from each tier to the next."""
    return tuple(
        Tier(name=f"tier {number}", ranks=joined, latency_s=float(3**number), bytes_per_s=20.0 / 2**number)
        for number, joined in enumerate(ranks)
    )


NETWORKS: dict[str, Topology] = {
    "one tier": of_tiers(tiers(64)),
    "two tiers": of_tiers(tiers(4, 64)),
    "three tiers": of_tiers(tiers(2, 4, 64)),
    "flat": topology(fabric(WIRINGS[1]), 64),
    "leaf_spine": topology(fabric(WIRINGS[3]), 64),
    "rail": topology(fabric(WIRINGS[5]), 64),
}


Message = tuple[int, int, int]
"""(source, target, how many went from the one to the other before)."""


def shared(under_way: Sequence[Message], network: Topology) -> dict[Message, Fraction]:
    """The fair rate of each message."""
    routes = [network.route(source, target) for source, target, _ in under_way]
    links = sorted({link for route in routes for link in route})
    capacities = network.capacities(np.array(links, int)).tolist()
    rates = rates_in_fractions(capacities, [[links.index(link) for link in route] for route in routes])
    return dict(zip(under_way, rates, strict=True))


def played_in_fractions(programs: Sequence[Program], chunk_bytes: int, network: Topology) -> Fraction:
    """The same rules, message by message: a rank waits for a set of names, and a clock ticks from one to the next."""
    now, done = Fraction(0), set[object]()
    at, waits = [-1] * len(programs), [set[object]() for _ in programs]
    posted, awaited = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    left: dict[Message, Fraction] = {}
    arrives: dict[Message, Fraction] = {}

    def begin(rank: int) -> None:
        at[rank] += 1
        waits[rank] = set()
        for op in programs[rank][at[rank]] if at[rank] < len(programs[rank]) else ():
            source, target, count = (rank, op.peer, posted) if isinstance(op, Send) else (op.peer, rank, awaited)
            message = (source, target, count[source, target])
            count[source, target] += 1
            waits[rank].add((isinstance(op, Send), message))
            if isinstance(op, Send):
                left[message] = Fraction(chunk_bytes * op.count)

    while True:
        going_on = [rank for rank, wait in enumerate(waits) if at[rank] < len(programs[rank]) and wait <= done]
        for rank in going_on:
            begin(rank)
        if going_on:
            continue
        if not left and not arrives:
            assert at == [len(program) for program in programs]
            return now
        rates = shared(list(left), network)
        pause = min([left[each] / rates[each] for each in left] + [time - now for time in arrives.values()])
        now += pause
        for each in rates:
            left[each] -= rates[each] * pause
            if left[each] == 0:
                del left[each]
                done.add((True, each))
                arrives[each] = now + Fraction(network.latency(*each[:2]))
        for each in [each for each, time in arrives.items() if time == now]:
            del arrives[each]
            done.add((False, each))


# Against the slow player #


def named(kind: str, world: int) -> st.SearchStrategy[Algorithm]:
    return st.sampled_from(algorithms(kind, world))


@settings(max_examples=60)
@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    world=st.integers(1, 8),
    network=st.sampled_from(sorted(NETWORKS)),
    chunk_bytes=st.integers(0, 60),
)
def test_a_collective_takes_what_the_slow_player_says(
    data: st.DataObject, kind: str, world: int, network: str, chunk_bytes: int
) -> None:
    played = data.draw(named(kind, world))
    expected = played_in_fractions(played.programs(world), chunk_bytes, NETWORKS[network])
    nbytes = chunk_bytes * prod(played.cut(world))
    for fold in (False, True):
        assert play(played, world, nbytes, NETWORKS[network], fold=fold) == pytest.approx(float(expected), rel=ROUNDING)


@st.composite
def tangles(draw: st.DrawFn) -> list[Program]:
    """Programs that make no sense but end: in each round any ranks send any others any number of chunks."""
    world = draw(st.integers(2, 5))
    rank = st.integers(0, world - 1)
    message = st.tuples(rank, rank, st.integers(1, 3))
    programs: list[list[tuple[Send | Recv, ...]]] = [[] for _ in range(world)]
    for messages in draw(st.lists(st.lists(message, max_size=5), max_size=5)):
        steps: list[list[Send | Recv]] = [[] for _ in range(world)]
        for source, target, count in messages:
            if source != target:
                steps[source].append(Send(target, 0, count))
                steps[target].append(Recv(source, 0, count))
        for program, step in zip(programs, steps, strict=True):
            program += [tuple(step)] if step or draw(st.booleans()) else []
    return [tuple(program) for program in programs]


@settings(max_examples=60)
@given(tangles(), st.sampled_from(sorted(NETWORKS)), st.integers(0, 60))
def test_so_does_any_tangle_of_messages(programs: list[Program], network: str, chunk_bytes: int) -> None:
    expected = played_in_fractions(programs, chunk_bytes, NETWORKS[network])
    played = play_programs(programs, chunk_bytes, NETWORKS[network])
    assert played == pytest.approx(float(expected), rel=ROUNDING)


def test_what_arrives_early_does_not_end_the_step_before() -> None:
    # Rank 0 awaits 400 bytes of rank 1, then 20 of rank 2, and only then sends. Its link of 20 bytes/s is shared for
    # 2 s, in which rank 2 is done; the other 380 bytes leave at 21 s and are there at 22 s; the answer takes 1 s + 1 s.
    programs = [((Recv(1, 0, 20),), (Recv(2, 0),), (Send(1, 0),)), ((Send(0, 0, 20),), (Recv(0, 0),)), ((Send(0, 0),),)]
    assert play_programs(programs, 20.0, NETWORKS["one tier"]) == pytest.approx(24.0, rel=ROUNDING)


# Against themselves #


FOLDED = {"ring", "bidirectional_ring", "direct", "hierarchical"}


@pytest.mark.parametrize("network", sorted(NETWORKS))
@pytest.mark.parametrize("world", [8, 16, 24])
def test_a_period_of_ranks_stands_for_all(world: int, network: str) -> None:
    folded = set()
    for kind in KINDS:
        for played in algorithms(kind, world):
            if played_ranks(played, world, NETWORKS[network]) < world:
                folded.add(played.name.partition("/")[0])
                whole = play(played, world, 960, NETWORKS[network], fold=False)
                assert play(played, world, 960, NETWORKS[network]) == pytest.approx(whole, rel=ROUNDING), str(played)
                assert play_programs(
                    played.programs(world), 960 / prod(played.cut(world)), NETWORKS[network]
                ) == pytest.approx(whole, rel=ROUNDING), str(played)
    assert folded == FOLDED if world > NETWORKS[network].period(world) else not folded


@given(data=st.data(), kind=st.sampled_from(KINDS), world=st.integers(1, 24))
def test_the_flows_carry_what_the_programs_send(data: st.DataObject, kind: str, world: int) -> None:
    played = data.draw(named(kind, world))
    sent = sum(sent_elements(program, played.bounds(world * 240, world)) for program in played.programs(world))
    period = played.period(world)
    assert messages_of(played, world, world * 240, world).nbytes.sum() == pytest.approx(sent, rel=ROUNDING)
    assert messages_of(played, world, world * 240, period).nbytes.sum() == pytest.approx(sent * period / world)


def test_it_is_a_process_among_others() -> None:
    env = simpy.Environment()
    messages = messages_of(RING["all_gather"], 4, 80, 4)

    def one_after_the_other() -> simpy.events.ProcessGenerator:
        yield env.timeout(5)
        yield env.process(playing(env, messages, NETWORKS["one tier"]))
        yield env.process(playing(env, messages, NETWORKS["one tier"]))

    env.run(env.process(one_after_the_other()))
    assert env.now == pytest.approx(5 + 2 * 3 * (20 / 20 + 1))


# Against closed forms, and sums that one can do in one's head #


EXACT = ("ring", "bidirectional_ring", "halving_doubling", "recursive_doubling", "binomial_tree", "chain", "direct")
"""Families whose closed form is exact on one tier, if the ranks are a power of two."""


@given(
    data=st.data(),
    kind=st.sampled_from(KINDS),
    world=st.sampled_from([2, 4, 8, 16, 32]),
    nbytes=st.integers(0, 10**9),
    latency_s=st.floats(0, 1e-3),
    bytes_per_s=st.floats(1e3, 1e12),
)
def test_what_is_not_contended_takes_what_the_closed_form_says(
    data: st.DataObject, kind: str, world: int, nbytes: int, latency_s: float, bytes_per_s: float
) -> None:
    played = data.draw(st.sampled_from([each for each in algorithms(kind, world) if each.name.split("/")[0] in EXACT]))
    network = (Tier(name="all", ranks=64, latency_s=latency_s, bytes_per_s=bytes_per_s),)
    expected = seconds(kind, played.name, nbytes, world, network)
    assert play(played, world, nbytes, of_tiers(network)) == pytest.approx(expected, rel=ROUNDING, abs=1e-300), played


@given(
    kind=st.sampled_from(KINDS),
    grid=st.tuples(st.sampled_from([2, 4]), st.sampled_from([2, 4])),
    nbytes=st.integers(0, 10**9),
    latencies_s=st.tuples(st.floats(0, 1e-3), st.floats(0, 1e-3)),
    rates=st.tuples(st.floats(1e3, 1e12), st.floats(1e3, 1e12)),
)
def test_a_hierarchy_on_its_tiers_takes_what_the_closed_form_says(
    kind: str, grid: tuple[int, int], nbytes: int, latencies_s: tuple[float, float], rates: tuple[float, float]
) -> None:
    name, world = f"hierarchical/{grid[0]}x{grid[1]}", prod(grid)
    network = [
        Tier(name=f"tier of {ranks}", ranks=ranks, latency_s=latency_s, bytes_per_s=rate)
        for ranks, latency_s, rate in zip((grid[0], world), latencies_s, rates, strict=True)
    ]
    expected = seconds(kind, name, nbytes, world, network)
    played = play(algorithm(kind, name), world, nbytes, of_tiers(network))
    assert played == pytest.approx(expected, rel=ROUNDING, abs=1e-300)


def beside(program: Program, stride: int, offset: int) -> Program:
    """The program among every `stride`-th rank only, from rank `offset` on."""
    return tuple(tuple(replace(op, peer=op.peer * stride + offset) for op in step) for step in program)


def test_two_rings_through_one_nic_take_twice_as_long() -> None:
    network = replace(NETWORKS["flat"], levels=tuple(replace(each, latency_s=0.0) for each in NETWORKS["flat"].levels))

    def seconds_of(gpus: Sequence[int]) -> float:
        """A ring over 4 nodes for each of these GPUs of a node, all at once."""
        programs: list[Program] = [()] * 16
        for gpu in gpus:
            for node in range(4):
                programs[4 * node + gpu] = beside(ring_all_reduce(node, 4), 4, gpu)
        return play_programs(programs, 100.0, network)

    alone = seconds_of([0])
    assert alone == pytest.approx(6 * 100 / 20)
    assert seconds_of([0, 1]) == pytest.approx(2 * alone)  # GPUs 0 and 1 of a node have a NIC of 20 bytes/s
    assert seconds_of([0, 2]) == pytest.approx(alone)
    assert seconds_of([0, 1, 2, 3]) == pytest.approx(2 * alone)


def pairwise(distance: int, gpus: Sequence[int] = range(4), shift: int = 0) -> list[Program]:
    """GPU g of each of 8 nodes sends 100 bytes to GPU g + shift of the node `distance` further."""
    programs: list[Program] = [()] * 32
    for rank in [4 * node + gpu for node in range(8) for gpu in gpus]:
        send = Send((rank + 4 * distance + shift) % 32, 0)
        programs[rank] += ((send, Recv((rank - 4 * distance - shift) % 32, 0)),)
    return programs


@pytest.mark.parametrize("oversubscription", [1.0, 2.0, 4.0])
def test_an_oversubscribed_spine_is_slower_by_its_factor(oversubscription: float) -> None:
    network = topology(fabric(Wiring(kind="leaf_spine", nodes_per_leaf=2, oversubscription=oversubscription)), 32)
    assert play_programs(pairwise(2), 100.0, network) == pytest.approx(3 + oversubscription * 100 / 10)
    # the next node is on the same leaf or not: what crosses is slower only where both nodes of a leaf send up
    half = max(oversubscription / 2, 1.0)
    assert play_programs(pairwise(1), 100.0, network) == pytest.approx(3 + half * 100 / 10)


@pytest.mark.parametrize("oversubscription", [1.0, 2.0, 4.0])
def test_rails_do_not_block_what_stays_on_its_rail(oversubscription: float) -> None:
    wiring = Wiring(kind="rail", nodes_per_leaf=8, oversubscription=oversubscription)
    rail, flat = (topology(fabric(each), 32) for each in (wiring, Wiring(kind="flat")))
    for distance in (1, 2, 4):
        same = play_programs(pairwise(distance), 100.0, rail)
        assert same == pytest.approx(play_programs(pairwise(distance), 100.0, flat)) == pytest.approx(3 + 10)
    # GPU g to GPU g + 2 (of that node or the next): the other rail, through the spine
    across = play_programs(pairwise(1, shift=2), 100.0, rail)
    assert across == pytest.approx(3 + oversubscription * 10)
    assert play_programs(pairwise(1, shift=2), 100.0, flat) == pytest.approx(3 + 10)


# Refusals #


def test_programs_that_do_not_fit_together_are_refused() -> None:
    network = NETWORKS["one tier"]
    with pytest.raises(ValueError, match="rank 0 sends rank 1 2 messages, but 1 awaits 1"):
        play_programs([((Send(1, 0), Send(1, 0)),), ((Recv(0, 0),),)], 1.0, network)
    with pytest.raises(ValueError, match="rank 1 sends rank 0 0 messages, but 0 awaits 1"):
        play_programs([((Reduce(1, 0),),), ()], 1.0, network)
    with pytest.raises(ValueError, match="rank 1 names peer 2; allowed: 0 to 1"):
        play_programs([(), ((Send(2, 0),),)], 1.0, network)
    with pytest.raises(ValueError, match="2 ranks wait for each other; rank 0 is stuck in step 0"):
        play_programs([((Recv(1, 0),), (Send(1, 0),)), ((Recv(0, 0),), (Send(0, 0),))], 1.0, network)
    with pytest.raises(ValueError, match="no tier joins ranks 63 and 64"):
        play(RING["all_gather"], 65, 1.0, network)


def test_more_messages_than_are_worth_playing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages_module, "MOST_MESSAGES", 16 * 15)
    assert play(RING["all_gather"], 16, 1.0, NETWORKS["one tier"], fold=False) > 0
    with pytest.raises(ValueError, match=r"'events' .* ring all_gather over 17 ranks has about 272; allowed: 240: use"):
        play(RING["all_gather"], 17, 1.0, NETWORKS["one tier"], fold=False)
    assert play(RING["all_gather"], 17, 1.0, NETWORKS["one tier"]) > 0  # one rank stands for all
