"""Windtunnel: fly a training program through a simulated cluster, prove it on CPU ranks, run it on GPUs.

The public names are loaded when first used (PEP 562), so that importing the package costs nothing.
"""

import importlib
from typing import Any

_HOMES = {
    "initialize": "engine",
    "Engine": "engine",
    "DeepSpeedEngine": "engine.script",
    "add_config_arguments": "engine.script",
    "init_distributed": "engine.script",
    "World": "engine",
    "RepeatingLoader": "engine.loader",
    "register_backend": "engine.backend",
    "simulate": "experiments.simulate",
    "verify": "experiments.verify",
    "calibrate": "experiments.calibrate",
    "demo": "experiments.demo",
    "reproduce": "experiments.reproduce",
    "launch": "experiments.launch",
}

_MODULES = {"comm": "comm", "zero": "zero", "optim": "engine.optim"}

__all__ = [*_HOMES, *_MODULES]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOMES:
        from .reading import nearest

        known = sorted(__all__)
        raise AttributeError(
            f"module {__name__!r} has no attribute {name!r}; it has {', '.join(known)}{nearest(name, known)}"
        )
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
