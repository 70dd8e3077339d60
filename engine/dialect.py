"""Keys of DeepSpeed's JSON that are not settings here, read before the ones that are.

A key may say what is always so (then that value is accepted and any other refused), may have another name by now, may
ask for what Windtunnel does not do, or may have the value "auto", which stands for one of the script's arguments.
docs/config.md lists them all from the tables below.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Always:
    """A key that changes nothing.

    Attributes:
        reason: what is done whatever the key says.
        values: those that agree with that, the others are refused; None where all do.
    """

    reason: str
    values: tuple[Any, ...] | None = None


ALWAYS: dict[str, Always] = {
    "zero_optimization.mics_hierarchical_params_gather": Always(
        "communication.algorithms can gather by tiers: all_gather = hierarchical/GPUSxNODES", (False,)
    ),
    "memory_breakdown": Always("windtunnel simulate shows where the memory goes", (False,)),
    "dump_state": Always("engine.settings shows the configuration as resolved", (False,)),
    "prescale_gradients": Always("a gradient is divided by ranks and micro-steps where it enters its unit's buffer"),
    "gradient_predivide_factor": Always("see prescale_gradients", (1, 1.0)),
    "gradient_allreduce_op": Always("gradients are averaged", ("mean",)),
    "disable_allgather": Always("parameters are gathered, never broadcast", (False,)),
    "zero_allow_untested_optimizer": Always("element-wise optimizers are known by name, others are refused"),
    "zero_force_ds_cpu_optimizer": Always("the optimizer that is configured is the one that steps", (False,)),
    "zero_optimization.overlap_comm": Always("communication overlaps with backward and with the next forward", (True,)),
    "zero_optimization.contiguous_gradients": Always("gradients lie end to end in their unit's buffer", (True,)),
    "zero_optimization.reduce_scatter": Always("gradients of sharded state are reduce-scattered", (True,)),
    "zero_optimization.use_multi_rank_bucket_allreduce": Always("see reduce_scatter", (True,)),
    "zero_optimization.allgather_partitions": Always("shards are all-gathered, never broadcast one by one", (True,)),
    "zero_optimization.allgather_sequential": Always("a unit is one all-gather", (False,)),
    "zero_optimization.use_all_reduce_for_fetch_params": Always("parameters are all-gathered", (False,)),
    "zero_optimization.stage3_use_all_reduce_for_fetch_params": Always("parameters are all-gathered", (False,)),
    "zero_optimization.round_robin_gradients": Always("every rank holds an equal part of every unit", (False,)),
    "zero_optimization.sub_group_size": Always("the optimizer steps one unit after another, whatever its size"),
    "zero_optimization.stage3_max_reuse_distance": Always("a unit is freed after use and gathered when used again"),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": Always("engine.full_state_dict() gathers them"),
    "zero_optimization.elastic_checkpoint": Always("checkpoints load at any number of ranks"),
    "zero_optimization.load_from_fp32_weights": Always("masters are restored exactly", (True,)),
    "zero_optimization.ignore_unused_parameters": Always("unused parameters are left as torch leaves them", (True,)),
    "zero_optimization.legacy_stage1": Always("there is one code path for all stages", (False,)),
    "zero_optimization.memory_efficient_linear": Always("what backward needs is gathered again, whatever the module"),
    "zero_optimization.zero_quantized_nontrainable_weights": Always("frozen parameters travel as others do", (False,)),
    "zero_optimization.cpu_offload": Always("the present key is zero_optimization.offload_optimizer", (False,)),
    "zero_optimization.cpu_offload_param": Always("the present key is zero_optimization.offload_param", (False,)),
    "zero_optimization.offload_optimizer.fast_init": Always("files hold no moments before they exist", (False,)),
    "zero_optimization.offload_param.buffer_size": Always("a buffer is as large as the largest shard"),
    "zero_optimization.offload_param.max_in_cpu": Always("host memory holds buffer_count shards, the drive the rest"),
    "aio": Always("files move past the page cache in requests of 1 MiB, four at a time"),
    "fp16.auto_cast": Always(
        "inputs keep their dtype; cast floating-point ones in the model, or use torch_autocast", (False,)
    ),
}

RENAMED: dict[str, str] = {
    "bfloat16": "bf16",
    "train_micro_batch_size": "train_micro_batch_size_per_gpu",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}
"""Spellings that DeepSpeed has given up, and the present ones."""

REFUSED: dict[str, str] = {
    "amp": "apex is not used; bf16 and fp16 keep fp32 masters",
    "fp8": "no unit is kept or multiplied in 8 bits",
    "autotuning": "use windtunnel simulate to compare layouts without running them",
    "elasticity": "the number of ranks is fixed when a run starts",
    "torch_autocast.lower_precision_safe_modules": "torch knows its safe operators",
    "sparse_attention": "attention is the model's own affair",
    "tensor_parallel": "tensor parallelism is not performed",
    "sequence_parallel_size": "sequence parallelism is not performed",
    "curriculum_learning": "choose samples in the data loader",
    "data_efficiency": "choose samples in the data loader",
    "progressive_layer_drop": "drop layers in the model",
    "compression_training": "weights are trained as they are; communication_compression is about what travels",
    "quantize_training": "weights are trained as they are",
    "eigenvalue": "no second-order information is computed",
    "flops_profiler": "windtunnel simulate counts operations and FLOPs without running them",
    "comms_logger": "engine.communicator.ledger counts every collective",
    "nebula": "checkpoints are files",
    "hybrid_engine": "generation uses the training engine as it is",
    "compile": "compile the model with torch.compile before initialize",
    "sparse_gradients": "embeddings' gradients are dense",
    "vocabulary_size": "nothing depends on it",
    "activation_checkpointing.synchronize_checkpoint_boundary": "nothing waits at the edge of a block",
    "activation_checkpointing.profile": "windtunnel simulate shows what recomputation costs",
    "zero_optimization.zenflow": "updates are not split by importance",
    "zero_optimization.leaf_module": "pass units=[...] to initialize to say what is gathered together",
}
"""Sections and keys that ask for what Windtunnel does not do, and why or what does it instead. `false` and a section
with "enabled": false ask for nothing, and are accepted."""

AUTO: dict[str, str] = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.eps": "adam_epsilon",
    "optimizer.params.weight_decay": "weight_decay",
    "scheduler.params.warmup_max_lr": "learning_rate",
    "scheduler.params.warmup_num_steps": "warmup_steps",
    "scheduler.params.total_num_steps": "max_steps",
    "bf16.enabled": "bf16",
    "fp16.enabled": "fp16",
}
"""Keys that may be "auto", and the attribute of `args` (transformers' TrainingArguments) that they stand for.
train_batch_size may be "auto" too: it follows from the other two batch sizes."""


def translated(data: Mapping[str, Any], where: str, arguments: Any = None) -> dict[str, Any]:
    """The settings in `data`: without keys that change nothing, and with values for "auto".

    Args:
        data: the JSON file, which is left as it is.
        where: what an error calls the place.
        arguments: what "auto" is taken from.

    Raises:
        ValueError: a key or value that is refused; the message says why, or what to write instead.
    """
    keys = _copied(data)
    for path, present in RENAMED.items():
        if _find(keys, path):
            raise ValueError(f"{where}: {path} is called {present} now")
    for path, reason in REFUSED.items():
        for section, name in _find(keys, path):
            if not _is_off(section[name]):
                raise ValueError(f"{where}: {path} is not supported: {reason}")
            del section[name]
    for path, always in ALWAYS.items():
        for section, name in _find(keys, path):
            value = section.pop(name)
            if always.values is not None and not any(_same(value, allowed) for allowed in always.values):
                allowed = " or ".join(str(value).lower() for value in always.values)
                raise ValueError(f"{where}: {path} = {value!r}; allowed: {allowed}, because {always.reason}")
    return _without_auto(keys, where, arguments)


def _without_auto(keys: dict[str, Any], where: str, arguments: Any) -> dict[str, Any]:
    if keys.get("train_batch_size") == "auto":
        del keys["train_batch_size"]
    for path in list(_autos(keys)):
        attribute = AUTO.get(path)
        value = None if attribute is None else getattr(arguments, attribute, None)
        if value is None:
            hint = f", or args with {attribute}" if attribute else ", no argument stands for it"
            raise ValueError(f"{where}: {path} = 'auto'; allowed: a value{hint}")
        for section, name in _find(keys, path):
            section[name] = value
    return keys


def _autos(keys: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Paths of all values that are "auto"."""
    for name, value in keys.items():
        if isinstance(value, Mapping):
            yield from _autos(value, f"{prefix}{name}.")
        elif value == "auto":
            yield prefix + name


def _find(keys: dict[str, Any], path: str) -> list[tuple[dict[str, Any], str]]:
    """The section that holds `path` and the key's name in it; empty if there is none."""
    *sections, name = path.split(".")
    for section in sections:
        inner = keys.get(section)
        if not isinstance(inner, dict):
            return []
        keys = inner
    return [(keys, name)] if name in keys else []


def _copied(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _copied(value) if isinstance(value, Mapping) else value for name, value in data.items()}


def _is_off(value: Any) -> bool:
    return value is False or value is None or (isinstance(value, Mapping) and value.get("enabled") is False)


def _same(value: Any, allowed: Any) -> bool:
    """Equal, and `1` is not `true`."""
    return type(value) is type(allowed) and value == allowed
