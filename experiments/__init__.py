"""Asks: command line, models, verification, calibration, pictures. May import every other room.

cli          the command line: verbs, options, --json, exit codes
simulate     one training step of a model on a cluster
pipeline     the same of a job with pipeline stages: each distinct rank flown once
flights      traces of flights, each flown once: in memory, and on disk for all processes
prices       what a job costs on rented nodes, shapes of cluster compared by the price of a token
failures     what interruptions leave of a job's speed
layout       how a job is laid out: options, their defaults and checks
own_models   MODULE:FUNCTION in simulate: a user's own module as numbers, and its flight
own_flight   the same in the flight's process: built without weights, described, flown
launch       starts a script on several ranks of this machine
verify       ZeRO on Gloo ranks against a plain loop in one process
judgement    one ZeRO stage judged: distances, the witnesses of bytes and memory, the first place that is off
comparison   gradients, optimizer state and parameters of ranks beside one process's
pytest_plugin  tests on ranks: a marker, a pool of worlds, assert_trains_alike
remote       a test's function on a rank: its module, its arguments, what its assertions say
reference    one process, plain torch, whole batches
junit        a verification as a JUnit report
ranks        what the ranks of verify and demo do, and what they measure
samples      a user's model and batches: loading, splitting, losses
demo         the whole idea in about a minute
compression  convergence of each compressed scheme beside the uncompressed run
convergence  every precision, stage and compression beside fp32 on toy tasks
tasks        toy tasks that a tiny GPT learns in seconds: copy, reverse, sort, characters
train        a whole training loop as an example
progress     throughput, predicted finish, and a bar
validate     every prediction beside its published witness, with errors and thresholds
validate_sources  the published tables: their figures, what is fitted to them, thresholds
validate_report  a validation in a terminal and as a picture
validate_live  the same on Gloo ranks of this machine: step time, bytes, peak memory
published_figures  figures of published tables, each beside what predicts it
published_rows  a row of such a table as a job: model, cluster, layout, and what its program did
calibrate    turns measured primitives into a hardware profile
fit_network  network profiles of nodes, from published all-reduces, and their errors
fit_kernels  kernel figures of GPUs, from published measurements of kernels, and their errors
remedies     what makes a job fit that does not: options changed, each simulated, the fastest first
what_if      what one key of the config costs or saves on a reference job
config_keys  the keys of the config as a document, from the dataclasses that read them
choices      which algorithm is fastest at which size on a cluster: rows and a picture
reproduce    published tables and figures made again
papers       published jobs beside simulated ones: rows of a CSV as models and layouts
zero_memory  model state by ZeRO stage and ranks: the table of SC '20
weak_scaling GPTs of 1.7 B to 1 T parameters, weak scaling: table 1 of SC '21
selective_recompute  what selective recomputation saves and costs: Korthikanti et al. 2022
zero3_against_3d  ZeRO 3 and 3D parallelism at a fixed batch: table 2 of SC '21
redundancy   ranks that agree always, now and then, never: how far they drift, and what it costs
pipelines    pipeline schedules beside their closed forms: bubble and activations against micro-batches
three_dimensions  data, tensor and pipeline ranks together beside one process: every schedule
axis_bytes   what each rank of such a job sends by axis: simulated, and counted by ledgers and the kernel
curves       bus bandwidth of all-reduce against size: priced, published, measured here
timing       measures them, on all ranks at once
primitives   which operators, products and modules are measured
models       a transformer as numbers: the catalogue, model files, parameter and flop counts
witness      what the allocator did in a real step, beside the simulator's peak
transformer  the module that those numbers describe, in plain torch
corpus       real text that every machine has: the standard library's own source, as bytes
listings     the catalogues as entries and tables
units        figures with the units that their names end in
tables       results as tables in a terminal
plots        results as pictures
files        files that are whole or absent; CSV
bench        runnable comparisons with peers, and their results
step_files   what simulate --out writes of a step: numbers, pictures, a timeline, Chakra traces
plots_step   pictures of one step: where time goes, memory, the ranks of a pipeline
kineto       a PyTorch profiler's trace read as measured kernel times
profiled     a hardware profile from such times, and measured beside predicted
"""
