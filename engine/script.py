"""What a script written for DeepSpeed calls besides `initialize`."""

import argparse
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from .device import join
from .engine import Engine, initialize


def add_config_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Give a parser `--deepspeed` and `--deepspeed_config`, which `initialize(args=...)` reads.

    `args.local_rank` is the launcher's if the script's own `--local_rank` is left out, because torchrun passes it in
    the environment.
    """
    group = parser.add_argument_group("DeepSpeed")
    group.add_argument("--deepspeed", action="store_true", help="for the script's own use; the engine ignores it")
    group.add_argument("--deepspeed_config", type=str, default=None, help="path of the JSON configuration")
    parser.set_defaults(local_rank=int(os.environ.get("LOCAL_RANK", -1)))
    return parser


def init_distributed(
    dist_backend: str | None = None,
    *,
    timeout: timedelta = timedelta(minutes=30),
    dist_init_required: bool | None = None,
) -> None:
    """Join the ranks that were launched with this process, unless it has joined them already or was launched alone.

    `initialize` does it too; a script needs this only if it communicates before.

    Args:
        dist_backend: of torch.distributed; by default gloo for CPU tensors and, where there is CUDA, nccl for its.
        timeout: how long a rank waits for the others in one collective of torch.distributed.
        dist_init_required: False joins nothing.
    """
    if dist_init_required is not False:
        join(dist_backend, timeout.total_seconds())


def DeepSpeedEngine(  # noqa: N802  (scripts call it as the class that it is there)
    model: Any,
    criterion: Callable[..., Any] | None = None,
    config: Mapping[str, Any] | str | Path | None = None,
    **options: Any,
) -> Engine:
    """The engine alone; see `initialize` for the arguments."""
    engine, *_ = initialize(model, criterion, config, **options)
    return engine
