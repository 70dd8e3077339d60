"""Describes: what a group of ranks does together, as pure data. Standard library only.

program     Send, Recv, Reduce; a step posts together, a program is one rank's steps; how a buffer is cut in chunks
ring        ring reduce-scatter, all-gather and all-reduce as programs
proof       plays programs on sets of contributions, and on the in-order rendezvous rule
tiers       a cluster seen by a collective: latency and bandwidth per tier; closed-form times
zero        the three booleans of a ZeRO stage; its traffic and its memory in closed form
trace       what one rank did in a training step: segments of ops, calls of segments, repetition
trace_file  a trace as JSON, and back
"""
