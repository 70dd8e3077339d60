"""Proves a collective before anyone plays it: who contributed what to each chunk, and whether it can get stuck.

Neither torch nor processes are needed: a program is played on multisets of contributing ranks.
"""

from collections import Counter, deque

from .program import Algorithm, Program, Recv, Reduce, Send

Held = list[list[Counter[int]]]
"""held[rank][chunk] counts, by rank, the contributions in that rank's copy of that chunk."""


RUBBISH = -1
"""The contributor of what memory held before: no collective may pass it on."""


class ProofError(ValueError):
    """A program that does not do what its collective promises; the message names rank, step and op."""


def prove(algorithm: Algorithm, world: int) -> None:
    """Check one algorithm at one world size: contributions, matching of sends and receives, absence of deadlock.

    Raises:
        ProofError: naming the first rank and chunk, or the stuck ops, that break the promise of its kind.
    """
    kind, programs = algorithm.kind, algorithm.programs(world)
    held = contributions(programs, _initial(kind, world))
    everyone = Counter(range(world))
    for rank in range(world):
        for chunk in range(world):
            if kind == "reduce_scatter" and chunk != rank:
                continue
            wanted = Counter([chunk]) if kind == "all_gather" else everyone
            if held[rank][chunk] != wanted:
                raise ProofError(
                    f"{kind}: rank {rank} ends with {dict(held[rank][chunk])} in chunk {chunk}, not {dict(wanted)}"
                )
    check_rendezvous(programs)


def _initial(kind: str, world: int) -> Held:
    """An all-gather starts with one owner per chunk and rubbish elsewhere; the others with each rank's data in all."""
    if kind == "all_gather":
        return [[Counter([rank if chunk == rank else RUBBISH]) for chunk in range(world)] for rank in range(world)]
    return [[Counter([rank]) for _ in range(world)] for rank in range(world)]


def contributions(programs: list[Program], held: Held) -> Held:
    """Play all ranks' programs, messages matched in order per pair of ranks (Gloo's tags, NCCL's order).

    A rank goes on when all receives of its step have arrived; sends are buffered.

    Raises:
        ProofError: a receive that is never fed, an unreceived send, or a chunk sent where another is awaited.
    """
    held = [[chunk.copy() for chunk in rank] for rank in held]
    wires: dict[tuple[int, int], deque[tuple[int, Counter[int]]]] = {}
    at = [0] * len(programs)
    posted = [False] * len(programs)
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                step = program[at[rank]]
                if not posted[rank]:
                    for op in step:
                        if isinstance(op, Send):
                            message = (op.chunk, held[rank][op.chunk].copy())
                            wires.setdefault((rank, op.peer), deque()).append(message)
                    posted[rank] = True
                    progress = True
                if not _arrived(rank, program, at[rank], wires):
                    break
                _receive(rank, program, at[rank], wires, held)
                at[rank], posted[rank], progress = at[rank] + 1, False, True
    for rank, program in enumerate(programs):
        if at[rank] < len(program):
            raise ProofError(f"rank {rank} waits for ever in step {at[rank]}: {' '.join(map(str, program[at[rank]]))}")
    for (source, target), left in wires.items():
        if left:
            raise ProofError(f"rank {source} sends chunk {left[0][0]} to rank {target}, which never receives it")
    return held


def _arrived(
    rank: int, program: Program, at: int, wires: dict[tuple[int, int], deque[tuple[int, Counter[int]]]]
) -> bool:
    needed = Counter(op.peer for op in program[at] if not isinstance(op, Send))
    return all(len(wires.get((peer, rank), ())) >= count for peer, count in needed.items())


def _receive(
    rank: int, program: Program, at: int, wires: dict[tuple[int, int], deque[tuple[int, Counter[int]]]], held: Held
) -> None:
    for op in program[at]:
        if isinstance(op, Send):
            continue
        chunk, message = wires[op.peer, rank].popleft()
        if chunk != op.chunk:
            raise ProofError(
                f"rank {rank} step {at} awaits chunk {op.chunk} of rank {op.peer}, which sends chunk {chunk}"
            )
        held[rank][op.chunk] = held[rank][op.chunk] + message if isinstance(op, Reduce) else message


def check_rendezvous(programs: list[Program]) -> None:
    """No deadlock when a send completes only with its receive, and the messages of a pair of ranks match in order.

    That is NCCL's rule for grouped point-to-point calls: the ops of a step are posted together, the step ends when all
    of them have met, and only then is the next one posted.

    Raises:
        ProofError: with each stuck rank and its step.
    """
    at = [0] * len(programs)
    met: list[set[int]] = [set() for _ in programs]
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            if at[rank] == len(program):
                continue
            for position, op in enumerate(program[at[rank]]):
                if position in met[rank] or not isinstance(op, Send):
                    continue
                if (other := _partner(programs, at, met, rank, position, op)) is not None:
                    met[rank].add(position)
                    met[op.peer].add(other)
                    progress = True
        for rank, program in enumerate(programs):
            if at[rank] < len(program) and len(met[rank]) == len(program[at[rank]]):
                at[rank], met[rank], progress = at[rank] + 1, set(), True
    stuck = [rank for rank, program in enumerate(programs) if at[rank] < len(program)]
    if stuck:
        where = "; ".join(f"rank {r} step {at[r]}: {' '.join(map(str, programs[r][at[r]]))}" for r in stuck)
        raise ProofError(f"deadlock under in-order rendezvous: {where}")


def _partner(
    programs: list[Program], at: list[int], met: list[set[int]], rank: int, position: int, send: Send
) -> int | None:
    """Position of the receive that this send meets, if both are the next of their pair."""
    earlier = (
        other
        for other, op in enumerate(programs[rank][at[rank]][:position])
        if isinstance(op, Send) and op.peer == send.peer and other not in met[rank]
    )
    if next(earlier, None) is not None or at[send.peer] == len(programs[send.peer]):
        return None
    for other, op in enumerate(programs[send.peer][at[send.peer]]):
        if isinstance(op, Recv | Reduce) and op.peer == rank and other not in met[send.peer]:
            return other
    return None
