"""A row of a published table as a job: the model, the cluster and the layout that were measured.

Rows say what they measured and seldom what program did it; `SOFTWARE` says that by framework. What a row leaves out and
a simulation needs is never guessed: such a row is an `ExcludedError`, with the reason.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from ..sim.attention import with_first_flash_attention
from ..sim.hardware import Cluster, load_cluster, load_processor
from .models import ModelSpec

Row = Mapping[str, str]
"""A line of a CSV in published/, by column (COLUMNS in published/README.md); empty where a figure is not known."""


class ExcludedError(ValueError):
    """A row that no simulation can be held against; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What the program of a run did.

    Attributes:
        attention: "plain" before fused attention was in use, see models.py.
        flash: which FlashAttention it was, where it was fused.
        dropout: rate in training.
        overlap: gradients are reduced while backward runs.
        gradients: dtype in which they are added up and reduced; None for that of the parameters.
        clip: largest norm of the gradients; 0 for no clipping.
        fusion: "elementwise" where bias and GELU, and bias, dropout and sum, are one kernel each (sim/fusion.py).
        padded: the vocabulary is padded to a multiple of 128 times the tensor-parallel ranks.
        why: where that is from.
    """

    attention: Literal["plain", "fused"]
    dropout: float
    overlap: bool
    gradients: Literal["fp32"] | None = None
    clip: float = 1.0
    padded: bool = False
    fusion: Literal["none", "elementwise"] = "none"
    flash: Literal[1, 2] = 2
    why: str


MEGATRON = Software(
    attention="plain",
    dropout=0.1,
    overlap=False,
    padded=True,
    fusion="elementwise",
    why="defaults of Megatron-LM's arguments.py until 2022: attention and hidden dropout 0.1, clip-grad 1.0, DDP-impl"
    " local, which reduces after backward; core attention of batched products and a fused softmax; fused bias_gelu and"
    " bias_dropout_add",
)

SOFTWARE: tuple[tuple[str, Software], ...] = (
    (
        "Megatron-LM (May 2022)",
        replace(
            MEGATRON,
            gradients="fp32",
            why=f"{MEGATRON.why}; gradients are added up in fp32, as the 18 bytes per parameter of the paper's"
            " figure 1 say",
        ),
    ),
    ("Megatron", MEGATRON),
    ("DeepSpeed ZeRO-3", replace(MEGATRON, overlap=True, padded=False, why="Megatron-LM's model; ZeRO-3 overlaps")),
    ("DeepSpeed + Megatron-LM", replace(MEGATRON, why="Megatron-LM's model; overlap_comm is false by default")),
    ("DeepSpeed ZeRO", replace(MEGATRON, overlap=True, why="Megatron-LM's model; ZeRO-2 reduces during backward")),
    ("PyTorch DDP baseline", replace(MEGATRON, overlap=True, why="Megatron-LM's model under DDP, which overlaps")),
    (
        "PyTorch DDP, LAMB",
        Software(
            attention="plain",
            dropout=0.1,
            overlap=True,
            why="BERT of NVIDIA/DeepLearningExamples: dropout 0.1, norms of the gradients before LAMB",
        ),
    ),
    (
        "HF Trainer",
        Software(attention="plain", dropout=0.1, overlap=True, why="GPT2Config's dropouts of 0.1, eager attention"),
    ),
    (
        "PyTorch FSDP",
        Software(attention="plain", dropout=0.1, overlap=True, clip=1.0, why="minGPT: eager attention, dropout 0.1"),
    ),
    (
        "Composer FSDP",
        Software(
            attention="fused",
            dropout=0.0,
            overlap=True,
            flash=1,
            why="llm-foundry's yamls: no dropout; submit_benchmarks.py: attn_impl triton on torch 1.13.1, which is the"
            " first FlashAttention in Triton",
        ),
    ),
    (
        "InternEvo",
        Software(attention="fused", dropout=0.0, overlap=True, why="InternEvo's 7B config: flash attention, overlap"),
    ),
    (
        "NeMo",
        Software(
            attention="plain",
            dropout=0.1,
            overlap=True,
            gradients="fp32",
            padded=True,
            why="nemo-megatron-launcher's gpt3/5b.yaml: megatron_amp_O2 reduces fp32 gradients in chunks meanwhile",
        ),
    ),
    (
        "LitGPT",
        Software(attention="fused", dropout=0.0, overlap=True, why="LitGPT: scaled_dot_product_attention, no dropout"),
    ),
    (
        "torchtitan",
        Software(attention="fused", dropout=0.0, overlap=True, why="torchtitan: scaled_dot_product_attention"),
    ),
)
"""By how a row's `framework` begins; the first that fits."""

CLUSTERS: tuple[tuple[str, str, str | None], ...] = (
    ("A100-SXM4-80GB", "dgx-a100", None),
    ("A100-SXM4-40GB", "dgx-a100-40gb", None),
    ("A100 (p4d, 40GB)", "dgx-a100-40gb", None),
    ("V100-SXM2-16GB", "dgx-1", None),
    ("V100-SXM2-32GB", "dgx-1", "v100-32gb"),
    ("V100-SXM3-32GB", "dgx-2", None),
)
"""(how a row's `gpu` begins, catalogue cluster, catalogue GPU if another one than the cluster's)."""

PRECISIONS = {"fp16 mixed": "fp16", "bf16 mixed": "bf16", "amp_bf16": "bf16", "bf16": "bf16", "bf16 pure": "bf16"}

RECOMPUTE: tuple[tuple[str, str], ...] = (
    ("none", "none"),
    ("full", "full"),
    ("selective (attention core only)", "attention"),
)
"""By how a row's `act_recompute` begins."""

FAMILIES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("minGPT", {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "tied": False, "bias": True}),
    ("GPT", {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "tied": True, "bias": True}),
    ("BLOOM", {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "tied": True, "bias": True}),
    ("MPT", {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "tied": True, "bias": False}),
    ("BERT", {"mlp": "gelu", "norm": "layernorm", "positions": "learned", "tied": True, "bias": True}),
    ("InternLM", {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rope", "tied": False, "bias": False}),
    ("Llama", {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rope", "tied": False, "bias": False}),
    ("TinyLlama", {"mlp": "swiglu", "norm": "rmsnorm", "positions": "rope", "tied": False, "bias": False}),
)
"""By how a row's `model` or `family` begins; the first that fits."""

NEEDED = ("layers", "hidden", "heads", "seq", "gpu", "n_gpus", "tp", "pp", "micro_batch", "global_batch")

VOCAB = 50257
"""GPT-2's, where a row of its family gives none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a row measured, as `simulate` wants it."""

    spec: ModelSpec
    cluster: Cluster
    options: tuple[tuple[str, Any], ...]


def read_job(row: Row) -> Job:
    """The job that a row measured.

    Raises:
        ExcludedError: what is needed is not known, or is not in the catalogue.
    """
    missing = [name for name in NEEDED if not row.get(name)]
    if missing:
        raise ExcludedError(f"not stated: {', '.join(missing)}")
    software, cluster = software_of(row["framework"]), cluster_of(row)
    if software.flash == 1:
        cluster = replace(cluster, processor=with_first_flash_attention(cluster.processor))
    return Job(
        spec=_spec(row, software),
        cluster=cluster,
        options=tuple(sorted(_options(row, software).items())),
    )


def software_of(framework: str) -> Software:
    """What the program did that a row's `framework` names.

    Raises:
        ExcludedError: an unknown one.
    """
    found = next((software for name, software in SOFTWARE if framework.startswith(name)), None)
    if found is None:
        raise ExcludedError(f"framework {framework!r}: what it does is not described in SOFTWARE")
    return found


def cluster_of(row: Row) -> Cluster:
    """The catalogue's cluster with the row's GPUs per node and bandwidth between nodes.

    Raises:
        ExcludedError: no such GPU in the catalogue.
    """
    found = next(((name, gpu) for start, name, gpu in CLUSTERS if row["gpu"].startswith(start)), None)
    if found is None:
        raise ExcludedError(f"gpu {row['gpu']!r} is on no cluster of the catalogue")
    cluster = _catalogue_cluster(*found)
    if row.get("gpus_per_node"):
        cluster = replace(cluster, gpus_per_node=int(row["gpus_per_node"]))
    if row.get("inter_node_gbps"):
        assert cluster.inter_node is not None
        bytes_per_s = float(row["inter_node_gbps"]) * 1e9 / 8
        cluster = replace(cluster, inter_node=replace(cluster.inter_node, bytes_per_s=bytes_per_s))
    elif int(row["n_gpus"]) > cluster.gpus_per_node:
        raise ExcludedError("several nodes, and the network between them is not stated")
    return cluster


@lru_cache
def _catalogue_cluster(name: str, gpu: str | None) -> Cluster:
    cluster = load_cluster(name)
    return cluster if gpu is None else replace(cluster, processor=load_processor(gpu))


def _number(row: Row, name: str, default: int | None = None) -> int | None:
    return int(float(row[name])) if row.get(name) else default


def _spec(row: Row, software: Software) -> ModelSpec:
    family = next(
        (kind for start, kind in FAMILIES if row["family"].startswith(start) or row["model"].startswith(start)), None
    )
    if family is None:
        raise ExcludedError(
            f"model {row['model']!r} of family {row['family']!r}: its layers are not described in FAMILIES"
        )
    hidden, seq = int(row["hidden"]), int(row["seq"])
    try:
        return ModelSpec(
            name=row["model"],
            layers=int(row["layers"]),
            hidden=hidden,
            heads=int(row["heads"]),
            kv_heads=_number(row, "kv_heads", int(row["heads"])),  # type: ignore[arg-type]
            ffn=_number(row, "ffn", 4 * hidden),  # type: ignore[arg-type]
            vocab=_vocab(row, software),
            seq=seq,
            attention="full" if row["family"].startswith("BERT") else "causal",
            attention_kernel=software.attention,
            dropout=software.dropout,
            source=row["source"],
            **family,
        )
    except ValueError as error:
        raise ExcludedError(str(error)) from None


def _vocab(row: Row, software: Software) -> int:
    """Rows of the embedding, padding included."""
    if not row.get("vocab") and not row["family"].startswith("GPT"):
        raise ExcludedError("not stated: vocab")
    multiple = 128 * int(row["tp"]) if software.padded else 1
    return -(-(_number(row, "vocab", VOCAB) or VOCAB) // multiple) * multiple


def _options(row: Row, software: Software) -> dict[str, Any]:
    """Fields of Options (layout.py)."""
    policy = next((name for start, name in RECOMPUTE if row["act_recompute"].startswith(start)), None)
    if policy is None:
        said = row["act_recompute"]
        raise ExcludedError(
            f"act_recompute {said!r}: no policy of the engine does that" if said else "not stated: act_recompute"
        )
    if row["precision"] not in PRECISIONS:
        raise ExcludedError(f"precision {row['precision']!r} is not simulated")
    zero = _number(row, "zero_stage", 0) or 0
    offload, keys = _offload(row)
    if zero in (1, 2) and (shared := SHARD_GROUP.search(row["notes"])) and int(shared[1]) < int(row["n_gpus"]):
        keys["zero_optimization"] = {"mics_shard_size": int(shared[1])}
    if software.gradients is not None:
        keys["data_types"] = {"grad_accum_dtype": software.gradients}
    return {
        "gpus": int(row["n_gpus"]),
        "tp": int(row["tp"]),
        "pp": int(row["pp"]),
        "cp": _number(row, "cp", 1),
        "interleave": _number(row, "interleave", 1) if int(row["pp"]) > 1 else 1,
        "zero": zero,
        "micro_batch": int(row["micro_batch"]),
        "global_batch": int(row["global_batch"]),
        "sequence_parallel": row.get("seq_parallel") == "yes",
        "recompute": policy,
        "offload": offload,
        "precision": PRECISIONS[row["precision"]],
        "clip": software.clip,
        "overlap": software.overlap or zero >= 2,
        "fusion": software.fusion,
        "engine": json.dumps(keys),
    }


SHARD_GROUP = re.compile(r"shard group:? (\d+)")
"""In notes: over how many ranks the optimizer's state is sharded, if not over all."""

OFFLOAD = {"": "none", "none": "none", "optimizer to CPU": "optimizer", "params+optimizer to CPU": "parameters"}


def _offload(row: Row) -> tuple[str, dict[str, Any]]:
    """(the option offload, keys of a DeepSpeed file about activations)."""
    activations = {"partition_activations": True} if "partitioned" in row["act_recompute"] else {}
    said = row.get("offload", "")
    if said.startswith("activation checkpoints to CPU"):
        activations["cpu_checkpointing"] = True
        said = "none"
    if said not in OFFLOAD:
        raise ExcludedError(f"offload {said!r}: it is not clear what rested where")
    return OFFLOAD[said], {"activation_checkpointing": activations} if activations else {}
