"""The tables that `validate` compares with, by source: their figures, what is fitted to them, and their thresholds."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from .published_figures import (
    BYTES,
    COLLECTIVE,
    MEMORY,
    TIME,
    Figure,
    Unusable,
    curve_figures,
    node_figures,
    rows_of,
    table_figures,
    vtrain_row,
)
from .published_rows import Row

LIVE = "gloo-here"
"""Name of the source that is this machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A table, or part of one.

    Attributes:
        figures: by the source's name, all that it has.
        thresholds: largest mean absolute error by kind, a little above what was measured; no threshold where there is
            no entry.
        because: what the errors of the source are made of.
        fitted: what in the catalogue was fitted to it; empty for a witness.
        sample: figures of a kind that a run by default takes; None for SAMPLE of validate.py.
    """

    figures: Callable[[str], Iterator[Figure | Unusable]]
    thresholds: Mapping[str, float] = field(default_factory=dict)
    because: str = ""
    fitted: str = ""
    sample: int | None = None


LIVE_THRESHOLDS: Mapping[str, float] = {BYTES: 0.0, MEMORY: 0.02}
"""Bytes are counted, so they are equal; the CPU's allocator is modelled but for oneDNN's scratch."""

Choice = Callable[[Row], bool]


def _table(file: str, choice: Choice = lambda row: True) -> Callable[[str], Iterator[Figure | Unusable]]:
    return partial(_chosen, file, choice)


def _chosen(file: str, choice: Choice, source: str) -> Iterator[Figure | Unusable]:
    yield from table_figures(source, [row for row in rows_of(file) if choice(row)])


def _single_node(source: str) -> Iterator[Figure | Unusable]:
    for number, row in enumerate(rows_of("vtrain_single_node_a100"), 1):
        yield from table_figures(source, [vtrain_row(row, number)])


def _on(gpu: str) -> Choice:
    return lambda row: row["gpu"].startswith(gpu)


def _group(beginning: str, framework: str = "") -> Choice:
    return lambda row: row["group"].startswith(beginning) and row["framework"].startswith(framework)


SOURCES: dict[str, Source] = {
    "sc21-table-1": Source(
        figures=_table("megatron_sc21_a100", _group("SC21 Table 1")),
        thresholds={TIME: 0.11},
        because="element-wise chains that Megatron-LM fuses are priced one by one",
    ),
    "sc21-zero-3": Source(
        figures=_table("megatron_sc21_a100", _group("SC21 Table 2", "DeepSpeed")),
        thresholds={TIME: 0.65},
        because="DeepSpeed of early 2021 needs 67 s on 768 GPUs as on 1536, where bytes over links take 6 s; gathering"
        " more at once later doubled its speed (DeepSpeed pull request 1453)",
    ),
    "sc21-ptd-p": Source(figures=_table("megatron_sc21_a100", _group("SC21 Table 2", "Megatron"))),
    "sc21-text": Source(figures=_table("megatron_sc21_a100", _group("SC21 text"))),
    "selective-recompute": Source(
        figures=_table("korthikanti_2022_selective_recompute"),
        thresholds={TIME: 0.08, MEMORY: 0.5},
        because="bias, dropout and sum are one kernel there; with sequence parallelism the engine keeps what a region"
        " has gathered, and the paper gathers it again",
    ),
    "single-node-a100": Source(
        figures=_single_node,
        sample=12,
        thresholds={TIME: 0.27},
        because="small micro-batches are bound by the host, whose cost per operator is that of bare operators",
    ),
    "mpt-fsdp": Source(
        figures=_table("mpt_fsdp"),
        sample=10,
        thresholds={TIME: 0.2},
        because="all sizes alike: products are slower there than alone; mpt-080 is close to the end of its memory",
    ),
    "bloom": Source(
        figures=_table("bloom_a100"),
        sample=8,
        thresholds={TIME: 0.45},
        because="heads of 150 elements miss the fast tensor-core kernels; one row repeated differs by 9 %",
    ),
    "megatron-2019-v100": Source(figures=_table("megatron_2019_2020", _group("Megatron-LM 2019"))),
    "megatron-2020-v100": Source(
        figures=_table("megatron_2019_2020", lambda row: "2020" in row["group"] and _on("V100")(row)),
        thresholds={TIME: 0.13},
        because="bias, dropout and sum are one kernel there",
    ),
    "megatron-2020-a100": Source(
        figures=_table("megatron_2019_2020", lambda row: "2020" in row["group"] and _on("A100")(row))
    ),
    "dlperf-v100": Source(
        figures=_table("dlperf_v100"),
        sample=8,
        thresholds={TIME: 0.35, MEMORY: 0.42},
        because="not known: the V100 of a DGX-2 agrees, these are SXM2; memory is nvidia-smi's, cache included",
    ),
    "jean-zay-v100": Source(figures=_table("bigscience_v100"), sample=4),
    "internevo": Source(
        figures=_table("internevo_a100"), thresholds={TIME: 0.14}, because="the network of the larger jobs"
    ),
    "nemo": Source(
        figures=_table("nemo_launcher_a100"),
        thresholds={TIME: 0.24},
        because="the launcher's own kernels are not known",
    ),
    "nvidia-bert": Source(figures=_table("nvidia_bert_dp"), thresholds={TIME: 0.13}, because="the V100 rows"),
    "torchtitan": Source(figures=_table("torchtitan_llama3")),
    "zero-3-others": Source(figures=_table("zero3_third_party")),
    "fsdp-paper": Source(figures=_table("large_runs")),
    "zero-offload": Source(figures=_table("zero_offload_infinity")),
    "zero-sc20-throughput": Source(figures=_table("zero_sc20_throughput"), sample=8),
    "zero-sc20-memory": Source(
        figures=_table("zero_sc20_memory"),
        thresholds={MEMORY: 0.005},
        because="the tables print two to four digits",
        sample=54,
    ),
    "zero-plus-plus": Source(figures=_table("zeropp")),
    "deepspeed-posts": Source(figures=_table("deepspeed_misc")),
    "nccl-one-node": Source(
        figures=node_figures,
        thresholds={COLLECTIVE: 0.06},
        because="noise of single measurements at 16 to 32 MiB, where NCCL changes its protocol",
        fitted="start_s, latency_s, local_bytes_per_s inside nodes of dgx-a100 and dgx-1 (experiments/fit_network.py)",
        sample=200,
    ),
    "nccl-curves": Source(
        figures=curve_figures,
        thresholds={COLLECTIVE: 0.25},
        because="NCCL's low-latency protocols below 1 MiB have no price of their own; H100 curves above 450 GB/s are"
        " reduced in the switch",
        sample=200,
    ),
}
