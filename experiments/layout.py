"""How a job is laid out on a cluster: what the user chose, with every default resolved and every value checked."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..collectives.pipeline_schedules import SCHEDULES
from ..collectives.zero import Zero
from ..engine.activation_section import ActivationSection
from ..engine.precision import AUTOCAST_FORMATS
from ..reading import nearest, read_into
from ..sim.fusion import FUSIONS
from ..sim.hardware import Cluster
from ..sim.network import FIDELITIES
from ..sim.rank_classes import RankKinds, rank_kinds, seen_by
from ..sim.unlike import Stragglers
from .models import ModelSpec

if TYPE_CHECKING:
    from ..engine.placement import Placement
    from .own_models import OwnModel

ADAMW = {"type": "AdamW", "params": {"lr": 1e-4}}
"""The optimizer that is flown where no file names one."""

RECOMPUTE = ("none", "selective", "attention", "full", "budget")
PRECISIONS = ("fp32", "bf16", "fp16")

SAID_BY_OPTIONS = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "zero_optimization.stage", "bf16.enabled", "fp16.enabled", "activation_checkpointing.policy",
    "activation_checkpointing.budget_bytes",
)  # fmt: skip
"""Keys of a DeepSpeed file that options say in full."""

SIZES = ("dp_size", "mp_size", "pipeline_size")
DIVIDING = ("mp_size", "pipeline_size", "parallel", "pipeline")
"""Keys of a DeepSpeed file whose values options state."""

OFFLOAD_KEYS = ("offload_optimizer", "offload_param")
"""Of a DeepSpeed file's section zero_optimization: where state rests."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the user said; None where a default follows from the rest."""

    gpus: int | None = None
    dp: int | None = None
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    interleave: int = 1
    schedule: str = "1f1b"
    zero: int | None = None
    micro_batch: int | None = None
    global_batch: int | None = None
    seq: int | None = None
    sequence_parallel: bool = False
    recompute: str | None = None
    recompute_budget: int | None = None
    offload: str = "none"
    offload_to: str = "host"
    precision: str | None = None
    fidelity: str = "closed_form"
    expandable_segments: bool = False
    fusion: str = "none"
    clip: float = 0.0
    attention: str | None = None
    overlap: bool = True
    slow_ranks: float = 0.0
    slow_factor: float = 1.0
    slow_seed: int = 0
    engine: str = "{}"
    """Whatever else a DeepSpeed file says, as JSON: the engine that is flown honours it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A job in full. `gpus` = dp * tp * pp * cp; `accumulation` micro-steps of `micro_batch` make `global_batch`.

    Experts are spread over `ep` of the dp ranks. `attention` is the model's `attention_kernel`; without `overlap`
    gradients are reduced when backward has ended, and parameters are gathered before the next forward begins. Some
    `slow_ranks`, drawn with `slow_seed`, compute `slow_factor` times as long as the others (sim/unlike.py).
    """

    model: str
    cluster: str
    gpus: int
    dp: int
    tp: int
    pp: int
    cp: int
    ep: int
    interleave: int
    schedule: str
    zero: int
    micro_batch: int
    global_batch: int
    accumulation: int
    seq: int
    sequence_parallel: bool
    recompute: str
    recompute_budget: int | None
    offload: str
    offload_to: str
    precision: str
    fidelity: str
    expandable_segments: bool
    fusion: str
    clip: float
    attention: str
    overlap: bool
    slow_ranks: float
    slow_factor: float
    slow_seed: int
    engine: str
    counts: str = "tokens"
    """What `tokens_per_s` counts; "samples" of a model whose inputs are no tokens, with seq = 1."""


def resolve(options: Options, model: "ModelSpec | OwnModel", cluster: Cluster) -> Layout:
    """Fill in the defaults and check that the job is possible.

    Raises:
        ValueError: naming the option, its value and what is allowed.
    """
    _check(options)
    gpus, dp = _ranks(options, cluster)
    micro_batch, global_batch, accumulation = _batches(options, dp)
    if options.offload == "parameters" and (options.zero or 0) != 3:
        refuse(
            "offload", options.offload, f"optimizer, or zero = 3: at zero = {options.zero or 0} parameters stay whole"
        )
    seq = options.seq or model.seq
    if seq > model.seq and model.positions == "learned":
        refuse("seq", seq, f"at most {model.seq}, the learned positions of {model.name}")
    layout = Layout(
        model=model.name,
        cluster=cluster.name,
        gpus=gpus,
        dp=dp,
        tp=options.tp,
        pp=options.pp,
        cp=options.cp,
        ep=options.ep,
        interleave=options.interleave,
        schedule=_schedule(options, model, accumulation),
        zero=options.zero or 0,
        micro_batch=micro_batch,
        global_batch=global_batch,
        accumulation=accumulation,
        seq=seq,
        sequence_parallel=options.sequence_parallel,
        recompute=options.recompute or "none",
        recompute_budget=options.recompute_budget,
        offload=options.offload,
        offload_to=options.offload_to,
        precision=_precision(options, cluster),
        fidelity=options.fidelity,
        expandable_segments=options.expandable_segments,
        fusion=options.fusion,
        clip=options.clip,
        attention=options.attention or model.attention_kernel,
        overlap=options.overlap,
        slow_ranks=options.slow_ranks,
        slow_factor=options.slow_factor,
        slow_seed=options.slow_seed,
        engine=options.engine,
        counts=model.counts,
    )
    if layout.cp > 1 and layout.attention == "plain":
        refuse("attention", "plain", "fused where ranks share sequences (cp > 1)")
    if not layout.overlap and layout.zero > 1:
        refuse("overlap", "false", f"with zero = 0 or 1; zero = {layout.zero} shards what arrives during backward")
    kinds_of(layout, cluster)
    read_into(ActivationSection, engine_config(layout)["activation_checkpointing"], "recompute")
    return layout


def kinds_of(layout: Layout, cluster: Cluster) -> RankKinds:
    """The kinds of the job's ranks.

    Raises:
        ValueError: slow ranks that cannot be.
    """
    stragglers = Stragglers(ranks=layout.slow_ranks, factor=layout.slow_factor, seed=layout.slow_seed)
    return rank_kinds(cluster, layout.gpus, stragglers)


def as_slowest_sees(layout: Layout, cluster: Cluster) -> Cluster:
    """The cluster as if all ranks of the job were as slow as its slowest; itself where they are alike."""
    return seen_by(cluster, kinds_of(layout, cluster).kinds)


def refuse(name: str, value: object, allowed: str) -> NoReturn:
    """Raise the one-line error for an option."""
    raise ValueError(f"{name.replace('_', '-')} = {value}; allowed: {allowed}")


def _check(options: Options) -> None:
    """What can be said of each option by itself."""
    choices = {
        "recompute": (*RECOMPUTE, None),
        "fidelity": FIDELITIES,
        "fusion": FUSIONS,
        "precision": (*PRECISIONS, None),
        "schedule": tuple(SCHEDULES),
        "offload": ("none", "optimizer", "parameters"),
        "offload_to": ("host", "nvme"),
        "attention": ("fused", "plain", None),
    }
    for name, allowed in choices.items():
        value = getattr(options, name)
        if value not in allowed:
            names = [str(choice) for choice in allowed if choice is not None]
            refuse(name, value, ", ".join(names) + nearest(str(value), names))
    for name in ("gpus", "dp", "tp", "pp", "cp", "ep", "interleave", "micro_batch", "global_batch", "seq"):
        value = getattr(options, name)
        if value is not None and value < 1:
            refuse(name, value, "an integer >= 1")
    if options.sequence_parallel and options.tp == 1:
        refuse("sequence_parallel", True, "with tp > 1, whose ranks share the sequence")
    Zero.of_stage(options.zero or 0)


def _ranks(options: Options, cluster: Cluster) -> tuple[int, int]:
    """(GPUs, data-parallel ranks)."""
    model_parallel = options.tp * options.pp * options.cp
    gpus = options.gpus
    if gpus is None:
        gpus = options.dp * model_parallel if options.dp else (cluster.gpus or cluster.gpus_per_node)
    cluster.check_gpus(gpus)
    if gpus % model_parallel:
        product = f"tp * pp * cp = {options.tp} * {options.pp} * {options.cp} = {model_parallel}"
        refuse("gpus", gpus, f"a multiple of {product}")
    dp = gpus // model_parallel
    if options.dp is not None and options.dp != dp:
        product = f"{options.dp} * {options.tp} * {options.pp} * {options.cp} = {options.dp * model_parallel}"
        refuse("dp", options.dp, f"dp * tp * pp * cp must be the number of GPUs, but {product} and gpus = {gpus}")
    return gpus, dp


def _batches(options: Options, dp: int) -> tuple[int, int, int]:
    """(micro batch, global batch, micro-steps)."""
    micro_batch = options.micro_batch or 1
    per_step = micro_batch * dp
    global_batch = options.global_batch or per_step
    if global_batch % per_step:
        refuse("global_batch", global_batch, f"a multiple of micro-batch * dp = {micro_batch} * {dp} = {per_step}")
    return micro_batch, global_batch, global_batch // per_step


def _schedule(options: Options, model: "ModelSpec | OwnModel", micro_batches: int) -> str:
    """The schedule's name; with several chunks per rank 1F1B is the interleaved one."""
    if options.pp == 1 and options.interleave > 1:
        refuse("interleave", options.interleave, "1 without pipeline stages (pp = 1)")
    if options.pp > 1 and options.pp * options.interleave > model.layers:
        product = f"pp * interleave = {options.pp} * {options.interleave}"
        refuse("pp", options.pp, f"{product} at most the {model.layers} layers of {model.name}")
    if options.pp > 1 and (options.zero or 0) == 3:
        refuse("zero", 3, "0, 1 or 2 with a pipeline, whose micro-batches would gather every parameter anew")
    least, _ = SCHEDULES[options.schedule].chunks
    if options.pp > 1 and options.interleave < least:
        refuse("interleave", options.interleave, f"at least {least} with schedule = {options.schedule}")
    name = "interleaved" if options.schedule == "1f1b" and options.interleave > 1 else options.schedule
    if options.pp > 1:
        SCHEDULES[name].check(options.pp, micro_batches, options.interleave)
    return name


def _precision(options: Options, cluster: Cluster) -> str:
    """bf16, or fp16 on a GPU that has no bf16."""
    peaks = cluster.processor.peak_flops
    precision = options.precision or ("bf16" if "bf16" in peaks else "fp16")
    if precision not in peaks:
        known = [name for name in PRECISIONS if name in peaks]
        refuse("precision", precision, f"{', '.join(known)} on {cluster.processor.name}")
    return precision


def from_deepspeed(source: str | Path | Mapping[str, Any], given: Options) -> Options:
    """The options that a DeepSpeed JSON file (or dict) states, where the user gave none on the command line.

    Raises:
        ValueError: the file does not fit, see engine/config.py.
    """
    from ..engine.config import Config, load_json

    _check(given)
    if given.dp is None and given.gpus is None:
        raise ValueError("gpus is missing; allowed: an integer >= 1, because --config states batch sizes for all ranks")
    where, keys = load_json(source)
    given = _divided(given, keys, where)
    ranks = given.dp or (given.gpus or 1) // (given.tp * given.pp * given.cp)
    rest = {name: value for name, value in keys.items() if name not in DIVIDING}
    config = Config.of(rest, where, max(1, ranks))
    said = dict(_rest(keys))
    offload, offload_to = _offload(given, config.placement)
    return replace(
        given,
        zero=config.zero.stage if given.zero is None else given.zero,
        micro_batch=given.micro_batch or config.micro_batch,
        global_batch=given.global_batch or config.micro_batch * config.accumulation * ranks,
        precision=given.precision or ("fp32" if config.precision == "as is" else config.precision),
        clip=given.clip or config.clip,
        engine=json.dumps(_without_offload(said) if given.offload != "none" else said),
        offload=offload,
        offload_to=offload_to,
        recompute=given.recompute or config.activations.policy,
        recompute_budget=_budget(given, config.activations),
    )


def _divided(given: Options, keys: Mapping[str, Any], where: str) -> Options:
    """With what a file says of ranks by axis and of the pipeline, where the command line says nothing."""
    from ..engine.mesh import Parallelism, ParallelSection
    from ..engine.pipeline_section import PipelineSection

    parallel = read_into(ParallelSection, keys.get("parallel", {}), f"{where}: parallel")
    sizes = Parallelism.of(
        parallel,
        dp_size=keys.get("dp_size"),
        mp_size=keys.get("mp_size", 1),
        pipeline_size=keys.get("pipeline_size", 1),
        where=where,
    )
    pipeline = read_into(PipelineSection, keys.get("pipeline", {}), f"{where}: pipeline")
    if pipeline.partition not in ("parameters", "uniform"):
        raise ValueError(
            f"{where}: pipeline.partition = {pipeline.partition!r}; allowed in a simulation: leave it out, stages get"
            " equal numbers of blocks"
        )
    asked = given.schedule != "1f1b" or given.interleave > 1
    return replace(
        given,
        tp=given.tp if given.tp > 1 else sizes.tensor,
        pp=given.pp if given.pp > 1 else sizes.pipeline,
        cp=given.cp if given.cp > 1 else sizes.context,
        ep=given.ep if given.ep > 1 else parallel.expert,
        sequence_parallel=given.sequence_parallel or sizes.sequence_parallel,
        schedule=given.schedule if asked else pipeline.schedule,
        interleave=given.interleave if asked else pipeline.chunks or 1,
    )


def _offload(given: Options, placement: "Placement") -> tuple[str, str]:
    """(offload, offload_to) as the command line says, else as the file's sections come to."""
    if given.offload != "none" or not placement.moves:
        return given.offload, given.offload_to
    if placement.parameters != "device":
        return "parameters", placement.parameters
    return "optimizer", placement.optimizer


def _without_offload(keys: dict[str, Any]) -> dict[str, Any]:
    """What a file says, but for where state rests: the command line says that."""
    zero = {name: value for name, value in keys.get("zero_optimization", {}).items() if name not in OFFLOAD_KEYS}
    return {**keys, "zero_optimization": zero}


def _budget(given: Options, section: ActivationSection) -> int | None:
    """The budget of recomputation; the file's only with its policy."""
    wanted = given.recompute in (None, "budget")
    return section.budget_bytes if given.recompute_budget is None and wanted else given.recompute_budget


def _rest(keys: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """What a DeepSpeed file says beyond the options."""
    for name, value in keys.items():
        if prefix + name in SAID_BY_OPTIONS:
            continue
        if isinstance(value, Mapping) and any(said.startswith(f"{prefix}{name}.") for said in SAID_BY_OPTIONS):
            value = dict(_rest(value, f"{prefix}{name}."))
            if not value:
                continue
        yield name, value


def engine_config(layout: Layout) -> dict[str, Any]:
    """What the engine is flown with: the file's keys, and over them what the options say."""
    keys = json.loads(layout.engine)
    sections: dict[str, dict[str, Any]] = {
        "zero_optimization": {**_offload_sections(layout, keys), "stage": layout.zero},
        "bf16": {"enabled": layout.precision == "bf16"},
        "fp16": {"enabled": layout.precision == "fp16"},
        "activation_checkpointing": {"policy": layout.recompute, "budget_bytes": layout.recompute_budget},
    }
    sections |= _parallel_sections(layout)
    return {
        "optimizer": ADAMW,
        **{name: value for name, value in keys.items() if name not in SIZES},
        **{name: {**keys.get(name, {}), **said} for name, said in sections.items()},
        "gradient_clipping": layout.clip,
    }


def _parallel_sections(layout: Layout) -> dict[str, dict[str, Any]]:
    """How a model is divided among ranks, as a file says it; nothing where it is not."""
    sections: dict[str, dict[str, Any]] = {}
    if layout.tp * layout.cp * layout.pp * layout.ep > 1:
        sizes = {"tensor": layout.tp, "context": layout.cp, "pipeline": layout.pp}
        sections["parallel"] = {**sizes, "sequence_parallel": layout.sequence_parallel, "expert": layout.ep}
    if layout.pp > 1:
        # One that is only priced does the same work with a micro-batch as the one that it follows.
        performed = layout.schedule if SCHEDULES[layout.schedule].performed else "1f1b"
        sections["pipeline"] = {"schedule": performed, "chunks": layout.interleave}
    return sections


def with_positions(spec: ModelSpec, layout: Layout) -> ModelSpec:
    """The model with positions for the layout's sequences, where it computes them, and the layout's attention."""
    return replace(spec, seq=max(spec.seq, layout.seq), attention_kernel=layout.attention)


def computes_in(layout: Layout) -> str:
    """The precision of the matmuls, whose peak utilisation is measured against: that of autocast where it is on."""
    autocast = json.loads(layout.engine).get("torch_autocast", {})
    return AUTOCAST_FORMATS[autocast.get("dtype", "bfloat16")] if autocast.get("enabled") else layout.precision


def counts_blocks(config: Mapping[str, Any]) -> bool:
    """Whether a block does what it does because of how many there are; then a shallow model does not stand for it."""
    activations = config["activation_checkpointing"]
    whole = activations.get("contiguous_memory_optimization", False) or activations["policy"] == "budget"
    # Where a share of the units rests elsewhere, two blocks that are alike do not stand for all.
    partly = config["zero_optimization"].get("offload_optimizer", {}).get("ratio", 1.0) < 1.0
    return whole or partly or activations.get("every", 1) != 1


def _offload_sections(layout: Layout, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Where state rests, as a DeepSpeed file says it: this one, if it does."""
    if any(name in keys.get("zero_optimization", {}) for name in OFFLOAD_KEYS):
        return {}
    return offload_sections(layout.offload, layout.offload_to)


def offload_sections(offload: str, to: str) -> dict[str, Any]:
    """`--offload` and `--offload-to` as a DeepSpeed file says it; parameters take the optimizer's state with them."""
    if offload == "none":
        return {}
    place = {"device": "cpu"} if to == "host" else {"device": "nvme", "nvme_path": "/nvme"}
    sections: dict[str, Any] = {"offload_optimizer": place}
    if offload == "parameters":
        # Two buffers are enough to read one shard while another goes up.
        sections["offload_param"] = {**place, "buffer_count": 2}
    return sections
