"""Windtunnel: fly a training program through a simulated cluster, prove it on CPU ranks, run it on GPUs.

The public names are loaded when first used (PEP 562), so that importing the package costs nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "initialize": "engine",
    "Engine": "engine",
    "World": "engine",
    "register_backend": "engine.backend",
    "simulate": "experiments.simulate",
    "verify": "experiments.verify",
    "calibrate": "experiments.calibrate",
    "demo": "experiments.demo",
    "reproduce": "experiments.reproduce",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOMES))}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
