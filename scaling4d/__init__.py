"""scaling4d: pretraining of 4DS-style video masked auto-encoders in JAX.

Importing this package loads nothing heavy; the README gives a reading order of the modules.
"""

import importlib

__version__ = "0.1.0"
__all__ = ["load_backbone", "load_depth_model"]

_LOADERS = {"load_backbone": "scaling4d.pretrained.backbone", "load_depth_model": "scaling4d.pretrained.depth"}


def __getattr__(name: str):
    if name in _LOADERS:
        return getattr(importlib.import_module(_LOADERS[name]), name)
    raise AttributeError(f"module 'scaling4d' has no attribute '{name}'")
