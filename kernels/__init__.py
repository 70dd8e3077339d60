"""Computes: the hot arithmetic, as pure functions of tensors.

cast         fp16 and bf16 with a power-of-two scale that leaves headroom for a sum
quantize     blocks to int8 or int4 and back, to nearest or at random
sign         one bit per value and a scale per block
top_k        the largest values and where they were
low_rank     one power iteration towards the best product of two thin factors
lion         one step of Lion on lists of tensors
lamb         one step of LAMB on a tensor or a piece of one, but for its norms
core_attention  the core of attention in separate kernels: products of heads, masked softmax
attention    attention in blocks of keys, merged by their log-sum-exps; a block's backward
gating       which tokens go to which experts: top-k, capacity, balance; there and back
"""
