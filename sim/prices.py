"""What a node costs per hour, and what a job on several of them does."""

import math
from dataclasses import dataclass
from datetime import date

from ..reading import STRICT
from .processor import require, require_positive

SECONDS_PER_HOUR = 3_600


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """Table [price] of a cluster file: what renting one whole node costs.

    Attributes:
        per_hour_usd: of one node, with all its GPUs.
        kind: what is bought, e.g. "on demand".
        region: where, as the seller calls it.
        as_of: the day the price was read, YYYY-MM-DD.
    """

    __pydantic_config__ = STRICT

    per_hour_usd: float
    kind: str
    region: str
    as_of: str

    def __post_init__(self) -> None:
        require_positive(self, ("per_hour_usd",))
        for name in ("kind", "region"):
            require(bool(getattr(self, name).strip()), name, getattr(self, name), "a word")
        try:
            date.fromisoformat(self.as_of)
        except ValueError:
            raise ValueError(f"as_of = {self.as_of!r}; allowed: a date, YYYY-MM-DD") from None

    def job_usd(self, *, gpus: int, gpus_per_node: int, seconds: float) -> float:
        """What a job costs: its nodes, each paid for as a whole, times its hours."""
        return self.per_hour_usd * math.ceil(gpus / gpus_per_node) * seconds / SECONDS_PER_HOUR
