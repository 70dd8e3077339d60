"""Performs: trains a model in parallel on CPU, CUDA, or the simulated device.

engine          initialize(), Engine: forward, backward, step
queries         what a script asks its engine: ranks, batch sizes, rates
loss            where the loss is in what a model returned
script          what a DeepSpeed script calls besides initialize: arguments, init_distributed
gathered        sharded parameters whole for a while: GatheredParameters
config          DeepSpeed's JSON, read into frozen values
dialect         keys of that JSON that are not settings: always so, renamed, refused, "auto"
device_mesh     the mesh as torch's DeviceMesh, for code that asks for one
sections        the sections on ZeRO and on the optimizer
communication_section  how collectives are done, and what travels in fewer bytes
mesh            how ranks are divided between kinds of parallelism: a mesh of named axes
schedule        learning-rate schedules as formulas
scheduler       objects that set an optimizer's learning rate by them, or by torch's
sampling        which samples each rank reads when
loader          loaders of a rank's micro-batches, whose position survives a restart
batch           what a batch is: changed, counted, given to a model
evaluation      mean loss and perplexity over a set that the ranks share
metrics         writers of metrics: JSONL, CSV, TensorBoard, W&B
monitor         what the engine tells of its steps, and to whom
flat            a model's parameters in flat units, the same on all ranks that have them
stages          a model as a row of layers, cut into the chunks of pipeline stages
layer_flops     what each layer of a model costs, traced: for stages that are equal in work
pipeline        PipelineEngine: a step of a model whose layers are on several ranks
pipeline_section  the config's section on it, and the plans that follow
pipeline_format  what chunks hand to each other: shapes, found once
pipeline_play   one rank's program of a plan: forwards, backwards, messages
stage_flight    flies one rank of a pipeline: its chunks one micro-batch at a time, each action a phase
pipeline_runtime  ZeRO under a pipeline: several micro-batches under way, chunks as one
deferred        linear layers whose weight gradients come after backward
letterbox       messages between two ranks of one host, through shared memory
letters         messages between two CPU ranks
partition       which parameters travel together
unit            a flat unit: its buffers and the moves between them
zero            when a unit is gathered, reduced and freed (ZeRO 0 to 3)
local_updates   ranks that step by themselves and agree now and then
context         ranks that share each sequence: tokens cut, attention across ranks, Ulysses
blockwise       attention over other ranks' keys, block by block: ring, all-gather
sim_attention   blocks of attention on `sim`
experts         mixture of experts: the layer, and ranks that have different experts
recompute       activations are computed again in backward instead of being kept
keeping         which results of a block are kept all the same; describes a block
shelf           where a block's saved inputs rest: in place, in one buffer, on the host, in parts
activation_section  the config's section for the three
optim           optimizers by name: torch's that go with shards, Lion, LAMB
one_pass        pieces of a unit stepped in one pass over memory
fused_modules   a model's modules switched to fused kernels
kernel_section  the config's section on both
sim_optimizer   that pass on `sim`, one operator
sim_cross_entropy  the fused loss on `sim`, one operator
optimizer       an optimizer on shards: loss scale, clipping, skipped steps
loss_scale      the loss scale as a state machine
precision       the config's sections on formats, and what they say together
saves           what an engine saves and loads, by DeepSpeed's names
checkpoint      saves an engine and loads it, at any other number of ranks and stage
checkpoint_plan boxes of tensors written and read by ranks: planners for torch.distributed.checkpoint
checkpoint_share which rank saves what, where ranks have different parameters
checkpoint_save one save: planned, staged, written, made the one of its tag
checkpoint_load one load: which, is it whole, does it fit, this rank's part
checkpoint_files the folder of checkpoints: complete or absent, `latest`, checksums, leftovers
run_state       what of a run is not a parameter or its moments
assembly        the whole model, a parameter at a time: its shards, parts and stages put together
export          full weights as safetensors, from an engine or from a checkpoint's folder
agreement       ranks exchange objects, and fail together
durable         files that are whole or absent
redundancy      what a run keeps more than once, as its config says it
roles           what a parameter is to the ranks that share the model
chunks          where a rank's elements lie in whole parameters, and parts put together again
sharding        tensors cut in parts along a dimension
tensor_functions  how activations pass between what tensor ranks share and what they have cut
tensor_layers   layers whose weights tensor ranks have cut; the loss of logits that nobody holds whole
tensor_plan     which module is cut how, by patterns of names, and what carries it out
tensor_models   the plans of known models; cuts the model of a run
randomness      dropout of ranks that share a model: equal masks, or their own
groups          the groups that collectives run on, along the axes of the config's mesh
placement       where state rests, as the config says it
tier            what one rank keeps off its device: files, buffers that units share
optimizer_rest  a unit's master, moments and gradient off the device
parameter_rest  a unit's shard of parameters off the device
transfer        copies between tiers and work on the host, in order; on CPU, CUDA and `sim`
nvme            files read and written past the page cache, checked, in parallel
host_step       optimizer steps on the host while gradients still come
inspection      gradients and optimizer state of a step, read from the outside
communicator    the door to the network: handles, ledger; NCCL and single-rank versions
compression     ways to send fewer bytes, described, and what each puts on the wire
codec           rows of numbers as rows of bytes and back
compressed      a communicator that compresses what goes through it
one_bit_adam    Adam whose momentum travels as one bit per element
gloo            plays our programs on CPU ranks, in order, in a thread or by who waits; says who failed
program         what a rank posts in each step of a program, for any transport
sockets         moves messages through Gloo
channel         a ring of slots in memory that two ranks map
shared_memory   moves messages through memory that the ranks of a host share
coalesce        many small tensors in a few collectives
backend         makes "windtunnel" a backend of torch.distributed
process_group   the group of that backend: which calls are ours, which Gloo's
lane            does a group's collectives in the order of the calls; torch's Work
arena           several tensors in one flat buffer and back
wire            bytes the kernel says were written
device          which communicator serves which device
world           a persistent world of ranks on this machine
observer        what the engine tells whoever watches
sim_device      the `sim` device: registration, fused attention
sim_autocast    what operators do there under torch.autocast
sim_recurrent   LSTMs and GRUs there, in the kernels that GPUs have for them
operators       FLOPs and bytes of an operator
recorder        writes a Trace of what a flight does
flight          flies a training step on `sim`: a model and the recorder in a world of any size
flight_errors   what cannot be flown, said with the operator and the module
pilot           sends flights to the child process that has the `sim` device; this side has no torch
"""

import importlib
from typing import Any

_HOMES = {"initialize": "engine", "Engine": "engine", "World": "world", "CommunicationError": "communicator"}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
