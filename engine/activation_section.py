"""`activation_checkpointing` of the config: which activations are computed again, and where inputs rest till then."""

from dataclasses import dataclass
from typing import Literal

from ..reading import STRICT


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationSection:
    """DeepSpeed's keys, which say where the saved inputs of a block rest, and ours, which say what is saved.

    Attributes:
        policy: what backward computes again: "none", "full" (a block from its inputs), "selective" (all but matrix
            products, convolutions and attention), "attention" (the modules in blocks that are called core_attention,
            from their inputs) or "budget" (as little as fits in `budget_bytes`).
        every: blocks in a segment that is computed again as a whole ("full" only); "auto" is the square root of how
            many there are.
        budget_bytes: what all blocks together may keep on this rank between forward and backward.
        partition_activations: each tensor-parallel rank keeps 1/n of the inputs; with one rank it changes nothing.
        cpu_checkpointing: inputs rest on the host.
        contiguous_memory_optimization: inputs rest in one buffer that is allocated once.
        number_checkpoints: places in that buffer; by default one for each segment.
    """

    __pydantic_config__ = STRICT
    policy: Literal["none", "full", "selective", "attention", "budget"] = "none"
    every: int | Literal["auto"] = 1
    budget_bytes: int | None = None
    partition_activations: bool = False
    cpu_checkpointing: bool = False
    contiguous_memory_optimization: bool = False
    number_checkpoints: int | None = None

    def __post_init__(self) -> None:
        self._check_policy()
        if self.policy == "none":
            for name in ("partition_activations", "cpu_checkpointing", "contiguous_memory_optimization"):
                if getattr(self, name):
                    raise ValueError(
                        f"{name} = true with policy = 'none', which saves no inputs; allowed: policy 'full',"
                        " 'selective', 'attention' or 'budget' beside it"
                    )
        if self.number_checkpoints is not None:
            if not self.contiguous_memory_optimization:
                raise ValueError(
                    f"number_checkpoints = {self.number_checkpoints} without contiguous_memory_optimization, whose"
                    " buffer it is for; allowed: leave it out, or set both"
                )
            if self.number_checkpoints < 1:
                raise ValueError(f"number_checkpoints = {self.number_checkpoints}; allowed: an integer >= 1")

    def _check_policy(self) -> None:
        if self.every != "auto" and self.every < 1:
            raise ValueError(f"every = {self.every}; allowed: an integer >= 1, or 'auto'")
        if self.every != 1 and self.policy != "full":
            raise ValueError(f"every = {self.every!r} with policy = {self.policy!r}; allowed: 1, or policy 'full'")
        if self.policy == "budget" and self.budget_bytes is None:
            raise ValueError("policy = 'budget' without budget_bytes; allowed: an integer >= 0 beside it")
        if self.budget_bytes is not None and (self.policy != "budget" or self.budget_bytes < 0):
            raise ValueError(
                f"budget_bytes = {self.budget_bytes} with policy = {self.policy!r}; allowed: an integer >= 0 with"
                " policy 'budget'"
            )
