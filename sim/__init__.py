"""Prices: how long a training step takes and what it keeps in memory on a described cluster. No torch.

processor   a GPU or a CPU share: peaks, achievable shares of them, measured tables; each figure has its source
entries     the files of the catalogue: names, and where a name or a user's path leads
fabrics     the profile of a kind of link, and the links of one level of a cluster's network
prices      what a node costs per hour, and what a job on several of them does
hardware    a cluster of processors and its network, read from the catalogue or from a user's file
unlike      how ranks may differ: slow ones, nodes with another GPU or slower links
rank_classes  ranks by kind, and the few classes of groups that they make
uneven_pipeline  a step of a job whose pipelines differ: by themselves, and together in the update
host        what lies below the GPUs' memory on a node: seconds of copies, files and optimizer steps there
transfers   copies and work of the host as simpy processes
kernel      seconds of one kernel: roofline, or what was measured
gemm        seconds of a matrix product: tiles, waves, splits, traffic
attention   seconds of fused attention: mask, length of the sequence, blocks
fusion      chains of element-wise kernels as the one kernel that a fusing compiler makes of them
network     seconds and bytes of a collective: closed form, or every message
topology    the network as links: which ones a message takes, and how late it is
flows       max-min fair rates of flows that share links
groups      the groups of an axis played at the same time
messages    the messages of a collective as arrays: who sends what to whom, in which step
program     plays collective programs on simpy: every message a flow that shares links with the others
storages    when the storages of a trace come and go, in the order of the program
allocator   PyTorch's caching allocator of device memory: segments, blocks, the best fit, what goes back
framework   what a process takes outside of the allocator: the context, buffers of communicators
memory      bytes in use through the step, by category, what the allocator holds for them, the first request too many
stage_memory  bytes in use on a pipeline rank: its flight played in the order of the plan
streams     a device's streams as simpy processes, and how they disturb each other
remembered  results that belong to a large value, found again by its identity
replay      a trace played on a cluster: overlap, waits, what is exposed
pipeline    a step of a pipeline composed from the prices of its stages: compute, exposed messages, bubble
timetable   when everything in a pipeline plan takes place, in one pass without a clock
stages      what the ranks of a pipeline cost, from their flights, and the step that they make
timeline    what ran when, as a Perfetto file
failures    how often a job is interrupted, how often it should save, what share of its time is progress
result      what a simulation says: time, breakdown, memory, traffic
runs        which run of a segment a reference means, where a phase is played more often than flown
recording   a recorded replay op by op: its spans, what waits for what, memory over time
pipeline_timeline  a pipelined step as a timeline: actions, messages, the streams inside
job         a whole job priced and recorded from its traces
chakra      jobs as Chakra execution traces, a graph per rank, and back
"""
