"""A backend of torch.distributed, so that DDP and FSDP2 run on our collective programs unchanged:

    windtunnel.register_backend()
    torch.distributed.init_process_group("cpu:windtunnel")

`new_group`, `init_device_mesh` and torchrun need nothing more. It serves CPU tensors.
"""

import torch.distributed as dist
from torch._C._distributed_c10d import _DistributedBackendOptions

from .process_group import NAME, WindtunnelGroup

RANKS_SHOWN = 8


def register_backend() -> None:
    """Make "windtunnel" a backend that torch.distributed knows. Calling this again changes nothing."""
    if NAME not in dist.Backend.backend_list:
        dist.Backend.register_backend(NAME, _create, extended_api=True, devices=["cpu"])


def _create(settings: _DistributedBackendOptions, options: object) -> WindtunnelGroup:
    if options is not None:
        raise ValueError(f"pg_options = {options!r}; allowed: None, because backend {NAME!r} has no options")
    ranks = settings.global_ranks_in_group  # empty for the default group
    shown = f" (ranks {', '.join(map(str, ranks))})" if 0 < len(ranks) <= RANKS_SHOWN else ""
    axis = f"group {settings.group_id}{shown}"
    return WindtunnelGroup(axis, settings.store, settings.group_rank, settings.group_size, settings.timeout)
