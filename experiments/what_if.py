"""What if one key of the config were different? A reference job, simulated again with each change.

    windtunnel reproduce what_if --out experiments/bench/results

makes the figures that docs/config.md shows.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..sim.result import StepResult
from .files import write_csv
from .reproduce import Item, Say
from .simulate import simulate

if TYPE_CHECKING:
    from rich.table import Table

MODEL, CLUSTER, GPUS = "gpt3-13b", "dgx-a100", 64

BASE: dict[str, Any] = {
    "train_batch_size": 256,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 3},
    "bf16": {"enabled": True},
    "gradient_clipping": 1.0,
    "activation_checkpointing": {"policy": "full"},
}
"""ZeRO-3 in bf16 with AdamW: two micro-steps of two sequences on each of 64 GPUs, whole blocks recomputed."""

RESULTS = Path(__file__).parent / "bench" / "results" / "what_if.csv"

GIGA = 1e9


@dataclass(frozen=True, slots=True)
class Variant:
    """The base with some keys changed, given as sections that are laid over its own."""

    change: Mapping[str, Any] = field(default_factory=dict)

    @property
    def paths(self) -> tuple[str, ...]:
        """The keys that differ."""
        return tuple(_paths(self.change, ""))

    @property
    def label(self) -> str:
        """ "zero_optimization.stage = 2"."""
        return ", ".join(f"{path} = {_shown(_value(self.change, path))}" for path in self.paths)

    def config(self) -> dict[str, Any]:
        return _laid_over(BASE, self.change)


VARIANTS = (
    Variant({"zero_optimization": {"stage": 2}}),
    Variant({"zero_optimization": {"stage": 1}}),
    Variant({"zero_optimization": {"stage": 0}}),
    Variant({"zero_optimization": {"reduce_bucket_size": 100_000_000}}),
    Variant({"zero_optimization": {"stage3_prefetch_bucket_size": 0}}),
    Variant({"zero_optimization": {"stage3_max_live_parameters": 0}}),
    Variant({"zero_optimization": {"stage3_param_persistence_threshold": 100_000}}),
    Variant({"train_micro_batch_size_per_gpu": 1}),
    Variant({"train_micro_batch_size_per_gpu": 4}),
    Variant({"train_batch_size": 1024}),
    Variant({"train_batch_size": 128, "gradient_accumulation_steps": 1}),
    Variant({"gradient_clipping": 0.0}),
    Variant({"bf16": {"enabled": False}}),
    Variant({"bf16": {"enabled": False}, "fp16": {"enabled": True}}),
    Variant({"data_types": {"grad_accum_dtype": "fp32"}}),
    Variant({"bf16": {"enabled": False}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    Variant({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}),
    Variant({"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}}),
    Variant({"zero_optimization": {"zero_quantized_weights": True}}),
    Variant({"zero_optimization": {"zero_quantized_gradients": True}}),
    Variant({"zero_optimization": {"mics_shard_size": 8}}),
    Variant({"zero_optimization": {"zero_hpz_partition_size": 8}}),
    Variant({"activation_checkpointing": {"policy": "none"}}),
    Variant({"activation_checkpointing": {"policy": "selective"}}),
    Variant({"activation_checkpointing": {"policy": "budget", "budget_bytes": 20_000_000_000}}),
    Variant({"activation_checkpointing": {"every": 2}}),
    Variant({"activation_checkpointing": {"contiguous_memory_optimization": True}}),
    Variant({"activation_checkpointing": {"cpu_checkpointing": True}}),
    Variant({"communication_compression": {"gradients": "int8"}}),
    Variant({"communication_compression": {"parameters": "int8"}}),
    Variant({"communication": {"algorithms": {"all_gather": "ring", "reduce_scatter": "ring"}}}),
)
"""One line of the table each. A key that another value changes has a line here; see KEYS_WITHOUT_PRICE for the rest."""

KEYS_WITHOUT_PRICE: dict[str, str] = {
    "seed": "nothing",
    "scheduler": "some arithmetic of the host per step",
    "dataloader_drop_last": "a global batch per epoch",
    "data_loader": "time and memory of the host",
    "steps_per_print": "a scalar all-reduce for each line",
    "wall_clock_breakdown": "the host waits for the device six times per step",
    "jsonl_monitor": "a scalar all-reduce per step, after which the host waits for the device",
    "csv_monitor": "as `jsonl_monitor`",
    "tensorboard": "as `jsonl_monitor`",
    "wandb": "as `jsonl_monitor`",
    "local_updates": "an all-reduce of the optimizer's values once in `every` steps, and no gradients",
    "zero_optimization.offload_optimizer": "as `windtunnel simulate --offload optimizer` says",
    "zero_optimization.offload_param": "as `windtunnel simulate --offload parameters` says",
    "bf16.check_grad_overflow": "one pass over the gradient shard",
    "fp16": "a pass over the gradient shard for the check, and what a skipped step took",
    "communication_data_type": "as `communication_compression` to that type",
    "communication_compression.gradient_options": "depends on the scheme",
    "communication_compression.parameter_options": "depends on the scheme",
    "communication_compression.min_elements": "small buffers travel as they are",
    "communication.transport": "measured in experiments/bench/results/collectives.csv",
    "communication.tiers": "the choice between algorithms alone",
    "kernels": "less: as `windtunnel simulate --config` with it says",
    "activation_checkpointing.partition_activations": "nothing with one tensor-parallel rank",
    "activation_checkpointing.number_checkpoints": "memory, by the number of places",
    "dp_size": "nothing: it is checked",
    "mp_size": "as `windtunnel simulate --tp` says",
    "pipeline_size": "as `windtunnel simulate --pp` says",
    "pipeline": "as `windtunnel simulate --schedule` and `--interleave` say",
    "parallel": "as `windtunnel simulate` says of `--tp`, `--pp` and `--sequence-parallel`",
}
"""Keys (or whole sections) whose price the table cannot show, and what is to be said instead."""


def _paths(change: Mapping[str, Any], prefix: str) -> Iterator[str]:
    """Paths of the values: tables that a single key holds (`params`, `algorithms`) are its value."""
    for name, value in change.items():
        if isinstance(value, Mapping) and not prefix:
            yield from _paths(value, f"{name}.")
        else:
            yield prefix + name


def _value(change: Mapping[str, Any], path: str) -> Any:
    for name in path.split("."):
        change = change[name]
    return change


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name}: {_shown(item)}" for name, item in value.items()) + "}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _laid_over(base: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    laid = dict(base)
    for name, value in change.items():
        below = laid.get(name)
        laid[name] = _laid_over(below, value) if isinstance(value, Mapping) and isinstance(below, Mapping) else value
    return laid


# The table #


def rows(variants: Iterable[Variant] = VARIANTS, say: Say = lambda line: None) -> list[dict[str, Any]]:
    """The base and each variant: seconds per sequence, memory and bytes, and what they are relative to the base."""
    made: list[dict[str, Any]] = []
    for number, variant in enumerate((Variant(), *variants)):
        say(f"what if {number}: {variant.label or 'the base'}")
        made.append(_row(number, variant, simulated(variant), made[0] if made else None))
    return made


def simulated(variant: Variant) -> StepResult:
    return simulate(MODEL, CLUSTER, gpus=GPUS, config=variant.config())


def _row(number: int, variant: Variant, result: StepResult, base: Mapping[str, Any] | None) -> dict[str, Any]:
    figures = {
        "s_per_sequence": result.step_time_s / result.layout["global_batch"],
        "peak_memory_bytes": result.peak_memory_bytes["total"],
        "bytes_sent_per_gpu": result.bytes_sent_per_gpu["total"],
    }
    relative = {f"relative_{name}": value / (base or figures)[name] - 1 for name, value in figures.items()}
    return {"number": number, "variant": variant.label, **figures, **relative, "fits": result.fits}


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file that `reproduce` wrote."""
    with path.open() as file:
        return list(csv.DictReader(file))


CELLS = ("s_per_sequence", "peak_memory_bytes", "bytes_sent_per_gpu")


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A row as text: the base in units, the others as changes."""
    variant, fits = row["variant"], "yes" if str(row["fits"]) == "True" else "NO"
    if not variant:
        base = (f"{float(row[CELLS[0]]) * 1e3:.1f} ms", *(f"{float(row[name]) / GIGA:.1f} GB" for name in CELLS[1:]))
        return "base", "as above", *base, fits
    return str(row["number"]), variant, *(f"{float(row[f'relative_{name}']):+.1%}" for name in CELLS), fits


COLUMNS = ("what if", "change", "time per sequence", "peak memory", "bytes sent per GPU and step", "fits in 80 GB")


def markdown_rows(path: Path) -> Iterator[str]:
    yield "| " + " | ".join(COLUMNS) + " |"
    yield "|---|---|" + "---:|" * (len(COLUMNS) - 2)
    for row in read(path):
        number, change, *rest = cells(row)
        yield "| " + " | ".join((number, f"`{change}`" if row["variant"] else change, *rest)) + " |"


def reproduce(folder: Path, say: Say) -> Item:
    """All variants, as a table and a picture."""
    made = rows(say=say)
    slowest = max(made, key=lambda row: row["relative_s_per_sequence"])
    leanest = min(made, key=lambda row: row["relative_peak_memory_bytes"])
    return Item(
        name="what_if",
        plot=plot(made, folder / "what_if.png"),
        csv=write_csv(folder / "what_if.csv", made),
        rows=made,
        sentence=(
            f"of {len(VARIANTS)} changes to {MODEL} on {GPUS} GPUs of {CLUSTER}, {slowest['variant']} costs the most"
            f" time ({slowest['relative_s_per_sequence']:+.0%}), {leanest['variant'] or 'none'} saves the most memory"
            f" ({leanest['relative_peak_memory_bytes']:+.0%})"
        ),
        tables=(_table(made),),
    )


def _table(made: Iterable[Mapping[str, Any]]) -> "Table":
    from .tables import table

    return table(f"{MODEL} on {GPUS} GPUs of {CLUSTER}", COLUMNS, [cells(row) for row in made])


def plot(made: list[dict[str, Any]], path: Path) -> Path:
    """A bar for each change: time per sequence, and peak memory, relative to the base."""
    from matplotlib import pyplot

    from .plots import INK, MEASURED, PREDICTED, STYLE, save

    changed = made[1:]
    with pyplot.rc_context(STYLE):
        figure, panels = pyplot.subplots(1, 2, figsize=(12, 0.3 * len(changed) + 1.4), sharey=True)
        for axes, (name, title, colour) in zip(
            panels,
            (
                ("s_per_sequence", "time per sequence", PREDICTED),
                ("peak_memory_bytes", "peak memory", MEASURED),
            ),
            strict=True,
        ):
            changes = [100 * row[f"relative_{name}"] for row in changed]
            bars = axes.barh(range(len(changed)), changes, color=colour)
            axes.bar_label(bars, fmt="%+.0f %%", padding=3, fontsize=8)
            axes.axvline(0, color=INK, lw=0.8)
            axes.margins(x=0.15)
            axes.set(xlabel="change in %", title=title)
        panels[0].set_yticks(
            range(len(changed)), [f"{row['variant']}  ({row['number']})" for row in changed], fontsize=8
        )
        panels[0].invert_yaxis()
        return save(figure, path)
