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

from ..collectives.groups import Mesh
from ..collectives.zero import Zero
from ..reading import STRICT, read_into
from .activation_section import ActivationSection
from .communication_section import Communication, Compression, CompressionSection, compression_of
from .dialect import translated
from .kernel_section import KernelSection
from .mesh import Parallelism, ParallelSection
from .metrics import CsvSection, JsonlSection, Monitoring, TensorBoardSection, WandbSection
from .pipeline_section import PipelineSection
from .placement import Placement
from .precision import AutocastSection, Bf16Section, DataTypes, Fp16Section, Precision, precision
from .redundancy import LocalUpdates, Redundancy, resolve
from .sampling import DataLoading, DataLoadingSection
from .schedule import SchedulerSection
from .sections import Buffers, OptimizerSection, ZeroSection


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
    zero_optimization: ZeroSection = field(default_factory=ZeroSection)
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
    communication_compression: CompressionSection = field(default_factory=CompressionSection)
    communication: Communication = field(default_factory=Communication)
    local_updates: LocalUpdates | None = None
    activation_checkpointing: ActivationSection = field(default_factory=ActivationSection)
    seed: int = 1234
    dp_size: int | None = None
    mp_size: int = 1
    pipeline_size: int = 1
    parallel: ParallelSection = field(default_factory=ParallelSection)
    pipeline: PipelineSection = field(default_factory=PipelineSection)
    kernels: KernelSection = field(default_factory=KernelSection)


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
        kernels: what is computed by fused kernels.
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
    compression: Compression = field(default_factory=Compression)
    communication: Communication = field(default_factory=Communication)
    buffers: Buffers = field(default_factory=Buffers)
    scheduler: SchedulerSection | None = None
    data_loading: DataLoading = field(default_factory=DataLoading)
    monitoring: Monitoring = field(default_factory=Monitoring)
    placement: Placement = field(default_factory=Placement)
    activations: ActivationSection = field(default_factory=ActivationSection)
    pipeline: PipelineSection = field(default_factory=PipelineSection)
    kernels: KernelSection = field(default_factory=KernelSection)

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
        return cls.of(data, where, world, arguments)

    @classmethod
    def of(cls, data: Mapping[str, Any], where: str, world: int, arguments: Any = None) -> "Config":
        """As `read`, from the keys as written; `where` is what errors call them."""
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
        compression = compression_of(
            keys.communication_compression, keys.zero_optimization, keys.communication_data_type, where
        )
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
            redundancy=_redundancy(keys, ranks, world, where, lossy_gradients=compression.gradients is not None),
            communication=keys.communication,
            buffers=keys.zero_optimization.buffers(),
            scheduler=keys.scheduler,
            data_loading=DataLoading.of(keys.data_loader, drop_last=keys.dataloader_drop_last),
            monitoring=Monitoring.of(keys, where),
            placement=keys.zero_optimization.placement(),
            activations=keys.activation_checkpointing,
            pipeline=keys.pipeline,
            kernels=keys.kernels,
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


def _redundancy(keys: Json, ranks: int, world: int, where: str, *, lossy_gradients: bool) -> Redundancy:
    zero, local = keys.zero_optimization, keys.local_updates
    if local is not None and ranks != world:
        raise ValueError(
            f"{where}: local_updates with {world // ranks} ranks for each copy of the model; allowed: one rank"
        )
    if local is not None and local.outer == "average" and lossy_gradients:
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
