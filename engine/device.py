"""Facts about devices: which communicator serves which. Every `if cuda` of the engine lives here."""

import ctypes
import os
import weakref
from collections.abc import Callable
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store

from ..collectives.trace import Copy
from ..kernels import attention, dispatch, linear_cross_entropy
from .communicator import Communicator, NativeCommunicator, SoloCommunicator
from .gloo import GlooCommunicator
from .observer import Observer
from .transfer import CudaTransfers, SimTransfers, Transfers

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""torch's dtype by the name of a format; "as is" and its like are left out because they change nothing."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt(3), from <malloc.h>."""


def keep_freed_memory() -> None:
    """Tell glibc to keep what this process frees, as torch's allocator does on CUDA.

    Buffers of units come and go in every step; given back to the kernel, they cost a page fault per 4 KiB when next
    used: 10,000 in a step of 17 M parameters on two ranks, against 1,000 to 2,000 with this, at the same peak.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # other C libraries have no such knob
        mallopt(M_MMAP_THRESHOLD, 1 << 30)
        mallopt(M_TRIM_THRESHOLD, (1 << 31) - 1)


def model_device(model: nn.Module) -> torch.device:
    """Where the model is.

    Raises:
        ValueError: it has no parameters, or they are on several devices.
    """
    devices = {parameter.device for parameter in model.parameters()}
    if not devices:
        raise ValueError("the model has no parameters: there is nothing to train")
    if len(devices) > 1:
        raise ValueError(f"the model is on several devices: {', '.join(sorted(map(str, devices)))}; move it to one")
    return devices.pop()


def join(backend: str | None, timeout_s: float) -> None:
    """Join the process group that the environment describes, unless it is joined or nobody launched this process.

    Args:
        backend: of torch.distributed; None is gloo for CPU tensors and, where there is CUDA, nccl for its.
    """
    if dist.is_initialized() or "RANK" not in os.environ:
        return
    if backend is None:
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))


def communicator_for(device: torch.device, timeout_s: float, *, shared_memory: bool | None = None) -> Communicator:
    """A communicator over all data-parallel ranks for a model on `device`.

    Joins the process group that torchrun or a World describes, unless the process is in one already; a process that
    nobody launched is a group of one.

    Args:
        timeout_s: how long a rank waits for the others in one collective.
        shared_memory: whether CPU ranks talk through shared memory; by default they do if all are on one host.

    Raises:
        ValueError: a device that no communicator serves.
    """
    if device.type == "sim":
        from .flight import current_communicator

        return current_communicator()
    if device.type not in BACKENDS:
        raise ValueError(f"device {device.type!r}; allowed: {', '.join(BACKENDS)}, or sim inside a flight")
    if device.type == "cpu":
        keep_freed_memory()
    if not dist.is_initialized():
        join(BACKENDS[device.type], timeout_s)
    if not dist.is_initialized():
        return SoloCommunicator()
    group = dist.group.WORLD
    assert group is not None
    if group.size() == 1:
        return SoloCommunicator()
    if device.type == "cuda":
        return NativeCommunicator("data", group, timeout_s)
    return GlooCommunicator("data", group, _get_default_store(), timeout_s, shared_memory=shared_memory)


def attention_kernels(device: torch.device) -> ModuleType:
    """What has `block` and `block_backward` of kernels/attention.py for a device."""
    if device.type == "sim":
        from . import sim_attention

        return sim_attention
    return attention


def optimizer_step(kernel: str, device: torch.device) -> Callable[..., Any]:
    """What does one pass of the rule named `kernel` (kernels/one_pass.py) on a device."""
    if device.type in ("sim", "meta"):
        from . import sim_optimizer

        # What the host does in a flight is written down as a whole where it is asked for (engine/optimizer_rest.py).
        return sim_optimizer.step_ if device.type == "sim" else sim_optimizer.nothing
    return dispatch.optimizer_step(kernel, device.type)


def linear_cross_entropy_for(device: torch.device, *, alone: bool) -> Callable[..., Any]:
    """What has the place of `in_chunks` of kernels/linear_cross_entropy.py on a device.

    Args:
        alone: the vocabulary is not shared with other ranks; where it is, a flight sees each reduction.
    """
    if device.type == "sim" and alone:
        from . import sim_cross_entropy

        return sim_cross_entropy.in_one
    return linear_cross_entropy.in_chunks


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that the host's clock shows when."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_communicator(like: Communicator, timeout_s: float) -> Communicator:
    """The same ranks once more, on the host: what goes over it never meets training's collectives. All ranks make it.

    End it with `end_host_communicator`.
    """
    if like.world == 1:
        return SoloCommunicator("host")
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return GlooCommunicator("host", group, _get_default_store(), timeout_s, shared_memory=False)


def end_host_communicator(communicator: Communicator) -> None:
    """Close it, and end its process group."""
    communicator.close()
    if isinstance(communicator, GlooCommunicator) and dist.is_initialized():
        dist.destroy_process_group(communicator.group)


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of torch's generators: the host's, and that of an accelerator."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device.type).get_rng_state(device)
    return states


def set_random_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device.type).set_rng_state(states[device.type], device)


class CopyStream:
    """Copies of what rests on the host for a while. At once, where the device's memory is the host's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def memory(self, nbytes: int) -> Tensor:
        """[nbytes] of the host's memory."""
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")

    def copy(self, target: Tensor, source: Tensor) -> Any:
        """Start to copy what `source` has when the computation issued so far has ended; `fetch` wants the answer."""
        target.copy_(source)

    def fetch(self, values: Tensor, copied: Any) -> Tensor:
        """What rests in `values`, on the device, for what is computed next."""
        return values.to(self.device)


class CudaCopyStream(CopyStream):
    """A stream of its own, so that copies to the host run beside the computation."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def memory(self, nbytes: int) -> Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, target: Tensor, source: Tensor) -> torch.cuda.Event | None:
        if source.device == target.device:
            target.copy_(source)
            return None
        self._stream.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            source.record_stream(self._stream)
            return self._stream.record_event()

    def fetch(self, values: Tensor, copied: torch.cuda.Event | None) -> Tensor:
        if copied is not None:
            torch.cuda.current_stream().wait_event(copied)
        return values.to(self.device, non_blocking=True)


class SimCopyStream(CopyStream):
    """In a flight: writes down what would be copied. Host memory is on torch's meta device: shapes only."""

    def __init__(self, device: torch.device, observer: Observer) -> None:
        super().__init__(device)
        self.observer = observer

    def memory(self, nbytes: int) -> Tensor:
        tensor = torch.empty(nbytes, dtype=torch.uint8, device="meta")
        place = self.observer.rests("host", nbytes, "activations")
        weakref.finalize(tensor.untyped_storage(), self.observer.leaves, place).atexit = False
        return tensor

    def copy(self, target: Tensor, source: Tensor) -> Any:
        if target.device == source.device:
            target.copy_(source)
            return None
        return self.observer.moves(Copy("to_host", source.numel() * source.element_size(), "saved inputs"))

    def fetch(self, values: Tensor, copied: Any) -> Tensor:
        if copied is None:
            return values
        self.observer.awaits(copied, "to_device")
        result = torch.empty(values.shape, dtype=values.dtype, device=self.device)
        back = self.observer.moves(Copy("to_device", values.numel() * values.element_size(), "saved inputs"))
        self.observer.awaits(back, "compute")
        return result


def copy_stream_for(device: torch.device, observer: Observer) -> CopyStream:
    """What copies tensors of `device` to the host and back."""
    if device.type == "sim":
        return SimCopyStream(device, observer)
    return CudaCopyStream(device) if device.type == "cuda" else CopyStream(device)


def transfers_for(device: torch.device, communicator: Communicator, timeout_s: float, *, pin: bool) -> Transfers:
    """What moves bytes between `device`, host and files.

    Args:
        timeout_s: how long one move may take, and wait for others.
        pin: whether host memory is page-locked where the device profits from it.
    """
    if device.type == "sim":
        return SimTransfers(communicator.observer)
    return CudaTransfers(device, timeout_s, pin) if device.type == "cuda" else Transfers(timeout_s)
