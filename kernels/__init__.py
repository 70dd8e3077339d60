"""Computes: the hot arithmetic, each piece once plain and once fast. Empty until the first fused kernel lands."""
