"""Runnable comparisons, never timed tests; what they measured lies in results/, with its date.

collectives     our ring programs against Gloo's own calls
distance        how far ZeRO and DDP stray from one process
"""
