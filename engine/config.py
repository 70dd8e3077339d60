"""What a run is told: DeepSpeed's JSON, read at the edge into frozen values.

A key that Windtunnel does not know or does not honour is an error that names it and the nearest known key: a setting
that is silently ignored is worse than one that is refused.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..collectives.algorithms import KINDS, algorithm
from ..collectives.groups import Mesh
from ..collectives.tiers import Tier
from ..collectives.zero import Zero
from ..reading import STRICT, read_into
from .activation_section import ActivationSection
from .compression import ERROR_FEEDBACK, SCHEMES, BlockQuantized, Cast, Scheme, scheme_named
from .dialect import translated
from .mesh import Parallelism, ParallelSection
from .metrics import CsvSection, JsonlSection, Monitoring, TensorBoardSection, WandbSection
from .pipeline_section import PipelineSection
from .placement import OffloadOptimizerSection, OffloadParamSection, Placement
from .precision import AutocastSection, Bf16Section, DataTypes, Fp16Section, Precision, precision
from .redundancy import OFF, LocalUpdates, Redundancy, resolve
from .sampling import DataLoading, DataLoadingSection
from .schedule import SchedulerSection

DATA_TYPES: dict[str, Literal["fp16", "bf16", "fp32"]] = {
    "fp16": "fp16", "bf16": "bf16", "bfp16": "bf16", "fp32": "fp32",
}  # fmt: skip
"""Our name of a `communication_data_type`; DeepSpeed writes bf16 as "bfp16" there."""


LEAST_ELEMENTS = {
    "reduce_bucket_size": 1,
    "stage3_max_live_parameters": 0,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
"""Smallest values of the sizes in `zero_optimization`; a JSON file may write them as 5e8."""


def _unbounded(elements: float | None) -> float:
    return math.inf if elements is None else int(elements)


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffers:
    """Bounds, in elements, of what a rank holds besides its shards.

    Attributes:
        bucket_elements: of one flat unit, unless a single parameter is larger.
        live_elements: of all gathered units, beyond which none is gathered before it is needed.
        ahead_elements: of the units gathered before they are needed.
        persistent_below: smaller parameters are never sharded.
    """

    bucket_elements: float = 500_000_000
    live_elements: float = math.inf
    ahead_elements: float = math.inf
    persistent_below: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ZeroSection:
    """`zero_optimization`: which of optimizer state, gradients and parameters each rank keeps only 1/n of.

    Attributes:
        stage: 1 shards the optimizer's state, 2 gradients too, 3 parameters too; 0 shards nothing.
        zero_quantized_weights: parameters are gathered as int8 blocks (ZeRO++'s qwZ).
        zero_quantized_gradients: gradients are exchanged as int4 blocks (ZeRO++'s qgZ).
        reduce_bucket_size: elements of the largest flat unit, and so of its gradient buffer and of one collective;
            blocks with more are cut between parameters.
        stage3_max_live_parameters: gathered elements beyond which nothing is gathered ahead.
        stage3_prefetch_bucket_size: elements that may be on their way ahead of their use; 0 gathers nothing ahead.
        stage3_param_persistence_threshold: parameters with fewer elements stay whole on every rank.
        mics_shard_size: states are sharded over so many consecutive ranks and replicated across (MiCS); -1: over all.
        zero_hpz_partition_size: so many consecutive ranks keep the parameters a second time, for backward (ZeRO++'s
            hpZ); 1: none do.
    """

    __pydantic_config__ = STRICT
    stage: int = 0
    reduce_bucket_size: float = 500_000_000
    stage3_max_live_parameters: float | None = None
    stage3_prefetch_bucket_size: float | None = None
    stage3_param_persistence_threshold: float = 0
    zero_quantized_weights: bool = False
    zero_quantized_gradients: bool = False
    mics_shard_size: int = OFF
    zero_hpz_partition_size: int = 1
    offload_optimizer: OffloadOptimizerSection = field(default_factory=OffloadOptimizerSection)
    offload_param: OffloadParamSection = field(default_factory=OffloadParamSection)

    def __post_init__(self) -> None:
        if self.stage not in range(4):
            raise ValueError(f"stage = {self.stage}; allowed: 0, 1, 2, 3")
        for name, least in LEAST_ELEMENTS.items():
            value = getattr(self, name)
            if value is not None and (value < least or value != int(value)):
                raise ValueError(f"{name} = {value:g}; allowed: an integer >= {least}, in elements")
        self.placement()

    def buffers(self) -> "Buffers":
        return Buffers(
            bucket_elements=int(self.reduce_bucket_size),
            live_elements=_unbounded(self.stage3_max_live_parameters),
            ahead_elements=_unbounded(self.stage3_prefetch_bucket_size),
            persistent_below=int(self.stage3_param_persistence_threshold),
        )

    def placement(self) -> Placement:
        """Where shards rest."""
        return Placement.resolve(self.stage, self.offload_optimizer, self.offload_param)


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSection:
    """`optimizer`: a type by name and its keyword arguments.

    Attributes:
        type: a name of `windtunnel.optim` in any case: torch's element-wise ones (Adam, AdamW, SGD, ...), Lion, LAMB.
        params: its keyword arguments; Adam and AdamW also take `adam_w_mode`.
    """

    __pydantic_config__ = STRICT
    type: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressionSection:
    """`communication_compression`: ours; what travels in fewer bytes.

    Attributes:
        gradients: the scheme of gradients by name (engine/compression.py).
        gradient_options: its fields.
        parameters: the scheme of gathered parameters, at stage 3.
        parameter_options: its fields.
        min_elements: smaller buffers travel as they are.
    """

    __pydantic_config__ = STRICT
    gradients: str | None = None
    gradient_options: dict[str, Any] = field(default_factory=dict)
    parameters: str | None = None
    parameter_options: dict[str, Any] = field(default_factory=dict)
    min_elements: int = 1024

    def __post_init__(self) -> None:
        if self.min_elements < 0:
            raise ValueError(f"min_elements = {self.min_elements}; allowed: at least 0")
        for name, options in (("gradient", self.gradient_options), ("parameter", self.parameter_options)):
            if options and getattr(self, f"{name}s") is None:
                raise ValueError(f"{name}_options = {options} without {name}s; name the scheme that they are for")


@dataclass(frozen=True, slots=True, kw_only=True)
class Communication:
    """`communication`: ours; how collectives are done.

    Attributes:
        transport: between CPU ranks; "auto" is shared memory where all ranks are on one host, else sockets.
        algorithms: for a kind of collective ("all_reduce") the algorithm that does it at every size ("ring",
            "hierarchical/8x4", "native"); the others are chosen by size.
        tiers: the network under the ranks, innermost first, as tables with the fields of Tier (collectives/tiers.py);
            algorithms are then chosen by their price on it, else by what was measured on one host.
    """

    __pydantic_config__ = STRICT
    transport: Literal["auto", "sockets", "shared_memory"] = "auto"
    algorithms: dict[str, str] = field(default_factory=dict)
    tiers: tuple[dict[str, Any], ...] = ()

    def network(self) -> tuple[Tier, ...]:
        """The tiers.

        Raises:
            ValueError: a field that a Tier does not have, or that is missing or wrong.
        """
        try:
            return tuple(Tier(**table) for table in self.tiers)
        except TypeError as error:
            raise ValueError(f"tiers: {error}; allowed: the fields of Tier in collectives/tiers.py") from None

    def __post_init__(self) -> None:
        self.network()
        for kind, name in self.algorithms.items():
            if name != "native" or kind not in KINDS:
                algorithm(kind, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compression:
    """What engine/compressed.py does to gradients and to parameters on their way; None leaves them alone."""

    gradients: Scheme | None = None
    parameters: Cast | BlockQuantized | None = None
    min_elements: int = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Json:
    """The keys of the JSON file, as written; None where a batch size is left to be derived from the others.

    Attributes:
        train_batch_size: samples per optimizer step, of all ranks.
        train_micro_batch_size_per_gpu: samples of one rank in one forward.
        gradient_accumulation_steps: micro-steps per optimizer step.
        gradient_clipping: largest global norm of the gradients, 0 for none.
        dataloader_drop_last: samples that do not fill a global batch are left out of an epoch; `false` fills it up with
            samples from the beginning of the epoch's order (DeepSpeed's default, which trains on them twice).
        steps_per_print: rank 0 prints loss, learning rate and throughput on stderr every so many steps.
        wall_clock_breakdown: seconds of forward, backward and step beside them.
        communication_data_type: gradients travel in this type.
        seed: of the data loader's order and of random compression.
        dp_size: data-parallel ranks; checked against the ranks that there are.
        mp_size: tensor-parallel ranks.
        pipeline_size: pipeline stages.
    """

    __pydantic_config__ = STRICT
    train_batch_size: int | None = None
    train_micro_batch_size_per_gpu: int | None = None
    gradient_accumulation_steps: int | None = None
    gradient_clipping: float = 0.0
    zero_optimization: ZeroSection = ZeroSection()
    optimizer: OptimizerSection | None = None
    scheduler: SchedulerSection | None = None
    dataloader_drop_last: bool = True
    data_loader: DataLoadingSection = field(default_factory=DataLoadingSection)
    steps_per_print: float | None = None
    wall_clock_breakdown: bool = False
    jsonl_monitor: JsonlSection = field(default_factory=JsonlSection)
    csv_monitor: CsvSection = field(default_factory=CsvSection)
    tensorboard: TensorBoardSection = field(default_factory=TensorBoardSection)
    wandb: WandbSection = field(default_factory=WandbSection)
    bf16: Bf16Section = field(default_factory=Bf16Section)
    fp16: Fp16Section = field(default_factory=Fp16Section)
    data_types: DataTypes = field(default_factory=DataTypes)
    torch_autocast: AutocastSection = field(default_factory=AutocastSection)
    communication_data_type: Literal["fp16", "bf16", "bfp16", "fp32"] | None = None
    communication_compression: CompressionSection = CompressionSection()
    communication: Communication = Communication()
    local_updates: LocalUpdates | None = None
    activation_checkpointing: ActivationSection = field(default_factory=ActivationSection)
    seed: int = 1234
    dp_size: int | None = None
    mp_size: int = 1
    pipeline_size: int = 1
    parallel: ParallelSection = field(default_factory=ParallelSection)
    pipeline: PipelineSection = field(default_factory=PipelineSection)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """A run as resolved for a number of ranks.

    Attributes:
        parallelism: ranks by axis.
        micro_batch: samples of one rank in one forward.
        accumulation: micro-steps per optimizer step.
        clip: largest global gradient norm, 0 for none.
        formats: dtypes of parameters, gradients and operators, and the scale of the loss.
        compression: of what travels between ranks.
        communication: how collectives are done.
        buffers: how large what is not a shard may grow.
        redundancy: what is kept more than once.
        placement: where shards rest, if not on the device.
        activations: what is computed again in backward.
        pipeline: how the stages of a pipeline work.
    """

    zero: Zero
    micro_batch: int
    accumulation: int
    clip: float
    optimizer: OptimizerSection | None
    seed: int
    parallelism: Parallelism
    formats: Precision = field(default_factory=Precision)
    redundancy: Redundancy = field(default_factory=Redundancy)
    compression: Compression = Compression()
    communication: Communication = Communication()
    buffers: Buffers = Buffers()
    scheduler: SchedulerSection | None = None
    data_loading: DataLoading = field(default_factory=DataLoading)
    monitoring: Monitoring = field(default_factory=Monitoring)
    placement: Placement = field(default_factory=Placement)
    activations: ActivationSection = field(default_factory=ActivationSection)
    pipeline: PipelineSection = field(default_factory=PipelineSection)

    @property
    def precision(self) -> Literal["as is", "bf16", "fp16"]:
        """dtype of the parameters: "as is" keeps the model's own."""
        return self.formats.parameters

    @property
    def mesh(self) -> Mesh:
        """The axes of all ranks, innermost first, those of data as the run keeps it more than once."""
        return self.parallelism.mesh(self.redundancy.mesh(self.sample_ranks))

    @property
    def sample_ranks(self) -> int:
        """Ranks, or groups of them, that train on samples of their own."""
        assert self.parallelism.data is not None
        return self.parallelism.data

    @classmethod
    def read(cls, source: str | Path | Mapping[str, Any] | None, world: int, arguments: Any = None) -> "Config":
        """From a dict or the path of a JSON file; None gives the defaults.

        Args:
            arguments: of the script, from whose attributes values of "auto" are taken (see engine/dialect.py).

        Raises:
            ValueError: an unknown key, a wrong type, or sizes that do not fit a `world` of so many ranks.
        """
        where, data = load_json(source)
        keys = read_into(Json, translated(data, where, arguments), where)
        parallelism = Parallelism.of(
            keys.parallel,
            dp_size=keys.dp_size,
            mp_size=keys.mp_size,
            pipeline_size=keys.pipeline_size,
            where=where,
        ).over(world, where)
        assert parallelism.data is not None
        ranks = parallelism.data
        micro_batch, accumulation = _batch_sizes(keys, ranks, where)
        if not 0 <= keys.gradient_clipping < math.inf:
            raise ValueError(
                f"{where}: gradient_clipping = {keys.gradient_clipping};"
                " allowed: a finite number >= 0 (0 clips nothing)"
            )
        compression = _compression(keys, where)
        formats = precision(
            keys.bf16,
            keys.fp16,
            keys.data_types,
            keys.torch_autocast,
            lossy=compression.gradients is not None or compression.parameters is not None,
            where=where,
        )
        return cls(
            zero=Zero.of_stage(keys.zero_optimization.stage),
            micro_batch=micro_batch,
            accumulation=accumulation,
            clip=keys.gradient_clipping,
            optimizer=keys.optimizer,
            seed=keys.seed,
            parallelism=parallelism,
            formats=formats,
            compression=compression,
            redundancy=_redundancy(keys, ranks, world, where),
            communication=keys.communication,
            buffers=keys.zero_optimization.buffers(),
            scheduler=keys.scheduler,
            data_loading=DataLoading.of(keys.data_loader, drop_last=keys.dataloader_drop_last),
            monitoring=Monitoring.of(keys, where),
            placement=keys.zero_optimization.placement(),
            activations=keys.activation_checkpointing,
            pipeline=keys.pipeline,
        )


def load_json(source: str | Path | Mapping[str, Any] | None) -> tuple[str, Mapping[str, Any]]:
    """(what errors call it, the keys as written) of a dict or the path of a JSON file.

    Raises:
        ValueError: a file that cannot be read or is not a JSON object.
    """
    if source is None:
        return "config", {}
    if isinstance(source, Mapping):
        return "config", source
    path = Path(source)
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(f"config: cannot read {str(path)!r}: {error}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return str(path), data


def _compression(keys: Json, where: str) -> Compression:
    """What DeepSpeed's keys and our section say together.

    Raises:
        ValueError: two keys for the same traffic, or a scheme that does not go with the ZeRO stage.
    """
    zero, section = keys.zero_optimization, keys.communication_compression
    dtype = keys.communication_data_type
    gradients = {
        "communication_data_type": None if dtype is None else Cast(dtype=DATA_TYPES[dtype]),
        "zero_optimization.zero_quantized_gradients": BlockQuantized(bits=4) if zero.zero_quantized_gradients else None,
        "communication_compression.gradients": _scheme(section.gradients, section.gradient_options, "gradients", where),
    }
    parameters = {
        "zero_optimization.zero_quantized_weights": BlockQuantized(bits=8) if zero.zero_quantized_weights else None,
        "communication_compression.parameters": _scheme(
            section.parameters, section.parameter_options, "parameters", where
        ),
    }
    for_gradients, for_parameters = _only_one(gradients, where), _only_one(parameters, where)
    if isinstance(for_gradients, ERROR_FEEDBACK) and zero.stage >= 2:
        raise ValueError(
            f"{where}: communication_compression.gradients = {section.gradients!r} keeps a whole gradient of what it"
            f" lost on every rank, which zero_optimization.stage = {zero.stage} is there to avoid; allowed: stage 0 or"
            " 1, or a scheme without error feedback"
        )
    if isinstance(for_parameters, ERROR_FEEDBACK):
        raise ValueError(
            f"{where}: communication_compression.parameters = {section.parameters!r}; allowed:"
            f" {', '.join(name for name, (kind, _) in SCHEMES.items() if kind not in ERROR_FEEDBACK)}"
        )
    if for_parameters is not None and zero.stage != 3:
        key = next(key for key, scheme in parameters.items() if scheme is not None)
        raise ValueError(
            f"{where}: {key} is set and zero_optimization.stage = {zero.stage}; allowed: stage 3, which keeps exact"
            " parameters apart from the gathered ones"
        )
    return Compression(gradients=for_gradients, parameters=for_parameters, min_elements=section.min_elements)


def _redundancy(keys: Json, ranks: int, world: int, where: str) -> Redundancy:
    zero, local = keys.zero_optimization, keys.local_updates
    if local is not None and ranks != world:
        raise ValueError(
            f"{where}: local_updates with {world // ranks} ranks for each copy of the model; allowed: one rank"
        )
    if local is not None and local.outer == "average" and _compression(keys, where).gradients is not None:
        raise ValueError(
            f"{where}: local_updates.outer = 'average' sends parameters and no gradients, so a scheme for gradients"
            " would round them; allowed: outer = 'nesterov', or no compression"
        )
    try:
        redundancy = resolve(
            zero.mics_shard_size, zero.zero_hpz_partition_size, local, zero.stage, ranks, experts=keys.parallel.expert
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if zero.placement().moves and redundancy != Redundancy():
        raise ValueError(
            f"{where}: zero_optimization.offload_optimizer and offload_param do not go with mics_shard_size,"
            " zero_hpz_partition_size, local_updates or parallel.expert; allowed: one or the other"
        )
    return redundancy


def _scheme(name: str | None, options: dict[str, Any], what: str, where: str) -> Scheme | None:
    return None if name is None else scheme_named(name, options, f"{where}: communication_compression.{what}")


def _only_one(schemes: Mapping[str, Scheme | None], where: str) -> Any:
    """The scheme that one of the keys gives, or None."""
    given = {key: scheme for key, scheme in schemes.items() if scheme is not None}
    if len(given) > 1:
        raise ValueError(f"{where}: {' and '.join(given)} are both set; allowed: at most one of them")
    return next(iter(given.values()), None)


def _batch_sizes(keys: Json, ranks: int, where: str) -> tuple[int, int]:
    """(micro batch, accumulation) from any two of batch = micro batch * accumulation * ranks; what is left out is 1."""
    for name in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        value = getattr(keys, name)
        if value is not None and value < 1:
            raise ValueError(f"{where}: {name} = {value}; allowed: an integer >= 1")
    batch, micro, steps = keys.train_batch_size, keys.train_micro_batch_size_per_gpu, keys.gradient_accumulation_steps
    if batch is None:
        return micro or 1, steps or 1
    per_step = ranks * (micro or 1) * (steps or 1)
    if batch % per_step or (micro and steps and batch != per_step):
        raise ValueError(
            f"{where}: train_batch_size = {batch} does not fit {ranks} ranks * train_micro_batch_size_per_gpu"
            f" {micro or 'unset'} * gradient_accumulation_steps {steps or 'unset'}; allowed: a multiple of {per_step}"
            if not (micro and steps)
            else f"{where}: train_batch_size = {batch}; allowed: {ranks} ranks * {micro} * {steps} = {per_step}"
        )
    if micro is None:
        micro = batch // (ranks * (steps or 1))
    return micro, batch // (ranks * micro)
