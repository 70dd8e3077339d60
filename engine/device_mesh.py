"""The run's mesh as torch's DeviceMesh, for code of torch and of users that asks for one.

Our own collectives do not use it: it has process groups of its own, which are made when it is.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh

from .mesh import Parallelism


def device_mesh(parallelism: Parallelism, device: torch.device, timeout_s: float) -> DeviceMesh:
    """All four axes, those of one rank too, outermost first; `mesh["tensor"]` is this rank's group along an axis.

    All ranks of the run must call it. A process that is alone gets a process group of one, because torch has no
    DeviceMesh without.

    Args:
        timeout_s: of that process group.

    Raises:
        ValueError: on the sim device, whose ranks have no process groups of torch.
    """
    if device.type == "sim":
        raise ValueError("device_mesh: ranks of the sim device have no process groups; use cpu or cuda")
    if not dist.is_initialized():
        dist.init_process_group(store=HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=timeout_s))
    names = tuple(reversed(parallelism.order))
    sizes = [parallelism.sizes[name] for name in names]
    ranks = torch.arange(dist.get_world_size(), dtype=torch.int32).view(sizes)
    return DeviceMesh(device.type, ranks, mesh_dim_names=names)
