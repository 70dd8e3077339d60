"""Computes: the hot arithmetic, as pure functions of tensors.

cast         fp16 and bf16 with a power-of-two scale that leaves headroom for a sum
quantize     blocks to int8 or int4 and back, to nearest or at random
sign         one bit per value and a scale per block
top_k        the largest values and where they were
prune        which weights, rows or heads are kept by magnitude, and how many at which step
low_rank     one power iteration towards the best product of two thin factors
one_pass     an optimizer's step in one pass over memory: the reference, and by torch's operators
native       that pass in C++, compiled on this machine at its first use
adamw        one step of AdamW or Adam
sgd          one step of SGD with momentum
lion         one step of Lion on lists of tensors
lamb         one step of LAMB on a tensor or a piece of one, but for its norms
core_attention  the core of attention in separate kernels: products of heads, masked softmax
dispatch     which implementation of a kernel runs on which device
in_cache     several operators over large tensors, a piece at a time
norms        RMSNorm with a residual, LayerNorm
activations  SwiGLU, bias + GELU, rotary positions
dropout      dropout of what is added to a residual, without a mask in memory
philox       random words from counters
linear_cross_entropy  cross-entropy of a linear layer, whose logits are never in memory as a whole
triton_optimizers  AdamW, SGD and Lion in one pass, for CUDA
triton_norms       RMSNorm with a residual, for CUDA
triton_activations  SwiGLU, bias + GELU, dropout, for CUDA
attention    attention in blocks of keys, merged by their log-sum-exps; a block's backward
gating       which tokens go to which experts: top-k, capacity, balance; there and back
"""
