"""`windtunnel.zero.Init` and `windtunnel.zero.GatheredParameters`, where DeepSpeed's scripts look for them."""

from .engine.gathered import GatheredParameters, Init

__all__ = ["GatheredParameters", "Init"]
