"""Describes: what a group of ranks does together, as pure data. Standard library only.

program     Send, Recv, Reduce; a step posts together, a program is one rank's steps; how a buffer is cut in chunks
ring        rings, one way and both ways, and pipelined chains as programs
shift       every rank hands a buffer to the next one
halving     recursive halving and doubling, for any number of ranks
tree        binomial trees; two binary trees at once, pipelined
exchange    all-to-all by pairwise exchange; everyone to everyone in one step
hierarchy   collectives on a grid of GPUs, nodes and pods
algorithms  the catalogue: every algorithm of every collective by name
rendezvous  which ops meet and in which round, or why they never do
proof       plays programs on sets of contributions
diagram     an algorithm as the picture one would draw of it
coalesce    which of many small tensors travel in one collective
groups      which ranks form which groups: a mesh of named axes; the network as a strided group sees it
tiers       a cluster seen by a collective: latency and bandwidth per tier; the closed form of a ring
costs       the closed form of every algorithm: its seconds without its program
choice      the fastest algorithm by network and size; where it changes
partition_stages  which layers make which stage: the largest part as small as can be
pipeline_acknowledge  when a sent message has surely arrived, told from the plan
zero        the three booleans of a ZeRO stage; its traffic and its memory in closed form
context     what attention sends over ranks that share each sequence
experts     how many tokens an expert takes; what the exchange of tokens sends
tensor      what tensor ranks send each other for a transformer, in closed form
recompute   what a block keeps for its backward, the cheapest set under a budget, closed forms
pipeline    what a pipeline schedule is made of: actions, messages, plans; which stage lives where
pipeline_schedules  GPipe, 1F1B, interleaved, zero-bubble and others: their orders, promises, closed forms
pipeline_messages   sends and receives put into a plan, posted ahead, fused
pipeline_rehearsal  a plan's actions one micro-batch after the other, as flights do them
pipeline_proof      everything done once, no deadlock under Gloo's and NCCL's rules, the promised memory
pipeline_clock      when actions run if messages are free, and the share of the step that is idle
pipeline_diagram    a plan as the textbook picture of it
trace       what one rank did in a training step: segments of ops, calls of segments, repetition
trace_file  a trace as JSON, and back
job_file    a job as JSON, and back: its layout and the traces of its distinct ranks
chakra_file a rank's graph as a Chakra execution trace, and back
"""
