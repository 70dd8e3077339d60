"""Plays collective programs on simpy: the engine's loop with seconds where the engine has bytes."""

from collections.abc import Sequence

import simpy

from ..collectives.program import Program, Send
from ..collectives.tiers import Tier


def play(programs: Sequence[Program], nbytes: float, tiers: Sequence[Tier]) -> float:
    """Seconds until the last of all ranks has played its program on a buffer of `nbytes` bytes.

    The buffer is cut in equal chunks, one per rank. A message occupies the sender's way to its peer for
    bytes / bandwidth, and arrives a latency after that. Messages of a pair of ranks arrive in order.
    """
    env = simpy.Environment()
    wires: dict[tuple[int, int], simpy.Store] = {}
    chunk_bytes = nbytes / len(programs)

    def wire(source: int, target: int) -> simpy.Store:
        return wires.setdefault((source, target), simpy.Store(env))

    def message(source: int, target: int) -> simpy.events.ProcessGenerator:
        tier = tier_between(source, target, tiers)
        yield env.timeout(chunk_bytes / tier.bytes_per_s)
        env.process(arrival(source, target, tier.latency_s))

    def arrival(source: int, target: int, latency_s: float) -> simpy.events.ProcessGenerator:
        yield env.timeout(latency_s)
        yield wire(source, target).put(None)

    def run(rank: int, program: Program) -> simpy.events.ProcessGenerator:
        for step in program:
            yield env.all_of(
                [
                    env.process(message(rank, op.peer)) if isinstance(op, Send) else wire(op.peer, rank).get()
                    for op in step
                ]
            )

    ranks = [env.process(run(rank, program)) for rank, program in enumerate(programs)]
    env.run(env.all_of(ranks))
    return float(env.now)


def tier_between(source: int, target: int, tiers: Sequence[Tier]) -> Tier:
    """The innermost tier that joins two ranks."""
    for tier in tiers:
        if source // tier.ranks == target // tier.ranks:
            return tier
    raise ValueError(f"no tier joins ranks {source} and {target}: the widest joins {tiers[-1].ranks} ranks")
