"""Runnable comparisons, never timed tests; what they measured lies in results/, with its date.

collectives     our programs over sockets and shared memory against Gloo's own calls; many small tensors in one
distance        how far ZeRO and DDP stray from one process
offload         a step with state on the host and in files against one without; the drive against dd
fsdp            FSDP2 and DDP, a whole step: on our backend, on Gloo, and without communication
pipeline        1F1B on two ranks: our engine and torch.distributed.pipelining, a whole step
kernels         fused kernels against torch's operators, torch.compile and DeepSpeed's Adam; shares of copy bandwidth
kernel_cases    what that compares
speed           processor time of simulations: whole commands, first and again, and layouts in one process
kills           kills at random moments of training and saving: nothing lost, and the losses of an uninterrupted run
"""
