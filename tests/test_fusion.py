"""Chains of element-wise kernels priced as one: what is joined, which bytes are saved, what a step then takes."""

import pytest
from hand_made import CLUSTER, gather, two_steps, wait
from hypothesis import given
from hypothesis import strategies as st
from windtunnel.collectives.trace import Alloc, Free, Kernel, Op, Ref, Segment, Synchronize
from windtunnel.sim.fusion import FUSED, fuse
from windtunnel.sim.replay import replay

N = 100


def pointwise(name: str = "add", read: int = N, write: int = N, elements: int = N) -> Kernel:
    return Kernel(name, "memory", 0.0, read, write, "bf16", (elements,))


def freed(op: int, key: str = "forward", block: int = 0, age: int = 0) -> Free:
    return Free(Ref(key, block, True, age, op))


def kernels(segment: Segment, keys: tuple[str, ...] = ("forward",)) -> list[tuple[int, Kernel]]:
    return [(position, op) for position, op in fuse(segment, keys) if isinstance(op, Kernel)]


def test_a_chain_counts_its_outer_reads_and_writes() -> None:
    # gelu(x) is freed once dropout has read it; dropout's result and its mask live on.
    segment = (
        Alloc(N, "activations"),
        pointwise("gelu"),
        Alloc(N, "activations"),
        Alloc(N // 2, "activations"),
        pointwise("native_dropout", N, N + N // 2),
        freed(0),
    )
    assert kernels(segment) == [(4, pointwise(FUSED, N, N + N // 2))]


def test_what_lives_on_is_written() -> None:
    segment = (Alloc(N, "activations"), pointwise("silu"), Alloc(N, "activations"), pointwise("mul", 2 * N, N))
    # silu reads x; mul reads silu(x), from registers, and another operand. Both results are kept.
    assert kernels(segment) == [(3, pointwise(FUSED, 2 * N, 2 * N))]


@pytest.mark.parametrize(
    "free",
    [freed(0, "backward"), freed(0, block=1), freed(0, age=1), freed(5)],
    ids=["another segment", "another block", "an earlier run", "another storage"],
)
def test_only_a_storage_of_this_run_dies_in_the_chain(free: Free) -> None:
    segment = (Alloc(N, "activations"), pointwise(), Alloc(N, "activations"), pointwise(), free)
    [(_, joined)] = kernels(segment)
    assert joined.write_bytes == 2 * N


def test_a_storage_that_outlives_the_chain_is_written() -> None:
    tail = (Alloc(N, "activations"), pointwise("mm"), freed(0))
    segment = (Alloc(N, "activations"), pointwise(), Alloc(N, "activations"), pointwise(), *tail)
    assert [kernel.write_bytes for _, kernel in kernels(segment)] == [2 * N, N]


def test_a_neighbour_that_reads_less_reads_something_else() -> None:
    segment = (pointwise(write=N), pointwise(read=N // 2))
    assert kernels(segment) == [(1, pointwise(FUSED, N + N // 2, 2 * N))]


@pytest.mark.parametrize("between", [gather(1), wait(0), Synchronize(), pointwise("mm"), pointwise(elements=N + 1)])
def test_what_ends_a_chain(between: Op) -> None:
    segment = (pointwise(), between, pointwise())
    assert fuse(segment, ("forward",)) == list(enumerate(segment))


OPS = st.one_of(
    st.builds(
        pointwise, st.sampled_from(["add", "gelu", "mm"]), st.integers(0, 9), st.integers(0, 9), st.integers(1, 2)
    ),
    st.builds(Alloc, st.integers(0, 9), st.just("activations")),
    st.builds(freed, st.integers(0, 20)),
    st.just(Synchronize()),
)


@given(st.lists(OPS, max_size=20))
def test_fusion_saves_and_never_adds(ops: list[Op]) -> None:
    segment = tuple(ops)
    fused = fuse(segment, ("forward",))
    places = [position for position, _ in fused]
    assert places == sorted(set(places))
    others = [(position, op) for position, op in enumerate(segment) if not isinstance(op, Kernel)]
    assert [pair for pair in fused if not isinstance(pair[1], Kernel)] == others
    before = [op for op in segment if isinstance(op, Kernel)]
    after = [op for _, op in fused if isinstance(op, Kernel)]
    assert len(after) <= len(before)
    for field in ("read_bytes", "write_bytes"):
        assert 0 <= sum(getattr(op, field) for op in after) <= sum(getattr(op, field) for op in before)
    assert fuse(tuple(op for _, op in fused), ()) == list(enumerate(op for _, op in fused))


def test_a_replay_prices_the_chain_and_waits_find_their_collective() -> None:
    # A byte is a second: the gather takes 4 and starts after the chain, which is 3 + 1 fused and 3 + 3 + 3 + 1 if not.
    forward = (
        Alloc(3, "temporary"), pointwise("silu", 3, 3, 3), Alloc(1, "temporary"), pointwise("mul", 3, 1, 3), freed(0),
        gather(4), wait(5),
    )  # fmt: skip
    made = two_steps([("forward", forward, 1)])
    plain, fused = (replay(made, CLUSTER, fusion=fusion) for fusion in ("none", "elementwise"))
    assert plain.breakdown_s["compute"] == pytest.approx(10)
    assert fused.breakdown_s["compute"] == pytest.approx(4)
    assert plain.breakdown_s["exposed_communication"] == fused.breakdown_s["exposed_communication"] == pytest.approx(4)
