"""Jobs as files, and priced again from them."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hand_made import CLUSTER, gather, kernel, steps_of, wait
from hypothesis import given, settings
from hypothesis import strategies as st
from test_trace_file import traces
from windtunnel.collectives.job_file import VERSION, Job, dumps, loads
from windtunnel.collectives.trace import FORMAT_VERSION
from windtunnel.sim.job import price_job

LAYOUT = {"model": "m", "cluster": "c", "pp": 1, "schedule": "1f1b", "accumulation": 1, "interleave": 1}
TRACE = steps_of(kernel(2), gather(3), wait(1), kernel(1))
JOB = Job(layout=LAYOUT, precision="fp32", tokens_per_step=8, message_bytes=0, traces=(TRACE,), stages=(0,))


@st.composite
def jobs(draw: Any) -> Job:
    found = draw(st.lists(traces, min_size=1, max_size=3))
    rest = draw(st.lists(st.integers(0, len(found) - 1), max_size=4))
    stages = draw(st.permutations([*range(len(found)), *rest]))
    return Job(
        layout={**LAYOUT, "pp": len(stages), "recompute_budget": None, "sequence_parallel": True},
        precision=draw(st.sampled_from(["fp32", "bf16"])),
        tokens_per_step=draw(st.integers(1, 2**40)),
        message_bytes=draw(st.integers(0, 2**40)),
        traces=tuple(found),
        stages=tuple(stages),
    )


@settings(max_examples=25)  # a trace alone is tried a hundred times elsewhere
@given(jobs())
def test_a_job_comes_back_equal(job: Job) -> None:
    assert loads(dumps(job)) == job


def test_a_job_from_a_file_costs_the_same_and_less_on_faster_hardware() -> None:
    priced = price_job(loads(dumps(JOB)), CLUSTER)
    assert priced.step_time_s == 6  # 2 s, 3 s that are waited for, 1 s
    assert priced.layout["cluster"] == "hand-made"
    twice = replace(CLUSTER, processor=replace(CLUSTER.processor, memory_bytes_per_s=2.0))
    assert price_job(JOB, twice).step_time_s == 4.5


def test_a_cluster_that_is_too_small_or_cannot_compute_is_refused() -> None:
    with pytest.raises(ValueError, match="gpus"):
        price_job(JOB, replace(CLUSTER, gpus_per_node=1))
    with pytest.raises(ValueError, match="precision = fp64 of the job; one byte per second computes in fp32, bf16"):
        price_job(replace(JOB, precision="fp64"), CLUSTER)


def altered(**changes: object) -> str:
    return json.dumps({**json.loads(dumps(JOB)), **changes})


NEWER_TRACE = {**json.loads(dumps(JOB))["traces"][0], "version": FORMAT_VERSION + 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (altered(version=VERSION + 1), f"version = {VERSION + 1} of the job; this program reads version {VERSION}"),
        (altered(traces=[NEWER_TRACE]), f"version = {FORMAT_VERSION + 1} of the trace"),
        (altered(format="something"), "format = 'something'; allowed: 'windtunnel job'"),
        (altered(stages=[0, 0]), r"stages = \[0, 0\] of 1 traces and pp = 1"),
        (altered(stages=[1]), r"stages = \[1\] of 1 traces"),
        (altered(traces=3), "not a job: "),
        (dumps(JOB)[:-30], "not a job: "),
        ("[]", "not a job: "),
        ("", "not a job: "),
    ],
)
def test_what_is_no_job_of_this_version_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{message}[^\n]*$"):
        loads(text)
