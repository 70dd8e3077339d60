"""What lies below a GPU's memory on its node, and what moving state there and stepping it there costs.

All ranks of a node copy, step, read and write at the same time, so each gets an equal share of what they share: the
links to the host, the host's memory and the drives.
"""

from dataclasses import dataclass

from ..collectives.trace import Copy, HostWork
from ..reading import STRICT
from .processor import require, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """Table [host] of a cluster file: of one node.

    Attributes:
        memory_bytes: of the node.
        memory_bytes_per_s: peak of its memory, all channels together.
        memory_efficiency: share of that peak which an element-wise step of the optimizer reaches.
        link_bytes_per_s: from host memory to one GPU that copies alone, per direction, as reached.
        gpus_per_link: how many GPUs share such a link.
        nvme_bytes: of all drives of the node.
        nvme_read_bytes_per_s, nvme_write_bytes_per_s: of all of them together.
    """

    __pydantic_config__ = STRICT

    memory_bytes: int
    memory_bytes_per_s: float
    memory_efficiency: float
    link_bytes_per_s: float
    gpus_per_link: int
    nvme_bytes: int
    nvme_read_bytes_per_s: float
    nvme_write_bytes_per_s: float

    def __post_init__(self) -> None:
        names = [name for name in self.__dataclass_fields__ if name != "memory_efficiency"]
        require_positive(self, names)
        require(0 < self.memory_efficiency <= 1, "memory_efficiency", self.memory_efficiency, "> 0 and <= 1")


def copy_seconds(copy: Copy, host: Host, ranks: int) -> float:
    """Seconds of a copy while all `ranks` of the node do the same."""
    return copy.nbytes / bandwidth(copy.direction, host, ranks)


def bandwidth(direction: str, host: Host, ranks: int) -> float:
    """Bytes per second of one rank in a direction of a Copy, while all `ranks` of the node do the same."""
    match direction:
        case "to_host" | "to_device":
            return host.link_bytes_per_s / min(ranks, host.gpus_per_link)
        case "from_nvme":
            return host.nvme_read_bytes_per_s / ranks
        case "to_nvme":
            return host.nvme_write_bytes_per_s / ranks
    raise ValueError(f"unknown direction {direction!r} of a copy")


def work_seconds(work: HostWork, host: Host, ranks: int) -> float:
    """Seconds of work that the host's memory bounds, while all `ranks` of the node do the same.

    A fused AdamW does some 15 operations per element on 30 bytes of traffic; a socket has 10 operations per byte.
    """
    return (work.read_bytes + work.write_bytes) * ranks / (host.memory_bytes_per_s * host.memory_efficiency)
